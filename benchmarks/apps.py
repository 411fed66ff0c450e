"""The servers that are compared: the same answerer and the same frames behind each, on uvicorn with uvloop.

    python benchmarks/apps.py KIND PORT [CERTIFICATE KEY]

Kinds: ours, bare, litestar, starlette, socketio, sse, chainlit. What each needs is imported where it is built, since
Chainlit lives in an environment of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

HOST = "127.0.0.1"
MARK = "<#>"  # One in each word, and nothing that a frame's header can be: words are counted without reading frames.
DUE_DIGITS = 14
VERSION = "chat-session.v1"
GREETING = {"type": "session-start", "sessionId": "s", "greeting": "Hi! How can I help?"}


# ---- The answerer ----


async def steady(pace: str, count: str) -> AsyncIterator[str]:
    """Say *count* words, *pace* a second, with a pause before each."""
    for number in range(int(count)):
        await asyncio.sleep(1 / float(pace))
        yield f"{number:05}{MARK} "


async def due(pace: str, count: str, asked: str) -> AsyncIterator[str]:
    """Say *count* words at times that are fixed from when the visitor *asked*; each word says when it was due."""
    for number in range(int(count)):
        when = float(asked) + (number + 1) / float(pace)
        await asyncio.sleep(max(0.0, when - time.monotonic()))
        yield f"{when:0{DUE_DIGITS}.4f}{MARK} "


async def burst(count: str) -> AsyncIterator[str]:
    """Say *count* words without a pause."""
    for number in range(int(count)):
        yield f"{number:05}{MARK} "


async def pile(pace: str, count: str, size: str) -> AsyncIterator[str]:
    """Say *count* words of *size* characters, *pace* a second, and print how many were said in which time."""
    begun, said = time.monotonic(), 0
    try:
        for number in range(int(count)):
            await asyncio.sleep(max(0.0, begun + (number + 1) / float(pace) - time.monotonic()))
            yield "x" * (int(size) - len(MARK)) + MARK
            said += 1
    finally:
        print(json.dumps({"said": said, "seconds": time.monotonic() - begun}), flush=True)


MANNERS: dict[str, Callable[..., AsyncIterator[str]]] = {"steady": steady, "due": due, "burst": burst, "pile": pile}


def answer(text: str) -> AsyncIterator[str]:
    """Answer in the manner that *text* names, such as "steady 50 200"."""
    manner, *numbers = text.split()
    return MANNERS[manner](*numbers)


async def reply(message: dict[str, Any], say: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """Answer *message* by the frames that a page of ours is sent."""
    name = os.urandom(12).hex()
    await say({"type": "start", "messageId": name, "messageMetadata": {"inReplyTo": message["id"]}})
    await say({"type": "text-start", "id": name})
    async for word in answer(message["text"]):
        await say({"type": "text-delta", "id": name, "delta": word})
    await say({"type": "text-end", "id": name})
    await say({"type": "finish"})


# ---- The apps ----


def ours() -> Any:
    """Build what the README shows, with room for a crowd from one address."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from litestar import Litestar  # noqa: PLC0415

    from chat_session import ChatSessionConfig, ChatSessionPlugin  # noqa: PLC0415

    config = ChatSessionConfig(secret="a key that only this benchmark knows", **OUR_LIMITS)
    return Litestar(plugins=[ChatSessionPlugin(our_answer, config)])


OUR_LIMITS: dict[str, Any] = {"max_reply_chars": 100_000_000, "messages_per_minute": 1_000_000, "idle_timeout": 3600.0}


async def our_answer(chat: Any) -> AsyncIterator[str]:
    """Answer as the others do."""
    return answer(chat.message)


def bare() -> Any:
    """Build the least app that sends these frames: no token, no session, no limits, nobody else to think of."""
    import msgspec  # noqa: PLC0415

    encode, decode = msgspec.json.Encoder().encode, msgspec.json.decode

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await serve_lifespan(receive, send)
        if scope["type"] != "websocket":
            return None

        async def say(frame: dict[str, Any]) -> None:
            await send({"type": "websocket.send", "text": encode(frame).decode()})

        await receive()
        await send({"type": "websocket.accept", "subprotocol": VERSION})
        await say(GREETING)
        while (event := await receive())["type"] == "websocket.receive":
            await reply(decode(event["text"]), say)
        return None

    return app


