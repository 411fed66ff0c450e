"""What the contract promises, sentence by sentence: in process on a virtual clock, then with real servers and browsers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, ParamSpec, cast

import httpx
import pytest
from litestar import Litestar

import chat_session
from chat_session import Chat, ChatSessionConfig, ChatSessionPlugin, Message, Reply, SessionRow, Source

Frame = dict[str, Any]
P = ParamSpec("P")
SECRET = "a key of more than thirty-two bytes, for tests"

# ---- The virtual clock -----------------------------------------------------------------------------------------------


class _Warp(selectors.DefaultSelector):
    """Where a loop would wait for a timer, move its clock on instead."""

    loop: WarpLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            return super().select(1.0)
        ready = super().select(0)
        if not ready:
            self.loop.now += max(0.0, timeout)
        return ready


class WarpLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while nothing can be done."""

    now = 1000.0

    def __init__(self) -> None:
        selector = _Warp()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def virtual(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on a virtual clock, and let it leave no task behind."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def main() -> None:
            await test(*args, **kwargs)
            await asyncio.sleep(chat_session._STOP_GRACE + 1)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks are left behind: {left}"

        with asyncio.Runner(loop_factory=WarpLoop) as runner:
            runner.run(main())

    return run


def now() -> float:
    return asyncio.get_running_loop().time()


# ---- A visitor, in process -------------------------------------------------------------------------------------------


@dataclass
class Told:
    """One reply as a page would show it."""

    id: str
    in_reply_to: str
    text: str = ""
    sources: list[Frame] = field(default_factory=list)
    end: Frame | None = None


class Visitor:
    """Drives one websocket of an ASGI app, and keeps every frame that it sends."""

    def __init__(self, app: Litestar, protocols: list[str], headers: dict[str, str], client: tuple[str, int]) -> None:
        self.frames: list[Frame] = []
        self.times: list[float] = []
        self.raw: list[str] = []
        self.accepted: Frame | None = None
        self.code: int | None = None
        self.reason: str | None = None
        self.reads = asyncio.Event()
        self.reads.set()
        self.answers_pings = True
        self._seen = 0
        self._changed = asyncio.Condition()
        self._inbox: asyncio.Queue[Frame] = asyncio.Queue()
        self._inbox.put_nowait({"type": "websocket.connect"})
        scope: Any = {
            "type": "websocket", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
            "scheme": "ws", "path": "/chat/socket", "raw_path": b"/chat/socket", "query_string": b"", "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in {"host": "test", **headers}.items()],
            "client": client, "server": ("test", 80), "subprotocols": protocols, "state": {}, "extensions": {},
        }  # fmt: skip
        self._app: Any = app
        self.task = asyncio.create_task(self._app(scope, self._inbox.get, self._receive))

    async def _receive(self, event: Any) -> None:
        if event["type"] == "websocket.accept":
            self.accepted = event
        elif event["type"] == "websocket.close":
            self.code, self.reason = event["code"], event.get("reason")
        else:
            await self.reads.wait()
            self._note(event["text"])
        async with self._changed:
            self._changed.notify_all()

    def _note(self, text: str) -> None:
        frame = json.loads(text)
        self.raw.append(text)
        self.frames.append(frame)
        self.times.append(now())
        if frame["type"] == "ping" and self.answers_pings:
            self.send("pong")

    def put(self, text: str | None = None, data: bytes | None = None) -> None:
        self._inbox.put_nowait({"type": "websocket.receive", "text": text, "bytes": data})

    def send(self, type_: str, **content: object) -> None:
        self.put(json.dumps({"type": type_, **content}))

    def say(self, text: str, message_id: str = "") -> str:
        message_id = message_id or f"m{len(text)}-{self._inbox.qsize()}-{len(self.frames)}"
        self.send("message", id=message_id, text=text)
        return message_id

    async def until(self, done: Callable[[], bool], seconds: float = 1e6) -> None:
        async with asyncio.timeout(seconds), self._changed:
            await self._changed.wait_for(done)

    async def next(self, *types: str, seconds: float = 1e6) -> Frame:
        """Return the next frame of one of *types* that has not been returned yet, in order."""

        def find() -> int | None:
            return next((n for n in range(self._seen, len(self.frames)) if self.frames[n]["type"] in types), None)

        await self.until(lambda: find() is not None, seconds)
        self._seen = cast("int", find()) + 1
        return self.frames[self._seen - 1]

    async def ask(self, text: str, message_id: str = "") -> Told:
        """Say something and return the whole reply to it."""
        message_id = self.say(text, message_id)
        await self.until(lambda: any(told.in_reply_to == message_id and told.end for told in self.replies))
        return next(told for told in self.replies if told.in_reply_to == message_id and told.end)

    async def ended(self) -> int | None:
        """Return the close code, once the handler has returned too."""
        await asyncio.wait_for(asyncio.shield(self.task), 1e6)
        return self.code

    async def lose(self, code: int = 1006) -> None:
        """Lose the connection, as a train's tunnel does."""
        self.reads.set()
        self._inbox.put_nowait({"type": "websocket.disconnect", "code": code})
        await self.task

    def of(self, type_: str) -> list[Frame]:
        return [frame for frame in self.frames if frame["type"] == type_]

    @property
    def replies(self) -> list[Told]:
        """The replies as DESIGN section 4 has a page put them together."""
        told: dict[str, Told] = {}
        last: Told | None = None
        for frame in self.frames:
            kind = frame["type"]
            if kind == "start":
                last = told[frame["messageId"]] = Told(frame["messageId"], frame["messageMetadata"]["inReplyTo"])
            elif kind.startswith("text-") or kind in {"source-url", "finish", "abort", "error"}:
                assert last is not None
                assert last.end is None, "a reply has ended, and goes on"
                assert frame.get("id", last.id) == last.id
                last.text += frame.get("delta", "")
                if kind == "source-url":
                    last.sources.append(frame)
                if kind in {"finish", "abort", "error"}:
                    last.end = frame
        return list(told.values())


class Bench:
    """An app with the plugin in it, its lifespan running, and ways to visit it."""

    def __init__(self, answer: Any, config: ChatSessionConfig, **app: Any) -> None:
        self.plugin = ChatSessionPlugin(answer, config)
        self.app = Litestar(plugins=[self.plugin], openapi_config=None, **app)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")
        self.tokens: dict[int, str] = {}
        self.visitors: list[Visitor] = []

    @property
    def desk(self) -> Any:
        return self.plugin._desk

    async def mint(self, previous: str | None = None, **headers: str) -> httpx.Response:
        data = {} if previous is None else {"previous": previous}
        return await self.client.post("/chat/token", data=data, headers=headers)

    async def token(self, previous: str | None = None, **headers: str) -> str:
        response = await self.mint(previous, **headers)
        assert response.status_code == 201, response.text
        return cast("str", response.json()["token"])

    def dial(
        self, token: str | None, *protocols: str, client: tuple[str, int] = ("127.0.0.1", 9), **headers: str
    ) -> Visitor:
        """Open a websocket without waiting for anything."""
        offered = [*(protocols or ("chat-session.v1",)), *([f"token.{token}"] if token is not None else [])]
        visitor = Visitor(self.app, offered, headers, client)
        self.visitors.append(visitor)
        return visitor

    async def visit(self, previous: Visitor | None = None) -> Visitor:
        """Click the bubble: a token, a socket, a greeting."""
        token = await self.token(self.tokens[id(previous)] if previous else None)
        visitor = self.dial(token)
        self.tokens[id(visitor)] = token
        await visitor.next("session-start")
        return visitor


@contextlib.asynccontextmanager
async def bench(answer: Any, config: ChatSessionConfig | None = None, **app: Any) -> AsyncIterator[Bench]:
    """Run an app with the plugin; at the end, nothing of it may be left."""
    it = Bench(answer, config or ChatSessionConfig(secret=SECRET), **app)
    async with it.app.lifespan():
        yield it
        for visitor in it.visitors:
            if not visitor.task.done():
                await visitor.lose()
    await it.client.aclose()
    assert not it.desk.sessions
    assert not it.desk.answers
    assert not it.desk.addresses
    assert not it.desk.pads._cache


def settings(**options: Any) -> ChatSessionConfig:
    return ChatSessionConfig(**{"secret": SECRET, **options})


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The log's errors; a test that does not ask for them must not cause any."""
    yield (found := [])
    found.extend(record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR)


# ---- Answerers -------------------------------------------------------------------------------------------------------


async def echo(chat: Chat) -> AsyncIterator[str]:
    """Answer with what was said, word by word, a tenth of a second apart."""
    for word in chat.message.split():
        await asyncio.sleep(0.1)
        yield f"{word} "


class Script:
    """An answerer that says what it is told to say, and only then; it notes what it was asked."""

    def __init__(self) -> None:
        self.chats: list[Chat] = []
        self.pieces: asyncio.Queue[Any] = asyncio.Queue()

    async def __call__(self, chat: Chat) -> AsyncIterator[str | Source]:
        self.chats.append(chat)
        while (piece := await self.pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def say(self, *pieces: Any) -> None:
        """Say *pieces*; None ends the reply, an exception is raised."""
        for piece in pieces:
            self.pieces.put_nowait(piece)


# ---- The exchange ----------------------------------------------------------------------------------------------------


@virtual
async def test_a_visitor_is_greeted_and_answered_word_by_word() -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        told = await visitor.ask("do you ship to Canada?")
        assert told.text == "do you ship to Canada? "
        assert told.end == {"type": "finish"}
        assert len(visitor.of("text-delta")) == 5


@virtual
async def test_a_reply_that_a_drop_cuts_is_carried_on_live_without_a_gap_or_a_double() -> None:
    script = Script()
    async with bench(script) as it:
        first = await it.visit()
        first.say("hello", "a")
        script.say("one ", "two ")
        await first.next("text-delta")
        await first.lose()
        script.say("three ")
        second = await it.visit(first)
        second.say("hello", "a")
        await second.next("text-delta")
        script.say("four", None)
        await second.next("finish")
        assert [told.text for told in second.replies] == ["one two three four"]
        assert len(script.chats) == 1
        second.say("and?", "b")
        script.say("yes", None)
        await second.next("finish")
        assert [m["content"] for m in script.chats[1].messages] == ["hello", "one two three four", "and?"]


@virtual
async def test_idle_warns_then_ends_gently() -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        start = now()
        warning = await visitor.next("session-idle")
        assert (now() - start, warning["closesIn"]) == (240.0, 60.0)
        assert (await visitor.next("session-end"))["reason"] == "idle"
        assert now() - start == 300.0
        assert await visitor.ended() == 1000
