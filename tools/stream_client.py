"""A cheap client of streamed completions: it notes when events come and reads them when the clock has stopped."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvloop

_EVENT = b"data: {"
_END = b"0\r\n\r\n"  # of a chunked body


class StreamError(Exception):
    """A stream that is not what was asked for."""


@dataclass
class Stream:
    """One response. `arrivals`: when something was read, and how many events began in it."""

    sent: float
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)
    _counted: int = 0

    def feed(self, data: bytes) -> bool:
        """Take what was read; whether it was the last of it. StreamError for a status other than 200."""
        now = time.monotonic()
        self.data += data
        if not self.data.startswith(b"HTTP/1.1 200"[: len(self.data)]):
            raise StreamError(self.data[:500].decode("latin-1"))
        events = self.data.count(_EVENT, max(0, self._counted - len(_EVENT) + 1))
        self._counted = len(self.data)
        if events:
            self.arrivals.append((now, events))
        return self.data.endswith(_END)

    def events(self) -> list[dict[str, Any]]:
        """The documents of all events; StreamError where the mark at the end is missing."""
        lines = [line.removeprefix("data: ") for line in b"".join(self._chunks()).decode().split("\n\n") if line]
        if not lines or lines[-1] != "[DONE]":
            raise StreamError(f"{len(lines)} events, the last is no [DONE]: {lines[-1:]}")
        return [json.loads(line) for line in lines[:-1]]

    def event_times(self) -> np.ndarray:
        """float64 [number of events]; those that were read together came together."""
        return np.repeat([when for when, _ in self.arrivals], [events for _, events in self.arrivals])

    def _chunks(self) -> list[bytes]:
        """The body, out of its chunked coding."""
        rest = bytes(self.data).partition(b"\r\n\r\n")[2]
        chunks, at = [], 0
        while True:
            end = rest.index(b"\r\n", at)
            size = int(rest[at:end], 16)
            if not size:
                return chunks
            chunks.append(rest[end + 2 : end + 2 + size])
            at = end + 4 + size


class StreamClient(asyncio.Protocol):
    """One connection that sends one request after the other, each when the one before is answered."""

    def __init__(self, requests: Sequence[bytes]) -> None:
        self._requests = list(requests)
        self.streams: list[Stream] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        request = self._requests[len(self.streams)]
        self.streams.append(Stream(time.monotonic()))
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        try:
            is_complete = self.streams[-1].feed(data)
        except StreamError as error:
            self._end(error)
            return
        if is_complete and len(self.streams) < len(self._requests):
            self._ask()
        elif is_complete:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(StreamError(f"the connection ended in answer {len(self.streams)} of {len(self._requests)}"))

    def _end(self, error: StreamError | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
        self._transport.close()


def completion_request(**body: Any) -> bytes:
    """POST /v1/completions, streamed."""
    data = json.dumps({"stream": True, **body}).encode()
    fields = f"host: bench\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    return f"POST /v1/completions HTTP/1.1\r\n{fields}".encode() + data


async def _read_streams(port: int, clients: Sequence[Sequence[bytes]]) -> tuple[float, list[list[Stream]]]:
    loop = asyncio.get_running_loop()
    protocols = [StreamClient(requests) for requests in clients]
    begun = time.monotonic()
    for protocol in protocols:
        await loop.create_connection(lambda protocol=protocol: protocol, "127.0.0.1", port)
    await asyncio.gather(*(protocol.done for protocol in protocols))
    return time.monotonic() - begun, [protocol.streams for protocol in protocols]


def read_streams(port: int, clients: Sequence[Sequence[bytes]]) -> tuple[float, list[list[Stream]]]:
    """Send each client's requests on a connection of its own, all at once; seconds, and each client's answers."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_read_streams(port, clients))
