# /// script
# requires-python = ">=3.11"
# dependencies = ["cachetools>=5.5", "litestar>=2.19,<4", "msgspec>=0.18.6", "uvicorn>=0.30", "websockets>=13"]
# ///
r"""A live website chat for any Litestar app: one plugin, one script tag.

A visitor clicks a bubble; a short-lived token is minted; a websocket opens; a greeting shows. Each message
goes onto a short scratchpad, your *answerer* is asked, and its reply streams back word by word. After a few
quiet minutes the chat closes gently and forgets. A reply that a lost connection cuts short is finished, kept,
and shown as soon as its visitor is back::

    from collections.abc import AsyncIterator
    from litestar import Litestar
    from chat_session import Chat, ChatSessionPlugin

    async def answer(chat: Chat) -> AsyncIterator[str]:
        for word in f"You said: {chat.message}".split():
            yield word + " "

    app = Litestar(plugins=[ChatSessionPlugin(answer)])

and in the page: ``<script src="/chat/widget.js" defer></script>``.

**The wire**, ``chat-session.v1``: one JSON object with a ``type`` in each text frame.

=================== ================================================================ ========================
the client sends    with
=================== ================================================================ ========================
``message``         ``id``, ``text``                                                 asks
``stop``            ``id``?                                                          stops or takes back
``stay``                                                                             answers the idle warning
``end``                                                                              says goodbye
``pong``                                                                             answers ``ping``
=================== ================================================================ ========================

=================== ================================================================ ========================
the server sends    with
=================== ================================================================ ========================
``session-start``   ``sessionId greeting idleTimeout pingInterval maxMessageChars``  first of all
                    ``maxPending``
``start``           ``messageId``, ``messageMetadata: {inReplyTo}``                  the answerer is asked
``text-start``      ``id``                                                           before the first words
``text-delta``      ``id``, ``delta``                                                the next words
``source-url``      ``sourceId``, ``url``, ``title``                                 a citation
``text-end``        ``id``                                                           after the last words
``finish``                                                                           \
``abort``           ``reason``: ``stopped``, ``interrupted``                         } one ends each reply
``error``           ``errorText``                                                    /
``message-rejected`` ``id``, ``code``, ``detail``, ``retryAfter``?                   the session goes on
``session-idle``    ``closesIn``                                                     the warning
``session-end``     ``reason``                                                       the session is over
``ping``                                                                             is anybody there?
=================== ================================================================ ========================

**Decisions**, each made for a measured reason; please read it before undoing one.

1.  A reply lives in a task of its own, never in the socket's handler: a connection may die, the reply may not.
2.  One reader calls ``receive`` for a socket's whole life. uvicorn stops answering pings while a message waits
    to be read, granian notices a departure nowhere else, and its ``close`` deadlocks beside a pending ``receive``.
3.  Words are sent by one shared flush, not by a writer task for each visitor: that costs 40 % less for a word.
4.  Catching up with a running reply and listening to it happen without an ``await`` between: no gap, no double.
5.  The token travels as a subprotocol, since servers log the URL; its MAC's text is compared before it is parsed.
6.  A bad token is refused after ``accept``: before it, every server answers a bare 403, which no page can read.
7.  Handlers are closures on the app itself, because Litestar 2 deep-copies what a ``Router`` holds.
8.  Shutdown drains in the lifespan, the one hook that every server runs; no handler's ``finally`` can be relied on.
9.  What a visitor typed is held by the scratchpad, the waiting messages and the running answerer. No row, log line,
    exception text or close reason may carry it, and no local variable may keep it while a coroutine waits.
10. Time is the event loop's, so that tests can turn the clock; only the token, which outlives processes, asks the wall.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import hashlib
import heapq
import hmac
import inspect
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import time
import traceback
from collections import Counter, deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeAlias, TypedDict, cast

import msgspec
from cachetools import TTLCache
from litestar import Litestar, Request, Response, WebSocket, get, post, websocket
from litestar.connection import ASGIConnection
from litestar.datastructures import CacheControlHeader
from litestar.exceptions import HTTPException, ImproperlyConfiguredException, WebSocketDisconnect
from litestar.plugins import InitPlugin
from litestar.stores.base import Store

if TYPE_CHECKING:
    from litestar.config.app import AppConfig
    from litestar.types import Middleware

__all__ = ("Chat", "ChatSessionConfig", "ChatSessionPlugin", "Message", "Reply", "SessionRow", "Source")
__version__ = "0.1.0"

_log = logging.getLogger("chat_session")


# ---- Constants -------------------------------------------------------------------------------------------------------


class _Close(IntEnum):
    """Websocket close codes: RFC 6455 section 7.4 and the IANA registry that continues it."""

    DONE = 1000
    LEFT = 1001
    BINARY = 1003
    INVALID = 1008
    TOO_BIG = 1009
    BUG = 1011
    RESTART = 1012
    BUSY = 1013
    TOKEN = 3000


#: What a close frame says beside its code: ASCII and short, since a reason over 123 bytes breaks three of four servers.
_REASONS: dict[_Close, str] = {
    _Close.DONE: "session ended",
    _Close.LEFT: "nothing was heard",
    _Close.BINARY: "text frames only",
    _Close.INVALID: "too many invalid frames",
    _Close.TOO_BIG: "frame too big",
    _Close.BUG: "internal error",
    _Close.RESTART: "server restarts",
    _Close.BUSY: "try again later",
    _Close.TOKEN: "token refused",
}

_SUBPROTOCOL = "chat-session.v1"
_TOKEN_PREFIX = "token."  # noqa: S105 - a subprotocol's
_ENV_SECRET = "CHAT_SESSION_SECRET"  # noqa: S105 - where it is, not what
_MIN_SECRET = 32  # bytes, the size of the MAC: RFC 2104 section 3 discourages shorter keys
_MAX_VISITOR = 1024  # bytes of a signed-in visitor's id, which is part of the token
_MAX_TOKEN = 2048  # characters; ours have about 150, and what is longer is not worth a hash
_WORD_WAIT = 0.016  # seconds that a word may wait for company: one refresh of a 60 Hz screen
_PONG_GRACE = 10.0  # seconds beyond the ping interval, Centrifugo's margin
_CLOSE_GRACE = 1.0  # seconds for the last frames and the close of one socket
_STOP_GRACE = 5.0  # seconds that a stopped answerer has for its ``finally``
_LOAD_TIMEOUT = 6.0  # seconds for one ``load`` of a row, during which a visitor's messages wait
_SAVE_TIMEOUT = 30.0  # seconds for one ``save`` of a row, which nobody waits for
_SAVE_GRACE = 5.0  # seconds at least that rows have to be saved at shutdown
_GREETING_TIMEOUT = 5.0  # seconds for the host's greeting; a visitor looks at an empty panel meanwhile
_PATIENCE = 4.0  # seconds after which another worker that shows no sign of life is gone
_GLANCE = 0.25  # seconds between two looks at another worker's row
_SILENCE = 2.0  # seconds without a frame after which a visitor may have come back on another worker
_BEAT = 1.0  # seconds between two signs of life, of which each is one call to a store
_STORE_CALLS = 32  # calls to a store at once; redis-py refuses the 101st, and a crowd may leave at one moment
_OPEN_ROW_TTL = 86_400  # seconds that a store keeps the row of an open session
_RETRY_AFTER = 10  # seconds that a visitor whom we have no room for is asked to wait
_INVALID_LIMIT = 3  # invalid frames of one session; a program sends them, not a person
_OUTBOX_LIMIT = 1_000  # frames that may wait for one visitor; words that pile up count as one
_MIN_FRAME_LIMIT = 128  # bytes; a frame with a 64-character id must fit however short messages may be
_BREATH = 64  # pieces of a reply, some 30 µs, after which the event loop gets a turn
_GULP = 16  # frames of one visitor, some 150 µs, after which it does
_ADDRESS_LIMIT = 100_000  # addresses whose token requests are counted
_LESSON_LIMIT = 20  # different warnings about how a host is set up
_ERROR_TEXT = "Something went wrong. Please try again."

#: What a send raises when the visitor has left: uvicorn an OSError, granian a RuntimeError, Litestar the last.
_GONE = (OSError, RuntimeError, WebSocketDisconnect)

_EndReason: TypeAlias = Literal["idle", "visitor", "dropped", "restart", "replaced"]
_Status: TypeAlias = Literal["streaming", "finished", "stopped", "failed", "interrupted"]
_Connection: TypeAlias = ASGIConnection[Any, Any, Any, Any]

#: Sessions that ended so keep their last reply: the visitor may not have seen it.
_CARRIED: frozenset[_EndReason] = frozenset({"dropped", "restart", "replaced"})
#: Replies that count as a turn: something was said, and nothing went wrong.
_TOLD: frozenset[_Status] = frozenset({"finished", "stopped"})


# ---- Messages --------------------------------------------------------------------------------------------------------


class Message(TypedDict):
    """One entry of the scratchpad, in the shape that model clients take."""

    role: Literal["user", "assistant"]
    content: str


class Source(msgspec.Struct, frozen=True):
    """A citation: yield one from an answerer, and it shows as a link under the reply."""

    url: str
    title: str = ""


class Reply(msgspec.Struct, frozen=True):
    """What the answerer has said to one message.

    Attributes:
        id: The ``messageId`` on the wire, random and never used again.
        in_reply_to: The visitor's id of the message that it answers.
        text: The words so far.
        sources: The citations so far.
        status: ``streaming``, or how the reply ended.

    """

    id: str
    in_reply_to: str
    text: str
    sources: list[Source]
    status: _Status


class SessionRow(msgspec.Struct, frozen=True, kw_only=True):
    """One session as it is stored: never a word that the visitor typed.

    Attributes:
        id: The session's id, random.
        started_at: UTC.
        ended_at: UTC, or None while the session is open.
        end_reason: Why it ended: ``idle``, ``visitor``, ``dropped``, ``restart`` or ``replaced``.
        turns: Replies that were finished or stopped.
        visitor: What the ``visitor`` option said of the token request.
        reply: The last reply, for ``reply_ttl`` seconds after an end as ``dropped``, ``restart`` or ``replaced``.

    """

    id: str
    started_at: datetime
    ended_at: datetime | None = None
    end_reason: _EndReason | None = None
    turns: int = 0
    visitor: str | None = None
    reply: Reply | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """What an answerer is given.

    Attributes:
        message: The visitor's words.
        messages: The scratchpad, oldest first, this message last; plain dicts, a copy of your own.
        session: The session's row as it stands.
        app: The host's application, for its state and its stores.

    """

    message: str
    messages: list[Message]
    session: SessionRow
    app: Litestar


class _Stats(TypedDict):
    """How it goes in this process, since it began; see ``ChatSessionPlugin.stats``."""

    open_sessions: int
    running_replies: int
    turns: int
    carried_replies: int
    ended: dict[str, int]
    rejected: dict[str, int]
    failed: dict[str, int]


_Id: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]


class _MessageFrame(msgspec.Struct, tag_field="type", tag="message"):
    id: _Id
    text: str


class _StopFrame(msgspec.Struct, tag_field="type", tag="stop"):
    id: str | None = None


class _StayFrame(msgspec.Struct, tag_field="type", tag="stay"):
    pass


class _EndFrame(msgspec.Struct, tag_field="type", tag="end"):
    pass


class _PongFrame(msgspec.Struct, tag_field="type", tag="pong"):
    pass


_Frame: TypeAlias = _MessageFrame | _StopFrame | _StayFrame | _EndFrame | _PongFrame
_decode: Callable[[str], _Frame] = msgspec.json.Decoder(_Frame).decode
_encode = msgspec.json.Encoder().encode


def _find_id(text: str) -> str | None:
    """Find the id in a frame that is not valid as a whole, so that the page knows which message was refused."""
    try:
        return msgspec.convert(json.loads(text)["id"], _Id)
    except (ValueError, LookupError, TypeError, RecursionError, msgspec.MsgspecError):
        return None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _whole(text: str) -> str:
    """Make *text* fit for UTF-8: surrogate pairs become their character, lone halves U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- Configuration ---------------------------------------------------------------------------------------------------

