"""The least of an HTTP client over asyncio: it sees each piece of a body when it comes, and may misbehave."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

SILENCE = 400.0  # seconds without a byte after which a server counts as hung: more than its --request-timeout


class Exchange:
    """One request on a connection of its own.

    Args:
        port: Of the server, on this machine.
        limit: Most bytes that are read ahead of whoever reads the answer; a small number makes a slow reader.
    """

    def __init__(self, port: int, limit: int = 1 << 16) -> None:
        self.port, self.limit = port, limit
        self.status, self.headers = 0, dict[str, str]()
        self.body = b""

    async def __aenter__(self) -> "Exchange":
        self._in, self._out = await asyncio.open_connection("127.0.0.1", self.port, limit=self.limit)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._out.transport.abort()

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._out.write(data)
        await asyncio.wait_for(self._out.drain(), SILENCE)

    async def request(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> None:
        """Send a request; a body that is not bytes goes as JSON."""
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: {content_type}\r\nContent-Length: {len(data)}\r\n\r\n"
        await self.send(head.encode() + data)

    async def answer(self) -> int:
        """Wait for status and headers; returns the status."""
        head = await asyncio.wait_for(self._in.readuntil(b"\r\n\r\n"), SILENCE)
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return self.status

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, piece by piece. Raises EOFError (IncompleteReadError) where it is cut off."""
        if self.headers.get("transfer-encoding") != "chunked":
            yield await asyncio.wait_for(self._in.readexactly(int(self.headers.get("content-length", 0))), SILENCE)
            return
        while size := int(await asyncio.wait_for(self._in.readuntil(b"\r\n"), SILENCE), 16):
            yield (await asyncio.wait_for(self._in.readexactly(size + 2), SILENCE))[:-2]
        await self._in.readuntil(b"\r\n")

    async def whole(self) -> bytes:
        """The rest of the body."""
        self.body = b"".join([piece async for piece in self.pieces()])
        return self.body


async def call(port: int, method: str, path: str, body: Any = None) -> Exchange:
    """A whole request."""
    async with Exchange(port) as exchange:
        await exchange.request(method, path, body)
        await exchange.answer()
        await exchange.whole()
    return exchange
