"""The server's end of the engine process: starts it, sends requests, hands out what comes back, starts it again.

An engine with work sends something at least once a pass. One that says nothing for `pass_timeout` seconds hangs: it is
killed, which ends its requests as any crash does.

A `Stream` collects what one HTTP request's sequences get; whoever answers the request takes all that is there at once,
so that a client that reads slowly, or a server that is busy, gets larger pieces instead of a longer queue.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from megalith.runtime.messages import (
    Cancel,
    Emission,
    EngineSettings,
    Progress,
    Ready,
    Settings,
    Submit,
    ToEngine,
    Unframer,
    Unusable,
    frame,
    from_engine_decoder,
)
from megalith.runtime.scheduler import Load

from .errors import ApiError
from .logs import log

_BACKOFF_SECONDS = (0.1, 0.5, 2.0, 5.0, 15.0)
_HEALTHY_SECONDS = 60.0  # after which a crash counts as the first
_STOP_SECONDS = 5.0

Item = tuple[int, int | Emission]  # number of the sequence within its stream, and a token or more


class Stream:
    """What the sequences of one request get, in order."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._waiter: asyncio.Future[None] | None = None
        self.error: ApiError | None = None

    def push(self, item: Item) -> None:
        self._items.append(item)
        self._wake()

    def fail(self, error: ApiError) -> None:
        """End with an error, after what is there already."""
        self.error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Item]:
        """All that came since the last call, at least one; ApiError when the engine failed."""
        if not self._items and self.error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if not self._items and self.error is not None:
            raise self.error
        items, self._items = self._items, []
        return items


class EngineClient(asyncio.Protocol):
    """Owns the engine process."""

    def __init__(self, settings: EngineSettings, on_step: Callable[[Load], None] = lambda load: None) -> None:
        self.settings = settings
        self.is_ready = False
        self.load = Load(0, 0, 0, settings.num_pages, 0, 0, 0)
        self.restarts = 0
        self.load_seconds = 0.0
        self.unusable: Unusable | None = None  # the engine's own reason not to start
        self.first_outcome = asyncio.Event()  # a process was ready, or will never be
        self._on_step = on_step
        self._ids = itertools.count(1)
        self._streams: dict[int, tuple[Stream, int]] = {}
        self._transport: asyncio.WriteTransport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._unframer = Unframer()
        self._supervisor: asyncio.Task[None] | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self._lost: asyncio.Future[None] | None = None
        self._is_stopping = False
        self._silent_since: float | None = None  # seconds of time.monotonic(), while it should say something

    @property
    def outstanding(self) -> int:
        """Sequences that the engine has and that have not ended."""
        return len(self._streams)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def begin(self) -> None:
        """Start the process and keep it running, in the background."""
        self._supervisor = asyncio.create_task(self._supervise())
        self._watchdog = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """End the process."""
        self._is_stopping = True
        self.is_ready = False
        tasks = [task for task in (self._supervisor, self._watchdog) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._end_process()

    def submit(self, stream: Stream, number: int, make: Callable[[int], Submit]) -> int:
        """Send a sequence, whose results go to `stream` under `number`; its id."""
        if not self.is_ready:
            raise ApiError(503, "the engine is not ready", "engine_not_ready", retry_after=1)
        sequence_id = next(self._ids)
        self._streams[sequence_id] = (stream, number)
        self._send(make(sequence_id))
        if self._silent_since is None:
            self._silent_since = time.monotonic()
        return sequence_id

    def cancel(self, sequence_id: int) -> None:
        """Forget a sequence, and tell the engine unless it has ended."""
        if self._streams.pop(sequence_id, None) is not None and self.is_ready:
            self._send(Cancel(sequence_id))

    async def _supervise(self) -> None:
        crashes = 0
        while True:
            begun = time.monotonic()
            await self._start()
            assert self._lost is not None
            await self._lost
            self._fail_all()
            code = await self._wait_for_end()
            if self.unusable is not None:
                log("error", "engine_unusable", reason=self.unusable.message)
                if not self.first_outcome.is_set():  # it never worked: the command ends with this reason
                    self.first_outcome.set()
                    return
            crashes = 1 if time.monotonic() - begun > _HEALTHY_SECONDS else crashes + 1
            delay = _BACKOFF_SECONDS[min(crashes, len(_BACKOFF_SECONDS)) - 1]
            log("error", "engine_ended", exit_code=code, restart_in_seconds=delay)
            await asyncio.sleep(delay)
            self.restarts += 1

    async def _watch(self) -> None:
        """Kill an engine that hangs."""
        limit = self.settings.pass_timeout
        while True:
            await asyncio.sleep(min(1.0, limit / 4))
            if self.is_ready and self._silent_since is not None and time.monotonic() > self._silent_since + limit:
                assert self._process is not None
                log("error", "engine_hangs", silent_seconds=limit, outstanding=self.outstanding, pid=self.pid)
                self.is_ready = False
                self._process.kill()

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "megalith.runtime.engine_process", str(theirs.fileno())]
        with theirs:
            # a session of its own: a signal to the server's group is the server's to handle
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._unframer = Unframer()
        self._lost = asyncio.get_running_loop().create_future()
        self.unusable, self._silent_since = None, None
        await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)
        self._send(Settings(self.settings))

    async def _wait_for_end(self) -> int:
        assert self._process is not None
        for _ in range(100):
            code = self._process.poll()
            if code is not None:
                return code
            await asyncio.sleep(0.01)
        self._end_process()
        return self._process.wait()

    def _end_process(self) -> None:
        if self._transport is not None:
            self._transport.close()
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()

    def _fail_all(self) -> None:
        self.is_ready = False
        streams = {id(stream): stream for stream, _ in self._streams.values()}
        self._streams.clear()
        for stream in streams.values():
            stream.fail(ApiError(500, "the engine ended before the request did", "engine_failed"))
        self.load = Load(0, 0, 0, self.settings.num_pages, 0, 0, 0)

    def _send(self, message: ToEngine) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame(message))

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_ready = False
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        for raw in self._unframer.feed(data):
            message = from_engine_decoder.decode(raw)
            if isinstance(message, Progress):
                self._deliver(message)
            elif isinstance(message, Ready):
                self.is_ready = True
                self.load_seconds = message.load_seconds
                self.first_outcome.set()
                log("info", "engine_ready", load_seconds=round(message.load_seconds, 3), pid=self.pid)
            else:
                self.unusable = message

    def _deliver(self, message: Progress) -> None:
        streams = self._streams
        for sequence_id, token in message.tokens:
            found = streams.get(sequence_id)
            if found is not None:
                found[0].push((found[1], token))
        for emission in message.emissions:
            found = streams.get(emission.id)
            if found is None:
                continue
            if emission.finish is not None:
                del streams[emission.id]
            found[0].push((found[1], emission))
        self._silent_since = time.monotonic() if streams else None
        self.load = message.load
        self._on_step(message.load)