_Pieces: TypeAlias = AsyncIterable[str | Source]
_Answerer: TypeAlias = Callable[[Chat], _Pieces | Coroutine[Any, Any, str | _Pieces]]
_SaveRow: TypeAlias = Callable[[SessionRow], Awaitable[None]]


class _RowKeeper(Protocol):
    """What ``rows`` may be, if a row shall outlive its process: an object of the host's."""

    async def save(self, row: SessionRow, /) -> None:
        """Keep *row* in place of an earlier one with its id."""

    async def load(self, session_id: str, /) -> SessionRow | None:
        """Return the row of *session_id*, or None."""


def _unwrap(function: Any) -> Any:
    """Find what a partial or an object with ``__call__`` runs; a class is neither."""
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, type):
        return None
    return function if inspect.isroutine(function) else getattr(function, "__call__", None)  # noqa: B004 - not a test


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(_unwrap(function))


def _is_answerer(function: Any) -> bool:
    """Tell whether *function* streams or can be awaited, and can be called with a ``Chat`` alone."""
    if not _is_async(function) and not inspect.isasyncgenfunction(_unwrap(function)):
        return False
    try:
        inspect.signature(function).bind(object())
    except (TypeError, ValueError):
        return False
    return True


def _as_bytes(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key


def _is_key(value: Any) -> bool:
    return isinstance(value, (str, bytes)) and len(_as_bytes(value)) >= _MIN_SECRET


def _is_origin(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#@*\s]+", value, re.IGNORECASE) is not None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_keeper(value: Any) -> bool:
    is_object = _is_async(getattr(value, "save", None)) and _is_async(getattr(value, "load", None))
    return isinstance(value, Store) or (isinstance(value, str) and value != "") or is_object or _is_async(value)


_Rule: TypeAlias = tuple[Callable[[Any], bool], str]

#: What a value must satisfy, and how to say so: by field, or else by the field's type.
_RULES: dict[str, _Rule] = {
    "float": (
        lambda value: type(value) in (int, float) and 0 < value < math.inf,
        "a number of seconds above 0",
    ),
    "int": (lambda value: type(value) is int and value >= 1, "a whole number, 1 or more"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "path": (
        lambda value: isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9/._~-]*", value) is not None,
        "a path such as '/chat', without parameters",
    ),
    "secret": (
        lambda value: (
            value is None or _is_key(value) or (_is_list(value) and len(value) > 0 and all(map(_is_key, value)))
        ),
        f"a key, or a list of keys, each of {_MIN_SECRET} bytes or more",
    ),
    "greeting": (lambda value: isinstance(value, str) or callable(value), "text, or a callable that returns it"),
    "allowed_origins": (
        lambda value: _is_list(value) and all(map(_is_origin, value)),
        "a list of origins such as 'https://www.example.com', without a path or a wildcard",
    ),
    "client_address": (lambda value: value is None or callable(value), "a callable from the connection to an address"),
    "visitor": (lambda value: value is None or callable(value), "a callable from the token request to an id or None"),
    "rows": (
        lambda value: value is None or _is_keeper(value),
        "an async save(row), an object with async save(row) and load(session_id), or a store or its name",
    ),
    "guards": (_is_list, "a list"),
    "middleware": (_is_list, "a list"),
    "opt": (lambda value: isinstance(value, Mapping), "a mapping"),
    **dict.fromkeys(
        ("idle_warning", "shutdown_grace"),
        (lambda value: type(value) in (int, float) and 0 <= value < math.inf, "a number of seconds, 0 or more"),
    ),
    "max_pending": (lambda value: type(value) is int and value >= 0, "a whole number, 0 or more"),
}


@dataclass(frozen=True, kw_only=True)
class ChatSessionConfig:
    """All that can be set; times are in seconds, lengths in Unicode code points.

    Raises:
        ImproperlyConfiguredException: If a value makes no sense; it names the field and the value, never a secret.

    """

    #: Where the routes are mounted.
    path: str = "/chat"
    #: The key that signs tokens, or a list of keys (the first signs, all verify), each of 32 bytes or more; None reads
    #: ``CHAT_SESSION_SECRET``, and without that makes a random key for this process.
    secret: str | bytes | Sequence[str | bytes] | None = field(default=None, repr=False)
    #: Text, or a callable from the connection to text, sync or async.
    greeting: str | Callable[[_Connection], str | Awaitable[str]] = "Hi! How can I help?"
    scratchpad_turns: int = 6  #: turns kept, the one being answered included
    scratchpad_ttl: float = 180.0  #: how long a scratchpad is kept after its last turn
    idle_timeout: float = 300.0  #: time without a message before a gentle close
    idle_warning: float = 60.0  #: time before that close that the visitor is warned; 0 for no warning
    token_ttl: float = 60.0  #: how long a token can open a session
    reply_ttl: float = 600.0  #: how long an ended session's reply waits for its visitor
    chunk_timeout: float = 60.0  #: the longest silence of an answerer, after which the reply fails
    answer_timeout: float = 300.0  #: the longest reply, after which it fails
    send_timeout: float = 10.0  #: a visitor who reads nothing for this long has left
    ping_interval: float = 25.0  #: time between pings; no frame for 10 s more means that the visitor has left
    shutdown_grace: float = 10.0  #: time that running replies get at shutdown
    allowed_origins: Sequence[str] = ()  #: origins besides the app's own, such as ``https://www.example.com``
    max_sessions: int = 10_000  #: open sessions in this process
    max_sessions_per_client: int = 50  #: open sessions of one address
    tokens_per_minute: int = 30  #: token requests of one address
    #: A callable from the connection to the visitor's address; None takes the peer's, and does not limit one that is
    #: not global, since that is a proxy or a test.
    client_address: Callable[[_Connection], str] | None = None
    messages_per_minute: int = 20  #: messages of one session
    max_message_chars: int = 4_000  #: the longest message
    max_reply_chars: int = 32_000  #: the longest reply; what is longer is cut and ends as finished
    max_pending: int = 4  #: messages of one session that may wait behind the one being answered
    #: Where rows go besides memory: an async ``save(row)``, an object with async ``save(row)`` and
    #: ``load(session_id)``, a Litestar store, or the name of one in the app's registry.
    rows: _SaveRow | _RowKeeper | Store | str | None = None
    #: A callable, sync or async, from the token request to the id of a signed-in visitor, or None.
    visitor: Callable[[Request[Any, Any, Any]], str | Awaitable[str | None] | None] | None = None
    serve_widget: bool = True  #: whether to serve ``widget.js`` from beside this module
    guards: Sequence[
        Callable[[_Connection, Any], Awaitable[None] | None]
    ] = ()  #: handed to every route that the plugin mounts, as are the next two
    middleware: Sequence[Middleware] = ()
    opt: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        """Refuse nonsense by name and value, before anything is served with it."""
        for each in fields(self):
            is_right, rule = _RULES.get(each.name) or _RULES[str(each.type)]
            self._require(is_right(getattr(self, each.name)), each.name, rule)
        is_fitting = self.idle_warning <= self.idle_timeout or self.idle_warning == type(self).idle_warning
        self._require(is_fitting, "idle_warning", f"at most idle_timeout, {self.idle_timeout!r}")

    @property
    def warning(self) -> float:
        """Seconds of warning: who sets a short ``idle_timeout`` alone gets a fifth of it, as the defaults have it."""
        return self.idle_warning if self.idle_warning <= self.idle_timeout else self.idle_timeout / 5

    def _require(self, is_right: bool, name: str, rule: str) -> None:  # noqa: FBT001 - it is the condition
        if not is_right:
            value = "what it is" if name == "secret" else repr(getattr(self, name))
            raise ImproperlyConfiguredException(f"ChatSessionConfig.{name} must be {rule}, not {value}")


# ---- Tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Token:
    """The right to open one session: ``v1.<session>.<expiry>.<origin>.<previous>.<visitor>.<MAC>``.

    Attributes:
        session: The id of the session that it opens.
        expires: Unix time in seconds, written with three decimals and so with a dot of its own.
        origin: A digest of the origin that asked for it; empty where there was none.
        previous: The session whose reply shall be carried over, or empty.
        visitor: The id of a signed-in visitor, or None.

    """

    session: str
    expires: float
    origin: str = ""
    previous: str = ""
    visitor: str | None = None

    def sign(self, key: bytes) -> str:
        """Return the token's text."""
        visitor = "" if self.visitor is None else "~" + _base64(self.visitor.encode("utf-8", "replace"))
        text = f"v1.{self.session}.{self.expires:.3f}.{self.origin}.{self.previous}.{visitor}"
        return f"{text}.{_mac(key, text)}"

    @classmethod
    def verify(cls, keys: Sequence[bytes], text: str) -> _Token | None:
        """Return the token if one of *keys* signed exactly this *text*, expired or not, else None."""
        signed, _, mac = text.rpartition(".")
        if len(text) > _MAX_TOKEN or not text.isascii():
            return None
        if sum(hmac.compare_digest(_mac(key, signed), mac) for key in keys) == 0:  # none is skipped: constant time
            return None
        _, session, seconds, millis, origin, previous, visitor = signed.split(".")
        name = base64.urlsafe_b64decode(visitor[1:] + "==").decode() if visitor else None
        return cls(session, float(f"{seconds}.{millis}"), origin, previous, name)


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _mac(key: bytes, text: str) -> str:
    """Authenticate *text* by HMAC-SHA256 (RFC 2104) in a context of its own, so that no other use of *key* collides."""
    return _base64(hmac.digest(key, b"chat_session token\0" + text.encode(), "sha256"))


def _derive(key: str | bytes, path: str) -> bytes:
    """Make the key of one mount, whose tokens are good for no other."""
    return hmac.digest(_as_bytes(key), b"chat_session mount\0" + path.strip("/").encode(), "sha256")


def _digest(origin: str | None) -> str:
    return _base64(hashlib.sha256(origin.lower().encode()).digest()[:12]) if origin else ""


def _find_keys(secret: str | bytes | Sequence[str | bytes] | None) -> Sequence[str | bytes]:
    """Return the signing keys, the first of which signs: as configured, from the environment, or made up.

    Raises:
        ImproperlyConfiguredException: If the key in the environment is too short.

    """
    if secret is None and (secret := os.environ.get(_ENV_SECRET)):
        if not _is_key(secret):
            raise ImproperlyConfiguredException(f"{_ENV_SECRET} must be a key of {_MIN_SECRET} bytes or more")
    elif not secret:
        _log.warning(
            "no secret is set, so this process signs chat tokens with a random key: with several workers, or after "
            "a restart, a visitor's token is refused elsewhere and replies are not carried over; set %s or "
            "ChatSessionConfig.secret",
            _ENV_SECRET,
        )
        return [secrets.token_bytes(_MIN_SECRET)]
    return [secret] if isinstance(secret, (str, bytes)) else secret


# ---- Who may come, and how often -------------------------------------------------------------------------------------


def _is_welcome(connection: _Connection, allowed: Sequence[str]) -> bool:
    """Tell whether *connection* comes from the app's own origin, an allowed one, or no browser at all."""
    origin = _header(connection, "origin")
    if origin is None:
        return True
    if origin == "null":
        return False
    scheme, _, place = origin.lower().partition("://")
    is_own = _without_port(place, scheme) == _without_port((_header(connection, "host") or "").lower(), scheme)
    is_named = origin.lower() in (each.lower() for each in allowed)
    return is_named or (is_own and place != "") or _header(connection, "sec-fetch-site") == "same-origin"


def _header(connection: _Connection, name: str) -> str | None:
    """Read one header; Litestar's own mapping of them would stay in memory as long as the socket."""
    wanted = name.encode()
    return next((value.decode("latin-1") for key, value in connection.scope["headers"] if key == wanted), None)


def _without_port(host: str, scheme: str) -> str:
    """Drop the port that *scheme* implies: browsers leave it out of an origin, some proxies put it into ``Host``."""
    return host.removesuffix({"https": ":443", "http": ":80"}.get(scheme, "\0"))


def _network(address: str) -> str:
    """Return what *address* counts as: an IPv6 visitor commands a whole /64 (RFC 6177), and mapped IPv4 is IPv4."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed.ipv4_mapped or ipaddress.ip_network((int(parsed) >> 64 << 64, 64)))
    return str(parsed)


def _is_global(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_global


class _Rate:
    """So many a minute, counted by the generic cell rate algorithm (ITU-T I.371): one number, no list of times."""

    __slots__ = ("_due", "_per_minute")

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._due = 0.0

    def wait(self, now: float) -> int:
        """Take one and return 0, or return the whole seconds after which one can be taken."""
        interval, due = 60.0 / self._per_minute, max(self._due, now)
        late = round(due - now - (60.0 - interval), 6)
        if late > 0:
            return math.ceil(late)
        self._due = due + interval
        return 0


def _now() -> float:
    return asyncio.get_running_loop().time()


# ---- Alarms ----------------------------------------------------------------------------------------------------------


class _Alarm:
    """One call to come; once it has come or is cancelled, it holds nothing."""

    __slots__ = ("_alarms", "ring")

    def __init__(self, alarms: _Alarms, ring: Callable[[], object]) -> None:
        self._alarms = alarms
        self.ring: Callable[[], object] | None = ring

    def cancel(self) -> None:
        """Let the call not come."""
        if self.ring is not None:
            self.ring = None
            self._alarms.thin_out()


class _Alarms:
    """Many alarms on one timer: uvloop's timers take 700 bytes each, and a session needs three.

    Entries are told apart by a number, so that the heap never compares alarms.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, _Alarm]] = []
        self._count = self._cancelled = 0
        self._timer: asyncio.Handle | None = None
        self._rings_at = math.inf

    def at(self, due: float, ring: Callable[[], object]) -> _Alarm:
        """Call *ring* when the event loop's clock shows *due*."""
        alarm = _Alarm(self, ring)
        self._count += 1
        heapq.heappush(self._heap, (due, self._count, alarm))
        self._arm()
        return alarm

    def after(self, seconds: float, ring: Callable[[], object]) -> _Alarm:
        """Call *ring* in so many seconds."""
        return self.at(_now() + seconds, ring)

    def thin_out(self) -> None:
        """Drop what is cancelled as soon as that is half of all."""
        self._cancelled += 1
        if 2 * self._cancelled > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].ring is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0
            self._arm()

    def clear(self) -> None:
        """Forget all, and the event loop that they were for."""
        self._heap.clear()
        self._cancelled = 0
        self._timer = None

    def _arm(self) -> None:
        if self._timer is not None and (not self._heap or self._heap[0][0] < self._rings_at):
            self._timer.cancel()
            self._timer = None
        if self._timer is None and self._heap:
            self._rings_at = self._heap[0][0]
            self._timer = asyncio.get_running_loop().call_at(self._rings_at, self._ring)

    def _ring(self) -> None:
        self._timer, now = None, _now()
        try:
            while self._heap and self._heap[0][0] <= now:
                alarm = heapq.heappop(self._heap)[2]
                ring, alarm.ring = alarm.ring, None
                if ring is None:
                    self._cancelled -= 1
                else:
                    ring()
        finally:
            self._arm()


