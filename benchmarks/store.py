"""What several workers cost: server CPU per word with a Redis store against none, store calls, and seconds to come back.

    python benchmarks/store.py [--quick]

Needs Debian's redis-server, which it starts on a free port. The words are counted as by run.py, whose visitors these
are: rounds of a server with the store and one without, in turn, and the median of their ratios. Then a visitor of one
worker, whose connection is cut in the middle of a reply, comes back to another.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import apps
import lab
from measures import PACE, Bench, ratio
from words import Load, spend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

TURNS = 5
STEPS = 0.1  # seconds between the words of a reply that is carried
MARGIN = 2  # words that the page has seen when its connection is cut
CARRIED = 40  # words of that reply


# ---- The app, with and without a store ----


def our_app(redis_url: str) -> Any:
    """Build the app that run.py measures, with rows in Redis where there is a *redis_url*."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from litestar import Litestar  # noqa: PLC0415
    from litestar.stores.redis import RedisStore  # noqa: PLC0415

    from chat_session import Chat, ChatSessionConfig, ChatSessionPlugin  # noqa: PLC0415

    async def ours(chat: Chat) -> AsyncIterator[str]:
        manner, *numbers = chat.message.split()
        return steps(int(numbers[0])) if manner == "steps" else apps.answer(chat.message)

    config = ChatSessionConfig(
        secret="a key that only this benchmark knows",
        rows=RedisStore.with_client(redis_url) if redis_url else None,
        **apps.OUR_LIMITS,
    )
    return Litestar(plugins=[ChatSessionPlugin(ours, config)])


async def steps(count: int) -> AsyncIterator[str]:
    """Say *count* words slowly; the last says when it was said."""
    for number in range(count):
        await asyncio.sleep(STEPS)
        yield f"{number} " if number < count - 1 else f"{time.time()}"


def server(redis_url: str) -> AbstractContextManager[lab.Server]:
    """Run a server on a free port."""
    return lab.serve("ours", redis_url, script=Path(__file__))


@contextmanager
def redis() -> Iterator[int]:
    """Run a Redis without persistence on a free port, away from the servers' core."""
    program, port = shutil.which("redis-server"), lab.free_port()
    if program is None:
        raise SystemExit("redis-server is missing")
    arguments = [program, "--port", str(port), "--bind", apps.HOST, "--save", "", "--loglevel", "warning"]
    process = subprocess.Popen(arguments, preexec_fn=lab.on_core(-1), stdout=subprocess.DEVNULL)  # noqa: PLW1509
    try:
        lab.is_open(process, port)
        yield port
    finally:
        process.terminate()
        process.wait()


# ---- The measurements ----


def count_calls(port: int) -> int:
    """Ask Redis how many commands it has had of those that a store makes."""
    with socket.create_connection((apps.HOST, port)) as connection:
        connection.sendall(b"INFO commandstats\r\nQUIT\r\n")
        with connection.makefile("rb") as answer:
            lines = answer.read().decode().splitlines()
    stats = [line.removeprefix("cmdstat_").split(":calls=") for line in lines if line.startswith("cmdstat_")]
    return sum(int(rest.split(",")[0]) for name, rest in stats if name in {"get", "set", "del"})


async def open_chat(port: int, previous: str = "") -> tuple[str, Any]:
    """Open a session as a page does, and return its token and its socket."""
    from websockets.asyncio.client import connect  # noqa: PLC0415
    from websockets.typing import Subprotocol  # noqa: PLC0415

    token = await fetch_token(port, previous)
    protocols = [Subprotocol(apps.VERSION), Subprotocol(f"token.{token}")]
    address = f"ws://{apps.HOST}:{port}/chat/socket"
    return token, await connect(address, subprotocols=protocols, compression=None, ping_interval=None, proxy=None)


async def fetch_token(port: int, previous: str) -> str:
    """Fetch a token; *previous* is the one of the connection that was lost."""
    body = f"previous={previous}"
    reader, writer = await asyncio.open_connection(apps.HOST, port)
    writer.write(
        f"POST /chat/token HTTP/1.1\r\nHost: {apps.HOST}\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
    )
    answer = (await reader.read()).partition(b"\r\n\r\n")[2]
    writer.close()
    return str(json.loads(answer)["token"])


