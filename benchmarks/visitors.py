"""The visitors: one process of raw sockets, which opens connections, asks, counts words and stamps their arrival.

    python benchmarks/visitors.py KIND PORT

It takes one JSON command a line on standard input and answers each by one line; crowd.py is its other side.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import resource
import sys
import time
import uuid
from typing import Any

from apps import DUE_DIGITS, HOST, MARK, VERSION

WORD = MARK.encode()
AT_ONCE = 32  # connections that are opened at the same time
BATCH = 0.005  # seconds between two batches of a flood


class Visitor(asyncio.Protocol):
    """A websocket of the bare kind: it speaks the wire of chat-session.v1 to a server that wants no token."""

    path = "/chat/socket"
    extra = f"Sec-WebSocket-Protocol: {VERSION}\r\n"

    def __init__(self, crowd: Crowd, number: int) -> None:
        self.crowd, self.number = crowd, number
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: Any = None
        self.words = self.expected = 0
        self.tail, self.is_upgraded, self.is_stamping, self.now = b"", False, False, 0.0

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.knock()

    def knock(self) -> None:
        """Ask for the websocket."""
        key = base64.b64encode(os.urandom(16)).decode()
        self.transport.write(
            f"GET {self.path} HTTP/1.1\r\nHost: {HOST}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n{self.extra}\r\n".encode()
        )

    def data_received(self, data: bytes) -> None:
        buffer = self.tail + data if self.tail else data
        if not self.is_upgraded:
            head, _, rest = buffer.partition(b"\r\n\r\n")
            self.tail = buffer
            if head == buffer:
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self.fail(head.decode())
                return
            self.is_upgraded, buffer = True, rest
        if self.is_stamping:
            self.now = time.monotonic()
        self.tail = self.read_frames(buffer)

    def read_frames(self, buffer: bytes) -> bytes:
        """Take the whole frames out of *buffer*, and return the rest."""
        at, end = 0, len(buffer)
        while end - at >= 2:
            size, start = buffer[at + 1], at + 2
            if size == 126:
                size, start = int.from_bytes(buffer[at + 2 : at + 4], "big"), at + 4
            elif size == 127:
                size, start = int.from_bytes(buffer[at + 2 : at + 10], "big"), at + 10
            if start + size > end:
                break
            self.take(buffer[at] & 15, buffer[start : start + size])
            at = start + size
        return buffer[at:]

    def take(self, opcode: int, payload: bytes) -> None:
        """Act on one frame."""
        if opcode == 1:
            self.text(payload)
        elif opcode == 9:
            self.write(10, payload)

    def text(self, payload: bytes) -> None:
        """Count the words of one frame."""
        if WORD in payload:
            self.count(payload)
        elif payload.startswith(b'{"type":"ping"'):
            self.say({"type": "pong"})
        elif b'"session-start"' in payload:
            self.is_open()

    def count(self, payload: bytes) -> None:
        """Count words, and note how late each is that says when it was due."""
        if self.is_stamping:
            pieces = payload.split(WORD)
            self.words += len(pieces) - 1
            self.crowd.lags.extend(self.now - float(piece[-DUE_DIGITS:]) for piece in pieces[:-1])
        else:
            self.words += payload.count(WORD)
        if self.expected and self.words >= self.expected:
            self.expected = 0
            self.crowd.has_finished()

    def is_open(self) -> None:
        if not self.opened.done():
            self.opened.set_result(None)

    def fail(self, why: str) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionError(f"a visitor was refused: {why}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(f"connection lost: {exc}")
        self.crowd.lost += 1

    def ask(self, text: str) -> None:
        """Send one message."""
        self.say({"type": "message", "id": f"m{time.monotonic_ns()}", "text": text})

    def say(self, frame: Any) -> None:
        self.write(1, json.dumps(frame).encode())

    def write(self, opcode: int, payload: bytes) -> None:
        """Send one frame, masked by zeros."""
        self.transport.write(frame(opcode, payload))


def frame(opcode: int, payload: bytes) -> bytes:
    """Build a client's frame, masked by zeros."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else bytes([0x80 | 126]) + size.to_bytes(2, "big")
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