# ---- Scratchpads -----------------------------------------------------------------------------------------------------

_Turn: TypeAlias = tuple[Message, ...]
_Talk: TypeAlias = tuple[tuple[_Turn, ...], Message]  # the turns before, and the question that is being answered


class _Scratchpads:
    """Session id to turns, the only memory of what a visitor typed.

    ``TTLCache`` counts from the last assignment and hides what has expired until someone looks, so every turn is
    assigned anew and followed by a sweep. It has room for every open session, so it never evicts a live one.
    """

    def __init__(self, config: ChatSessionConfig, alarms: _Alarms) -> None:
        self._alarms = alarms
        self._limit = config.scratchpad_turns
        self._cache: TTLCache[str, tuple[_Turn, ...]] = TTLCache(config.max_sessions, config.scratchpad_ttl, timer=_now)

    def earlier(self, session_id: str) -> tuple[_Turn, ...]:
        """Return the turns that leave room for one more, oldest first."""
        turns = self._cache.get(session_id, ())
        return turns[max(0, len(turns) + 1 - self._limit) :]

    def keep(self, session_id: str, turns: tuple[_Turn, ...]) -> None:
        self._cache[session_id] = turns
        self._alarms.after(self._cache.ttl + 0.05, self._cache.expire)

    def drop(self, session_id: str) -> None:
        self._cache.pop(session_id, None)


# ---- Rows ------------------------------------------------------------------------------------------------------------


class _Shelf(msgspec.Struct, frozen=True):
    """What a store holds of a session.

    Attributes:
        row: The session's row.
        others: Replies before the row's last that the page may not have seen either.
        worker: Who writes it.
        beat: Grows with each save, by which a worker shows that it is alive.

    """

    row: SessionRow
    others: list[Reply] = []
    worker: str = ""
    beat: int = 0


class _TokenUsedError(Exception):
    """Another worker has opened the session already."""


class _StoreRows:
    """Rows in a Litestar store, shared by workers; each carries its own expiry, where 0 would mean never.

    A store only gets, sets and deletes, so one worker at a time writes a row: the one that holds the session. Another
    asks it to let go by leaving a note in its box, under a key of its own.
    """

    def __init__(self, store: Store, reply_ttl: float) -> None:
        self._store = store
        self._reply_ttl = max(1, math.ceil(reply_ttl))
        self._beat = 0
        self._gate = asyncio.Semaphore(_STORE_CALLS)
        self.worker = secrets.token_urlsafe(8)

    async def _get(self, key: str) -> bytes | None:
        async with self._gate:
            return await self._store.get(key)

    async def _set(self, key: str, value: bytes, lifetime: int) -> None:
        async with self._gate:
            await self._store.set(key, value, expires_in=lifetime)

    async def save(self, row: SessionRow, others: list[Reply]) -> None:
        """Write *row*, in two tries: at shutdown, Litestar closes a store's connections under a save, once."""
        try:
            await self._write(row, others)
        except _TokenUsedError:
            raise
        except Exception:  # noqa: BLE001 - each kind of store fails in its own way
            await asyncio.sleep(_GLANCE)
            await self._write(row, others)

    async def _write(self, row: SessionRow, others: list[Reply]) -> None:
        """See to it, the first time, that no other worker has opened the session."""
        if row.ended_at is None and (await self.look(row.id) or self).worker != self.worker:
            raise _TokenUsedError
        self._beat += 1
        shelf = _Shelf(row, others, self.worker, self._beat)
        lifetime = _OPEN_ROW_TTL if row.ended_at is None else self._reply_ttl
        await self._set(f"chat_session.{row.id}", _encode(shelf), lifetime)

    async def look(self, session_id: str) -> _Shelf | None:
        """Read what is there; garbage or another version's bytes are as good as nothing."""
        data = await self._get(f"chat_session.{session_id}")
        try:
            return None if data is None else msgspec.json.decode(data, type=_Shelf)
        except (msgspec.MsgspecError, ValueError):
            _log.warning("the store holds something else under the key of session %s; it is ignored", session_id)
            return None

    async def load(self, session_id: str) -> _Shelf | None:
        """Return what is kept of a session that has ended, asking the worker that still holds it open to end it."""
        give_up = _now() + _PATIENCE
        shelf = await self.look(session_id)
        while shelf is not None and shelf.row.ended_at is None and shelf.worker != self.worker and _now() < give_up:
            box = f"chat_session.box.{shelf.worker}"
            notes = await self._get(box) or b""
            if session_id.encode() not in notes:
                await self._set(box, notes + session_id.encode() + b" ", _OPEN_ROW_TTL)
            await asyncio.sleep(_GLANCE)
            shelf = await self.look(session_id)
        return shelf if shelf is not None and shelf.row.ended_at is not None else None

    async def take_notes(self) -> list[str]:
        """Empty this worker's box: the sessions that have come back elsewhere."""
        box = f"chat_session.box.{self.worker}"
        notes = await self._get(box)
        if notes is not None:
            async with self._gate:
                await self._store.delete(box)
        return (notes or b"").decode().split()

    async def close(self) -> None:
        """Close what the last saves opened again: Litestar closes the stores of its registry before plugins drain."""
        with contextlib.suppress(Exception):
            await self._store.__aexit__(None, None, None)

    async def follow(self, session_id: str) -> AsyncGenerator[Reply]:
        """Yield the reply that another worker writes, as it grows, until it has ended or nothing beats any more."""
        beat, give_up = -1, _now() + _PATIENCE
        while _now() < give_up:
            shelf = None
            with contextlib.suppress(Exception):  # a store that fails is as silent as a worker that is gone
                async with asyncio.timeout(_PATIENCE):
                    shelf = await self.look(session_id)
            if shelf is not None and shelf.row.reply is not None and shelf.beat != beat:
                beat, give_up = shelf.beat, _now() + _PATIENCE
                yield shelf.row.reply
            await asyncio.sleep(_GLANCE)


class _Rows:
    """Saves each session's rows in order, by one writer, which never delays a greeting or a word."""

    def __init__(self, config: ChatSessionConfig, on_used: Callable[[str], None]) -> None:
        self._config = config
        self._on_used = on_used
        self._save: _SaveRow | None = None
        self._load: Callable[[str], Awaitable[SessionRow | None]] | None = None
        self._queues: dict[str, deque[tuple[SessionRow, list[Reply]]]] = {}
        self._writers: set[asyncio.Task[None]] = set()
        self._is_failing = False
        self.shared: _StoreRows | None = None

    def bind(self, app: Litestar) -> None:
        """Look the keeper up, which needs the app where it goes by the name of a store."""
        rows: Any = app.stores.get(self._config.rows) if isinstance(self._config.rows, str) else self._config.rows
        if isinstance(rows, Store):
            self.shared = _StoreRows(rows, self._config.reply_ttl)
        else:
            self._save = getattr(rows, "save", rows)
            self._load = getattr(rows, "load", None)

    @property
    def can_load(self) -> bool:
        """Whether a row can outlive this process."""
        return self._load is not None or self.shared is not None

    def put(self, row: SessionRow, others: Sequence[Reply] = ()) -> None:
        """Have *row* saved behind the session's earlier ones, and *others* with it where there is a place for them."""
        if self._save is None and self.shared is None:
            return
        if row.id in self._queues:
            self._queues[row.id].append((row, list(others)))
            return
        self._queues[row.id] = deque([(row, list(others))])
        writer = asyncio.get_running_loop().create_task(self._write(self._queues[row.id], row.id))
        self._writers.add(writer)
        writer.add_done_callback(self._writers.discard)

    async def _write(self, queue: deque[tuple[SessionRow, list[Reply]]], session_id: str) -> None:
        while queue:
            row, others = queue.popleft()
            save = cast("_SaveRow", self._save) if self.shared is None else partial(self.shared.save, others=others)
            await self._guard(partial(save, row), session_id, _SAVE_TIMEOUT, is_save=True)
        del self._queues[session_id]

    def is_saving(self, session_id: str) -> bool:
        """Whether the session's writer is at work."""
        return session_id in self._queues

    async def load(self, session_id: str) -> _Shelf | None:
        """Return what is kept of a session that has ended; None also where the keeper fails or is slow."""
        load: Callable[[str], Awaitable[Any]] | None = self._load if self.shared is None else self.shared.load
        kept = None if load is None else await self._guard(partial(load, session_id), session_id, _LOAD_TIMEOUT)
        if kept is None or isinstance(kept, _Shelf):
            return kept
        if isinstance(kept, SessionRow):
            return _Shelf(kept)
        _log.error("rows.load(%r) returned %s, not a SessionRow; it is ignored", session_id, type(kept).__name__)
        return None

    async def take_notes(self) -> list[str]:
        """Return the sessions that have come back on another worker."""
        return [] if self.shared is None else await self._guard(self.shared.take_notes, "", _LOAD_TIMEOUT) or []

    async def _guard(
        self, call: Callable[[], Awaitable[Any]], session_id: str, limit: float, *, is_save: bool = False
    ) -> Any:
        """Await the keeper; the log tells the first of its failures, and the first row that is saved after them."""
        try:
            async with asyncio.timeout(limit):
                value = await call()
        except _TokenUsedError:
            self._on_used(session_id)
            return None
        except BaseException as error:
            if _is_cancelled(error):
                raise
            if not self._is_failing:
                _log.error("rows fail, the first is that of session %s: %s", session_id, _tell(error))
            self._is_failing = True
            return None
        if self._is_failing and is_save:  # a store that is full can still be read
            self._is_failing = False
            _log.warning("rows are saved again")
        return value

    async def drain(self, seconds: float) -> None:
        """Wait until all is saved, *seconds* at most."""
        if self._writers:
            await asyncio.wait(self._writers, timeout=seconds)
        if self.shared is not None and isinstance(self._config.rows, str):
            await self.shared.close()
        if self._queues:
            _log.error("the rows of %d sessions were not saved before the process went", len(self._queues))


