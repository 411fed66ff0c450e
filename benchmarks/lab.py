"""The bench's tools: servers and visitors on cores of their own, CPU clocks, memory, and what machine this is."""

from __future__ import annotations

import json
import os
import platform
import select
import socket
import subprocess
import sys
import tempfile
import time
import venv
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps import HOST

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chat-session-bench"
PATIENCE = 60.0
CHAINLIT = ("chainlit", "uvloop", "websockets", "httptools")
NAMES = {
    "ours": "chat_session",
    "bare": "bare ASGI",
    "litestar": "bare Litestar",
    "starlette": "Starlette",
    "socketio": "python-socketio",
    "sse": "sse-starlette",
    "chainlit": "Chainlit",
}
PACKAGES = (
    *("litestar", "msgspec", "uvicorn", "uvloop", "websockets", "httptools"),
    *("starlette", "python-socketio", "sse-starlette"),
)


def on_core(core: int) -> Any:
    """Return a function that binds a new process to *core*, if there is more than one core to choose from."""
    cores = sorted(os.sched_getaffinity(0))
    return None if len(cores) < 2 else lambda: os.sched_setaffinity(0, {cores[core]})


def cpu_seconds(process_id: int) -> float:
    """Read another process's CPU clock, exact to the nanosecond: its number is what clock_getcpuclockid(3) gives."""
    return time.clock_gettime((~process_id << 3) | 2)


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])


class Server:
    """One server process."""

    def __init__(self, kind: str, process: subprocess.Popen[str], port: int) -> None:
        self.kind, self.process, self.port = kind, process, port

    @property
    def cpu(self) -> float:
        """Seconds of CPU that it has used."""
        return cpu_seconds(self.process.pid)

    @property
    def memory(self) -> int:
        """Bytes that it holds, shared pages by their share (PSS)."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text(encoding="ascii")
        return int(text.partition("\nPss:")[2].split()[0]) * 1024

    def settle(self, patience: float = 10.0) -> bool:
        """Wait until it has done what is left over of an earlier run."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            before = self.cpu
            time.sleep(0.1)
            if self.cpu - before < 0.01:
                return True
        return False

    def read(self, patience: float) -> dict[str, Any]:
        """Read what an answerer has printed; nothing where it has not, in time."""
        assert self.process.stdout
        ready, _, _ = select.select([self.process.stdout], [], [], patience)
        return dict(json.loads(self.process.stdout.readline())) if ready else {}


@contextmanager
def serve(kind: str, *files: str, script: Path = FOLDER / "apps.py") -> Iterator[Server]:
    """Run a server of *kind* on a free port; with a certificate's *files*, by TLS."""
    port = free_port()
    arguments = [find_python(kind), str(script), kind, str(port), *files]
    environment = {**os.environ, "CHAINLIT_APP_ROOT": str(CACHE / "chainlit-app")}
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            arguments,
            preexec_fn=on_core(0),  # noqa: PLW1509
            env=environment,
            cwd=tempfile.gettempdir(),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            if not is_open(process, port):
                errors.seek(0)
                raise RuntimeError(f"{kind} did not start: {errors.read().decode()[-500:]}")
            yield Server(kind, process, port)
        finally:
            stop(process)


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process, by force where it does not listen."""
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def is_open(process: subprocess.Popen[Any], port: int) -> bool:
    """Wait until the server listens."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection((HOST, port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
        else:
            return True
    return False


class Crowd:
    """The other side of visitors.py: each method is a command to that process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def begin(self, command: str, **content: Any) -> None:
        """Give a command without waiting for its end."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"do": command, **content}) + "\n")
        self.process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """Wait for the end of the last command."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the visitors left: see their message above")
        return dict(json.loads(line))

    def do(self, command: str, **content: Any) -> dict[str, Any]:
        """Give a command and wait for its end."""
        self.begin(command, **content)
        return self.end()


@contextmanager
def visit(server: Server, count: int = 0, seconds: float = 0.0) -> Iterator[Crowd]:
    """Run a process of visitors, *count* of them open, on another core than the server."""
    process = subprocess.Popen(
        [sys.executable, str(FOLDER / "visitors.py"), server.kind, str(server.port)],
        preexec_fn=on_core(-1),  # noqa: PLW1509
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        crowd = Crowd(process)
        if count:
            crowd.do("open", count=count, seconds=seconds)
        yield crowd
    finally:
        stop(process)


# ---- Peers and versions ----


def find_python(kind: str) -> str:
    """Return the interpreter that has what *kind* needs."""
    return str(CACHE / "chainlit" / "bin" / "python") if kind == "chainlit" else sys.executable


def missing() -> dict[str, str]:
    """Return the kinds that cannot be run here, and why; Chainlit is installed where it is not yet."""
    needs = {"starlette": "starlette", "socketio": "python-socketio", "sse": "sse-starlette"}
    found = {kind: f"{package} is not installed" for kind, package in needs.items() if not find_version(package)}
    if why := install_chainlit():
        found["chainlit"] = why
    return found


def install_chainlit() -> str:
    """Make Chainlit's environment outside the tree; return why it could not be made, or nothing."""
    (CACHE / "chainlit-app").mkdir(parents=True, exist_ok=True)
    if chainlit_version():
        return ""
    print(f"Installing Chainlit in {CACHE} (once) …", flush=True)
    venv.create(CACHE / "chainlit", with_pip=True)
    command = [find_python("chainlit"), "-m", "pip", "install", "--quiet", *CHAINLIT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return "" if chainlit_version() else f"pip could not install it: {result.stderr.strip()[-200:]}"


def chainlit_version() -> str:
    """Return the version of Chainlit in its own environment, or nothing."""
    python = find_python("chainlit")
    if not Path(python).exists():
        return ""
    program = "from importlib.metadata import version; print(version('chainlit'))"
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=False).stdout.strip()


def find_version(package: str) -> str:
    """Return a package's version, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def describe_machine() -> str:
    """Name the machine and the versions."""
    found = [f"{name} {found}" for name in PACKAGES if (found := find_version(name))]
    if chainlit := chainlit_version():
        found.append(f"chainlit {chainlit}")
    cores = len(os.sched_getaffinity(0))
    machine = f"{processor()}, {cores} cores, {platform.system()}"
    return f"{machine}; Python {platform.python_version()}, {', '.join(found)}"


def processor() -> str:
    """Name the processor."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