class OurVisitor(Visitor):
    """A visitor of ours, with a token."""

    def __init__(self, crowd: Crowd, number: int, token: str) -> None:
        super().__init__(crowd, number)
        self.extra = f"Sec-WebSocket-Protocol: {VERSION}, token.{token}\r\n"


class SocketIoVisitor(Visitor):
    """A visitor by Socket.IO over engine.io, on a websocket from the start."""

    path = "/chat/socket/?EIO=4&transport=websocket"
    extra = ""
    login = b"40"

    def text(self, payload: bytes) -> None:
        if WORD in payload:
            self.count(payload)
        elif payload.startswith(b"0{"):
            self.write(1, self.login)
        elif payload == b"2":
            self.write(1, b"3")
        elif payload.startswith(b"40"):
            self.is_open()

    def ask(self, text: str) -> None:
        self.emit("message", {"id": f"m{time.monotonic_ns()}", "text": text})

    def emit(self, event: str, *content: Any) -> None:
        self.write(1, b"42" + json.dumps([event, *content]).encode())


class ChainlitVisitor(SocketIoVisitor):
    """A visitor of Chainlit, as its own page speaks."""

    path = "/ws/socket.io/?EIO=4&transport=websocket"

    def __init__(self, crowd: Crowd, number: int) -> None:
        super().__init__(crowd, number)
        self.login = b"40" + json.dumps({"sessionId": str(uuid.uuid4()), "clientType": "webapp"}).encode()

    def text(self, payload: bytes) -> None:
        if payload.startswith((b'42["new_message"', b'42["update_message"')):
            return  # the greeting, and the whole reply once more at its end
        super().text(payload)

    def is_open(self) -> None:
        if not self.opened.done():
            self.emit("connection_successful")
        super().is_open()

    def ask(self, text: str) -> None:
        step = {"id": str(uuid.uuid4()), "name": "User", "type": "user_message", "output": text, "createdAt": ""}
        self.emit("client_message", {"message": step, "fileReferences": []})