def _is_cancelled(error: BaseException) -> bool:
    """Tell the end of this very task from what host code raises, be it a ``CancelledError`` of its own."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _tell(error: BaseException, *, debug: bool = False) -> str:
    """Describe *error* by its type and frames; its message may quote a visitor, so only a debugging host sees it."""
    if debug:
        return "".join(traceback.format_exception(error)).rstrip()
    return "\n".join([type(error).__qualname__, *traceback.format_tb(error.__traceback__)]).rstrip()


# ---- Replies ---------------------------------------------------------------------------------------------------------


class _WrongAnswerError(TypeError):
    """An answerer gave what is neither words nor a source; the message is ours, so the log may show it."""


async def _ask(answer: _Answerer, chat: Chat) -> AsyncIterator[str | Source]:
    """Call the host's answerer and return what it streams."""
    said = answer(chat)
    pieces: Any = await said if inspect.isawaitable(said) else said
    if isinstance(pieces, str):
        return _once(pieces)
    if isinstance(pieces, AsyncIterable):
        return aiter(cast("_Pieces", pieces))
    missing = "an `await`" if inspect.isawaitable(pieces) else "a `yield`"
    raise _WrongAnswerError(
        f"it returned {type(pieces).__name__}, neither str nor an async iterable: is {missing} missing?"
    )


def _as_source(piece: object) -> Source:
    if isinstance(piece, Source) and _is_text(piece.url) and _is_text(piece.title):
        return Source(_whole(piece.url), _whole(piece.title))
    what = f"{type(piece).__name__}, which is neither str nor a Source of two str"
    raise _WrongAnswerError(f"it yielded {what}{_hint(piece)}")


def _hint(piece: object) -> str:
    """Say what whoever wrote the answerer probably forgot."""
    if piece is None:
        return "; leave out pieces without words, as in `if text: yield text`"
    if inspect.isawaitable(piece):
        return "; is an `await` missing?"
    return "; yield its pieces one by one, with `async for`" if isinstance(piece, AsyncIterable) else ""


async def _once(text: str) -> AsyncIterator[str]:
    yield text


class _Answer:
    """A reply: asks the answerer in a task of its own, and tells whichever line listens."""

    __slots__ = (
        *("_alarm", "_born", "_desk", "_fresh", "_half", "_heard", "_line", "_parts", "_room", "_task", "_told"),
        *("id", "in_reply_to", "owner", "pasts", "session_id", "sources", "status"),
    )

    def __init__(self, desk: _Desk, reply: Reply, session_id: str = "") -> None:
        self.id = reply.id
        self.session_id = session_id
        self.in_reply_to = reply.in_reply_to
        self.status: _Status = reply.status
        self.sources = list(reply.sources)
        self.owner: _Conversation | None = None
        self.pasts: list[_Past] = []
        self._desk = desk
        self._fresh: list[str] = []
        self._parts = [reply.text] if reply.text else []
        self._told = 0
        self._room = desk.config.max_reply_chars
        self._half = ""
        self._line: _Line | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Have the reply written by *work*, in a task of its own."""
        loop = asyncio.get_running_loop()
        self._born = self._heard = loop.time()
        limit = min(self._desk.config.chunk_timeout, self._desk.config.answer_timeout)
        self._alarm = self._desk.alarms.after(limit, self._watch)
        self._task = loop.create_task(work)
        self._task.add_done_callback(self._free)
        self._desk.answers[self] = self._task

    def attach(self, line: _Line) -> None:
        """Tell *line* all there is, and from then on what comes; nothing here waits (decision 4)."""
        self._silence_line()
        self._line, self._told = line, 0
        line.post("start", messageId=self.id, messageMetadata={"inReplyTo": self.in_reply_to})
        line.speaker = self
        for number in range(len(self.sources)):
            self._post_source(number)
        if self.status != "streaming":
            self._post_end()

    def detach(self) -> None:
        """Go on without a listener."""
        self._silence_line()
        self.owner = self._line = None

    def _silence_line(self) -> None:
        if self._line is not None:
            self._line.speaker = None

    def tell(self, line: _Line) -> None:
        """Put the words that *line* was not told yet into its outbox, all in one frame."""
        self._digest()
        if self._told < len(self._parts):
            if self._told == 0:
                line.put("text-start", id=self.id)
            line.put("text-delta", id=self.id, delta="".join(self._parts[self._told :]))
            self._told = len(self._parts)

    @property
    def text(self) -> str:
        self._digest()
        return "".join(self._parts)

    @property
    def reply(self) -> Reply:
        return Reply(self.id, self.in_reply_to, self.text, list(self.sources), self.status)

    def end(self, status: _Status) -> None:
        """End the reply, once; what comes later changes nothing."""
        self._digest()
        if self.status != "streaming":
            return
        if self._half and self._room:
            self._parts.append("\ufffd")
        self.status, self._half = status, ""
        self._alarm.cancel()
        self._alarm = self._desk.alarms.after(_STOP_GRACE, self._abandon)
        self._post_end()
        self._parts = ["".join(self._parts)] if self._parts else []  # thousands of words take ten times the room
        if self.session_id:
            self._desk.count_reply(self, _now() - self._born)
        for past in list(self.pasts):
            past.save()
        if self.owner is not None:
            self.owner.replied(self)

    def halt(self, status: _Status) -> None:
        """End the reply from outside: at once for the visitor; the answerer gets a few seconds to clean up."""
        self.end(status)
        if self._task is not None:
            self._task.cancel()

    def _abandon(self) -> None:
        if self in self._desk.answers:
            _log.error(
                "answerer %s did not stop within %g s of reply %s's end; it is left to itself",
                self._desk.answerer,
                _STOP_GRACE,
                self.id,
            )
            cast("asyncio.Task[None]", self._task).cancel()
            self._free()

    def _free(self, _task: object = None) -> None:
        """Let the next message have its turn, now that the answerer is done or given up."""
        self._task = None
        self._alarm.cancel()
        if self._desk.answers.pop(self, None) is not None and self.owner is not None:
            self.owner.freed()

    async def ask(self, chat: Chat) -> None:
        """Ask the answerer. Only this coroutine holds *chat*, so it goes when the reply does (decision 9)."""
        pieces: AsyncIterator[str | Source] | None = None
        try:
            pieces = await _ask(self._desk.answer, chat)
            await self._read(pieces)
        except BaseException as error:  # noqa: BLE001 - the host's code: even SystemExit ends no more than its reply
            self._fail(error)
        try:
            if (close := getattr(pieces, "aclose", None)) is not None:
                await close()
        except BaseException as error:  # noqa: BLE001 - as above
            self._fail(error)

    async def _read(self, pieces: AsyncIterator[str | Source]) -> None:
        """Take piece after piece, as cheaply as can be: what is done here is done for each word."""
        time, fresh = asyncio.get_running_loop().time, self._fresh
        async for piece in pieces:
            self._heard = time()
            if self.status != "streaming":
                return
            if isinstance(piece, str):
                fresh.append(piece)
                self._room -= len(piece)
                if len(fresh) == 1 and self._line is not None:
                    self._line.words(is_first=not self._parts)
                if len(fresh) < _BREATH and self._room >= 0:
                    continue
                self._digest()
            else:
                self._cite(_as_source(piece))
            await asyncio.sleep(0)
        self.end("finished")

    def _fail(self, error: BaseException) -> None:
        """End the reply for *error*, and say in the log whose it is."""
        if _is_cancelled(error):
            self.end("interrupted")
            return
        is_ours = isinstance(error, _WrongAnswerError)
        what = "failed on" if self.status == "streaming" else "raised after the end of"
        self._fall("wrong-answer" if is_ours else "raised")
        told = str(error) if is_ours else _tell(error, debug=self._desk.debug)
        _log.error("answerer %s %s reply %s: %s", self._desk.answerer, what, self.id, told)

    async def follow(self, replies: AsyncGenerator[Reply]) -> None:
        """Tell what another worker's answerer says."""
        async with contextlib.aclosing(replies):
            async for reply in replies:
                self._heard = _now()
                self._hear(reply.text[len(self.text) :])
                for source in reply.sources[len(self.sources) :]:
                    self._cite(source)
                if reply.status != "streaming":
                    self.end(reply.status)
                    return
        self.end("interrupted")

    def _hear(self, text: str) -> None:
        self._fresh.append(text)
        self._room -= len(text)
        if self._line is not None:
            self._line.words(is_first=not self._parts)

    def _digest(self) -> None:
        """Make of the pieces that came one text that is fit to send, and end a reply that is too long."""
        if not self._fresh:
            return
        said = "".join(self._fresh)
        self._fresh.clear()
        text = self._join(said)
        self._room += len(said) - len(text)
        if text := text[: self._room] if self._room < 0 else text:
            self._parts.append(text)
        if self._room < 0:
            self._room, self._half = 0, ""
            self.end("finished")

    def _join(self, text: str) -> str:
        """Hold back half a surrogate pair at the end of *text*, for the next words may bring the other half."""
        if text.isascii() and not self._half:
            return text
        text = self._half + text
        self._half = text[-1] if "\ud800" <= text[-1:] <= "\udbff" else ""
        return _whole(text[: len(text) - len(self._half)])

    def _cite(self, source: Source) -> None:
        self.sources.append(source)
        self._post_source(len(self.sources) - 1)

    def _post_source(self, number: int) -> None:
        source = self.sources[number]
        if self._line is not None:
            self._line.post("source-url", sourceId=f"{self.id}-{number}", url=source.url, title=source.title)

    def _post_end(self) -> None:
        line, self._line = self._line, None
        if line is None:
            return
        if self._parts:
            line.post("text-end", id=self.id)
        line.speaker = None
        if self.status == "finished":
            line.post("finish")
        elif self.status == "failed":
            line.post("error", errorText=_ERROR_TEXT)
        else:
            line.post("abort", reason=self.status)

    def _watch(self) -> None:
        """Fail an answerer that is silent or long-winded: one timer for a reply, moved on only when it rings."""
        config = self._desk.config
        due = min(self._heard + config.chunk_timeout, self._born + config.answer_timeout)
        if _now() < due:
            self._alarm = self._desk.alarms.at(due, self._watch)
            return
        is_silent = due < self._born + config.answer_timeout
        _log.error("answerer %s took too long over reply %s", self._desk.answerer, self.id)
        self._fall("chunk-timeout" if is_silent else "answer-timeout")
        self.halt("failed")

    def _fall(self, reason: str) -> None:
        """End the reply as failed, and count why, if it has not ended."""
        if self.status == "streaming":
            self._desk.failed[reason] += 1
        self.end("failed")


# ---- Replies that wait for their visitor -----------------------------------------------------------------------------


class _Past:
    """An ended session whose replies wait for their visitor: the last, which the row carries, and those before it."""

    def __init__(self, desk: _Desk, row: SessionRow, answers: Sequence[_Answer], earlier: _Past | None = None) -> None:
        self._earlier = earlier
        self.answers = list(answers)
        self.answer = answer = self.answers[-1]
        self.holder: _Conversation | None = None
        self._desk = desk
        self._row = row
        self._alarm: _Alarm | None = None
        self._is_unfinished_turn = answer.session_id == row.id and answer.status == "streaming"
        answer.pasts.append(self)
        desk.remember(row.id, self)

    def save(self) -> None:
        """Save the row with the reply as it is; once that has ended, its time runs."""
        rows, alarms, status = self._desk.rows, self._desk.alarms, self.answer.status
        is_beat = self._alarm is not None and status == "streaming"
        if self._alarm is not None:
            self._alarm.cancel()
        if self._is_unfinished_turn and status in _TOLD:
            self._row = msgspec.structs.replace(self._row, turns=self._row.turns + 1)
        if status != "streaming":
            self._alarm = alarms.after(self._desk.config.reply_ttl, self.forget)
        elif rows.shared is not None:
            self._alarm = alarms.after(_BEAT, self.save)  # so that other workers see it grow
        if not (is_beat and rows.is_saving(self._row.id)):
            row = msgspec.structs.replace(self._row, reply=self.answer.reply)
            rows.put(row, [each.reply for each in self.answers[:-1]])

    def forget(self) -> None:
        """Let the stored reply go: its visitor has it, or has stayed away too long."""
        if self._desk.past.pop(self._row.id, None) is None:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self.answer.pasts.remove(self)
        self._desk.rows.put(self._row)
        if self._earlier is not None:
            self._earlier.forget()


