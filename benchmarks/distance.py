"""Measures 4 and 5: from the click to the greeting, and to the first word of the next turn, from far away."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import ssl
import subprocess
import tempfile
import time
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from apps import HOST, MARK, VERSION
from lab import NAMES, Server, serve, visit
from measures import Bench, median, ratio
from report import Goal, Section
from visitors import frame

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

Pair: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]

ONE_WAY = 0.05
TRIP = 2 * ONE_WAY
TURN = "steady 500 20"


# ---- The distance ----


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, not_before: float) -> None:
    """Carry bytes over, each chunk a fixed time after it came and none before *not_before*."""
    loop = asyncio.get_running_loop()
    try:
        while data := await reader.read(65_536):
            loop.call_at(max(loop.time(), not_before) + ONE_WAY, writer.write, data)
    except ConnectionError:
        pass
    loop.call_later(ONE_WAY, writer.close)


async def relay(port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection. The kernel accepts at once, so the trip that TCP's own handshake takes is added here."""
    asked_at = asyncio.get_running_loop().time()
    with suppress(ConnectionError, asyncio.CancelledError):  # the run may be over
        far_reader, far_writer = await asyncio.open_connection(HOST, port)
        await asyncio.gather(pump(reader, far_writer, asked_at + TRIP), pump(far_reader, writer, 0.0))


@asynccontextmanager
async def distance(port: int) -> AsyncIterator[int]:
    """Put a server far away: give the port of a relay that delays what it carries, both ways."""
    relayed = await asyncio.start_server(lambda reader, writer: relay(port, reader, writer), HOST, 0)
    try:
        yield relayed.sockets[0].getsockname()[1]
    finally:
        relayed.close()


# ---- The page ----


class Page:
    """A page of one browser: it opens connections and counts the seconds."""

    def __init__(self, port: int, trust: ssl.SSLContext | None) -> None:
        self._port, self._trust = port, trust

    async def connect(self) -> Pair:
        name = HOST if self._trust else None
        return await asyncio.open_connection(HOST, self._port, ssl=self._trust, server_hostname=name)

    async def post(self, pair: Pair, path: str, content: str) -> bytes:
        """Send a request and return the answer up to its first words; a token is one."""
        reader, writer = pair
        head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        if "token" in path:
            size = int(answer.lower().partition(b"content-length:")[2].split()[0])
            return await reader.readexactly(size)
        return answer + await reader.readuntil(MARK.encode())

    async def open_chat(self, warm: Pair | None = None) -> Pair:
        """Do what the widget does from the click to the greeting."""
        token = json.loads(await self.post(warm or await self.connect(), "/chat/token", ""))["token"]
        reader, writer = await self.connect()
        key = base64.b64encode(os.urandom(16)).decode()
        writer.write(
            f"GET /chat/socket HTTP/1.1\r\nHost: {HOST}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
            f"Sec-WebSocket-Protocol: {VERSION}, token.{token}\r\n\r\n".encode()
        )
        await reader.readuntil(b'"session-start"')
        return reader, writer

    async def warm_up(self) -> Pair:
        """Return a connection that has just carried something, as that of the page itself."""
        pair = await self.connect()
        await self.post(pair, "/chat/token", "")
        return pair


async def timed(work: Coroutine[object, object, object]) -> float:
    begun = time.perf_counter()
    await work
    return time.perf_counter() - begun


def certify(folder: str) -> tuple[list[str], ssl.SSLContext]:
    """Make a certificate for this run, and a context that trusts it and speaks TLS 1.3 alone."""
    certificate, key = str(Path(folder) / "certificate.pem"), str(Path(folder) / "key.pem")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "1", "-subj", "/CN=localhost", "-addext", f"subjectAltName=IP:{HOST}"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    trust = ssl.create_default_context(cafile=certificate)
    trust.minimum_version = ssl.TLSVersion.TLSv1_3
    return [certificate, key], trust


# ---- 4. From the click to the greeting ----


async def clicks(server: Server, trust: ssl.SSLContext | None, times: int) -> tuple[float, float]:
    """Return the seconds from the click to the greeting, from nothing and on a warm page."""
    async with distance(server.port) as port:
        page = Page(port, trust)
        await page.open_chat()
        cold = [await timed(page.open_chat()) for _ in range(times)]
        warm = [await timed(page.open_chat(await page.warm_up())) for _ in range(times)]
    return median(cold), median(warm)