class SseVisitor(Visitor):
    """A visitor who sends a request for each message, on a connection that is kept alive."""

    def knock(self) -> None:
        self.is_open()

    def data_received(self, data: bytes) -> None:
        if self.is_stamping:
            self.now = time.monotonic()
        lines = (self.tail + data).split(b"\n")
        self.tail = lines.pop()
        for line in lines:
            if WORD in line:
                self.count(line)

    def ask(self, text: str) -> None:
        body = json.dumps({"id": f"m{time.monotonic_ns()}", "text": text})
        self.transport.write(
            f"POST /chat/message HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )


KINDS: dict[str, type[Visitor]] = {"socketio": SocketIoVisitor, "chainlit": ChainlitVisitor, "sse": SseVisitor}


class Desk:
    """Fetches tokens over connections that are kept alive, as a browser's are."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def token(self) -> str:
        reader, writer = self._free.pop() if self._free else await asyncio.open_connection(HOST, self._port)
        writer.write(f"POST /chat/token HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 0\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 201 " not in head.splitlines()[0]:
            raise ConnectionError(f"no token: {head.decode()}")
        size = int(head.partition(b"content-length:")[2].split()[0])
        body = json.loads(await reader.readexactly(size))
        self._free.append((reader, writer))
        return str(body["token"])

    def close(self) -> None:
        """Close what is open, so that it is in nobody's memory."""
        while self._free:
            self._free.pop()[1].close()


class Crowd:
    """All the visitors of this process."""

    def __init__(self, kind: str, port: int) -> None:
        self.kind, self.port, self.desk = kind, port, Desk(port)
        self.visitors: list[Visitor] = []
        self.lags: list[float] = []
        self.lost = self.running = 0
        self.done = asyncio.Event()

    def has_finished(self) -> None:
        self.running -= 1
        if not self.running:
            self.done.set()

    async def connect(self, number: int) -> Visitor:
        """Open one connection, and wait for its greeting."""
        loop = asyncio.get_running_loop()
        if self.kind == "ours":
            visitor: Visitor = OurVisitor(self, number, await self.desk.token())
        else:
            visitor = KINDS.get(self.kind, Visitor)(self, number)
        await loop.create_connection(lambda: visitor, HOST, self.port)
        await visitor.opened
        return visitor

    async def open(self, count: int, seconds: float = 0.0) -> dict[str, Any]:
        """Open *count* more connections, spread evenly over *seconds*."""
        begun, before = time.monotonic(), len(self.visitors)
        numbers = iter(range(count))

        async def work() -> None:
            for number in numbers:
                await asyncio.sleep(max(0.0, begun + seconds * number / count - time.monotonic()))
                self.visitors.append(await self.connect(before + number))

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
        self.desk.close()
        return {"open": len(self.visitors)}

    async def talk(  # noqa: PLR0913 - the fields of a command
        self, *, text: str, words: int, limit: float, spread: float = 0.0, count: int = 0, stamp_every: int = 0
    ) -> dict[str, Any]:
        """Have the first *count* visitors ask, and wait for their words for *limit* seconds."""
        asking = self.visitors[: count or None]
        self.lags, self.running = [], len(asking)
        self.done.clear()
        begun, busy = time.monotonic(), time.process_time()
        for number, visitor in enumerate(asking):
            if (early := begun + spread * number / len(asking) - time.monotonic()) > 0.001:
                await asyncio.sleep(early)
            visitor.words, visitor.expected = 0, words
            visitor.is_stamping = bool(stamp_every and number % stamp_every == 0)
            visitor.ask(f"{text} {time.monotonic():.4f}" if text.startswith("due") else text)
        try:
            async with asyncio.timeout(limit):
                await self.done.wait()
        except TimeoutError:
            pass
        took = time.monotonic() - begun
        came = sum(visitor.words for visitor in asking)
        missing = sum(words - visitor.words for visitor in asking if visitor.is_stamping)
        return {
            "words": came,
            "wanted": words * len(asking),
            "seconds": took,
            "busy": (time.process_time() - busy) / took,
            "lost": self.lost,
            **self.tell_lags(missing, limit),
        }

    def tell_lags(self, missing: int, limit: float) -> dict[str, float]:
        """Sum the lags up; a word that never came counts as late by the whole *limit*."""
        lags = sorted(self.lags) + [limit] * missing
        if not lags:
            return {}
        return {"p50": lags[len(lags) // 2], "p99": lags[len(lags) * 99 // 100], "worst": lags[-1]}

    async def flood(self, pace: int, seconds: float) -> dict[str, Any]:
        """Have the first visitor send *pace* small valid frames a second, as far as the server takes them."""
        transport, piece = self.visitors[0].transport, frame(1, b'{"type":"stay"}')
        begun, sent = time.monotonic(), 0
        while (passed := time.monotonic() - begun) < seconds:
            owed = int(pace * passed) - sent
            if transport.get_write_buffer_size() < 1_000_000:
                transport.write(piece * owed)
                sent += owed
            await asyncio.sleep(BATCH)
        return {"sent": sent, "seconds": seconds, "lost": self.lost}

    async def stall(self, text: str, seconds: float) -> dict[str, Any]:
        """Have the first visitor ask, and read nothing more."""
        visitor = self.visitors[0]
        visitor.ask(text)
        visitor.transport.pause_reading()
        await asyncio.sleep(seconds)
        return {"lost": self.lost}

    async def greet(self, seconds: float) -> dict[str, Any]:
        """Open connections, wait for the greeting and leave, as fast as it goes."""
        begun, busy, count = time.monotonic(), time.process_time(), 0

        async def work() -> None:
            nonlocal count
            while time.monotonic() - begun < seconds:
                visitor = await self.connect(0)
                visitor.transport.abort()
                count += 1

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
        took = time.monotonic() - begun
        return {"count": count, "seconds": took, "busy": (time.process_time() - busy) / took}


async def main(kind: str, port: int) -> None:
    """Do what standard input says, until it ends."""
    crowd = Crowd(kind, port)
    while line := await asyncio.to_thread(sys.stdin.readline):
        content = json.loads(line)
        result = await getattr(crowd, content.pop("do"))(**content)
        print(json.dumps(result), flush=True)
    for visitor in crowd.visitors:
        visitor.transport.abort()


if __name__ == "__main__":
    import uvloop

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