# ---- The conversation ------------------------------------------------------------------------------------------------


#: What the visitor can do about a message that is not taken.
_DETAILS: dict[str, str] = {
    "invalid": "This is not a frame of chat-session.v1.",
    "empty": "There is nothing to send yet: write a few words.",
    "too-long": "This message is too long: shorten it to {limit} characters.",
    "too-many": "Too many messages are waiting: send this one again after the next reply.",
    "rate-limited": "You write faster than we can read: send this again in {wait} s.",
    "cancelled": "You took this message back.",
}


class _Conversation:
    """One open session: what its visitor may do, decided without waiting for anything."""

    __slots__ = (
        *("_answer", "_desk", "_idle", "_invalid", "_last", "_line", "_mark", "_past", "_quiet", "_rate", "_recent"),
        *("_is_renounced", "_settling", "_taken", "_talk", "_waiting", "_warned", "address", "is_over", "row"),
    )

    def __init__(self, desk: _Desk, token: _Token, address: str | None, line: _Line) -> None:
        self.row = SessionRow(id=token.session, started_at=_utc(), visitor=token.visitor)
        self.address = address
        self.is_over = False
        self._desk = desk
        self._line = line
        self._rate = _Rate(desk.config.messages_per_minute)
        self._waiting: dict[str, str] = {}
        self._taken: dict[str, None] = {}
        self._talk: _Talk | None = None
        self._answer: _Answer | None = None
        self._last: _Answer | None = None
        self._recent: dict[str, _Answer] = {}
        self._past: _Past | None = None
        self._mark: int | None = None
        self._settling: asyncio.Task[None] | None = None
        self._is_renounced = False
        self._idle: _Alarm | None = None
        self._invalid = 0
        self._warned = False

    def open(self, greeting: str, previous: str) -> None:
        """Greet the visitor, and bring what an earlier connection owes them."""
        config = self._desk.config
        self._line.post(
            "session-start",
            sessionId=self.row.id,
            greeting=greeting,
            idleTimeout=config.idle_timeout,
            pingInterval=config.ping_interval,
            maxMessageChars=config.max_message_chars,
            maxPending=config.max_pending,
        )
        self._desk.rows.put(self.row)
        self._desk.emit("started", session_id=self.row.id, visitor=self.row.visitor)
        self._rest()
        if (past := self._desk.past.get(previous)) is not None:
            self._adopt(past)
        elif previous and self._desk.rows.can_load:
            self._settling = asyncio.get_running_loop().create_task(self._fetch(previous))
            self._desk.settle(self.row.id, self._settling)

    # What the visitor does.

    def message(self, message_id: str, text: str) -> None:
        """Take a message, recognise it as answered already, or say why not."""
        self._rest()
        if message_id in self._taken:
            return
        carried, code = self._find_carried(message_id), self._find_fault(text)
        if carried is not None and code in (None, "too-many"):
            self._recognise(carried, text)
        elif code is not None:
            self.reject(message_id, code)
        elif wait := self._rate.wait(_now()):
            self.reject(message_id, "rate-limited", wait)
        else:
            self._taken[message_id] = None
            self._waiting[message_id] = text
            self._proceed()

    def stop(self, message_id: str | None) -> None:
        """Stop the running reply, or take a waiting message back."""
        if message_id is not None and self._waiting.pop(message_id, None) is not None:
            del self._taken[message_id]
            self.reject(message_id, "cancelled")
            self._rest()
        elif (running := self._running) is not None and message_id in (None, running.in_reply_to):
            running.halt("stopped")

    def stay(self) -> None:
        """Answer the idle warning."""
        self._rest()

    def leave(self) -> None:
        """Say goodbye: what runs is stopped."""
        self.stop(None)
        self.end("visitor")

    def invalid(self, message_id: str | None) -> None:
        """Refuse a frame that we cannot read; the third is the last."""
        self.reject(message_id, "invalid")
        self._invalid += 1
        if self._invalid == _INVALID_LIMIT:
            self.drop(_Close.INVALID)

    def heard(self) -> None:
        """Note that the page listens, and so has a carried reply that was sent there to its end."""
        if self._past is not None and self._mark is not None and self._line.sent >= self._mark:
            self._past.forget()
            self._past = None

    @property
    def is_silent(self) -> bool:
        """Whether the visitor has not been heard for a while, and may be elsewhere."""
        return self._line.silence > _SILENCE

    # How a session ends.

    def end(self, reason: _EndReason) -> None:
        """Tell the visitor that the session is over, and why."""
        if not self.is_over:
            self._line.post("session-end", reason=reason)
            self._line.hang_up(_Close.RESTART if reason == "restart" else _Close.DONE)
            self._finish(reason)

    def drop(self, code: _Close) -> None:
        """Hang up without a word: the page may come back."""
        self._line.hang_up(code)
        self.gone(None)

    def gone(self, code: int | None) -> None:
        """Note that the connection is lost; a server that closes it says 1012."""
        if not self.is_over:
            self._finish("restart" if code == _Close.RESTART or self._desk.is_draining else "dropped")

    def renounce(self) -> None:
        """Hang up on a token that has opened a session on another worker, whose row it is."""
        self._line.hang_up(_Close.TOKEN)
        if not self.is_over:
            self._last, self._is_renounced = None, True
            self._finish("dropped")

    def drain(self) -> None:
        """End for a restart, now or as soon as the running reply has ended."""
        if self._running is None:
            self.end("restart")

    def _finish(self, reason: _EndReason) -> None:
        self.is_over = True
        self._desk.forget(self)
        self._waiting.clear()
        self._talk = None
        if self._idle is not None:
            self._idle.cancel()
        if self._answer is not None and self._answer.owner is self:
            self._answer.detach()
        self.row = msgspec.structs.replace(self.row, ended_at=_utc(), end_reason=reason)
        if reason in _CARRIED and self._last is not None:
            others = [answer for answer in self._recent.values() if answer is not self._last]
            _Past(self._desk, self.row, [*others, self._last], self._past).save()
        elif not self._is_renounced and not (reason in _CARRIED and self._settling is not None):  # else ``_fetch`` does
            self._desk.rows.put(self.row)
        self._desk.count_end(self.row)

    # Asking, one at a time.

    @property
    def _running(self) -> _Answer | None:
        """The reply that the visitor sees running; its answerer may have a moment longer to clean up."""
        return self._answer if self._answer is not None and self._answer.status == "streaming" else None

    def _find_fault(self, text: str) -> str | None:
        config = self._desk.config
        if len(text) > config.max_message_chars:
            return "too-long"
        if not text.strip():
            return "empty"
        room = config.max_pending + (self._running is None)
        return "too-many" if len(self._waiting) >= room else None

    def reject(self, message_id: str | None, code: str, wait: int = 0) -> None:
        """Say why a message is not taken, and what the visitor can do about it."""
        self._desk.rejected[code] += 1
        detail = _DETAILS[code].format(limit=self._desk.config.max_message_chars, wait=wait)
        extra = {"retryAfter": wait} if wait else {}
        self._line.post("message-rejected", id=message_id, code=code, detail=detail, **extra)

    def _proceed(self) -> None:
        """Ask the answerer the oldest message that waits, once the reply before it has ended."""
        if self.is_over or self._settling is not None or self._answer is not None or not self._waiting:
            return
        message_id = next(iter(self._waiting))
        question = Message(role="user", content=self._waiting.pop(message_id))
        earlier = self._desk.pads.earlier(self.row.id)
        self._talk = (earlier, question)
        messages = [message.copy() for turn in (*earlier, (question,)) for message in turn]
        self._answer = self._last = _Answer(self._desk, _new_reply(message_id), self.row.id)
        self._keep(self._answer)
        self._answer.owner = self
        self._answer.attach(self._line)
        self._answer.start(self._answer.ask(Chat(question["content"], messages, self.row, self._desk.app)))

    def _keep(self, answer: _Answer) -> None:
        """Keep a reply that the page may not have seen end.

        It has no more messages under way than may wait and one that is answered, and asks again for all that it has
        not seen: those are kept anew, so what falls off it has seen.
        """
        self._recent.pop(answer.in_reply_to, None)
        self._recent[answer.in_reply_to] = answer
        if len(self._recent) > self._desk.config.max_pending + 2:
            del self._recent[next(iter(self._recent))]

    def replied(self, answer: _Answer) -> None:
        """Note the end of the running reply; what was said goes onto the scratchpad."""
        if answer.status in _TOLD:
            if answer.session_id == self.row.id:
                self.row = msgspec.structs.replace(self.row, turns=self.row.turns + 1)
            self._remember(self._talk, answer)
        self._talk = None
        if self._past is not None and answer is self._past.answer:
            self._mark = self._line.posted
        self._rest()
        if self._desk.is_draining:
            self.end("restart")

    def freed(self) -> None:
        """Go on, now that the answerer is done with the last reply."""
        self._answer = None
        self._proceed()

    def _remember(self, talk: _Talk | None, answer: _Answer) -> None:
        if talk is not None and not self.is_over:
            earlier, question = talk
            # A message of white space alone is refused by Anthropic's API, and with it every talk that it is part of.
            said = (Message(role="assistant", content=answer.text),) if answer.text.strip() else ()
            self._desk.pads.keep(self.row.id, (*earlier, (question, *said)))

    # Coming back after a drop.

    async def _fetch(self, session_id: str) -> None:
        """Ask the keeper of the rows for a reply that this process does not know; messages wait meanwhile.

        If this session ends before the answer comes, the page will ask for the reply by this session's token.
        """
        if (earlier := self._desk.settling.get(session_id)) is not None:
            await asyncio.wait([earlier])
        past = self._desk.past.get(session_id) or self._revive(session_id, await self._desk.rows.load(session_id))
        self._settling = None
        if past is not None and not self.is_over:
            self._adopt(past)
        elif self.row.end_reason in _CARRIED and not self._is_renounced:
            if past is not None:
                _Past(self._desk, self.row, past.answers, past).save()
            else:
                self._desk.rows.put(self.row)
        self._rest()
        self._proceed()

    def _revive(self, session_id: str, shelf: _Shelf | None) -> _Past | None:
        """Make of a row what its own process had, and go on listening where another one still writes the reply."""
        if shelf is None or shelf.row.reply is None or self._is_stale(shelf.row):
            return None
        replies = [_Answer(self._desk, each) for each in (*shelf.others, shelf.row.reply)]
        past = _Past(self._desk, msgspec.structs.replace(shelf.row, reply=None), replies)
        if past.answer.status == "streaming" and (shared := self._desk.rows.shared) is not None:
            past.answer.start(past.answer.follow(shared.follow(session_id)))
            return past
        if past.answer.status == "streaming":
            past.answer.status = "interrupted"  # its process is gone, and with it who would have ended it
        past.save()
        return past

    def _is_stale(self, row: SessionRow) -> bool:
        """Tell whether the process that should have let the reply go, ``reply_ttl`` after its end, has died before."""
        lifetime = self._desk.config.answer_timeout + self._desk.config.reply_ttl
        if row.ended_at is None:
            return False
        ended_at = row.ended_at.replace(tzinfo=row.ended_at.tzinfo or UTC)  # some databases forget it
        return (_utc() - ended_at).total_seconds() > lifetime

    def _adopt(self, past: _Past) -> None:
        """Send the last reply that *past* has kept, and go on with it if it is still being written."""
        if past.holder is not None:
            past.holder.end("replaced")
        past.holder = self
        self._desk.carried += 1
        self._past, last = past, past.answer
        self._last = last
        self._recent = {answer.in_reply_to: answer for answer in past.answers}
        if last.status == "streaming":
            self._answer = last
            last.owner = self
        last.attach(self._line)
        if last.status != "streaming":
            self._mark = self._line.posted
        for message_id in [each for each in self._waiting if self._find_carried(each)]:
            self._recognise(self._recent[message_id], self._waiting.pop(message_id))

    def _find_carried(self, message_id: str) -> _Answer | None:
        """Find the carried reply that answers the message, unless it went wrong and shall be given anew."""
        carried = self._recent.get(message_id)
        return carried if carried is not None and carried.status in (*_TOLD, "streaming") else None

    def _recognise(self, carried: _Answer, text: str) -> None:
        """Put the turn that *carried* answers onto the new scratchpad, at once or when the reply ends.

        The page asks again only for what it has not seen end, so it is sent what was not sent yet. That may
        interrupt the reply which is being sent; starting it once more puts that right.
        """
        self._taken[carried.in_reply_to] = None
        self._keep(carried)
        talk = (self._desk.pads.earlier(self.row.id), Message(role="user", content=text))
        if carried.status == "streaming":
            self._talk = talk
            return
        self._remember(talk, carried)
        if carried is not self._last:
            carried.attach(self._line)
            if self._running is not None:
                self._running.attach(self._line)

    # Idling.

    def _rest(self) -> None:
        """Start the idle time anew; a timer that runs already finds out when it rings."""
        self._quiet = _now()
        if self._warned and self._idle is not None:
            self._idle.cancel()  # it waits for the end, and the next warning may come before that
            self._idle = None
        self._warned = False
        if self._idle is None and not self.is_over:
            self._look_idle()

    def _look_idle(self) -> None:
        """Warn or end a session in which nothing is said; what is said meanwhile starts the watch again."""
        config, now = self._desk.config, _now()
        warn_at, end_at = self._quiet + (config.idle_timeout - config.warning), self._quiet + config.idle_timeout
        self._idle = None
        if self._running is not None or self._waiting or self._settling is not None:
            return
        if now >= end_at:
            self.end("idle")
            return
        if now >= warn_at and not self._warned:
            self._warned = True
            self._line.post("session-idle", closesIn=round(end_at - now, 3))
        self._idle = self._desk.alarms.at(end_at if self._warned else warn_at, self._look_idle)


