"""Checks that every request passes first: id, names it may come under, key, size of the body; and its log line."""

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dia_fast.server.errors import ApiError
from dia_fast.server.options import LOOPBACK_NAMES, Options

logger = logging.getLogger("dia_fast.server.requests")

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json", "/favicon.ico"})
OPEN_FOLDER = "/page/"
KEY_PROTOCOL = "dia-fast-key."
"""Subprotocol of a WebSocket that carries a key, since browsers can send no other header."""

_ID = re.compile(r"[\w.-]{1,64}\Z", re.ASCII)


class Guard:
    """The outermost ASGI middleware.

    Args:
        app: What comes behind it.
        options: Keys, names and limits.
        counted: Called at the end of each request with endpoint, format and status.
    """

    def __init__(self, app: ASGIApp, options: Options, counted: Callable[[str, str, int], None]) -> None:
        self.app, self.options, self._counted = app, options, counted
        self._digests = [_digest(key) for key in options.keys]
        self._hosts = {name.lower() for name in (*LOOPBACK_NAMES, options.host, *options.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            error = self._refusal(scope, Headers(scope=scope))
            if error is None:
                scope["request_id"], scope["log"] = uuid.uuid4().hex, {}
                await self.app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008, "reason": error.message[:100]})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, start = Headers(scope=scope), time.monotonic()
        given = headers.get("x-request-id", "")
        scope["request_id"] = given if _ID.match(given) else uuid.uuid4().hex
        log: dict[str, Any] = {}
        scope["log"], status = log, 500

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                out["X-Request-Id"] = scope["request_id"]
                out["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            error = self._refusal(scope, headers)
            if error is not None:
                await error.response()(scope, receive, marked)
            else:
                await self.app(scope, self._limited(receive), marked)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            status = log.pop("status", status)
            self._counted(path, str(log.get("format", "")), status)
            self._log(scope, path, status, time.monotonic() - start, log)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        host = _host_name(headers.get("host", ""))
        if self.options.loopback and host not in self._hosts:
            return ApiError(403, f"Host {host!r:.60} is not this server; see --allowed-host", code="host_not_allowed")
        origin = headers.get("origin")
        if origin and not self._same_origin(origin, headers.get("host", "")):
            return ApiError(403, f"origin {origin!r:.60} may not call this server; see --cors-origin", code="origin")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self.options.max_body:
            return self._too_large()
        path = scope["path"]
        if not self._digests or path in OPEN_PATHS or path.startswith(OPEN_FOLDER) or scope.get("method") == "OPTIONS":
            return None
        if self._knows(_given_keys(headers)):
            return None
        message = "a valid API key is needed: Authorization: Bearer KEY"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _same_origin(self, origin: str, host: str) -> bool:
        allowed = self.options.cors_origins
        return origin in allowed or "*" in allowed or urlsplit(origin).netloc.lower() == host.lower()

    def _knows(self, keys: Iterable[str]) -> bool:
        """Compare with every key, in a time that tells nothing of them."""
        found = False
        for key in keys:
            digest = _digest(key)
            for known in self._digests:
                found |= hmac.compare_digest(digest, known)
        return found

    def _limited(self, receive: Receive) -> Receive:
        count = 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self.options.max_body:
                raise HTTPException(413, self._too_large().message)
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than the {self.options.max_body} bytes of --max-body")

    def _log(self, scope: Scope, path: str, status: int, seconds: float, log: dict[str, Any]) -> None:
        quiet = path in ("/health", "/ready", "/metrics") or scope["path"].startswith(OPEN_FOLDER)
        level = logging.DEBUG if quiet else logging.INFO
        named = {"id": scope["request_id"], "method": scope["method"], "path": scope["path"][:80], "status": status}
        logger.log(level, "request", extra={"fields": {**named, "seconds": round(seconds, 3), **log}})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _given_keys(headers: Headers) -> list[str]:
    kind, _, key = headers.get("authorization", "").partition(" ")
    keys = [key.strip()] if kind.lower() == "bearer" else []
    protocols = headers.get("sec-websocket-protocol", "").split(",")
    return keys + [item.strip().removeprefix(KEY_PROTOCOL) for item in protocols if KEY_PROTOCOL in item]


def _host_name(host: str) -> str:
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


async def until_gone(receive: Receive) -> None:
    """Wait until the client has left. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)


class Lines(logging.Formatter):
    """One line for each record: as text, or as JSON for machines."""

    def __init__(self, form: str) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._json = form == "json"

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        if not self._json:
            # What a client sent must not look like another line, or move the cursor of a terminal.
            told = " ".join(f"{name}={_plain(value)}" for name, value in fields.items() if value not in (None, ""))
            return super().format(record) + (f" {told}" if told else "")
        entry = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage(), **fields}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _plain(value: object) -> str:
    text = str(value)
    return text if text.isascii() and text.isprintable() and " " not in text else json.dumps(text)
