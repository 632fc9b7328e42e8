"""One HTTP request on ASGI: its body within limits, its answer, and whether the client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from .errors import ApiError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
SSE: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientGoneError(Exception):
    """The client closed the connection."""


class Exchange:
    """A request and its response; every response carries the request's id."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self.scope, self.request_id = scope, request_id
        self._receive, self._send = receive, send
        self.headers = dict(scope["headers"])
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.client: str = scope["client"][0] if scope.get("client") else ""
        self.identity = self.client  # of the key, where keys are asked for
        self.status = 0
        self.prompt_tokens = self.completion_tokens = 0

    async def body(self, max_bytes: int, seconds: float) -> bytes:
        """The whole body: 413 for one that is too large, 408 for one that does not come in time."""
        declared = self.headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > max_bytes:
            raise ApiError(413, f"the body has {declared.decode('latin-1')[:20]} bytes, at most {max_bytes} are taken")
        kind = self.headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise ApiError(415, "the content-type must be application/json")
        parts, size = [], 0
        try:
            async with asyncio.timeout(seconds):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > max_bytes:
                        raise ApiError(413, f"the body has more than {max_bytes} bytes")
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {seconds:g} seconds") from None

    async def gone(self) -> None:
        """Return once the client is gone; the body must have been read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: Headers) -> None:
        """Begin a response."""
        self.status = status
        headers = [*headers, (b"x-request-id", self.request_id.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, data: bytes, more: bool = True) -> None:
        """A part of the response's body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def respond(self, status: int, data: bytes, headers: Headers | None = None) -> None:
        """A whole response."""
        length = (b"content-length", str(len(data)).encode())
        await self.start(status, [*(headers if headers is not None else [JSON]), length])
        await self.write(data if self.method != "HEAD" else b"", more=False)

    async def json(self, value: Any, status: int = 200) -> None:
        await self.respond(status, msgspec.json.encode(value))

    async def error(self, error: ApiError, headers: Headers | None = None) -> None:
        """An error's response; a body that was not read ends the connection."""
        extra = list(headers or [])
        if error.retry_after is not None:
            extra.append((b"retry-after", str(error.retry_after).encode()))
        if error.status in (408, 413):
            extra.append((b"connection", b"close"))
        await self.respond(error.status, error.body, [JSON, *extra])
