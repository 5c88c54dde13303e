"""A WebSocket of the ingress at the application of a replica: messages of ASGI over a connection between the two."""

import asyncio
import base64
import contextlib
import hmac
import json
import logging
import secrets
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("dia_fast.server")

_LONGEST = 1 << 27  # bytes of one message as JSON: --max-body in base64
_BYTES = "base64:"
_TEXT = "text:"
LOST = {"type": "websocket.close", "code": 1012, "reason": "the replica was lost: connect again"}


@dataclass(frozen=True)
class Address:
    """Address of a replica for connections, and the secret that it asks for first."""

    host: str
    port: int
    secret: str


class SocketHost:
    """Takes connections of the ingress and serves each by an application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._secret = app, secrets.token_hex(32)
        self._server: asyncio.Server | None = None

    async def open(self, host: str) -> Address:
        """Listen at an address of this machine that the ingress can reach."""
        self._server = await asyncio.start_server(self._serve, host, 0, limit=_LONGEST)
        return Address(host, self._server.sockets[0].getsockname()[1], self._secret)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            given = (await asyncio.wait_for(reader.readline(), 10)).decode("ascii", "replace").strip()
            if not hmac.compare_digest(given, self._secret):
                return
            scope = await _read(reader)
            if scope is None:
                return
            scope["headers"] = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in scope["headers"]]
            scope["query_string"] = scope["query_string"].encode("latin-1")

            async def receive() -> Message:
                message = await _read(reader)
                return {"type": "websocket.disconnect", "code": 1006} if message is None else message

            async def send(message: Message) -> None:
                await _write(writer, message)

            await self._app(scope, receive, send)
        except (OSError, asyncio.TimeoutError, ValueError):
            pass  # the ingress has gone
        except Exception:
            logger.exception("a WebSocket has failed")
        finally:
            writer.close()

    def close(self) -> None:
        """Take no more connections."""
        if self._server is not None:
            self._server.close()


async def relay_socket(address: Address, scope: Scope, receive: Receive, send: Send) -> None:
    """Pass the messages of a WebSocket on, both ways, until either side has closed it."""
    try:
        reader, writer = await asyncio.open_connection(address.host, address.port, limit=_LONGEST)
    except OSError:
        await send(LOST)
        return
    plain = {name: scope[name] for name in ("type", "path", "scheme", "root_path", "http_version") if name in scope}
    plain["headers"] = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
    plain["query_string"] = scope["query_string"].decode("latin-1")
    plain["subprotocols"] = list(scope.get("subprotocols", []))

    async def up() -> None:
        while True:
            message = await receive()
            await _write(writer, message)
            if message["type"] == "websocket.disconnect":
                return

    async def down() -> None:
        while (message := await _read(reader)) is not None:
            await send(message)
            if message["type"] == "websocket.close":
                return
        await send(LOST)

    writer.write(address.secret.encode() + b"\n")
    await _write(writer, plain)
    tasks = [asyncio.ensure_future(up()), asyncio.ensure_future(down())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            with contextlib.suppress(OSError):
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        writer.close()


async def _read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message, or None at the end of the connection."""
    try:
        line = await reader.readuntil(b"\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    message: dict[str, Any] = json.loads(line)
    for name in ("bytes", "text"):
        if isinstance(value := message.get(name), str):
            message[name] = base64.b64decode(value[len(_BYTES) :]) if value.startswith(_BYTES) else value[len(_TEXT) :]
    if "headers" in message and message["type"] == "websocket.accept":
        message["headers"] = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in message["headers"]]
    return message


async def _write(writer: asyncio.StreamWriter, message: Message | dict[str, Any]) -> None:
    plain: dict[str, Any] = dict(message)
    for name in ("bytes", "text"):
        value = plain.get(name)
        if isinstance(value, bytes):
            plain[name] = _BYTES + base64.b64encode(value).decode()
        elif isinstance(value, str):
            plain[name] = _TEXT + value
    if plain["type"] == "websocket.accept":
        headers = plain.get("headers", [])
        plain["headers"] = [(bytes(name).decode("latin-1"), bytes(value).decode("latin-1")) for name, value in headers]
    writer.write(json.dumps(plain).encode() + b"\n")
    await writer.drain()