def _utc() -> datetime:
    return datetime.now(UTC)


def _new_reply(message_id: str) -> Reply:
    return Reply(secrets.token_urlsafe(12), message_id, "", [], "streaming")


# ---- What the conversations share ------------------------------------------------------------------------------------


class _Desk:
    """What the conversations of one plugin share."""

    app: Litestar

    def __init__(self, answer: _Answerer, config: ChatSessionConfig) -> None:
        self.answer = answer
        self.answerer = _name(answer)
        self.config = config
        self.alarms = _Alarms()
        self.pads = _Scratchpads(config, self.alarms)
        self.rows = _Rows(config, self.renounce)
        self.sessions: dict[str, _Conversation] = {}
        self.addresses: Counter[str] = Counter()
        self.past: dict[str, _Past] = {}
        self.answers: dict[_Answer, asyncio.Task[None]] = {}
        self.settling: dict[str, asyncio.Task[None]] = {}
        self.is_draining = False
        self.turns = self.carried = 0
        self.ended, self.rejected, self.failed = Counter[str](), Counter[str](), Counter[str]()
        self._box: asyncio.Task[None] | None = None

    def open(self, app: Litestar) -> None:
        """Note whom we work for; a host that mounts *app* may never run its lifespan, so sockets say it too."""
        if getattr(self, "app", None) is not app:
            self.app = app
            self.rows.bind(app)

    @property
    def debug(self) -> bool:
        return self.app.debug

    def is_full(self, previous: str) -> bool:
        """Tell whether there is no room for one more session; one that replaces an open one always has room."""
        return self.is_draining or len(self.sessions) >= self.config.max_sessions + (previous in self.sessions)

    def is_crowded(self, address: str | None, previous: str) -> bool:
        """Tell whether *address* has all the sessions that one address may have."""
        old = self.sessions.get(previous)
        spare = old is not None and old.address == address
        return address is not None and self.addresses[address] >= self.config.max_sessions_per_client + spare

    def admit(self, conversation: _Conversation, previous: str) -> None:
        """Count a session as open; one that it replaces is ended first."""
        if (old := self.sessions.get(previous)) is not None:
            old.end("replaced")
        self.sessions[conversation.row.id] = conversation
        if conversation.address is not None:
            self.addresses[conversation.address] += 1
        if self.rows.shared is not None and self._box is None:
            self._box = asyncio.get_running_loop().create_task(self._watch_box())

    def forget(self, conversation: _Conversation) -> None:
        """Count a session as ended, and drop what its visitor typed."""
        del self.sessions[conversation.row.id]
        self.pads.drop(conversation.row.id)
        if conversation.address is not None:
            self.addresses[conversation.address] -= 1
            if not self.addresses[conversation.address]:
                del self.addresses[conversation.address]

    def count_end(self, row: SessionRow) -> None:
        """Count an ended session, and tell the host's listeners."""
        reason = cast("str", row.end_reason)
        self.ended[reason] += 1
        self.emit("ended", session_id=row.id, visitor=row.visitor, reason=reason, turns=row.turns)
        _log.debug("session %s ended (%s) after %d turns", row.id, reason, row.turns)

    def count_reply(self, answer: _Answer, seconds: float) -> None:
        """Count a reply that has ended, and tell the host's listeners."""
        self.turns += answer.status in _TOLD
        sizes = {"characters": len(answer.text), "sources": len(answer.sources), "seconds": round(seconds, 3)}
        self.emit("replied", session_id=answer.session_id, reply_id=answer.id, status=answer.status, **sizes)

    def emit(self, event: str, **facts: object) -> None:
        """Emit a Litestar event of ids and counts; without listeners Litestar would raise (its issue 4263)."""
        emitter, event = self.app.event_emitter, f"chat_session.{event}"
        if emitter.listeners.get(event):
            try:
                emitter.emit(event, **facts)
            except Exception as error:  # noqa: BLE001 - the host's emitter, or one that no lifespan has started
                _log.error("the event %s was lost: %s", event, _tell(error))

    def stats(self) -> _Stats:
        """Return what ``ChatSessionPlugin.stats`` promises."""
        return {
            "open_sessions": len(self.sessions),
            "running_replies": sum(answer.status == "streaming" for answer in self.answers),
            "turns": self.turns,
            "carried_replies": self.carried,
            "ended": dict(self.ended),
            "rejected": dict(self.rejected),
            "failed": dict(self.failed),
        }

    def settle(self, session_id: str, task: asyncio.Task[None]) -> None:
        """Keep the task that finds out what an earlier session owes a visitor."""
        self.settling[session_id] = task
        task.add_done_callback(lambda _: self.settling.pop(session_id))

    def renounce(self, session_id: str) -> None:
        """End a session that another worker has opened first, and leave its row alone."""
        if (conversation := self.sessions.get(session_id)) is not None:
            conversation.renounce()

    async def _watch_box(self) -> None:
        """End the sessions that have come back on another worker; look only while some visitor is silent."""
        while self.sessions:
            await asyncio.sleep(_BEAT)
            is_any_silent = any(conversation.is_silent for conversation in self.sessions.values())
            for session_id in await self.rows.take_notes() if is_any_silent else ():
                if (conversation := self.sessions.get(session_id)) is not None:
                    conversation.end("replaced")
        self._box = None

    def remember(self, session_id: str, past: _Past) -> None:
        """Keep an ended session's reply, and no more of them than sessions; the oldest goes first."""
        self.past[session_id] = past
        if len(self.past) > self.config.max_sessions:
            next(iter(self.past.values())).forget()

    async def drain(self) -> None:
        """End all there is: idle sessions at once, running replies within their grace, then save the rows."""
        self.is_draining = True
        for conversation in list(self.sessions.values()):
            conversation.drain()
        if self.answers:
            await asyncio.wait(self.answers.values(), timeout=self.config.shutdown_grace)
        for answer in list(self.answers):
            answer.halt("interrupted")  # which ends its session too
        if self._box is not None:
            self._box.cancel()
            self._box = None
        if self.settling:
            await asyncio.wait(self.settling.values(), timeout=_LOAD_TIMEOUT)
        await self.rows.drain(max(self.config.shutdown_grace, _SAVE_GRACE))


def _name(function: Any) -> str:
    return str(getattr(_unwrap(function), "__qualname__", type(function).__qualname__))


# ---- The socket ------------------------------------------------------------------------------------------------------


async def _try(action: Awaitable[None]) -> bool:
    """Do something with a socket; False if the visitor has left meanwhile."""
    try:
        await action
    except _GONE:
        return False
    return True


class _Courier:
    """One task that sends, and what it is at: a visitor who does not read holds up this one alone."""

    __slots__ = ("line", "since", "task")

    line: _Line
    task: asyncio.Task[None]

    def __init__(self) -> None:
        self.since = _now()


class _Office:
    """Sends what lies in the lines' outboxes: urgent frames in the loop's next turn, words at the next refresh.

    One courier serves all the lines that are ready; while it is held up, the next turn of the loop sends another.
    """

    def __init__(self, send_timeout: float, alarms: _Alarms) -> None:
        self.alarms = alarms
        self._send_timeout = send_timeout
        self._ready: deque[_Line] = deque()
        self._slow: list[_Line] = []
        self._couriers: set[_Courier] = set()
        self._is_awake = False
        self._is_watching = False

    def soon(self, line: _Line) -> None:
        """Have *line* flushed in the loop's next turn."""
        self._ready.append(line)
        if not self._is_awake:
            self._is_awake = True
            asyncio.get_running_loop().call_soon(self._turn)

    def later(self, line: _Line) -> None:
        """Have *line* flushed within a refresh of the screen, together with all others that have words."""
        if not self._slow:
            asyncio.get_running_loop().call_later(_WORD_WAIT, self._refresh)
        self._slow.append(line)

    def _refresh(self) -> None:
        self._ready.extend(self._slow)
        self._slow.clear()
        if not self._is_awake:
            self._turn()

    def _turn(self) -> None:
        self._is_awake = bool(self._ready)
        if self._ready:
            loop, courier = asyncio.get_running_loop(), _Courier()
            courier.task = loop.create_task(self._deliver(courier))
            self._couriers.add(courier)
            loop.call_soon(self._turn)
            if not self._is_watching:
                self._is_watching = True
                self.alarms.after(self._send_timeout, self._watch)

    async def _deliver(self, courier: _Courier) -> None:
        try:
            while self._ready:
                courier.line = self._ready.popleft()
                await courier.line.flush(courier)
        finally:
            self._couriers.discard(courier)

    def _watch(self) -> None:
        """Give up the visitors who hold a courier up, by one timer for all."""
        now = _now()
        for courier in [each for each in self._couriers if each.since + self._send_timeout <= now]:
            courier.since = now
            courier.line.lose()
        self._is_watching = bool(self._couriers)
        if self._couriers:
            due = min(courier.since for courier in self._couriers) + self._send_timeout
            self.alarms.at(due, self._watch)


