"""uvicorn's httptools protocol with what it lacks: a limit on headers and a time for them to come in."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError

MAX_HEADER_BYTES = 32 << 10
HEADER_SECONDS = 10.0
_PHRASES = {408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


def limited_protocol(
    max_header_bytes: int = MAX_HEADER_BYTES, header_seconds: float = HEADER_SECONDS
) -> type[HttpToolsProtocol]:
    """A protocol class with these limits."""

    class LimitedProtocol(HttpToolsProtocol):
        """Counts what arrives while headers are incomplete."""

        _header_bytes = 0
        _is_in_headers = True
        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._is_in_headers:
                self._header_bytes += len(data)
                if self._header_timer is None:
                    self._header_timer = self.loop.call_later(
                        header_seconds, self._refuse, 408, "the headers did not come in time"
                    )
            was_in_headers = self._is_in_headers
            super().data_received(data)
            # a body that came with the headers is not counted: what is counted had no end of headers in it
            if was_in_headers and self._is_in_headers and self._header_bytes > max_header_bytes:
                self._refuse(431, f"the headers have more than {max_header_bytes} bytes")

        def on_headers_complete(self) -> None:
            self._stop_timer()
            self._is_in_headers, self._header_bytes = False, 0
            if sum(len(key) + len(text) for key, text in self.headers) + len(self.url) > max_header_bytes:
                self._refuse(431, f"the headers have more than {max_header_bytes} bytes")
                return
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if self.cycle is not None and not self.transport.is_closing():
                super().on_body(body)

        def on_message_complete(self) -> None:
            if self.cycle is not None and not self.transport.is_closing():
                super().on_message_complete()
            self._is_in_headers = True  # of the next request, whose time begins with its first byte

        def _expect_headers(self) -> None:
            self._stop_timer()
            self._header_timer = self.loop.call_later(header_seconds, self._refuse, 408, "the headers did not come in time")

        def _stop_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _refuse(self, status: int, text: str) -> None:
            self._stop_timer()
            if self.transport.is_closing():
                return
            body = ApiError(status, text).body
            head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            self.transport.write(head % (status, _PHRASES[status], len(body)) + body)
            self.transport.close()

    return LimitedProtocol