async def serve_lifespan(receive: Any, send: Any) -> None:
    """Start and stop, as a server asks."""
    while (event := await receive())["type"] != "lifespan.shutdown":
        await send({"type": event["type"] + ".complete"})
    await send({"type": "lifespan.shutdown.complete"})


def litestar() -> Any:
    """Build what a Litestar developer would write first."""
    from litestar import Litestar, WebSocket, websocket  # noqa: PLC0415
    from litestar.exceptions import WebSocketDisconnect  # noqa: PLC0415

    async def chat(socket: WebSocket[Any, Any, Any]) -> None:
        await socket.accept(subprotocols=VERSION)
        await socket.send_json(GREETING)
        try:
            while True:
                await reply(await socket.receive_json(), socket.send_json)
        except WebSocketDisconnect:
            return

    chat.__annotations__["socket"] = WebSocket  # Litestar reads it where the name is not at module level.
    return Litestar([websocket("/chat/socket")(chat)], openapi_config=None)


def starlette() -> Any:
    """Build what a Starlette or FastAPI developer would write first."""
    applications, routing = import_module("starlette.applications"), import_module("starlette.routing")
    disconnect: type[Exception] = import_module("starlette.websockets").WebSocketDisconnect

    async def chat(socket: Any) -> None:
        await socket.accept(subprotocol=VERSION)
        await socket.send_json(GREETING)
        try:
            while True:
                await reply(await socket.receive_json(), socket.send_json)
        except disconnect:
            return

    return applications.Starlette(routes=[routing.WebSocketRoute("/chat/socket", chat)])


def socketio() -> Any:
    """Build a python-socketio server, which emits each frame as an event."""
    package = import_module("socketio")
    server = package.AsyncServer(async_mode="asgi")

    async def connect(visitor: str, environ: object) -> None:  # noqa: ARG001 - the package's signature
        await server.emit("frame", GREETING, to=visitor)

    async def message(visitor: str, content: dict[str, Any]) -> None:
        await reply(content, partial(server.emit, "frame", to=visitor))

    server.on("connect", connect)
    server.on("message", message)
    return package.ASGIApp(server, socketio_path="/chat/socket")


def sse() -> Any:
    """Build a request for each message, answered by server-sent events."""
    applications, routing = import_module("starlette.applications"), import_module("starlette.routing")
    response = import_module("sse_starlette").EventSourceResponse

    async def events(message: dict[str, Any]) -> AsyncIterator[dict[str, str]]:
        name = os.urandom(12).hex()
        yield {"data": json.dumps({"type": "start", "messageId": name})}
        async for word in answer(message["text"]):
            yield {"data": json.dumps({"type": "text-delta", "id": name, "delta": word})}
        yield {"data": json.dumps({"type": "finish"})}

    async def chat(request: Any) -> Any:
        return response(events(await request.json()))

    return applications.Starlette(routes=[routing.Route("/chat/message", chat, methods=["POST"])])


def chainlit() -> Any:
    """Build Chainlit's own server with one handler, as its documentation has it."""
    package = import_module("chainlit")

    async def on_chat_start() -> None:
        await package.Message(content=GREETING["greeting"]).send()

    async def on_message(message: Any) -> None:
        said = package.Message(content="")
        async for word in answer(message.content):
            await said.stream_token(word)
        await said.send()

    package.on_chat_start(on_chat_start)
    package.on_message(on_message)
    return import_module("chainlit.server").app


APPS: dict[str, Callable[[], Any]] = {
    "ours": ours,
    "bare": bare,
    "litestar": litestar,
    "starlette": starlette,
    "socketio": socketio,
    "sse": sse,
    "chainlit": chainlit,
}


def serve(app: Any, port: int, certificate: str | None = None, key: str | None = None) -> None:
    """Serve *app* until told to stop."""
    import uvicorn  # noqa: PLC0415

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    uvicorn.run(
        app,
        host=HOST,
        port=port,
        loop="uvloop",
        log_level="error",
        access_log=False,
        ws_per_message_deflate=False,
        timeout_keep_alive=600,
        timeout_graceful_shutdown=1,
        backlog=8192,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )


if __name__ == "__main__":
    kind, at, *pair = sys.argv[1:]
    serve(APPS[kind](), int(at), *pair)