class _Line:
    """One visitor's websocket: a reader for its whole life, an outbox, and a pulse."""

    __slots__ = (
        *("_code", "_courier", "_due", "_heard", "_interval", "_is_cut", "_left", "_max_bytes", "_office"),
        *("_outbox", "_pulse", "_queued", "_reader", "_socket", "conversation", "posted", "sent", "speaker"),
    )

    conversation: _Conversation

    def __init__(self, office: _Office, socket: WebSocket[Any, Any, Any], config: ChatSessionConfig) -> None:
        self._office = office
        self._socket = socket
        self._interval = config.ping_interval
        self._max_bytes = max(16 * config.max_message_chars, _MIN_FRAME_LIMIT)
        self._outbox: list[dict[str, object]] = []
        self._queued: Literal["", "later", "soon"] = ""
        self._courier: _Courier | None = None
        self._is_cut = False
        self._reader: asyncio.Task[Any] | None = None
        self._code: _Close | None = None
        self._left: int | None = None
        self._heard = _now()
        self._due = self._next_beat(self._heard)
        self.speaker: _Answer | None = None
        self.posted = self.sent = 0
        self._pulse = office.alarms.at(self._due, self._beat)

    # Outgoing.

    @property
    def silence(self) -> float:
        """Seconds since the last frame."""
        return _now() - self._heard

    def post(self, type_: str, **content: object) -> None:
        """Send one frame, in the loop's next turn."""
        if self._code is None and not self._is_cut:
            self._seal()
            self.put(type_, **content)
            self._hurry()
            if len(self._outbox) > _OUTBOX_LIMIT and self._courier is not None:
                self.lose()

    def words(self, *, is_first: bool) -> None:
        """Fetch what the speaker says, together with what more it says within a refresh of the screen."""
        if not self._queued and self._code is None and not self._is_cut:
            if is_first:
                self._hurry()
            else:
                self._queued = "later"
                self._office.later(self)

    def put(self, type_: str, **content: object) -> None:
        """Lay one frame into the outbox, to be encoded when it is sent: much may pile up for one who reads nothing."""
        self.posted += 1
        self._outbox.append({"type": type_, **content})

    def _hurry(self) -> None:
        if self._queued != "soon":
            self._queued = "soon"
            self._office.soon(self)

    def _seal(self) -> None:
        if self.speaker is not None and not self._is_cut:
            self.speaker.tell(self)

    async def flush(self, courier: _Courier) -> None:
        """Send all there is; while one send waits for the visitor, what comes piles up and then travels together."""
        self._queued = ""
        if self._courier is not None:
            return
        self._courier, time = courier, asyncio.get_running_loop().time
        try:
            self._seal()
            while frames := self._outbox:
                self._outbox = []
                for frame in frames:
                    courier.since = time()
                    await self._socket.send({"type": "websocket.send", "text": _encode(frame).decode(), "bytes": None})
                self.sent += len(frames)
                self._seal()
        except _GONE:
            self._cut()
        finally:
            self._courier = None

    def _cut(self) -> None:
        """Send no more: the visitor has left, and the reader is about to hear how."""
        self._is_cut = True
        self._outbox.clear()

    def lose(self) -> None:
        """Give the visitor up: nothing is heard, or nothing gets through."""
        if self._code is None:
            self._cut()
            self.conversation.drop(_Close.LEFT)

    def hang_up(self, code: _Close) -> None:
        """Send what is in the outbox, then close; the reader is stopped first (decision 2)."""
        if self._code is None:
            self._code = code
            if self._reader is not None and self._reader is not asyncio.current_task():
                self._reader.cancel()

    # Incoming.

    async def serve(self) -> None:
        """Read until the visitor leaves or we hang up, and close.

        A flood is read fast, or it piles up in the server and is parsed in one go; now and then the others get a turn.
        """
        self._reader, count = asyncio.current_task(), 0
        try:
            while self._code is None and self._take(await self._receive()):
                count += 1
                if count % _GULP == 0:
                    await asyncio.sleep(0)
        except asyncio.CancelledError:
            if self._code is None or cast("asyncio.Task[Any]", self._reader).uncancel():
                raise
        finally:
            self._reader = None
            self._pulse.cancel()
            self.conversation.gone(self._left)
        if self._left is None:
            await self._close()

    async def _receive(self) -> Any:
        try:
            return await self._socket.receive()
        except _GONE:
            return {"type": "websocket.disconnect"}

    async def _close(self) -> None:
        code = self._code or _Close.BUG
        with contextlib.suppress(*_GONE):  # a TimeoutError is an OSError
            async with asyncio.timeout(_CLOSE_GRACE):
                while self._courier is not None:  # noqa: ASYNC110 - rare, and an event for each line is not free
                    await asyncio.sleep(_WORD_WAIT)
                await self.flush(_Courier())
                await self._socket.close(code, _REASONS[code])
        if self._courier is not None:
            self._courier.task.cancel()

    def _take(self, event: Any) -> bool:
        """Act on one event of the socket; False is the last. Its text stays in no variable that waits (decision 9)."""
        if event["type"] == "websocket.disconnect":
            self._left = event.get("code") or _Close.LEFT
            return False
        if self._code is None:
            self._heard = _now()
            self.conversation.heard()
            self._read(event.get("text"))
        return True

    def _read(self, text: object) -> None:
        if not isinstance(text, str):
            self.conversation.drop(_Close.BINARY)
        elif 4 * len(text) > self._max_bytes < len(text.encode()):  # UTF-8 takes four bytes at the most
            self.conversation.drop(_Close.TOO_BIG)
        else:
            self._dispatch(text)

    def _dispatch(self, text: str) -> None:
        conversation = self.conversation
        try:
            frame = _decode(text)
        except (ValueError, RecursionError, msgspec.MsgspecError):
            conversation.invalid(_find_id(text))
            return
        match frame:
            case _MessageFrame():
                conversation.message(frame.id, frame.text)
            case _StopFrame():
                conversation.stop(frame.id)
            case _StayFrame():
                conversation.stay()
            case _EndFrame():
                conversation.leave()
            case _PongFrame():
                pass

    def _beat(self) -> None:
        """Ping at a steady pace, and give the visitor up when nothing has been heard for too long."""
        now, lost_at = _now(), self._heard + self._interval + _PONG_GRACE
        if now >= lost_at:
            self.lose()
            return
        if now >= self._due:
            self._due = self._next_beat(now)
            self.post("ping")
        self._pulse = self._office.alarms.at(min(self._due, lost_at), self._beat)

    def _next_beat(self, now: float) -> float:
        """Find the time of the next ping, up to a hundredth early: pings that go together wake the process once."""
        due = now + self._interval
        return due - due % (self._interval / 100)


# ---- The plugin ------------------------------------------------------------------------------------------------------


