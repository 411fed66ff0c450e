"""What a word costs: server CPU per word, chat_session against a bare ASGI app that sends the same frames.

    python benchmarks/words.py [--quick]

Both run on uvicorn with its default websocket implementation and uvloop, one process each, compression off. The runs
of a pair follow each other at once and change places from round to round; the figure is the median of their ratios.
The visitors are one process of raw sockets, on another core where there is one: all they do is count words.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

HOST = "127.0.0.1"
MARK = b"<#>"  # One in each word, and nothing that a frame's header can be: words are counted without reading frames.
PACE = 50
VERSION = "chat-session.v1"
PATIENCE = 60.0


@dataclass(frozen=True)
class Load:
    """A load, and how much of the bare app's CPU a word of ours may cost under it."""

    name: str
    manner: str
    visitors: int
    words: int
    goal: float


# ---- The answerer, and the two apps that serve it ----


async def answer(text: str) -> AsyncIterator[str]:
    """Answer "steady N" with N words at a steady pace, and "burst N" with N words without a pause."""
    manner, count = text.split()
    for number in range(int(count)):
        if manner == "steady":
            await asyncio.sleep(1 / PACE)
        yield f"{number:05}{MARK.decode()} "


def bare_app() -> Any:
    """Build the least app that sends these frames: no token, no session, no limits, nobody else to think of."""
    import msgspec  # noqa: PLC0415

    encode = msgspec.json.Encoder().encode

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await serve_lifespan(receive, send)
        if scope["type"] != "websocket":
            return None

        async def say(frame: dict[str, Any]) -> None:
            await send({"type": "websocket.send", "text": encode(frame).decode()})

        await receive()
        await send({"type": "websocket.accept", "subprotocol": VERSION})
        while (event := await receive())["type"] == "websocket.receive":
            message = msgspec.json.decode(event["text"])
            reply = os.urandom(12).hex()
            await say({"type": "start", "messageId": reply, "messageMetadata": {"inReplyTo": message["id"]}})
            await say({"type": "text-start", "id": reply})
            async for word in answer(message["text"]):
                await say({"type": "text-delta", "id": reply, "delta": word})
            await say({"type": "text-end", "id": reply})
            await say({"type": "finish"})
        return None

    return app


async def serve_lifespan(receive: Any, send: Any) -> None:
    """Start and stop, as a server asks."""
    while (event := await receive())["type"] != "lifespan.shutdown":
        await send({"type": event["type"] + ".complete"})
    await send({"type": "lifespan.shutdown.complete"})


def our_app() -> Any:
    """Build what the README shows, with room for a crowd from one address."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from litestar import Litestar  # noqa: PLC0415

    from chat_session import Chat, ChatSessionConfig, ChatSessionPlugin  # noqa: PLC0415

    async def ours(chat: Chat) -> AsyncIterator[str]:
        async for word in answer(chat.message):
            yield word

    config = ChatSessionConfig(secret="a key that only this benchmark knows", max_reply_chars=10_000_000)
    return Litestar(plugins=[ChatSessionPlugin(ours, config)])


def serve(kind: str, port: int) -> None:
    """Serve one of the two apps until told to stop."""
    import uvicorn  # noqa: PLC0415

    app = our_app() if kind == "ours" else bare_app()
    uvicorn.run(
        app, host=HOST, port=port, loop="uvloop", log_level="warning", access_log=False, ws_per_message_deflate=False
    )


# ---- The visitors ----


class Visitor(asyncio.Protocol):
    """One raw connection, which counts the words that come."""

    def __init__(self, token: str | None) -> None:
        """Offer *token* at the handshake, if there is one."""
        loop = asyncio.get_running_loop()
        self.opened, self.whole = loop.create_future(), loop.create_future()
        self.token, self.words, self.expected, self.head, self.tail = token, 0, 0, b"", b""
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """Ask for the websocket."""
        self.transport = transport
        offer = VERSION if self.token is None else f"{VERSION}, token.{self.token}"
        key = base64.b64encode(os.urandom(16)).decode()
        transport.write(
            f"GET /chat/socket HTTP/1.1\r\nHost: {HOST}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Protocol: {offer}\r\n\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        """Count."""
        if not self.opened.done():
            self.head += data
            if b"\r\n\r\n" in self.head:
                self.opened.set_result(self.head.startswith(b"HTTP/1.1 101"))
            return
        self.tail += data
        self.words += self.tail.count(MARK)
        self.tail = self.tail[1 - len(MARK) :]
        if 0 < self.expected == self.words and not self.whole.done():
            self.whole.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail whatever is still waited for."""
        for future in (self.opened, self.whole):
            if not future.done():
                future.set_exception(ConnectionError(f"the server closed after {self.words} words: {exc}"))
        self.whole.exception()

    def ask(self, text: str, expected: int) -> None:
        """Send one message, in a frame masked by zeros."""
        self.expected = expected
        body = json.dumps({"type": "message", "id": "m1", "text": text}).encode()
        self.transport.write(bytes([0x81, 0x80 | len(body)]) + bytes(4) + body)


