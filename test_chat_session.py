"""What the contract promises, sentence by sentence: in process on a virtual clock, then with real servers and browsers."""

from __future__ import annotations

import asyncio
import base64
import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import gzip
import hashlib
import hmac
import importlib.util
import itertools
import json
import logging
import os
import pwd
import random
import re
import secrets
import selectors
import shutil
import signal
import socket
import string
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import types
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, ParamSpec, Self, cast
from urllib.parse import parse_qs, urlsplit

import httpx
import msgspec
import pytest
from cachetools import TTLCache
from litestar import Litestar, Request, get, post
from litestar.config.app import AppConfig
from litestar.config.compression import CompressionConfig
from litestar.config.cors import CORSConfig
from litestar.config.csrf import CSRFConfig
from litestar.connection import ASGIConnection
from litestar.datastructures import CacheControlHeader
from litestar.di import Provide
from litestar.events import listener
from litestar.exceptions import (
    HTTPException,
    ImproperlyConfiguredException,
    NotAuthorizedException,
    PermissionDeniedException,
    WebSocketDisconnect,
)
from litestar.middleware import AbstractAuthenticationMiddleware, AuthenticationResult, DefineMiddleware
from litestar.middleware.rate_limit import RateLimitConfig
from litestar.middleware.session.server_side import ServerSideSessionBackend, ServerSideSessionConfig
from litestar.plugins import InitPlugin
from litestar.response import Response
from litestar.security.session_auth import SessionAuth
from litestar.stores.file import FileStore
from litestar.stores.memory import MemoryStore
from playwright.async_api import Page as AsyncPage
from playwright.async_api import async_playwright
from playwright.async_api import expect as expect_async
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage
from websockets.typing import Subprotocol

import chat_session
from chat_session import Chat, ChatSessionConfig, ChatSessionPlugin, Reply, SessionRow, Source

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
        self.task = asyncio.create_task(cast("Any", app)(scope, self._inbox.get, self._receive))

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
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(cast("Any", self.app)), base_url="http://test")
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


# ---- Helpers ---------------------------------------------------------------------------------------------------------


class Log(logging.Handler):
    """Every record at DEBUG, from the loggers themselves: Litestar's own logging takes the root's handlers away."""

    NAMES = ("", "asyncio", "chat_session", "httpx", "litestar")

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record not in self.records:
            self.records.append(record)

    @property
    def errors(self) -> list[str]:
        return [record.getMessage() for record in self.records if record.levelno >= logging.ERROR]

    @property
    def ours(self) -> list[str]:
        return [record.getMessage() for record in self.records if record.name == "chat_session"]


@pytest.fixture(autouse=True)
def watched(request: pytest.FixtureRequest) -> Iterator[Log]:
    """Nothing at ERROR in the log that was not announced: a test that does not ask for `log` must not cause any."""
    log, levels = Log(), {name: logging.getLogger(name).level for name in Log.NAMES}
    for name in Log.NAMES:
        logging.getLogger(name).addHandler(log)
        logging.getLogger(name).setLevel(logging.DEBUG)
    yield log
    for name, level in levels.items():
        logging.getLogger(name).removeHandler(log)
        logging.getLogger(name).setLevel(level)
    told = [
        record
        for record in log.records
        if record.name != "chat_session" or not {"log", "logbook"} & set(request.fixturenames)
    ]
    assert not [record.getMessage() for record in told if record.levelno >= logging.ERROR]


@pytest.fixture
def log(watched: Log) -> Log:
    return watched


class Rows:
    """Keeps rows outside of the process: slow, if told so."""

    def __init__(self, save_takes: float = 0.0, load_takes: float = 0.0) -> None:
        self.save_takes = save_takes
        self.load_takes = load_takes
        self.saved: list[SessionRow] = []
        self.kept: dict[str, SessionRow] = {}
        self.loaded: list[str] = []

    async def save(self, row: SessionRow) -> None:
        await asyncio.sleep(self.save_takes)
        self.saved.append(row)
        self.kept[row.id] = row

    async def load(self, session_id: str) -> SessionRow | None:
        self.loaded.append(session_id)
        await asyncio.sleep(self.load_takes)
        return self.kept.get(session_id)

    def story(self, visitor: Visitor) -> list[tuple[str | None, str | None, int]]:
        """How a session's row looked at each save: end reason, the reply's status, turns."""
        rows = [row for row in self.saved if row.id == session_of(visitor)]
        return [(row.end_reason, row.reply.status if row.reply else None, row.turns) for row in rows]

    def last(self, visitor: Visitor) -> SessionRow:
        return self.kept[session_of(visitor)]


class Tab:
    """What a page does: comes back with `previous`, and sends again every message whose reply it has not seen end."""

    def __init__(self, it: Bench) -> None:
        self.it = it
        self.sent: dict[str, str] = {}
        self.visitors: list[Visitor] = []
        self.previous: str | None = None
        self.heard_at = 0

    @property
    def told(self) -> dict[str, Told]:
        """The replies on the page, by the message that each answers; a newer one takes an older one's place."""
        return {told.in_reply_to: told for visitor in self.visitors for told in visitor.replies}

    @property
    def unseen(self) -> list[str]:
        told = self.told
        return [each for each in self.sent if each not in told or told[each].end is None]

    def say(self, text: str, message_id: str) -> None:
        self.sent[message_id] = text
        self.visitors[-1].say(text, message_id)

    async def dial(self) -> Visitor:
        """Open a socket, and do not wait for anything."""
        token = await self.it.token(self.previous)
        visitor = self.it.dial(token)
        self.visitors.append(visitor)
        self.it.tokens[id(visitor)] = token
        return visitor

    def note(self) -> bool:
        """Tell whether `session-start` was seen, after which this is the socket to come back from."""
        seen = bool(self.visitors[-1].of("session-start"))
        self.previous = self.it.tokens[id(self.visitors[-1])] if seen else self.previous
        return seen

    async def come(self) -> Visitor:
        visitor = await self.dial()
        await visitor.next("session-start")
        self.note()
        for message_id in self.unseen:
            visitor.say(self.sent[message_id], message_id)
        await turns(20)
        self.heard_at = len(visitor.frames)
        return visitor

    def lose_sight(self, dice: random.Random) -> None:
        """Never see some of what was sent since the page was last heard: it was on its way when the link broke."""
        seen = copy.copy(self.visitors[-1])
        seen.frames = seen.frames[: dice.randint(min(self.heard_at, len(seen.frames)), len(seen.frames))]
        self.visitors[-1] = seen

    async def settle(self) -> None:
        await self.visitors[-1].until(lambda: not self.unseen)


class Counting:
    """An answerer whose words are a function of their place: ``name count pause``. It counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: collections.Counter[str] = collections.Counter()
        self.running = 0
        self.most = 0
        self.contexts: list[list[str]] = []

    async def __call__(self, chat: Chat) -> AsyncIterator[str]:
        self.asked[chat.message] += 1
        self.contexts.append(words_of(chat))
        name, count, pause = chat.message.split()
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for number in range(int(count)):
                await asyncio.sleep(float(pause))
                yield f"{name}.{number} "
        finally:
            self.running -= 1

    @staticmethod
    def whole(message: str) -> str:
        name, count, _ = message.split()
        return "".join(f"{name}.{number} " for number in range(int(count)))


def session_of(visitor: Visitor) -> str:
    return cast("str", visitor.of("session-start")[0]["sessionId"])


def words_of(chat: Chat) -> list[str]:
    return [message["content"] for message in chat.messages]


def kinds(visitor: Visitor) -> list[str]:
    return [frame["type"] for frame in visitor.frames if frame["type"] != "ping"]


async def moment() -> None:
    """Let everything happen that takes no time, and words be sent."""
    await asyncio.sleep(0.05)


async def turns(count: int) -> None:
    """Give the loop some turns, and time none."""
    for _ in range(count):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def process(answer: Any, config: ChatSessionConfig | None = None, **app: Any) -> AsyncIterator[Bench]:
    """Run an app, and shut it down while its visitors are still there."""
    it = Bench(answer, config or settings(), **app)
    async with it.app.lifespan():
        yield it
    await it.client.aclose()


# ---- The exchange ----------------------------------------------------------------------------------------------------


@virtual
async def test_one_reply_at_a_time_in_the_order_of_the_messages() -> None:
    answer = Counting()
    async with bench(answer) as it:
        visitor = await it.visit()
        for name in "cab":
            visitor.say(f"{name} 3 0.1", name)
        for _ in range(3):
            await visitor.next("finish")
        assert [told.in_reply_to for told in visitor.replies] == ["c", "a", "b"]
        assert answer.most == 1
        assert [kind for kind in kinds(visitor) if kind in {"start", "finish"}] == ["start", "finish"] * 3


@virtual
async def test_the_visitor_can_type_on_while_a_reply_runs() -> None:
    script = Script()
    async with bench(script, settings(max_pending=2)) as it:
        visitor = await it.visit()
        visitor.say("one", "a")
        await visitor.next("start")
        for name in "bcd":
            visitor.say(name, name)
        rejected = await visitor.next("message-rejected")
        assert (rejected["id"], rejected["code"]) == ("d", "too-many")
        script.say("1", None, "2", None, "3", None)
        for _ in range(3):
            await visitor.next("finish")
        assert [told.text for told in visitor.replies] == ["1", "2", "3"]
        assert len(script.chats) == 3


@virtual
async def test_an_answerer_is_never_slowed_by_a_visitor_who_reads_nothing() -> None:
    times: list[float] = []

    async def answer(_: Chat) -> AsyncIterator[str]:
        for number in range(500):
            await asyncio.sleep(0.01)
            times.append(now())
            yield f"{number} "

    async with bench(answer) as it:
        visitor = await it.visit()
        visitor.reads.clear()
        visitor.say("hi")
        await asyncio.sleep(6)
        assert len(times) == 500
        assert times[-1] - times[0] == pytest.approx(4.99)
        visitor.reads.set()
        await visitor.next("finish")
        assert visitor.replies[0].text == "".join(f"{number} " for number in range(500))


@virtual
async def test_words_that_pile_up_travel_together() -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        visitor.say("hi")
        script.say("first ")
        await visitor.next("text-delta")
        visitor.reads.clear()
        script.say("blocked ")
        await moment()
        for number in range(100):
            script.say(f"{number} ")
            await moment()
        visitor.reads.set()
        await moment()
        assert [frame["delta"] for frame in visitor.of("text-delta")] == [
            "first ",
            "blocked ",
            "".join(f"{number} " for number in range(100)),
        ]
        script.say(None)
        await visitor.next("finish")


@virtual
async def test_an_answerer_is_never_stopped_or_failed_by_the_visitors_connection() -> None:
    done: list[str] = []

    async def answer(_chat: Chat) -> AsyncIterator[str]:
        try:
            for _ in range(100):
                await asyncio.sleep(0.1)
                yield "word "
        except BaseException as error:
            done.append(repr(error))
            raise
        done.append("whole")

    rows = Rows()
    async with bench(answer, settings(rows=rows)) as it:
        visitor = await it.visit()
        visitor.say("hi")
        await visitor.next("text-delta")
        await visitor.lose()
        await asyncio.sleep(11)
        assert done == ["whole"]
        assert rows.last(visitor).reply == Reply(
            visitor.replies[0].id, visitor.replies[0].in_reply_to, "word " * 100, [], "finished"
        )


@virtual
async def test_a_word_may_wait_for_company_up_to_16_ms_and_the_first_of_a_reply_never() -> None:
    said: dict[str, float] = {}

    async def answer(_: Chat) -> AsyncIterator[str]:
        for number in range(200):
            word = f"{number} "
            said[word] = now()
            yield word
            await asyncio.sleep(0.003)

    async with bench(answer) as it:
        visitor = await it.visit()
        for text in ("one", "two"):
            said.clear()
            start, before = now(), len(visitor.frames)
            await visitor.ask(text)
            deltas = [
                (frame["delta"], when)
                for frame, when in list(zip(visitor.frames, visitor.times, strict=True))[before:]
                if frame["type"] == "text-delta"
            ]
            assert deltas[0] == ("0 ", start)
            waits = [when - said[f"{word} "] for delta, when in deltas for word in delta.split()]
            assert len(waits) == 200
            assert 0 <= max(waits) <= 0.0161
            assert len(deltas) < 60


@virtual
async def test_an_answerer_that_yields_without_ever_waiting_does_not_hold_up_the_others() -> None:
    async def answer(chat: Chat) -> AsyncIterator[str]:
        for _ in range(10_000 if chat.message == "burst" else 3):
            yield "."

    async with bench(answer) as it:
        fast, calm = await it.visit(), await it.visit()
        fast.say("burst")
        await fast.next("start")
        calm.say("hi")
        await calm.next("finish")
        assert not fast.of("finish")
        await fast.next("finish")
        assert fast.replies[0].text == "." * 10_000


async def fail_with(chat: Chat) -> AsyncIterator[str]:
    """Fail, and quote the visitor."""
    if chat.message == "fine":
        yield "fine"
        return
    yield "half of "
    await asyncio.sleep(0.1)
    raise ValueError(chat.message.upper())


@pytest.mark.usefixtures("log")
@virtual
async def test_a_failed_reply_ends_with_error_and_a_friendly_text() -> None:
    async with bench(fail_with) as it:
        visitor = await it.visit()
        told = await visitor.ask("oh dear")
        assert kinds(visitor)[1:] == ["start", "text-start", "text-delta", "text-end", "error"]
        assert told.end is not None
        assert set(told.end) == {"type", "errorText"}
        assert told.end["errorText"]
        assert "OH DEAR" not in "".join(visitor.raw)
        assert "ValueError" not in "".join(visitor.raw)
        assert "Traceback" not in "".join(visitor.raw)


@virtual
async def test_a_failure_shows_in_the_log_by_type_and_frames_without_its_message(log: Log) -> None:
    async with bench(fail_with) as it:
        visitor = await it.visit()
        told = await visitor.ask("oh dear")
        [error] = log.errors
        assert "ValueError" in error
        assert "in fail_with" in error
        assert told.id in error
        assert "OH DEAR" not in error


@virtual
async def test_a_failure_shows_its_message_in_the_log_where_the_app_runs_with_debug(log: Log) -> None:
    async with bench(fail_with, debug=True) as it:
        visitor = await it.visit()
        await visitor.ask("oh dear")
        [error] = log.errors
        assert "ValueError: OH DEAR" in error
        assert "in fail_with" in error
        assert "OH DEAR" not in "".join(visitor.raw)


@pytest.mark.usefixtures("log")
@virtual
async def test_a_failed_reply_leaves_no_turn_on_the_scratchpad() -> None:
    script = Script()
    rows = Rows()
    async with bench(script, settings(rows=rows)) as it:
        visitor = await it.visit()
        script.say("1", None, "2", ValueError(), "3", None)
        for text in ("a", "b", "c"):
            await visitor.ask(text)
        assert words_of(script.chats[2]) == ["a", "1", "c"]
        await visitor.lose()
        await moment()
        assert rows.last(visitor).turns == 2


@virtual
async def test_a_stopped_reply_leaves_what_was_said_on_the_scratchpad() -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        visitor.say("long?", "a")
        script.say("one ", "two ")
        await visitor.until(lambda: bool(visitor.replies) and visitor.replies[0].text == "one two ")
        visitor.send("stop", id="a")
        assert (await visitor.next("abort")) == {"type": "abort", "reason": "stopped"}
        assert kinds(visitor)[-2:] == ["text-end", "abort"]
        script.say("yes", None)
        await visitor.ask("and?")
        assert words_of(script.chats[1]) == ["long?", "one two ", "and?"]


@virtual
async def test_stop_works_before_the_first_word() -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        visitor.say("hello", "a")
        await visitor.next("start")
        visitor.send("stop")
        await visitor.next("abort")
        assert kinds(visitor)[1:] == ["start", "abort"]
        script.say("yes", None)
        assert (await visitor.ask("and?")).text == "yes"
        assert [message["role"] for message in script.chats[1].messages] == ["user", "user"]


@virtual
async def test_stop_reaches_an_answerer_that_has_not_even_begun() -> None:
    async with bench(Counting()) as it:
        visitor = await it.visit()
        visitor.say("a 3 0.1", "a")
        visitor.send("stop", id="a")
        visitor.say("b 2 0.1", "b")
        await visitor.next("finish")
        assert [(told.in_reply_to, told.text) for told in visitor.replies] == [("a", ""), ("b", "b.0 b.1 ")]


@virtual
async def test_a_stopped_answerer_is_stopped_too_and_stop_takes_no_time() -> None:
    ends: list[str] = []

    async def answer(_: Chat) -> AsyncIterator[str]:
        try:
            yield "word"
            await asyncio.Event().wait()
        finally:
            ends.append("cleaned up")

    async with bench(answer) as it:
        visitor = await it.visit()
        visitor.say("hi")
        await visitor.next("text-delta")
        start = now()
        visitor.send("stop")
        await visitor.next("abort")
        assert now() == start
        await moment()
        assert ends == ["cleaned up"]


@virtual
async def test_stop_works_on_a_carried_reply() -> None:
    script = Script()
    rows = Rows()
    async with bench(script, settings(rows=rows)) as it:
        first = await it.visit()
        first.say("hello", "a")
        script.say("one ")
        await first.next("text-delta")
        await first.lose()
        second = await it.visit(first)
        second.say("hello", "a")
        await second.next("text-delta")
        second.send("stop", id="a")
        assert (await second.next("abort"))["reason"] == "stopped"
        script.say("yes", None)
        await second.ask("and?", "b")
        assert words_of(script.chats[1]) == ["hello", "one ", "and?"]
        assert rows.story(first) == [
            (None, None, 0),
            ("dropped", "streaming", 0),
            ("dropped", "stopped", 1),
            ("dropped", None, 1),
        ]


@virtual
async def test_stop_takes_a_waiting_message_back_and_its_id_is_free_again() -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        visitor.say("first", "a")
        visitor.say("second", "b")
        await visitor.next("start")
        visitor.send("stop", id="b")
        rejected = await visitor.next("message-rejected")
        assert (rejected["id"], rejected["code"]) == ("b", "cancelled")
        script.say("1", None)
        await visitor.next("finish")
        await moment()
        assert len(script.chats) == 1
        script.say("2", None)
        assert (await visitor.ask("second after all", "b")).text == "2"
        assert words_of(script.chats[1]) == ["first", "1", "second after all"]


@pytest.mark.parametrize("message_id", ["unknown", "finished", "", "x" * 200])
@virtual
async def test_stop_with_the_id_of_no_running_or_waiting_message_does_nothing(message_id: str) -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        script.say("0", None, "1 ")
        await visitor.ask("before", "finished")
        visitor.say("now", "running")
        visitor.say("next", "waiting")
        await visitor.next("text-delta")
        visitor.send("stop", id=message_id)
        await moment()
        script.say("2", None, "3", None)
        await visitor.until(lambda: len(visitor.of("finish")) == 3)
        assert [told.text for told in visitor.replies] == ["0", "1 2", "3"]
        assert not visitor.of("message-rejected")


@virtual
async def test_stop_without_an_id_and_with_nothing_running_does_nothing() -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        visitor.send("stop")
        visitor.send("stop", id=None)
        assert (await visitor.ask("hi")).text == "hi "
        visitor.send("stop")
        await moment()
        assert kinds(visitor)[-1] == "finish"


@virtual
async def test_end_stops_what_runs() -> None:
    ends: list[str] = []
    rows = Rows()

    async def answer(_: Chat) -> AsyncIterator[str]:
        try:
            yield "word"
            await asyncio.Event().wait()
        finally:
            ends.append("cleaned up")

    async with bench(answer, settings(rows=rows)) as it:
        visitor = await it.visit()
        visitor.say("one", "a")
        visitor.say("two", "b")
        await visitor.next("text-delta")
        visitor.send("end")
        assert await visitor.ended() == 1000
        assert visitor.frames[-2:] == [
            {"type": "abort", "reason": "stopped"},
            {"type": "session-end", "reason": "visitor"},
        ]
        await moment()
        assert ends == ["cleaned up"]
        assert rows.story(visitor) == [(None, None, 0), ("visitor", None, 1)]


@virtual
async def test_nothing_follows_session_end_whatever_the_visitor_still_sends() -> None:
    async with bench(Counting()) as it:
        visitor = await it.visit()
        visitor.send("end")
        visitor.say("a 1 0.1")
        visitor.send("end")
        visitor.put("garbage")
        visitor.put(data=b"garbage")
        assert await visitor.ended() == 1000
        assert kinds(visitor) == ["session-start", "session-end"]


@pytest.mark.parametrize("text", ["", " ", "\n\t\r\n", "\u3000\u00a0\u2003", "\u2028\u2029"])
@virtual
async def test_text_of_white_space_alone_is_empty(text: str) -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        visitor.say(text, "a")
        rejected = await visitor.next("message-rejected")
        assert (rejected["id"], rejected["code"]) == ("a", "empty")
        assert (await visitor.ask("hi", "a")).text == "hi "


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "\\ude00\\ud83d", "a\\udfffb"])
@virtual
async def test_lone_surrogates_coming_in_are_invalid(half: str) -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        visitor.put(f'{{"type": "message", "id": "a", "text": "{half}"}}')
        rejected = await visitor.next("message-rejected")
        assert (rejected["id"], rejected["code"]) == ("a", "invalid")
        visitor.put('{"type": "message", "id": "a", "text": "\\ud83d\\ude00"}')
        await visitor.next("finish")
        assert visitor.replies[0].text == "\U0001f600 "


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["\ud83d", "\ude00"], "\U0001f600"),
        (["a\ud83d", "\ude00b"], "a\U0001f600b"),
        (["\ud83d", "", "\ude00"], "\U0001f600"),
        (["\ud83d\ude00"], "\U0001f600"),
        (["\ud83d", "y"], "\ufffdy"),
        (["\ud83d", "\ud83d", "\ude00"], "\ufffd\U0001f600"),
        (["\ude00", "x"], "\ufffdx"),
        (["x\ude00\ud83dy"], "x\ufffd\ufffdy"),
        (["x", "\ud83d"], "x\ufffd"),
        (["\ud83d"], "\ufffd"),
        (["é\ud83d", "é"], "é\ufffdé"),
    ],
)
@virtual
async def test_surrogate_halves_going_out_are_joined_and_lone_ones_become_ufffd(pieces: list[str], text: str) -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        visitor.say("hi")
        for piece in pieces:
            script.say(piece)
            await moment()
        script.say(None)
        await visitor.next("finish")
        assert visitor.replies[0].text == text
        assert "".join(frame["delta"] for frame in visitor.of("text-delta")) == text
        assert all(visitor.raw[-1].encode() for _ in visitor.raw)


@pytest.mark.parametrize("way", ["stop", "drop", "fail", "a source"])
@pytest.mark.usefixtures("log")
@virtual
async def test_half_a_character_at_the_very_end_is_ufffd_however_the_reply_ends(way: str) -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        visitor.say("hi", "a")
        script.say("x\ud83d")
        await moment()
        if way == "stop":
            visitor.send("stop")
        elif way == "drop":
            await visitor.lose()
            visitor = await it.visit(visitor)
            assert visitor.replies == [] or visitor.replies[0].text == "x"
            script.say(None)
        elif way == "fail":
            script.say(ValueError())
        else:
            script.say(Source("https://e.org/\ud83d", "t\ude00"), None)
        await visitor.next("finish", "abort", "error")
        assert visitor.replies[0].text == "x\ufffd"
        if way == "a source":
            assert visitor.replies[0].sources[0]["url"] == "https://e.org/\ufffd"
            assert visitor.replies[0].sources[0]["title"] == "t\ufffd"


@pytest.mark.parametrize("words", [0, 3])
@virtual
async def test_chunk_timeout_is_the_longest_silence_of_an_answerer_after_it_the_reply_fails(
    words: int, log: Log
) -> None:
    script = Script()
    async with bench(script, settings(chunk_timeout=7)) as it:
        visitor = await it.visit()
        visitor.say("hi")
        for _ in range(words):
            await asyncio.sleep(5)
            script.say("word ")
            await turns(9)
        start = now()
        await visitor.next("error")
        assert now() - start == pytest.approx(7)
        assert visitor.replies[0].text == "word " * words
        script.say("yes", None)
        assert (await visitor.ask("still there?")).text == "yes"
        assert words_of(script.chats[1]) == ["still there?"]
        [error] = log.errors
        assert "Script" in error
        assert visitor.replies[0].id in error


@virtual
async def test_answer_timeout_is_the_longest_reply_after_it_the_reply_fails(log: Log) -> None:
    async with bench(Counting(), settings(answer_timeout=30)) as it:
        visitor = await it.visit()
        start = now()
        told = await visitor.ask("a 1000 1")
        assert now() - start == pytest.approx(30)
        assert told.end is not None
        assert told.end["type"] == "error"
        assert told.text.startswith("a.0 a.1 ")
        assert len(log.errors) == 1


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        (["12345"], "12345"),
        (["123", "456"], "12345"),
        (["123456789"], "12345"),
        (["12345", "6"], "12345"),
        (["1234", "\ud83d", "\ude00!"], "1234\U0001f600"),
    ],
)
@virtual
async def test_a_reply_longer_than_max_reply_chars_is_cut_and_ends_as_finished(pieces: list[str], text: str) -> None:
    script = Script()
    async with bench(script, settings(max_reply_chars=5)) as it:
        visitor = await it.visit()
        script.say(*pieces, None)
        told = await visitor.ask("hi", "a")
        assert (told.text, told.end) == (text, {"type": "finish"})
        script.pieces = asyncio.Queue()
        script.say("yes", None)
        await visitor.ask("and?", "b")
        assert words_of(script.chats[1]) == ["hi", text, "and?"]


@virtual
async def test_a_visitor_who_reads_nothing_for_send_timeout_has_left() -> None:
    rows = Rows()
    async with bench(Counting(), settings(rows=rows, send_timeout=4)) as it:
        visitor = await it.visit()
        visitor.reads.clear()
        visitor.say("a 100 0.1", "a")
        start = now()
        await asyncio.sleep(3.9)
        assert not it.desk.sessions[session_of(visitor)].is_over
        await asyncio.sleep(0.2)
        assert session_of(visitor) not in it.desk.sessions
        assert rows.last(visitor).end_reason == "dropped"
        await visitor.ended()
        assert now() - start < 6
        await asyncio.sleep(10)
        reply = rows.last(visitor).reply
        assert reply is not None
        assert (reply.text, reply.status) == (Counting.whole("a 100 0.1"), "finished")
        visitor.reads.set()


@virtual
async def test_a_visitor_who_reads_slowly_but_reads_stays() -> None:
    async with bench(Counting(), settings(send_timeout=4)) as it:
        visitor = await it.visit()
        visitor.say("a 300 0.1", "a")
        for _ in range(10):
            visitor.reads.clear()
            await asyncio.sleep(3.5)
            visitor.reads.set()
            await turns(9)
        await visitor.next("finish")
        assert visitor.replies[0].text == Counting.whole("a 300 0.1")


@virtual
async def test_no_frame_for_ten_seconds_after_a_ping_means_that_the_visitor_has_left() -> None:
    rows = Rows()
    async with bench(echo, settings(rows=rows)) as it:
        visitor = await it.visit()
        visitor.answers_pings = False
        start = now()
        await visitor.next("ping")
        assert now() - start == 25
        await visitor.ended()
        assert now() - start == 35
        await moment()
        assert rows.last(visitor).end_reason == "dropped"
        assert not visitor.of("session-end")


@virtual
async def test_any_frame_is_a_sign_of_life_and_pings_keep_their_pace() -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        visitor.answers_pings = False
        start = now()
        for at in (30, 60, 90):
            await asyncio.sleep(start + at - now())
            visitor.send("stay")
        assert [
            when - start for frame, when in zip(visitor.frames, visitor.times, strict=True) if frame["type"] == "ping"
        ] == [25, 50, 75]
        await visitor.ended()
        assert now() - start == 125


# ---- Alarms ----------------------------------------------------------------------------------------------------------


@virtual
async def test_alarms_ring_in_order_and_not_when_they_are_cancelled() -> None:
    alarms, rung = chat_session._Alarms(), list[tuple[str, float]]()
    begun = now()

    def ring(name: str) -> None:
        rung.append((name, round(now() - begun, 3)))

    def ring_and_set(name: str) -> None:
        ring(name)
        alarms.after(1, partial(ring, "set meanwhile"))

    kept = [alarms.after(seconds, partial(ring, f"in {seconds}")) for seconds in (5, 3, 9, 3)]
    alarms.after(4, partial(ring_and_set, "in 4"))
    kept[2].cancel()
    kept[2].cancel()
    await asyncio.sleep(10)
    kept[0].cancel()
    assert rung == [("in 3", 3.0), ("in 3", 3.0), ("in 4", 4.0), ("in 5", 5.0), ("set meanwhile", 5.0)]
    assert not alarms._heap


@virtual
async def test_an_alarm_that_raises_keeps_no_other_from_ringing() -> None:
    alarms, rung, faults = chat_session._Alarms(), [], []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context["exception"]))
    alarms.after(1, lambda: cast("list[int]", [])[0])
    alarms.after(1, lambda: rung.append("same time"))
    alarms.after(2, lambda: rung.append("later"))
    await asyncio.sleep(3)
    assert rung == ["same time", "later"]
    assert [type(fault) for fault in faults] == [IndexError]


@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_alarms_that_are_due_already_ring_at_once_whatever_the_loop(kind: str) -> None:
    async def scenario() -> list[str]:
        alarms, rung, done = chat_session._Alarms(), list[str](), asyncio.Event()
        alarms.at(0, partial(rung.append, "long ago"))
        alarms.at(now(), partial(rung.append, "now"))
        alarms.after(0, done.set)
        await done.wait()
        return rung

    factory = pytest.importorskip(kind).new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        assert runner.run(scenario()) == ["long ago", "now"]


@virtual
async def test_alarms_that_are_cancelled_leave_nothing_behind() -> None:
    alarms = chat_session._Alarms()
    kept = [alarms.after(100, print) for _ in range(100)]
    for alarm in kept[:51]:
        alarm.cancel()
    assert len(alarms._heap) == 49
    for alarm in kept[51:]:
        alarm.cancel()
    assert not alarms._heap
    assert alarms._timer is None


def test_an_app_that_ran_on_one_event_loop_is_whole_on_the_next_as_in_a_hosts_own_tests() -> None:
    it = Bench(echo, settings(shutdown_grace=0.05, idle_timeout=100.0, ping_interval=20.0))

    async def be_cut_off() -> None:
        async with it.app.lifespan():
            visitor = await it.visit()
            visitor.say("one two three")
            await visitor.next("text-delta")

    async def talk() -> Visitor:
        async with it.app.lifespan():
            visitor = await it.visit()
            assert (await visitor.ask("four five six")).text == "four five six "
            await visitor.ended()
            return visitor

    for scenario in (be_cut_off, talk):
        with asyncio.Runner(loop_factory=WarpLoop) as runner:
            visitor = runner.run(cast("Any", scenario)())
    assert [frame["closesIn"] for frame in visitor.of("session-idle")] == [60.0]
    assert len(visitor.of("ping")) == 5
    assert visitor.of("session-end") == [{"type": "session-end", "reason": "idle"}]


# ---- The scratchpad --------------------------------------------------------------------------------------------------


def kept(it: Bench) -> int:
    """How many scratchpads the cache's own dict holds, expired or not; looking there sweeps nothing."""
    return len(vars(it.desk.pads._cache)["_Cache__data"])


@virtual
async def test_the_scratchpads_are_a_ttl_cache_from_session_id_to_turns() -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        await visitor.ask("hi")
        cache = it.desk.pads._cache
        assert isinstance(cache, TTLCache)
        assert list(cache) == [session_of(visitor)]


@pytest.mark.parametrize("limit", [1, 2, 6])
@virtual
async def test_whole_turns_fall_off_oldest_first(limit: int) -> None:
    script = Script()
    async with bench(script, settings(scratchpad_turns=limit)) as it:
        visitor = await it.visit()
        for number in range(9):
            script.say(f"a{number}", None)
            await visitor.ask(f"q{number}")
        talk = [text for number in range(9) for text in (f"q{number}", f"a{number}")][:-1]
        assert words_of(script.chats[-1]) == talk[-(2 * limit - 1) :]
        roles = [message["role"] for message in script.chats[-1].messages]
        assert roles == ["user", "assistant"] * (limit - 1) + ["user"]
        assert script.chats[-1].message == "q8"


@virtual
async def test_an_answerer_may_do_to_its_messages_what_it_likes() -> None:
    seen: list[list[str]] = []

    async def answer(chat: Chat) -> str:
        seen.append(words_of(chat))
        for message in chat.messages:
            message["content"] = "spoilt"
        chat.messages.clear()
        return "fine"

    async with bench(answer) as it:
        visitor = await it.visit()
        await visitor.ask("one")
        await visitor.ask("two")
        await visitor.ask("three")
        assert seen[2] == ["one", "fine", "two", "fine", "three"]


@virtual
async def test_a_scratchpads_time_runs_from_the_end_of_its_last_turn() -> None:
    script = Script()
    async with bench(script, settings(chunk_timeout=500, answer_timeout=500)) as it:
        visitor = await it.visit()
        script.say("1", None)
        await visitor.ask("a")
        await asyncio.sleep(100)
        visitor.say("b", "b")
        await asyncio.sleep(50)
        script.say("2", None)
        await visitor.next("finish")
        await visitor.next("finish")
        await asyncio.sleep(179.9)
        script.say("3", None)
        await visitor.ask("c")
        assert words_of(script.chats[2]) == ["a", "1", "b", "2", "c"]
        await asyncio.sleep(180.1)
        script.say("4", None)
        await visitor.ask("d")
        assert words_of(script.chats[3]) == ["d"]


@virtual
async def test_a_scratchpad_is_swept_not_merely_hidden_when_it_expires() -> None:
    async with bench(echo, settings(idle_timeout=1000)) as it:
        visitor = await it.visit()
        await visitor.ask("hi")
        await asyncio.sleep(179)
        assert kept(it) == 1
        await asyncio.sleep(1.2)
        assert kept(it) == 0
        assert it.desk.sessions


@pytest.mark.parametrize("way", ["end", "lose", "replaced", "binary"])
@virtual
async def test_a_scratchpad_is_dropped_the_moment_the_session_ends(way: str) -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        await visitor.ask("hi")
        assert kept(it) == 1
        if way == "end":
            visitor.send("end")
            await visitor.next("session-end")
        elif way == "lose":
            await visitor.lose()
        elif way == "binary":
            visitor.put(data=b"x")
            await visitor.ended()
        else:
            await it.visit(visitor)
        assert kept(it) == 0


@virtual
async def test_a_live_scratchpad_is_never_evicted_to_make_room() -> None:
    script = Script()
    async with bench(script, settings(max_sessions=3)) as it:
        visitors = [await it.visit() for _ in range(3)]
        for number, visitor in enumerate(visitors):
            script.say(f"a{number}", None)
            await visitor.ask(f"q{number}")
        for _ in range(5):
            assert (await it.mint()).status_code == 503
        for number, visitor in enumerate(visitors):
            script.say("b", None)
            await visitor.ask("more")
            assert words_of(script.chats[-1]) == [f"q{number}", f"a{number}", "more"]


@virtual
async def test_at_max_sessions_new_visitors_are_turned_away_politely() -> None:
    async with bench(echo, settings(max_sessions=1)) as it:
        early = await it.token()
        visitor = await it.visit()
        response = await it.mint()
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        late = it.dial(early)
        assert await late.ended() == 1013
        assert (await visitor.ask("hi")).text == "hi "
        visitor.send("end")
        await visitor.ended()
        again = it.dial(early)
        await again.next("session-start")


@virtual
async def test_at_max_sessions_a_page_that_comes_back_takes_the_place_of_its_dead_link() -> None:
    async with bench(echo, settings(max_sessions=1)) as it:
        first = await it.visit()
        second = await it.visit(first)
        assert await first.ended() == 1000
        assert (await second.ask("hi")).text == "hi "


# ---- Refresh and tabs ------------------------------------------------------------------------------------------------


@virtual
async def test_two_tabs_are_two_sessions_that_share_nothing() -> None:
    script = Script()
    async with bench(script) as it:
        one, two = await it.visit(), await it.visit()
        assert session_of(one) != session_of(two)
        script.say("1", None, "2", None)
        await one.ask("first tab", "a")
        await two.ask("second tab", "a")
        assert words_of(script.chats[1]) == ["second tab"]
        one.send("end")
        await one.ended()
        script.say("3", None)
        await two.ask("still here?", "b")
        assert words_of(script.chats[2]) == ["second tab", "2", "still here?"]


@virtual
async def test_a_reload_is_a_fresh_session() -> None:
    script = Script()
    async with bench(script) as it:
        page = await it.visit()
        script.say("1", None, "2", None)
        await page.ask("before", "a")
        await page.lose()
        reloaded = await it.visit()
        await moment()
        assert kinds(reloaded) == ["session-start"]
        await reloaded.ask("after", "a")
        assert words_of(script.chats[1]) == ["after"]


# ---- Drops -----------------------------------------------------------------------------------------------------------


@virtual
async def test_a_connection_that_ends_without_end_or_idle_leaves_an_ended_row_with_the_last_reply() -> None:
    rows = Rows()
    async with bench(echo, settings(rows=rows)) as it:
        visitor = await it.visit()
        await visitor.ask("not this one", "a")
        told = await visitor.ask("this one", "b")
        await visitor.lose()
        await moment()
        row = rows.last(visitor)
        assert row.end_reason == "dropped"
        assert row.ended_at is not None
        assert row.ended_at.tzinfo == UTC
        assert row.turns == 2
        assert row.reply == Reply(told.id, "b", "this one ", [], "finished")


@virtual
async def test_a_reply_that_still_runs_is_finished_first() -> None:
    rows = Rows()
    async with bench(Counting(), settings(rows=rows)) as it:
        visitor = await it.visit()
        visitor.say("a 50 1", "a")
        await visitor.next("text-delta")
        await visitor.lose()
        await asyncio.sleep(60)
        assert rows.story(visitor) == [(None, None, 0), ("dropped", "streaming", 0), ("dropped", "finished", 1)]
        reply = rows.last(visitor).reply
        assert reply is not None
        assert reply.text == Counting.whole("a 50 1")


@virtual
async def test_messages_that_waited_when_the_connection_dropped_are_not_asked_without_their_visitor() -> None:
    answer = Counting()
    async with bench(answer) as it:
        visitor = await it.visit()
        for name in "abc":
            visitor.say(f"{name} 3 1", name)
        await visitor.next("text-delta")
        await visitor.lose()
        await asyncio.sleep(60)
        assert answer.asked == {"a 3 1": 1}


@virtual
async def test_a_page_that_comes_back_is_sent_the_reply_at_once_after_session_start_under_its_old_id() -> None:
    script = Script()
    async with bench(script) as it:
        first = await it.visit()
        first.say("hello", "a")
        await first.next("start")
        await first.lose()
        script.say("one ", Source("https://e.org/1", "One"), "two", Source("https://e.org/2"), None)
        await asyncio.sleep(20)
        start = now()
        second = await it.visit(first)
        await second.next("finish")
        assert now() == start
        assert kinds(second) == [
            *("session-start", "start", "text-start", "text-delta", "source-url", "source-url", "text-end", "finish")
        ]
        [told] = second.replies
        assert (told.id, told.in_reply_to, told.text) == (first.replies[0].id, "a", "one two")
        assert [(each["url"], each["title"]) for each in told.sources] == [
            ("https://e.org/1", "One"),
            ("https://e.org/2", ""),
        ]
        assert len({each["sourceId"] for each in told.sources}) == 2


@virtual
async def test_a_carried_source_keeps_the_id_it_had() -> None:
    script = Script()
    async with bench(script) as it:
        first = await it.visit()
        first.say("hello", "a")
        script.say("see ", Source("https://e.org/1", "One"))
        await first.next("source-url")
        await first.lose()
        second = await it.visit(first)
        script.say(Source("https://e.org/2", "Two"), None)
        await second.next("finish")
        assert second.replies[0].sources[0] == first.replies[0].sources[0]


@virtual
async def test_a_carried_reply_with_very_many_sources_arrives_whole() -> None:
    async def answer(_: Chat) -> AsyncIterator[str | Source]:
        yield "see "
        for number in range(1_200):
            yield Source(f"https://e.org/{number}")

    async with bench(answer) as it:
        first = await it.visit()
        told = await first.ask("hello", "a")
        assert len(told.sources) == 1_200
        await first.lose()
        second = it.dial(await it.token(it.tokens[id(first)]))
        await asyncio.sleep(5)
        assert second.of("finish"), "the line was given up"
        assert len(second.replies[0].sources) == 1_200


@virtual
async def test_a_carried_reply_that_is_still_being_written_goes_on_live_without_a_gap_or_a_doubled_word() -> None:
    for delay in range(40):
        answer = Counting()
        async with bench(answer) as it:
            page = Tab(it)
            first = await page.come()
            page.say("a 30 0.007", "a")
            await asyncio.sleep(delay * 0.006)
            await first.lose()
            await asyncio.sleep(0.003)
            await page.come()
            await page.settle()
            assert page.told["a"].text == Counting.whole("a 30 0.007")
            assert answer.asked == {"a 30 0.007": 1}


@pytest.mark.parametrize(
    ("way", "end"), [("fail", {"type": "error"}), ("stop", {"type": "abort", "reason": "stopped"})]
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.usefixtures("log")
@virtual
async def test_a_failed_carried_reply_ends_with_error_and_a_stopped_one_with_abort(
    way: str, end: dict[str, str], when: str
) -> None:
    script = Script()
    async with bench(script) as it:
        first = await it.visit()
        first.say("hello", "a")
        script.say("one ")
        await first.next("text-delta")
        if when == "before":
            script.say(*([ValueError()] if way == "fail" else []))
            if way == "stop":
                first.send("stop")
            await moment()
        await first.lose()
        second = await it.visit(first)
        if when == "after":
            script.say(*([ValueError()] if way == "fail" else []))
            if way == "stop":
                second.send("stop")
        told_end = await second.next("error", "abort", "finish")
        assert {name: told_end[name] for name in end} == end
        assert second.replies[0].id == first.replies[0].id
        assert second.replies[0].text == "one "


@pytest.mark.parametrize("status", ["interrupted", "streaming"])
@virtual
async def test_an_interrupted_carried_reply_ends_with_abort(status: str) -> None:
    rows = Rows()
    config = settings(rows=rows)
    async with bench(echo, config) as gone:
        first = await gone.visit()
        await first.lose()
    reply = msgspec.convert({"id": "r1", "in_reply_to": "a", "text": "half ", "sources": [], "status": status}, Reply)
    rows.kept[session_of(first)] = msgspec.structs.replace(rows.last(first), reply=reply)
    async with bench(echo, config) as it:
        it.tokens[id(first)] = gone.tokens[id(first)]
        second = await it.visit(first)
        assert (await second.next("abort"))["reason"] == "interrupted"
        assert (second.replies[0].id, second.replies[0].text) == ("r1", "half ")
        second.say("hello", "a")
        await second.next("finish")
        assert [(told.in_reply_to, told.text) for told in second.replies] == [("a", "half "), ("a", "hello ")]


@virtual
async def test_previous_takes_effect_when_the_socket_opens() -> None:
    async with bench(echo) as it:
        first = await it.visit()
        token = await it.token(it.tokens[id(first)])
        assert (await first.ask("still open?")).text == "still open? "
        second = it.dial(token)
        await second.next("session-start")
        assert (await first.next("session-end"))["reason"] == "replaced"


@virtual
async def test_messages_wait_until_what_previous_brings_is_settled() -> None:
    script, rows = Script(), Rows(load_takes=3)
    async with bench(script, settings(rows=rows)) as gone:
        first = await gone.visit()
        script.say("1", None)
        await first.ask("hello", "a")
        await first.lose()
    async with bench(script, settings(rows=rows)) as it:
        it.tokens[id(first)] = gone.tokens[id(first)]
        start = now()
        second = await it.visit(first)
        assert now() == start
        second.say("hello", "a")
        second.say("and?", "b")
        await asyncio.sleep(2.9)
        assert kinds(second) == ["session-start"]
        script.say("2", None)
        await second.next("finish")
        await second.next("finish")
        assert now() - start == pytest.approx(3)
        assert [(told.in_reply_to, told.text) for told in second.replies] == [("a", "1"), ("b", "2")]
        assert [words_of(chat) for chat in script.chats] == [["hello"], ["hello", "1", "and?"]]


@pytest.mark.parametrize("how", ["stop", "max_pending"])
@virtual
async def test_messages_that_wait_for_previous_are_messages_that_wait(how: str) -> None:
    script, rows = Script(), Rows(load_takes=3)
    async with bench(script, settings(rows=rows)) as it:
        first = await it.visit()
        await first.lose()
        second = await it.visit(first)
        for name in "abcde":
            second.say(name, name)
        if how == "stop":
            second.send("stop", id="c")
            assert (await second.next("message-rejected"))["code"] == "cancelled"
            script.say(*["x", None] * 4)
            expected = ["a", "b", "d", "e"]
        else:
            second.say("f", "f")
            assert (await second.next("message-rejected"))["code"] == "too-many"
            script.say(*["x", None] * 5)
            expected = ["a", "b", "c", "d", "e"]
        for _ in expected:
            await second.next("finish")
        assert [chat.message for chat in script.chats] == expected


@pytest.mark.parametrize("trouble", ["raises", "hangs", "wrong arity", "wrong type", "a dict", "cancelled"])
@virtual
async def test_a_load_that_fails_or_hangs_is_logged_and_the_messages_are_answered(trouble: str, log: Log) -> None:
    class Broken(Rows):
        async def load(self, *_: Any) -> Any:  # pyright: ignore - that is the trouble
            await asyncio.sleep(1)
            if trouble == "raises":
                raise ValueError
            if trouble == "hangs":
                await asyncio.Event().wait()
            if trouble == "cancelled":
                raise asyncio.CancelledError
            return {"reply": {"id": "x"}} if trouble == "a dict" else 7

    class WrongArity(Rows):
        async def load(self) -> None:  # type: ignore[override]
            pass

    rows = WrongArity() if trouble == "wrong arity" else Broken()
    async with bench(echo, settings(rows=rows)) as it:
        first = await it.visit()
        await first.lose()
        second = await it.visit(first)
        second.say("hello there", "a")
        start = now()
        await second.next("finish", seconds=30)
        assert now() - start < 8
        assert log.errors


@pytest.mark.parametrize("when", ["finished", "stopped", "streaming"])
@virtual
async def test_a_message_that_the_carried_reply_answers_is_recognised_and_puts_the_whole_turn_on_the_scratchpad(
    when: str,
) -> None:
    script = Script()
    async with bench(script) as it:
        first = await it.visit()
        first.say("hello", "a")
        script.say("one ")
        await first.next("text-delta")
        if when == "stopped":
            first.send("stop")
        elif when == "finished":
            script.say(None)
        await moment()
        await first.lose()
        second = await it.visit(first)
        second.say("hello", "a")
        second.say("and?", "b")
        await moment()
        if when == "streaming":
            script.say("more", None)
        script.say("yes", None)
        await second.until(lambda: len(second.replies) == 2 and second.replies[1].end is not None)
        said = "one more" if when == "streaming" else "one "
        assert words_of(script.chats[1]) == ["hello", said, "and?"]
        assert len(script.chats) == 2
        await second.lose()
        await moment()


@virtual
async def test_a_recognised_message_is_taken_and_recognised_once() -> None:
    script = Script()
    async with bench(script) as it:
        first = await it.visit()
        script.say("one", None)
        await first.ask("hello", "a")
        await first.lose()
        second = await it.visit(first)
        second.say("hello", "a")
        second.say("hello", "a")
        await moment()
        script.say("two", None)
        await second.ask("and?", "b")
        assert words_of(script.chats[1]) == ["hello", "one", "and?"]
        assert not second.of("message-rejected")


@pytest.mark.parametrize("resend", ["before", "after"])
@pytest.mark.usefixtures("log")
@virtual
async def test_a_carried_reply_that_failed_is_answered_anew_and_the_new_one_takes_its_place(resend: str) -> None:
    script = Script()
    async with bench(script) as it:
        page = Tab(it)
        first = await page.come()
        page.say("hello", "a")
        await first.next("start")
        await first.lose()
        script.say("half", ValueError())
        await moment()
        second = await it.visit(first)
        page.visitors.append(second)
        if resend == "after":
            await second.next("error")
        second.say("hello", "a")
        script.say("whole", None)
        await second.next("finish")
        assert [told.in_reply_to for told in second.replies] == ["a", "a"]
        assert second.replies[0].id == first.replies[0].id != second.replies[1].id
        assert page.told["a"].text == "whole"
        assert words_of(script.chats[1]) == ["hello"]


@virtual
async def test_a_previous_session_that_still_looks_open_is_ended_as_replaced() -> None:
    script, rows = Script(), Rows()
    async with bench(script, settings(rows=rows)) as it:
        first = await it.visit()
        first.say("hello", "a")
        script.say("one ")
        await first.next("text-delta")
        first.reads.clear()
        second = await it.visit(first)
        await second.next("text-delta")
        script.say("two", None)
        await second.next("finish")
        assert second.replies[0].text == "one two"
        assert rows.story(first)[:3] == [(None, None, 0), ("replaced", "streaming", 0), ("replaced", "finished", 1)]
        await asyncio.sleep(2)
        assert first.task.done()
        first.reads.set()


@virtual
async def test_a_dead_link_that_lives_after_all_is_told_that_it_was_replaced() -> None:
    async with bench(Counting()) as it:
        first = await it.visit()
        first.say("a 20 0.1", "a")
        await first.next("text-delta")
        second = await it.visit(first)
        assert await first.ended() == 1000
        assert first.frames[-1] == {"type": "session-end", "reason": "replaced"}
        assert "abort" not in kinds(first)
        await second.next("finish")
        assert second.replies[0].text == Counting.whole("a 20 0.1")


@virtual
async def test_a_stored_reply_goes_once_the_page_has_been_heard_after_it_was_sent_to_its_end() -> None:
    rows = Rows()
    async with bench(echo, settings(rows=rows)) as it:
        first = await it.visit()
        await first.ask("hello", "a")
        await first.lose()
        second = await it.visit(first)
        await second.next("finish")
        await moment()
        assert rows.last(first).reply is not None
        second.send("pong")
        await moment()
        assert rows.story(first)[-1] == ("dropped", None, 1)
        assert not it.desk.past
        third = await it.visit(first)
        await moment()
        assert kinds(third) == ["session-start"]


@virtual
async def test_a_stored_reply_goes_once_the_page_was_heard_though_the_next_reply_flows() -> None:
    rows = Rows()
    async with bench(Counting(), settings(rows=rows, max_reply_chars=1_000_000)) as it:
        first = await it.visit()
        first.say("a 20 0.05", "a")
        await first.next("text-delta")
        await first.lose()
        second = await it.visit(first)
        second.say("a 20 0.05", "a")
        second.say("b 9000 0.005", "b")
        await second.next("finish")
        for _ in range(5):
            await asyncio.sleep(4.001)
            second.send("pong")
        await turns(9)
        assert rows.last(first).reply is None
        second.send("stop")
        await second.next("abort")


@virtual
async def test_a_page_that_was_heard_before_the_carried_reply_ended_may_still_lose_it() -> None:
    script, rows = Script(), Rows()
    async with bench(script, settings(rows=rows)) as it:
        first = await it.visit()
        first.say("hello", "a")
        script.say("one ")
        await first.next("text-delta")
        await first.lose()
        second = await it.visit(first)
        await second.next("text-delta")
        second.send("pong")
        second.say("hello", "a")
        await moment()
        script.say("two", None)
        await second.next("finish")
        await moment()
        assert rows.last(first).reply is not None
        third = await it.visit(first)
        await third.next("finish")
        assert third.replies[0].text == "one two"


@virtual
async def test_a_page_that_is_heard_but_reads_nothing_keeps_its_stored_reply() -> None:
    rows = Rows()
    async with bench(echo, settings(rows=rows)) as it:
        first = await it.visit()
        await first.ask("hello", "a")
        await first.lose()
        second = it.dial(await it.token(it.tokens[id(first)]))
        second.reads.clear()
        for _ in range(4):
            await asyncio.sleep(2)
            second.send("pong")
        await moment()
        assert rows.last(first).reply is not None
        second.reads.set()
        await second.next("finish")
        second.send("pong")
        await moment()
        assert rows.last(first).reply is None


@virtual
async def test_a_stored_reply_goes_after_reply_ttl_counted_from_its_end() -> None:
    rows = Rows()
    async with bench(Counting(), settings(rows=rows, reply_ttl=100)) as it:
        first = await it.visit()
        first.say("a 30 1", "a")
        await first.next("start")
        await first.lose()
        await asyncio.sleep(30 + 99.5)
        second = await it.visit(first)
        await second.next("finish")
        await second.lose()
        third = await it.visit()
        await asyncio.sleep(0.6)
        assert rows.last(first).reply is None
        await third.lose()
        await asyncio.sleep(100)
        assert not it.desk.past
        assert rows.last(second).reply is None


@virtual
async def test_a_chain_of_drops_leaves_no_stored_reply_behind_once_the_page_was_heard() -> None:
    rows = Rows()
    async with bench(echo, settings(rows=rows)) as it:
        first = await it.visit()
        await first.ask("hello", "a")
        await first.lose()
        second = await it.visit(first)
        await second.next("finish")
        await second.lose()
        third = await it.visit(second)
        await third.next("finish")
        third.send("pong")
        await moment()
        assert rows.last(second).reply is None
        assert rows.last(first).reply is None


@virtual
async def test_a_connection_that_dies_while_it_opens_costs_nothing() -> None:
    for step in range(25):
        answer = Counting()
        async with bench(answer) as it:
            page = Tab(it)
            first = await page.come()
            page.say("a 5 0.01", "a")
            await asyncio.sleep(0.025)
            await first.lose()
            for _ in range(3):
                dying = await page.dial()
                await turns(step)
                await dying.lose()
                page.note()
            await asyncio.sleep(0.1)
            await page.come()
            await page.settle()
            assert page.told["a"].text == Counting.whole("a 5 0.01")
            assert answer.asked == {"a 5 0.01": 1}


@pytest.mark.parametrize("step", [0, 1, 2])
@virtual
async def test_the_same_previous_can_be_used_again_and_again(step: int) -> None:
    async with bench(echo) as it:
        first = await it.visit()
        await first.ask("hello", "a")
        await first.lose()
        for _ in range(5):
            dying = it.dial(await it.token(it.tokens[id(first)]))
            await turns(3 * step)
            await dying.lose()
        last = await it.visit(first)
        await last.next("finish")
        assert last.replies[0].text == "hello "


@pytest.mark.parametrize("load_takes", [0.0, 2.0])
@virtual
async def test_a_connection_that_dies_while_the_row_is_loaded_costs_nothing(load_takes: float) -> None:
    rows = Rows(load_takes=load_takes)
    async with bench(echo, settings(rows=rows)) as gone:
        first = await gone.visit()
        await first.ask("hello", "a")
        await first.lose()
    async with bench(echo, settings(rows=rows)) as it:
        it.tokens[id(first)] = gone.tokens[id(first)]
        second = await it.visit(first)
        await second.lose()
        third = await it.visit(second)
        await third.until(lambda: bool(third.of("finish")), 60)
        assert third.replies[0].text == "hello "


@pytest.mark.parametrize("said", [0, 2, 4])
@virtual
async def test_chains_of_drops_carry_one_reply_along(said: int) -> None:
    script = Script()
    async with bench(script) as it:
        page = Tab(it)
        visitor = await page.come()
        page.say("hello", "a")
        words = ["one ", "two ", "three ", "four "]
        await visitor.next("start")
        for number, word in enumerate(words):
            if number >= said:
                await visitor.lose()
                visitor = await page.come()
            script.say(word)
            await moment()
        await visitor.lose()
        visitor = await page.come()
        script.say(None)
        await visitor.next("finish")
        for _ in range(3):
            await visitor.lose()
            visitor = await page.come()
            await visitor.next("finish")
        assert page.told["a"].text == "one two three four "
        script.say("yes", None)
        visitor.say("hello", "a")
        page.say("and?", "b")
        await page.settle()
        assert [words_of(chat) for chat in script.chats] == [["hello"], ["hello", "one two three four ", "and?"]]


@pytest.mark.parametrize("gap", [0, 1, 3, 5, 8])
@virtual
async def test_two_returns_in_quick_succession_lose_and_double_nothing(gap: int) -> None:
    answer = Counting()
    async with bench(answer) as it:
        page = Tab(it)
        first = await page.come()
        page.say("a 10 0.05", "a")
        await first.next("text-delta")
        tokens = [await it.token(page.previous) for _ in range(2)]
        one = it.dial(tokens[0])
        await turns(gap)
        two = it.dial(tokens[1])
        await two.next("session-start")
        two.say("a 10 0.05", "a")
        await two.next("finish")
        assert two.replies[0].text == Counting.whole("a 10 0.05")
        assert answer.asked == {"a 10 0.05": 1}
        assert await one.ended() == 1000
        assert one.frames[-1] == {"type": "session-end", "reason": "replaced"}
        assert await first.ended() == 1000


@virtual
async def test_the_expiry_of_previous_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(echo, settings(reply_ttl=100_000)) as it:
        first = await it.visit()
        await first.ask("hello", "a")
        await first.lose()
        monkeypatch.setattr(chat_session, "time", SimpleNamespace(time=lambda: time.time() + 90_000))
        second = await it.visit(first)
        await second.next("finish")
        assert second.replies[0].text == "hello "


@virtual
async def test_the_mac_of_previous_is_checked() -> None:
    async with bench(echo) as it:
        first = await it.visit()
        await first.ask("hello", "a")
        await first.lose()
        token = it.tokens[id(first)]
        for garbage in (token[:-1] + ("A" if token[-1] != "A" else "B"), token.swapcase(), "", "x", "v1.a.b", "é" * 9):
            visitor = it.dial(await it.token(garbage))
            await visitor.next("session-start")
            await moment()
            assert kinds(visitor) == ["session-start"]
            await visitor.lose()


STEPS = ("before the first word", "between words", "between the last word and finish", "after finish")


@pytest.mark.parametrize("waiting", [0, 2])
@pytest.mark.parametrize("link", ["lost", "dead"])
@pytest.mark.parametrize("back", ["while it runs", "after it"])
@pytest.mark.parametrize("step", STEPS)
@virtual
async def test_a_drop_at_any_step_loses_and_doubles_nothing(step: str, back: str, link: str, waiting: int) -> None:
    script = Script()
    asked: collections.Counter[str] = collections.Counter()

    async def answer(chat: Chat) -> AsyncIterator[str | Source]:
        asked[chat.message] += 1
        if chat.message != "first":
            yield f"to {chat.message}"
            return
        async for piece in script(chat):
            yield piece

    pieces: list[str | None] = ["one ", "two ", "three ", "four", None]
    said = {STEPS[0]: 0, STEPS[1]: 2, STEPS[2]: 4, STEPS[3]: 5}[step]
    async with bench(answer) as it:
        page = Tab(it)
        visitor = await page.come()
        page.say("first", "first")
        script.say(*pieces[:said])
        await moment()
        for number in range(waiting):
            page.say(f"next {number}", f"n{number}")
        if link == "lost":
            await visitor.lose()
        else:
            visitor.reads.clear()
        if back == "after it":
            script.say(*pieces[said:])
            await moment()
        await page.come()
        await moment()
        if back == "while it runs":
            script.say(*pieces[said:])
        page.say("last", "last")
        await page.settle()
        assert {name: told.text for name, told in page.told.items()} == {
            "first": "one two three four",
            **{f"n{number}": f"to next {number}" for number in range(waiting)},
            "last": "to last",
        }
        assert set(asked.values()) == {1}
        visitor.reads.set()


@pytest.mark.parametrize("is_lossy", [False, True])
@pytest.mark.parametrize("seed", range(4))
@virtual
async def test_fifty_random_cuts_in_a_row_lose_and_double_nothing(seed: int, *, is_lossy: bool) -> None:
    dice = random.Random(seed)
    answer = Counting()
    async with bench(answer, settings(messages_per_minute=1_000, max_sessions=100)) as it:
        page = Tab(it)
        visitor = await page.come()
        for number in range(50):
            if len(page.unseen) < 3:
                page.say(f"m{number} {dice.randrange(12)} {dice.choice([0, 0.004, 0.03])}", f"m{number}")
                await turns(20 if is_lossy else dice.randrange(20))
                page.heard_at = len(visitor.frames)
            await asyncio.sleep(dice.choice([0, 0.002, 0.01, 0.1, 0.5]))
            await turns(dice.randrange(9))
            if dice.random() < 0.7:
                await visitor.lose()
            if is_lossy:
                page.lose_sight(dice)
            if dice.random() < 0.3:
                dying = await page.dial()
                await turns(dice.randrange(20))
                await dying.lose()
                page.note()
            await asyncio.sleep(dice.choice([0, 0.01, 0.3]))
            visitor = await page.come()
        await page.settle()
        assert {name: told.text for name, told in page.told.items()} == {
            name: Counting.whole(text) for name, text in page.sent.items()
        }
        assert [text for text, count in answer.asked.items() if count != 1] == []
        assert len(answer.asked) == len(page.sent)


@pytest.mark.parametrize("status", ["finished", "stopped", "failed"])
@pytest.mark.usefixtures("log")
@virtual
async def test_a_reply_is_carried_from_a_row_that_this_process_does_not_know(status: str) -> None:
    script, rows = Script(), Rows()
    async with bench(script, settings(rows=rows)) as gone:
        first = await gone.visit()
        first.say("hello", "a")
        script.say("one ", Source("https://e.org", "E"), "two")
        await first.next("source-url")
        await moment()
        if status == "stopped":
            first.send("stop")
        else:
            script.say(ValueError() if status == "failed" else None)
        await moment()
        await first.lose()
    async with bench(script, settings(rows=rows)) as it:
        it.tokens[id(first)] = gone.tokens[id(first)]
        second = await it.visit(first)
        second.say("hello", "a")
        script.pieces = asyncio.Queue()
        if status == "failed":
            script.say("anew", None)
        script.say("yes", None)
        second.say("and?", "b")
        await second.until(lambda: any(told.in_reply_to == "b" and told.end for told in second.replies))
        old = second.replies[0]
        assert old.end is not None
        assert (old.id, old.text, old.end["type"]) == (
            *(first.replies[0].id, "one two"),
            {"finished": "finish", "stopped": "abort", "failed": "error"}[status],
        )
        assert [each["url"] for each in old.sources] == ["https://e.org"]
        assert words_of(script.chats[-1]) == ["hello", "anew" if status == "failed" else "one two", "and?"]
        assert len(script.chats) == (3 if status == "failed" else 2)
        await moment()
        second.send("pong")
        await moment()
        assert rows.last(first).reply is None


# ---- Idle ------------------------------------------------------------------------------------------------------------


def warnings_of(visitor: Visitor, start: float) -> list[tuple[float, float]]:
    """When the visitor was warned, and of how much."""
    both = zip(visitor.frames, visitor.times, strict=True)
    return [(round(when - start, 3), frame["closesIn"]) for frame, when in both if frame["type"] == "session-idle"]


@virtual
async def test_pings_and_pongs_do_not_count_against_idling() -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        start = now()
        for at in range(10, 300, 10):
            await asyncio.sleep(start + at - now())
            visitor.send("pong")
        await visitor.next("session-end")
        assert now() - start == 300


@virtual
async def test_an_idle_session_ends_with_its_row_ended_and_its_scratchpad_gone() -> None:
    rows = Rows()
    async with bench(echo, settings(rows=rows, scratchpad_ttl=1000)) as it:
        visitor = await it.visit()
        await visitor.ask("hi")
        assert kept(it) == 1
        assert await visitor.ended() == 1000
        assert visitor.frames[-1] == {"type": "session-end", "reason": "idle"}
        await moment()
        assert rows.story(visitor) == [(None, None, 0), ("idle", None, 1)]
        assert kept(it) == 0
        assert not it.desk.past


@virtual
async def test_a_message_starts_the_idle_time_anew() -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        start = now()
        await asyncio.sleep(200)
        await visitor.ask("hi")
        await visitor.ended()
        assert warnings_of(visitor, start) == [(440.1, 60)]
        assert now() - start == pytest.approx(500.1)


@virtual
async def test_a_running_reply_is_not_idle_however_long_it_takes() -> None:
    async with bench(Counting(), settings(answer_timeout=1000)) as it:
        visitor = await it.visit()
        start = now()
        await asyncio.sleep(100)
        await visitor.ask("a 20 30")
        assert now() - start == 700
        assert warnings_of(visitor, start) == []
        await visitor.ended()
        assert warnings_of(visitor, start) == [(940, 60)]
        assert now() - start == 1000


@virtual
async def test_a_running_carried_reply_is_not_idle_either() -> None:
    async with bench(Counting(), settings(answer_timeout=1000)) as it:
        first = await it.visit()
        first.say("a 20 30", "a")
        await first.next("start")
        await first.lose()
        second = await it.visit(first)
        start = now()
        await second.next("finish")
        assert now() - start == 600
        await second.ended()
        assert warnings_of(second, start) == [(840, 60)]


@pytest.mark.parametrize("wait", ["for previous", "for the answerer to stop"])
@virtual
async def test_a_waiting_message_is_not_idle(wait: str) -> None:
    async def answer(chat: Chat) -> AsyncIterator[str]:
        try:
            yield "word"
            await asyncio.sleep(0.1 if chat.message != "long" else 100)
        finally:
            await asyncio.sleep(4 if chat.message == "long" else 0)

    rows = Rows(load_takes=4)
    async with bench(answer, settings(idle_timeout=2, idle_warning=1, rows=rows)) as it:
        visitor = await it.visit()
        if wait == "for previous":
            await visitor.lose()
            visitor = await it.visit(visitor)
        else:
            visitor.say("long", "a")
            await visitor.next("text-delta")
            visitor.send("stop")
        visitor.say("hello", "b")
        await visitor.until(lambda: visitor.task.done() or bool(visitor.of("finish")), 30)
        assert kinds(visitor)[-1] == "finish"
        assert not visitor.of("session-idle")


@pytest.mark.parametrize("wait", ["for previous", "for the answerer to stop"])
@virtual
async def test_a_session_whose_waiting_message_was_taken_back_is_idle_again(wait: str) -> None:
    async def answer(chat: Chat) -> AsyncIterator[str]:
        try:
            yield chat.message
            await asyncio.sleep(100)
        finally:
            await asyncio.sleep(4)

    async with bench(answer, settings(idle_timeout=2, idle_warning=1, rows=Rows(load_takes=4))) as it:
        visitor = await it.visit()
        if wait == "for previous":
            await visitor.lose()
            visitor = await it.visit(visitor)
        else:
            visitor.say("long", "a")
            await visitor.next("text-delta")
            visitor.send("stop")
        visitor.say("hello", "b")
        await asyncio.sleep(3)
        visitor.send("stop", id="b")
        await asyncio.sleep(8)
        assert kinds(visitor)[-2:] == ["session-idle", "session-end"]


@virtual
async def test_stay_answers_the_warning() -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        start = now()
        await visitor.next("session-idle")
        await asyncio.sleep(10)
        visitor.send("stay")
        await visitor.ended()
        assert warnings_of(visitor, start) == [(240, 60), (490, 60)]
        assert now() - start == 550


@pytest.mark.parametrize("way", ["stay", "message"])
@virtual
async def test_every_warning_comes_in_time_even_where_it_comes_early(way: str) -> None:
    async with bench(Counting(), settings(idle_timeout=300, idle_warning=200)) as it:
        visitor = await it.visit()
        start = now()
        await visitor.next("session-idle")
        await asyncio.sleep(10)
        if way == "stay":
            visitor.send("stay")
        else:
            await visitor.ask("a 0 0")
        await visitor.ended()
        assert warnings_of(visitor, start) == [(100, 200), (210, 200)]
        assert now() - start == 410


@virtual
async def test_a_warning_of_nothing_is_no_warning() -> None:
    async with bench(echo, settings(idle_timeout=50, idle_warning=0)) as it:
        visitor = await it.visit()
        start = now()
        assert await visitor.ended() == 1000
        assert now() - start == 50
        assert kinds(visitor) == ["session-start", "session-end"]


@virtual
async def test_a_warning_as_long_as_the_idle_time_comes_at_once() -> None:
    async with bench(Counting(), settings(idle_timeout=50, idle_warning=50)) as it:
        visitor = await it.visit()
        start = now()
        await moment()
        assert kinds(visitor) == ["session-start", "session-idle"]
        await asyncio.sleep(10)
        await visitor.ask("a 1 5")
        await visitor.ended()
        assert warnings_of(visitor, start)[0] == (0, 50)
        assert warnings_of(visitor, start)[-1] == (15.05, 50)
        assert now() - start == pytest.approx(65.05)


@pytest.mark.parametrize("order", ["before", "with", "after"])
@virtual
async def test_a_message_at_the_very_moment_of_the_close_is_answered_or_left_to_the_next_session(order: str) -> None:
    answer = Counting()
    async with bench(answer, settings(idle_timeout=50, idle_warning=0)) as it:
        visitor = await it.visit()
        loop = asyncio.get_running_loop()
        due = now() + 50
        if order == "with":
            loop.call_at(due, visitor.say, "a 1 1", "a")
        elif order == "before":
            loop.call_at(due - 0.001, visitor.say, "a 1 1", "a")
        else:
            loop.call_at(due, lambda: loop.call_soon(visitor.say, "a 1 1", "a"))
        await visitor.next("session-end")
        await visitor.ended()
        told = [each.text for each in visitor.replies]
        assert told in ([], ["a.0 "])
        assert sum(answer.asked.values()) == len(told)
        assert (order != "before") or told
        fresh = await it.visit()
        assert (await fresh.ask("a 1 1", "a")).text == "a.0 "


# ---- Shutdown --------------------------------------------------------------------------------------------------------


@virtual
async def test_open_sessions_get_session_end_restart_and_1012() -> None:
    rows = Rows()
    async with process(echo, settings(rows=rows)) as it:
        quiet, told = await it.visit(), await it.visit()
        await told.ask("hi", "a")
        start = now()
    assert now() - start < 1
    for visitor in (quiet, told):
        assert visitor.task.done()
        assert visitor.code == 1012
        assert visitor.frames[-1] == {"type": "session-end", "reason": "restart"}
    assert rows.story(quiet) == [(None, None, 0), ("restart", None, 0)]
    assert rows.story(told) == [(None, None, 0), ("restart", "finished", 1)]


@virtual
async def test_new_visitors_get_503_and_1013_while_replies_are_finished() -> None:
    async def newcomer(it: Bench, token: str) -> None:
        await asyncio.sleep(2)
        response = await it.mint()
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        late = it.dial(token)
        assert await late.ended() == 1013
        assert not late.frames

    async with process(Counting()) as it:
        visitor = await it.visit()
        visitor.say("a 5 1", "a")
        await visitor.next("start")
        check = asyncio.create_task(newcomer(it, await it.token()))
        start = now()
    assert now() - start == pytest.approx(5)
    await check
    assert visitor.replies[0].end == {"type": "finish"}
    assert visitor.code == 1012


@virtual
async def test_a_page_that_comes_back_while_we_shut_down_is_asked_to_come_later() -> None:
    async def back(it: Bench, previous: str, token: str) -> None:
        await asyncio.sleep(2)
        assert (await it.mint(previous)).status_code == 503
        assert await it.dial(token).ended() == 1013

    async with process(Counting()) as it:
        visitor = await it.visit()
        visitor.say("a 5 1", "a")
        await visitor.next("start")
        previous = it.tokens[id(visitor)]
        check = asyncio.create_task(back(it, previous, await it.token(previous)))
    await check
    assert visitor.replies[0].end == {"type": "finish"}


@virtual
async def test_running_replies_get_shutdown_grace_then_are_stored_as_interrupted() -> None:
    rows = Rows()
    async with process(Counting(), settings(rows=rows, shutdown_grace=3)) as it:
        live, left = await it.visit(), await it.visit()
        for visitor in (live, left):
            visitor.say("a 50 0.5", "a")
            visitor.say("b 50 0.5", "b")
            await visitor.next("start")
        await left.lose()
        start = now()
    assert now() - start == pytest.approx(3, abs=0.1)
    assert live.frames[-2:] == [
        {"type": "abort", "reason": "interrupted"},
        {"type": "session-end", "reason": "restart"},
    ]
    assert live.code == 1012
    for visitor, reason in ((live, "restart"), (left, "dropped")):
        row = rows.last(visitor)
        assert row.end_reason == reason
        assert row.reply is not None
        assert row.reply.status == "interrupted"
        assert row.reply.text.startswith("a.0 a.1 a.2 ")
        assert row.turns == 0


@virtual
async def test_a_reply_that_ends_within_the_grace_is_whole_and_nothing_waiting_is_begun() -> None:
    answer, rows = Counting(), Rows()
    async with process(answer, settings(rows=rows)) as it:
        visitor = await it.visit()
        visitor.say("a 5 1", "a")
        visitor.say("b 5 1", "b")
        await visitor.next("start")
    assert answer.asked == {"a 5 1": 1}
    assert kinds(visitor)[-3:] == ["text-end", "finish", "session-end"]
    reply = rows.last(visitor).reply
    assert reply is not None
    assert (reply.text, reply.status) == (Counting.whole("a 5 1"), "finished")


@virtual
async def test_a_page_finds_its_reply_in_the_next_process() -> None:
    rows = Rows()
    async with process(Counting(), settings(rows=rows, shutdown_grace=1)) as old:
        done, cut = await old.visit(), await old.visit()
        await done.ask("a 2 0.1", "a")
        cut.say("b 9 0.3", "b")
        await cut.next("start")
    async with bench(Counting(), settings(rows=rows)) as it:
        it.tokens.update(old.tokens)
        again = await it.visit(done)
        await again.next("finish")
        assert again.replies[0].text == Counting.whole("a 2 0.1")
        more = await it.visit(cut)
        await more.next("abort")
        more.say("b 9 0.3", "b")
        await more.next("finish")
        assert more.replies[-1].text == Counting.whole("b 9 0.3")


@pytest.mark.parametrize("grace", [0.0, 10.0])
@virtual
async def test_rows_are_saved_before_the_process_goes(grace: float) -> None:
    rows = Rows(save_takes=2)
    async with process(echo, settings(rows=rows, shutdown_grace=grace)) as it:
        visitor = await it.visit()
        visitor.say("hi there", "a")
        await visitor.next("text-delta")
    assert rows.last(visitor).end_reason == "restart"
    assert rows.last(visitor).reply is not None


@virtual
async def test_a_save_that_hangs_does_not_keep_the_process_for_ever(log: Log) -> None:
    async def save(_: SessionRow) -> None:
        await asyncio.Event().wait()

    async with process(echo, settings(rows=save)) as it:
        visitor = await it.visit()
        start = now()
    assert now() - start <= 15
    assert visitor.code == 1012
    assert log.errors
    await asyncio.sleep(100)


@pytest.mark.usefixtures("log")
@virtual
async def test_an_answerer_that_ignores_its_end_does_not_keep_the_process_for_ever() -> None:
    async def answer(_chat: Chat) -> AsyncIterator[str]:
        yield "word"
        for _ in range(9):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(5)

    rows = Rows()
    async with process(answer, settings(rows=rows, shutdown_grace=3)) as it:
        visitor = await it.visit()
        visitor.say("hi", "a")
        await visitor.next("text-delta")
        start = now()
    assert now() - start <= 5
    assert visitor.code == 1012
    reply = rows.last(visitor).reply
    assert reply is not None
    assert reply.status == "interrupted"
    await asyncio.sleep(60)


@virtual
async def test_a_visitor_who_reads_nothing_does_not_keep_the_process_for_ever() -> None:
    async with process(echo) as it:
        visitor = await it.visit()
        visitor.reads.clear()
        visitor.say("hi", "a")
        await moment()
        start = now()
    assert now() - start <= 5
    assert visitor.task.done()
    visitor.reads.set()


@virtual
async def test_a_connection_that_the_server_closes_with_1012_ended_for_a_restart() -> None:
    rows = Rows()
    async with bench(echo, settings(rows=rows)) as it:
        visitor = await it.visit()
        await visitor.ask("hi", "a")
        await visitor.lose(1012)
        await moment()
        assert rows.story(visitor) == [(None, None, 0), ("restart", "finished", 1)]


@virtual
async def test_a_row_that_is_being_loaded_when_we_shut_down_is_not_lost() -> None:
    rows = Rows(load_takes=3)
    async with bench(echo, settings(rows=rows)) as gone:
        first = await gone.visit()
        await first.ask("hello", "a")
        await first.lose()
    async with process(echo, settings(rows=rows)) as old:
        old.tokens[id(first)] = gone.tokens[id(first)]
        second = await old.visit(first)
        await moment()
    assert second.code == 1012
    async with bench(echo, settings(rows=rows)) as it:
        it.tokens[id(second)] = old.tokens[id(second)]
        third = await it.visit(second)
        await third.until(lambda: bool(third.of("finish")), 60)
        assert third.replies[0].text == "hello "


@virtual
async def test_an_app_can_be_started_again_after_its_shutdown() -> None:
    it = Bench(echo, settings())
    for _ in range(2):
        async with it.app.lifespan():
            visitor = await it.visit()
            assert (await visitor.ask("hi")).text == "hi "
        assert visitor.code == 1012
    await it.client.aclose()


# ---- Rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "callback", "partial", "object", "store", "name"])
@virtual
async def test_rows_of_each_kind_keep_a_dropped_reply(kind: str) -> None:
    rows, store = Rows(), MemoryStore()

    async def save(_: int, row: SessionRow) -> None:
        rows.kept[row.id] = row

    options: dict[str, Any] = {
        "none": None,
        "callback": rows.save,
        "partial": functools.partial(save, 1),
        "object": rows,
        "store": store,
        "name": "chats",
    }
    async with bench(echo, settings(rows=options[kind]), stores={"chats": store}) as it:
        visitor = await it.visit()
        told = await visitor.ask("hello", "a")
        await visitor.lose()
        await moment()
        session = session_of(visitor)
        if kind in {"callback", "partial", "object"}:
            assert rows.kept[session].reply == Reply(told.id, "a", "hello ", [], "finished")
        if kind in {"store", "name"}:
            [data] = [(await store.get(key)) or b"" for key in store._store if session in key]
            assert all(each.encode() in data for each in (told.id, "dropped", "finished", "hello "))
        second = await it.visit(visitor)
        await second.next("finish")
        assert second.replies[0].text == "hello "


@pytest.mark.parametrize("kind", ["object", "store", "name"])
@virtual
async def test_rows_that_can_be_loaded_are_shared_by_several_workers(kind: str) -> None:
    keeper: Any = Rows() if kind == "object" else MemoryStore()
    config = settings(rows="chats" if kind == "name" else keeper)
    stores: dict[str, Any] = {"chats": keeper} if kind == "name" else {}
    async with bench(echo, config, stores=dict(stores)) as one, bench(echo, config, stores=dict(stores)) as two:
        first = await one.visit()
        first.say("hello there", "a")
        await first.next("text-delta")
        await first.lose()
        await asyncio.sleep(1)
        two.tokens.update(one.tokens)
        second = await two.visit(first)
        await second.next("finish")
        assert second.replies[0].text == "hello there "
        assert second.replies[0].id == first.replies[0].id


@virtual
async def test_without_rows_a_stored_reply_stays_in_its_process_and_is_bounded() -> None:
    async with bench(echo, settings(max_sessions=5)) as it:
        visitors = []
        for _ in range(20):
            visitors.append(await it.visit())
            await visitors[-1].ask("hello", "a")
            await visitors[-1].lose()
        assert len(it.desk.past) <= 5
        last = await it.visit(visitors[-1])
        await last.next("finish")
        first = await it.visit(visitors[0])
        await moment()
        assert kinds(first) == ["session-start"]


@virtual
async def test_a_row_is_saved_at_its_start_at_its_end_and_as_its_reply_appears_ends_and_goes_never_per_word() -> None:
    rows = Rows()
    async with bench(Counting(), settings(rows=rows)) as it:
        first = await it.visit()
        first.say("a 200 0.01", "a")
        await first.next("text-delta")
        await asyncio.sleep(1)
        assert rows.story(first) == [(None, None, 0)]
        await first.lose()
        second = await it.visit(first)
        await second.next("finish")
        second.send("pong")
        await moment()
        assert rows.story(first) == [
            (None, None, 0),
            ("dropped", "streaming", 0),
            ("dropped", "finished", 1),
            ("dropped", None, 1),
        ]
        assert rows.story(second) == [(None, None, 0)]
        second.send("end")
        await second.ended()
        await moment()
        assert rows.story(second) == [(None, None, 0), ("visitor", None, 0)]


@virtual
async def test_a_row_says_who_when_and_how_often_and_nothing_more() -> None:
    rows = Rows()
    async with bench(echo, settings(rows=rows, visitor=lambda _: "ada")) as it:
        visitor = await it.visit()
        await visitor.ask("one", "a")
        visitor.say("two three four", "b")
        await visitor.next("text-delta")
        await visitor.next("text-delta")
        visitor.send("stop")
        await visitor.next("abort")
        visitor.send("end")
        await visitor.ended()
        await moment()
        row = rows.last(visitor)
        assert row.started_at.tzinfo == UTC
        assert row.ended_at is not None
        assert row.ended_at >= row.started_at
        assert (row.id, row.visitor, row.turns, row.reply) == (session_of(visitor), "ada", 2, None)


@virtual
async def test_saves_stay_in_order_though_a_slow_one_comes_first() -> None:
    rows = Rows()
    delays = iter([5.0, 3.0, 1.0, 0.0])

    async def save(row: SessionRow) -> None:
        await asyncio.sleep(next(delays, 0.0))
        await rows.save(row)

    async with bench(echo, settings(rows=save)) as it:
        first = await it.visit()
        first.say("one two three", "a")
        await first.next("text-delta")
        await first.lose()
        second = await it.visit(first)
        await second.next("finish")
        second.send("pong")
        await asyncio.sleep(20)
        assert [status for _, status, _ in rows.story(first)] == [None, "streaming", "finished", None]


@virtual
async def test_one_sessions_slow_save_does_not_hold_up_another_ones() -> None:
    saved: list[str] = []

    async def save(row: SessionRow) -> None:
        if not saved:
            saved.append("slow")
            await asyncio.sleep(5)
        saved.append(row.id)

    async with bench(echo, settings(rows=save)) as it:
        await it.visit()
        second = await it.visit()
        await moment()
        assert saved == ["slow", session_of(second)]


@virtual
async def test_a_loaded_row_whose_reply_has_waited_longer_than_reply_ttl_is_not_carried() -> None:
    rows = Rows()
    async with bench(echo, settings(rows=rows)) as it:
        first = await it.visit()
        first.say("hello there")
        await first.next("text-delta")
        await first.lose()
        await asyncio.sleep(1)
    config = settings(rows=rows)
    lifetime = timedelta(seconds=config.reply_ttl + config.answer_timeout)
    fresh, stale = lifetime - timedelta(seconds=5), lifetime + timedelta(seconds=5)
    for age, zone, is_carried in ((fresh, UTC, True), (fresh, None, True), (stale, UTC, False), (stale, None, False)):
        row = rows.kept[session_of(first)]
        ended_at = (datetime.now(UTC) - age).replace(tzinfo=zone)
        rows.kept[row.id] = msgspec.structs.replace(row, ended_at=ended_at)
        async with bench(echo, config) as restarted:
            visitor = restarted.dial(await restarted.token(it.tokens[id(first)]))
            await visitor.next("session-start")
            await asyncio.sleep(10)
            assert bool(visitor.of("start")) is is_carried


class Broken:
    """A keeper of rows whose every call is trouble."""

    def __init__(self, trouble: str) -> None:
        self.trouble = trouble
        self.calls = 0

    async def save(self, _: SessionRow) -> None:
        await self.fail()

    async def load(self, _: str) -> SessionRow | None:
        await self.fail()
        return None

    async def fail(self) -> None:
        self.calls += 1
        if self.trouble == "hangs":
            await asyncio.Event().wait()
        elif self.trouble == "is late":
            await asyncio.sleep(20)
        elif self.trouble == "cancels itself":
            task = asyncio.create_task(asyncio.sleep(1))
            task.cancel()
            await task
        else:
            raise {"raises": ValueError, "exits": SystemExit, "is cancelled": asyncio.CancelledError}[self.trouble]


TROUBLES = ("raises", "exits", "is cancelled", "cancels itself", "hangs", "is late")


@pytest.mark.parametrize("trouble", TROUBLES)
@virtual
async def test_rows_that_fail_hang_or_are_late_never_break_or_delay_a_chat(trouble: str, log: Log) -> None:
    keeper = Broken(trouble)
    async with bench(echo, settings(rows=keeper)) as it:
        start = now()
        first = await it.visit()
        assert now() == start
        told = await first.ask("one two", "a")
        assert told.text == "one two "
        assert now() == pytest.approx(start + 0.2)
        await first.lose()
        second = await it.visit(first)
        await second.next("finish")
        assert now() == pytest.approx(start + 0.2)
        assert (await second.ask("three", "b")).text == "three "
        second.send("end")
        assert await second.ended() == 1000
        await asyncio.sleep(200)
        assert keeper.calls >= 4
        if trouble != "is late":
            assert all("session" in error for error in log.errors)
            assert session_of(first) in "".join(log.errors)


@virtual
async def test_a_save_that_cannot_even_be_called_is_logged_and_breaks_nothing(log: Log) -> None:
    async def save() -> None:
        pass

    async with bench(echo, settings(rows=save)) as it:
        visitor = await it.visit()
        assert (await visitor.ask("hi")).text == "hi "
        await visitor.lose()
        await moment()
        assert session_of(visitor) in log.errors[0]
        assert it.desk.rows._queues == {}


@virtual
async def test_a_save_that_failed_once_is_called_again_for_the_next_row(log: Log) -> None:
    rows = Rows()

    async def save(row: SessionRow) -> None:
        if row.ended_at is None:
            raise ValueError(row.id)
        await rows.save(row)

    async with bench(echo, settings(rows=save)) as it:
        visitor = await it.visit()
        await visitor.ask("hi")
        await visitor.lose()
        await moment()
        assert rows.last(visitor).end_reason == "dropped"
        [error] = log.errors
        assert "ValueError" in error
        assert session_of(visitor) in error


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"", b"\xff\x00", b"null", b"7", b"[]", b"{}", b'{"id": 7}', b"[" * 5_000),
        b'{"id":"x","started_at":"2026-01-01T00:00:00Z","reply":{"id":"r","in_reply_to":"a","text":"t","sources":[],"status":"new"}}',
        b'{"id":"x","started_at":"2026-01-01T00:00:00Z","reply":7}',
        b'{"id":"x","started_at":"yesterday"}',
    ],
)
@virtual
async def test_garbage_in_a_store_is_a_missing_row_and_one_line_in_the_log(garbage: bytes, log: Log) -> None:
    store = MemoryStore()
    async with bench(echo, settings(rows=store)) as gone:
        first = await gone.visit()
        await first.lose()
    [key] = [key for key in store._store if session_of(first) in key]
    await store.set(key, garbage)
    async with bench(echo, settings(rows=store)) as it:
        it.tokens[id(first)] = gone.tokens[id(first)]
        second = await it.visit(first)
        assert (await second.ask("hello", "a")).text == "hello "
        assert [told.in_reply_to for told in second.replies] == ["a"]
        assert len([line for line in log.ours if session_of(first) in line and "ended" not in line]) == 1


@virtual
async def test_a_row_that_has_vanished_is_a_fresh_start_and_no_error() -> None:
    store = MemoryStore()
    async with bench(echo, settings(rows=store)) as gone:
        first = await gone.visit()
        await first.ask("hello", "a")
        await first.lose()
    await store.delete_all()
    async with bench(echo, settings(rows=store)) as it:
        it.tokens[id(first)] = gone.tokens[id(first)]
        second = await it.visit(first)
        assert (await second.ask("hello", "a")).text == "hello "


# ---- Answerers that misbehave ----------------------------------------------------------------------------------------


def naughty(bad: Callable[[], Any]) -> Any:
    """An answerer that answers the message `bad` badly, and every other one with `fine`."""

    async def fine() -> AsyncIterator[str]:
        yield "fine"

    async def answerer(chat: Chat) -> Any:
        return bad() if chat.message == "bad" else fine()

    return answerer


async def is_usable(visitor: Visitor, within: float = 6.0) -> None:
    start = now()
    async with asyncio.timeout(100):
        assert (await visitor.ask("good", f"g{len(visitor.frames)}")).text == "fine"
    assert now() - start <= within


@virtual
async def test_an_answerer_that_never_yields_fails_after_chunk_timeout(log: Log) -> None:
    async def bad() -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield "never"

    async with bench(naughty(bad)) as it:
        visitor = await it.visit()
        told = await visitor.ask("bad")
        assert told.end is not None
        assert told.end["type"] == "error"
        await is_usable(visitor)
        [error] = log.errors
        assert "answerer" in error
        assert told.id in error


@virtual
async def test_an_answerer_that_ends_without_a_word_has_finished() -> None:
    async def bad() -> AsyncIterator[str]:
        for word in "":
            yield word

    async with bench(naughty(bad)) as it:
        visitor = await it.visit()
        told = await visitor.ask("bad")
        assert (told.text, told.end) == ("", {"type": "finish"})
        assert "text-start" not in kinds(visitor)
        await is_usable(visitor)


@pytest.mark.parametrize("yields", [False, True])
@virtual
async def test_an_answerer_that_ignores_its_cancellation_is_left_to_itself(log: Log, *, yields: bool) -> None:
    ended: list[float] = []

    async def bad() -> AsyncIterator[str]:
        yield "word "
        for _ in range(20):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3)
            if yields:
                yield "more "
        ended.append(now())

    async with bench(naughty(bad)) as it:
        visitor = await it.visit()
        visitor.say("bad", "a")
        await visitor.next("text-delta")
        visitor.send("stop", id="a")
        await visitor.next("abort")
        await is_usable(visitor)
        await asyncio.sleep(70)
        assert visitor.replies[0].text == "word "
        assert bool(ended) != yields
        assert [("naughty.<locals>.answerer" in error) for error in log.errors] == ([] if yields else [True])
        await is_usable(visitor)


ERRORS: list[Callable[[], BaseException]] = [
    ValueError,
    SystemExit,
    KeyboardInterrupt,
    asyncio.CancelledError,
    GeneratorExit,
    StopAsyncIteration,
    StopIteration,
    TimeoutError,
    RecursionError,
    OSError,
    lambda: BaseExceptionGroup("many", [ValueError(), KeyboardInterrupt()]),
]


@pytest.mark.parametrize("place", ["at the call", "before the first word", "between words", "in finally"])
@pytest.mark.parametrize("error", ERRORS)
@virtual
async def test_an_answerer_may_raise_anything_anywhere(
    error: Callable[[], BaseException], place: str, log: Log
) -> None:
    async def bad() -> AsyncIterator[str]:
        if place == "before the first word":
            raise error()
        try:
            yield "word "
            await asyncio.sleep(0.1)
            if place == "between words":
                raise error()
        finally:
            if place == "in finally":
                raise error()
        yield "more"

    def call() -> Any:
        if place == "at the call":
            raise error()
        return bad()

    async with bench(naughty(call)) as it:
        visitor, other = await it.visit(), await it.visit()
        told = await visitor.ask("bad")
        assert told.end is not None
        assert told.end["type"] == "error"
        assert told.text == ("" if place in {"at the call", "before the first word"} else "word ")
        await is_usable(visitor)
        await is_usable(other)
        [line] = log.errors
        assert "naughty.<locals>.answerer" in line
        assert told.id in line


@virtual
async def test_an_answerer_that_raises_after_the_visitor_left_is_stored_as_failed(log: Log) -> None:
    script, rows = Script(), Rows()
    async with bench(script, settings(rows=rows)) as it:
        visitor = await it.visit()
        visitor.say("hi", "a")
        script.say("half ")
        await visitor.next("text-delta")
        await visitor.lose()
        script.say(ValueError())
        await moment()
        assert rows.story(visitor)[-1] == ("dropped", "failed", 0)
        assert "Script" in log.errors[0]


@pytest.mark.parametrize("how", ["stop", "too long", "drop"])
@pytest.mark.usefixtures("log")
@virtual
async def test_an_answerer_that_yields_in_finally_changes_nothing_more(how: str) -> None:
    async def bad() -> AsyncIterator[str]:
        try:
            yield "word "
            await asyncio.sleep(1)
            yield "x" * 100
        finally:
            yield "and one more thing"

    async with bench(naughty(bad), settings(max_reply_chars=20)) as it:
        visitor = await it.visit()
        visitor.say("bad", "a")
        await visitor.next("text-delta")
        if how == "stop":
            visitor.send("stop")
        elif how == "drop":
            await visitor.lose()
            visitor = await it.visit(visitor)
            visitor.send("stop")
        await visitor.next("finish", "abort")
        await is_usable(visitor)
        assert visitor.replies[0].text == ("word " + "x" * 15 if how == "too long" else "word ")


class Stream:
    """An answerer's pieces as a model client's stream: closing it is trouble."""

    def __init__(self, pieces: list[Any], trouble: str) -> None:
        self.pieces = iter(pieces)
        self.trouble = trouble

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0.01)
        try:
            return next(self.pieces)
        except StopIteration:
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        if self.trouble == "blocks":
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(50)
            await asyncio.sleep(50)
        raise ValueError


@pytest.mark.parametrize("trouble", ["blocks", "raises"])
@pytest.mark.parametrize("how", ["to its end", "too long", "stop", "wrong type", "timeout"])
@virtual
async def test_an_answerer_whose_aclose_blocks_or_raises_does_not_hold_up_the_session(
    how: str, trouble: str, log: Log
) -> None:
    pieces: dict[str, list[Any]] = {
        "wrong type": ["word ", 7],
        "too long": ["word ", "x" * 100],
        "stop": ["word "] * 10_000,
    }
    config = settings(
        max_reply_chars=20 if how == "too long" else 100_000, answer_timeout=2 if how == "timeout" else 300
    )
    pieces["timeout"] = pieces["stop"]
    async with bench(naughty(lambda: Stream(pieces.get(how, ["word "]), trouble)), config) as it:
        visitor = await it.visit()
        visitor.say("bad", "a")
        await visitor.next("text-delta")
        start = now()
        if how == "stop":
            visitor.send("stop")
        end = await visitor.next("finish", "abort", "error")
        assert end["type"] == {"stop": "abort", "wrong type": "error", "timeout": "error"}.get(how, "finish")
        assert now() - start < 3
        await is_usable(visitor)
        await asyncio.sleep(110)
        assert all("naughty.<locals>.answerer" in error for error in log.errors)
        assert ("yielded int" in "".join(log.errors)) == (how == "wrong type")


@pytest.mark.usefixtures("log")
@virtual
async def test_a_generator_whose_finally_blocks_does_not_hold_up_the_session() -> None:
    async def bad() -> AsyncIterator[str]:
        try:
            yield "x" * 100
        finally:
            await asyncio.Event().wait()

    async with bench(naughty(bad), settings(max_reply_chars=20)) as it:
        visitor = await it.visit()
        told = await visitor.ask("bad")
        assert told.end == {"type": "finish"}
        await is_usable(visitor)


@pytest.mark.parametrize("piece", [None, b"bytes", 7, 1.5, {"a": 1}, ["a"], object(), Source(7), Source("u", None)])  # type: ignore[arg-type]
@virtual
async def test_a_piece_of_the_wrong_type_fails_the_reply_and_is_logged(piece: Any, log: Log) -> None:
    async def bad() -> AsyncIterator[Any]:
        yield "word "
        yield piece
        yield "never"

    async with bench(naughty(bad)) as it:
        visitor = await it.visit()
        told = await visitor.ask("bad")
        assert told.end is not None
        assert (told.text, told.end["type"]) == ("word ", "error")
        await is_usable(visitor)
        [line] = log.errors
        assert "naughty.<locals>.answerer" in line
        assert type(piece).__name__ in line


@pytest.mark.parametrize("value", [None, b"bytes", 7, {"a": 1}, ["a"], iter("abc"), object()])
@virtual
async def test_a_result_of_the_wrong_type_fails_the_reply_and_is_logged(value: Any, log: Log) -> None:
    async with bench(naughty(lambda: value)) as it:
        visitor = await it.visit()
        told = await visitor.ask("bad")
        assert told.end is not None
        assert (told.text, told.end["type"]) == ("", "error")
        await is_usable(visitor)
        [line] = log.errors
        assert "naughty.<locals>.answerer" in line
        assert type(value).__name__ in line


@virtual
async def test_a_reply_of_one_string_is_a_reply() -> None:
    async with bench(naughty(lambda: "x" * 50_000), settings(max_reply_chars=60_000)) as it:
        visitor = await it.visit()
        assert (await visitor.ask("bad")).text == "x" * 50_000
        assert (await visitor.ask("bad")).end == {"type": "finish"}
        await is_usable(visitor)


@virtual
async def test_a_megabyte_in_one_piece_arrives_whole() -> None:
    piece = "0123456789abcdef" * 65_536

    async def bad() -> AsyncIterator[str]:
        yield piece

    async with bench(naughty(bad), settings(max_reply_chars=2_000_000)) as it:
        visitor = await it.visit()
        assert (await visitor.ask("bad")).text == piece
        await is_usable(visitor)


@virtual
async def test_a_hundred_thousand_crumbs_arrive_whole_and_travel_together() -> None:
    async def bad() -> AsyncIterator[str]:
        for number in range(100_000):
            yield "0123456789"[number % 10]

    async with bench(naughty(bad), settings(max_reply_chars=100_000)) as it:
        visitor, other = await it.visit(), await it.visit()
        visitor.say("bad")
        await visitor.next("text-delta")
        await is_usable(other)
        assert not visitor.of("finish")
        await visitor.next("finish")
        assert visitor.replies[0].text == "0123456789" * 10_000
        assert len(visitor.frames) < 20
        await is_usable(visitor)


@pytest.mark.parametrize("how", ["task", "future", "timeout", "itself"])
@pytest.mark.usefixtures("log")
@virtual
async def test_an_answerer_that_awaits_what_is_cancelled_ends_its_reply_and_no_more(how: str) -> None:
    async def bad() -> AsyncIterator[str]:
        yield "word "
        if how == "task":
            task = asyncio.create_task(asyncio.sleep(1))
            task.cancel()
            await task
        elif how == "future":
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            future.cancel()
            await future
        elif how == "timeout":
            async with asyncio.timeout(1):
                await asyncio.Event().wait()
        else:
            cast("asyncio.Task[Any]", asyncio.current_task()).cancel()
            await asyncio.sleep(1)
        yield "never"

    async with bench(naughty(bad)) as it:
        visitor = await it.visit()
        told = await visitor.ask("bad")
        assert told.end is not None
        assert told.end["type"] == ("abort" if how == "itself" else "error")
        assert told.text == "word "
        await is_usable(visitor)


@virtual
async def test_an_answerer_that_leaves_tasks_of_its_own_is_no_trouble() -> None:
    tasks: set[asyncio.Task[None]] = set()

    async def bad() -> AsyncIterator[str]:
        tasks.add(asyncio.create_task(asyncio.sleep(30)))
        yield "word"

    async with bench(naughty(bad)) as it:
        visitor = await it.visit()
        assert (await visitor.ask("bad")).text == "word"
        await is_usable(visitor)
        await asyncio.sleep(31)


# ---- Visitors who misbehave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame", ['{"type": "pong"}', '{"type": "stop"}', '{"type": "stay"}', '{"type":"message","id":"a","text":""}']
)
@virtual
async def test_a_flood_of_frames_does_not_hold_up_others_words(frame: str) -> None:
    async def answer(_chat: Chat) -> AsyncIterator[str]:
        for _ in range(50):
            yield "word "
            await asyncio.sleep(0)

    async with bench(answer) as it:
        flood, calm = await it.visit(), await it.visit()
        for _ in range(2_000):
            flood.put(frame)
        calm.say("hi")
        await calm.next("finish")
        assert flood._inbox.qsize() > 500
        assert calm.replies[0].text == "word " * 50
        await moment()


@virtual
async def test_a_flood_of_messages_is_rejected_and_the_first_ones_are_answered() -> None:
    answer = Counting()
    async with bench(answer, settings(messages_per_minute=20)) as it:
        flood, calm = await it.visit(), await it.visit()
        for number in range(1_000):
            flood.say(f"a{number} 1 0.1", f"a{number}")
        assert (await calm.ask("b 3 0.1", "b")).text == Counting.whole("b 3 0.1")
        await asyncio.sleep(3)
        assert len(flood.of("message-rejected")) == 1_000 - len(flood.replies)
        assert 5 <= len(flood.replies) <= 20
        assert {each["code"] for each in flood.of("message-rejected")} <= {"too-many", "rate-limited"}


@virtual
async def test_a_flood_whose_sender_reads_nothing_is_bounded() -> None:
    async with bench(echo) as it:
        flood = await it.visit()
        flood.reads.clear()
        for number in range(5_000):
            flood.say("", f"a{number}")
        await asyncio.sleep(12)
        assert not it.desk.sessions
        assert flood.task.done()
        flood.reads.set()


@virtual
async def test_visitors_who_read_nothing_do_not_hold_up_others_words() -> None:
    async with bench(Counting()) as it:
        stuck = [await it.visit() for _ in range(20)]
        for visitor in stuck:
            visitor.reads.clear()
            visitor.say("a 50 0.02")
        calm = await it.visit()
        start = now()
        calm.say("b 10 0.1")
        await calm.next("finish")
        assert now() - start == pytest.approx(1)
        deltas = [
            when - start for frame, when in zip(calm.frames, calm.times, strict=True) if frame["type"] == "text-delta"
        ]
        assert deltas == pytest.approx([(number + 1) * 0.1 for number in range(10)], abs=0.017)
        for visitor in stuck:
            visitor.reads.set()


@virtual
async def test_a_binary_frame_is_1003_and_the_session_can_be_carried_on() -> None:
    rows = Rows()
    async with bench(echo, settings(rows=rows)) as it:
        visitor = await it.visit()
        await visitor.ask("hi", "a")
        visitor.put(data=b'{"type": "end"}')
        assert await visitor.ended() == 1003
        assert visitor.reason is not None
        assert visitor.reason.isascii()
        assert not visitor.of("session-end")
        second = await it.visit(visitor)
        await second.next("finish")


@pytest.mark.parametrize("error", [OSError, RuntimeError, BrokenPipeError, lambda: WebSocketDisconnect(detail="")])
@pytest.mark.parametrize("side", ["send", "receive"])
@virtual
async def test_a_server_that_says_by_an_exception_that_the_visitor_left(
    side: str, error: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone() -> None:
        raise error()

    async def gone_too() -> None:
        gone()

    rows = Rows()
    async with bench(Counting(), settings(rows=rows)) as it:
        visitor = await it.visit()
        visitor.say("a 20 0.1", "a")
        await visitor.next("text-delta")
        if side == "send":
            monkeypatch.setattr(visitor.reads, "wait", gone_too)
            await asyncio.sleep(1)
            await visitor.lose()
        else:
            monkeypatch.setattr(visitor._inbox, "_get", gone)
            visitor.send("pong")
            await visitor.ended()
        await asyncio.sleep(3)
        reply = rows.last(visitor).reply
        assert reply is not None
        assert (reply.text, reply.status) == (Counting.whole("a 20 0.1"), "finished")


@virtual
async def test_bursts_of_opening_and_closing_leave_nothing_behind() -> None:
    async with bench(echo) as it:
        tasks = len(asyncio.all_tasks())
        for step in range(40):
            visitor = it.dial(await it.token())
            await turns(step % 20)
            await visitor.lose()
        await asyncio.sleep(1)
        assert not it.desk.sessions
        assert len(asyncio.all_tasks()) == tasks


@virtual
async def test_a_visitor_who_leaves_during_a_slow_greeting_leaves_nothing_behind() -> None:
    async def greet(_: object) -> str:
        await asyncio.sleep(2)
        return "hello"

    async with bench(echo, settings(greeting=greet)) as it:
        visitor = it.dial(await it.token())
        await asyncio.sleep(1)
        await visitor.lose()
        await asyncio.sleep(3)
        assert not it.desk.sessions


# ---- Privacy ---------------------------------------------------------------------------------------------------------

_ATOMS = (int, float, complex, bool, type(None), type, types.CodeType, types.BuiltinFunctionType)


class Canary:
    """A word that nobody else knows, kept in disguise, and searched in all that the garbage collector can reach."""

    def __init__(self) -> None:
        self._masked = [each ^ 0x55 for each in secrets.token_hex(16).encode()]

    @property
    def word(self) -> str:
        return "".join(chr(each ^ 0x55) for each in self._masked)

    @property
    def held(self) -> int:
        """How many texts hold the word; to ask who they are takes much longer."""
        return len(self._hits())

    @property
    def holders(self) -> list[str]:
        """Who holds the word: a short description of each object."""
        hits = self._hits()
        return [self._describe(hit, hits) for hit in hits]

    def _hits(self) -> list[str | bytes]:
        gc.collect()
        word = self.word
        data = word.encode()
        return [
            text
            for text in self._texts()
            if text is not word and text is not data and ((word in text) if isinstance(text, str) else (data in text))
        ]

    @staticmethod
    def _texts() -> list[str | bytes]:
        """Every text that any object holds: tracked, untracked, and in the frames of what is suspended."""
        found: dict[int, str | bytes] = {}
        # Python 3.12 shows dead objects that it keeps for later in this module, and to touch one makes it hang.
        todo: list[Any] = [each for each in gc.get_objects() if each is not sys.modules["_asyncio"]]
        seen = set(map(id, todo))
        for each in list(todo):
            for frame, running in (("cr_frame", "cr_running"), ("gi_frame", "gi_running"), ("ag_frame", "ag_running")):
                if type(each) in {types.CoroutineType, types.GeneratorType, types.AsyncGeneratorType} and not getattr(
                    each, running, True
                ):
                    todo.append(list(getattr(getattr(each, frame), "f_locals", {}).values()))
        while todo:
            more: list[Any] = []
            for each in gc.get_referents(*todo):
                if isinstance(each, (str, bytes, bytearray)):
                    found[id(each)] = cast("str", each)
                elif type(each) not in _ATOMS and id(each) not in seen and not gc.is_tracked(each):
                    seen.add(id(each))
                    more.append(each)
            todo = more
        return list(found.values())

    @staticmethod
    def _describe(hit: str | bytes, hits: list[str | bytes]) -> str:
        holders = [each for each in gc.get_referrers(hit) if each is not hits]
        return f"{type(hit).__name__} of {len(hit)} in {[repr(type(each)) for each in holders]}"


@virtual
async def test_the_search_for_a_canary_finds_one_wherever_it_hides() -> None:
    canary = Canary()
    assert canary.holders == []

    async def holds(text: str) -> None:
        await asyncio.sleep(1)
        assert text

    async def yields(text: str) -> AsyncIterator[str]:
        yield "x"
        assert text

    def later() -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(1, print, canary.word)

    hides: list[Callable[[], Any]] = [
        lambda: {"a": [({"b": canary.word},)]},
        lambda: {"a": canary.word},
        lambda: bytes(f"much more than {canary.word} alone", "utf-8"),
        lambda: chat_session._MessageFrame("a", canary.word),
        lambda: ValueError(canary.word),
        lambda: functools.partial(print, canary.word),
        lambda: asyncio.create_task(holds(canary.word)),
        lambda: collections.deque([canary.word]),
        later,
    ]
    for hide in hides:
        hidden = [hide()]
        await turns(2)
        assert canary.held, type(hidden[0])
        if isinstance(hidden[0], asyncio.Task):
            await hidden[0]
        elif isinstance(hidden[0], asyncio.Handle):
            hidden[0].cancel()
        del hidden
        await turns(2)
        assert canary.holders == []
    generator = cast("Any", yields(canary.word))
    assert await anext(generator) == "x"
    assert canary.held
    await generator.aclose()
    assert canary.holders == []


async def discreet(chat: Chat) -> AsyncIterator[str]:
    """Answer without quoting: "slow" takes ten seconds, "fail" fails."""
    yield "well, "
    await asyncio.sleep(10 if chat.message.startswith("slow") else 0.1)
    if chat.message.startswith("fail"):
        raise ValueError(chat.message)
    yield "that is that"


def silent(log: Log, visitors: list[Visitor], canary: Canary, rows: Rows | None = None) -> None:
    """No row, log line or close reason carries the canary, even put together."""
    told = [record.getMessage() for record in log.records] + [str(visitor.reason) for visitor in visitors]
    told += [msgspec.json.encode(row).decode() for row in (rows.saved if rows else [])]
    assert not [line for line in told if canary.word in line]


@virtual
async def test_what_a_visitor_typed_is_held_until_scratchpad_ttl_and_then_by_no_object(log: Log) -> None:
    canary = Canary()
    async with bench(discreet, settings(idle_timeout=1000), logging_config=None) as it:
        visitor = await it.visit()
        visitor.say(f"it is {canary.word}", "a")
        await visitor.next("finish")
        await asyncio.sleep(179)
        assert canary.held
        await asyncio.sleep(1.2)
        assert canary.holders == []
        visitor.say("still there?", "b")
        await visitor.next("finish")
        assert canary.holders == []
        silent(log, it.visitors, canary)


@virtual
async def test_turns_that_fall_off_the_scratchpad_are_held_by_no_object() -> None:
    canary = Canary()
    async with bench(discreet, settings(scratchpad_turns=2)) as it:
        visitor = await it.visit()
        visitor.say(f"it is {canary.word}", "a")
        await visitor.next("finish")
        for name in "bc":
            visitor.say("something else", name)
            await visitor.next("finish")
        await moment()
        assert canary.holders == []


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize(
    "end", ["idle", "visitor", "dropped", "unread", "silent", "replaced", "invalid", "binary", "too big"]
)
@virtual
async def test_after_every_end_no_object_holds_what_was_typed(end: str, log: Log, *, running: bool) -> None:
    canary, rows = Canary(), Rows()
    config = settings(rows=rows, idle_timeout=60, idle_warning=1, scratchpad_ttl=10_000)
    async with bench(discreet, config, logging_config=None) as it:
        visitor = await it.visit()
        visitor.say(f"it is {canary.word}", "a")
        await visitor.next("finish")
        if running:
            visitor.say(f"slow {canary.word}", "b")
            visitor.say(f"waits {canary.word}", "c")
            await visitor.next("text-delta")
        assert canary.held
        if end == "idle":
            await visitor.ended()
        elif end == "visitor":
            visitor.send("end")
            await visitor.ended()
        elif end == "dropped":
            await visitor.lose()
        elif end == "unread":
            visitor.reads.clear()
            visitor.say(f"more {canary.word}", "d")
            await asyncio.sleep(60)
            visitor.reads.set()
        elif end == "silent":
            visitor.answers_pings = False
            await visitor.ended()
        elif end == "replaced":
            await it.visit(visitor)
        elif end == "invalid":
            for _ in range(3):
                visitor.put('{"type": "message", "id": "x", "txt": "' + canary.word)
        elif end == "binary":
            visitor.put(data=canary.word.encode())
        else:
            visitor.put(canary.word * 5_000)
        await moment()
        if running:
            await asyncio.sleep(16)
        assert canary.holders == []
        silent(log, it.visitors, canary, rows)
        assert canary.word not in "".join(it.tokens.values())


@virtual
async def test_after_a_restart_no_object_holds_what_was_typed(log: Log) -> None:
    canary, rows = Canary(), Rows()
    async with process(discreet, settings(rows=rows, shutdown_grace=5), logging_config=None) as it:
        done, cut = await it.visit(), await it.visit()
        done.say(f"it is {canary.word}", "a")
        await done.next("finish")
        cut.say(f"slow {canary.word}", "a")
        cut.say(f"waits {canary.word}", "b")
        await cut.next("text-delta")
    await moment()
    assert canary.holders == []
    silent(log, it.visitors, canary, rows)


@pytest.mark.parametrize("how", ["fails", "times out", "wrong type", "stopped", "aclose"])
@virtual
async def test_after_a_reply_went_wrong_no_object_holds_what_was_typed(how: str, log: Log) -> None:
    async def answer(chat: Chat) -> AsyncIterator[Any]:
        yield "well, "
        text = chat.message
        try:
            if how == "wrong type":
                yield {"it": text}
            if how == "fails":
                raise ValueError(text)
            await asyncio.sleep(1000)
        finally:
            if how == "aclose":
                raise ValueError(text)

    canary = Canary()
    async with bench(answer, settings(chunk_timeout=10), logging_config=None) as it:
        visitor = await it.visit()
        visitor.say(f"it is {canary.word}", "a")
        await visitor.next("text-delta")
        if how in {"stopped", "aclose"}:
            visitor.send("stop")
        await visitor.next("error", "abort")
        if how in {"stopped", "aclose"}:
            visitor.send("end")
        await asyncio.sleep(6)
        assert canary.holders == []
        silent(log, it.visitors, canary)


@virtual
async def test_a_message_that_is_taken_back_is_held_by_no_object() -> None:
    canary = Canary()
    async with bench(discreet) as it:
        visitor = await it.visit()
        visitor.say("slow", "a")
        visitor.say(f"it is {canary.word}", "b")
        await visitor.next("text-delta")
        assert canary.held
        visitor.send("stop", id="b")
        await visitor.next("message-rejected")
        await moment()
        assert canary.holders == []
        await visitor.next("finish")


@pytest.mark.parametrize(
    "code",
    ["invalid", "invalid id", "unknown type", "surrogate", "empty", "too-long", "too-many", "rate-limited", "taken"],
)
@virtual
async def test_a_message_that_is_rejected_is_held_by_no_object(code: str, log: Log) -> None:
    canary = Canary()
    options = {"max_message_chars": 100, "messages_per_minute": 2 if code == "rate-limited" else 100, "max_pending": 1}
    async with bench(discreet, settings(**options), logging_config=None) as it:
        visitor = await it.visit()
        if code == "invalid":
            visitor.put(f'{{"type": "message", "id": "a", "text": ["{canary.word}"]}}')
            visitor.put(f'{{"type": "message", "text": "{canary.word}')
        elif code == "invalid id":
            visitor.put(json.dumps({"type": "message", "id": f"{canary.word} !", "text": canary.word}))
        elif code == "unknown type":
            visitor.put(json.dumps({"type": canary.word, "id": "a", canary.word: canary.word}))
        elif code == "surrogate":
            visitor.put(f'{{"type": "message", "id": "a", "text": "{canary.word}\\ud800"}}')
        elif code == "empty":
            visitor.put(json.dumps({"type": "message", "id": "a", "text": " ", "more": canary.word}))
        elif code == "too-long":
            visitor.say(canary.word * 5, "a")
        elif code == "too-many":
            visitor.say("slow", "x")
            visitor.say("slow", "y")
            visitor.say(canary.word, "a")
        elif code == "rate-limited":
            await visitor.ask("one", "x")
            await visitor.ask("two", "y")
            visitor.say(canary.word, "a")
        else:
            visitor.say("one", "a")
            visitor.say(canary.word, "a")
            await visitor.next("finish")
        if code != "taken":
            told = (await visitor.next("message-rejected"))["code"]
            assert told == (code if code in {"empty", "too-long", "too-many", "rate-limited"} else "invalid")
        await moment()
        assert canary.holders == []
        silent(log, it.visitors, canary)
        visitor.send("end")
        await visitor.ended()


@pytest.mark.parametrize("end", ["lose", "ttl"])
@virtual
async def test_a_recognised_message_is_held_by_the_scratchpad_and_nothing_else(end: str) -> None:
    canary = Canary()
    async with bench(discreet, settings(idle_timeout=1000)) as it:
        first = await it.visit()
        first.say(f"slow {canary.word}", "a")
        await first.next("text-delta")
        await first.lose()
        second = await it.visit(first)
        second.say(f"slow {canary.word}", "a")
        await second.next("finish")
        await moment()
        assert canary.held == 1
        await (second.lose() if end == "lose" else asyncio.sleep(181))
        await moment()
        assert canary.holders == []


@virtual
async def test_a_message_that_waits_for_previous_goes_with_its_session() -> None:
    canary, rows = Canary(), Rows(load_takes=4)
    async with bench(discreet, settings(rows=rows)) as it:
        first = await it.visit()
        await first.lose()
        second = await it.visit(first)
        second.say(f"it is {canary.word}", "a")
        await moment()
        assert canary.held
        await second.lose()
        await moment()
        assert canary.holders == []


@virtual
async def test_a_store_that_workers_share_holds_no_word_that_was_typed(log: Log) -> None:
    canary, store = Canary(), MemoryStore()
    config = settings(rows=store)
    async with (
        bench(discreet, config, logging_config=None) as one,
        bench(discreet, config, logging_config=None) as two,
    ):
        first = await one.visit()
        first.say(f"slow {canary.word}", "a")
        first.say(f"waits {canary.word}", "b")
        await first.next("text-delta")
        await first.lose()
        two.tokens.update(one.tokens)
        second = await two.visit(first)
        second.say(f"slow {canary.word}", "a")
        await second.next("finish")
        assert not [key for key in store._store if canary.word.encode() in (await store.get(key) or b"")]
        await second.lose()
        await moment()
        assert canary.holders == []
        silent(log, [*one.visitors, *two.visitors], canary)


@virtual
async def test_what_an_answerer_says_is_the_answerers_even_where_it_quotes_the_visitor() -> None:
    rows = Rows()
    async with bench(echo, settings(rows=rows)) as it:
        visitor = await it.visit()
        await visitor.ask("my name is Ada", "a")
        await visitor.lose()
        await moment()
        reply = rows.last(visitor).reply
        assert reply is not None
        assert reply.text == "my name is Ada "


@virtual
async def test_logs_carry_ids_and_counts(log: Log) -> None:
    async with bench(discreet, logging_config=None) as it:
        visitor = await it.visit()
        visitor.say("hello", "a")
        await visitor.next("finish")
        visitor.send("end")
        await visitor.ended()
        await moment()
        assert any(session_of(visitor) in line and "1" in line for line in log.ours)
        assert not [line for line in log.ours if it.tokens[id(visitor)] in line]


# ---- Long life -------------------------------------------------------------------------------------------------------


@virtual
async def test_three_hundred_chats_leave_tasks_caches_timers_and_objects_where_they_began(log: Log) -> None:
    rows: list[SessionRow] = []

    async def save(row: SessionRow) -> None:
        rows[:] = [row]

    async def cycle(it: Bench, number: int) -> None:
        visitor = await it.visit()
        await visitor.ask("one two", "a")
        if number % 4 == 0:
            visitor.send("end")
            await visitor.ended()
        elif number % 4 == 1:
            await visitor.lose()
        elif number % 4 == 2:
            visitor.say("three four five", "b")
            await visitor.next("text-delta")
            await visitor.lose()
            visitor = await it.visit(visitor)
            visitor.say("three four five", "b")
            await visitor.next("finish")
            await visitor.lose()
        else:
            again = await it.visit(visitor)
            await visitor.ended()
            again.send("end")
            await again.ended()
        it.visitors.clear()
        it.tokens.clear()

    async def settle(it: Bench) -> dict[str, int]:
        await asyncio.sleep(700)
        await cycle(it, 0)
        await asyncio.sleep(700)
        assert not log.errors
        log.records.clear()
        gc.collect()
        loop: Any = asyncio.get_running_loop()
        ours = collections.Counter(
            type(each).__name__ for each in gc.get_objects() if type(each).__module__ in {"chat_session", "cachetools"}
        )
        plugin: Any = it.plugin
        return {
            "tasks": len(asyncio.all_tasks()),
            "timers": len(loop._scheduled),
            "used tokens": len(vars(plugin._used)["_Cache__data"]),
            "scratchpads": kept(it),
            "past": len(it.desk.past),
            "writers": len(it.desk.rows._queues) + len(it.desk.rows._writers),
            "deliveries": len(plugin._office._couriers),
            "handlers": len(plugin._handlers),
            **ours,
        }

    async with bench(echo, settings(rows=save)) as it:
        for number in range(8):
            await cycle(it, number)
        before = await settle(it)
        objects = len(gc.get_objects())
        for number in range(300):
            await cycle(it, number)
        assert await settle(it) == before
        assert len(gc.get_objects()) < objects + 200


# ---- Knowing how it goes ---------------------------------------------------------------------------------------------


@virtual
async def test_stats_count_what_is_open_and_running_and_what_has_been() -> None:
    script = Script()
    async with bench(script, settings()) as it:
        assert it.plugin.stats() == {
            "open_sessions": 0,
            "running_replies": 0,
            "turns": 0,
            "carried_replies": 0,
            "ended": {},
            "rejected": {},
            "failed": {},
        }
        first, second = await it.visit(), await it.visit()
        script.say("one", None)
        await first.ask("hello")
        second.say("hello")
        script.say("two")
        await second.next("text-delta")
        assert it.plugin.stats() == {
            "open_sessions": 2,
            "running_replies": 1,
            "turns": 1,
            "carried_replies": 0,
            "ended": {},
            "rejected": {},
            "failed": {},
        }
        second.send("stop")
        await second.next("abort")
        first.send("end")
        await first.ended()
        json.dumps(it.plugin.stats())
        assert it.plugin.stats()["turns"] == 2
        assert it.plugin.stats()["ended"] == {"visitor": 1}


@virtual
async def test_stats_count_a_carried_reply_and_how_sessions_ended() -> None:
    async with bench(echo, settings(idle_timeout=30.0)) as it:
        first = await it.visit()
        first.say("some words that take a while")
        await first.next("text-delta")
        await first.lose()
        second = await it.visit(first)
        await second.next("finish")
        await second.ended()
        assert it.plugin.stats()["carried_replies"] == 1
        assert it.plugin.stats()["turns"] == 1
        assert it.plugin.stats()["ended"] == {"dropped": 1, "idle": 1}


@virtual
async def test_stats_count_rejected_messages_by_their_code() -> None:
    async with bench(echo, settings(max_message_chars=10, max_pending=1, messages_per_minute=3)) as it:
        visitor = await it.visit()
        for text in ("   ", "far too long", "one", "two", "three"):
            visitor.say(text)
        visitor.put("no frame")
        await visitor.until(lambda: len(visitor.of("finish")) == 2)
        visitor.say("four")
        visitor.say("five")
        await visitor.until(lambda: len(visitor.of("message-rejected")) == 5)
        codes = Counter(frame["code"] for frame in visitor.of("message-rejected"))
        assert codes == {"empty": 1, "too-long": 1, "too-many": 1, "invalid": 1, "rate-limited": 1}
        assert it.plugin.stats()["rejected"] == codes


@pytest.mark.parametrize(
    ("reason", "pieces"),
    [
        ("raised", [ValueError("of the host")]),
        ("wrong-answer", [b"bytes"]),
        ("chunk-timeout", ["one"]),
        ("answer-timeout", []),
    ],
)
@virtual
async def test_stats_count_failed_replies_by_what_went_wrong(reason: str, pieces: list[Any], log: Log) -> None:
    async def slow(_chat: Chat) -> AsyncIterator[str]:
        while True:
            await asyncio.sleep(4)
            yield "word "

    script = Script()
    script.say(*pieces)
    answer = script if pieces else slow
    async with bench(answer, settings(chunk_timeout=5.0, answer_timeout=30.0)) as it:
        visitor = await it.visit()
        assert cast("Frame", (await visitor.ask("hello")).end)["type"] == "error"
        assert it.plugin.stats()["failed"] == {reason: 1}
        assert it.plugin.stats()["turns"] == 0


class Listeners:
    """A host that notes what it is told of its chats."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        events = ("started", "replied", "ended")
        self.all = [listener(f"chat_session.{event}")(partial(self.note, event)) for event in events]

    async def note(self, event: str, **facts: Any) -> None:
        self.told.append((event, facts))


@virtual
async def test_a_host_hears_of_each_session_and_reply_by_ids_and_counts_and_never_a_word() -> None:
    async def answer(_chat: Chat) -> AsyncIterator[str | Source]:
        await asyncio.sleep(2)
        yield "secret words"
        yield Source("https://example.com/secret", "secret")

    host = Listeners()
    async with bench(answer, settings(visitor=lambda _: "ada"), listeners=host.all) as it:
        visitor = await it.visit()
        told = await visitor.ask("a secret question", "secret-id")
        visitor.send("end")
        await visitor.ended()
        await moment()
        session = session_of(visitor)
    assert host.told == [
        ("started", {"session_id": session, "visitor": "ada"}),
        (
            "replied",
            {
                "session_id": session,
                "reply_id": told.id,
                "status": "finished",
                "characters": 12,
                "sources": 1,
                "seconds": 2.0,
            },
        ),
        ("ended", {"session_id": session, "visitor": "ada", "reason": "visitor", "turns": 1}),
    ]
    assert "secret" not in str(host.told)


@virtual
async def test_a_reply_that_outlives_its_connection_is_told_of_once_after_the_session_has_ended() -> None:
    host = Listeners()
    async with bench(echo, settings(), listeners=host.all) as it:
        first = await it.visit()
        first.say("some words that take a while")
        await first.next("text-delta")
        await first.lose()
        second = await it.visit(first)
        await second.next("finish")
        await moment()
        assert [event for event, _ in host.told] == ["started", "ended", "started", "replied"]
        assert host.told[-1][1]["session_id"] == session_of(first)


@virtual
async def test_an_event_that_the_host_cannot_take_is_logged_and_breaks_no_chat(log: Log) -> None:
    async def never(**_facts: Any) -> None:
        pytest.fail("without a lifespan no emitter runs")

    app = Litestar(
        plugins=[ChatSessionPlugin(echo, settings())],
        listeners=[listener("chat_session.started")(never)],
        openapi_config=None,
    )
    it = bench_of(app)
    async with it.client:
        visitor = await it.visit()
        assert (await visitor.ask("hello there")).text == "hello there "
        visitor.send("end")
        await visitor.ended()
    assert len(log.errors) == 1
    assert "the event chat_session.started was lost" in log.errors[0]


# ---- Errors that teach -----------------------------------------------------------------------------------------------


def lessons(log: Log, word: str) -> list[str]:
    return [text for text in log.ours if word in text]


@virtual
async def test_the_log_says_once_which_origin_was_refused_and_what_to_set(log: Log) -> None:
    async with bench(echo, settings()) as it:
        for _ in range(3):
            response = await it.mint(origin="https://shop.example")
            assert response.status_code == 403
            assert "allowed_origins" in response.text
            assert await it.dial(None, origin="https://shop.example").ended() is not None
    (lesson,) = lessons(log, "allowed_origins")
    assert "'https://shop.example'" in lesson


@virtual
async def test_made_up_origins_fill_the_log_with_no_more_than_a_few_lines(log: Log) -> None:
    async with bench(echo, settings()) as it:
        for number in range(100):
            await it.mint(origin=f"https://{number}.example")
    assert len(lessons(log, "allowed_origins")) == chat_session._LESSON_LIMIT


@virtual
async def test_a_token_of_a_worker_with_another_secret_is_refused_and_the_log_says_what_to_set(log: Log) -> None:
    async with bench(echo, settings()) as it, bench(echo, settings(secret="another " + SECRET)) as other:
        token = await it.token()
        assert await other.dial(token).ended() == 3000
        assert await other.dial(await it.token()).ended() == 3000
    (lesson,) = lessons(log, "CHAT_SESSION_SECRET")
    assert "workers that share visitors need one secret" in lesson
    assert token not in lesson


@virtual
async def test_a_socket_that_arrives_as_plain_http_is_told_to_upgrade_and_the_log_says_why(log: Log) -> None:
    async with bench(echo, settings()) as it:
        for _ in range(2):
            response = await it.client.get("/chat/socket")
            assert response.status_code == 426
            assert response.headers["upgrade"] == "websocket"
    (lesson,) = lessons(log, "plain HTTP")
    assert "pip install websockets" in lesson
    assert "proxy" in lesson


# ---- Helpers of the routes' tests ------------------------------------------------------------------------------------

SHOP = "https://shop.example"
GLOBAL = "8.8.8.8"
Connection = ASGIConnection[Any, Any, Any, Any]


class Logbook(logging.Handler):
    """Keeps what is logged; ``caplog`` does not, since each ``Litestar`` puts its own handler on the root logger."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def logbook() -> Iterator[Logbook]:
    handler = Logbook()
    loggers = [logging.getLogger(name) for name in ("chat_session", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def logged(logbook: Logbook, level: int = logging.ERROR) -> list[str]:
    """What the plugin has logged at *level* or above, and what asyncio has of its tasks."""
    return [record.getMessage() for record in logbook.records if record.levelno >= level]


def caller(app: Any, address: str | None = "127.0.0.1") -> httpx.AsyncClient:
    """A client whose peer address is *address*; None is a server on a Unix socket, which knows none."""
    peer: Any = None if address is None else (address, 9)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=peer), base_url="http://test")


async def mint_from(it: Bench, address: str, **headers: str) -> httpx.Response:
    async with caller(it.app, address) as client:
        return await client.post("/chat/token", headers=headers)


async def token_from(it: Bench, address: str) -> str:
    response = await mint_from(it, address)
    assert response.status_code == 201, response.text
    return cast("str", response.json()["token"])


def read_token(it: Bench, text: str) -> chat_session._Token:
    token = chat_session._Token.verify(it.plugin._keys, text)
    assert token is not None
    return token


def ring(*secrets: str) -> list[bytes]:
    """The keys that a plugin at ``/chat`` makes of *secrets*."""
    return [chat_session._derive(secret, "/chat") for secret in secrets]


def forge(secret: str = SECRET, **fields: Any) -> str:
    """A token that is right in every field that is not given."""
    return chat_session._Token(**{"session": "forged", "expires": 4e9, **fields}).sign(*ring(secret))


def elsewhere(app: Any, path: str) -> Litestar:
    """*app* for a visitor who knocks at *path* instead of ``/chat/socket``."""

    async def call(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "path": path, "raw_path": path.encode()}, receive, send)

    return cast("Litestar", call)


async def talk(it: Bench, prefix: str = "/chat", **headers: str) -> Visitor:
    """Have a whole conversation under *prefix*: a widget, a token, a socket, a message, a reply."""
    widget = await it.client.get(f"{prefix}/widget.js")
    assert widget.status_code == 200, widget.text
    assert "set-cookie" not in widget.headers
    minted = await it.client.post(f"{prefix}/token", headers=headers)
    assert minted.status_code == 201, minted.text
    assert minted.headers["cache-control"] == "no-store"
    assert "set-cookie" not in minted.headers
    protocols = ["chat-session.v1", f"token.{minted.json()['token']}"]
    visitor = Visitor(elsewhere(it.app, f"{prefix}/socket"), protocols, headers, ("127.0.0.1", 9))
    it.visitors.append(visitor)
    assert (await visitor.ask("hello there")).text == "hello there "
    return visitor


def is_short_ascii(reason: str | None) -> bool:
    """RFC 6455 section 5.5: a close frame's reason has 123 bytes at most; and nothing of the visitor's is in it."""
    is_constant = reason in chat_session._REASONS.values()
    return is_constant and reason is not None and reason.isascii() and len(reason) <= 123


# ---- Configuration ---------------------------------------------------------------------------------------------------

SECONDS = ["scratchpad_ttl", "idle_timeout", "token_ttl", "reply_ttl", "chunk_timeout", "answer_timeout"]
SECONDS += ["send_timeout", "ping_interval"]
SECONDS_OR_NONE_AT_ALL = ("idle_warning", "shutdown_grace")
COUNTS = ["scratchpad_turns", "max_sessions", "max_sessions_per_client", "tokens_per_minute", "messages_per_minute"]
COUNTS += ["max_message_chars", "max_reply_chars"]
NO_NUMBERS: list[Any] = ["60", None, True, False, float("nan"), float("inf"), -float("inf"), -1, [60], 1j, b"6"]


def pairs(names: str | Iterable[str], *values: Any) -> list[tuple[str, Any]]:
    """Each of *names* with each of *values*."""
    return [(name, value) for name in ([names] if isinstance(names, str) else names) for value in values]


class HalfKeeper:
    """Rows could be saved here, and never found again."""

    async def save(self, row: SessionRow, /) -> None: ...


class SyncKeeper:
    def save(self, row: SessionRow, /) -> None: ...
    def load(self, session_id: str, /) -> None: ...


class Keeper(HalfKeeper):
    async def load(self, _session_id: str, /) -> SessionRow | None: ...


async def save_row(row: SessionRow) -> None: ...


def sync_save_row(row: SessionRow) -> None: ...


NONSENSE: list[tuple[str, Any]] = [
    *pairs(SECONDS, *NO_NUMBERS, 0, 0.0, -0.5),
    *pairs(SECONDS_OR_NONE_AT_ALL, *NO_NUMBERS, -0.5),
    *pairs(COUNTS, *NO_NUMBERS, 0, 2.5, 2.0),
    *pairs("max_pending", *NO_NUMBERS, 2.5),
    *pairs("path", None, 5, b"/chat", ["/chat"], "/chat/{id:int}", "/a b", "/chat?x=1", "/chat#x"),
    *pairs("greeting", None, 5, b"hi", ["hi"]),
    *pairs("allowed_origins", None, 5, SHOP, SHOP.encode(), ["*"], ["https://*.example.com"]),
    *pairs(
        "allowed_origins", *([each] for each in ("null", "", "shop.example", f"{SHOP}/", f"{SHOP}/path", f"{SHOP}?x"))
    ),
    *pairs(
        "allowed_origins", *([SHOP, each] for each in (None, 5, "https://me@shop.example", "https://a b", "https://"))
    ),
    *pairs("client_address", "127.0.0.1", 5, b"::1"),
    *pairs("visitor", "bob", 5, b"bob"),
    *pairs("rows", "", 5, b"rows", [], sync_save_row, HalfKeeper(), SyncKeeper()),
    *pairs("serve_widget", 1, 0, "yes", None),
    *pairs("guards", None, 5, "admin", sync_save_row),
    *pairs("middleware", None, 5, "cors", sync_save_row),
    *pairs("opt", None, 5, "x", [("a", 1)]),
    ("idle_warning", 300.5),
]


@pytest.mark.parametrize(("name", "value"), NONSENSE, ids=repr)
def test_the_config_refuses_nonsense_when_it_is_made_naming_the_field_and_the_value(name: str, value: Any) -> None:
    with pytest.raises(ImproperlyConfiguredException) as caught:
        settings(**{name: value})
    assert name in caught.value.detail
    assert repr(value) in caught.value.detail


@pytest.mark.parametrize(
    "secret",
    [
        *(
            "hunter2",
            "hunter2" * 4,
            b"hunter2",
            "",
            b"",
            [],
            (),
            ["hunter2"],
            [SECRET, "hunter2"],
            [None],
            [SECRET, None],
        ),
        *({"hunter2": 1}, 4711, True, [[SECRET]], bytearray(b"hunter2" * 9)),
    ],
    ids=str,
)
def test_a_short_or_senseless_secret_is_refused_and_never_shown(secret: Any) -> None:
    with pytest.raises(ImproperlyConfiguredException) as caught:
        ChatSessionConfig(secret=secret)
    shown = str(caught.value) + caught.value.detail
    assert "secret" in shown
    assert "32 bytes" in shown
    assert not re.search(f"hunter2|4711|{SECRET}", shown)


def test_a_config_does_not_show_its_secret() -> None:
    assert SECRET not in repr(settings())
    assert SECRET not in str(settings(secret=[SECRET]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *pairs([each for each in SECONDS if each != "idle_timeout"], 0.5, 1, 300.0),
        ("idle_timeout", 60),
        ("idle_timeout", 86_400.5),
        *pairs("shutdown_grace", 0, 0.5, 30),
        *pairs("idle_warning", 0, 0.5, 300),
        *pairs(COUNTS, 1, 10**6),
        *pairs("max_pending", 0, 1, 100),
        *pairs("path", "", "/", "chat", "/support/chat", "/support/chat/", "/a-b_c.d~e/0"),
        *pairs("secret", "x" * 32, b"x" * 32, "\u00e9" * 16, [SECRET], (SECRET, b"y" * 40)),
        *pairs("greeting", "", "Hello \U0001f600", lambda connection: connection.headers["host"]),
        *pairs("allowed_origins", [], [SHOP], (SHOP, "http://localhost:3000", "https://[::1]:8000")),
        *pairs("allowed_origins", ["https://Shop.Example"], ["app://localhost"]),
        *pairs("client_address", None, lambda _connection: ""),
        *pairs("rows", None, save_row, partial(save_row), Keeper(), MemoryStore(), "rows"),
        *pairs("visitor", None, lambda _request: None, save_row),
        *pairs("serve_widget", *(True, False)),
        *pairs("guards", [], (sync_save_row,)),
        *pairs("opt", {}, {"public": True}, types.MappingProxyType({"a": 1})),
    ],
    ids=repr,
)
def test_the_config_takes_what_makes_sense_and_keeps_it_as_it_was_given(name: str, value: Any) -> None:
    assert getattr(settings(**{name: value}), name) is value


def test_the_config_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().path = "/other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        ChatSessionConfig("/chat")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="scratchpad_turn"):
        settings(scratchpad_turn=6)


def test_the_defaults_are_those_of_the_contract() -> None:
    config = ChatSessionConfig()
    assert dataclasses.asdict(config) == {
        "path": "/chat", "secret": None, "greeting": "Hi! How can I help?", "scratchpad_turns": 6,
        "scratchpad_ttl": 180.0, "idle_timeout": 300.0, "idle_warning": 60.0, "token_ttl": 60.0, "reply_ttl": 600.0,
        "chunk_timeout": 60.0, "answer_timeout": 300.0, "send_timeout": 10.0, "ping_interval": 25.0,
        "shutdown_grace": 10.0, "allowed_origins": (), "max_sessions": 10_000, "max_sessions_per_client": 50,
        "tokens_per_minute": 30, "client_address": None, "messages_per_minute": 20, "max_message_chars": 4_000,
        "max_reply_chars": 32_000, "max_pending": 4, "rows": None, "visitor": None, "serve_widget": True,
        "guards": (), "middleware": (), "opt": {},
    }  # fmt: skip
    assert ChatSessionPlugin(echo, settings()).config == settings()


def test_the_public_names_are_those_of_the_contract() -> None:
    names = {"ChatSessionPlugin", "ChatSessionConfig", "Chat", "Message", "Source", "SessionRow", "Reply"}
    assert set(chat_session.__all__) == names
    assert isinstance(ChatSessionPlugin(echo, settings()), InitPlugin)


def test_importing_the_module_and_making_a_config_neither_warns_nor_reads_the_environment(
    monkeypatch: pytest.MonkeyPatch, logbook: Logbook
) -> None:
    monkeypatch.setenv("CHAT_SESSION_SECRET", "short")
    spec = importlib.util.spec_from_file_location("chat_session_again", chat_session.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "chat_session_again", module)
    spec.loader.exec_module(module)
    module.ChatSessionConfig()
    monkeypatch.delenv("CHAT_SESSION_SECRET")
    module.ChatSessionConfig()
    assert not logged(logbook, logging.DEBUG)


@virtual
async def test_a_secret_of_none_reads_the_environment_so_that_workers_agree(
    monkeypatch: pytest.MonkeyPatch, logbook: Logbook
) -> None:
    monkeypatch.setenv("CHAT_SESSION_SECRET", SECRET)
    async with bench(echo, ChatSessionConfig()) as one, bench(echo, ChatSessionConfig()) as other, bench(echo) as third:
        for worker in (other, third):
            visitor = worker.dial(await one.token())
            await visitor.next("session-start")
    assert not [line for line in logged(logbook, logging.WARNING) if "secret" in line]


@pytest.mark.parametrize("value", ["hunter2", "hunter2" * 4])
def test_a_short_key_in_the_environment_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CHAT_SESSION_SECRET", value)
    with pytest.raises(ImproperlyConfiguredException, match=r"CHAT_SESSION_SECRET.*32 bytes") as caught:
        ChatSessionPlugin(echo)
    assert "hunter2" not in caught.value.detail


@pytest.mark.parametrize("value", [None, ""])
def test_without_any_secret_each_plugin_makes_a_random_key_and_one_warning_says_what_breaks_with_workers(
    monkeypatch: pytest.MonkeyPatch, logbook: Logbook, value: str | None
) -> None:
    monkeypatch.delenv("CHAT_SESSION_SECRET", raising=False)
    if value is not None:
        monkeypatch.setenv("CHAT_SESSION_SECRET", value)
    one = ChatSessionPlugin(echo)
    Litestar(plugins=[one])
    (line,) = logged(logbook, logging.WARNING)
    assert "CHAT_SESSION_SECRET" in line
    assert "workers" in line
    other = ChatSessionPlugin(echo)
    assert one._keys != other._keys
    assert len(one._keys[0]) >= 32


def test_the_environment_is_not_asked_where_a_secret_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAT_SESSION_SECRET", "short")
    assert ChatSessionPlugin(echo, settings())._keys == ring(SECRET)
    assert ChatSessionPlugin(echo, settings(secret=[b"b" * 32, SECRET]))._keys == ring("b" * 32, SECRET)


@pytest.mark.parametrize("path", ["", "/", "support/chat/", "/support/chat", "/a-b_c.d~e"])
@virtual
async def test_path_is_where_the_routes_are_mounted(path: str) -> None:
    async with bench(echo, settings(path=path)) as it:
        await talk(it, f"/{path.strip('/')}".rstrip("/"))


async def slow_greeting(_connection: Connection) -> str:
    await asyncio.sleep(1)
    return "I am awake"


async def slower_greeting(_connection: Connection) -> str:
    await asyncio.sleep(3600)
    return "too late"


@pytest.mark.parametrize(
    ("greeting", "shown"),
    [
        ("Hello \U0001f600", "Hello \U0001f600"),
        ("", ""),
        ("half \ud83d", "half \ufffd"),
        (lambda connection: f"Welcome to {connection.headers['host']}", "Welcome to test"),
        (slow_greeting, "I am awake"),
    ],
)
@virtual
async def test_the_greeting_is_text_or_what_a_callable_makes_of_the_connection(greeting: Any, shown: str) -> None:
    async with bench(echo, settings(greeting=greeting)) as it:
        visitor = await it.visit()
        assert visitor.frames[0]["greeting"] == shown


@pytest.mark.parametrize("greeting", [lambda _connection: None, lambda connection: connection.nothing, slower_greeting])
@virtual
async def test_a_greeting_that_fails_is_logged_and_the_default_one_shows(logbook: Logbook, greeting: Any) -> None:
    async with bench(echo, settings(greeting=greeting)) as it:
        start = now()
        visitor = await it.visit()
        assert now() - start <= 5
        assert visitor.frames[0]["greeting"] == "Hi! How can I help?"
        assert (await visitor.ask("hello")).text == "hello "
    (line,) = logged(logbook)
    assert "greeting" in line


# ---- The forms of an answerer ----------------------------------------------------------------------------------------


async def two_words(_chat: Chat) -> AsyncIterator[str]:
    yield "one "
    yield "two"


async def a_text(_chat: Chat) -> str:
    return "one two"


async def a_stream(chat: Chat) -> AsyncIterator[str]:
    return two_words(chat)


class Crumbs:
    """An async iterable that is no generator: it has nothing to close."""

    def __init__(self, _chat: Chat) -> None:
        self._words = iter(["one ", "two"])

    def __aiter__(self) -> Crumbs:
        return self

    async def __anext__(self) -> str:
        try:
            return next(self._words)
        except StopIteration:
            raise StopAsyncIteration from None


async def an_iterator(chat: Chat) -> Crumbs:
    return Crumbs(chat)


class Shop:
    """An answerer with a state of its own, in five ways."""

    async def __call__(self, _chat: Chat) -> AsyncIterator[str]:
        yield "one "
        yield "two"

    async def stream(self, _chat: Chat) -> AsyncIterator[str]:
        yield "one two"

    async def text(self, _chat: Chat) -> str:
        return "one two"

    @classmethod
    async def of_class(cls, _chat: Chat) -> AsyncIterator[str]:
        yield "one two"

    @staticmethod
    async def of_nobody(_chat: Chat) -> str:
        return "one two"


class Clerk:
    async def __call__(self, _chat: Chat) -> str:
        return "one two"


async def with_model(model: str, _chat: Chat, *, temperature: float = 0) -> AsyncIterator[str]:
    assert (model, temperature) == ("m", 1)
    yield "one two"


async def with_model_text(_model: str, _chat: Chat) -> str:
    return "one two"


@pytest.mark.parametrize(
    "answer",
    [
        *(two_words, a_text, a_stream, an_iterator, Shop(), Shop().stream, Shop().text, Shop.of_class, Shop.of_nobody),
        *(Clerk(), partial(with_model_text, "m"), partial(partial(with_model, "m"), temperature=1), partial(Shop())),
    ],
    ids=repr,
)
@virtual
async def test_an_answerer_is_an_async_generator_function_or_a_coroutine_function_in_any_wrapping(answer: Any) -> None:
    async with bench(answer) as it:
        visitor = await it.visit()
        for _ in range(2):
            told = await visitor.ask("hello")
            assert (told.text, told.end) == ("one two", {"type": "finish"})


def a_sync_text(_chat: Chat) -> str:
    return "one two"


def a_sync_generator(_chat: Chat) -> Iterator[str]:
    yield "one two"


a_lambda = lambda chat: two_words(chat)  # noqa: E731, PLW0108 - that a lambda is refused is what is tested


class SyncClerk:
    def __call__(self, _chat: Chat) -> str:
        return "one two"


@pytest.mark.parametrize(
    "answer",
    [
        *(None, 5, "one two", ["one"], {}, a_sync_text, a_sync_generator, SyncClerk(), SyncClerk, partial(a_sync_text)),
        *(a_lambda, two_words(cast("Chat", None)), Crumbs(cast("Chat", None)), object(), ChatSessionConfig, print),
    ],
    ids=repr,
)
def test_anything_else_is_refused_as_an_answerer_when_the_plugin_is_made_by_a_message_that_teaches(answer: Any) -> None:
    with pytest.raises(ImproperlyConfiguredException) as caught:
        ChatSessionPlugin(answer, settings())
    assert "async def" in caught.value.detail
    assert "Chat" in caught.value.detail
    assert repr(answer) in caught.value.detail


@pytest.mark.parametrize("answer", [Shop, Clerk, Script, partial(Shop)])
def test_a_class_is_no_answerer_though_its_instances_are(answer: Any) -> None:
    with pytest.raises(ImproperlyConfiguredException, match="async def"):
        ChatSessionPlugin(answer, settings())


async def of_nothing() -> AsyncIterator[str]:
    yield "one two"


@pytest.mark.parametrize("answer", [of_nothing, with_model_text, partial(two_words, cast("Chat", None))])
def test_an_answerer_that_does_not_take_one_chat_is_refused_when_the_plugin_is_made(answer: Any) -> None:
    with pytest.raises(ImproperlyConfiguredException, match="Chat"):
        ChatSessionPlugin(answer, settings())


@pytest.mark.parametrize(
    "piece",
    [
        *(b"bytes", 5, 1.5, True, ["one"], {"role": "assistant", "content": "one"}, Ellipsis, Source),
        *(Source(cast("Any", each)) for each in (5, None, b"/a")),
        Source("/a", cast("Any", 5)),
    ],
    ids=repr,
)
@virtual
async def test_anything_else_that_it_yields_fails_that_reply_and_is_logged_naming_the_answerer(
    logbook: Logbook, piece: Any
) -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        script.say("fine so far", piece, "never heard")
        told = await visitor.ask("hello")
        assert told.text == "fine so far"
        assert told.end is not None
        assert told.end["type"] == "error"
        assert not told.sources
        (line,) = logged(logbook)
        assert "Script" in line
        assert type(piece).__name__ in line
        assert "Traceback" not in line
        assert "hello" not in line
        script.pieces = asyncio.Queue()
        script.say("better", None)
        assert (await visitor.ask("again")).text == "better"


async def yields_none(_chat: Chat) -> AsyncIterator[Any]:
    yield None


async def returns_none(_chat: Chat) -> Any:
    return None


async def returns_list(_chat: Chat) -> Any:
    return ["one", "two"]


async def returns_bytes(_chat: Chat) -> Any:
    return b"one"


async def returns_function(_chat: Chat) -> Any:
    return two_words


async def returns_coroutine(chat: Chat) -> Any:
    return a_text(chat)


async def yields_coroutine(chat: Chat) -> AsyncIterator[Any]:
    yield a_text(chat)


async def yields_stream(chat: Chat) -> AsyncIterator[Any]:
    yield two_words(chat)


@pytest.mark.filterwarnings("ignore:coroutine 'a_text' was never awaited:RuntimeWarning")
@pytest.mark.parametrize(
    ("answer", "hint"),
    [
        *((returns_none, "is a `yield` missing?"), (returns_list, "is a `yield` missing?")),
        *((returns_coroutine, "is an `await` missing?"), (yields_coroutine, "is an `await` missing?")),
        *((yields_none, "`if text: yield text`"), (yields_stream, "`async for`")),
    ],
)
@virtual
async def test_the_log_says_what_an_answerer_probably_forgot(logbook: Logbook, answer: Any, hint: str) -> None:
    async with bench(answer) as it:
        visitor = await it.visit()
        await visitor.ask("hello")
    (line,) = logged(logbook)
    assert hint in line


@pytest.mark.parametrize("answer", [yields_none, returns_none, returns_list, returns_bytes, returns_function])
@virtual
async def test_a_wrong_answer_as_a_whole_fails_the_reply_and_is_logged_naming_the_answerer(
    logbook: Logbook, answer: Any
) -> None:
    async with bench(answer) as it:
        visitor = await it.visit()
        told = await visitor.ask("hello")
        assert told.end is not None
        assert told.end["type"] == "error"
        assert [frame["type"] for frame in visitor.frames] == ["session-start", "start", "error"]
    (line,) = logged(logbook)
    assert answer.__name__ in line


@virtual
async def test_chat_gives_the_message_the_scratchpad_in_plain_dicts_the_row_and_the_app() -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        for question in ("first", "second"):
            script.say(f"{question} reply", None)
            await visitor.ask(question)
        one, two = script.chats
        assert (one.message, two.message) == ("first", "second")
        assert two.messages == [
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "first reply"},
            {"role": "user", "content": "second"},
        ]
        assert {type(message) for message in two.messages} == {dict}
        assert two.app is it.app
        row = two.session
        assert row.id == visitor.frames[0]["sessionId"]
        assert row.started_at.utcoffset() == timedelta(0)
        assert (row.ended_at, row.end_reason, row.visitor, row.reply) == (None, None, None, None)
        assert (one.session.turns, two.session.turns) == (0, 1)


@virtual
async def test_chat_is_read_only_and_its_messages_are_a_copy_that_an_answerer_may_change() -> None:
    seen: list[list[Any]] = []

    async def vandal(chat: Chat) -> str:
        seen.append([message.copy() for message in chat.messages])
        for message in chat.messages:
            message["content"] = "changed"
        chat.messages.clear()
        with pytest.raises(AttributeError):
            chat.message = "changed"  # type: ignore[misc]
        with pytest.raises(AttributeError):
            chat.session.turns = 99  # type: ignore[misc]
        return "done"

    async with bench(vandal) as it:
        visitor = await it.visit()
        for question in ("a", "b", "c"):
            assert (await visitor.ask(question)).end == {"type": "finish"}
        assert [message["content"] for message in seen[-1]] == ["a", "done", "b", "done", "c"]


# ---- The token route -------------------------------------------------------------------------------------------------


@virtual
async def test_post_token_answers_201_with_a_token_and_its_seconds_and_no_store() -> None:
    async with bench(echo, settings(token_ttl=45)) as it:
        response = await it.mint()
        assert response.status_code == 201
        assert response.json() == {"token": response.json()["token"], "expiresIn": 45}
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["content-type"].startswith("application/json")
        assert "set-cookie" not in response.headers
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert re.fullmatch(r"v1\.[\w.~-]+\.[\w-]{43}", response.json()["token"])
        assert read_token(it, response.json()["token"]).session != read_token(it, await it.token()).session
        assert (await it.client.get("/chat/token")).status_code == 405


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://test"},
        {"origin": "https://test"},
        {"origin": "HTTPS://Test"},
        {"origin": "http://test", "host": "TEST"},
        {"origin": "http://test:80"},
        {"origin": "https://test:443"},
        {"origin": "https://test", "host": "test:443"},
        {"origin": "http://test", "host": "test:80"},
        {"origin": "https://test:8443", "host": "test:8443"},
        {"origin": "http://[::1]:8000", "host": "[::1]:8000"},
        {"origin": SHOP},
        {"origin": "https://SHOP.example"},
        {"origin": "https://upper.example:8443"},
        {"origin": "https://behind.a.proxy", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "cross-site"},
    ],
    ids=str,
)
@virtual
async def test_no_origin_the_apps_own_and_the_allowed_ones_are_welcome(headers: dict[str, str]) -> None:
    async with bench(echo, settings(allowed_origins=[SHOP, "https://Upper.Example:8443"])) as it:
        response = await it.mint(None, **headers)
        assert response.status_code == 201, response.text


FOREIGN = [
    *({"origin": origin} for origin in ("null", "", "http://", "file://", "test", "//test", "http://evil.example")),
    *({"origin": f"http://{each}"} for each in ("test.evil.example", "eviltest", "evil-test", "tes", "test.", "xtest")),
    *({"origin": f"http://{each}"} for each in ("test@evil.example", "evil.example@test", "test:81", "test:8080")),
    *({"origin": f"http://{each}"} for each in ("test/", "test#", "test?", "test evil.example", "test,evil.example")),
    {"origin": "http://test http://evil.example"},
    *({"origin": origin, "host": ""} for origin in ("http://", "null", "http://test")),
    {"origin": "https://test", "host": "test:8443"},
    {"origin": "https://test:8443", "host": "test"},
    {"origin": "https://test:8443", "host": "test:8444"},
    {"origin": "http://shop.example"},
    *({"origin": f"{SHOP}{tail}"} for tail in ("/", ":444", ".", ".evil.example", "@evil.example", "?", "#")),
    *({"origin": f"https://{head}shop.example"} for head in ("a.", "x", "evil.example@", "*.")),
    *({"origin": "https://evil.example", "sec-fetch-site": site} for site in ("cross-site", "same-site", "none", "")),
    {"origin": "https://evil.example", "x-forwarded-host": "evil.example"},
    {"origin": "https://evil.example", "referer": "http://test/"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
@virtual
async def test_every_other_origin_is_foreign_and_gets_403_without_cors_headers(headers: dict[str, str]) -> None:
    async with bench(echo, settings(allowed_origins=[SHOP])) as it:
        response = await it.mint(None, **headers)
        assert response.status_code == 403
        assert set(response.json()) == {"status_code", "detail"}
        assert not [name for name in response.headers if name.startswith("access-control")]
        token = forge(session="s")
        offered = ["chat-session.v1", f"token.{token}"]
        visitor = Visitor(it.app, offered, headers, ("127.0.0.1", 9))
        await visitor.ended()
        assert visitor.accepted is None, "the socket must be refused before the handshake ends"
        assert visitor.code is not None


def cors_of(response: httpx.Response) -> tuple[list[str], bool, bool, bool]:
    """ACAO values, whether Retry-After is exposed, whether caches are told, whether cookies are let in."""
    headers = response.headers
    exposed = [each.strip().lower() for each in headers.get("access-control-expose-headers", "").split(",")]
    varies = [each.strip().lower() for each in headers.get("vary", "").split(",")]
    is_credentialed = "access-control-allow-credentials" in headers
    return (
        headers.get_list("access-control-allow-origin"),
        "retry-after" in exposed,
        "origin" in varies,
        is_credentialed,
    )


@virtual
async def test_for_an_allowed_foreign_origin_the_cors_headers_are_set_on_the_token() -> None:
    async with bench(echo, settings(allowed_origins=[SHOP])) as it:
        assert cors_of(await it.mint(None, origin=SHOP)) == ([SHOP], True, True, False)
        assert cors_of(await it.mint(None, origin="http://test"))[0] == []


@virtual
async def test_an_allowed_foreign_page_can_read_429_and_503_and_their_retry_after() -> None:
    config = settings(allowed_origins=[SHOP], tokens_per_minute=1, max_sessions=1)
    async with bench(echo, config) as it:
        await mint_from(it, GLOBAL)
        limited = await mint_from(it, GLOBAL, origin=SHOP)
        assert limited.status_code == 429
        assert cors_of(limited) == ([SHOP], True, True, False)
        await it.visit()
        full = await it.mint(None, origin=SHOP)
        assert full.status_code == 503
        assert cors_of(full) == ([SHOP], True, True, False)
        for response in (limited, full):
            assert int(response.headers["retry-after"]) >= 1
            assert set(response.json()) == {"status_code", "detail"}


@virtual
async def test_tokens_per_minute_are_counted_by_address_and_retry_after_honoured_means_success() -> None:
    async with bench(echo, settings(tokens_per_minute=3)) as it:
        assert [(await mint_from(it, GLOBAL)).status_code for _ in range(5)] == [201, 201, 201, 429, 429]
        assert (await mint_from(it, "1.1.1.1")).status_code == 201
        for _ in range(10):
            refused = await mint_from(it, GLOBAL)
            assert refused.status_code == 429
            wait = int(refused.headers["retry-after"])
            assert 1 <= wait <= 20
            await asyncio.sleep(wait)
            assert (await mint_from(it, GLOBAL)).status_code == 201
        await asyncio.sleep(61)
        assert [(await mint_from(it, GLOBAL)).status_code for _ in range(4)] == [201, 201, 201, 429]


@virtual
async def test_tokens_per_minute_is_what_an_address_gets_in_any_minute_after_the_first() -> None:
    async with bench(echo, settings(tokens_per_minute=6)) as it:
        granted: list[float] = []
        for _ in range(400):
            if (await mint_from(it, GLOBAL)).status_code == 201:
                granted.append(now())
            await asyncio.sleep(1)
        in_a_minute = [sum(start <= each < start + 60 for each in granted) for start in granted]
        assert max(in_a_minute) <= 2 * 6
        assert len(granted) in range(6 * 6, 8 * 6)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "192.168.1.7",
            "172.16.0.1",
            "169.254.1.1",
            "100.64.0.1",
            "::1",
            "fe80::1",
            "fd00::1",
        ),
        *("::ffff:10.0.0.1", "testclient", "", "fe80::1%eth0"),
    ],
)
@virtual
async def test_an_address_that_is_not_global_is_not_limited_and_one_log_line_says_so(
    logbook: Logbook, address: str
) -> None:
    async with bench(echo, settings(tokens_per_minute=1, max_sessions_per_client=1)) as it:
        for _ in range(3):
            visitor = it.dial(await token_from(it, address), client=(address, 9))
            await visitor.next("session-start")
    assert len([line for line in logged(logbook, logging.INFO) if "client_address" in line]) == 1


@virtual
async def test_a_connection_without_any_peer_is_not_limited() -> None:
    async with bench(echo, settings(tokens_per_minute=1)) as it, caller(it.app, None) as client:
        for _ in range(3):
            assert (await client.post("/chat/token")).status_code == 201


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("8.8.8.8", "8.8.8.8", True),
        ("8.8.8.8", "8.8.8.9", False),
        ("8.8.8.8", "::ffff:8.8.8.8", True),
        ("2606:4700:1:2::1", "2606:4700:1:2:ffff:ffff:ffff:ffff", True),
        ("2606:4700:1:2::1", "2606:4700:1:3::1", False),
        ("2606:4700:1:2::1", "2606:4700:0001:0002:0:0:0:1", True),
        ("user-7", "user-7", True),
        ("user-7", "user-8", False),
        ("10.0.0.1", "10.0.0.1", True),
        ("", "", True),
    ],
)
@virtual
async def test_what_client_address_answers_is_always_limited_and_an_ipv6_visitor_is_a_whole_64(
    one: str, other: str, *, is_same: bool
) -> None:
    def by_header(connection: Connection) -> str:
        return connection.headers["x-visitor"]

    async with bench(echo, settings(tokens_per_minute=1, client_address=by_header)) as it:
        assert (await it.mint(None, **{"x-visitor": one})).status_code == 201
        assert (await it.mint(None, **{"x-visitor": other})).status_code == (429 if is_same else 201)


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ("2606:4700:1:2::1", "2606:4700:1:2::2", True),
        ("2606:4700:1:2::1", "2606:4700:1:3::1", False),
        ("8.8.8.8", "::ffff:8.8.8.8", True),
    ],
)
@virtual
async def test_a_global_peer_is_limited_and_an_ipv6_peer_is_a_whole_64(one: str, other: str, *, is_same: bool) -> None:
    async with bench(echo, settings(tokens_per_minute=1)) as it:
        assert (await mint_from(it, one)).status_code == 201
        assert (await mint_from(it, other)).status_code == (429 if is_same else 201)


@virtual
async def test_the_rates_of_addresses_long_gone_are_not_kept() -> None:
    async with bench(echo) as it:
        for number in range(1, 200):
            await mint_from(it, f"8.8.{number}.8")
        await asyncio.sleep(120)
        await mint_from(it, GLOBAL)
        assert len(it.plugin._rates) == 1


@virtual
async def test_max_sessions_per_client_answers_429_at_the_token_until_one_of_them_ends() -> None:
    async with bench(echo, settings(max_sessions_per_client=2)) as it:
        visitors = [it.dial(await token_from(it, GLOBAL), client=(GLOBAL, 9)) for _ in range(2)]
        for visitor in visitors:
            await visitor.next("session-start")
        refused = await mint_from(it, GLOBAL)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert (await mint_from(it, "1.1.1.1")).status_code == 201
        visitors[0].send("end")
        await visitors[0].ended()
        assert (await mint_from(it, GLOBAL)).status_code == 201


@virtual
async def test_a_full_process_answers_503_with_retry_after_until_a_session_ends() -> None:
    async with bench(echo, settings(max_sessions=1)) as it:
        visitor = await it.visit()
        refused = await it.mint()
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        visitor.send("end")
        await visitor.ended()
        assert (await it.mint()).status_code == 201


@virtual
async def test_a_visitor_who_comes_back_has_room_though_the_dead_link_still_counts() -> None:
    async with bench(echo, settings(max_sessions=1, max_sessions_per_client=1)) as it:
        token = await token_from(it, GLOBAL)
        first = it.dial(token, client=(GLOBAL, 9))
        await first.next("session-start")
        async with caller(it.app, GLOBAL) as client:
            response = await client.post("/chat/token", data={"previous": token})
        assert response.status_code == 201
        second = it.dial(response.json()["token"], client=(GLOBAL, 9))
        await second.next("session-start")
        assert (await first.next("session-end"))["reason"] == "replaced"
        assert await first.ended() == 1000


@virtual
async def test_when_the_app_ends_open_sessions_are_told_restart_and_their_handlers_are_waited_for() -> None:
    it = Bench(echo, settings())
    async with it.app.lifespan():
        visitor = await it.visit()
    assert visitor.frames[-1] == {"type": "session-end", "reason": "restart"}
    assert visitor.code == 1012
    assert visitor.task.done()


@virtual
async def test_an_app_whose_lifespan_nobody_runs_still_chats() -> None:
    it = Bench(echo, settings())
    visitor = await talk(it)
    visitor.send("end")
    assert await visitor.ended() == 1000


@virtual
async def test_a_process_that_shuts_down_answers_503_and_1013_and_welcomes_again_when_its_app_is_started_anew() -> None:
    script = Script()
    async with bench(script, settings(allowed_origins=[SHOP])) as it:
        token = await it.token()
        visitor = await it.visit()
        visitor.say("hello")
        await visitor.next("start")
        draining = asyncio.create_task(it.desk.drain())
        await asyncio.sleep(1)
        refused = await it.mint(None, origin=SHOP)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert cors_of(refused)[0] == [SHOP]
        late = it.dial(token)
        assert await late.ended() == 1013
        assert not late.frames
        script.say("bye", None)
        assert (await visitor.next("session-end"))["reason"] == "restart"
        assert await visitor.ended() == 1012
        await draining
    async with it.app.lifespan():
        again = it.dial(token)
        await again.next("session-start")
        await again.lose()


def multipart(*lines: str, boundary: str = "b") -> tuple[bytes, str]:
    return "\r\n".join([f"--{boundary}", *lines, f"--{boundary}--", ""]).encode(), "multipart/form-data; boundary=b"


URL_ENCODED = "application/x-www-form-urlencoded"
PREVIOUS = 'Content-Disposition: form-data; name="previous"'
GARBAGE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", URL_ENCODED),
    "no value": (b"previous=", URL_ENCODED),
    "no field": (b"other=1", URL_ENCODED),
    "a word": (b"previous=nonsense", URL_ENCODED),
    "dots": (b"previous=......", URL_ENCODED),
    "bytes": (bytes(range(256)), URL_ENCODED),
    "bytes in the value": (b"previous=\xff\xfe\x00", URL_ENCODED),
    "escaped bytes": (b"previous=%ff%fe%00%zz", URL_ENCODED),
    "letters of the world": ("previous=\u00e9\U0001f600".encode(), URL_ENCODED),
    "two": (b"previous=a&previous=b", URL_ENCODED),
    "another key's": (f"previous={forge('y' * 32)}".encode(), URL_ENCODED),
    "cut short": (f"previous={forge()[:-1]}".encode(), URL_ENCODED),
    "with a tail": (f"previous={forge()}=".encode(), URL_ENCODED),
    "unsigned": (b"previous=" + forge().rpartition(".")[0].encode(), URL_ENCODED),
    "two megabytes": (b"previous=" + b"x" * 2_000_000, URL_ENCODED),
    "more than the host takes": (b"previous=" + b"x" * 11_000_000, URL_ENCODED),
    "ten thousand fields": (b"&".join(b"f%d=%d" % (n, n) for n in range(10_000)), URL_ENCODED),
    "a wrong charset": (b"previous=x", f"{URL_ENCODED}; charset=nonsense"),
    "json": (b'{"previous": "x"}', "application/json"),
    "text": (forge().encode(), "text/plain"),
    "no type": (b"previous=x", ""),
    "a wrong type": (b"previous=x", "\x00;;;=/"),
    "multipart without a boundary": (b"--b--", "multipart/form-data"),
    "multipart with an empty boundary": (b"--b--", 'multipart/form-data; boundary=""'),
    "multipart with a very long boundary": (b"--b--", f"multipart/form-data; boundary={'b' * 5000}"),
    "multipart of nothing": (b"", "multipart/form-data; boundary=b"),
    "multipart of bytes": (bytes(range(256)), "multipart/form-data; boundary=b"),
    "multipart with a word": multipart(PREVIOUS, "", "nonsense"),
    "multipart without a name": multipart("Content-Disposition: form-data", "", "nonsense"),
    "multipart without headers": multipart("", "nonsense"),
    "multipart cut short": (multipart(PREVIOUS, "", "nonsense")[0][:-8], "multipart/form-data; boundary=b"),
    "multipart with a wrong charset": multipart(PREVIOUS, "Content-Type: text/plain; charset=nonsense", "", "x"),
    "multipart with a codec that is none of text": multipart(
        PREVIOUS, "Content-Type: text/plain; charset=hex", "", "x"
    ),
    "multipart with bytes": (
        multipart(PREVIOUS, "", "@")[0].replace(b"@", b"\xff\xfe"),
        "multipart/form-data; boundary=b",
    ),
    "a file": multipart(f'{PREVIOUS}; filename="x.txt"', "Content-Type: text/plain", "", forge()),
    "a thousand parts and more": multipart(*(line for _ in range(1200) for line in (PREVIOUS, "", "x", "--b"))),
}


@pytest.mark.parametrize("name", GARBAGE)
@virtual
async def test_garbage_as_previous_is_as_good_as_nothing_there(logbook: Logbook, name: str) -> None:
    content, content_type = GARBAGE[name]
    async with bench(echo) as it:
        headers = {"content-type": content_type} if content_type else {}
        response = await it.client.post("/chat/token", content=content, headers=headers)
        assert response.status_code == 201, response.text
        assert read_token(it, response.json()["token"]).previous == ""
        visitor = it.dial(response.json()["token"])
        await visitor.next("session-start")
    assert not logged(logbook)


@pytest.mark.parametrize("is_multipart", [False, True])
@virtual
async def test_of_previous_the_mac_is_checked_but_not_the_expiry(*, is_multipart: bool) -> None:
    async with bench(echo, settings(secret=[SECRET, "o" * 32])) as it:
        for key in (SECRET, "o" * 32):
            text = forge(key, session="old", expires=1.0)
            response = await it.client.post(
                "/chat/token",
                **cast("Any", {"files": {"previous": (None, text)}} if is_multipart else {"data": {"previous": text}}),
            )
            assert read_token(it, response.json()["token"]).previous == "old"


@virtual
async def test_a_previous_that_comes_in_chunks_counts_too() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"previous=" + forge(session="old")[:20].encode()
        yield forge(session="old")[20:].encode()

    async with bench(echo) as it:
        headers = {"content-type": URL_ENCODED}
        response = await it.client.post("/chat/token", content=chunks(), headers=headers)
        assert read_token(it, response.json()["token"]).previous == "old"


@virtual
async def test_a_previous_of_another_origin_counts_for_nothing() -> None:
    async with bench(echo, settings(allowed_origins=[SHOP])) as it:
        own = await it.token(None, origin="http://test")
        assert read_token(it, await it.token(own, origin="http://test")).previous == read_token(it, own).session
        assert read_token(it, await it.token(own, origin=SHOP)).previous == ""
        assert read_token(it, await it.token(own)).previous == ""


def by_cookie(request: Request[Any, Any, Any]) -> str | None:
    return request.cookies.get("user")


async def by_cookie_later(request: Request[Any, Any, Any]) -> str | None:
    await asyncio.sleep(1)
    return request.cookies.get("user")


@pytest.mark.parametrize("visitor", [by_cookie, by_cookie_later])
@pytest.mark.parametrize("name", [None, "", "a", "ab", "abc", "ann@shop.example", "4711", "a.b.c~d"])
@virtual
async def test_visitor_makes_the_sessions_visitor_of_the_token_request(visitor: Any, name: str | None) -> None:
    script = Script()
    async with bench(script, settings(visitor=visitor)) as it:
        token = await it.token(None, **({} if name is None else {"cookie": f"user={name}"}))
        guest = it.dial(token)
        script.say("hi", None)
        await guest.ask("hello")
        assert script.chats[0].session.visitor == name


@pytest.mark.parametrize("name", ["", "\u00e9", "\U0001f600", "a/b+c=", "x" * 500, "\n\x00", "half \ud83d"])
@virtual
async def test_an_id_of_any_letters_travels_in_the_token(name: str) -> None:
    script = Script()
    async with bench(script, settings(visitor=lambda _request: name)) as it:
        guest = await it.visit()
        script.say("hi", None)
        await guest.ask("hello")
        assert script.chats[0].session.visitor == name.encode("utf-8", "replace").decode()


def not_signed_in(_request: Request[Any, Any, Any]) -> str | None:
    raise NotAuthorizedException(detail="Please sign in first.")


async def not_allowed(_request: Request[Any, Any, Any]) -> str | None:
    raise PermissionDeniedException(detail="Please sign in first.")


@pytest.mark.parametrize(("visitor", "status"), [(not_signed_in, 401), (not_allowed, 403)])
@virtual
async def test_a_visitor_callable_may_refuse_by_an_http_exception(logbook: Logbook, visitor: Any, status: int) -> None:
    async with bench(echo, settings(visitor=visitor)) as it:
        response = await it.mint()
        assert response.status_code == status
        assert response.json()["detail"] == "Please sign in first."
    assert not logged(logbook)


@virtual
async def test_an_allowed_foreign_page_can_read_the_refusal_of_a_visitor_callable() -> None:
    async with bench(echo, settings(visitor=not_signed_in, allowed_origins=[SHOP])) as it:
        response = await it.mint(None, origin=SHOP)
        assert response.status_code == 401
        assert cors_of(response)[0] == [SHOP]


@virtual
async def test_a_visitor_callable_that_fails_shows_no_traceback() -> None:
    async with bench(echo, settings(visitor=lambda request: request.nothing)) as it:
        response = await it.mint()
        assert response.status_code == 500
        assert "nothing" not in response.text
        assert "Traceback" not in response.text


@virtual
async def test_a_reply_is_carried_to_the_same_visitor_and_to_no_other() -> None:
    async with bench(echo, settings(visitor=by_cookie)) as it:

        async def find_previous(before: str, after: str) -> bool:
            cookies = [{"cookie": f"user={each}"} if each else {} for each in (before, after)]
            old = await it.token(None, **cookies[0])
            return read_token(it, await it.token(old, **cookies[1])).previous == read_token(it, old).session

        assert await find_previous("ann", "ann")
        assert await find_previous("", "")
        assert await find_previous("", "ann")
        assert not await find_previous("ann", "bob")
        assert not await find_previous("ann", "")


# ---- The socket's handshake ------------------------------------------------------------------------------------------


@virtual
async def test_only_the_version_is_echoed_and_the_token_never() -> None:
    async with bench(echo) as it:
        token = await it.token()
        for offered in (["chat-session.v1", f"token.{token}"], [f"token.{forge()}", "x", "chat-session.v1"]):
            visitor = Visitor(it.app, offered, {}, ("127.0.0.1", 9))
            it.visitors.append(visitor)
            await visitor.next("session-start")
            assert visitor.accepted is not None
            assert visitor.accepted["subprotocol"] == "chat-session.v1"
            assert not [each for each in (str(visitor.accepted), *visitor.raw) if token in each or "token." in each]


@pytest.mark.parametrize(
    "offered",
    [[], [""], ["chat-session.v2"], ["chat-session.v10"], ["Chat-Session.V1"], ["chat-session"], ["graphql-ws"]],
)
@pytest.mark.parametrize("has_token", [True, False])
@virtual
async def test_an_unknown_version_or_none_is_refused_before_the_handshake_ends_and_the_token_stays_good(
    logbook: Logbook, offered: list[str], *, has_token: bool
) -> None:
    async with bench(echo) as it:
        token = await it.token()
        visitor = Visitor(it.app, [*offered, *([f"token.{token}"] if has_token else [])], {}, ("127.0.0.1", 9))
        await visitor.ended()
        assert visitor.accepted is None
        assert visitor.code is not None
        await it.dial(token).next("session-start")
    assert not logged(logbook)


@virtual
async def test_a_server_that_names_no_subprotocols_at_all_is_refused_before_the_handshake_ends() -> None:
    async with bench(echo) as it:

        async def without(scope: Any, receive: Any, send: Any) -> None:
            scope.pop("subprotocols")
            await it.app(scope, receive, send)

        visitor = Visitor(cast("Litestar", without), [], {}, ("127.0.0.1", 9))
        await visitor.ended()
        assert visitor.accepted is None


BAD_TOKENS: dict[str, str | None] = {
    "missing": None,
    "empty": "",
    "a word": "nonsense",
    "dots": "." * 9,
    "not ascii": "v1.\u00e9.\U0001f600",
    "very long": "v1." + "x" * 100_000,
    "expired": forge(expires=1.0),
    "another key's": forge("y" * 32),
    "tampered": forge().replace("forged", "farged"),
    "cut short": forge()[:-1],
    "with a tail": forge() + "=",
    "unsigned": forge().rpartition(".")[0] + ".",
    "another origin's": forge(origin=chat_session._digest(SHOP)),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
@virtual
async def test_a_missing_or_bad_token_is_accepted_and_closed_with_3000(logbook: Logbook, name: str) -> None:
    async with bench(echo) as it:
        visitor = it.dial(BAD_TOKENS[name])
        assert await visitor.ended() == 3000
        assert visitor.accepted is not None
        assert visitor.accepted["subprotocol"] == "chat-session.v1"
        assert is_short_ascii(visitor.reason)
        assert not visitor.frames
        assert not it.desk.sessions
    assert not logged(logbook)


@pytest.mark.parametrize("greeting", ["Hi!", slow_greeting])
@virtual
async def test_a_token_opens_one_session_also_when_two_sockets_race_for_it(greeting: Any) -> None:
    async with bench(echo, settings(greeting=greeting)) as it:
        token = await it.token()
        racers = [it.dial(token) for _ in range(5)]
        await asyncio.sleep(2)
        assert sorted(racer.code or 0 for racer in racers) == [0, 3000, 3000, 3000, 3000]
        (winner,) = [racer for racer in racers if racer.frames]
        winner.send("end")
        await winner.ended()
        assert await it.dial(token).ended() == 3000
        await asyncio.sleep(30)
        assert await it.dial(token).ended() == 3000


@virtual
async def test_a_used_token_stays_used_for_as_long_as_it_would_be_good() -> None:
    async with bench(echo, settings(token_ttl=3600)) as it:
        token = await it.token()
        visitor = it.dial(token)
        await visitor.next("session-start")
        await visitor.lose()
        for _ in range(60):
            await asyncio.sleep(59)
            assert await it.dial(token).ended() == 3000


@virtual
async def test_used_tokens_are_forgotten_when_they_would_have_expired_anyway() -> None:
    async with bench(echo) as it:
        for _ in range(5):
            visitor = await it.visit()
            visitor.send("end")
            await visitor.ended()
        await asyncio.sleep(120)
        await it.visit()
        assert len(it.plugin._used) == 1


@virtual
async def test_a_token_opens_a_session_only_from_the_origin_that_asked_for_it() -> None:
    async with bench(echo, settings(allowed_origins=[SHOP, "https://other.example"])) as it:
        for asked, came in [
            (SHOP, "https://other.example"),
            (SHOP, "http://test"),
            ("http://test", SHOP),
            (SHOP, None),
        ]:
            token = await it.token(None, origin=asked)
            visitor = it.dial(token, client=("127.0.0.1", 9), **({} if came is None else {"origin": came}))
            assert await visitor.ended() == 3000
            assert not visitor.frames
            await it.dial(token, origin=asked).next("session-start")
        assert await it.dial(await it.token(), origin=SHOP).ended() == 3000


@virtual
async def test_a_same_origin_page_behind_a_proxy_that_rewrites_host_gets_its_socket() -> None:
    async with bench(echo) as it:
        headers = {"origin": "https://www.example.com", "sec-fetch-site": "same-origin"}
        token = await it.token(None, **headers)
        await it.dial(token, client=("127.0.0.1", 9), origin="https://www.example.com").next("session-start")
        other = it.dial(await it.token(None, **headers), origin="https://evil.example")
        await other.ended()
        assert other.accepted is None


@virtual
async def test_an_expired_token_gets_3000_and_one_just_short_of_it_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = 1_800_000_000.0
    monkeypatch.setattr(chat_session, "time", types.SimpleNamespace(time=lambda: wall))
    async with bench(echo, settings(token_ttl=60)) as it:
        early, late = await it.token(), await it.token()
        wall += 59.9
        await it.dial(early).next("session-start")
        wall += 0.2
        assert await it.dial(late).ended() == 3000


@virtual
async def test_a_token_that_expires_while_the_greeting_is_made_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wall = 1_800_000_000.0
    monkeypatch.setattr(chat_session, "time", types.SimpleNamespace(time=lambda: wall))
    async with bench(echo, settings(token_ttl=60, greeting=slow_greeting)) as it:
        visitor = it.dial(await it.token())
        await asyncio.sleep(0.5)
        wall += 61
        assert await visitor.ended() == 3000


@virtual
async def test_the_first_key_signs_and_all_verify_so_that_keys_can_be_rotated() -> None:
    old, new = "o" * 32, "n" * 32
    async with (
        bench(echo, settings(secret=old)) as before,
        bench(echo, settings(secret=[new, old])) as during,
        bench(echo, settings(secret=(new.encode(),))) as after,
    ):
        await during.dial(await before.token()).next("session-start")
        await during.dial(await during.token()).next("session-start")
        await after.dial(await during.token()).next("session-start")
        assert await before.dial(await during.token()).ended() == 3000
        assert await after.dial(await before.token()).ended() == 3000


@virtual
async def test_a_full_process_closes_with_1013_and_the_token_can_be_used_later(logbook: Logbook) -> None:
    async with bench(echo, settings(max_sessions=1)) as it:
        token = await it.token()
        first = await it.visit()
        refused = it.dial(token)
        assert await refused.ended() == 1013
        assert refused.accepted is not None
        assert is_short_ascii(refused.reason)
        assert not refused.frames
        await first.lose()
        await it.dial(token).next("session-start")
    assert not logged(logbook)


@virtual
async def test_one_session_more_of_an_address_gets_1013_and_its_token_can_be_used_later() -> None:
    async with bench(echo, settings(max_sessions_per_client=1)) as it:
        tokens = [await token_from(it, GLOBAL) for _ in range(2)]
        first = it.dial(tokens[0], client=(GLOBAL, 9))
        await first.next("session-start")
        assert await it.dial(tokens[1], client=(GLOBAL, 9)).ended() == 1013
        await it.dial(await token_from(it, "1.1.1.1"), client=("1.1.1.1", 9)).next("session-start")
        await first.lose()
        await it.dial(tokens[1], client=(GLOBAL, 9)).next("session-start")


@virtual
async def test_a_process_that_fills_while_the_greeting_is_made_still_has_its_limit() -> None:
    async with bench(echo, settings(max_sessions=2, greeting=slow_greeting)) as it:
        visitors = [it.dial(token) for token in [await it.token() for _ in range(6)]]
        await asyncio.sleep(2)
        assert sorted(visitor.code or 0 for visitor in visitors) == [0, 0, 1013, 1013, 1013, 1013]
        assert len(it.desk.sessions) == 2


class Deserter(Visitor):
    """Leaves before the server's first word arrives, as uvicorn tells it."""

    async def _receive(self, event: Any) -> None:
        raise OSError(event)


@pytest.mark.parametrize("token", [None, forge(session="a")])
@virtual
async def test_a_visitor_who_leaves_during_the_handshake_is_no_error(logbook: Logbook, token: str | None) -> None:
    async with bench(echo) as it:
        deserter = Deserter(it.app, ["chat-session.v1", f"token.{token}"], {}, ("127.0.0.1", 9))
        await deserter.ended()
        assert not it.desk.sessions
    assert not logged(logbook)


# ---- The widget's route ----------------------------------------------------------------------------------------------


@virtual
async def test_the_widget_is_served_with_a_tag_a_short_cache_life_and_nosniff() -> None:
    async with bench(echo) as it:
        response = await it.client.get("/chat/widget.js")
        assert response.status_code == 200
        assert response.content == Path(chat_session.__file__).with_name("widget.js").read_bytes()
        assert response.headers["content-type"].replace(" ", "") == "text/javascript;charset=utf-8"
        assert re.fullmatch(r'"[\w-]+"', response.headers["etag"])
        life = re.search(r"max-age=(\d+)", response.headers["cache-control"])
        assert life is not None
        assert 0 < int(life[1]) <= 3600
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "set-cookie" not in response.headers


@pytest.mark.parametrize("known", ["{}", "W/{}", '"x", {}', '"x",{},"y"', '"x" , W/{} ', "*"])
@virtual
async def test_the_widget_answers_304_to_a_page_that_has_it(known: str) -> None:
    async with bench(echo) as it:
        tag = (await it.client.get("/chat/widget.js")).headers["etag"]
        response = await it.client.get("/chat/widget.js", headers={"if-none-match": known.format(tag)})
        assert response.status_code == 304
        assert response.content == b""
        assert response.headers["etag"] == tag
        assert "max-age" in response.headers["cache-control"]


@pytest.mark.parametrize("known", ["", '"x"', 'W/"x"', "x", '"x", "y"', ",", "\u00ff"])
@virtual
async def test_the_widget_answers_200_to_a_page_that_has_another(known: str) -> None:
    async with bench(echo) as it:
        tag = (await it.client.get("/chat/widget.js")).headers["etag"]
        for each in (known, tag.strip('"'), tag[:-2] + '"'):
            headers = {"if-none-match": each.encode("latin-1")}
            assert (await it.client.get("/chat/widget.js", headers=cast("Any", headers))).status_code == 200


def test_a_widget_that_is_not_beside_the_module_is_told_when_the_app_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(chat_session, "__file__", str(tmp_path / "chat_session.py"))
    with pytest.raises(ImproperlyConfiguredException) as caught:
        Litestar(plugins=[ChatSessionPlugin(echo, settings())])
    assert "widget.js" in caught.value.detail
    assert "serve_widget" in caught.value.detail
    Litestar(plugins=[ChatSessionPlugin(echo, settings(serve_widget=False))])


@virtual
async def test_without_serve_widget_there_is_no_such_route_and_the_chat_works() -> None:
    async with bench(echo, settings(serve_widget=False)) as it:
        assert (await it.client.get("/chat/widget.js")).status_code == 404
        assert (await (await it.visit()).ask("hello")).text == "hello "


# ---- Beside everything that a host may have --------------------------------------------------------------------------


class DoorKeeper(AbstractAuthenticationMiddleware):
    """The host's login: nobody comes in without a name."""

    async def authenticate_request(self, connection: Connection) -> AuthenticationResult:
        if "x-user" not in connection.headers:
            raise NotAuthorizedException
        return AuthenticationResult(user=connection.headers["x-user"], auth=None)


async def find_user(session: dict[str, Any], _connection: Connection) -> Any:
    return session.get("user")


def by_session() -> SessionAuth[Any, ServerSideSessionBackend]:
    return SessionAuth[Any, ServerSideSessionBackend](
        retrieve_user_handler=find_user, session_backend_config=ServerSideSessionConfig()
    )


# Hooks and guards are async here: Litestar runs others in threads, and a virtual clock does not wait for threads.
async def calls_nothing_off(_request: Request[Any, Any, Any]) -> None: ...


async def connect_database() -> AsyncIterator[str]:
    yield "database"


def tell_politely(_request: Request[Any, Any, Any], error: HTTPException) -> Response[dict[str, str]]:
    return Response({"polite": error.detail}, status_code=error.status_code)


class ShopRequest(Request[Any, Any, Any]):
    pass


HOSTS: dict[str, Callable[[], dict[str, Any]]] = {
    "CSRF protection": lambda: {"csrf_config": CSRFConfig(secret="s" * 32)},
    "CSRF protection by another key": lambda: {"csrf_config": CSRFConfig("s" * 32, exclude_from_csrf_key="no_csrf")},
    "an auth middleware": lambda: {"middleware": [DoorKeeper]},
    "session auth": lambda: {"on_app_init": [by_session().on_app_init]},
    "a session middleware": lambda: {"middleware": [ServerSideSessionConfig().middleware]},
    "a rate limit": lambda: {"middleware": [RateLimitConfig(("minute", 1000)).middleware]},
    "CORS for its friends": lambda: {"cors_config": CORSConfig(allow_origins=["https://friend.example"])},
    "CORS for all": lambda: {"cors_config": CORSConfig(allow_origins=["*"])},
    "compression": lambda: {"compression_config": CompressionConfig(backend="gzip", minimum_size=1)},
    "logging_config=None": lambda: {"logging_config": None},
    "a cache_control": lambda: {"cache_control": CacheControlHeader(max_age=3600, public=True)},
    "allowed hosts": lambda: {"allowed_hosts": ["test"]},
    "a before_request": lambda: {"before_request": calls_nothing_off},
    "dependencies": lambda: {"dependencies": {"database": Provide(connect_database)}},
    "exception handlers": lambda: {"exception_handlers": {HTTPException: tell_politely}},
    "a request class": lambda: {"request_class": ShopRequest},
    "response headers": lambda: {"response_headers": {"x-frame-options": "DENY"}},
    "debug": lambda: {"debug": True},
    "all at once": lambda: {
        "csrf_config": CSRFConfig(secret="s" * 32),
        "middleware": [DoorKeeper, ServerSideSessionConfig().middleware],
        "cors_config": CORSConfig(allow_origins=["https://friend.example"], allow_credentials=True),
        "compression_config": CompressionConfig(backend="gzip", minimum_size=1),
        "cache_control": CacheControlHeader(max_age=3600),
        "allowed_hosts": ["test"],
    },
}


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("origin", [None, "http://test", SHOP])
@virtual
async def test_the_routes_work_and_set_no_cookie_on_a_host_that_has(
    logbook: Logbook, name: str, origin: str | None
) -> None:
    async with bench(echo, settings(allowed_origins=[SHOP]), **HOSTS[name]()) as it:
        await talk(it, **({} if origin is None else {"origin": origin}))
    assert not logged(logbook)


@virtual
async def test_the_routes_work_under_the_hosts_path_prefix() -> None:
    async with bench(echo, path="/v1") as it:
        await talk(it, "/v1/chat")
        assert (await it.client.post("/chat/token")).status_code == 404


@virtual
async def test_the_hosts_own_routes_are_as_protected_as_before() -> None:
    @post("/order")
    async def order() -> str:
        return "ordered"

    options = HOSTS["CSRF protection"]() | HOSTS["CORS for its friends"]()
    async with bench(echo, settings(allowed_origins=[SHOP]), route_handlers=[order], **options) as it:
        assert (await it.client.post("/order")).status_code == 403
        assert cors_of(await it.client.post("/order", headers={"origin": SHOP}))[0] == []
        friend = "https://friend.example"
        assert cors_of(await it.client.post("/order", headers={"origin": friend}))[0] == [friend]
    async with bench(echo, route_handlers=[order], **HOSTS["an auth middleware"]()) as it:
        assert (await it.client.post("/order")).status_code == 401
    async with bench(echo, route_handlers=[order], **HOSTS["session auth"]()) as it:
        assert (await it.client.post("/order")).status_code == 401


@pytest.mark.parametrize(
    "cors",
    [
        {"allow_origins": [SHOP]},
        {"allow_origins": [SHOP], "allow_credentials": True},
        {"allow_origins": ["*"]},
        {"allow_origins": ["*"], "allow_credentials": True},
        {"allow_origins": ["https://friend.example"]},
        {"allow_origins": [], "allow_origin_regex": r"https://.*\.example"},
    ],
    ids=str,
)
@pytest.mark.parametrize("cookie", [{}, {"cookie": "a=b"}])
@virtual
async def test_a_host_with_cors_of_its_own_sends_just_one_allow_origin_that_lets_the_page_read(
    cors: dict[str, Any], cookie: dict[str, str]
) -> None:
    config = settings(allowed_origins=[SHOP], tokens_per_minute=1)
    async with bench(echo, config, cors_config=CORSConfig(**cors)) as it:
        answers = [await mint_from(it, GLOBAL, origin=SHOP, **cookie) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [201, 429]
        for answer in answers:
            (allowed,) = cors_of(answer)[0]
            assert allowed in (SHOP, "*")
            assert cors_of(answer)[1], "Retry-After must be exposed"


@virtual
async def test_a_host_that_compresses_serves_the_same_widget_and_answers_304() -> None:
    async with bench(echo, **HOSTS["compression"]()) as it:
        plain = await it.client.get("/chat/widget.js", headers={"accept-encoding": "identity"})
        squeezed = await it.client.get("/chat/widget.js", headers={"accept-encoding": "gzip"})
        assert squeezed.headers["content-encoding"] == "gzip"
        assert squeezed.content == plain.content
        headers = {"accept-encoding": "gzip", "if-none-match": squeezed.headers["etag"]}
        again = await it.client.get("/chat/widget.js", headers=headers)
        assert (again.status_code, again.content) == (304, b"")


@virtual
async def test_a_hosts_cache_control_changes_neither_the_token_nor_the_widget() -> None:
    async with bench(echo, **HOSTS["a cache_control"]()) as it:
        assert (await it.mint()).headers.get_list("cache-control") == ["no-store"]
        (life,) = (await it.client.get("/chat/widget.js")).headers.get_list("cache-control")
        assert "3600" not in life


@virtual
async def test_a_hosts_hooks_and_exception_handlers_see_the_routes_as_any_other() -> None:
    seen: list[str] = []

    async def note(request: Request[Any, Any, Any]) -> None:
        seen.append(request.url.path)

    options = HOSTS["exception handlers"]()
    async with bench(echo, settings(max_sessions=1), before_request=note, **options) as it:
        await talk(it)
        assert seen == ["/chat/widget.js", "/chat/token"]
        full = await it.mint()
        assert (full.status_code, list(full.json())) == (503, ["polite"])


@virtual
async def test_a_hosts_dependencies_are_not_held_open_by_a_chat() -> None:
    opened: list[str] = []

    async def connect() -> AsyncIterator[str]:
        opened.append("database")
        yield "database"

    async with bench(echo, dependencies={"database": Provide(connect)}) as it:
        await talk(it)
        assert not opened


@virtual
async def test_a_visitor_callable_sees_the_hosts_session() -> None:
    sessions = ServerSideSessionConfig()

    @post("/login")
    async def login(request: Request[Any, Any, Any]) -> None:
        request.set_session({"user": "ann"})

    def visitor(request: Request[Any, Any, Any]) -> str | None:
        return cast("str | None", request.session.get("user"))

    options = {"route_handlers": [login], "middleware": [sessions.middleware]}
    async with bench(echo, settings(visitor=visitor), **options) as it:
        assert read_token(it, await it.token()).visitor is None
        it.client.cookies.clear()
        await it.client.post("/login")
        assert read_token(it, await it.token()).visitor == "ann"


async def let_nobody_in(_connection: Connection, _handler: Any) -> None:
    raise PermissionDeniedException(detail="not today")


@virtual
async def test_guards_are_handed_to_every_route() -> None:
    async with bench(echo, settings(guards=[let_nobody_in])) as it:
        assert (await it.client.get("/chat/widget.js")).status_code == 403
        refused = await it.mint()
        assert (refused.status_code, refused.json()["detail"]) == (403, "not today")
        visitor = it.dial(forge(session="s"))
        await visitor.ended()
        assert visitor.accepted is None
        assert not visitor.frames


@virtual
async def test_opt_is_handed_to_every_route_and_stands_above_the_plugins_own() -> None:
    seen: list[tuple[bool, bool, bool]] = []

    async def look(_connection: Connection, handler: Any) -> None:
        seen.append((handler.opt["public"], handler.opt["exclude_from_csrf"], handler.opt["exclude_from_auth"]))

    config = settings(guards=[look], opt={"public": True, "exclude_from_auth": False})
    async with bench(echo, config) as it:
        await talk(it)
    assert seen == [(True, True, False)] * 3


@virtual
async def test_opt_opens_the_routes_where_the_hosts_auth_has_another_key() -> None:
    login = DefineMiddleware(DoorKeeper, exclude_from_auth_key="public")
    async with bench(echo, middleware=[login]) as it:
        assert (await it.mint()).status_code == 401
    async with bench(echo, settings(opt={"public": True}), middleware=[login]) as it:
        await talk(it)


@virtual
async def test_middleware_is_handed_to_every_route() -> None:
    seen: list[str] = []

    def note(app: Any) -> Any:
        async def call(scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope["path"])
            await app(scope, receive, send)

        return call

    async with bench(echo, settings(middleware=[note])) as it:
        await talk(it)
    assert seen == ["/chat/widget.js", "/chat/token", "/chat/socket"]


@contextlib.asynccontextmanager
async def no_lifespan(_app: Litestar) -> AsyncIterator[None]:
    yield


class Nothing(InitPlugin):
    """A plugin of the host's."""


@get("/home")
async def home() -> str:
    return "home"


def test_the_plugin_adds_its_routes_and_its_drain_and_changes_none_of_the_hosts_settings() -> None:
    config = AppConfig(
        route_handlers=[home],
        lifespan=[no_lifespan],
        plugins=[Nothing()],
        csrf_config=CSRFConfig(secret="s" * 32),
        cors_config=CORSConfig(allow_origins=["https://friend.example"]),
        compression_config=CompressionConfig(backend="gzip"),
        middleware=[DoorKeeper],
        guards=[let_nobody_in],
        dependencies={"database": Provide(connect_database)},
        opt={"mine": 1},
        exception_handlers={HTTPException: tell_politely},
        logging_config=None,
        path="/v1",
    )
    names = [each.name for each in dataclasses.fields(AppConfig)]
    before = {name: getattr(config, name) for name in names}
    copies = {name: list(value) if isinstance(value, list) else value for name, value in before.items()}
    contents = {name: dict(value) for name, value in before.items() if isinstance(value, dict)}
    after = ChatSessionPlugin(echo, settings()).on_app_init(config)
    assert after is config
    for name in names:
        assert getattr(after, name) is before[name], f"{name} was replaced"
        if name in {"route_handlers", "plugins"}:
            assert list(getattr(after, name))[: len(copies[name])] == copies[name]
            assert len(getattr(after, name)) - len(copies[name]) == (4 if name == "route_handlers" else 1)
        elif isinstance(before[name], (list, dict)):
            assert getattr(after, name) == contents.get(name, copies[name]), f"{name} was changed"
    assert config.csrf_config == CSRFConfig(secret="s" * 32)
    assert config.cors_config == CORSConfig(allow_origins=["https://friend.example"])
    assert config.compression_config == CompressionConfig(backend="gzip")


class Engine(InitPlugin):
    """Stands for a database, whose lifespan a plugin adds that its plugin adds."""

    def __init__(self, notes: list[str], inner: Engine | None = None) -> None:
        self.notes = notes
        self.inner = inner

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        if self.inner is None:
            cast("Any", app_config).lifespan.append(self.run)
        else:
            app_config.plugins.append(self.inner)
        return app_config

    @contextlib.asynccontextmanager
    async def run(self, _app: Litestar) -> AsyncIterator[None]:
        yield
        self.notes.append("the database is closed")


@virtual
async def test_what_is_listed_before_the_chat_outlives_its_drain_also_where_it_brings_plugins_along() -> None:
    notes: list[str] = []

    async def save(row: SessionRow) -> None:
        await asyncio.sleep(1)
        notes.append(f"saved {row.end_reason}")

    plugin = ChatSessionPlugin(echo, settings(rows=save))
    it = bench_of(Litestar(plugins=[Engine(notes, Engine(notes)), plugin], openapi_config=None))
    async with it.app.lifespan(), it.client:
        visitor = await it.visit()
        visitor.say("one two three")
        await visitor.next("text-delta")
    await visitor.ended()
    assert notes == ["saved None", "saved restart", "the database is closed"]


def test_the_routes_do_not_show_in_the_hosts_openapi_schema() -> None:
    app = Litestar([home], plugins=[ChatSessionPlugin(echo, settings())])
    assert list(app.openapi_schema.paths or {}) == ["/home"]


@contextlib.asynccontextmanager
async def two_mounts(one: ChatSessionPlugin, other: ChatSessionPlugin) -> AsyncIterator[Callable[..., Awaitable[Any]]]:
    """An app with two plugins; what is given mints a token at a path, or opens a socket there with one."""
    app = Litestar(plugins=[one, other], openapi_config=None)
    visitors: list[Visitor] = []
    async with app.lifespan(), caller(app) as client:

        async def come(path: str, token: str | None = None) -> Any:
            if token is None:
                return (await client.post(f"{path}/token")).json()["token"]
            offered = ["chat-session.v1", f"token.{token}"]
            visitors.append(Visitor(elsewhere(app, f"{path}/socket"), offered, {}, ("127.0.0.1", 9)))
            return visitors[-1]

        yield come
        for visitor in visitors:
            if not visitor.task.done():
                await visitor.lose()


@virtual
async def test_two_plugins_on_two_paths_are_two_chats() -> None:
    async def shout(chat: Chat) -> str:
        return chat.message.upper()

    support = ChatSessionPlugin(shout, settings(path="/support", greeting="Support here"))
    async with two_mounts(ChatSessionPlugin(echo, settings()), support) as come:
        for path, greeting, reply in [
            ("/chat", "Hi! How can I help?", "hello "),
            ("/support", "Support here", "HELLO"),
        ]:
            visitor = await come(path, await come(path))
            assert (await visitor.ask("hello")).text == reply
            assert visitor.frames[0]["greeting"] == greeting


@virtual
async def test_a_token_opens_one_session_also_where_two_mounts_share_a_secret() -> None:
    members = ChatSessionPlugin(echo, settings(path="/members", visitor=not_signed_in))
    async with two_mounts(ChatSessionPlugin(echo, settings()), members) as come:
        token = await come("/chat")
        await (await come("/chat", token)).next("session-start")
        assert await (await come("/members", token)).ended() == 3000


@virtual
async def test_a_token_of_an_open_mount_is_none_of_a_mount_that_wants_a_login() -> None:
    members = ChatSessionPlugin(echo, settings(path="/members", visitor=not_signed_in))
    async with two_mounts(ChatSessionPlugin(echo, settings()), members) as come:
        assert await (await come("/members", await come("/chat"))).ended() == 3000


# ---- The wire --------------------------------------------------------------------------------------------------------


@virtual
async def test_session_start_is_the_first_frame_and_tells_the_page_the_limits() -> None:
    config = settings(greeting="Hello", idle_timeout=120, ping_interval=7.5, max_message_chars=99, max_pending=2)
    async with bench(echo, config) as it:
        visitor = await it.visit()
        assert visitor.frames == [
            {
                "type": "session-start", "sessionId": read_token(it, it.tokens[id(visitor)]).session,
                "greeting": "Hello", "idleTimeout": 120, "pingInterval": 7.5, "maxMessageChars": 99, "maxPending": 2,
            }
        ]  # fmt: skip


@virtual
async def test_a_reply_is_start_text_start_deltas_text_end_and_finish_with_the_fields_of_ui_message_chunks() -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        visitor.say("hello", "m-1")
        await visitor.next("start")
        assert len(visitor.frames) == 2, "text-start comes just before the first words"
        script.say("one ")
        await visitor.next("text-delta")
        script.say(Source("https://shop.example/a", "A page"), Source("/b"), "two", None)
        await visitor.next("finish")
        reply_id = visitor.frames[1]["messageId"]
        one, two = visitor.of("source-url")
        assert one["sourceId"] != two["sourceId"]
        assert [frame for frame in visitor.frames[1:] if frame["type"] != "source-url"] == [
            {"type": "start", "messageId": reply_id, "messageMetadata": {"inReplyTo": "m-1"}},
            {"type": "text-start", "id": reply_id},
            {"type": "text-delta", "id": reply_id, "delta": "one "},
            {"type": "text-delta", "id": reply_id, "delta": "two"},
            {"type": "text-end", "id": reply_id},
            {"type": "finish"},
        ]
        assert one == {"type": "source-url", "sourceId": one["sourceId"], "url": SHOP + "/a", "title": "A page"}
        assert two == {"type": "source-url", "sourceId": two["sourceId"], "url": "/b", "title": ""}


@virtual
async def test_message_ids_are_random_and_never_used_again() -> None:
    async with bench(echo) as it:
        ids = [(await visitor.ask("a")).id for visitor in [await it.visit() for _ in range(3)] for _ in range(3)]
        assert len(set(ids)) == 9


@virtual
async def test_a_stopped_reply_ends_with_abort_stopped_after_text_end_where_there_was_a_text_start() -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        visitor.say("hello", "a")
        await visitor.next("start")
        visitor.send("stop", id="a")
        await visitor.next("abort")
        visitor.say("hello", "b")
        script.say("one ")
        await visitor.next("text-delta")
        visitor.send("stop")
        await visitor.next("abort")
        kinds = [frame["type"] for frame in visitor.frames]
        assert kinds == ["session-start", "start", "abort", "start", "text-start", "text-delta", "text-end", "abort"]
        assert visitor.of("abort") == [{"type": "abort", "reason": "stopped"}] * 2


@pytest.mark.parametrize("is_early", [True, False])
@virtual
async def test_an_error_carries_a_friendly_text_and_nothing_of_the_exception(
    logbook: Logbook, *, is_early: bool
) -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        visitor.say("hello", "a")
        script.say(*([] if is_early else ["one "]), ValueError("a secret of the host"))
        failed = await visitor.next("error")
        assert set(failed) == {"type", "errorText"}
        assert failed["errorText"]
        assert "secret" not in "".join(visitor.raw)
        kinds = [frame["type"] for frame in visitor.frames[2:-1]]
        assert kinds == ([] if is_early else ["text-start", "text-delta", "text-end"])
    assert len(logged(logbook)) == 1


@virtual
async def test_a_reply_that_shutdown_cuts_ends_with_abort_interrupted() -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        visitor.say("hello", "a")
        script.say("one ")
        await visitor.next("text-delta")
        await it.desk.drain()
        assert await visitor.ended() == 1012
        assert is_short_ascii(visitor.reason)
        tail = [frame for frame in visitor.frames if frame["type"] in {"text-end", "abort", "session-end"}]
        assert tail[1:] == [{"type": "abort", "reason": "interrupted"}, {"type": "session-end", "reason": "restart"}]


@virtual
async def test_end_answers_session_end_visitor_and_1000() -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        visitor.send("end")
        assert await visitor.ended() == 1000
        assert visitor.frames[-1] == {"type": "session-end", "reason": "visitor"}
        assert is_short_ascii(visitor.reason)


def message_frame(message_id: str, text: str) -> str:
    return json.dumps({"type": "message", "id": message_id, "text": text})


DEEP = "[" * 30_000 + "]" * 30_000
INVALID: list[tuple[str, str | None]] = [
    *((text, None) for text in ("", " ", "nonsense", "[]", "null", "5", '"x"', "true", "{", "}{", "\x00", "\ufeff{}")),
    *((text, None) for text in ("{}", '{"type":null}', '{"type":5}', '{"type":["message"]}', '{"type":"nope"}')),
    *((text, None) for text in ('{"type":"MESSAGE"}', '{"type":"message"}', '{"typ":"stay"}', '{"type":"ping"}')),
    ('{"type":"nope","id":"x"}', "x"),
    ('{"type":"message","id":"x"}', "x"),
    ('{"type":"message","text":"hi"}', None),
    *((f'{{"type":"message","id":"x","text":{each}}}', "x") for each in ("null", "5", "true", '["hi"]', '{"a":"hi"}')),
    *((f'{{"type":"message","id":{each},"text":"hi"}}', None) for each in ("null", "5", "1.5", "true", '["x"]', "{}")),
    *((message_frame(each, "hi"), None) for each in ("", "x" * 65, "x\n", "\nx", " ", "a b", "a.b", "a/b", "x\ud83d")),
    *((message_frame(each, "hi"), None) for each in ("\u00e9", "\u0661", "\uff41", "a\x00")),
    *((message_frame("x", each), "x") for each in ("\ud83d", "a\ude00b", "\ude00\ud83d")),
    ('{"type":"stop","id":5}', None),
    ('{"type":"stop","id":["x"]}', None),
    ('{"type":"message","id":"x","text":"hi"} {"type":"end"}', None),
    ('{"type":"message","id":"x","text":"hi",}', None),
    ("{'type':'message','id':'x','text':'hi'}", None),
    ('{"type":"message","id":"x","text":"line\nline"}', None),
    ('{"type":"message","id":"x","text":"\\q"}', None),
    ("9" * 5000, None),
    ('{"type":"nope","id":' + "9" * 5000 + "}", None),
    *((text % DEEP, None) for text in ("%s", '{"type":%s}', '{"type":"message","id":"x","text":"hi","more":%s}')),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message_id"), INVALID, ids=[text[:60] for text, _ in INVALID])
@virtual
async def test_a_frame_that_is_none_of_the_protocol_is_rejected_as_invalid_and_the_session_goes_on(
    logbook: Logbook, text: str, message_id: str | None
) -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        visitor.put(text)
        rejected = await visitor.next("message-rejected")
        assert (rejected["code"], rejected["id"]) == ("invalid", message_id)
        assert set(rejected) == {"type", "id", "code", "detail"}
        assert len(rejected["detail"]) > 15
        assert (await visitor.ask("hello", "x")).text == "hello "
    assert not logged(logbook, logging.WARNING)[1:], "at most the one line about the proxy"


@virtual
async def test_unknown_fields_are_ignored() -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        visitor.send("message", id="a", text="hello", ids=["x"], code="x", future={"deep": [1, None, 1e300]})
        assert (await visitor.next("finish")) == {"type": "finish"}
        for kind in ("stay", "pong", "stop", "end"):
            visitor.send(kind, future=1, text=5)
        assert await visitor.ended() == 1000
        assert not visitor.of("message-rejected")


@pytest.mark.parametrize("kind", ["stay", "pong", "stop"])
@virtual
async def test_stay_pong_and_stop_are_fine_at_any_time_and_answer_nothing(kind: str) -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        for _ in range(5):
            visitor.send(kind)
        visitor.send("stop", id="never-sent")
        visitor.send("stop", id=None)
        visitor.send("stop", id="not an id at all " * 9)
        assert (await visitor.ask("hello")).text == "hello "
        assert len(visitor.of("message-rejected")) == 0


@pytest.mark.parametrize("message_id", ["a", "Z", "0", "_", "-", "aZ0_-", "x" * 64])
@virtual
async def test_an_id_has_1_to_64_letters_digits_underscores_and_hyphens(message_id: str) -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        assert (await visitor.ask("hello", message_id)).in_reply_to == message_id


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u00a0\u2003\u3000", "\x1f"])
@virtual
async def test_white_space_alone_is_rejected_as_empty_and_the_id_is_not_taken(text: str) -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        visitor.say(text, "a")
        rejected = await visitor.next("message-rejected")
        assert (rejected["id"], rejected["code"]) == ("a", "empty")
        assert set(rejected) == {"type", "id", "code", "detail"}
        assert "write" in rejected["detail"]
        assert (await visitor.ask("hello", "a")).text == "hello "


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\U0001f600", "\u0301", "\x00"])
@virtual
async def test_lengths_are_code_points_and_a_longer_message_is_rejected_as_too_long(letter: str) -> None:
    async with bench(echo, settings(max_message_chars=20)) as it:
        visitor = await it.visit()
        visitor.say(letter * 21, "a")
        rejected = await visitor.next("message-rejected")
        assert (rejected["id"], rejected["code"]) == ("a", "too-long")
        assert "20 characters" in rejected["detail"]
        assert "retryAfter" not in rejected
        told = await visitor.ask(letter * 20, "a")
        assert told.text == letter * 20 + " "


@pytest.mark.parametrize("limit", [0, 1, 4])
@virtual
async def test_more_waiting_messages_than_max_pending_are_rejected_as_too_many_until_one_is_answered(
    limit: int,
) -> None:
    script = Script()
    async with bench(script, settings(max_pending=limit)) as it:
        visitor = await it.visit()
        for number in range(limit + 1):
            visitor.say("hello", f"m{number}")
        visitor.say("hello", "late")
        rejected = await visitor.next("message-rejected")
        assert (rejected["id"], rejected["code"]) == ("late", "too-many")
        assert "again" in rejected["detail"]
        assert len(visitor.of("message-rejected")) == 1
        script.say(None)
        await visitor.next("finish")
        visitor.say("hello", "late")
        for _ in range(limit + 1):
            script.say(None)
            await visitor.next("finish")
        assert [told.in_reply_to for told in visitor.replies] == [*(f"m{n}" for n in range(limit + 1)), "late"]
        assert len(visitor.of("message-rejected")) == 1


@virtual
async def test_more_messages_a_minute_are_rejected_as_rate_limited_and_retry_after_honoured_means_success() -> None:
    async with bench(echo, settings(messages_per_minute=4)) as it:
        visitor = await it.visit()
        for number in range(4):
            await visitor.ask("hello", f"m{number}")
        for number in range(6):
            visitor.say("hello", f"n{number}")
            rejected = await visitor.next("message-rejected")
            assert (rejected["id"], rejected["code"]) == (f"n{number}", "rate-limited")
            wait = rejected["retryAfter"]
            assert isinstance(wait, int)
            assert 1 <= wait <= 15
            assert str(wait) in rejected["detail"]
            await asyncio.sleep(wait)
            assert (await visitor.ask("hello", f"n{number}")).text == "hello "


@virtual
async def test_a_message_that_is_taken_back_while_it_waits_is_rejected_as_cancelled_and_its_id_is_free_again() -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        visitor.say("first", "a")
        visitor.say("second", "b")
        visitor.send("stop", id="b")
        rejected = await visitor.next("message-rejected")
        assert (rejected["id"], rejected["code"]) == ("b", "cancelled")
        assert set(rejected) == {"type", "id", "code", "detail"}
        script.say(None)
        await visitor.next("finish")
        assert len(script.chats) == 1
        script.say("yes", None)
        assert (await visitor.ask("second", "b")).text == "yes"


@virtual
async def test_an_id_that_the_session_has_taken_is_not_answered_again() -> None:
    script = Script()
    async with bench(script) as it:
        visitor = await it.visit()
        for _ in range(2):
            visitor.say("first", "a")
            visitor.say("second", "b")
        script.say("one", None, "two", None)
        await visitor.next("finish")
        await visitor.next("finish")
        visitor.say("something else", "a")
        visitor.say("", "b")
        visitor.say("x" * 5000, "a")
        script.say("three", None)
        await visitor.ask("third", "c")
        assert [told.text for told in visitor.replies] == ["one", "two", "three"]
        assert [chat.message for chat in script.chats] == ["first", "second", "third"]
        assert not visitor.of("message-rejected")


@virtual
async def test_a_binary_frame_is_closed_with_1003() -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        visitor.put(None, b'{"type":"message","id":"a","text":"hi"}')
        assert await visitor.ended() == 1003
        assert is_short_ascii(visitor.reason)
        assert len(visitor.frames) == 1, "a close code alone is never the end: there is no session-end"


@virtual
async def test_the_third_invalid_frame_of_a_session_is_rejected_and_closed_with_1008() -> None:
    async with bench(echo) as it:
        visitor = await it.visit()
        visitor.put("nonsense")
        await visitor.ask("hello")
        visitor.put("nonsense")
        visitor.say("", "a")
        visitor.say("x" * 5000, "b")
        await visitor.ask("hello, again")
        visitor.put("nonsense")
        assert await visitor.ended() == 1008
        assert is_short_ascii(visitor.reason)
        assert [each["code"] for each in visitor.of("message-rejected")].count("invalid") == 3
        assert not visitor.of("session-end")


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\U0001f600"])
@virtual
async def test_1009_comes_for_a_frame_of_more_than_16_bytes_per_allowed_character(letter: str) -> None:
    async with bench(echo, settings(max_message_chars=100)) as it:

        def frame(size: int) -> str:
            start = '{"type":"message","id":"a","text":"hello","more":"'
            text = start + letter * ((size - len(start) - 2) // len(letter.encode()))
            return text + "x" * (size - len(text.encode()) - 2) + '"}'

        visitor = await it.visit()
        assert len(frame(1600).encode()) == 1600
        visitor.put(frame(1600))
        await visitor.next("finish")
        visitor.put(frame(1601))
        assert await visitor.ended() == 1009
        assert is_short_ascii(visitor.reason)
        assert not visitor.of("session-end")


@virtual
async def test_a_message_of_the_longest_text_fits_its_frame_however_it_is_escaped() -> None:
    async with bench(echo, settings(max_message_chars=100)) as it:
        visitor = await it.visit()
        for number, letter in enumerate(["\U0001f600", "\u0301", '"', "\\", "x"]):
            visitor.put(json.dumps({"type": "message", "id": f"{number}".zfill(64), "text": letter * 100}))
            await visitor.next("finish")
        assert [told.text for told in visitor.replies] == [
            f"{each * 100} " for each in ("\U0001f600", "\u0301", '"', "\\", "x")
        ]


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, OSError, TimeoutError])
@virtual
async def test_1011_is_our_bug_and_is_logged_by_its_type_and_frames_alone(
    logbook: Logbook, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    quoted = "hunter2"

    def fail(*_arguments: object) -> None:
        raise error(quoted)

    async with bench(echo) as it:
        visitor = await it.visit()
        monkeypatch.setattr(chat_session._Conversation, "message", fail)
        visitor.say("hello")
        assert await visitor.ended() == 1011
        assert is_short_ascii(visitor.reason)
        assert quoted not in "".join(visitor.raw)
        assert not visitor.of("session-end")
        assert not it.desk.sessions
    (line,) = logged(logbook)
    assert error.__name__ in line
    assert quoted not in line
    assert "hello" not in line


@pytest.mark.parametrize("error", [ValueError, RuntimeError, OSError])
@virtual
async def test_a_client_address_that_fails_at_the_socket_is_closed_with_1011_and_logged(
    logbook: Logbook, error: type[Exception]
) -> None:
    def by_header(connection: Connection) -> str:
        if connection.scope["path"] == "/chat/socket":
            raise error
        return "x"

    async with bench(echo, settings(client_address=by_header)) as it:
        visitor = it.dial(await it.token())
        assert await visitor.ended() == 1011
        assert not visitor.frames
    (line,) = logged(logbook)
    assert error.__name__ in line


def test_close_reasons_are_short_ascii_constants() -> None:
    assert {code.value for code in chat_session._REASONS} >= {1000, 1003, 1008, 1009, 1011, 1012, 1013, 3000}
    assert all(is_short_ascii(reason) for reason in chat_session._REASONS.values())


# ---- Fuzz: frames and tokens of every wrong kind ---------------------------------------------------------------------

FUZZ_SEED = 20261122
FRAME_SEEDS = [
    json.dumps({"type": "message", "id": "m1", "text": "do you ship to Canada?"}),
    json.dumps({"type": "message", "id": "m2", "text": "\u00e9\U0001f600\u0301"}, ensure_ascii=False),
    json.dumps({"type": "message", "id": "m3", "text": '\U0001f600\\"\n'}),
    json.dumps({"type": "stop", "id": "m1"}),
    *(json.dumps({"type": kind}) for kind in ("stop", "stay", "end", "pong", "ping", "session-end")),
]
CRUMBS = [
    *string.printable, "\x00", "\x7f", "\u00e9", "\u2028", "\ufeff", "\ufffe", "\U0001f600", "\\ud83d", "\\ude00",
    "\\u0000", "null", "NaN", "Infinity", "1e999", "9" * 400, "[" * 600, "{" * 600, '{"a":' * 300, '"type":', '"id":',
    '"text":', '"stop"', '"end"', '{"type":"message","id":"', '","text":"', "/*", "//", "\r\n", "%s", "{0}",
]  # fmt: skip


def mutate(rng: random.Random, text: str, crumbs: list[str]) -> str:
    """Damage *text* in one to four places."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice((0, 1, 1, 2, 8)))
        kind = rng.randrange(6)
        if kind == 0:
            text = text[:start] + text[end:]
        elif kind == 1:
            text = text[:start] + rng.choice(crumbs) + text[end:]
        elif kind == 2:
            text = text[:start] + rng.choice(crumbs) + text[start:]
        elif kind == 3:
            text = text[:start] + text[start:end] * rng.choice((2, 3, 50)) + text[end:]
        elif kind == 4:
            text = text[:start] + text[start:end].swapcase() + text[end:]
        else:
            text = text[:start]
    return text


@virtual
async def test_ten_thousand_frames_of_every_wrong_kind_cause_no_error_no_1011_and_no_wrong_acceptance(
    logbook: Logbook, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(FUZZ_SEED)
    taken: list[str] = []
    read: list[str] = []
    asked: list[str] = []
    codes: set[int | None] = set()
    really_read, really_take = chat_session._Line._read, chat_session._Conversation.message

    def note_read(line: Any, text: Any) -> None:
        read.append(text)
        really_read(line, text)

    def note_taken(conversation: Any, message_id: str, text: str) -> None:
        taken.append(read[-1])
        really_take(conversation, message_id, text)

    async def answer(chat: Chat) -> str:
        asked.append(chat.message)
        return "yes"

    monkeypatch.setattr(chat_session._Line, "_read", note_read)
    monkeypatch.setattr(chat_session._Conversation, "message", note_taken)
    config = settings(max_message_chars=200, messages_per_minute=10_000, max_pending=100)
    async with bench(answer, config) as it:
        while len(read) < 10_000:
            visitor = it.dial(forge(session=f"s{len(read)}"))
            for _ in range(rng.randrange(1, 9)):
                visitor.put(mutate(rng, rng.choice(FRAME_SEEDS), CRUMBS))
            await visitor.next("session-start")
            await asyncio.sleep(0.1)
            if visitor.code is None:
                assert (await visitor.ask("still there?", "the-last")).text == "yes"
                await visitor.lose()
            await visitor.ended()
            codes.add(visitor.code)
            assert len(visitor.of("message-rejected")) <= 8
            it.visitors.clear()
    assert codes <= {None, 1000, 1008, 1009}
    assert {None, 1000, 1008} <= codes
    assert not logged(logbook)
    for text in asked:
        text.encode()
        assert text.strip()
        assert len(text) <= 200
    for text in taken:
        frame = json.loads(text)
        assert frame["type"] == "message"
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", frame["id"])
        frame["text"].encode()
    assert len(taken) > 500, "the fuzz must also get through"


TOKEN_CRUMBS = [
    *string.ascii_letters,
    *string.digits,
    *"-_.=~+/ \n\x00%",
    "\u00e9",
    "\u0130",
    "\uff41",
    "\U0001f600",
    "v1",
    "...",
    "A" * 3000,
]


def damaged_tokens(rng: random.Random, tokens: list[str], count: int) -> list[str]:
    """*count* texts that nobody has signed."""
    texts: list[str] = []
    while len(texts) < count:
        token = rng.choice(tokens)
        kind = rng.randrange(8)
        if kind < 5:
            text = mutate(rng, token, TOKEN_CRUMBS)
        elif kind == 5:  # the fields of one with the MAC of another
            text = token.rpartition(".")[0] + "." + rng.choice(tokens).rpartition(".")[2]
        elif kind == 6:  # the fields in another order, or moved across their dots
            fields = token.split(".")
            rng.shuffle(fields)
            text = ".".join(fields)
        else:  # the last letter of base64 has bits that say nothing
            text = token[:-1] + rng.choice(string.ascii_letters + string.digits + "-_=")
        if text not in tokens:
            texts.append(text)
    return texts


def fuzz_tokens() -> list[str]:
    origin, visitor = chat_session._digest(SHOP), "ann@shop.example"
    return [
        forge(session="one"),
        forge(session="two", origin=origin),
        forge(session="three", previous="one"),
        forge(session="four", origin=origin, previous="two", visitor=visitor),
        forge(session="five", visitor=""),
        forge(session="six", expires=1.0),
    ]


def test_of_ten_thousand_damaged_tokens_none_is_verified_and_none_raises() -> None:
    tokens, keys = fuzz_tokens(), ring("n" * 32, SECRET)
    for text in damaged_tokens(random.Random(FUZZ_SEED), tokens, 10_000):
        assert chat_session._Token.verify(keys, text) is None, repr(text)
    for text in tokens:
        assert chat_session._Token.verify(keys, text) is not None
        assert chat_session._Token.verify(ring("n" * 32), text) is None


@virtual
async def test_of_hundreds_of_damaged_tokens_none_opens_a_session_or_carries_a_reply_and_none_is_an_error(
    logbook: Logbook,
) -> None:
    tokens = fuzz_tokens()
    async with bench(echo) as it:
        for text in damaged_tokens(random.Random(FUZZ_SEED + 1), tokens, 400):
            visitor = it.dial(text)
            assert await visitor.ended() == 3000, repr(text)
            assert visitor.accepted is not None
            assert not visitor.frames
            it.visitors.clear()
        for text in damaged_tokens(random.Random(FUZZ_SEED + 2), tokens, 200):
            if text.strip() not in tokens:
                assert read_token(it, await it.token(text)).previous == ""
        assert await it.dial(tokens[0]).next("session-start")
    assert not logged(logbook)


@virtual
async def test_whoever_has_only_the_shape_of_a_token_has_nothing() -> None:
    async with bench(echo) as it:
        good = await it.token()
        fields, _, mac = good.rpartition(".")
        for text in (
            f"{fields}.",
            f".{mac}",
            f"{fields}..{mac}",
            f"{fields}.{mac}.{mac}",
            mac,
            fields,
            good.upper(),
            f" {good}",
        ):
            assert await it.dial(text).ended() == 3000
        await it.dial(good).next("session-start")


def test_a_mac_is_of_the_tokens_context_and_no_other_hmac_of_the_key_will_do() -> None:
    fields = forge().rpartition(".")[0]
    for message in (fields.encode(), b"v1" + fields.encode(), b"chat_session" + fields.encode()):
        for key in (SECRET.encode(), *ring(SECRET)):
            mac = chat_session._base64(hmac.digest(key, message, "sha256"))
            assert chat_session._Token.verify(ring(SECRET), f"{fields}.{mac}") is None


class CountingStore(MemoryStore):
    """Counts the calls, and fails or hangs when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.fault: BaseException | None = None

    async def _note(self, call: str) -> None:
        self.calls.append(call)
        if self.fault is not None:
            raise self.fault

    async def get(self, key: str, renew_for: Any = None) -> bytes | None:
        await self._note(f"get {key}")
        return await super().get(key, renew_for)

    async def set(self, key: str, value: str | bytes, expires_in: Any = None) -> None:
        await self._note(f"set {key}")
        assert type(expires_in) is int
        assert expires_in >= 1
        await super().set(key, value, expires_in)

    async def delete(self, key: str) -> None:
        await self._note(f"delete {key}")
        await super().delete(key)


@contextlib.asynccontextmanager
async def workers(answer: Any, **options: Any) -> AsyncIterator[tuple[Bench, Bench, CountingStore]]:
    """Run two workers that share a store."""
    store = CountingStore()
    config = settings(rows=store, **options)
    async with bench(answer, config) as one, bench(answer, config) as two:
        yield one, two, store


async def move(visitor: Visitor, old: Bench, new: Bench) -> Visitor:
    """Come back to another worker."""
    new.tokens[id(visitor)] = old.tokens[id(visitor)]
    return await new.visit(visitor)


# ---- Several workers -------------------------------------------------------------------------------------------------


@virtual
async def test_a_reply_is_carried_live_to_another_worker() -> None:
    script = Script()
    async with workers(script) as (one, two, _store):
        first = await one.visit()
        first.say("hello", "a")
        script.say("one ", "two ")
        await first.next("text-delta")
        await first.lose()
        second = await move(first, one, two)
        second.say("hello", "a")
        second.say("and then?", "b")
        since = now()
        await second.next("text-delta", seconds=1.5)
        assert now() - since < 1.5
        script.say("three ")
        await second.next("text-delta", seconds=1.5)
        script.say("four", None)
        since = now()
        await second.next("finish", seconds=0.5)
        script.say("that", None)
        await second.next("finish")
        assert [told.text for told in second.replies] == ["one two three four", "that"]
        assert [m["content"] for m in script.chats[1].messages] == ["hello", "one two three four", "and then?"]


@virtual
async def test_a_dead_link_is_taken_over_by_another_worker() -> None:
    script = Script()
    async with workers(script) as (one, two, _store):
        first = await one.visit()
        first.answers_pings = False
        first.say("hello", "a")
        script.say("one ", "two ")
        await first.next("text-delta")
        await asyncio.sleep(3)
        since = now()
        second = await move(first, one, two)
        second.say("hello", "a")
        await second.next("text-delta")
        assert now() - since <= 1.5
        assert (await first.next("session-end"))["reason"] == "replaced"
        script.say("three", None)
        await second.next("finish")
        assert [told.text for told in second.replies] == ["one two three"]
        assert len(script.chats) == 1


@virtual
async def test_a_worker_that_is_gone_is_not_waited_for_and_the_message_is_answered_again() -> None:
    async with workers(echo) as (one, two, store):
        first = await one.visit()
        kept = dict(store._store)
        assert (await first.ask("hello", "a")).text == "hello "
        await first.lose()
        store._store = kept  # as if the worker had been killed before it wrote the end
        second = await move(first, one, two)
        since = now()
        told = await second.ask("hello", "a")
        assert told.text == "hello "
        assert now() - since < 5


@virtual
async def test_a_worker_that_dies_while_it_is_followed_interrupts_its_reply() -> None:
    script = Script()
    async with workers(script) as (one, two, _store):
        first = await one.visit()
        first.say("hello", "a")
        script.say("one ", "two ")
        await first.next("text-delta")
        await first.lose()
        second = await move(first, one, two)
        second.say("hello", "a")
        await second.next("text-delta")
        one.desk.rows.put = lambda *_args: None  # killed: it writes nothing any more
        since = now()
        assert (await second.next("abort"))["reason"] == "interrupted"
        assert now() - since < 6
        script.say(None)


@virtual
async def test_a_conversation_of_five_turns_makes_at_most_four_store_calls() -> None:
    async with workers(echo) as (one, _two, store):
        visitor = await one.visit()
        for turn in range(5):
            await visitor.ask(f"this is turn {turn}")
        visitor.send("end")
        await visitor.ended()
    assert len(store.calls) <= 4, store.calls


@virtual
async def test_a_token_opens_one_session_across_workers() -> None:
    async with workers(echo) as (one, two, _store):
        token = await one.token()
        first = one.dial(token)
        await first.next("session-start")
        await asyncio.sleep(0.1)
        second = two.dial(token)
        assert await second.ended() == 3000
        assert (await first.ask("still here?")).text == "still here? "


HERE = Path(__file__).resolve().parent
PATIENCE = 30.0  # How long anything may take before the test fails: far above what it takes, so no test is a race.


# ---- The app: word i of a reply is a function of the message and of i ------------------------------------------------

APP = """
import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from litestar import Litestar, get

from chat_session import Chat, ChatSessionConfig, ChatSessionPlugin, SessionRow

started: Counter[str] = Counter()
running: Counter[str] = Counter()
ROWS = Path("rows.jsonl")


async def answer(chat: Chat) -> AsyncIterator[str]:
    name, count, pause = chat.message.split()
    started[chat.message] += 1
    running[chat.message] += 1
    try:
        for number in range(int(count)):
            await asyncio.sleep(float(pause))
            yield f"{name}.{number * number} "
    finally:
        running[chat.message] -= 1


async def save(row: SessionRow) -> None:
    with ROWS.open("ab") as rows:
        rows.write(msgspec.json.encode(row) + b"\\n")


@get("/count", sync_to_thread=False)
def count() -> dict[str, object]:
    return {"started": started, "running": +running, "tasks": len(asyncio.all_tasks()), "process": os.getpid()}


config = ChatSessionConfig(
    secret="a key that only these tests know", rows=save, messages_per_minute=1_000_000, OPTIONS
)
app = Litestar([count], plugins=[ChatSessionPlugin(answer, config)])
"""


def ask_for(name: str, words: int, pause: float = 0) -> str:
    """Write the message whose reply is *words* words of *name*, with a *pause* before each."""
    return f"{name} {words} {pause}"


def whole_reply(text: str) -> str:
    """Tell the whole reply to a message that *ask_for* wrote."""
    name, count, _ = text.split()
    return "".join(f"{name}.{number * number} " for number in range(int(count)))


# ---- Servers ---------------------------------------------------------------------------------------------------------

Kind = Literal["uvicorn", "granian", "hypercorn"]
#: granian 2.8 sometimes dies of this at SIGTERM, with any app that has open sockets: nothing after it is ours.
GRANIAN_PANIC = "Cannot drop pointer into Python heap"


def _command(kind: Kind, port: int) -> list[str]:
    address = f"127.0.0.1:{port}"
    arguments = {
        "uvicorn": ["uvicorn", "--port", str(port), "--ws-per-message-deflate", "false"],
        "granian": ["granian", "--interface", "asgi", "--port", str(port), "--workers-kill-timeout", "60"],
        "hypercorn": ["hypercorn", "--bind", address],
    }
    return [sys.executable, "-m", *arguments[kind], "app:app"]


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@dataclass
class Server:
    """A real server process that serves the test app, started on entry and killed on exit if it still runs."""

    kind: Kind
    folder: Path
    options: str = ""
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] = field(init=False)
    app: str = APP
    arguments: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)  # for the environment

    def __enter__(self) -> Self:
        """Start the server, and wait until it answers."""
        (self.folder / "app.py").write_text(self.app.replace("OPTIONS", self.options))
        environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1", **self.names}
        with (self.folder / "log").open("wb") as log:
            command = [*_command(self.kind, self.port), *self.arguments]
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
        try:
            wait_until(self._answers, f"{self.kind} answers")
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind."""
        self._kill()

    def _answers(self) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"{self.kind} did not start:\n{self.log()}")
        with contextlib.suppress(httpx.TransportError):
            return bool(self.count())
        return False

    def _kill(self) -> None:
        """Kill the process and its workers, which share no group with the tests' own."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        self.process.kill()
        self.process.wait()

    def count(self) -> dict[str, Any]:
        """Ask the app which answerers it has started and how many tasks it has."""
        counts: dict[str, Any] = httpx.get(f"http://127.0.0.1:{self.port}/count").json()
        return counts

    def log(self) -> str:
        """Read all that the server has printed."""
        return (self.folder / "log").read_text(errors="replace")

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Read what was saved of each session, oldest first."""
        rows: dict[str, list[dict[str, Any]]] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in (self.folder / "rows.jsonl").read_text().splitlines():
                row = json.loads(line)
                rows.setdefault(row["id"], []).append(row)
        return rows

    def terminate(self) -> tuple[float, int]:
        """Send SIGTERM, and tell how many seconds the process took to exit and with which code."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        return self.wait(began)

    def wait(self, began: float) -> tuple[float, int]:
        """Wait for the process to exit."""
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.kind} still runs {PATIENCE:g} s after SIGTERM:\n{self.log()}")
        return time.monotonic() - began, code


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Poll until *true*, or fail."""
    end = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"not within {PATIENCE:g} s: {what}")
        time.sleep(0.02)


# ---- The proxy -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What happens to a websocket after so many frames from the server have passed."""

    after: int
    manner: Literal["reset", "end", "silence", "stall"]


@dataclass
class Proxy:
    """A TCP proxy in front of a server. Each new websocket takes the next of *faults*; none left, none happens.

    ``reset`` is a TCP reset to both sides, ``end`` a plain end of the stream without a close frame, ``silence`` a dead
    link that nobody is told of, ``stall`` a visitor who goes on sending but reads nothing more.
    """

    target: int
    faults: deque[Fault] = field(default_factory=deque)
    delay: float = 0.0
    bytes_per_second: float = 0.0
    cuts: Counter[str] = field(default_factory=Counter)
    frames: list[int] = field(default_factory=list)
    port: int = 0
    _links: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """End every link and stop listening."""
        self._server.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.get_running_loop().create_task(self._link(reader, writer))
        self._links.add(link)
        link.add_done_callback(self._links.discard)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection until one side ends it or its fault happens."""
        try:
            upstream = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        up = asyncio.create_task(self._carry(reader, upstream[1]))
        down = asyncio.create_task(self._down(upstream[0], writer))
        try:
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            fault = down.result() if down.done() and not down.cancelled() else None
            if fault is not None:
                await self._strike(fault, up, (writer, upstream[1]))
        finally:
            up.cancel()
            down.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
            for end in (writer, upstream[1]):
                end.close()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Fault | None:
        """Carry what the server sends; return the fault once it is due."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, OSError):
            return None
        await self._pass_on(head, writer)
        if b" 101 " not in head.split(b"\r\n", 1)[0]:
            await self._carry(reader, writer)
            return None
        fault, place = self.faults.popleft() if self.faults else None, len(self.frames)
        self.frames.append(0)
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while fault is None or self.frames[place] < fault.after:
                await self._pass_on(await read_frame(reader), writer)
                self.frames[place] += 1
            return fault
        return None

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._pass_on(data, writer)

    async def _pass_on(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        """Write, as late and as slowly as the line is said to be."""
        if self.delay or self.bytes_per_second:
            await asyncio.sleep(self.delay + (len(data) / self.bytes_per_second if self.bytes_per_second else 0))
        writer.write(data)
        await writer.drain()

    async def _strike(
        self, fault: Fault, up: asyncio.Task[None], ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    ) -> None:
        self.cuts[fault.manner] += 1
        if fault.manner == "reset":
            for end in ends:
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.transport.abort()
        elif fault.manner == "stall":
            await up
        elif fault.manner == "silence":
            up.cancel()
            await asyncio.Event().wait()


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """Read one whole websocket frame of a server, header included."""
    head = await reader.readexactly(2)
    size, extra = head[1] & 0x7F, b""
    if size >= 126:
        extra = await reader.readexactly(2 if size == 126 else 8)
        size = int.from_bytes(extra, "big")
    return head + extra + await reader.readexactly(size)


# ---- The page's side of the contract ---------------------------------------------------------------------------------


@dataclass
class Shown:
    """A reply as the page shows it."""

    id: str
    message: str
    text: str = ""
    outcome: str = "streaming"


class Gone(Exception):  # noqa: N818
    """The connection is no more."""


@dataclass
class Talk:
    """A visitor who follows the contract: applies frames, answers pings, comes back, sends again what is unanswered."""

    port: int
    asked: dict[str, str] = field(default_factory=dict)
    shown: dict[str, Shown] = field(default_factory=dict)  # by message id: the newest reply to it
    reply_ids: dict[str, set[str]] = field(default_factory=dict)  # by message id: every reply id it ever had
    ended: set[str] = field(default_factory=set)  # the messages of which a reply was once seen to end
    rejected: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)  # the reasons of session-end
    codes: list[int | None] = field(default_factory=list)  # how each connection closed
    frames: Counter[str] = field(default_factory=Counter)
    previous: str | None = None
    max_on_wire: int = 5
    base: str = "/chat"
    _token: str = ""
    _current: Shown | None = None
    _whole: Shown | None = None  # what was shown of a reply that is being sent once more
    _socket: ClientConnection | None = None
    _is_greeted: bool = False  # before session-start, a message might go to a session that this page never hears of
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    # What a test does.

    async def __aenter__(self) -> Self:
        """Be there, and come back whenever the connection goes."""
        self._life = asyncio.create_task(self._live())
        await self.until(lambda: bool(self.sessions))
        return self

    async def __aexit__(self, *_: object) -> None:
        """Leave without a word."""
        self._life.cancel()
        await asyncio.wait({self._life}, timeout=PATIENCE)

    async def say(self, text: str) -> str:
        """Send a message, now or as soon as there is a connection, and return its id."""
        message = f"m{len(self.asked)}"
        self.asked[message] = text
        if self._is_greeted and len(self.unanswered()) <= self.max_on_wire:
            await self._send({"type": "message", "id": message, "text": text})
        return message

    def unanswered(self) -> list[str]:
        """Tell which messages have seen no end of a reply."""
        return [message for message in self.asked if message not in self.ended]

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait until *true*, which is asked after each frame."""
        async with asyncio.timeout(PATIENCE):
            while not true():
                if self._life.done():
                    await self._life
                    raise Gone(self.codes)
                self._news.clear()
                await self._news.wait()

    async def until_answered(self) -> None:
        """Wait until each message has its reply."""
        await self.until(lambda: not self.unanswered())

    # What the page does by itself.

    async def _live(self) -> None:
        pause = 0.02
        while True:
            sessions = len(self.sessions)
            with contextlib.suppress(Gone, OSError, httpx.TransportError, InvalidHandshake, InvalidMessage, EOFError):
                await self._connect()
            self._news.set()
            if self.ends and self.ends[-1] != "restart":
                return
            pause = 0.02 if len(self.sessions) > sessions else min(2 * pause, 2.0)
            await asyncio.sleep(random.uniform(0, pause))

    async def _connect(self) -> None:
        """Live one connection to its end."""
        self._token = await self._fetch_token()
        protocols = [Subprotocol("chat-session.v1"), Subprotocol(f"token.{self._token}")]
        address = f"ws://127.0.0.1:{self.port}{self.base}/socket"
        options: dict[str, Any] = {"compression": None, "ping_interval": None, "proxy": None, "close_timeout": 0.1}
        async with connect(address, subprotocols=protocols, **options) as self._socket:
            try:
                async for frame in self._socket:
                    await self._apply(json.loads(frame))
                    self._news.set()
            except ConnectionClosed:
                pass
            finally:
                self.codes.append(self._socket.close_code)
                if self._current is not None and self._whole is not None:
                    self.shown[self._whole.message] = self._whole
                self._socket, self._current, self._whole, self._is_greeted = None, None, None, False

    async def _fetch_token(self) -> str:
        fields = {} if self.previous is None else {"previous": self.previous}
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            answer = await client.post(f"http://127.0.0.1:{self.port}{self.base}/token", data=fields, timeout=PATIENCE)
        if answer.status_code != 201:
            raise Gone(answer.status_code)
        return str(answer.json()["token"])

    async def _send(self, frame: dict[str, Any]) -> None:
        if self._socket is not None:
            with contextlib.suppress(ConnectionClosed):
                await self._socket.send(json.dumps(frame))

    async def _apply(self, frame: dict[str, Any]) -> None:
        kind = frame["type"]
        self.frames[kind] += 1
        if kind == "session-start":
            await self._begin(frame)
        elif kind == "start":
            self._start(frame)
        elif kind == "text-delta":
            self._running(frame["id"]).text += frame["delta"]
        elif kind in {"finish", "abort", "error"}:
            await self._finish(kind, frame)
        elif kind == "message-rejected":
            self.rejected.append(frame)
        elif kind == "session-end":
            self.ends.append(frame["reason"])
        elif kind == "ping":
            await self._send({"type": "pong"})

    async def _begin(self, frame: dict[str, Any]) -> None:
        """Remember the token, and send again what is unanswered."""
        self.sessions.append(frame["sessionId"])
        self.previous, self.max_on_wire = self._token, frame["maxPending"] + 1
        for message in self.unanswered()[: self.max_on_wire]:
            await self._send({"type": "message", "id": message, "text": self.asked[message]})
        self._is_greeted = True

    def _start(self, frame: dict[str, Any]) -> None:
        """Show a new reply, or one that is known anew from its first word."""
        message = frame["messageMetadata"]["inReplyTo"]
        self._whole = self.shown[message] if message in self.ended else None
        self._current = self.shown[message] = Shown(frame["messageId"], message)
        self.reply_ids.setdefault(message, set()).add(frame["messageId"])

    def _running(self, reply: str) -> Shown:
        if self._current is None or self._current.id != reply:
            raise AssertionError(f"words of {reply} while {self._current} runs")
        return self._current

    async def _finish(self, kind: str, frame: dict[str, Any]) -> None:
        """End the running reply, and send what did not fit on the wire before."""
        if self._current is None:
            raise AssertionError(f"{kind} without a start")
        self._current.outcome = frame.get("reason", kind)
        self.ended.add(self._current.message)
        self._current = self._whole = None
        for message in self.unanswered()[self.max_on_wire - 1 : self.max_on_wire]:
            await self._send({"type": "message", "id": message, "text": self.asked[message]})


def check_whole_and_once(talk: Talk, started: dict[str, int]) -> None:
    """Check that each message has its exact reply, from one answerer, under one id."""
    for message, text in talk.asked.items():
        assert talk.shown[message].outcome == "finish", (text, talk.shown[message])
        assert talk.shown[message].text == whole_reply(text)
        assert started[text] == 1, (text, message, talk.sessions)
        assert len(talk.reply_ids[message]) == 1, text
    assert not talk.rejected


def check_log(server: Server) -> None:
    """Check that nothing was worth an ERROR or a traceback."""
    log = server.log()
    assert "Traceback" not in log, log
    assert "ERROR" not in log, log


# ---- Tests -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["uvicorn", "granian"])
def real_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve the test app by each server in turn."""
    with Server(request.param, tmp_path_factory.mktemp(request.param)) as server:
        yield server


@pytest.mark.parametrize("manner", ["reset", "end"])
@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 7, 12, 22, 23, 24, 25])
def test_a_reply_cut_between_two_frames_arrives_whole_and_once(
    real_server: Server, after: int, manner: Literal["reset", "end"]
) -> None:
    async def scenario() -> Talk:
        async with Proxy(real_server.port) as proxy:
            proxy.faults.append(Fault(after, manner))
            async with Talk(proxy.port) as talk:
                await talk.say(ask_for(f"cut-{manner}-{after}", 20, 0.02))
                await talk.say(ask_for(f"next-{manner}-{after}", 5))
                await talk.until_answered()
                return talk

    check_whole_and_once(asyncio.run(scenario()), real_server.count()["started"])


@pytest.mark.parametrize("at_once", [1, 4])
def test_two_hundred_cuts_in_a_row_lose_and_double_nothing(real_server: Server, at_once: int) -> None:
    chance = random.Random(f"cuts on {real_server.kind}")

    async def scenario() -> Talk:
        async with Proxy(real_server.port) as proxy:
            proxy.faults.extend(Fault(chance.randrange(12), chance.choice(("reset", "end"))) for _ in range(200))
            async with Talk(proxy.port) as talk:
                while proxy.cuts.total() < 200:
                    await talk.say(ask_for(f"row-{at_once}-{len(talk.asked)}", chance.randrange(1, 40), 0.003))
                    await talk.until(lambda: len(talk.unanswered()) < at_once)
                await talk.until_answered()
                return talk

    check_whole_and_once(asyncio.run(scenario()), real_server.count()["started"])
    wait_until(lambda: not real_server.count()["running"], "every answerer has ended")
    check_log(real_server)
    assert "v1." not in real_server.log(), "a token shows in the log"


def test_a_visitor_whose_link_dies_silently_comes_back_and_takes_the_reply_over(real_server: Server) -> None:
    async def scenario() -> tuple[Talk, Talk]:
        async with Proxy(real_server.port) as proxy:
            proxy.faults.append(Fault(6, "silence"))
            async with Talk(proxy.port) as dead:
                await dead.say(ask_for("silent", 30, 0.02))
                await dead.until(lambda: bool(dead.shown) and dead.shown["m0"].text.count(" ") >= 3)
                async with Talk(proxy.port, asked=dead.asked, previous=dead.previous) as talk:
                    await talk.until_answered()
                    return dead, talk

    dead, talk = asyncio.run(scenario())
    assert dead.shown["m0"].id == talk.shown["m0"].id
    check_whole_and_once(talk, real_server.count()["started"])
    wait_until(
        lambda: real_server.rows()[dead.sessions[0]][-1]["end_reason"] == "replaced", "the dead session is replaced"
    )


def outlive_panic(kind: Kind, folder: Path, scenario: Callable[[Server], None], options: str = "") -> None:
    """Run *scenario* on a fresh server; where granian panicked, which it does with any app, run it again."""
    for attempt in range(5):
        place = folder / str(attempt)
        place.mkdir()
        with Server(kind, place, options) as server:
            try:
                scenario(server)
            except (AssertionError, TimeoutError):
                if kind != "granian" or GRANIAN_PANIC not in server.log():
                    raise
            else:
                return
    pytest.skip("granian panicked five times in a row")


def has_begun(talk: Talk) -> bool:
    """Tell whether some words of the first reply are there."""
    return "m0" in talk.shown and talk.shown["m0"].text.count(" ") >= 2


async def terminate(server: Server) -> tuple[float, int]:
    """Send SIGTERM and wait, while the visitors live on."""
    return await asyncio.to_thread(server.terminate)


@pytest.mark.timeout(300)  # a server that panics by itself is tried five times
@pytest.mark.parametrize("kind", ["uvicorn", "granian", "hypercorn"])
def test_a_deploy_in_the_middle_of_replies_finishes_the_short_and_keeps_the_long(kind: Kind, tmp_path: Path) -> None:
    async def deploy(server: Server) -> tuple[list[Talk], list[Talk], float]:
        async with contextlib.AsyncExitStack() as stack:
            short = [await stack.enter_async_context(Talk(server.port)) for _ in range(5)]
            long = [await stack.enter_async_context(Talk(server.port)) for _ in range(5)]
            for talk in short:
                await talk.say(ask_for(f"short{short.index(talk)}", 20, 0.05))
            for talk in long:
                await talk.say(ask_for(f"long{long.index(talk)}", 2000, 0.05))
            for talk in (*short, *long):
                await talk.until(functools.partial(has_begun, talk))
            seconds, _ = await terminate(server)
            return short, long, seconds

    def scenario(server: Server) -> None:
        short, long, seconds = asyncio.run(deploy(server))
        rows = {name: saved[-1] for name, saved in server.rows().items()}
        for talk, status in [(t, "finished") for t in short] + [(t, "interrupted") for t in long]:
            row, text = rows[talk.sessions[0]], talk.asked["m0"]
            assert row["ended_at"] is not None
            assert row["end_reason"] in {"restart", "dropped"}
            assert row["reply"]["status"] == status
            assert whole_reply(text).startswith(row["reply"]["text"])
            assert row["reply"]["text"].startswith(talk.shown["m0"].text)
        assert all(rows[talk.sessions[0]]["reply"]["text"] == whole_reply(talk.asked["m0"]) for talk in short)
        assert seconds < PATIENCE

    outlive_panic(kind, tmp_path, scenario, "shutdown_grace=4.0")


@pytest.mark.timeout(300)  # a server that panics by itself is tried five times
@pytest.mark.parametrize("kind", ["uvicorn", "granian", "hypercorn"])
def test_hundreds_of_idle_visitors_do_not_hold_up_a_deploy(kind: Kind, tmp_path: Path) -> None:
    async def deploy(server: Server) -> tuple[list[Talk], float]:
        async with contextlib.AsyncExitStack() as stack:
            talks = [await stack.enter_async_context(Talk(server.port)) for _ in range(200)]
            seconds, _ = await terminate(server)
            return talks, seconds

    def scenario(server: Server) -> None:
        talks, seconds = asyncio.run(deploy(server))
        reasons = [saved[-1]["end_reason"] for saved in server.rows().values()]
        assert len(reasons) == len(talks)
        assert set(reasons) <= {"restart", "dropped"}
        assert seconds < 25.0, "nothing runs, so nothing is worth the grace of 28 s"

    outlive_panic(kind, tmp_path, scenario, "shutdown_grace=28.0")


README = Path(__file__).with_name("README.md")

# ---- Two workers behind a balancer -----------------------------------------------------------------------------------

StoreKind = Literal["files", "redis"]

#: As the other test app, with rows in a store that two workers share; what they do is written where both write.
SHARED_APP = """
import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from granian.utils.proxies import wrap_asgi_with_proxy_headers
from litestar import Litestar, Request, get
from litestar.stores.file import FileStore
from litestar.stores.redis import RedisStore

from chat_session import Chat, ChatSessionConfig, ChatSessionPlugin

running: list[str] = []
SHARED = Path(os.environ["SHARED"])
WORKER = os.environ["WORKER"]


def note(file: str, line: str) -> None:
    with (SHARED / file).open("a") as notes:
        notes.write(f"{WORKER} {line}\\n")


def greet(connection: Any) -> str:
    note("greeted", "a visitor")
    return WORKER


async def answer(chat: Chat) -> AsyncIterator[str]:
    name, count, pause = chat.message.split()
    note("started", chat.message)
    running.append(chat.message)
    try:
        for number in range(int(count)):
            await asyncio.sleep(float(pause))
            yield f"{name}.{number * number} "
    finally:
        running.remove(chat.message)


@get("/count", sync_to_thread=False)
def count(request: Request[Any, Any, Any]) -> dict[str, object]:
    return {"running": running, "process": os.getpid(), "client": request.client.host if request.client else ""}


url = os.environ["REDIS_URL"]
rows = RedisStore.with_client(url) if url else FileStore(SHARED / "rows")
config = ChatSessionConfig(
    secret="a key that only these tests know", greeting=greet, rows=rows, messages_per_minute=1_000_000, OPTIONS
)
site = Litestar([count], plugins=[ChatSessionPlugin(answer, config)])
app = wrap_asgi_with_proxy_headers(site, trusted_hosts="127.0.0.1") if os.environ["KIND"] == "granian" else site
"""


def find_program(name: str) -> str:
    """Find a program of Debian's, some of which are where only root looks."""
    program = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        missing(name)
    return str(program)


@dataclass
class RedisServer:
    """A real Redis, without persistence."""

    folder: Path
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, empty."""
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        program = find_program("redis-server")
        with (self.folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen([program, *options], cwd=self.folder, stdout=log, stderr=log)
        wait_until(lambda: self.tell("PING") == "PONG", "redis answers")

    def stop(self) -> None:
        """Stop, and forget everything."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def tell(self, *command: str) -> str:
        """Give Redis a command, and return what it says."""
        program = find_program("redis-cli")
        done = subprocess.run(
            [program, "-p", str(self.port), *command], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        return done.stdout.strip()


@dataclass
class Worker(Server):
    """One of several servers of one app, which can be started again on its port."""

    name: str = "one"
    shared: Path = field(default_factory=Path)
    redis_url: str = ""

    def __enter__(self) -> Self:
        """Start, and wait until it answers."""
        self.launch()
        self.wait_for_it()
        return self

    def launch(self) -> None:
        """Start, and do not wait."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "app.py").write_text(SHARED_APP.replace("OPTIONS", self.options))
        names = {"WORKER": self.name, "SHARED": str(self.shared), "REDIS_URL": self.redis_url, "KIND": self.kind}
        paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, **names, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        command = _command(self.kind, self.port)
        command[-1:-1] = ["--timeout-graceful-shutdown", "60"] if self.kind == "uvicorn" else []
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def wait_for_it(self) -> None:
        """Wait until it answers, and leave nothing behind if it does not."""
        try:
            wait_until(self._answers, f"{self.kind} answers")
        except BaseException:
            self._kill()
            raise

    def kill(self) -> None:
        """Have it die at once, as by a fault of the machine: its own worker process, if it has one, too."""
        process = self.count()["process"]
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


@dataclass
class Fleet:
    """Two workers that share a secret and a store, and a balancer in front of them."""

    kind: Kind
    shared: Path
    one: Worker
    two: Worker
    port: int  # the balancer's

    @property
    def workers(self) -> tuple[Worker, Worker]:
        return self.one, self.two

    def named(self, name: str) -> Worker:
        return self.one if name == self.one.name else self.two

    def notes(self, file: str) -> list[tuple[str, str]]:
        """Read what the workers wrote down: which of them, and what."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.shared / file).read_text().splitlines()
            return [cast("tuple[str, str]", tuple(line.split(" ", 1))) for line in lines]
        return []

    def started(self) -> Counter[str]:
        """Tell how many answerers were started for each message."""
        return Counter(message for _, message in self.notes("started"))

    def skip_one(self) -> None:
        """Use up one turn of the balancer, so that the next request goes to the other worker."""
        httpx.get(f"http://127.0.0.1:{self.port}/count").raise_for_status()

    def log(self) -> str:
        """Read what both workers have printed."""
        return "".join(worker.log() for worker in self.workers)


@dataclass
class Traveller(Talk):
    """A visitor who notes which worker each session was on: the greeting says so."""

    places: list[str] = field(default_factory=list)

    async def _begin(self, frame: dict[str, Any]) -> None:
        self.places.append(frame["greeting"])
        await super()._begin(frame)

    @property
    def moves(self) -> int:
        """How often the visitor came back to another worker than before."""
        return sum(old != new for old, new in itertools.pairwise(self.places))


def nginx_of_the_readme() -> str:
    """Find the configuration that the README shows."""
    (block,) = re.findall(r"```nginx\n(.*?)```", README.read_text(), re.DOTALL)
    return str(block)


@contextlib.contextmanager
def balance(folder: Path, ports: tuple[int, int]) -> Iterator[int]:
    """Run nginx as the README has it, in front of two other ports, and give its own."""
    program, port, folder = find_program("nginx"), free_port(), folder.absolute()
    site = nginx_of_the_readme()
    for old, new in (("listen 80;", port), ("127.0.0.1:8001", ports[0]), ("127.0.0.1:8002", ports[1])):
        assert site.count(old) == 1
        site = site.replace(old, f"listen 127.0.0.1:{new};" if "listen" in old else f"127.0.0.1:{new}")
    temporary = "".join(f"{each}_temp_path {folder}/{each};" for each in ("proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log warn;\n"
        f"events {{ worker_connections 512; }}\n"
        f"http {{ access_log {folder}/access.log; client_body_temp_path {folder}/body; {temporary}\n{site}}}\n"
    )
    arguments = [program, "-p", str(folder), "-e", str(folder / "nginx.log"), "-c", str(folder / "nginx.conf")]
    with (folder / "nginx.out").open("wb") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=log)

    def answers() -> bool:
        if process.poll() is not None:
            pytest.fail("nginx did not start:\n" + (folder / "nginx.out").read_text())
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/count").status_code == 200
        return False

    try:
        wait_until(answers, "nginx answers")
        yield port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def fleet_of(kind: Kind, folder: Path, redis_url: str = "", options: str = "") -> Iterator[Fleet]:
    """Run two workers and a balancer."""
    shared = folder / "shared"
    shared.mkdir(parents=True)
    one, two = (
        Worker(kind, folder / name, options, name=name, shared=shared, redis_url=redis_url) for name in ("one", "two")
    )
    with contextlib.ExitStack() as stack:
        for worker in (one, two):
            worker.launch()
            stack.callback(worker._kill)
        for worker in (one, two):
            worker.wait_for_it()
        port = stack.enter_context(balance(folder, (one.port, two.port)))
        yield Fleet(kind, shared, one, two, port)


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Run a Redis for the tests that leave it in peace."""
    redis = RedisServer(tmp_path_factory.mktemp("redis"))
    redis.start()
    yield redis
    redis.stop()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """Run a Redis for one test, which may do anything to it."""
    redis = RedisServer(tmp_path)
    redis.start()
    yield redis
    redis.stop()


@pytest.fixture(
    scope="module",
    params=[("uvicorn", "files"), ("uvicorn", "redis"), ("granian", "files"), ("granian", "redis")],
    ids="-".join,
)
def fleet(
    request: pytest.FixtureRequest, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """Run two workers of each kind of server, with each kind of store."""
    kind, keeper = request.param
    with fleet_of(kind, tmp_path_factory.mktemp("fleet"), redis_server.url if keeper == "redis" else "") as fleet:
        yield fleet


async def fetch_token_from(port: int, previous: str | None = None) -> str:
    """Fetch a token without a visitor around it."""
    fields = {} if previous is None else {"previous": previous}
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(f"http://127.0.0.1:{port}/chat/token", data=fields, timeout=PATIENCE)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["token"])


def dial_socket(port: int, token: str) -> connect:
    """Open a socket with *token*, be it a used one."""
    protocols = [Subprotocol("chat-session.v1"), Subprotocol(f"token.{token}")]
    options: dict[str, Any] = {"compression": None, "ping_interval": None, "proxy": None, "close_timeout": 0.1}
    return connect(f"ws://127.0.0.1:{port}/chat/socket", subprotocols=protocols, **options)


async def frame_from(socket: ClientConnection, kind: str) -> dict[str, Any]:
    """Read frames up to one of *kind*."""
    async with asyncio.timeout(PATIENCE):
        while True:
            frame: dict[str, Any] = json.loads(await socket.recv())
            if frame["type"] == kind:
                return frame


def check_whole(talk: Talk) -> None:
    """Check that each message has its exact reply, however often it was asked."""
    for message, text in talk.asked.items():
        assert talk.shown[message].outcome == "finish", (text, talk.shown[message])
        assert talk.shown[message].text == whole_reply(text)
    assert not talk.rejected


# ---- Other clients ---------------------------------------------------------------------------------------------------

TRANSPORT = HERE / "docs" / "chat-transport.js"
CLIENTS_APP = """
import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

from litestar import Litestar, MediaType, get
from litestar.stores.file import FileStore

from chat_session import Chat, ChatSessionConfig, ChatSessionPlugin, Source

gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
started: list[str] = []


async def answer(chat: Chat) -> AsyncIterator[str | Source]:
    what, _, name = chat.message.partition(" ")
    started.append(chat.message)
    if what == "recall":
        yield " | ".join(message["content"] for message in chat.messages)
    elif what == "fail":
        yield "half "
        raise RuntimeError
    elif what == "wait":
        yield "begun "
        await gates[name].wait()
        yield "and done"
    else:
        for word in chat.message.split():
            yield f"{word} "
        yield Source("https://example.com/shipping", "Shipping")


@get("/count", sync_to_thread=False)
def count() -> dict[str, list[str]]:
    return {"started": started}


@get("/open/{name:str}", sync_to_thread=False)
def open_gate(name: str) -> None:
    gates[name].set()


@get("/", media_type=MediaType.HTML, sync_to_thread=False)
def page() -> str:
    return "<!doctype html><title>Shop</title><main></main><script src=/main.js></script>"


config = ChatSessionConfig(secret="a key that only these tests know", OPTIONS)
app = Litestar([count, open_gate, page], plugins=[ChatSessionPlugin(answer, config)])
"""

#: What each script of Node begins with: a page's globals where they are missing, and the real packages.
CLIENT = """
import { parseJsonEventStream, readUIMessageStream, uiMessageChunkSchema } from "ai"
import { Chat } from "@ai-sdk/react"
import { ChatSessionTransport } from "./chat-transport.js"

globalThis.WebSocket ??= (await import("undici")).WebSocket
const site = `http://127.0.0.1:${process.argv[2]}`
const open = (name) => fetch(`${site}/open/${name}`)
const text = (message) => message.parts.map((part) => part.text ?? "").join("")
const report = (value) => process.stdout.write(JSON.stringify(value), () => process.exit())
const told = (chat) => chat.messages.map((message) => [message.role, text(message)])

/** A chat over the transport, and what it went through. */
const start = (options = {}) => {
  const frames = [], errors = [], finishes = []
  const transport = new ChatSessionTransport({ endpoint: `${site}/chat`, onSession: (frame) => frames.push(frame) })
  const onFinish = ({ isAbort, isDisconnect, isError }) => finishes.push({ isAbort, isDisconnect, isError })
  const chat = new Chat({ transport, onError: (error) => errors.push(error), onFinish, ...options })
  const said = (words) => new Promise((resolve) => chat["~registerMessagesCallback"](() => {
    if (text(chat.messages.at(-1)) === words) resolve()
  }))
  return { chat, transport, frames, errors, finishes, said }
}
"""


@dataclass
class Client:
    """Runs scripts in Node, in a folder that has the real packages and the transport of the docs."""

    folder: Path
    port: int

    def __post_init__(self) -> None:
        """Lay the folder out."""
        self.folder.mkdir()
        (self.folder / "package.json").write_text('{"type": "module"}')
        (self.folder / "node_modules").symlink_to(node_modules())
        shutil.copy(TRANSPORT, self.folder)

    def run(self, script: str) -> Any:
        """Run *script*, and return what it reports."""
        return asyncio.run(self.run_async(script))

    async def run_async(self, script: str, port: int = 0) -> Any:
        """Run *script* while the caller's loop goes on."""
        async with self.start(script, port) as process:
            return await self.report(process)

    @contextlib.asynccontextmanager
    async def start(self, script: str, port: int = 0) -> AsyncIterator[asyncio.subprocess.Process]:
        """Start *script*, and leave nothing behind."""
        (self.folder / "script.js").write_text(f"{CLIENT}\n{script}")
        command = [find_program("node"), "script.js", str(port or self.port)]
        pipe = subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*command, cwd=self.folder, stdout=pipe, stderr=pipe)
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    @staticmethod
    async def report(process: asyncio.subprocess.Process) -> Any:
        """Wait for the script to end, and read its last line."""
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
        assert process.returncode == 0, err.decode()
        return json.loads(out)


def node_modules() -> Path:
    """Find the folder that has the packages of the AI SDK."""
    folder = Path(os.environ.get("NODE_MODULES", "node_modules")).absolute()
    for package in ("ai", "@ai-sdk/react", "esbuild", "react", "react-dom", "undici"):
        if not (folder / package).exists():
            missing(f"{package} in NODE_MODULES")
    return folder


@pytest.fixture(scope="module")
def clients_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve an answerer that cites, fails, remembers and waits to be told to go on."""
    folder = tmp_path_factory.mktemp("clients")
    with Server("uvicorn", folder, "messages_per_minute=1000", app=CLIENTS_APP) as server:
        yield server


@pytest.fixture
def client(clients_server: Server, tmp_path: Path) -> Client:
    """Give a folder for Node, with the way to the server."""
    return Client(tmp_path / "node", clients_server.port)


def test_the_stream_reader_of_the_ai_sdk_gets_whole_messages_out_of_our_frames(client: Client) -> None:
    told = client.run("""
        const { token } = await (await fetch(`${site}/chat/token`, { method: "POST" })).json()
        const socket = new WebSocket(`${site.replace("http", "ws")}/chat/socket`, ["chat-session.v1", `token.${token}`])
        const frames = []
        let heard = () => {}
        socket.onmessage = ({ data }) => { frames.push(data); heard(data) }
        const until = (type) => new Promise((resolve) => {
          heard = (data) => JSON.parse(data).type === type && resolve()
        })
        const send = (frame) => socket.send(JSON.stringify(frame))

        /** Give the frames, as they came, to the parser, the schema and the reader of the package. */
        const read = async (texts) => {
          const sse = texts.map((text) => `data: ${text}\\n\\n`).join("")
          const stream = new Blob([sse]).stream()
          const parsed = []
          for await (const each of parseJsonEventStream({ stream, schema: uiMessageChunkSchema })) parsed.push(each)
          const chunks = ReadableStream.from(parsed.filter((each) => each.success).map((each) => each.value))
          const errors = []
          let message
          for await (message of readUIMessageStream({ stream: chunks, onError: (error) => errors.push(error.message) }));
          return { refused: parsed.filter((each) => !each.success).length, last: parsed.at(-1).value, message, errors }
        }
        const replies = []
        await until("session-start")
        const greeting = await read(frames.splice(0))
        for (const [text, seen, end] of [["two words", "finish"], ["fail", "error"], ["wait stop", "text-delta", "abort"]]) {
          send({ type: "message", id: text.replace(" ", "-"), text })
          await until(seen)
          if (end) {
            send({ type: "stop" })
            await until(end)
          }
          replies.push(await read(frames.splice(0)))
        }
        send({ type: "end" })
        report({ greeting, replies })
    """)
    assert told["greeting"]["refused"] == 1, "the schema tells what is no chunk"
    finished, failed, stopped = told["replies"]
    assert [reply["refused"] for reply in told["replies"]] == [0, 0, 0]
    text, source = finished["message"]["parts"]
    assert (text["type"], text["text"], text["state"]) == ("text", "two words ", "done")
    assert source["type"] == "source-url"
    assert source["sourceId"]
    assert (source["url"], source["title"]) == ("https://example.com/shipping", "Shipping")
    assert finished["message"]["role"] == "assistant"
    assert finished["message"]["metadata"] == {"inReplyTo": "two-words"}
    assert finished["last"] == {"type": "finish"}
    assert not finished["errors"]
    assert failed["message"]["parts"][0]["text"] == "half "
    assert failed["errors"] == ["Something went wrong. Please try again."]
    assert stopped["message"]["parts"][0]["text"] == "begun "
    assert stopped["last"] == {"type": "abort", "reason": "stopped"}
    assert len({reply["message"]["id"] for reply in told["replies"]}) == 3


def test_a_chat_of_the_ai_sdk_streams_stops_fails_and_remembers_over_one_socket(client: Client) -> None:
    told = client.run("""
        const { chat, transport, frames, errors, finishes, said } = start()
        await transport.connect()
        const greeting = frames[0].greeting
        await chat.sendMessage({ text: "hello there" })
        const sources = chat.lastMessage.parts.filter((part) => part.type === "source-url")
        const { status } = chat

        const streamed = said("begun ")
        const stopping = chat.sendMessage({ text: "wait for-ever" })
        await streamed
        const streaming = chat.status
        await chat.stop()
        await stopping
        const stopped = chat.status

        await chat.sendMessage({ text: "fail" })
        const failed = { status: chat.status, message: chat.error.message, half: text(chat.lastMessage) }
        await chat.regenerate()
        await chat.sendMessage({ text: "recall" })
        const recalled = text(chat.lastMessage)

        await chat.sendMessage({ text: "x".repeat(5000) })
        const refused = { status: chat.status, code: chat.error.code, message: chat.error.message }
        transport.close()
        await new Promise((resolve) => { transport.onSession = resolve })
        report({
          greeting, sources, status, streaming, stopped, failed, recalled, refused, finishes, errors: errors.length,
          told: told(chat).slice(0, 4), sessions: frames.map((frame) => frame.type),
        })
    """)
    assert told["greeting"] == "Hi! How can I help?"
    assert told["told"] == [
        ["user", "hello there"], ["assistant", "hello there "], ["user", "wait for-ever"], ["assistant", "begun "],
    ]  # fmt: skip
    assert [source["url"] for source in told["sources"]] == ["https://example.com/shipping"]
    assert (told["status"], told["streaming"], told["stopped"]) == ("ready", "streaming", "ready")
    assert told["failed"] == {"status": "error", "message": "Something went wrong. Please try again.", "half": "half "}
    assert told["recalled"] == "hello there | hello there  | wait for-ever | begun  | recall"
    assert told["refused"]["status"] == "error"
    assert told["refused"]["code"] == "too-long"
    assert "4000" in told["refused"]["message"]
    assert [finish["isAbort"] for finish in told["finishes"]] == [False, True, False, False, False, False]
    assert told["errors"] == 3
    assert told["sessions"] == ["session-start"], "one socket served them all"


@pytest.mark.parametrize(
    ("manner", "after"), [*itertools.product(("reset", "end"), (1, 2, 3, 4)), ("silence", 1), ("silence", 4)]
)
def test_a_chat_of_the_ai_sdk_that_loses_its_connection_goes_on_with_the_reply(
    client: Client, after: int, manner: Literal["reset", "end", "silence"]
) -> None:
    async def scenario() -> Any:
        async with Proxy(client.port) as proxy:
            proxy.faults.append(Fault(after, manner))
            return await client.run_async(script.replace("NAME", f"{manner}-{after}"), proxy.port)

    script = """
        // What a page waits on a silent link before it counts as dead is forty seconds.
        const wait = globalThis.setTimeout
        globalThis.setTimeout = (act, ms, ...rest) => wait(act, ms === 40_000 ? 400 : ms, ...rest)
        const { chat, transport, frames, finishes, said } = start()
        const nothing = await transport.reconnectToStream({})
        await chat.sendMessage({ text: "wait NAME" })
        const { status, error } = chat
        const lost = { status, message: error.message, ...finishes[0], words: told(chat).at(-1) }
        globalThis.setTimeout = wait
        const begun = said("begun ")
        const back = chat.resumeStream()
        await begun
        await open("NAME")
        await back
        const whole = told(chat)
        await chat.sendMessage({ text: "recall" })
        transport.close()
        report({ nothing, lost, whole, recalled: text(chat.lastMessage), sessions: frames.length })
    """
    told = asyncio.run(scenario())
    asked = f"wait {manner}-{after}"
    assert told["nothing"] is None, "there was nothing to come back for"
    assert told["lost"]["status"] == "error"
    assert told["lost"]["isDisconnect"]
    assert "network connection" in told["lost"]["message"]
    assert told["lost"]["words"] in (["user", asked], ["assistant", ""], ["assistant", "begun "])
    assert told["whole"] == [["user", asked], ["assistant", "begun and done"]]
    assert told["recalled"] == f"{asked} | begun and done | recall"
    assert told["sessions"] == 2
    assert httpx.get(f"http://127.0.0.1:{client.port}/count").json()["started"].count(asked) == 1


def test_a_chat_of_the_ai_sdk_that_asks_again_after_a_loss_is_not_answered_twice(client: Client) -> None:
    async def scenario() -> Any:
        async with Proxy(client.port) as proxy:
            proxy.faults.append(Fault(4, "reset"))
            return await client.run_async(script, proxy.port)

    script = """
        const { chat, transport } = start()
        await chat.sendMessage({ text: "wait patiently" })
        const lost = chat.status
        await open("patiently")
        await chat.regenerate()
        const nothing = await transport.reconnectToStream({})
        const whole = told(chat)
        await chat.sendMessage({ text: "recall" })
        transport.close()
        report({ lost, nothing, whole, recalled: text(chat.lastMessage) })
    """
    told = asyncio.run(scenario())
    assert (told["lost"], told["nothing"]) == ("error", None)
    assert told["whole"] == [["user", "wait patiently"], ["assistant", "begun and done"]]
    assert told["recalled"] == "wait patiently | begun and done | recall"


@pytest.mark.parametrize("rows", ["None", "FileStore(Path('rows'))"])
def test_a_reply_that_a_restart_cuts_short_is_answered_anew_in_its_place(tmp_path: Path, rows: str) -> None:
    async def scenario(server: Server) -> Any:
        async with Client(tmp_path / "node", server.port).start(script) as process:
            assert process.stdout is not None
            assert await asyncio.wait_for(process.stdout.readline(), PATIENCE) == b"begun\n"
            await terminate(server)
            with Server("uvicorn", tmp_path, options, server.port, app=CLIENTS_APP) as again:
                httpx.get(f"http://127.0.0.1:{again.port}/open/once")
                return await Client.report(process)

    script = """
        const ends = []
        let finish
        const finished = new Promise((resolve) => { finish = resolve })
        const onFinish = ({ isDisconnect }) => {
          ends.push(isDisconnect)
          isDisconnect ? chat.resumeStream() : finish()
        }
        const { chat, transport, said } = start({ onFinish })
        const begun = said("begun ")
        chat.sendMessage({ text: "wait once" })
        await begun
        const { id } = chat.lastMessage
        console.log("begun")
        await finished
        transport.close()
        report({ ends, whole: told(chat), same: chat.lastMessage.id === id })
    """
    options = f"shutdown_grace=0.1, rows={rows}"
    with Server("uvicorn", tmp_path, options, app=CLIENTS_APP) as server:
        told = asyncio.run(scenario(server))
    assert told["whole"] == [["user", "wait once"], ["assistant", "begun and done"]]
    assert told["same"]
    assert told["ends"][0]
    assert not told["ends"][-1]


def test_a_chat_of_the_ai_sdk_that_ended_idle_begins_anew_with_the_next_message(tmp_path: Path) -> None:
    with Server("uvicorn", tmp_path, "idle_timeout=3.0, idle_warning=2.0", app=CLIENTS_APP) as server:
        told = Client(tmp_path / "node", server.port).run("""
            const { chat, transport, frames } = start()
            const ended = new Promise((resolve) => {
              transport.onSession = (frame) => frames.push(frame.type) && frame.type === "session-end" && resolve(frame.reason)
            })
            await chat.sendMessage({ text: "remember" })
            const reason = await ended
            await chat.sendMessage({ text: "recall" })
            report({ reason, frames, whole: told(chat) })
        """)
    assert told["reason"] == "idle"
    assert told["frames"] == ["session-start", "session-idle", "session-end", "session-start"]
    assert told["whole"][-1] == ["assistant", "recall"], "a new session knows nothing of the old one"


def test_an_ended_chat_a_refused_one_and_a_stop_before_the_first_word_are_told_apart(
    clients_server: Server, client: Client
) -> None:
    told = client.run("""
        const { chat, transport } = start()
        await transport.connect()
        transport.close()
        await chat.sendMessage({ text: "too late" })
        const late = chat.error.message

        const stopping = chat.sendMessage({ text: "stopped before there is a socket" })
        while (chat.status !== "submitted") await null
        await chat.stop()
        await stopping
        const stopped = [chat.status, told(chat).at(-1)]
        await chat.sendMessage({ text: "recall" })
        const fresh = text(chat.lastMessage)
        transport.close()

        const nowhere = start()
        nowhere.transport.endpoint = `${site}/nowhere`
        await nowhere.chat.sendMessage({ text: "hello" })
        const refused = [nowhere.chat.error.message, nowhere.chat.status, await nowhere.transport.reconnectToStream({})]
        report({ late, stopped, fresh, refused })
    """)
    assert told["late"] == "The chat has ended (visitor)."
    assert told["stopped"] == ["ready", ["user", "stopped before there is a socket"]]
    assert told["fresh"] == "recall"
    assert told["refused"] == ["The chat was refused (404).", "error", None]
    assert not {"too late", "stopped before there is a socket"} & set(clients_server.count()["started"])


def test_the_transport_of_the_docs_passes_the_type_checker_against_the_ai_sdk(client: Client) -> None:
    tsc = Path(os.environ.get("TSC_PATH", "tsc"))
    if not tsc.exists():
        missing("tsc")
    flags = [
        "--checkJs",
        "--allowJs",
        "--strict",
        "--noEmit",
        "--skipLibCheck",
        "--target",
        "es2022",
        "--lib",
        "es2022,dom,dom.iterable",
    ]
    modules = ["--module", "esnext", "--moduleResolution", "bundler", "--types", ""]
    done = subprocess.run(
        [tsc, *flags, *modules, TRANSPORT.name], cwd=client.folder, capture_output=True, text=True, check=False
    )
    assert done.stdout == ""


def test_the_react_component_of_the_readme_chats_stops_and_comes_back_in_a_real_browser(
    clients_server: Server, client: Client
) -> None:
    (component,) = re.findall(r"```jsx\n(.*?)```", README.read_text(), re.DOTALL)
    (client.folder / "chat.jsx").write_text(component)
    (client.folder / "main.jsx").write_text(
        'import { createRoot } from "react-dom/client"\n'
        'import { SupportChat } from "./chat.jsx"\n'
        'createRoot(document.querySelector("main")).render(<SupportChat />)\n'
    )
    esbuild: list[str | Path] = [
        client.folder / "node_modules" / ".bin" / "esbuild",
        "main.jsx",
        "--bundle",
        "--jsx=automatic",
    ]
    subprocess.run([*esbuild, "--log-level=error", "--outfile=main.js"], cwd=client.folder, check=True)

    async def say(page: AsyncPage, text: str) -> None:
        await page.get_by_label("Message").fill(text)
        await page.get_by_role("button", name="Send").click()

    async def scenario(page: AsyncPage, proxy: Proxy) -> None:
        words = page.locator("p")
        await page.route("**/main.js", lambda route: route.fulfill(path=client.folder / "main.js"))
        await page.goto(f"http://127.0.0.1:{proxy.port}/")
        await say(page, "hello there")
        await expect_async(words).to_have_text(["hello there", "hello there "])
        await say(page, "wait in-a-browser")
        await expect_async(words.nth(3)).to_have_text("begun ")
        await page.get_by_role("button", name="Stop").click()
        await say(page, "wait for-me")
        await expect_async(words.nth(5)).to_have_text("begun ")
        for link in proxy._links:
            link.cancel()
        httpx.get(f"http://127.0.0.1:{client.port}/open/for-me")
        await expect_async(words).to_have_text(
            ["hello there", "hello there ", "wait in-a-browser", "begun ", "wait for-me", "begun and done"]
        )

    async def main() -> None:
        expect_async.set_options(timeout=PATIENCE * 1000)
        async with Proxy(client.port) as proxy, async_playwright() as driver:
            if not Path(CHROMIUM).exists():
                missing(CHROMIUM)
            browser = await driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = await browser.new_page()
            page.set_default_timeout(PATIENCE * 1000)
            try:
                await scenario(page, proxy)
            finally:
                await browser.close()

    asyncio.run(main())
    assert clients_server.count()["started"].count("wait for-me") == 1


# ---- Machines: drops that come back elsewhere ------------------------------------------------------------------------


@pytest.mark.timeout(90)
def test_a_hundred_cuts_between_two_workers_lose_and_double_nothing(fleet: Fleet) -> None:
    chance = random.Random(f"cuts on two of {fleet.kind}")

    async def visit(proxy: Proxy, name: str) -> Traveller:
        async with Traveller(proxy.port) as talk:
            while proxy.cuts.total() < 100:
                await talk.say(
                    ask_for(f"{name}-{len(talk.asked)}", chance.randrange(1, 40), chance.choice((0.005, 0.05)))
                )
                await talk.until(lambda: len(talk.unanswered()) < 2)
            await talk.until_answered()
            return talk

    async def be_others() -> None:
        """Take turns at the balancer, without which a page's socket would follow its token to the same worker."""
        async with httpx.AsyncClient(trust_env=False) as client:
            while True:
                await client.get(f"http://127.0.0.1:{fleet.port}/count")
                await asyncio.sleep(chance.uniform(0, 0.05))

    async def scenario() -> list[Traveller]:
        async with Proxy(fleet.port) as proxy:
            others = asyncio.create_task(be_others())
            manners: tuple[Literal["reset", "end"], ...] = ("reset", "end")
            proxy.faults.extend(Fault(chance.randrange(12), chance.choice(manners)) for _ in range(100))
            talks = await asyncio.gather(*(visit(proxy, f"cut-{number}") for number in range(6)))
            others.cancel()
            return list(talks)

    talks = asyncio.run(scenario())
    started = fleet.started()
    for talk in talks:
        check_whole_and_once(talk, started)
    assert sum(talk.moves for talk in talks) >= 30, "half of the hundred, but for chance"
    wait_until(lambda: not any(worker.count()["running"] for worker in fleet.workers), "every answerer has ended")
    for worker in fleet.workers:
        check_log(worker)


def test_a_dead_link_that_comes_back_on_the_other_worker_takes_its_reply_along(fleet: Fleet) -> None:
    async def scenario() -> tuple[Talk, Talk, float]:
        async with Proxy(fleet.port) as proxy:
            proxy.faults.append(Fault(6, "silence"))
            async with Talk(proxy.port) as dead:
                await dead.say(ask_for("dead-link", 45, 0.1))
                await dead.until(functools.partial(has_begun, dead))
                fleet.skip_one()
                since = time.monotonic()
                async with Talk(proxy.port, asked=dead.asked, previous=dead.previous) as talk:
                    await talk.until(functools.partial(has_begun, talk))
                    seconds = time.monotonic() - since
                    await talk.until_answered()
                    return dead, talk, seconds

    dead, talk, seconds = asyncio.run(scenario())
    (first, _), (second, _) = fleet.notes("greeted")[-2:]
    assert first != second
    assert seconds < 5
    assert dead.shown["m0"].id == talk.shown["m0"].id
    check_whole_and_once(talk, fleet.started())


def test_a_drop_that_moves_on_before_the_other_worker_has_found_its_reply_costs_nothing(fleet: Fleet) -> None:
    async def scenario() -> Talk:
        async with Proxy(fleet.one.port) as proxy:
            proxy.faults.append(Fault(6, "silence"))
            async with Talk(proxy.port) as dead:
                await dead.say(ask_for("moves-on", 45, 0.1))
                await dead.until(functools.partial(has_begun, dead))
                async with Talk(fleet.two.port, asked=dead.asked, previous=dead.previous) as brief:
                    pass
                async with Talk(fleet.one.port, asked=dead.asked, previous=brief.previous) as talk:
                    await talk.until_answered()
                    return talk

    check_whole_and_once(asyncio.run(scenario()), fleet.started())


def test_a_token_used_on_both_workers_opens_one_session(fleet: Fleet) -> None:
    async def scenario() -> None:
        token = await fetch_token_from(fleet.port)
        async with dial_socket(fleet.one.port, token) as first:
            await frame_from(first, "session-start")
            await asyncio.sleep(0.3)
            async with dial_socket(fleet.two.port, token) as second:
                with pytest.raises(ConnectionClosed):
                    await frame_from(second, "finish")
                assert second.close_code == 3000
            message = ask_for("still-here", 3)
            await first.send(json.dumps({"type": "message", "id": "a", "text": message}))
            await frame_from(first, "finish")

    asyncio.run(scenario())


def test_a_visitors_own_address_comes_through_the_balancer(fleet: Fleet) -> None:
    transport = httpx.HTTPTransport(local_address="127.0.0.9")
    with httpx.Client(transport=transport, trust_env=False) as client:
        told = client.get(f"http://127.0.0.1:{fleet.port}/count", headers={"X-Forwarded-For": "6.6.6.6"})
    assert told.json()["client"] == "127.0.0.9"


# ---- Machines: a worker that dies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "keeper"), [("uvicorn", "redis"), ("granian", "files")])
def test_a_worker_killed_in_the_middle_of_a_reply_is_heard_of_within_seconds(
    kind: Kind, keeper: StoreKind, redis_server: RedisServer, tmp_path: Path
) -> None:
    async def scenario(fleet: Fleet) -> tuple[Talk, float]:
        async with Talk(fleet.port) as talk:
            await talk.say(ask_for("killed", 20, 0.1))
            await talk.until(functools.partial(has_begun, talk))
            fleet.named(fleet.notes("started")[-1][0]).kill()
            since = time.monotonic()
            reply = talk.shown["m0"].id
            await talk.until(lambda: talk.shown["m0"].id != reply or bool(talk.ended))
            seconds = time.monotonic() - since
            await talk.until_answered()
            return talk, seconds

    with fleet_of(kind, tmp_path / "fleet", redis_server.url if keeper == "redis" else "") as fleet:
        talk, seconds = asyncio.run(scenario(fleet))
        assert seconds < 8
        check_whole(talk)
        assert [name for name, _ in fleet.notes("started")] in (["one", "two"], ["two", "one"])


@pytest.mark.parametrize(("kind", "keeper"), [("uvicorn", "files"), ("granian", "redis")])
def test_a_worker_killed_while_the_other_carries_its_reply_interrupts_it(
    kind: Kind, keeper: StoreKind, redis_server: RedisServer, tmp_path: Path
) -> None:
    async def scenario(fleet: Fleet) -> tuple[Talk, float]:
        async with Talk(fleet.one.port) as talk:
            await talk.say(ask_for("carried", 200, 0.1))
            await talk.until(functools.partial(has_begun, talk))
            asked, previous = talk.asked, talk.previous
        async with Talk(fleet.two.port, asked=asked, previous=previous) as talk:
            await talk.until(functools.partial(has_begun, talk))
            fleet.one.kill()
            since = time.monotonic()
            await talk.until_answered()
            return talk, time.monotonic() - since

    with fleet_of(kind, tmp_path / "fleet", redis_server.url if keeper == "redis" else "") as fleet:
        talk, seconds = asyncio.run(scenario(fleet))
        assert seconds < 8
        assert talk.shown["m0"].outcome == "interrupted"
        assert whole_reply(talk.asked["m0"]).startswith(talk.shown["m0"].text)


# ---- Machines: a store that fails ------------------------------------------------------------------------------------


def go_down(redis: RedisServer) -> None:
    redis.stop()


def come_back(redis: RedisServer) -> None:
    redis.start()


def hold_up(redis: RedisServer) -> None:
    assert redis.tell("CLIENT", "PAUSE", "40000", "ALL") == "OK"


def go_on(redis: RedisServer) -> None:
    redis.stop()  # a pause ends with the server, which hears no command before that
    redis.start()


def be_full(redis: RedisServer) -> None:
    assert redis.tell("CONFIG", "SET", "maxmemory-policy", "noeviction") == "OK"
    assert redis.tell("CONFIG", "SET", "maxmemory", "1mb") == "OK"
    redis.tell("EVAL", "for i = 1, 100000 do redis.pcall('SET', 'filler' .. i, string.rep('x', 1000)) end", "0")
    assert "OOM" in redis.tell("SET", "one", "more")


def have_room(redis: RedisServer) -> None:
    assert redis.tell("CONFIG", "SET", "maxmemory", "0") == "OK"


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("fail", "heal"),
    [(go_down, come_back), (hold_up, go_on), (be_full, have_room)],
    ids=["down", "slow", "full"],
)
def test_chats_start_and_go_on_while_the_store_fails_and_the_log_says_so_once(
    fail: Callable[[RedisServer], None],
    heal: Callable[[RedisServer], None],
    own_redis: RedisServer,
    tmp_path: Path,
) -> None:
    def has_told(fleet: Fleet, words: str) -> Callable[[], bool]:
        return lambda: words in fleet.one.log()

    async def scenario(fleet: Fleet) -> None:
        async with Talk(fleet.one.port) as running:
            await running.say(ask_for("before", 50, 0.05))
            await running.until(functools.partial(has_begun, running))
            await asyncio.to_thread(fail, own_redis)
            since = time.monotonic()
            async with Talk(fleet.one.port) as fresh:
                await fresh.say(ask_for("fresh", 10, 0.01))
                await fresh.until_answered()
                check_whole_and_once(fresh, fleet.started())
                assert time.monotonic() - since < 3, "nobody waits for a store"
            await running.until_answered()
            check_whole_and_once(running, fleet.started())
            # A drop that comes back on another worker meanwhile is answered, if need be anew.
            async with Talk(fleet.one.port) as dropped:
                await dropped.say(ask_for("elsewhere", 20, 0.1))
                await dropped.until(functools.partial(has_begun, dropped))
            async with Talk(fleet.two.port, asked=dropped.asked, previous=dropped.previous) as back:
                await back.until_answered()
                check_whole(back)
            await asyncio.to_thread(wait_until, has_told(fleet, "rows fail"), "the log says that rows fail")
            await asyncio.to_thread(heal, own_redis)
            await asyncio.sleep(0.5)
            async with Talk(fleet.one.port) as healed:
                await healed.say(ask_for("healed", 30, 0.05))
                await asyncio.to_thread(wait_until, has_told(fleet, "rows are saved again"), "the log says it heals")
                await healed.until(functools.partial(has_begun, healed))
                asked, previous = healed.asked, healed.previous
            async with Talk(fleet.two.port, asked=asked, previous=previous) as back:
                await back.until_answered()
                check_whole_and_once(back, fleet.started())

    with fleet_of("uvicorn", tmp_path / "fleet", own_redis.url) as fleet:
        asyncio.run(scenario(fleet))
        assert fleet.one.log().count("rows fail") == 1, fleet.one.log()
        assert fleet.one.log().count("rows are saved again") == 1, fleet.one.log()


def test_a_store_that_is_flushed_costs_no_more_than_a_second_answer(own_redis: RedisServer, tmp_path: Path) -> None:
    async def drop(fleet: Fleet, name: str) -> Talk:
        async with Talk(fleet.one.port) as talk:
            await talk.say(ask_for(name, 20, 0.05))
            await talk.until(functools.partial(has_begun, talk))
            if name == "open":
                own_redis.tell("FLUSHALL")
            return talk

    async def scenario(fleet: Fleet) -> None:
        for name, starts in (("open", 1), ("dropped", 1), ("done", 2)):
            dropped = await drop(fleet, name)
            if name == "done":
                await asyncio.sleep(1.5)
            if name != "open":
                own_redis.tell("FLUSHALL")
            if name == "dropped":
                await asyncio.sleep(1.1)  # it is written anew once a second while it grows, and when it ends
            async with Talk(fleet.two.port, asked=dropped.asked, previous=dropped.previous) as back:
                await back.until_answered()
                check_whole(back)
                assert fleet.started()[dropped.asked["m0"]] == starts, name

    with fleet_of("uvicorn", tmp_path / "fleet", own_redis.url) as fleet:
        asyncio.run(scenario(fleet))
        for worker in fleet.workers:
            check_log(worker)


def test_a_crowd_that_leaves_at_once_has_every_row_saved(own_redis: RedisServer, tmp_path: Path) -> None:
    def row_of(session: str) -> dict[str, Any]:
        row: dict[str, Any] = json.loads(own_redis.tell("GET", f"LITESTAR:chat_session.{session}"))["row"]
        return row

    async def scenario(worker: Worker) -> list[str]:
        async with contextlib.AsyncExitStack() as stack:
            talks = [Talk(worker.port) for _ in range(150)]
            await asyncio.gather(*(stack.enter_async_context(talk) for talk in talks))
            await asyncio.to_thread(worker.terminate)
            return [talk.sessions[0] for talk in talks]

    shared = tmp_path / "shared"
    shared.mkdir()
    with Worker("uvicorn", tmp_path / "one", shared=shared, redis_url=own_redis.url) as worker:
        sessions = asyncio.run(scenario(worker))
        check_log(worker)
        assert Counter(row_of(session)["end_reason"] for session in sessions) == {"restart": 150}


# ---- Machines: a deploy ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(90)
@pytest.mark.parametrize(("kind", "keeper"), [("uvicorn", "redis"), ("granian", "files")])
def test_a_rolling_restart_of_two_workers_under_load_loses_nothing(
    kind: Kind, keeper: StoreKind, redis_server: RedisServer, tmp_path: Path
) -> None:
    async def restart(worker: Worker) -> None:
        await asyncio.to_thread(worker.terminate)
        await asyncio.to_thread(worker.__enter__)

    async def visit(fleet: Fleet, name: str, is_over: asyncio.Event) -> Talk:
        async with Talk(fleet.port) as talk:
            while not is_over.is_set():
                await talk.say(ask_for(f"{name}-{len(talk.asked)}", 20, 0.05))
                await talk.until(lambda: len(talk.unanswered()) < 2)
            await talk.until_answered()
            return talk

    async def scenario(fleet: Fleet) -> list[Talk]:
        is_over = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            visits = [group.create_task(visit(fleet, f"visitor-{number}", is_over)) for number in range(8)]
            await asyncio.sleep(1)
            for worker in fleet.workers:
                await restart(worker)
                await asyncio.sleep(1)
            is_over.set()
        return [each.result() for each in visits]

    with fleet_of(kind, tmp_path / "fleet", redis_server.url if keeper == "redis" else "") as fleet:
        talks = asyncio.run(scenario(fleet))
        started = fleet.started()
        for talk in talks:
            check_whole(talk)
            assert len(talk.sessions) >= 2
            if GRANIAN_PANIC not in fleet.log():  # which takes rows along that were not saved yet
                check_whole_and_once(talk, started)


# ---- The blocks of the README -----------------------------------------------------------------------------------------


def blocks_of_the_readme() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)


def block_of_the_readme(phrase: str) -> str:
    """Find the one Python block that has *phrase* in it."""
    (block,) = [each for each in blocks_of_the_readme() if phrase in each]
    return block


def run_as_module(block: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Execute *block* as a module of its own, under a name that no registry has seen."""
    monkeypatch.setenv("CHAT_SESSION_SECRET", SECRET)
    module = types.ModuleType(f"readme_{secrets.token_hex(4)}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block, module.__name__, "exec"), module.__dict__)
    return module


#: Each Python block of the README, by a phrase that no other has, and the test (`test_...`) that runs it as it stands.
BLOCKS: dict[str, str] = {
    '{chat.message}".split():\n        yield': "a_block_of_the_readme_is_an_app_that_chats",
    "Stand in for the client of your model": "a_block_of_the_readme_is_an_app_that_chats",
    "AsyncOpenAI()": "a_recipe_with_a_model_streams_and_hands_the_scratchpad_over_as_it_is",
    "AsyncAnthropic()": "a_recipe_with_a_model_streams_and_hands_the_scratchpad_over_as_it_is",
    "from pydantic_ai import": "a_recipe_with_a_model_streams_and_hands_the_scratchpad_over_as_it_is",
    "FakeListChatModel(": "the_langchain_recipe_streams_and_a_stop_closes_its_model",
    "ANSWERS = {": "the_recipe_without_a_model_looks_up_and_cites",
    "class Order(Base)": "the_database_recipe_opens_a_session_for_each_question",
    "class ChatRow": "a_row_comes_back_from_a_database_as_it_was_however_often_it_is_saved",
    "SessionAuth": "the_row_carries_who_is_signed_in_and_the_answerer_finds_what_they_ordered",
    "FastAPI": "a_chat_mounted_in_another_framework_is_whole_through_cuts_and_a_deploy",
    "ChatMetrics": "the_prometheus_recipe_shows_what_stats_say",
    "chat_session.replied": "the_listeners_of_the_readme_log_a_chat_from_start_to_end",
    "get_asgi_application": "a_chat_mounted_in_another_framework_is_whole_through_cuts_and_a_deploy",
    "FileStore(ROWS)": "a_block_of_the_readme_is_an_app_that_chats",
    "RedisStore.with_client": "a_block_of_the_readme_is_an_app_that_chats",
    "POLICY = (": "a_block_of_the_readme_is_an_app_that_chats",
}


def blocks_run_by(test: str) -> list[str]:
    return [phrase for phrase, name in BLOCKS.items() if name == test]


def test_no_python_block_of_the_readme_is_left_without_a_test() -> None:
    found = [[phrase for phrase in BLOCKS if phrase in block] for block in blocks_of_the_readme()]
    assert sorted(found) == sorted([phrase] for phrase in BLOCKS)
    assert [name for name in BLOCKS.values() if not callable(globals().get(f"test_{name}"))] == []


@pytest.fixture
def run_block(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], types.ModuleType]:
    """Return a function that runs the README's block with a phrase in it, and returns it as a module."""
    monkeypatch.setenv("CHAT_ROWS", str(tmp_path / "rows"))
    monkeypatch.chdir(tmp_path)

    def run(phrase: str) -> types.ModuleType:
        if "REDIS_URL" in (block := block_of_the_readme(phrase)):
            monkeypatch.setenv("REDIS_URL", request.getfixturevalue("redis_server").url)
        return run_as_module(block, monkeypatch)

    return run


# ---- Recipes: hosts --------------------------------------------------------------------------------------------------


#: Keeps the rows of a block that keeps none itself, where the test can read them; the block stays as it is.
KEEP_ROWS = """
from pathlib import Path

import msgspec
from MODULE import TARGET as app, chat
from chat_session import ChatSessionPlugin, SessionRow


async def save(row: SessionRow) -> None:
    with Path("rows.jsonl").open("ab") as rows:
        rows.write(msgspec.json.encode(row) + b"\\n")


plugin = chat if isinstance(chat, ChatSessionPlugin) else chat.plugins.get(ChatSessionPlugin)
if plugin.config.rows is None:
    object.__setattr__(plugin.config, "rows", save)
"""


@dataclass
class Site(Server):
    """A real server process that serves one block of the README."""

    block: str = ""
    module: str = "block"
    target: str = "app"
    base: str = "/chat"

    def __enter__(self) -> Self:
        """Start the server, and wait until it answers."""
        (self.folder / f"{self.module.replace('.', '/')}.py").write_text(self.block)
        self.app = KEEP_ROWS.replace("MODULE", self.module).replace("TARGET", self.target)
        self.names = {
            "CHAT_SESSION_SECRET": SECRET,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(self.folder)]),
            **self.names,
        }
        return super().__enter__()

    def count(self) -> dict[str, Any]:
        """Ask for the widget: the blocks count nothing."""
        reply = httpx.get(f"http://127.0.0.1:{self.port}{self.base}/widget.js", timeout=PATIENCE)
        return {"widget": reply.content} if reply.status_code == 200 else {}


async def stopped_in_the_middle(site: Site, words: int) -> SessionRow:
    """Have *site* shut down while a reply of so many words runs, and tell what was saved last."""
    async with Talk(site.port, base=site.base) as talk:
        await talk.say(numbered(words))
        await talk.until(lambda: has_begun(talk))
        _, code = await asyncio.to_thread(site.terminate)
        assert code in {0, -signal.SIGTERM}, site.log()
        return msgspec.convert(site.rows()[talk.sessions[0]][-1], SessionRow)


def numbered(words: int) -> str:
    return " ".join(map(str, range(words)))


def written(text: str) -> str:
    """What the blocks' answerers say to *text*."""
    return f"You wrote: {text} "


# ---- Recipes: rows in a database ----


def find_postgres(name: str) -> str:
    """Find a program of PostgreSQL's newest version, which Debian keeps out of PATH."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda each: int(each.parent.name), reverse=True)
    program = shutil.which(name, path=os.pathsep.join([*map(str, places), os.environ.get("PATH", "")]))
    if program is None:
        missing(f"{name} of PostgreSQL")
    return str(program)


class Postgres:
    """A real PostgreSQL in a folder of its own, which nobody but this machine can reach."""

    def __init__(self, folder: Path) -> None:
        self.data = folder / "data"
        self.port = free_port()
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            names = {each.pw_name: each for each in pwd.getpwall()}
            user = names.get("postgres") or names["nobody"]
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(folder, user.pw_uid, user.pw_gid)
        options = ["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync"]
        command = [find_postgres("initdb"), *options, "-D", str(self.data)]
        subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=PATIENCE, **self._as)

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        options = ["-h", "127.0.0.1", "-p", str(self.port), "-k", "", "-F"]
        command = [find_postgres("postgres"), *options, "-D", str(self.data)]
        with self._log.open("ab") as log:
            self._process = cast("Any", subprocess.Popen)(
                command, cwd=self.data.parent, stdout=log, stderr=log, **self._as
            )
        wait_until(self._answers, "postgres answers")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        command = [find_postgres("pg_isready"), "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE).returncode == 0

    def stop(self) -> None:
        """Stop at once, and hang up on everybody."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(PATIENCE)
            self._process = None


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Run a PostgreSQL where its own user may go, which the tests' folder is not."""
    find_postgres("initdb")
    with tempfile.TemporaryDirectory(prefix="chat_postgres_") as folder:
        server = Postgres(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres").url)
    return f"sqlite+aiosqlite:///{tmp_path}/shop.db"


def shop_with(url: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Run the block about rows on the database at *url*; the registry of models is one for all in a process."""
    registry = pytest.importorskip("advanced_alchemy.base").orm_registry
    if "chat_row" in registry.metadata.tables:
        registry.metadata.remove(registry.metadata.tables["chat_row"])
    monkeypatch.setenv("DATABASE_URL", url)
    return run_as_module(block_of_the_readme("class ChatRow"), monkeypatch)


@contextlib.asynccontextmanager
async def open_shop(shop: types.ModuleType) -> AsyncIterator[Bench]:
    """Run the app of the block about rows; advanced-alchemy 1 lets go of the first engine of a process only."""
    it = bench_of(shop.app)
    async with it.client:
        async with shop.app.lifespan():
            yield it
        await shop.database.get_engine().dispose()


async def saved_in(url: str) -> dict[str, SessionRow]:
    """Read all rows that are in the database, by a connection of our own."""
    sqlalchemy, engine = pytest.importorskip("sqlalchemy"), pytest.importorskip("sqlalchemy.ext.asyncio")
    database = engine.create_async_engine(url)
    async with database.connect() as connection:
        found = (await connection.execute(sqlalchemy.text("SELECT id, row FROM chat_row"))).all()
    await database.dispose()
    assert len({each.id for each in found}) == len(found)
    return {each.id: msgspec.json.decode(each.row, type=SessionRow) for each in found}


async def until_saved(url: str, visitor: Visitor, true: Callable[[SessionRow], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not true((await saved_in(url))[session_of(visitor)]):
            await asyncio.sleep(0.02)


def test_a_row_comes_back_from_a_database_as_it_was_however_often_it_is_saved(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = datetime(2026, 3, 29, 1, 30, 0, 123456, UTC)
    text = "caf\u00e9 \U0001fad6 \x00 \"'\\ <b>\n\u2028"
    replies = [None, *(Reply("r", "m", text, [Source("https://a.example/?b=c", text)], "finished") for _ in range(2))]
    rows = [SessionRow(id=secrets.token_urlsafe(16), started_at=began, reply=reply) for reply in replies]
    rows[2] = msgspec.structs.replace(
        rows[2], ended_at=began + timedelta(hours=1), end_reason="dropped", turns=7, visitor="caf\u00e9"
    )

    async def scenario() -> None:
        shop = shop_with(database_url, monkeypatch)
        async with open_shop(shop):
            table = shop.chat.config.rows
            for row in rows:
                assert await table.load(row.id) is None
                for turns in (0, row.turns, row.turns):
                    await table.save(msgspec.structs.replace(row, turns=turns))
                assert await table.load(row.id) == row
                assert (await table.load(row.id)).started_at.tzinfo == UTC
            assert {row.id: row for row in rows}.items() <= (await saved_in(database_url)).items()

    asyncio.run(scenario())


def test_a_reply_that_a_drop_cut_short_is_carried_by_another_app_on_the_same_database(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        one, two = (shop_with(database_url, monkeypatch) for _ in range(2))
        async with open_shop(one) as here, open_shop(two) as there:
            first = await here.visit()
            first.say("hello out there", "a")
            await first.next("text-delta")
            await first.lose()
            await until_saved(database_url, first, lambda row: row.reply is not None and row.reply.status == "finished")
            there.tokens.update(here.tokens)
            second = await there.visit(first)
            second.say("hello out there", "a")
            await second.next("finish")
            second.say("and on", "b")
            await second.next("finish")
            assert [told.text for told in second.replies] == [written("hello out there"), written("and on")]
            assert second.replies[0].id == first.replies[0].id
            await until_saved(database_url, first, lambda row: row.reply is None)
            second.send("end")
            await second.ended()
            await until_saved(database_url, second, lambda row: row.ended_at is not None)
        rows = await saved_in(database_url)
        assert (rows[session_of(first)].end_reason, rows[session_of(first)].turns) == ("dropped", 1)
        assert (rows[session_of(second)].end_reason, rows[session_of(second)].turns) == ("visitor", 1)

    asyncio.run(scenario())


def test_the_last_save_of_each_of_many_sessions_is_the_one_that_a_database_keeps(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async def come_and_go(it: Bench, number: int) -> Visitor:
            visitor = await it.visit()
            if number % 2:
                await visitor.ask("hi")
            visitor.send("end")
            await visitor.ended()
            return visitor

        async with open_shop(shop_with(database_url, monkeypatch)) as it:
            visitors = await asyncio.gather(*(come_and_go(it, number) for number in range(20)))
        rows = await saved_in(database_url)
        for number, visitor in enumerate(visitors):
            row = rows[session_of(visitor)]
            assert (row.end_reason, row.turns) == ("visitor", number % 2)

    asyncio.run(scenario())


def site_with_store(url: str) -> Callable[[], tuple[Bench, Any]]:
    """Make apps that keep their rows in advanced-alchemy's own store, in one table, and tell their engines too."""
    alchemy = pytest.importorskip("advanced_alchemy.extensions.litestar")
    base, store = (pytest.importorskip(f"advanced_alchemy.{each}") for each in ("base", "extensions.litestar.store"))
    name = f"chats_{secrets.token_hex(4)}"
    model = type(name, (store.StoreModelMixin, base.UUIDv7Base), {"__tablename__": name})

    def make() -> tuple[Bench, Any]:
        database = alchemy.SQLAlchemyAsyncConfig(connection_string=url, create_all=True)
        plugin = ChatSessionPlugin(echo, settings(rows=store.SQLAlchemyStore(database, model=model, namespace="chat")))
        plugins = [alchemy.SQLAlchemyPlugin(config=database), plugin]
        return bench_of(Litestar(plugins=plugins, openapi_config=None)), database.get_engine()

    return make


def test_a_store_in_the_database_hands_over_a_reply_that_is_still_being_written(database_url: str) -> None:
    async def scenario() -> None:
        make = site_with_store(database_url)
        (one, engine), (two, other) = make(), make()
        async with one.client, two.client:
            async with one.app.lifespan(), two.app.lifespan():
                first = await one.visit()
                first.say(numbered(20), "a")
                await first.next("text-delta")
                await first.lose()
                two.tokens.update(one.tokens)
                second = await two.visit(first)
                await second.next("finish")
                assert second.replies[0].text == numbered(20) + " "
                assert second.replies[0].id == first.replies[0].id
                assert len(second.of("text-delta")) > 1
                second.send("end")
                await second.ended()
            await asyncio.gather(engine.dispose(), other.dispose())

    asyncio.run(scenario())


def test_a_database_that_is_down_breaks_no_chat_and_gets_its_rows_again_when_it_is_back(
    own_postgres: Postgres, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    async def scenario() -> None:
        async with open_shop(shop_with(own_postgres.url, monkeypatch)) as it:
            early = await it.visit()
            await early.ask("before")
            await asyncio.to_thread(own_postgres.stop)
            first = await it.visit()
            first.say("hello there", "a")
            await first.next("text-delta")
            await first.lose()
            second = await it.visit(first)
            await second.next("finish")
            assert second.replies[0].text == written("hello there")
            assert (await early.ask("meanwhile")).text == written("meanwhile")
            async with asyncio.timeout(PATIENCE):
                while not log.errors:
                    await asyncio.sleep(0.02)
            await asyncio.to_thread(own_postgres.start)
            for visitor in (early, second):
                visitor.send("end")
                await visitor.ended()
        rows = await saved_in(own_postgres.url)
        assert [rows[session_of(each)].end_reason for each in (early, second)] == ["visitor", "visitor"]
        assert [rows[session_of(each)].turns for each in (early, second)] == [2, 0]
        assert len(log.errors) == 1
        assert "hello" not in log.errors[0]
        assert "rows are saved again" in log.ours

    asyncio.run(scenario())


def test_a_deploy_saves_the_rows_before_the_database_is_let_go(database_url: str, tmp_path: Path) -> None:
    block = block_of_the_readme("class ChatRow")
    with Site("uvicorn", tmp_path, block=block, names={"DATABASE_URL": database_url}) as site:

        async def scenario() -> Talk:
            async with Talk(site.port) as talk:
                await talk.say(numbered(30))
                await talk.until(lambda: has_begun(talk))
                await asyncio.to_thread(site.terminate)
                return talk

        talk = asyncio.run(scenario())
        row = asyncio.run(saved_in(database_url))[talk.sessions[0]]
        assert row.reply is not None
        assert (row.end_reason, row.reply.status, row.turns) == ("restart", "finished", 1)
        assert row.reply.text == written(numbered(30))
        check_log(site)


# ---- Recipes: sign-in ----


async def sign_in(client: httpx.AsyncClient, user: str | None) -> None:
    if user is not None:
        assert (await client.post("/sign-in", json={"user": user})).status_code == 201


async def open_chat(client: httpx.AsyncClient, previous: str | None = None) -> tuple[str, ClientConnection]:
    """Fetch a token with the cookies that *client* has, and open a socket, which has none."""
    reply = await client.post("/chat/token", data={} if previous is None else {"previous": previous})
    assert reply.status_code == 201, reply.text
    token = str(reply.json()["token"])
    return token, await dial_socket(client.base_url.port or 0, token)


async def ask_over(socket: ClientConnection, message_id: str) -> list[Frame]:
    """Ask for the orders, and return every frame up to the end of the reply to just that."""
    await socket.send(json.dumps({"type": "message", "id": message_id, "text": "What did I order?"}))
    frames: list[Frame] = []
    starts: list[str] = []
    async with asyncio.timeout(PATIENCE):
        while not (frames and frames[-1]["type"] == "finish" and starts[-1] == message_id):
            frames.append(json.loads(await socket.recv()))
            starts += [each["messageMetadata"]["inReplyTo"] for each in frames[-1:] if each["type"] == "start"]
    return frames


def words_in(frames: list[Frame]) -> str:
    return "".join(frame.get("delta", "") for frame in frames)


def test_the_row_carries_who_is_signed_in_and_the_answerer_finds_what_they_ordered(tmp_path: Path) -> None:
    orders = {
        "ann": "Your orders: a teapot, sent on Monday.",
        "bob": "Your orders: two cups, on their way.",
        None: "Sign in, and I can look up your orders.",
    }
    with Site("uvicorn", tmp_path, block=block_of_the_readme("SessionAuth")) as site:

        async def chat_as(user: str | None) -> str:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{site.port}", trust_env=False) as client:
                await sign_in(client, user)
                cookies = dict(client.cookies)
                _, socket = await open_chat(client)
                frames = await ask_over(socket, "a")
                assert words_in(frames) == orders[user]
                await socket.send('{"type": "end"}')
                await socket.wait_closed()
                if user is not None:
                    assert dict(client.cookies) == cookies
                    assert (await client.post("/sign-out")).status_code == 201
                    _, socket = await open_chat(client)
                    assert words_in(await ask_over(socket, "a")) == orders[None]
                    await socket.close()
                return str(frames[0]["sessionId"])

        async def scenario() -> dict[str | None, str]:
            return {user: await chat_as(user) for user in orders}

        sessions = asyncio.run(scenario())
        rows = site.rows()
        for user, session in sessions.items():
            assert [row["visitor"] for row in rows[session]] == [user, user]
        assert Counter(saved[-1]["visitor"] for saved in rows.values()) == {"ann": 1, "bob": 1, None: 3}
        check_log(site)


def test_what_a_signed_in_visitor_missed_goes_to_nobody_else_and_to_them_when_they_return(tmp_path: Path) -> None:
    with Site("uvicorn", tmp_path, block=block_of_the_readme("SessionAuth")) as site:

        async def come_with(previous: str, user: str | None) -> list[Frame]:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{site.port}", trust_env=False) as client:
                await sign_in(client, user)
                _, socket = await open_chat(client, previous)
                frames = await ask_over(socket, "b")
                await socket.close()
                return frames

        async def scenario() -> dict[str | None, list[Frame]]:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{site.port}", trust_env=False) as client:
                await sign_in(client, "ann")
                token, socket = await open_chat(client)
                await ask_over(socket, "a")
                socket.transport.abort()
            return {user: await come_with(token, user) for user in ("bob", None, "ann")}

        frames = asyncio.run(scenario())
        answered = {
            user: [each["messageMetadata"]["inReplyTo"] for each in told if each["type"] == "start"]
            for user, told in frames.items()
        }
        assert answered == {"bob": ["b"], None: ["b"], "ann": ["a", "b"]}
        assert "teapot" not in words_in(frames["bob"]) + words_in(frames[None])
        assert words_in(frames["ann"]).count("a teapot") == 2
        check_log(site)


def test_nothing_but_the_hosts_session_remembers_who_signed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        module = run_as_module(block_of_the_readme("SessionAuth"), monkeypatch)
        it = bench_of(module.app)
        async with module.app.lifespan(), it.client:
            await sign_in(it.client, "ann")
            visitor = await it.visit()
            assert "teapot" in (await visitor.ask("What did I order?")).text
            visitor.send("end")
            await visitor.ended()
            assert (it.desk.sessions, kept(it), it.desk.past, it.desk.addresses) == ({}, 0, {}, {})
            [session] = module.app.stores.get("sessions")._store.values()
            assert json.loads(session.data) == {"user": "ann"}
            assert list(it.client.cookies) == ["session"]

    asyncio.run(scenario())


# ---- Recipes: any ASGI host ----

Framework = Literal["FastAPI", "Starlette"]
FRAMEWORKS: tuple[Framework, ...] = ("FastAPI", "Starlette")


def mounting(framework: Framework) -> str:
    """The README's block for FastAPI, or the same lines with Starlette, as the README says."""
    block = block_of_the_readme("FastAPI")
    pytest.importorskip(framework.lower())
    if framework == "Starlette":
        block = block.replace("from fastapi import FastAPI", "from starlette.applications import Starlette")
    return block.replace("FastAPI", framework)


@contextlib.contextmanager
def django_site(folder: Path, *arguments: str) -> Iterator[Site]:
    """Serve a fresh Django project whose `asgi.py` is the README's."""
    pytest.importorskip("django")
    command = [sys.executable, "-m", "django", "startproject", "shop", "."]
    subprocess.run(command, cwd=folder, check=True, timeout=PATIENCE)
    block = block_of_the_readme("get_asgi_application")
    options: dict[str, Any] = {"module": "shop.asgi", "target": "application", "base": "/support/chat"}
    with Site("uvicorn", folder, block=block, arguments=arguments, **options) as site:
        yield site


@contextlib.contextmanager
def mounted_site(framework: str, folder: Path, *arguments: str) -> Iterator[Site]:
    """Serve the README's block for *framework*."""
    if framework == "Django":
        with django_site(folder, *arguments) as site:
            yield site
    else:
        block = mounting(cast("Framework", framework))
        with Site("uvicorn", folder, block=block, base="/support/chat", arguments=arguments) as site:
            yield site


class Guest(Bench):
    """A bench around a Litestar app that another one has mounted, whose lifespan nobody runs."""

    def __init__(self, app: Any, inner: Litestar) -> None:
        self.plugin = inner.plugins.get(ChatSessionPlugin)
        self.app = elsewhere(app, "/support/chat/socket")
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test/support")
        self.tokens, self.visitors = {}, []


@pytest.mark.parametrize("framework", FRAMEWORKS)
@virtual
async def test_a_mounted_chat_whose_lifespan_never_runs_talks_sweeps_finishes_and_idles_out(
    framework: Framework, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = run_as_module(mounting(framework), monkeypatch)
    it = Guest(module.app, module.chat)
    async with it.client:
        first = await it.visit()
        assert (await first.ask("one two")).text == written("one two")
        assert kept(it) == 1
        await asyncio.sleep(it.plugin.config.scratchpad_ttl + 1)
        assert kept(it) == 0
        first.say("three four five", "a")
        await first.until(lambda: first.replies[-1].in_reply_to == "a" and first.replies[-1].text != "")
        await first.lose()
        await asyncio.sleep(2)
        assert not it.desk.answers
        second = await it.visit(first)
        told = await second.ask("three four five", "a")
        assert (told.text, told.id) == (written("three four five"), first.replies[-1].id)
        second.send("pong")
        assert await second.ended() == 1000
        assert second.of("session-end") == [{"type": "session-end", "reason": "idle"}]
        assert (it.desk.sessions, kept(it), it.desk.past) == ({}, 0, {})


@pytest.mark.parametrize("root_path", ["", "/api"])
@pytest.mark.parametrize("framework", [*FRAMEWORKS, "Django"])
def test_a_chat_mounted_in_another_framework_is_whole_through_cuts_and_a_deploy(
    framework: str, root_path: str, tmp_path: Path
) -> None:
    with mounted_site(framework, tmp_path, *(["--root-path", root_path] if root_path else [])) as site:

        async def through_cuts() -> Talk:
            async with Proxy(site.port) as proxy:
                proxy.faults.extend(Fault(after, "reset") for after in (1, 4, 6))
                async with Talk(proxy.port, base=site.base) as talk:
                    await talk.say(numbered(20))
                    await talk.until_answered()
                    return talk

        talk = asyncio.run(through_cuts())
        assert talk.shown["m0"].text == written(numbered(20))
        assert len(talk.reply_ids["m0"]) == 1
        assert len(talk.sessions) >= 2
        row = asyncio.run(stopped_in_the_middle(site, 40))
        assert row.reply is not None
        assert (row.end_reason, row.reply.status, row.turns) == ("restart", "finished", 1)
        assert row.reply.text == written(numbered(40))
        check_log(site)


@pytest.mark.parametrize("framework", ["FastAPI", "Django"])
def test_without_the_lifespan_a_deploy_loses_the_reply_that_runs_and_nothing_before(
    framework: str, tmp_path: Path
) -> None:
    with mounted_site(framework, tmp_path, "--lifespan", "off") as site:

        async def whole() -> Talk:
            async with Talk(site.port, base=site.base) as talk:
                await talk.say("hello")
                await talk.until_answered()
                return talk

        assert asyncio.run(whole()).shown["m0"].text == written("hello")
        row = asyncio.run(stopped_in_the_middle(site, 800))
        assert row.turns == 0
        assert row.reply is None or row.reply.status in {"streaming", "interrupted"}


@pytest.mark.parametrize("framework", [*FRAMEWORKS, "Django"])
def test_a_framework_that_mounts_a_chat_keeps_its_own_pages(framework: str, tmp_path: Path) -> None:
    own, text = {"FastAPI": ("/docs", "Swagger"), "Starlette": ("/none", "Not Found"), "Django": ("/", "install")}[
        framework
    ]
    with mounted_site(framework, tmp_path) as site:
        assert text in httpx.get(f"http://127.0.0.1:{site.port}{own}").text
        assert httpx.get(f"http://127.0.0.1:{site.port}/chat/widget.js").status_code == 404
        assert site.count()["widget"] == WIDGET.read_bytes()


def test_a_store_by_its_name_carries_replies_between_mounted_chats_whose_lifespan_never_runs(tmp_path: Path) -> None:
    starlette = pytest.importorskip("starlette.applications")

    def mounted() -> Guest:
        plugin = ChatSessionPlugin(echo, settings(rows="chat"))
        inner = Litestar(plugins=[plugin], stores={"chat": FileStore(tmp_path / "rows")}, openapi_config=None)
        app = starlette.Starlette()
        app.mount("/support", inner)
        return Guest(app, inner)

    async def scenario() -> None:
        one, two = mounted(), mounted()
        async with one.client, two.client:
            first = await one.visit()
            first.say("hello out there", "a")
            await first.next("text-delta")
            await first.lose()
            two.tokens.update(one.tokens)
            second = await two.visit(first)
            await second.next("finish")
            assert second.replies[0].text == "hello out there "
            assert second.replies[0].id == first.replies[0].id
            second.send("end")
            await second.ended()

    asyncio.run(scenario())


# ---- Recipes: how it goes --------------------------------------------------------------------------------------------


def test_the_prometheus_recipe_shows_what_stats_say(
    run_block: Callable[[str], types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    monkeypatch.setattr(prometheus, "REGISTRY", prometheus.CollectorRegistry())
    module = run_block("ChatMetrics")

    async def scenario() -> str:
        async with visitor_of(module.app) as visitor:
            await visitor.ask("hello there")
            visitor.say(" ")
            await visitor.next("message-rejected")
            return cast("str", prometheus.generate_latest(prometheus.REGISTRY).decode())

    lines = asyncio.run(scenario()).splitlines()
    assert "chat_open_sessions 1.0" in lines
    assert "chat_turns 1.0" in lines
    assert 'chat_rejected_total{reason="empty"} 1.0' in lines


def test_the_prometheus_recipe_answers_at_metrics(run_block: Callable[[str], types.ModuleType]) -> None:
    pytest.importorskip("prometheus_client")
    module = run_block("ChatMetrics")

    async def scenario() -> httpx.Response:
        it = bench_of(module.app)
        async with it.client:
            return await it.client.get("/metrics")

    response = asyncio.run(scenario())
    assert response.status_code == 200
    assert "chat_open_sessions 0.0" in response.text


def test_the_listeners_of_the_readme_log_a_chat_from_start_to_end(
    run_block: Callable[[str], types.ModuleType], log: Log
) -> None:
    logging.getLogger("shop").addHandler(log)
    logging.getLogger("shop").setLevel(logging.INFO)
    module = run_block("chat_session.replied")

    async def scenario() -> None:
        async with visitor_of(module.app) as visitor:
            await visitor.ask("hello there")

    asyncio.run(scenario())
    logging.getLogger("shop").removeHandler(log)
    told = [re.sub(r"^chat [\w-]+", "chat", record.getMessage()) for record in log.records if record.name == "shop"]
    assert [re.sub(r"[\d.]+ s$", "a while", text) for text in told] == [
        "chat began",
        "chat: a reply of 14 characters finished after a while",
        "chat ended (visitor) after 1 turns",
    ]


# ---- Versions --------------------------------------------------------------------------------------------------------


def project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
    return project


def test_the_table_of_versions_begins_where_pyproject_does() -> None:
    told = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \| [\d.]+ \|", (HERE / "README.md").read_text(), re.MULTILINE))
    extras = project()["optional-dependencies"]
    asked = [f"Python{project()['requires-python']}", *project()["dependencies"], *extras["demo"], *extras["test"]]
    lowest = dict(re.findall(r"^(\w+)>=([\d.]+)", "\n".join(asked), re.MULTILINE))
    assert set(told) == {"Python", "Litestar", "cachetools", "msgspec", "uvicorn", "granian", "hypercorn"}
    assert told == {name: lowest[name if name == "Python" else name.lower()] for name in told}


def test_the_table_of_versions_ends_where_the_classifiers_do() -> None:
    (newest,) = re.findall(r"^\| Python \| 3\.11 \| ([\d.]+) \|", (HERE / "README.md").read_text(), re.MULTILINE)
    prefix = "Programming Language :: Python :: 3."
    minors = [int(each.removeprefix(prefix)) for each in project()["classifiers"] if each.startswith(prefix)]
    assert newest == f"3.{max(minors)}"
    assert minors == list(range(11, max(minors) + 1))


def test_the_module_asks_as_a_script_for_what_pyproject_asks_for() -> None:
    (head,) = re.findall(
        r"^# /// script\n(.*?)^# ///$", (HERE / "chat_session.py").read_text(), re.DOTALL | re.MULTILINE
    )
    script = tomllib.loads(re.sub("^# ?", "", head, flags=re.MULTILINE))
    assert script == {
        "requires-python": project()["requires-python"],
        "dependencies": [*project()["dependencies"], *project()["optional-dependencies"]["demo"]],
    }


@pytest.mark.parametrize("websocket", ["websockets", "websockets-sansio", "wsproto"])
def test_a_chat_is_held_over_each_websocket_of_uvicorn(websocket: str, tmp_path: Path) -> None:
    async def scenario(port: int) -> None:
        async with Talk(port) as talk:
            await talk.say(ask_for("first", 20, 0.001))
            await talk.say(ask_for("second", 20))
            await talk.until_answered()

    with Server("uvicorn", tmp_path, arguments=("--ws", websocket)) as server:
        asyncio.run(scenario(server.port))
        _, code = server.terminate()
        assert code in {0, -signal.SIGTERM}
        assert "ERROR" not in server.log(), server.log()


# ---- The demo, the README and a long life ----------------------------------------------------------------------------


def bench_of(app: Litestar) -> Bench:
    """A bench around an app that is made already."""
    it = Bench.__new__(Bench)
    it.app, it.plugin = app, app.plugins.get(ChatSessionPlugin)
    it.client = httpx.AsyncClient(transport=httpx.ASGITransport(cast("Any", app)), base_url="http://test")
    it.tokens, it.visitors = {}, []
    return it


@contextlib.asynccontextmanager
async def visitor_of(app: Litestar) -> AsyncIterator[Visitor]:
    """Visit an app that is made already, and say goodbye."""
    it = bench_of(app)
    async with it.app.lifespan(), it.client:
        visitor = await it.visit()
        yield visitor
        visitor.send("end")
        await visitor.ended()


@pytest.mark.parametrize("phrase", blocks_run_by("a_block_of_the_readme_is_an_app_that_chats"))
def test_a_block_of_the_readme_is_an_app_that_chats(run_block: Callable[[str], types.ModuleType], phrase: str) -> None:
    module = run_block(phrase)

    async def scenario() -> None:
        async with visitor_of(module.app) as visitor:
            told = await visitor.ask("hello there")
            assert told.text
            assert told.end == {"type": "finish"}

    asyncio.run(scenario())


def test_each_row_of_the_readmes_table_of_faults_names_a_test_that_exists() -> None:
    rows = re.findall(r"^\|.*\| `(\w+)` \|$", (HERE / "README.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    assert [name for name in rows if not callable(globals().get(f"test_{name}"))] == []


def test_the_runnable_example_of_the_module_runs() -> None:
    (example,) = re.findall(r"::\n\n(.*?)\n\nand in the page", chat_session.__doc__ or "", re.DOTALL)
    names: dict[str, Any] = {}
    exec(re.sub("^    ", "", example, flags=re.MULTILINE), names)
    assert isinstance(names["app"], Litestar)


@virtual
async def test_the_demo_knows_what_it_is_from_its_scratchpad_and_honestly_does_not_when_that_is_gone() -> None:
    it = bench_of(chat_session._demo())
    async with it.app.lifespan(), it.client:
        visitor = await it.visit()
        told = await visitor.ask("do you ship to Canada?")
        assert "Canada" in told.text
        assert told.sources[0]["title"] == "Our shipping"
        assert "five to eight working days" in (await visitor.ask("how long does it take?")).text
        await asyncio.sleep(chat_session.ChatSessionConfig().scratchpad_ttl + 1)
        assert "I am not sure what you mean" in (await visitor.ask("how long does it take?")).text
        visitor.send("end")
        await visitor.ended()


@virtual
async def test_the_demos_shop_page_loads_the_widget() -> None:
    it = bench_of(chat_session._demo())
    async with it.client:
        page = await it.client.get("/")
        assert '<script src="/chat/widget.js"' in page.text
        assert (await it.client.get("/chat/widget.js")).status_code == 200


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_thousands_of_visits_leave_a_server_as_it_was(tmp_path: Path) -> None:
    visits = int(os.environ.get("SOAK_VISITS", "3000"))

    def memory(server: Server) -> int:
        rollup = Path(f"/proc/{server.count()['process']}/smaps_rollup").read_text()
        return int(re.findall(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[0])

    async def crowd(server: Server, count: int, wave: str) -> None:
        async def one(number: int) -> None:
            async with Talk(server.port) as talk:
                await talk.say(ask_for(f"{wave}-{number}", 5, 0))
                await talk.until_answered()

        for first in range(0, count, 20):
            await asyncio.gather(*(one(number) for number in range(first, first + 20)))

    with Server("uvicorn", tmp_path, "reply_ttl=0.5") as server:
        asyncio.run(crowd(server, visits // 3, "warm"))
        wait_until(lambda: server.count()["tasks"] < 10, "the tasks have ended")
        before, tasks = memory(server), server.count()["tasks"]
        asyncio.run(crowd(server, visits, "soak"))
        wait_until(lambda: server.count()["tasks"] <= tasks, "the tasks have ended")
        after = memory(server)
        assert after < before * 1.1 + 2048, f"{before} kB before {visits} visits, {after} kB after"
        check_log(server)


# ---- Recipes: answerers ----------------------------------------------------------------------------------------------
# The README's blocks as they stand, with the real packages; only the model's end of the line is ours.

TOLD = "We ship on Mondays. "
MODELS = blocks_run_by("a_recipe_with_a_model_streams_and_hands_the_scratchpad_over_as_it_is")


def openai_events(words: Iterable[str]) -> list[str]:
    """Stream *words* as `POST /v1/chat/completions` does, with its role, its end and its usage."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "a-model"}
    deltas: list[Frame] = [{"role": "assistant", "content": ""}, *({"content": word} for word in words), {}]
    choices = [{"index": 0, "delta": each, "finish_reason": None if each else "stop"} for each in deltas]
    usage = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
    frames = [*({**head, "choices": [choice]} for choice in choices), {**head, **usage}]
    return [*(f"data: {json.dumps(frame)}\n\n" for frame in frames), "data: [DONE]\n\n"]


def anthropic_events(words: Iterable[str]) -> list[str]:
    """Stream *words* as `POST /v1/messages` does."""
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "a-model", "content": []}
    usage = {"input_tokens": 1, "output_tokens": 1}
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    frames: list[Frame] = [
        {"type": "message_start", "message": {**message, "stop_reason": None, "stop_sequence": None, "usage": usage}},
        *(block, {"type": "ping"}),
        *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}} for word in words),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": usage},
        {"type": "message_stop"},
    ]
    return [f"event: {frame['type']}\ndata: {json.dumps(frame)}\n\n" for frame in frames]


#: What a stream says that goes wrong in its middle.
BROKEN = {
    "/v1/chat/completions": 'data: {"error": {"message": "overloaded", "type": "server_error"}}\n\n',
    "/v1/messages": 'event: error\ndata: {"type": "error", "error": {"type": "overloaded_error", "message": "no"}}\n\n',
}
EVENTS = {"/v1/chat/completions": openai_events, "/v1/messages": anthropic_events}


class Model(ThreadingHTTPServer):
    """The HTTP endpoint of a model. It can fall silent, before the first word or after some, and go wrong."""

    daemon_threads = False  # so that closing waits for what is under way

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Inference)
        self.words = [f"{word} " for word in TOLD.split()]
        self.manner: Literal["", "silent", "hesitant", "500", "429", "broken", "cut"] = ""
        self.asked: list[Frame] = []
        self.hung_up = threading.Event()

    @property
    def messages(self) -> list[Any]:
        """What the model was last sent: each text as plain as it was, without the system's."""
        sent = [(each["role"], text) for each in self.asked[-1]["messages"] for text in texts_of(each["content"])]
        return [{"role": role, "content": text} for role, text in sent if role != "system"]

    async def until_hung_up(self) -> None:
        assert await asyncio.to_thread(self.hung_up.wait, 30)


def texts_of(content: str | list[Frame]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content]


class Inference(BaseHTTPRequestHandler):
    """One request to a model."""

    protocol_version = "HTTP/1.1"
    timeout = 30

    @property
    def model(self) -> Model:
        return cast("Model", self.server)

    @property
    def route(self) -> str:
        return urlsplit(self.path).path

    def do_POST(self) -> None:
        model = self.model
        model.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        assert self.headers["Authorization"] == "Bearer a-key" or self.headers["X-Api-Key"] == "a-key"
        if not self.is_acceptable():
            self.refuse(400)
        elif model.manner in {"500", "429"}:
            self.refuse(int(model.manner))
        elif model.manner == "silent":
            self.wait_for_hang_up()
        else:
            self.stream(EVENTS[self.route](model.words), model.manner)

    def is_acceptable(self) -> bool:
        """Check what Anthropic refuses: a talk that the model opens, and a message without a word."""
        messages = self.model.messages
        return messages[0]["role"] == "user" and all(each["content"].strip() for each in messages)

    def refuse(self, status: int) -> None:
        body = json.dumps({"type": "error", "error": {"type": "api_error", "message": "no"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After-Ms", "1")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def stream(self, events: list[str], manner: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        for event in events if not manner else events[:5]:
            self.write(event)
        if manner == "hesitant":
            self.wait_for_hang_up()
        elif manner == "broken":
            self.write(BROKEN[self.route])
        if manner != "cut":
            self.write("")

    def write(self, event: str) -> None:
        with contextlib.suppress(ConnectionError):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event.encode()), event.encode()))

    def wait_for_hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(ConnectionError):
            assert self.connection.recv(1) == b""
        self.model.hung_up.set()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on stderr."""


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    with Model() as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OPENAI_API_KEY", "a-key")
        monkeypatch.setenv("ANTHROPIC_API_KEY", "a-key")
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("phrase", MODELS)
def test_a_recipe_with_a_model_streams_and_hands_the_scratchpad_over_as_it_is(
    run_block: Callable[[str], types.ModuleType], model: Model, phrase: str
) -> None:
    async def scenario() -> None:
        async with visitor_of(run_block(phrase).app) as visitor:
            for question in ("do you ship?", "how long does it take?"):
                told = await visitor.ask(question)
                assert (told.text, told.end) == (TOLD, {"type": "finish"})

    asyncio.run(scenario())
    assert len(model.asked) == 2
    assert model.asked[1]["stream"] is True
    assert "You answer for a small shop." in json.dumps(model.asked[1])
    assert model.messages == [
        {"role": "user", "content": "do you ship?"},
        {"role": "assistant", "content": TOLD},
        {"role": "user", "content": "how long does it take?"},
    ]


@pytest.mark.parametrize("manner", ["silent", "hesitant"])
@pytest.mark.parametrize("phrase", MODELS)
def test_a_stop_hangs_up_on_the_model_and_the_next_question_is_answered(
    run_block: Callable[[str], types.ModuleType],
    model: Model,
    phrase: str,
    manner: Literal["silent", "hesitant"],
) -> None:
    async def scenario() -> str:
        async with visitor_of(run_block(phrase).app) as visitor:
            model.manner = manner
            visitor.say("do you ship?")
            await visitor.next("start" if manner == "silent" else "text-delta")
            while not model.asked:
                await asyncio.sleep(0.01)
            visitor.send("stop")
            assert (await visitor.next("abort"))["reason"] == "stopped"
            await model.until_hung_up()
            model.manner = ""
            assert (await visitor.ask("to Canada?")).text == TOLD
            return visitor.replies[0].text

    said = asyncio.run(scenario())
    assert bool(said) == (manner == "hesitant")
    assert TOLD.startswith(said)
    assert model.messages == [
        {"role": "user", "content": "do you ship?"},
        *([{"role": "assistant", "content": said}] if said else []),
        {"role": "user", "content": "to Canada?"},
    ]


@pytest.mark.parametrize("manner", ["500", "429", "broken", "cut"])
@pytest.mark.parametrize("phrase", MODELS)
def test_a_model_that_fails_ends_the_reply_with_a_friendly_text_and_leaves_no_turn(
    run_block: Callable[[str], types.ModuleType],
    model: Model,
    log: Log,
    phrase: str,
    manner: Literal["500", "429", "broken", "cut"],
) -> None:
    async def scenario() -> None:
        async with visitor_of(run_block(phrase).app) as visitor:
            model.manner = manner
            told = await visitor.ask("do you ship?")
            assert told.end == {"type": "error", "errorText": chat_session._ERROR_TEXT}
            model.manner = ""
            assert (await visitor.ask("to Canada?")).text == TOLD

    asyncio.run(scenario())
    assert model.messages == [{"role": "user", "content": "to Canada?"}]
    (line,) = log.errors
    assert "answer failed on reply" in line


@virtual
async def test_whatever_becomes_of_its_turns_a_scratchpad_begins_with_the_visitor_and_has_no_message_without_a_word(
    log: Log,
) -> None:
    """As Anthropic wants it; what follows on a refused message would be refused as well."""
    script = Script()
    fates = ("finished", "stopped", "stopped early", "stopped on a space", "failed", "silent")
    async with bench(script, settings(scratchpad_turns=3, messages_per_minute=10_000)) as it:
        visitor = await it.visit()
        for number, fate in enumerate(itertools.chain(*itertools.product(fates, repeat=3))):
            visitor.say(f"question {number}")
            await visitor.next("start")
            match fate:
                case "finished":
                    script.say("some ", "words", None)
                case "stopped":
                    script.say("some ")
                case "stopped on a space":
                    script.say("\n\n")
                case "failed":
                    script.say("some ", RuntimeError())
                case "silent":
                    script.say(None)
            if fate.startswith("stopped"):
                await asyncio.sleep(0.1)
                visitor.send("stop")
            await visitor.next("finish", "abort", "error")
    assert log.errors
    assert len(script.chats) == 3 * 6**3
    for chat in script.chats:
        assert chat.messages[0]["role"] == chat.messages[-1]["role"] == "user"
        assert all(message["content"].strip() for message in chat.messages)
        assert len(chat.messages) <= 5
    talks = [[message["role"] for message in chat.messages] for chat in script.chats]
    assert ["user", "user", "user"] in talks
    assert ["user", "assistant", "user", "assistant", "user"] in talks


def test_the_pydantic_ai_recipe_is_tested_by_its_users_with_the_packages_own_models(
    run_block: Callable[[str], types.ModuleType], model: Model
) -> None:
    from pydantic_ai.models.function import FunctionModel
    from pydantic_ai.models.test import TestModel

    module, heard = run_block("from pydantic_ai import"), []

    async def repeat(messages: list[Any], _info: Any) -> AsyncIterator[str]:
        heard.append([part.content for message in messages for part in message.parts])
        yield "yes, "
        yield "we do"

    async def scenario(*questions: str) -> list[str]:
        async with visitor_of(module.app) as visitor:
            return [(await visitor.ask(question)).text for question in questions]

    with module.agent.override(model=TestModel(custom_output_text="a test's words")):
        assert asyncio.run(scenario("do you ship?")) == ["a test's words"]
    with module.agent.override(model=FunctionModel(stream_function=repeat)):
        assert asyncio.run(scenario("do you ship?", "to Canada?")) == ["yes, we do"] * 2
    assert heard == [["do you ship?"], ["do you ship?", "yes, we do", "to Canada?"]]
    assert not model.asked


def test_the_langchain_recipe_streams_and_a_stop_closes_its_model(
    run_block: Callable[[str], types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    from langchain_core.language_models import GenericFakeChatModel

    heard: list[list[tuple[str, Any]]] = []
    closed = asyncio.Event()

    class Hesitant(GenericFakeChatModel):
        """Says what it is told to say, and then nothing more."""

        async def _astream(self, messages: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            heard.append([(message.type, message.content) for message in messages])
            try:
                for chunk in self._stream(messages, *args, **kwargs):
                    yield chunk
                await asyncio.Event().wait()
            finally:
                closed.set()

    async def scenario() -> None:
        module = run_block("FakeListChatModel(")
        async with visitor_of(module.app) as visitor:
            told = await visitor.ask("do you ship?")
            assert (told.text, told.end) == ("We ship on Mondays.", {"type": "finish"})
            assert (await visitor.ask("how long does it take?")).text == "It takes a week."
            monkeypatch.setattr(module, "model", Hesitant(messages=iter(["to Canada, too"])))
            visitor.say("where to?")
            await visitor.until(lambda: visitor.replies[-1].text == "to Canada, too")
            visitor.send("stop")
            assert (await visitor.next("abort"))["reason"] == "stopped"
            await closed.wait()

    asyncio.run(scenario())
    assert heard == [
        [
            ("system", "You answer for a small shop. Be brief."),
            *(("human", "do you ship?"), ("ai", "We ship on Mondays.")),
            *(("human", "how long does it take?"), ("ai", "It takes a week.")),
            ("human", "where to?"),
        ]
    ]


def test_the_recipe_without_a_model_looks_up_and_cites(run_block: Callable[[str], types.ModuleType]) -> None:
    async def scenario() -> None:
        async with visitor_of(run_block("ANSWERS = {").app) as visitor:
            told = await visitor.ask("What of Shipping?")
            assert told.text == "We ship to Canada and all of Europe."
            assert [source["url"] for source in told.sources] == ["https://example.com/shipping"]
            told = await visitor.ask("hello")
            assert (told.text, told.sources) == ("I know about shipping and returns.", [])

    asyncio.run(scenario())


@pytest.fixture
def first_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let advanced-alchemy forget earlier apps: it closes only the engine of a process's first configuration."""
    from advanced_alchemy.extensions.litestar import SQLAlchemyAsyncConfig

    for name in (
        "_ENGINE_APP_STATE_KEY_REGISTRY",
        "_SESSIONMAKER_APP_STATE_KEY_REGISTRY",
        "_SESSION_SCOPE_KEY_REGISTRY",
    ):
        monkeypatch.setattr(SQLAlchemyAsyncConfig, name, set[str]())


@pytest.mark.usefixtures("first_database")
def test_the_database_recipe_opens_a_session_for_each_question(run_block: Callable[[str], types.ModuleType]) -> None:
    module = run_block("class Order(Base)")
    pool = module.database.get_engine().pool

    async def scenario() -> None:
        async with visitor_of(module.app) as visitor:
            assert "tell me the number" in (await visitor.ask("A1")).text
            async with module.database.get_session() as session:
                session.add(module.Order(number="A1", state="on its way"))
                await session.commit()
            assert pool.checkedout() == 0
            assert (await visitor.ask(" A1 ")).text == "Your order is on its way."
            assert (pool.checkedout(), pool.checkedin()) == (0, 1)

    asyncio.run(scenario())


@pytest.mark.usefixtures("first_database")
def test_the_database_closes_after_the_last_reply_though_its_plugin_brings_another_one_along(
    run_block: Callable[[str], types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = run_block("class Order(Base)")
    engine, look_up, story = module.database.get_engine(), module.database.get_session, list[str]()
    heard, goes_on = asyncio.Event(), asyncio.Event()

    @contextlib.asynccontextmanager
    async def look_up_late() -> AsyncIterator[Any]:
        heard.set()
        await goes_on.wait()
        async with look_up() as session:
            yield session
        story.append("looked up")

    async def scenario() -> None:
        it = bench_of(module.app)

        async def shut_down_while_a_reply_runs() -> Visitor:
            async with it.client, it.app.lifespan():
                visitor = await it.visit()
                visitor.say("A1")
                await heard.wait()
            return visitor

        running = asyncio.create_task(shut_down_while_a_reply_runs())
        await heard.wait()
        while not it.desk.is_draining:
            await asyncio.sleep(0.01)
        goes_on.set()
        (told,) = (await running).replies
        assert told.end == {"type": "finish"}

    monkeypatch.setattr(module.database, "get_session", look_up_late)
    from sqlalchemy import event

    event.listen(engine.sync_engine, "engine_disposed", lambda _: story.append("closed"))
    asyncio.run(scenario())
    assert story == ["looked up", "closed"]


WIDGET = Path(__file__).with_name("widget.js")
STRICT_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
PAGE = (
    '<!doctype html><html lang="en"{html}><head><meta charset="utf-8"><title>Shop</title>'
    '<meta name="viewport" content="width=device-width, initial-scale=1">{head}</head>'
    "<body>{body}{tag}</body></html>"
)


@dataclass
class HttpRequest:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def form(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(self.body.decode()).items()}


@dataclass
class HttpReply:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Link:
    """One websocket, from the server's side."""

    def __init__(self, server: ScriptedServer, request: HttpRequest, writer: asyncio.StreamWriter) -> None:
        self.server, self.request, self.writer = server, request, writer
        self.frames: list[dict[str, Any]] = []
        self.close_code: int | None = None
        self.gone = False

    @property
    def token(self) -> str:
        return self.request.headers["sec-websocket-protocol"].split("token.")[1]

    def send(self, kind: str, **fields: Any) -> None:
        self.server.call(self._write(0x1, json.dumps({"type": kind, **fields}).encode()))

    def start(self, **fields: Any) -> None:
        """Send `session-start` with the usual limits."""
        usual = {"sessionId": "s1", "greeting": self.server.greeting, "idleTimeout": 300, "pingInterval": 25}
        self.send("session-start", **{**usual, "maxMessageChars": 4000, "maxPending": 4, **fields})

    def reply(self, message: str, *words: str, id: str = "r1", end: str = "finish") -> None:
        """Send a reply to *message* (an id), and its end unless that is empty."""
        self.send("start", messageId=id, messageMetadata={"inReplyTo": message})
        if words:
            self.send("text-start", id=id)
        for word in words:
            self.send("text-delta", id=id, delta=word)
        if end:
            if words:
                self.send("text-end", id=id)
            self.send(end)

    def close(self, code: int, reason: str = "") -> None:
        self.server.call(self._write(0x8, struct.pack("!H", code) + reason.encode(), close=True))

    def abort(self) -> None:
        """End without a closing frame, as a cut cable would."""
        self.server.loop.call_soon_threadsafe(self.writer.transport.abort)

    def wait(self, kind: str, count: int = 1, seconds: float = 8.0) -> dict[str, Any]:
        """Return the *count*-th frame of *kind* that came, when it has come."""
        self.server.until(
            lambda: sum(f["type"] == kind for f in self.frames) >= count, seconds, f"{kind} {self.frames}"
        )
        return [frame for frame in self.frames if frame["type"] == kind][count - 1]

    def texts(self) -> list[str]:
        return [frame["text"] for frame in self.frames if frame["type"] == "message"]

    async def _write(self, opcode: int, payload: bytes, *, close: bool = False) -> None:
        size = len(payload)
        head = bytes([0x80 | opcode]) + (
            bytes([size])
            if size < 126
            else b"\x7e" + struct.pack("!H", size)
            if size < 65536
            else b"\x7f" + struct.pack("!Q", size)
        )
        with contextlib.suppress(ConnectionError):
            self.writer.write(head + payload)
            await self.writer.drain()
            if close:
                self.writer.close()

    async def read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                first, second = await reader.readexactly(2)
                size = second & 0x7F
                if size == 126:
                    (size,) = struct.unpack("!H", await reader.readexactly(2))
                elif size == 127:
                    (size,) = struct.unpack("!Q", await reader.readexactly(8))
                mask = await reader.readexactly(4)
                payload = bytes(byte ^ mask[i % 4] for i, byte in enumerate(await reader.readexactly(size)))
                if first & 0xF == 0x8:
                    self.close_code = struct.unpack("!H", payload[:2])[0] if payload else 1005
                    break
                frame = json.loads(payload)
                self.frames.append(frame)
                if self.server.on_frame:
                    self.server.on_frame(self, frame)
        self.gone = True
        self.writer.close()


class ScriptedServer:
    """Serves the host page, the widget, the token and the socket; does nothing by itself but greet."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.reset()
        ready = threading.Event()
        threading.Thread(target=self._run, args=(ready,), daemon=True).start()
        ready.wait()

    def reset(self) -> None:
        self.greeting = "Hi! How can I **help**?"
        self.requests: list[HttpRequest] = []
        self.links: list[Link] = []
        self.token_replies: list[HttpReply | None] = []  # Used up one by one; None drops the connection.
        self.token_always: HttpReply | bool | None = False
        self.greets = True
        self.close_with: list[int] = []  # Close codes of the next sockets.
        self.tag = '<script src="/chat/widget.js" defer></script>'
        self.page: dict[str, str] = {}
        self.policy = ""
        self.body = '<main><h1>Shop</h1><p>Tea and cups.</p><input id="other" aria-label="Other"></main>'
        self.extra: dict[str, HttpReply] = {}
        self.on_frame: Any = None

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        ready.set()
        self.loop.run_forever()

    def call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(5)

    def until(self, true: Any, seconds: float = 8.0, what: str = "") -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, f"never came: {what}"
            time.sleep(0.005)

    def link(self, number: int = 1, seconds: float = 8.0) -> Link:
        """Return the *number*-th socket, when it has been opened."""
        self.until(lambda: len(self.links) >= number, seconds, f"socket {number}")
        return self.links[number - 1]

    def asked(self, path: str) -> list[HttpRequest]:
        return [request for request in self.requests if request.path == path]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._one(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *rest = head.split("\r\n")
        method, target, _ = line.split(" ")
        headers = {name.lower(): value for name, value in (h.split(": ", 1) for h in rest if ": " in h)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        request = HttpRequest(method, urlsplit(target).path, headers, body)
        self.requests.append(request)
        if headers.get("upgrade") == "websocket":
            await self._socket(request, reader, writer)
            return
        reply = self._answer(request)
        if reply is None:
            writer.transport.abort()
            return
        extra = "".join(f"{name}: {value}\r\n" for name, value in reply.headers.items())
        writer.write(
            f"HTTP/1.1 {reply.status} X\r\nContent-Length: {len(reply.body)}\r\nConnection: close\r\n{extra}\r\n".encode()
            + reply.body
        )
        await writer.drain()

    def _answer(self, request: HttpRequest) -> HttpReply | None:
        if request.path in self.extra:
            return self.extra[request.path]
        if request.path == "/chat/widget.js":
            return HttpReply(200, WIDGET.read_bytes(), {"Content-Type": "text/javascript; charset=utf-8"})
        if request.path == "/chat/token":
            if self.token_replies:
                return self.token_replies.pop(0)
            if self.token_always is not False:
                return self.token_always  # type: ignore[return-value]
            token = json.dumps({"token": f"v1.t{len(self.asked('/chat/token'))}.x", "expiresIn": 60}).encode()
            return HttpReply(201, token, {"Content-Type": "application/json", "Access-Control-Allow-Origin": "*"})
        if request.path in ("/", "/other"):
            html = PAGE.format(**{"html": "", "head": "", "tag": self.tag, **self.page, "body": self.body})
            policy = {"Content-Security-Policy": self.policy} if self.policy else {}
            return HttpReply(200, html.encode(), {"Content-Type": "text/html; charset=utf-8", **policy})
        return HttpReply(404)

    async def _socket(self, request: HttpRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key = request.headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        writer.write(
            f"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n"
            "Sec-WebSocket-Protocol: chat-session.v1\r\n\r\n".encode()
        )
        link = Link(self, request, writer)
        if self.close_with:
            code = self.close_with.pop(0)
            self.links.append(link)
            await link._write(0x8, struct.pack("!H", code), close=True)
            return
        if self.greets:
            fields = {"type": "session-start", "sessionId": f"s{len(self.links) + 1}", "greeting": self.greeting}
            limits = {"idleTimeout": 300, "pingInterval": 25, "maxMessageChars": 4000, "maxPending": 4}
            await link._write(0x1, json.dumps({**fields, **limits}).encode())
        self.links.append(link)
        await link.read(reader)


CHROMIUM = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or "chromium"
AXE = Path(os.environ.get("AXE_PATH", "axe.min.js"))
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WORDS = "[part~=input]"


def missing(what: str) -> None:
    """Skip where a tool is missing, except in CI, where everything must be there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what} is missing")
    pytest.skip(f"{what} is missing")


# ---- Fixtures ----


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all; its driver keeps an event loop running, so tests that run their own come before this."""
    if not Path(CHROMIUM).exists():
        missing(CHROMIUM)
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def scripted() -> ScriptedServer:
    return ScriptedServer()


@pytest.fixture
def server(scripted: ScriptedServer) -> Iterator[ScriptedServer]:
    scripted.reset()
    yield scripted
    for link in scripted.links:
        link.abort()


@pytest.fixture
def complaints() -> list[str]:
    """Errors that the page logged; a test that expects some clears the list."""
    return []


@pytest.fixture
def page(browser: Browser, complaints: list[str]) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1000, "height": 760})
    page = context.new_page()
    page.set_default_timeout(8_000)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console", lambda m: complaints.append(m.text) if m.type == "error" and "Failed to load" not in m.text else None
    )
    page.add_init_script(
        """window.heard = []
        for (const name of ["open", "close", "start", "end", "message", "error"])
            addEventListener(`chat-session:${name}`, (event) => heard.push([name, event.detail]))
        addEventListener("securitypolicyviolation", (event) => console.error(`CSP ${event.violatedDirective}`))"""
    )
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def chat(page: Page, server: ScriptedServer) -> Callable[..., Link]:
    """Open a page and the chat on it, and return the socket."""

    def start(path: str = "/", *, click: bool = True) -> Link:
        page.goto(server.url + path)
        expect(launcher(page)).to_be_visible()
        if not click:
            return None  # type: ignore[return-value]
        launcher(page).click()
        expect(page.locator(WORDS)).to_be_focused()
        link = server.link()
        expect(replies(page).first).to_be_visible()
        return link

    return start


def launcher(page: Page) -> Locator:
    return page.locator("[part~=launcher]")


def replies(page: Page) -> Locator:
    return page.locator("[part~=reply]")


def visitors(page: Page) -> Locator:
    return page.locator("[part~=visitor]")


def notice(page: Page) -> Locator:
    return page.locator("[part~=notice]")


def write(page: Page, text: str) -> None:
    page.locator(WORDS).fill(text)
    page.locator(WORDS).press("Enter")


def ask(page: Page, link: Link, text: str, count: int = 1) -> str:
    """Send a message and return its id, as the server saw it."""
    write(page, text)
    frame = link.wait("message", count)
    assert frame["text"] == text
    return str(frame["id"])


def events(page: Page, name: str) -> list[Any]:
    return [detail for event, detail in page.evaluate("heard") if event == name]


def leave_and_return(page: Page) -> None:
    """Do what the back/forward cache does to a page."""
    page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', { persisted: true }))")
    page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")


# ---- The source ----


def test_the_widget_weighs_at_most_ten_thousand_bytes() -> None:
    assert len(gzip.compress(WIDGET.read_bytes(), 9)) <= 10_000


def test_the_source_uses_nothing_that_a_strict_policy_forbids() -> None:
    source = WIDGET.read_text()
    for word in (
        "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", 'setAttribute("style"',
        "<style", "localStorage", "sessionStorage", "cookie", "indexedDB",
    ):  # fmt: skip
        assert word not in source, word


def test_the_source_passes_the_type_checker() -> None:
    tsc = Path(os.environ.get("TSC_PATH", "tsc"))
    if not tsc.exists():
        missing("tsc")
    flags = ["--checkJs", "--allowJs", "--strict", "--noEmit", "--target", "es2022", "--lib", "es2022,dom,dom.iterable"]
    done = subprocess.run([tsc, *flags, WIDGET], capture_output=True, text=True, check=False)
    assert done.stdout == ""


# ---- The page owner ----


def test_nothing_is_requested_or_stored_before_the_click_and_nothing_stored_after(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    chat(click=False)
    page.wait_for_load_state("networkidle")
    assert [r.path for r in server.requests if r.path != "/favicon.ico"] == ["/", "/chat/widget.js"]
    launcher(page).click()
    link = server.link()
    link.reply(ask(page, link, "hello"), "hi")
    expect(replies(page).last).to_have_text("hi")
    stored = page.evaluate(
        "async () => [localStorage.length, sessionStorage.length, document.cookie, (await indexedDB.databases()).length, "
        "(await caches.keys()).length]"
    )
    assert stored == [0, 0, "", 0, 0]
    (token,) = server.asked("/chat/token")
    assert token.method == "POST"
    assert token.body == b""
    assert "v1." not in server.links[0].request.path


def test_the_widget_is_clean_under_the_strict_policy(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    server.policy = STRICT_POLICY
    server.tag = (
        '<script src="/chat/widget.js" data-accent="#fc0" data-fallback-url="mailto:a@b.example" defer></script>'
    )
    link = chat()
    message = ask(page, link, "hello")
    link.reply(message, "**a** ![x](https://example.com/x.png)\n\n- b\n\n```\nc\n```", end="")
    link.send("source-url", sourceId="1", url="https://example.com", title="Source")
    link.send("finish")
    expect(replies(page).last).to_contain_text("Source")
    link.abort()
    server.link(2)
    page.locator("[part~=copy]").click()
    page.locator(WORDS).press("Escape")
    expect(page.locator("[part~=panel]")).to_be_hidden()  # The page fixture checks that nothing was reported.


def test_the_styles_of_the_host_do_not_reach_the_widget(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    server.page = {
        "head": '<link rel="stylesheet" href="/hostile.css">',
        "html": ' style="font-size: 40px"',
    }
    css = b"""* { font-size: 40px !important; color: red !important; font-family: fantasy !important; text-transform: uppercase }
        body *, chat-session { all: unset; position: static !important; opacity: .1 !important; display: none !important;
        z-index: 1 !important; transform: scale(2) !important; visibility: hidden !important; clip-path: circle(0) !important }
        button, textarea, div, aside { width: 3px !important; background: lime !important; direction: rtl !important }"""
    server.extra["/hostile.css"] = HttpReply(200, css, {"Content-Type": "text/css"})
    chat()
    looks = page.evaluate(
        """() => { const root = document.querySelector("chat-session").shadowRoot
        const of = (part) => getComputedStyle(root.querySelector(`[part~=${part}]`))
        return { font: of("input").fontSize, color: of("header").color, width: of("launcher").width,
            host: getComputedStyle(root.host).opacity, display: getComputedStyle(root.host).display } }"""
    )
    assert looks == {
        "font": "16px",
        "color": "rgb(28, 30, 33)",
        "width": "56px",
        "host": "1",
        "display": looks["display"],
    }
    assert looks["display"] != "none"


def test_a_tag_that_is_loaded_twice_makes_one_widget(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    server.tag = '<script src="/chat/widget.js" defer></script>' * 2
    chat()
    assert page.locator("chat-session").count() == 1
    assert len(server.links) == 1


@pytest.mark.parametrize(
    "swap",
    [
        "document.body.replaceWith(Object.assign(document.createElement('body'), { id: 'new' }))",
        "document.body.replaceChildren(); document.body.id = 'new'",
        "document.documentElement.replaceChildren(document.createElement('head'), "
        "Object.assign(document.createElement('body'), { id: 'new' }))",
    ],
    ids=["body", "children", "html"],
)
def test_a_page_that_swaps_its_body_keeps_its_one_chat(
    page: Page, server: ScriptedServer, chat: Callable[..., Link], swap: str
) -> None:
    link = chat()
    message = ask(page, link, "hello")
    link.reply(message, "one ", end="")
    page.evaluate(f"() => {{ {swap} }}")
    page.evaluate(
        "() => { const tag = document.createElement('script'); tag.src = '/chat/widget.js'; document.body.append(tag); "
        "return new Promise((done) => { tag.onload = done }) }"
    )
    link.send("text-delta", id="r1", delta="two")
    expect(replies(page).last).to_have_text("one two")
    assert page.locator("chat-session").count() == 1
    assert page.evaluate("document.body.id") == "new"
    assert len(server.links) == 1
    assert not link.gone


def test_destroy_says_goodbye_and_leaves_room_for_a_fresh_load(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    link = chat()
    page.evaluate("window.old = ChatSession; ChatSession.destroy()")
    link.wait("end")
    server.until(lambda: link.gone)
    assert page.locator("chat-session").count() == 0
    assert page.evaluate("'ChatSession' in window") is False
    page.evaluate("old.send('hello'); dispatchEvent(new Event('online'))")
    assert page.locator("chat-session").count() == 0
    page.evaluate(
        "() => { const tag = document.createElement('script'); tag.src = '/chat/widget.js'; document.body.append(tag) }"
    )
    launcher(page).click()
    fresh = server.link(2)
    fresh.reply(ask(page, fresh, "again"), "yes")
    expect(replies(page).last).to_have_text("yes")
    assert server.asked("/chat/token")[-1].form == {}


def test_the_page_is_told_what_happens(page: Page, server: ScriptedServer, chat: Callable[..., Link]) -> None:
    link = chat(click=False)
    page.evaluate("ChatSession.open()")
    link = server.link()
    expect(page.locator(WORDS)).to_be_focused()
    page.evaluate("ChatSession.send('hello')")
    message = link.wait("message")["id"]
    link.reply(message, "good ", "day")
    expect(replies(page).last).to_have_text("good day")
    link.send("message-rejected", id=None, code="invalid", detail="What?")
    expect(notice(page)).to_have_text("What?")
    page.evaluate("ChatSession.close()")
    link.send("session-end", reason="idle")
    page.wait_for_function("heard.some(([name]) => name === 'end')")
    assert page.evaluate("heard") == [
        ["open", page.evaluate("heard[0][1]")],
        ["start", {"sessionId": "s1"}],
        ["message", {"id": message, "role": "user", "text": "hello"}],
        ["message", {"id": "r1", "role": "assistant", "text": "good day"}],
        ["error", {"code": "invalid"}],
        ["close", page.evaluate("heard[5][1]")],
        ["end", {"reason": "idle"}],
    ]


def test_every_visible_string_can_be_replaced(page: Page, server: ScriptedServer, chat: Callable[..., Link]) -> None:
    names = [
        "launcher",
        "close",
        "placeholder",
        "send",
        "stop",
        "cancel",
        "waiting",
        "reconnecting",
        "copy",
        "idle",
        "stay",
        "ended",
        "busy",
        "failed",
        "unreachable",
        "fallback",
        "newer",
        "unread",
    ]
    texts = " ".join(f'data-text-{name}="x{name}x"' for name in names)
    server.tag = f'<script src="/chat/widget.js" data-title="Titel" data-fallback-url="tel:1" {texts} defer></script>'
    link = chat()
    page.wait_for_function("ChatSession")
    first = ask(page, link, "one")
    link.send("start", messageId="r1", messageMetadata={"inReplyTo": first})
    ask(page, link, "two", 2)
    link.send("session-idle", closesIn=60)
    expect(notice(page)).to_have_text("xidlex")
    seen = page.evaluate(
        """() => [...document.querySelector("chat-session").shadowRoot.querySelectorAll("*")].flatMap((node) =>
        [node.ariaLabel, node.placeholder, ...[...node.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data)])"""
    )
    link.send("session-end", reason="replaced")
    expect(notice(page)).to_have_text("xendedx")
    shown = {text for text in seen if text} | {"xendedx"}
    expected = {f"x{n}x" for n in names} - {"xreconnectingx", "xbusyx", "xfailedx", "xunreachablex", "xunreadx"}
    assert expected <= shown
    source = WIDGET.read_text()
    assert {name for name in names if not re.search(rf"^    {name}: ", source, re.MULTILINE)} == set()


def test_another_origin_is_reached_by_its_endpoint_without_cookies(page: Page, server: ScriptedServer) -> None:
    other = server.url.replace("127.0.0.1", "localhost")
    server.tag = f'<script src="/chat/widget.js" data-endpoint="{other}/chat" defer></script>'
    page.goto(server.url)
    page.context.add_cookies([{"name": "a", "value": "b", "url": other}])
    launcher(page).click()
    link = server.link()
    (token,) = server.asked("/chat/token")
    assert token.headers["host"].startswith("localhost")
    assert token.headers["origin"] == server.url
    assert "cookie" not in token.headers
    assert link.request.headers["sec-websocket-protocol"] == "chat-session.v1, token.v1.t1.x"
    assert [r.method for r in server.requests if r.path == "/chat/token"] == ["POST"]  # No preflight.


def test_data_open_counts_as_the_click(page: Page, server: ScriptedServer) -> None:
    server.tag = '<script src="/chat/widget.js" data-open defer></script>'
    page.goto(server.url)
    server.link()
    expect(replies(page)).to_have_text("Hi! How can I help?")
    expect(launcher(page)).to_have_attribute("aria-expanded", "true")


@pytest.mark.parametrize("color", ["#ffcc00", "#112244", "#777777", "#ff0000", "rgb(0 160 120)", "white", "black"])
def test_text_on_any_accent_stays_readable(
    page: Page, server: ScriptedServer, chat: Callable[..., Link], color: str
) -> None:
    server.tag = f'<script src="/chat/widget.js" data-accent="{color}" defer></script>'
    chat(click=False)
    contrast = page.evaluate(
        """() => { const style = getComputedStyle(document.querySelector("chat-session").shadowRoot.querySelector("[part~=launcher]"))
        const light = (text) => { const [r, g, b] = text.match(/[\\d.]+/g).map((v) => v / 255)
            .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05 }
        const pair = [light(style.color), light(style.backgroundColor)]
        return Math.max(...pair) / Math.min(...pair) }"""
    )
    assert contrast >= 4.5


@pytest.mark.parametrize(("position", "left"), [("right", False), ("left", True)])
def test_the_position_is_where_the_tag_says(
    page: Page, server: ScriptedServer, chat: Callable[..., Link], position: str, left: bool
) -> None:
    server.tag = f'<script src="/chat/widget.js" data-position="{position}" defer></script>'
    chat()
    for part in ("launcher", "panel"):
        box = page.locator(f"[part~={part}]").bounding_box()
        assert box
        assert (box["x"] < 100) is left


def test_css_variables_and_parts_restyle_the_widget(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    server.page = {"head": '<link rel="stylesheet" href="/own.css">'}
    css = b"chat-session { --chat-bg: rgb(1, 2, 3); --chat-text: rgb(250, 250, 250); --chat-width: 300px; --chat-radius: 3px; "
    css += b"--chat-z: 7; --chat-font: serif } chat-session::part(header) { text-transform: uppercase }"
    server.extra["/own.css"] = HttpReply(200, css, {"Content-Type": "text/css"})
    chat()
    panel = page.locator("[part~=panel]")
    expect(panel).to_have_css("background-color", "rgb(1, 2, 3)")
    expect(panel).to_have_css("border-radius", "3px")
    expect(panel).to_have_css("width", "300px")
    expect(panel).to_have_css("font-family", "serif")
    expect(page.locator("chat-session")).to_have_css("z-index", "7")
    expect(page.locator("[part~=header]")).to_have_css("text-transform", "uppercase")


# ---- The talk ----


def test_typing_dots_show_until_the_first_word(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    link.reply(ask(page, link, "hello"), end="")
    dots = "node => getComputedStyle(node.firstElementChild, '::before').content"
    expect(replies(page)).to_have_count(2)
    assert "●" in replies(page).last.evaluate(dots)
    link.send("text-delta", id="r1", delta="Good")
    expect(replies(page).last).to_have_text("Good")
    assert replies(page).last.evaluate(dots) == "none"


def test_messages_written_behind_a_reply_wait_and_can_be_taken_back(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    link.reply(ask(page, link, "one"), "1", end="")
    two = ask(page, link, "two", 2)
    expect(visitors(page).last).to_contain_text("Waiting")
    expect(visitors(page).first).to_have_text("one")
    page.get_by_role("button", name="Take back").click()
    assert link.wait("stop")["id"] == two
    link.send("message-rejected", id=two, code="cancelled", detail="Taken back.")
    expect(page.locator(WORDS)).to_have_value("two")
    expect(page.locator(WORDS)).to_be_focused()
    expect(visitors(page)).to_have_count(1)
    link.send("finish")
    page.locator(WORDS).press("Enter")
    assert link.wait("message", 3)["text"] == "two"
    assert link.wait("message", 3)["id"] != two


def test_taking_back_keeps_what_is_in_the_composer(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    link.reply(ask(page, link, "one"), "1", end="")
    ask(page, link, "two", 2)
    page.locator(WORDS).fill("three")
    page.get_by_role("button", name="Take back").click()
    expect(page.locator(WORDS)).to_have_value("two\nthree")


def test_the_stop_button_names_its_message(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    stop = page.locator("[part~=stop]")
    expect(stop).to_be_hidden()
    message = ask(page, link, "one")
    link.reply(message, end="")
    stop.click()
    assert link.wait("stop") == {"type": "stop", "id": message}
    link.send("abort", reason="stopped")
    expect(stop).to_be_hidden()
    expect(visitors(page)).to_have_text("one")


def test_enter_sends_and_shift_enter_breaks_the_line(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    page.locator(WORDS).press_sequentially("one")
    page.locator(WORDS).press("Shift+Enter")
    page.locator(WORDS).press_sequentially("two")
    page.locator(WORDS).press("Enter")
    assert link.wait("message")["text"] == "one\ntwo"
    expect(page.locator(WORDS)).to_have_value("")


@pytest.mark.parametrize("init", ["isComposing: true", "keyCode: 229"])
def test_the_enter_of_an_input_method_does_not_send(page: Page, chat: Callable[..., Link], init: str) -> None:
    link = chat()
    page.locator(WORDS).fill("日本")
    prevented = page.locator(WORDS).evaluate(
        f"node => !node.dispatchEvent(new KeyboardEvent('keydown', {{ key: 'Enter', {init}, bubbles: true, cancelable: true }}))"
    )
    assert prevented is False
    expect(page.locator(WORDS)).to_have_value("日本")
    ask(page, link, "after")
    assert link.texts() == ["after"]


def test_white_space_alone_is_not_sent(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    write(page, "  \n ")
    ask(page, link, "after")
    assert link.texts() == ["after"]


def test_a_rejected_message_is_marked_and_offered_back_and_not_sent_again(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    link = chat()
    message = ask(page, link, "hello")
    link.send("message-rejected", id=message, code="rate-limited", detail="Too fast.", retryAfter=3)
    expect(visitors(page)).to_contain_text("Too fast.")
    expect(page.locator(WORDS)).to_have_value("hello")
    assert events(page, "error") == [{"code": "rate-limited"}]
    link.abort()
    second = server.link(2)
    ask(page, second, "other")
    assert second.texts() == ["other"]


def test_a_rejected_message_waits_beside_a_composer_in_use(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    message = ask(page, link, "hello")
    page.locator(WORDS).fill("draft")
    link.send("message-rejected", id=message, code="too-many", detail="Too many.")
    expect(visitors(page)).to_contain_text("Too many.")
    expect(page.locator(WORDS)).to_have_value("draft")
    page.get_by_role("button", name="Take back").click()
    expect(page.locator(WORDS)).to_have_value("hello\ndraft")


def test_a_message_that_is_too_long_comes_back_unsent(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    server.greets = False
    page.goto(server.url)
    launcher(page).click()
    link = server.link()
    link.start(maxMessageChars=3)
    expect(replies(page)).to_be_visible()
    write(page, "four")
    expect(visitors(page)).to_contain_text("4 / 3")
    expect(page.locator(WORDS)).to_have_value("four")
    ask(page, link, "🙂🙂🙂")  # Code points, not UTF-16 units.
    assert link.texts() == ["🙂🙂🙂"]


def test_no_more_messages_are_on_the_wire_than_may_wait(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    server.greets = False
    page.goto(server.url)
    launcher(page).click()
    link = server.link()
    for number in range(6):
        write(page, str(number))
    link.start(maxPending=2)
    first = link.wait("message")["id"]
    expect(page.get_by_text("Waiting")).to_have_count(6)
    assert link.texts() == ["0", "1", "2"]
    link.reply(first, "a")
    link.wait("message", 4)
    assert link.texts() == ["0", "1", "2", "3"]


def test_the_waiting_message_is_sent_once_when_the_session_has_started(page: Page, server: ScriptedServer) -> None:
    server.greets = False
    page.goto(server.url)
    launcher(page).click()
    write(page, "early")
    link = server.link()
    assert link.texts() == []
    link.start()
    link.wait("message")
    texts = page.locator("[part~=message]").all_inner_texts()
    assert texts[0].startswith("Hi!")  # The greeting opens the chat, before the words that were faster.
    assert texts[1].startswith("early")


def test_the_transcript_can_be_copied(page: Page, chat: Callable[..., Link]) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    link = chat()
    link.reply(ask(page, link, "hello"), "good **day**")
    expect(replies(page).last).to_have_text("good day")
    page.get_by_role("button", name="Copy transcript").click()
    page.wait_for_function("async () => (await navigator.clipboard.readText()).includes('hello')")
    text = page.evaluate("navigator.clipboard.readText()")
    assert text.replace("\r", "") == "Hi! How can I help?\n\n> hello\n\ngood day"


def test_the_transcript_can_be_copied_where_the_page_has_no_clipboard(page: Page, chat: Callable[..., Link]) -> None:
    page.add_init_script(
        "delete Navigator.prototype.clipboard; addEventListener('copy', (e) => setTimeout(() => { "
        "window.copied = e.clipboardData.getData('text/plain') || window.copied }), true);"
        "const set = DataTransfer.prototype.setData; DataTransfer.prototype.setData = function (t, v) { window.copied = v }"
    )
    chat()
    page.get_by_role("button", name="Copy transcript").click()
    assert page.evaluate("window.copied") == "Hi! How can I help?"


# ---- Words ----

MARKDOWN = [
    (
        "**bold** and *it* and _it_ and __b__",
        "<p><strong>bold</strong> and <em>it</em> and <em>it</em> and <strong>b</strong></p>",
    ),
    ("***both***", "<p><strong><em>both</em></strong></p>"),
    ("`a*b*` and snake_case_name and 2 * 3 * 4", "<p><code>a*b*</code> and snake_case_name and 2 * 3 * 4</p>"),
    ("open **bold", "<p>open **bold</p>"),
    ("# Head\ntext", "<p><strong>Head</strong>\ntext</p>"),
    ("one\ntwo\n\nthree", "<p>one\ntwo</p><p>three</p>"),
    ("Here:\n- a\n- b\n  - c", "<p>Here:</p><ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>"),
    ("1. a\n\n2. b", '<ol start="1"><li>a</li></ol><ol start="2"><li>b</li></ol>'),
    ("```js\nlet *a*\n\n<b>\n```\nafter", "<pre>let *a*\n\n&lt;b&gt;</pre><p>after</p>"),
    ("<img src=x onerror=alert(1)><b>hi</b>", "<p>&lt;img src=x onerror=alert(1)&gt;&lt;b&gt;hi&lt;/b&gt;</p>"),
    (r"\*no\*", "<p>*no*</p>"),
    ("**重点**内容", "<p><strong>重点</strong>内容</p>"),
]
LINKS = [
    ("[a](https://x.example/p_(q))", "https://x.example/p_(q)"),
    ("[a](http://x.example)", "http://x.example/"),
    ("[a](mailto:a@b.example)", "mailto:a@b.example"),
    ("[a](tel:+123)", "tel:+123"),
    ("see https://x.example/a_b.", "https://x.example/a_b"),
    ("**https://x.example/a**", "https://x.example/a"),
    ("![a](https://x.example/i.png)", "https://x.example/i.png"),
    ("[a](javascript:alert(1))", None),
    ("[a](JaVaScRiPt:alert(1))", None),
    ("[a](data:text/html,x)", None),
    ("[a](vbscript:x)", None),
    ("[a](&#106;avascript:x)", None),
    ("[a](file:///etc/passwd)", None),
    ("[a](blob:https://x.example/1)", None),
]


def shown(page: Page, link: Link, text: str) -> Locator:
    link.reply(ask(page, link, "?"), text)
    expect(replies(page)).to_have_count(2)
    expect(replies(page).last).to_have_attribute("data-state", "finished")
    return replies(page).last


@pytest.mark.parametrize(("text", "nodes"), MARKDOWN, ids=[text[:20] for text, _ in MARKDOWN])
def test_markdown_becomes_nodes(page: Page, chat: Callable[..., Link], text: str, nodes: str) -> None:
    reply = shown(page, chat(), text)
    assert reply.locator("> div").first.evaluate("node => node.innerHTML") == nodes


@pytest.mark.parametrize(("text", "address"), LINKS, ids=[text for text, _ in LINKS])
def test_links_go_only_where_links_may_go(
    page: Page, chat: Callable[..., Link], text: str, address: str | None
) -> None:
    reply = shown(page, chat(), text)
    assert reply.locator("img").count() == 0
    if address is None:
        assert reply.locator("a").count() == 0
        expect(reply).to_contain_text("a")
        return
    anchor = reply.locator("a")
    expect(anchor).to_have_attribute("href", address)
    expect(anchor).to_have_attribute("target", "_blank")
    expect(anchor).to_have_attribute("rel", "noopener noreferrer nofollow ugc")


def test_sources_are_links_under_the_reply_by_the_same_rules(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    link.reply(ask(page, link, "?"), "words", end="")
    link.send("source-url", sourceId="1", url="https://x.example/a", title="A <b>")
    link.send("source-url", sourceId="2", url="javascript:alert(1)", title="B")
    link.send("finish")
    sources = replies(page).last.locator("[part~=sources]")
    expect(sources.locator("a")).to_have_text("A <b>")
    expect(sources.locator("a")).to_have_attribute("rel", "noopener noreferrer nofollow ugc")
    expect(sources).to_contain_text("B")


def test_words_that_grow_are_drawn_as_the_whole_would_be_and_finished_blocks_keep_their_nodes(
    page: Page, chat: Callable[..., Link]
) -> None:
    text = "\n\n".join(text for text, _ in MARKDOWN) + "\n- x\n\n  y ``` z\n# h"
    link = chat()
    link.reply(ask(page, link, "?"), end="")
    body = replies(page).last.locator("> div").first
    for start in range(0, len(text), 3):
        link.send("text-delta", id="r1", delta=text[start : start + 3])
        if start == 60:
            expect(body).to_contain_text("both")
            body.evaluate("node => { window.kept = node.firstChild }")
    link.send("finish")
    expect(replies(page).last).to_have_attribute("data-state", "finished")
    assert body.evaluate("node => node.firstChild === window.kept")
    grown = body.evaluate("node => node.innerHTML")
    link.reply(ask(page, link, "?", 2), text, id="r2")
    expect(replies(page).last).to_have_attribute("data-state", "finished")
    assert replies(page).last.locator("> div").first.evaluate("node => node.innerHTML") == grown


@pytest.mark.parametrize(
    "text",
    [
        "**a " * 8000,
        "[a](b " * 5000,
        "`" * 32000,
        "*a_" * 10000,
        "[" * 32000,
        "- " * 16000,
        "http://" * 4500,
        "(" * 32000,
    ],
    ids=lambda text: text[:6],
)
def test_no_text_makes_the_page_stall(page: Page, chat: Callable[..., Link], text: str) -> None:
    link = chat()
    page.evaluate(
        "new PerformanceObserver((l) => l.getEntries().forEach((e) => { window.longest = e.duration }))"
        ".observe({ type: 'longtask' })"
    )
    shown(page, link, text)
    assert page.evaluate("window.longest ?? 0") < 1000


# ---- Coming back ----


def test_a_reply_cut_by_a_drop_continues_in_its_own_bubble(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    link = chat()
    message = ask(page, link, "hello")
    link.reply(message, "one two ", end="")
    expect(replies(page).last).to_have_text("one two")
    link.abort()
    expect(notice(page)).to_have_text("Reconnecting")
    second = server.link(2)
    assert server.asked("/chat/token")[-1].form == {"previous": link.token}
    assert second.wait("message")["id"] == message
    second.reply(message, "one two three ", end="")
    second.send("text-delta", id="r1", delta="four")
    second.send("finish")
    expect(replies(page)).to_have_count(2)  # The greeting is not repeated either.
    expect(replies(page).last).to_have_text("one two three four")
    expect(notice(page)).to_have_text("")
    assert len(events(page, "message")) == 2


def test_a_reply_that_finished_while_away_is_announced_once(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    link = chat()
    message = ask(page, link, "hello")
    link.reply(message, "done")
    expect(replies(page).last).to_have_text("done")
    link.abort()
    second = server.link(2)
    second.reply(message, "done")
    second.reply(ask(page, second, "next"), "more", id="r2")
    expect(replies(page)).to_have_count(3)
    expect(replies(page).last).to_have_text("more")
    assert [e["text"] for e in events(page, "message")] == ["hello", "done", "next", "more"]
    assert second.texts() == ["next"]


def test_a_failed_reply_that_is_answered_anew_gives_up_its_place(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    link = chat()
    message = ask(page, link, "hello")
    link.reply(message, "half", end="")
    expect(replies(page).last).to_have_text("half")
    ask(page, link, "next", 2)
    link.abort()
    second = server.link(2)
    second.wait("message", 2)
    assert second.texts() == ["hello", "next"]
    second.reply(message, "half", end="")
    second.send("error", errorText="Sorry.")
    expect(replies(page).last).to_contain_text("Sorry.")
    second.reply(message, "whole", id="r2")
    expect(replies(page)).to_have_count(2)
    expect(replies(page).last).to_have_text("whole")
    order = page.locator("[part~=message]").all_inner_texts()
    assert [text.split("\n")[0] for text in order] == ["Hi! How can I help?", "hello", "whole", "next"]


def test_an_interrupted_reply_is_asked_for_again(page: Page, server: ScriptedServer, chat: Callable[..., Link]) -> None:
    link = chat()
    message = ask(page, link, "hello")
    link.reply(message, "half", end="")
    link.send("abort", reason="interrupted")
    link.send("session-end", reason="restart")
    link.close(1012)
    second = server.link(2)
    assert second.wait("message")["id"] == message
    assert server.asked("/chat/token")[-1].form == {"previous": link.token}
    second.reply(message, "whole", id="r2")
    expect(replies(page).last).to_have_text("whole")
    expect(replies(page)).to_have_count(2)


@pytest.mark.parametrize("reason", ["idle", "visitor", "replaced"])
def test_after_an_end_only_the_next_message_starts_a_fresh_chat(
    page: Page, server: ScriptedServer, chat: Callable[..., Link], reason: str
) -> None:
    link = chat()
    link.reply(ask(page, link, "hello"), "hi")
    expect(replies(page).last).to_have_text("hi")
    link.send("session-end", reason=reason)
    link.close(1000)
    expect(notice(page)).to_have_text("This chat has ended. Write to start a new one.")
    page.evaluate("dispatchEvent(new Event('online'))")
    launcher(page).click()
    launcher(page).click()
    assert len(server.asked("/chat/token")) == 1
    write(page, "again")
    second = server.link(2)
    assert second.wait("message")["text"] == "again"
    assert server.asked("/chat/token")[-1].form == {}
    expect(notice(page)).to_have_text("")
    texts = [text.split("\n")[0] for text in page.locator("[part~=message]").all_inner_texts()]
    assert texts == ["Hi! How can I help?", "hello", "hi", "Hi! How can I help?", "again"]


def test_a_message_that_crosses_the_idle_close_starts_the_fresh_chat(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    link = chat()
    message = ask(page, link, "late")
    link.send("session-end", reason="idle")
    link.close(1000)
    second = server.link(2)
    assert second.wait("message") == {"type": "message", "id": message, "text": "late"}
    assert server.asked("/chat/token")[-1].form == {}


@pytest.mark.parametrize("code", [1003, 1008, 1009])
def test_the_message_at_fault_for_a_close_is_offered_back_and_the_others_go_again(
    page: Page, server: ScriptedServer, chat: Callable[..., Link], code: int
) -> None:
    link = chat()
    ask(page, link, "good")
    ask(page, link, "bad", 2)
    link.close(code)
    expect(page.locator(WORDS)).to_have_value("bad")
    expect(visitors(page).last).to_contain_text("Something went wrong")
    second = server.link(2)
    second.wait("message")
    ask_again = ask(page, second, "other", 2)
    assert ask_again
    assert second.texts() == ["good", "other"]


def test_a_bad_token_is_replaced_once_and_then_told(page: Page, server: ScriptedServer) -> None:
    server.close_with = [3000, 3000]
    server.tag = '<script src="/chat/widget.js" data-fallback-url="mailto:shop@example.com" defer></script>'
    page.goto(server.url)
    launcher(page).click()
    expect(notice(page)).to_have_text("The chat cannot be reached right now.")
    expect(page.get_by_role("link", name="Contact us another way")).to_have_attribute("href", "mailto:shop@example.com")
    assert len(server.asked("/chat/token")) == 2
    write(page, "try again")
    assert server.link(3).wait("message")["text"] == "try again"
    expect(notice(page)).to_have_text("")


@pytest.mark.parametrize("status", [403, 404])
def test_a_refusal_is_told_plainly(page: Page, server: ScriptedServer, status: int) -> None:
    server.token_always = HttpReply(status)
    server.tag = '<script src="/chat/widget.js" data-fallback-url="javascript:alert(1)" defer></script>'
    page.goto(server.url)
    launcher(page).click()
    expect(notice(page)).to_have_text("The chat cannot be reached right now.")
    expect(page.get_by_text("Contact us another way")).to_be_hidden()
    assert events(page, "error") == [{"code": "unreachable"}]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("date", [False, True], ids=["seconds", "date"])
def test_a_busy_server_is_asked_again_no_sooner_than_it_says(
    page: Page, server: ScriptedServer, status: int, date: bool
) -> None:
    page.clock.install(time="2026-11-22T12:00:00Z")
    after = "Sun, 22 Nov 2026 12:00:30 GMT" if date else "30"
    server.token_replies = [HttpReply(status, b"{}", {"Retry-After": after})]
    page.goto(server.url)
    page.clock.pause_at("2026-11-22T12:00:01Z")
    launcher(page).click()
    expect(notice(page)).to_have_text("We are busy right now. Please try again soon.")
    page.clock.run_for(28_000)
    page.evaluate("dispatchEvent(new Event('online'))")
    assert len(server.asked("/chat/token")) == 1
    page.clock.run_for(4_000)
    server.link()
    page.clock.run_for(100)
    expect(notice(page)).to_have_text("")


def test_a_full_server_is_asked_again_later(page: Page, server: ScriptedServer) -> None:
    server.close_with = [1013]
    page.goto(server.url)
    launcher(page).click()
    expect(notice(page)).to_have_text("We are busy right now. Please try again soon.")
    server.link(2)
    expect(notice(page)).to_have_text("")


def test_a_server_that_is_away_is_told_after_some_tries_and_found_again(page: Page, server: ScriptedServer) -> None:
    page.clock.install()
    server.token_always = None
    server.tag = '<script src="/chat/widget.js" data-fallback-url="https://example.com/contact" defer></script>'
    page.goto(server.url)
    launcher(page).click()
    expect(notice(page)).to_have_text("Reconnecting")
    for tries in range(2, 5):
        page.clock.fast_forward(20_500)
        server.until(lambda tries=tries: len(server.asked("/chat/token")) >= tries)
        page.wait_for_timeout(50)
    expect(notice(page)).to_have_text("The chat cannot be reached right now.")
    expect(page.get_by_role("link", name="Contact us another way")).to_be_visible()
    write(page, "anyone?")
    server.token_always = False
    page.evaluate("dispatchEvent(new Event('online'))")
    assert server.link().wait("message")["text"] == "anyone?"
    expect(notice(page)).to_have_text("")


def test_the_waits_have_full_jitter_between_half_a_second_and_twenty(page: Page, server: ScriptedServer) -> None:
    page.add_init_script(
        "window.waits = []; const real = setTimeout; window.setTimeout = (act, ms, ...rest) => { "
        "if (ms >= 500 && ms !== 15000) { waits.push(ms); ms = 1 } return real(act, ms, ...rest) }; "
        "window.luck = 0.999999; Math.random = () => luck"
    )
    server.token_always = None
    page.goto(server.url)
    launcher(page).click()
    page.wait_for_function("waits.length > 9")
    highest = page.evaluate("waits.slice(0, 9)")
    assert [round(wait) for wait in highest[:3]] == [1000, 1500, 2500]
    assert max(highest) <= 20_000
    assert round(highest[-1]) == 20_000
    page.evaluate("luck = 0; waits.length = 0")
    page.wait_for_function("waits.length > 3")
    assert set(page.evaluate("waits.slice(1)")) == {500}


def test_the_waits_are_short_again_once_a_connection_has_held(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    page.add_init_script(
        "window.waits = []; const real = setTimeout; window.setTimeout = (act, ms, ...rest) => { "
        "if (ms >= 500 && ms < 15000) { waits.push(Math.round(ms)); ms = 1 } return real(act, ms, ...rest) }; "
        "Math.random = () => 0.999999"
    )
    chat()
    for number in (1, 2, 3):
        server.link(number).abort()
        server.link(number + 1)
        page.wait_for_function(f"heard.filter(([name]) => name === 'start').length > {number}")
    assert page.evaluate("waits") == [1000, 1500, 2500]
    page.evaluate("const now = Date.now; Date.now = () => now() + 10_001")
    server.link(4).abort()
    server.link(5)
    assert page.evaluate("waits.at(-1)") == 1000


def test_a_reload_and_a_second_tab_are_fresh_chats(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    link = chat()
    ask(page, link, "hello")
    page.reload()
    launcher(page).click()
    server.link(2)
    tab = page.context.new_page()
    tab.goto(server.url)
    launcher(tab).click()
    server.link(3)
    expect(page.locator("[part~=message]")).to_have_text("Hi! How can I help?")
    expect(tab.locator("[part~=message]")).to_have_text("Hi! How can I help?")
    assert [token.form for token in server.asked("/chat/token")] == [{}, {}, {}]


def test_a_link_without_frames_is_dead(page: Page, server: ScriptedServer, chat: Callable[..., Link]) -> None:
    page.clock.install()
    link = chat()
    page.clock.run_for(39_000)
    assert len(server.links) == 1
    link.send("ping")
    link.wait("pong")
    page.clock.run_for(39_000)
    assert len(server.links) == 1
    page.clock.run_for(2_000)
    page.clock.run_for(1_000)  # The longest first wait.
    server.link(2)
    assert server.asked("/chat/token")[-1].form == {"previous": link.token}


@pytest.mark.parametrize("wake", ["window.online", "document.visibilitychange", "window.pageshow"])
def test_a_page_that_wakes_checks_its_link_at_once(
    page: Page, server: ScriptedServer, chat: Callable[..., Link], wake: str
) -> None:
    chat()
    target, event = wake.split(".")
    page.evaluate(f"{target}.dispatchEvent(new Event('{event}'))")
    page.evaluate("const now = Date.now; Date.now = () => now() + 60_000")  # The machine slept; no timer has fired.
    assert len(server.links) == 1
    page.evaluate(f"{target}.dispatchEvent(new Event('{event}'))")
    server.link(2)
    assert server.asked("/chat/token")[-1].form == {"previous": "v1.t1.x"}


def test_a_page_that_is_hidden_closes_without_end_and_returns(
    page: Page, server: ScriptedServer, chat: Callable[..., Link]
) -> None:
    link = chat()
    message = ask(page, link, "hello")
    leave_and_return(page)
    second = server.link(2)
    server.until(lambda: link.gone)
    assert [frame["type"] for frame in link.frames] == ["message"]
    assert second.wait("message")["id"] == message
    assert second.request.path == "/chat/socket"


def test_the_back_forward_cache_keeps_the_chat(browser: Browser, server: ScriptedServer, complaints: list[str]) -> None:
    with_cache = browser.browser_type.launch(
        executable_path=CHROMIUM,
        args=[*FLAGS, "--enable-features=BackForwardCache"],
        ignore_default_args=["--disable-back-forward-cache"],
    )
    page = with_cache.new_page()
    page.goto(server.url)
    launcher(page).click()
    link = server.link()
    link.reply(ask(page, link, "hello"), "hi")
    expect(replies(page).last).to_have_text("hi")
    page.evaluate("window.alive = true")
    page.goto(server.url + "/other")
    server.until(lambda: link.gone)
    page.evaluate("setTimeout(() => history.back())")
    page.wait_for_url(server.url + "/", wait_until="commit")
    if not page.evaluate("window.alive === true"):
        with_cache.close()
        missing("the back/forward cache")
    second = server.link(2)
    assert server.asked("/chat/token")[-1].form == {"previous": link.token}
    second.reply(ask(page, second, "more"), "yes", id="r2")
    expect(replies(page).last).to_have_text("yes")
    expect(replies(page)).to_have_count(3)
    with_cache.close()


def test_a_stale_link_cannot_speak(page: Page, server: ScriptedServer, chat: Callable[..., Link]) -> None:
    link = chat()
    leave_and_return(page)
    second = server.link(2)
    link.send("session-end", reason="idle")
    second.reply(ask(page, second, "hello"), "hi")
    expect(replies(page).last).to_have_text("hi")
    expect(notice(page)).to_have_text("")


# ---- Ending ----


def test_the_idle_warning_is_answered_by_one_press(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    link.send("session-idle", closesIn=60)
    expect(notice(page)).to_have_text("Still there? This chat closes soon.")
    page.get_by_role("button", name="Stay").click()
    link.wait("stay")
    expect(notice(page)).to_have_text("")
    expect(page.get_by_role("button", name="Stay")).to_be_hidden()


def test_typing_counts_as_staying_once_per_warning_and_ten_times_at_most(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    page.locator(WORDS).press_sequentially("ab")
    for warning in range(11):
        link.send("session-idle", closesIn=60)
        expect(page.get_by_role("button", name="Stay")).to_be_visible()
        page.locator(WORDS).press_sequentially("ab")
        if warning < 10:
            expect(notice(page)).to_have_text("")
    expect(notice(page)).to_have_text("Still there? This chat closes soon.")
    page.get_by_role("button", name="Stay").click()
    link.wait("stay", 11)
    assert [frame["type"] for frame in link.frames] == ["stay"] * 11


def test_closing_the_panel_ends_nothing(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    message = ask(page, link, "hello")
    page.get_by_role("button", name="Close chat").click()
    expect(page.locator("[part~=badge]")).to_be_hidden()
    link.reply(message, "hi")
    expect(page.locator("[part~=badge]")).to_have_text("1")
    expect(launcher(page)).to_have_accessible_description("New reply")
    launcher(page).click()
    expect(page.locator("[part~=badge]")).to_be_hidden()
    assert not link.gone
    assert [frame["type"] for frame in link.frames] == ["message"]


# ---- Everyone ----


def test_the_keyboard_alone_is_enough(page: Page, chat: Callable[..., Link]) -> None:
    chat(click=False)
    expect(launcher(page)).to_have_attribute("aria-expanded", "false")
    launcher(page).focus()
    page.keyboard.press("Enter")
    expect(page.locator(WORDS)).to_be_focused()
    expect(launcher(page)).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("Escape")
    expect(launcher(page)).to_be_focused()
    expect(launcher(page)).to_have_attribute("aria-expanded", "false")
    expect(page.locator("[part~=panel]")).to_be_hidden()


def test_incoming_words_never_move_the_focus(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    message = ask(page, link, "hello")
    page.locator("#other").focus()
    link.reply(message, "one", end="")
    link.send("session-idle", closesIn=9)
    link.send("finish")
    expect(replies(page).last).to_have_attribute("data-state", "finished")
    expect(page.locator("#other")).to_be_focused()


def test_a_control_that_goes_leaves_the_focus_in_the_composer(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    link.reply(ask(page, link, "hello"), "one", end="")
    page.locator("[part~=stop]").focus()
    link.send("finish")
    expect(page.locator(WORDS)).to_be_focused()


def test_a_reply_is_announced_once_and_whole(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    message = ask(page, link, "hello")
    page.evaluate(
        "window.said = []; const region = document.querySelector('chat-session').shadowRoot.querySelector('[aria-live=polite]');"
        "new MutationObserver(() => said.push(region.textContent)).observe(region, { childList: true, subtree: true, "
        "characterData: true })"
    )
    link.reply(message, "one ", "**two** ", "three")
    expect(replies(page).last).to_have_attribute("data-state", "finished")
    assert page.evaluate("said") == ["one two three"]
    assert page.locator("[part~=log] [aria-live], [part~=log][aria-live], [role=log]").count() == 0
    expect(page.get_by_role("region", name="Chat")).to_have_attribute("tabindex", "0")


def test_the_page_can_be_read_while_words_come(page: Page, chat: Callable[..., Link]) -> None:
    link = chat()
    link.reply(ask(page, link, "hello"), "line\n\n" * 60, end="")
    newer = page.get_by_role("button", name="New words below")
    expect(replies(page).last.locator("p")).to_have_count(60)
    expect(newer).to_be_hidden()
    log = page.locator("[part~=log]")
    log.evaluate("node => { node.scrollTop = 100 }")
    page.wait_for_timeout(50)
    link.send("text-delta", id="r1", delta="more")
    expect(newer).to_be_visible()
    assert log.evaluate("node => node.scrollTop") == 100
    newer.click()
    expect(newer).to_be_hidden()
    assert log.evaluate("node => node.scrollHeight - node.scrollTop - node.clientHeight") < 5


def test_the_page_s_own_shortcuts_do_not_hear_what_is_typed(page: Page, chat: Callable[..., Link]) -> None:
    chat()
    page.evaluate("window.keys = 0; document.addEventListener('keydown', () => { keys += 1 })")
    page.locator(WORDS).press_sequentially("jk")
    assert page.evaluate("keys") == 0


def test_a_phone_gets_the_full_screen_and_a_close_button(browser: Browser, server: ScriptedServer) -> None:
    context = browser.new_context(
        viewport={"width": 375, "height": 667}, has_touch=True, is_mobile=True, device_scale_factor=2
    )
    page = context.new_page()
    page.goto(server.url)
    launcher(page).tap()
    server.link()
    expect(page.locator("[part~=panel]")).to_be_visible()
    assert page.locator("[part~=panel]").bounding_box() == {"x": 0, "y": 0, "width": 375, "height": 667}
    expect(page.locator(WORDS)).to_have_css("font-size", "16px")
    page.get_by_role("button", name="Close chat").tap()
    expect(page.locator("[part~=panel]")).to_be_hidden()
    expect(launcher(page)).to_be_visible()
    context.close()


def test_right_to_left_pages_are_mirrored(page: Page, server: ScriptedServer, chat: Callable[..., Link]) -> None:
    server.page = {"html": ' dir="rtl"'}
    link = chat()
    link.reply(ask(page, link, "שלום"), "שלום **לך**")
    expect(replies(page).last).to_have_text("שלום לך")
    visitor, reply = visitors(page).bounding_box(), replies(page).last.bounding_box()
    assert visitor and reply
    assert visitor["x"] < reply["x"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


STATES = [
    "closed",
    "unread",
    "greeting",
    "streaming",
    "sources",
    "waiting",
    "refused",
    "failed",
    "reconnecting",
    "idle",
    "ended",
    "unreachable",
    "newer",
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", STATES)
def test_axe_finds_nothing(browser: Browser, server: ScriptedServer, state: str, scheme: str) -> None:
    if not AXE.exists():
        missing("axe-core")
    options: dict[str, Any] = {"color_scheme": scheme, "reduced_motion": "reduce"}
    context = browser.new_context(viewport={"width": 1000, "height": 760}, **options)
    page = context.new_page()
    server.tag = f'<script src="/chat/widget.js" data-fallback-url="tel:1" data-accent="{"#2b5cd9" if scheme == "light" else "#ffd166"}" defer></script>'
    server.page = {"head": '<meta name="color-scheme" content="light dark">'}
    page.goto(server.url)
    if state != "closed":
        if state == "unreachable":
            server.token_always = HttpReply(404)
        launcher(page).click()
    if state == "unreachable":
        expect(page.get_by_role("link", name="Contact us another way")).to_be_visible()
    elif state not in ("closed", "greeting"):
        link = server.link()
        message = ask(page, link, "hello")
        link.reply(
            message, "A **reply** with `code`, [a link](https://x.example)\n\n- and\n- a list\n\n```\ncode\n```", end=""
        )
        link.send("source-url", sourceId="1", url="https://x.example", title="Source")
        expect(page.get_by_text("Source")).to_be_visible()
        if state == "waiting":
            ask(page, link, "more", 2)
            page.wait_for_timeout(600)
        elif state == "refused":
            link.send("message-rejected", id=ask(page, link, "more", 2), code="too-many", detail="Too many.")
            expect(page.get_by_text("Too many.").first).to_be_visible()
        elif state == "failed":
            link.send("error", errorText="Sorry.")
            expect(page.locator("small").get_by_text("Sorry.")).to_be_visible()
        elif state == "reconnecting":
            server.token_always = None
            link.abort()
            expect(notice(page)).to_have_text("Reconnecting")
        elif state == "idle":
            link.send("session-idle", closesIn=9)
            expect(page.get_by_role("button", name="Stay")).to_be_visible()
        elif state == "ended":
            link.send("session-end", reason="visitor")
            expect(notice(page)).to_contain_text("ended")
        elif state == "unread":
            page.locator(WORDS).press("Escape")
            link.send("finish")
            expect(page.locator("[part~=badge]")).to_be_visible()
        elif state == "newer":
            link.send("text-delta", id="r1", delta="\n\nline" * 60)
            expect(page.get_by_text("line").last).to_be_visible()
            page.locator("[part~=log]").evaluate("node => { node.scrollTop = 0 }")
            page.wait_for_timeout(50)
            link.send("text-delta", id="r1", delta="\n\nline")
            expect(page.get_by_role("button", name="New words below")).to_be_visible()
        elif state == "sources":
            link.send("finish")
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run(document, { resultTypes: ['violations', 'incomplete'] })")
    context.close()
    violations = [(v["id"], [node["html"] for node in v["nodes"]]) for v in found["violations"]]
    assert violations == [], json.dumps(violations, indent=1)
    unsure = [v["id"] for v in found["incomplete"] if v["id"] != "color-contrast"]
    assert unsure == []


def test_motion_and_forced_colours_follow_the_visitor(browser: Browser, server: ScriptedServer) -> None:
    context = browser.new_context(reduced_motion="reduce", forced_colors="active")
    page = context.new_page()
    page.goto(server.url)
    launcher(page).click()
    link = server.link()
    link.reply(ask(page, link, "hello"), end="")
    expect(replies(page)).to_have_count(2)
    assert (
        replies(page).last.evaluate("node => getComputedStyle(node.firstElementChild, '::before').animationName")
        == "none"
    )
    box = page.locator("[part~=panel]").evaluate("node => getComputedStyle(node).borderTopWidth")
    assert box == "1px"
    context.close()


# ---- The demo in a browser -------------------------------------------------------------------------------------------


@pytest.fixture
def demo() -> Iterator[str]:
    """The demo as the README has it run: a process, on its own port."""
    try:
        with contextlib.closing(socket.create_server(("127.0.0.1", 8000))):
            pass
    except OSError:
        missing("a free port 8000")
    process = subprocess.Popen([sys.executable, str(HERE / "chat_session.py")], cwd=HERE, stdout=subprocess.DEVNULL)
    url = "http://127.0.0.1:8000"

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(url).status_code == 200
        return False

    try:
        wait_until(answers, "the demo answers")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def test_the_demo_answers_the_canada_pair_in_a_real_browser(demo: str, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(demo)
    page.get_by_role("button", name="Open chat").click()
    page.locator("[part~=reply]", has_text="How can I help?").wait_for()
    for question, answer in (
        ("do you ship to Canada?", "we ship to Canada"),
        ("how long does it take?", "five to eight working days"),
    ):
        page.locator("[part~=input]").fill(question)
        page.keyboard.press("Enter")
        expect(page.locator("[part~=reply]").last).to_contain_text(answer, timeout=PATIENCE * 1000)
        expect(page.locator("[part~=sources]").last).to_contain_text("Our shipping", timeout=PATIENCE * 1000)
    assert page.locator("[part~=reply] strong", has_text="Canada").count() == 1
    page.close()


@pytest.mark.parametrize("framework", ["FastAPI", "Django"])
def test_the_widget_finds_a_mounted_chat_from_its_own_address(framework: str, browser: Browser, tmp_path: Path) -> None:
    with mounted_site(framework, tmp_path) as site:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{site.port}/")
        page.add_script_tag(url="/support/chat/widget.js")
        page.get_by_role("button", name="Open chat").click()
        page.locator("[part~=reply]", has_text="How can I help?").wait_for()
        page.locator("[part~=input]").fill("hello out there")
        page.keyboard.press("Enter")
        expect(page.locator("[part~=reply]").last).to_contain_text(
            "You wrote: hello out there", timeout=PATIENCE * 1000
        )
        page.close()