class ChatSessionPlugin(InitPlugin):
    """A website chat for a Litestar app; list it last, for what is listed later is gone when chats are drained.

    Args:
        answer: The answerer: an async generator function of one ``Chat`` that yields ``str`` (the next words) and
            ``Source`` (a citation), or a coroutine function that returns text or an async iterable of such.
        config: All that can be set.

    Raises:
        ImproperlyConfiguredException: If *answer* is something else, the key in ``CHAT_SESSION_SECRET`` is too short,
            or ``widget.js`` is to be served and is not beside this module.

    """

    def __init__(self, answer: _Answerer, config: ChatSessionConfig = ChatSessionConfig()) -> None:  # noqa: D107
        if not _is_answerer(answer):
            raise ImproperlyConfiguredException(
                f"answer must be an async generator function or a coroutine function, not {answer!r}: "
                "write it with `async def` and one parameter, the Chat"
            )
        self._config = config
        self._keys = [_derive(key, config.path) for key in _find_keys(config.secret)]
        self._desk = _Desk(answer, config)
        self._office = _Office(config.send_timeout, self._desk.alarms)
        self._used: TTLCache[str, bool] = TTLCache(math.inf, config.token_ttl + 1, timer=_now)
        self._rates: TTLCache[str, _Rate] = TTLCache(_ADDRESS_LIMIT, 60.0, timer=_now)
        self._handlers: set[asyncio.Task[Any]] = set()
        self._lessons: set[str] = set()

    @property
    def config(self) -> ChatSessionConfig:
        """The configuration, as it was given."""
        return self._config

    def stats(self) -> _Stats:
        """Tell how it goes in this process: numbers alone, all but the first two counted since it began.

        Returns:
            ``open_sessions``, ``running_replies``, ``turns`` (replies finished or stopped), ``carried_replies`` (sent
            again after a drop), ``ended`` sessions by ``end_reason``, ``rejected`` messages by their ``code``, and
            ``failed`` replies by ``raised``, ``wrong-answer``, ``chunk-timeout`` or ``answer-timeout``.

        """
        return self._desk.stats()

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        """Mount the routes and the drain; nothing of the host's own is changed."""
        base = "/" + self._config.path.strip("/")
        base = base.rstrip("/")

        cache = CacheControlHeader(no_store=True)  # on the handler, or the host's own would land here too
        options = self._options(app_config, is_token=True)

        @post(f"{base}/token", status_code=201, include_in_schema=False, cache_control=cache, **options)
        async def token(request: Request[Any, Any, Any]) -> Response[dict[str, Any]]:
            return await self._mint(request)

        @websocket(f"{base}/socket", **self._options(app_config))
        async def socket(socket: WebSocket[Any, Any, Any]) -> None:
            await self._serve(socket)

        @get(f"{base}/socket", include_in_schema=False, cache_control=cache, **self._options(app_config))
        async def plain(request: Request[Any, Any, Any]) -> None:
            raise self._refuse_plain(request)

        app_config.route_handlers.extend((token, socket, plain))
        if self._config.serve_widget:
            app_config.route_handlers.append(_widget_route(f"{base}/widget.js", self._options(app_config)))
        app_config.plugins.append(_DrainPlugin(self._lifespan))
        return app_config

    def _options(self, app_config: AppConfig, *, is_token: bool = False) -> dict[str, Any]:
        """Say to the host's middleware, in its own terms, that these routes need no cookie and no login."""
        opt: dict[str, Any] = {"exclude_from_auth": True, "exclude_from_csrf": True}
        if app_config.csrf_config is not None:
            opt[app_config.csrf_config.exclude_from_csrf_key] = True
        if not (is_token and self._config.visitor):
            opt["skip_session"] = True
        config = self._config
        return {"guards": list(config.guards), "middleware": list(config.middleware), "opt": {**opt, **config.opt}}

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Litestar) -> AsyncGenerator[None]:
        self._desk.open(app)
        self._desk.is_draining = False
        self._desk.alarms.clear()
        self._office = _Office(self._config.send_timeout, self._desk.alarms)  # an earlier one may be of another loop
        try:
            yield
        finally:
            await self._desk.drain()
            if self._handlers:
                await asyncio.wait(self._handlers, timeout=2 * _CLOSE_GRACE)

    # The token.

    async def _mint(self, request: Request[Any, Any, Any]) -> Response[dict[str, Any]]:
        """Give a visitor the right to open one session."""
        config, origin = self._config, _header(request, "origin")
        if not _is_welcome(request, config.allowed_origins):
            self._tell_of_origin(origin)
            raise HTTPException(status_code=403, detail="This origin is not one of ChatSessionConfig.allowed_origins.")
        headers = _cors(origin, config.allowed_origins)
        previous = await self._find_previous(request)
        try:
            self._make_way(request, previous.session if previous else "")
            visitor = await self._find_visitor(request)
        except HTTPException as error:
            refusal = copy.copy(error)  # the host may raise one object again and again
            refusal.headers = {**(error.headers or {}), **headers, "Cache-Control": "no-store"}
            raise refusal from None
        if previous and (previous.origin != _digest(origin) or previous.visitor not in (None, visitor)):
            previous = None
        session = previous.session if previous else ""
        token = _Token(secrets.token_urlsafe(16), time.time() + config.token_ttl, _digest(origin), session, visitor)
        body = {"token": token.sign(self._keys[0]), "expiresIn": config.token_ttl}
        return Response(body, status_code=201, media_type="application/json", headers=headers)

    async def _find_previous(self, request: Request[Any, Any, Any]) -> _Token | None:
        """Read the form's ``previous``; garbage there is as good as nothing there."""
        if _header(request, "content-length") == "0":
            return None
        try:
            text = (await request.form()).get("previous")
        except Exception:  # noqa: BLE001 - a form can be malformed in as many ways as there are parsers of its parts
            return None
        return _Token.verify(self._keys, text) if isinstance(text, str) else None

    async def _find_visitor(self, request: Request[Any, Any, Any]) -> str | None:
        if self._config.visitor is None:
            return None
        visitor: Any = self._config.visitor(request)
        visitor = await visitor if inspect.isawaitable(visitor) else visitor
        name = None if visitor is None else str(visitor)
        if name is not None and len(name.encode("utf-8", "replace")) > _MAX_VISITOR:
            _log.error("visitor() returned an id of more than %d bytes, which does not fit into a token", _MAX_VISITOR)
            raise HTTPException(status_code=500)
        return name

    def _make_way(self, request: Request[Any, Any, Any], previous: str) -> None:
        """Turn a visitor away politely where there is no room, or where they ask too often.

        Raises:
            HTTPException: 503 or 429, with ``Retry-After``.

        """
        address = self._find_address(request)
        status, wait, detail = 0, _RETRY_AFTER, "You have many chats open; please close one first."
        if self._desk.is_full(previous):
            status, detail = 503, "The chat is busy; please try again soon."
        elif self._desk.is_crowded(address, previous):
            status = 429
        elif address is not None and (seconds := self._rate(address).wait(_now())):
            status, wait, detail = 429, seconds, "Too many chats were opened; please wait a moment."
        if status:
            raise HTTPException(status_code=status, detail=detail, headers={"Retry-After": str(wait)})

    def _rate(self, address: str) -> _Rate:
        rate = self._rates.get(address) or _Rate(self._config.tokens_per_minute)
        self._rates[address] = rate  # assigned anew, so that it is not forgotten while it is used
        return rate

    def _find_address(self, connection: _Connection) -> str | None:
        """Find whom to count *connection* for; None is not limited."""
        if self._config.client_address is not None:
            return _network(str(self._config.client_address(connection)))
        peer = connection.client.host if connection.client else ""
        if _is_global(peer):
            return _network(peer)
        self._teach(
            "a visitor's address is not global (a proxy, or a test), so visitors are not limited by address; "
            "have the server trust the proxy's headers, or set ChatSessionConfig.client_address"
        )
        return None

    def _tell_of_origin(self, origin: str | None) -> None:
        self._teach(
            f"a page of {(origin or '')[:100]!r} may not open a chat here; if it is yours, name its origin in "
            "ChatSessionConfig.allowed_origins, or have the proxy pass the visitor's Host on"
        )

    def _teach(self, lesson: str) -> None:
        """Say once in the log what a host may have overlooked; who makes up origins makes us say no more than a few."""
        if lesson not in self._lessons and len(self._lessons) < _LESSON_LIMIT:
            self._lessons.add(lesson)
            _log.warning(lesson)

    # The socket.

    def _refuse_plain(self, request: Request[Any, Any, Any]) -> HTTPException:
        """Say what is amiss when the socket's path is asked for by plain HTTP (RFC 9110 section 15.5.22)."""
        self._teach(
            "a chat came by plain HTTP, not by websocket: the server lacks a websocket library "
            "(pip install websockets), or a proxy in front of it does not pass the upgrade on"
        )
        headers = {"Upgrade": "websocket"} if request.scope["http_version"].startswith("1") else {}
        detail = "This is a websocket, and its upgrade did not get through."
        return HTTPException(status_code=426, detail=detail, headers=headers)

    async def _serve(self, socket: WebSocket[Any, Any, Any]) -> None:
        """Serve one websocket; nothing it raises may reach the framework, which would show it to the visitor."""
        task = cast("asyncio.Task[Any]", asyncio.current_task())
        self._handlers.add(task)
        try:
            line = await self._answer_handshake(socket)
            if line is not None:
                await line.serve()
        except Exception as error:  # noqa: BLE001 - the last resort
            _log.error("a chat failed by a fault of ours or of the host's configuration: %s", _tell(error))
            await _try(socket.close(_Close.BUG, _REASONS[_Close.BUG]))
        finally:
            self._handlers.discard(task)

    async def _answer_handshake(self, socket: WebSocket[Any, Any, Any]) -> _Line | None:
        """Open a session, or say no: before ``accept`` only to those who are not our page."""
        self._desk.open(socket.app)
        offered: list[str] = cast("dict[str, Any]", socket.scope).get("subprotocols") or []
        origin = _header(socket, "origin")
        token = self._find_token(offered)
        # A proxy that rewrites Host makes the app's own origin look foreign; the token knows better.
        is_known = origin and token and token.origin == _digest(origin)
        is_welcome = is_known or _is_welcome(socket, self._config.allowed_origins)
        if not is_welcome:
            self._tell_of_origin(origin)
        if _SUBPROTOCOL not in offered or not is_welcome:
            await _try(socket.close())
            return None
        if not await _try(socket.accept(subprotocols=_SUBPROTOCOL)):
            return None
        address = self._find_address(socket)
        refusal = self._find_refusal(token, origin, address)
        greeting = "" if refusal else await self._greet(socket)
        refusal = refusal or self._find_refusal(token, origin, address)
        if refusal is not None or token is None:
            code = refusal or _Close.TOKEN
            await _try(socket.close(code, _REASONS[code]))
            return None
        return self._open(socket, token, address, greeting)

    def _find_token(self, offered: Sequence[str]) -> _Token | None:
        """Find a token that we have signed among the subprotocols that a page offers."""
        texts = [each.removeprefix(_TOKEN_PREFIX) for each in offered if each.startswith(_TOKEN_PREFIX)]
        token = _Token.verify(self._keys, texts[0]) if texts else None
        if texts and token is None:
            self._teach(
                "a token was refused that was not signed here: workers that share visitors need one secret "
                f"(ChatSessionConfig.secret or {_ENV_SECRET}), and after a restart without one old tokens are void"
            )
        return token

    def _find_refusal(self, token: _Token | None, origin: str | None, address: str | None) -> _Close | None:
        if (
            token is None
            or token.expires <= time.time()
            or token.session in self._used
            or token.origin != _digest(origin)
        ):
            return _Close.TOKEN
        is_busy = self._desk.is_full(token.previous) or self._desk.is_crowded(address, token.previous)
        return _Close.BUSY if is_busy else None

    def _open(self, socket: WebSocket[Any, Any, Any], token: _Token, address: str | None, greeting: str) -> _Line:
        self._used[token.session] = True
        line = _Line(self._office, socket, self._config)
        line.conversation = _Conversation(self._desk, token, address, line)
        self._desk.admit(line.conversation, token.previous)
        line.conversation.open(greeting, token.previous)
        return line

    async def _greet(self, socket: WebSocket[Any, Any, Any]) -> str:
        greeting: Any = self._config.greeting
        try:
            async with asyncio.timeout(_GREETING_TIMEOUT):
                greeting = greeting(socket) if callable(greeting) else greeting
                greeting = await greeting if inspect.isawaitable(greeting) else greeting
            return _whole(greeting)
        except Exception as error:  # noqa: BLE001 - the host's code
            _log.error("the greeting failed, so the default one is used: %s", _tell(error))
            return str(ChatSessionConfig.greeting)


class _DrainPlugin(InitPlugin):
    """Adds the drain behind the plugins that earlier plugins bring along, as SQLAlchemy's does: the last ends first."""

    def __init__(self, lifespan: Callable[[Litestar], contextlib.AbstractAsyncContextManager[None]]) -> None:
        self._lifespan = lifespan

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        cast("Any", app_config).lifespan.append(self._lifespan)
        return app_config


def _cors(origin: str | None, allowed: Sequence[str]) -> dict[str, str]:
    """Let a page of an allowed foreign origin read the answer; the host's own CORS settings stay as they are."""
    if origin is None or origin.lower() not in (each.lower() for each in allowed):
        return {}
    return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": "Retry-After", "Vary": "Origin"}


def _widget_route(path: str, options: dict[str, Any]) -> Any:
    """Serve the widget from memory; Litestar itself never answers 304."""
    file = Path(__file__).with_name("widget.js")
    if not file.is_file():
        raise ImproperlyConfiguredException(
            "widget.js is not beside chat_session.py: copy it there, or set ChatSessionConfig.serve_widget to False"
        )
    script = file.read_bytes()
    tag = f'"{hashlib.sha256(script).hexdigest()[:20]}"'
    headers = {"ETag": tag, "X-Content-Type-Options": "nosniff"}
    cache = CacheControlHeader(public=True, max_age=300)

    @get(
        path,
        media_type="text/javascript",
        include_in_schema=False,
        sync_to_thread=False,
        cache_control=cache,
        **options,
    )
    def widget(request: Request[Any, Any, Any]) -> Response[bytes]:
        known = [each.strip().removeprefix("W/") for each in (_header(request, "if-none-match") or "").split(",")]
        if tag in known or "*" in known:
            return Response(b"", status_code=304, headers=headers)
        return Response(script, headers=headers)

    return widget


# ---- The demo --------------------------------------------------------------------------------------------------------
# A small shop, and the example to copy: an answerer, a page with one script tag, an app with one plugin.


@dataclass(frozen=True)
class _Topic:
    name: str
    words: frozenset[str]
    about: str
    takes: str


_TOPICS = (
    _Topic(
        "shipping",
        frozenset({"ship", "ships", "shipping", "deliver", "delivery", "post", "canada"}),
        "Yes, we ship to **Canada**, the United States and all of Europe. It costs $9, and nothing from $75 on.",
        "Shipping takes *five to eight working days* to Canada, and three to five within Europe.",
    ),
    _Topic(
        "returns",
        frozenset({"return", "returns", "refund", "exchange", "back"}),
        "You can send anything back within **30 days**, used once or not at all; the label is in the parcel.",
        "A return takes about a week: *three days* on its way, and *two* until the money is with you.",
    ),
    _Topic(
        "repairs",
        frozenset({"repair", "repairs", "broken", "fix", "handle", "cracked"}),
        "A broken handle or a cracked lid is no reason to part: **we repair** every pot that we ever sold.",
        "A repair takes *two to three weeks*, since each pot is fired again.",
    ),
)


async def _demo_answer(chat: Chat) -> AsyncIterator[str | Source]:
    """Look the topic up. What "it" means, only the scratchpad knows."""
    asked = _find_topic(chat.message)
    wants_time = re.search(r"how long|how fast|when|take", chat.message, re.IGNORECASE) is not None
    earlier = [_find_topic(message["content"]) for message in reversed(chat.messages[:-1]) if message["role"] == "user"]
    topic = asked or next(filter(None, earlier if wants_time else []), None)
    if topic is None:
        known = ", ".join(each.name for each in _TOPICS)
        reply = f"I am not sure what you mean by that. I know about {known}: ask me about one of them."
    else:
        reply = topic.takes if wants_time else topic.about
    for word in reply.split(" "):
        await asyncio.sleep(secrets.randbelow(60) / 1000 + 0.02)  # the pace of a fast human typist
        yield word + " "
    if topic is not None:
        yield Source(f"http://127.0.0.1:8000/#{topic.name}", f"Our {topic.name}")


def _find_topic(text: str) -> _Topic | None:
    words = set(re.findall(r"[a-z]+", text.lower()))
    return next((topic for topic in _TOPICS if topic.words & words), None)


_DEMO_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Kiln & Kettle</title>
<style>
  body { font: 18px/1.6 Georgia, serif; max-width: 36rem; margin: 4rem auto; padding: 0 1.5rem;
         color: #2b2622; background: #fbf8f4 }
  h1 { font-weight: 400; font-size: 2.6rem; margin-bottom: 0 }
  h2 { font-weight: 400; margin: 2.5rem 0 0; text-transform: capitalize }
</style>
<h1>Kiln &amp; Kettle</h1>
<p>Stoneware teapots, thrown and fired in one small workshop. Ask us anything: try
<em>do you ship to Canada?</em> and then <em>how long does it take?</em></p>
%s
<script src="/chat/widget.js" data-title="Kiln &amp; Kettle" data-accent="#8a4b2a" defer></script>
"""


def _demo() -> Litestar:
    """Make the demo's app."""
    sections = (f'<h2 id="{each.name}">{each.name}</h2>\n<p>{each.about.replace("**", "")}</p>' for each in _TOPICS)
    page = _DEMO_PAGE % "\n".join(sections)

    @get("/", media_type="text/html", sync_to_thread=False)
    def shop() -> str:
        return page

    return Litestar([shop], plugins=[ChatSessionPlugin(_demo_answer)], openapi_config=None)


if __name__ == "__main__":
    import uvicorn

    print("Open http://127.0.0.1:8000 and click the bubble.")  # noqa: T201 - a person reads it
    uvicorn.run(_demo(), host="127.0.0.1", port=8000, ws_per_message_deflate=False, log_level="warning")