async def ask(chat: Any, text: str, name: str = "m1") -> None:
    """Send one message."""
    await chat.send(json.dumps({"type": "message", "id": name, "text": text}))


async def read_until(chat: Any, kind: str) -> dict[str, Any]:
    """Read frames up to one of *kind*."""
    async with asyncio.timeout(lab.PATIENCE):
        while True:
            frame: dict[str, Any] = json.loads(await chat.recv())
            if frame["type"] == kind:
                return frame


async def converse(port: int) -> None:
    """Hold a whole conversation."""
    _, chat = await open_chat(port)
    for turn in range(TURNS):
        await ask(chat, "burst 20", f"m{turn}")
        await read_until(chat, "finish")
    await chat.send(json.dumps({"type": "end"}))
    await read_until(chat, "session-end")
    await chat.close()
    await asyncio.sleep(0.5)


async def come_back(old: int, new: int) -> tuple[float, float]:
    """Cut a connection in the middle of a reply; return the seconds to its words elsewhere, and from its last to its end."""
    token, chat = await open_chat(old)
    await ask(chat, f"steps {CARRIED}")
    for _ in range(MARGIN):
        await read_until(chat, "text-delta")
    chat.transport.abort()
    since = time.time()
    _, chat = await open_chat(new, token)
    await ask(chat, f"steps {CARRIED}")
    text = (await read_until(chat, "text-delta"))["delta"]
    appeared = time.time() - since
    while (frame := json.loads(await chat.recv()))["type"] != "finish":
        text += frame.get("delta", "")
    ended = time.time() - float(text.split()[-1])
    await chat.close()
    return appeared, ended


def spend_at(servers: dict[str, lab.Server], load: Load, name: str) -> float:
    """Return what a word costs at one of the servers."""
    with lab.visit(servers[name], load.visitors) as crowd:
        return spend(servers[name], crowd, load)[0]


def main(*, quick: bool) -> int:
    """Measure, print a table, and return how many goals were missed."""
    bench = Bench(quick, ["ours"])
    loads = [
        Load(f"{PACE} words a second, 200 visitors", f"steady {PACE}", 200, 200 if quick else 500, {"memory": 1.05}),
        Load("bursts of 2,000 words, 40 visitors", "burst", 40, 2_000, {"memory": 1.05}),
    ]
    print(lab.describe_machine(), flush=True)
    results = []
    with ExitStack() as stack:
        redis_port = stack.enter_context(redis())
        url = f"redis://{apps.HOST}:{redis_port}"
        servers = {"memory": stack.enter_context(server("")), "redis": stack.enter_context(server(url))}
        other = stack.enter_context(server(url)).port
        for load in loads:
            found = bench.compare(load.name, list(servers), partial(spend_at, servers, load))
            results.append(
                (f"word, {load.name}: Redis / memory", ratio(found, "redis", "memory"), load.goals["memory"])
            )
        port = servers["redis"].port
        servers["redis"].settle()  # the visitors of the last round have left, which is saved
        before = count_calls(redis_port)
        asyncio.run(converse(port))
        results.append((f"store calls of a conversation of {TURNS} turns", count_calls(redis_port) - before, 4))
        times = [asyncio.run(come_back(port, other)) for _ in range(3 if quick else 7)]
        results.append(("seconds to a carried reply, at most", max(appeared for appeared, _ in times), 1.5))
        results.append(("seconds from its last word to its end, at most", max(ended for _, ended in times), 0.5))
    print(f"\n{'':62} {'figure':>6} {'goal':>7}")
    for name, figure, goal in results:
        print(f"{name:62} {figure:6.2f} {'≤ ' + str(goal):>7} {'met' if figure <= goal else 'MISSED'}")
    return sum(figure > goal for _, figure, goal in results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    if sys.argv[1:2] == ["ours"]:  # as lab.serve starts it
        apps.serve(our_app(sys.argv[3]), int(sys.argv[2]))
    else:
        sys.exit(main(quick=parser.parse_args().quick))