def click_to_greeting(bench: Bench) -> Section:
    """Measure 4."""
    section = Section(
        "Click to greeting",
        f"Through a relay that delays everything by {ONE_WAY * 1e3:.0f} ms each way, TCP's handshake included: a token, "
        "then the websocket, to the first byte of the greeting. *Warm* is a page whose own connection is still open. "
        "Whole round trips count; the milliseconds beside them hold the work as well.",
        ["", "from nothing", "warm page"],
    )
    times = bench.pick(2, 5)
    with tempfile.TemporaryDirectory() as folder:
        files, trust = certify(folder)
        for name, given, with_trust, limits in (("plain", [], None, (4, 3)), ("TLS 1.3", files, trust, (6, 4))):
            with serve("ours", *given) as server:
                seconds = asyncio.run(clicks(server, with_trust, times))
            section.rows.append([name, *(tell_trips(each) for each in seconds)])
            for each, limit, state in zip(seconds, limits, ("from nothing", "warm"), strict=True):
                section.goals.append(Goal(f"click to greeting, {name}, {state}", each // TRIP, limit, " round trips"))
            bench.say(f"click to greeting, {name}: {tell_trips(seconds[0])}, warm {tell_trips(seconds[1])}")
    greet_crowds(bench, section)
    return section


def tell_trips(seconds: float) -> str:
    count = seconds // TRIP
    return f"{count:.0f} round trip{'s' * (count > 1)}, {seconds * 1e3:.0f} ms"


def greet_crowds(bench: Bench, section: Section) -> None:
    """Compare how many greetings one second of a core gives."""
    kinds = bench.among("ours", "bare", *bench.pick((), ("litestar",)))
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(serve(kind)) for kind in kinds}
        found = bench.compare("greetings a second", kinds, lambda kind: greet(servers[kind], bench.pick(0.7, 2.0)))
    told = ", ".join(f"{NAMES[kind]} {median(found[kind]):,.0f}" for kind in kinds)
    section.notes.append(
        f"Greetings for each second of a core's time, one after the other as fast as it goes: {told}. Ours needs two "
        "requests for one, the token's and the websocket's."
    )
    section.goals.append(
        Goal("greetings a second, ours / bare websocket", ratio(found, "ours", "bare"), 0.4, is_most=False)
    )


def greet(server: Server, seconds: float) -> float:
    """Return the greetings that one second of the server's CPU gives."""
    with visit(server) as crowd:
        before = server.cpu
        told = crowd.do("greet", seconds=seconds)
        return float(told["count"] / (server.cpu - before))


# ---- 5. The second turn ----


async def ask_socket(pair: Pair) -> float:
    """Take one turn on an open chat, and return the seconds to its first word."""
    reader, writer = pair
    message = {"type": "message", "id": f"m{time.monotonic_ns()}", "text": TURN}
    writer.write(frame(1, json.dumps(message).encode()))
    seconds = await timed(reader.readuntil(MARK.encode()))
    await reader.readuntil(b'"finish"')
    return seconds


async def ask_request(page: Page, kept: Pair | None = None) -> float:
    """Take one turn by a request, over a new connection or a *kept* one, and return the seconds to its first word."""
    begun = time.perf_counter()
    pair = kept or await page.connect()
    await page.post(pair, "/chat/message", json.dumps({"id": "m", "text": TURN}))
    seconds = time.perf_counter() - begun
    await pair[0].readuntil(b"0\r\n\r\n")  # the end of the answer
    return seconds


async def socket_turns(server: Server, trust: ssl.SSLContext, times: int) -> float:
    async with distance(server.port) as port:
        chat = await Page(port, trust).open_chat()
        return median([await ask_socket(chat) for _ in range(times + 1)][1:])


async def request_turns(server: Server, trust: ssl.SSLContext, times: int) -> tuple[float, float]:
    """Return the seconds of a turn over a new connection, and over one that is kept alive."""
    async with distance(server.port) as port:
        page = Page(port, trust)
        new = [await ask_request(page) for _ in range(times)]
        kept = await page.connect()
        return median(new), median([await ask_request(page, kept) for _ in range(times + 1)][1:])


def second_turn(bench: Bench) -> Section:
    """Measure 5."""
    section = Section(
        "The second turn",
        f"From sending the second message to the first word of its reply, through the same relay ({TRIP * 1e3:.0f} ms for "
        "a round trip) and TLS 1.3: on the open websocket, and by a request for each message (sse-starlette).",
        ["", "first word after"],
    )
    times = bench.pick(5, 15)
    with tempfile.TemporaryDirectory() as folder:
        files, trust = certify(folder)
        with serve("ours", *files) as server:
            ours = asyncio.run(socket_turns(server, trust, times))
        section.rows.append(["the open websocket", tell_trips(ours)])
        section.goals.append(Goal("second turn, the open websocket", ours // TRIP, 1, " round trip"))
        if "sse" in bench.kinds:
            with serve("sse", *files) as server:
                new, kept = asyncio.run(request_turns(server, trust, times))
            section.rows += [["a new request", tell_trips(new)], ["a request that is kept alive", tell_trips(kept)]]
            section.goals.append(Goal("second turn, a new TLS request", new // TRIP, 3, " round trips", is_most=False))
    section.notes.append(
        "A request over a connection that is kept alive is as fast. What the socket buys there is not time: it is that "
        "the server can speak first, that a reply survives a drop, and that a visitor can type on while one runs."
    )
    return section