async def fetch_token(port: int) -> str:
    """Fetch a token for one visitor."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(
        f"POST /chat/token HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    )
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    if b" 201 " not in head.splitlines()[0]:
        raise ConnectionError(f"no token: {head.decode()} {body.decode()}")
    return str(json.loads(body)["token"])


async def visit(kind: str, port: int, load: Load) -> None:
    """Open the connections, wait for the word on standard input, ask, count, and tell."""
    loop = asyncio.get_running_loop()
    visitors = []
    for _ in range(load.visitors):
        token = await fetch_token(port) if kind == "ours" else None
        _, visitor = await loop.create_connection(lambda token=token: Visitor(token), HOST, port)  # type: ignore[misc]
        if not await visitor.opened:
            raise ConnectionError(f"no websocket: {visitor.head!r}")
        visitors.append(visitor)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    for visitor in visitors:
        visitor.ask(f"{load.manner} {load.words}", load.words)
        await asyncio.sleep(1 / PACE / load.visitors if load.manner == "steady" else 0)
    async with asyncio.timeout(PATIENCE + load.words / PACE):
        await asyncio.gather(*(visitor.whole for visitor in visitors))
    print(sum(visitor.words for visitor in visitors), flush=True)
    for visitor in visitors:
        visitor.transport.abort()


# ---- The measurement ----


def on_core(core: int) -> Any:
    """Return a function that binds a new process to *core*, if there is more than one core to choose from."""
    cores = sorted(os.sched_getaffinity(0))
    return None if len(cores) < 2 else lambda: os.sched_setaffinity(0, {cores[core]})


def command(*arguments: object) -> list[str]:
    """Return the command that starts this file in another part."""
    return [sys.executable, __file__, *map(str, arguments)]


@contextmanager
def server(kind: str) -> Iterator[tuple[int, int]]:
    """Run one of the two servers on a free port, and give its process id and the port."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(command("--serve", kind, port), preexec_fn=on_core(0))  # noqa: PLW1509
    try:
        wait_until_open(process, port)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait()


def wait_until_open(process: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the server listens."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection((HOST, port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
        else:
            return
    raise SystemExit("the server did not start")


def cpu_seconds(process_id: int) -> float:
    """Read another process's CPU clock, exact to the nanosecond: its number is what clock_getcpuclockid(3) gives."""
    return time.clock_gettime((~process_id << 3) | 2)


def measure(kind: str, process_id: int, port: int, load: Load) -> float:
    """Return the microseconds of server CPU that one word costs in one run."""
    arguments = command("--visit", kind, port, load.manner, load.visitors, load.words)
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, preexec_fn=on_core(-1), stdin=pipe, stdout=pipe, text=True) as client:  # noqa: PLW1509
        assert client.stdin
        assert client.stdout
        if client.stdout.readline() != "ready\n":
            raise SystemExit("the visitors did not get in")
        before = cpu_seconds(process_id)
        client.stdin.write("go\n")
        client.stdin.flush()
        words = client.stdout.readline().strip()
        spent = cpu_seconds(process_id) - before
    if words != str(load.visitors * load.words):
        raise SystemExit(f"{words or 'no'} words came, not {load.visitors * load.words}")
    return spent / int(words) * 1e6


def compare(load: Load, servers: dict[str, tuple[int, int]], rounds: int) -> tuple[float, float, float]:
    """Return the medians of a word's cost bare and ours, and of their ratio."""
    costs: dict[str, list[float]] = {kind: [] for kind in servers}
    for turn in range(rounds + 1):
        for kind in sorted(servers, reverse=bool(turn % 2)):
            cost = measure(kind, *servers[kind], load)
            print(f"  {load.name}, round {turn}: {kind} {cost:.2f} µs{'' if turn else ' (warm-up)'}", flush=True)
            if turn:
                costs[kind].append(cost)
    ratios = [ours / bare for ours, bare in zip(costs["ours"], costs["bare"], strict=True)]
    return statistics.median(costs["bare"]), statistics.median(costs["ours"]), statistics.median(ratios)


def describe_machine() -> str:
    """Name the machine and the versions."""
    names = ("litestar", "uvicorn", "uvloop", "websockets", "msgspec")
    parts = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)]
    return f"{processor()}, {os.cpu_count()} cores, {platform.system()}; {', '.join(parts)}"


def processor() -> str:
    """Name the processor."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main(*, quick: bool) -> int:
    """Measure, print a table, and return how many goals were missed."""
    loads = [
        Load(f"{PACE} words a second, 200 visitors", "steady", 200, 200 if quick else 500, goal=1.5),
        Load("bursts of 2,000 words, 40 visitors", "burst", 40, 2_000, goal=0.3),
    ]
    rounds = 3 if quick else 7
    print(describe_machine(), flush=True)
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(server(kind)) for kind in ("bare", "ours")}
        results = [(load, *compare(load, servers, rounds)) for load in loads]
    print(f"\n{'server CPU per word':36} {'bare':>9} {'ours':>9} {'ratio':>6} {'goal':>7}")
    for load, bare, ours, ratio in results:
        verdict = "met" if ratio <= load.goal else "MISSED"
        print(f"{load.name:36} {bare:6.2f} µs {ours:6.2f} µs {ratio:6.2f} {'≤ ' + str(load.goal):>7} {verdict}")
    return sum(ratio > load.goal for load, _, _, ratio in results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--visit", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve[0], int(options.serve[1]))
    elif options.visit:
        kind, port, manner, visitors, words = options.visit
        asyncio.run(visit(kind, int(port), Load("", manner, int(visitors), int(words), 0)))
    else:
        sys.exit(main(quick=options.quick))
