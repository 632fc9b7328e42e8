"""Spans of what a run does, host and GPU, in the Chrome trace event format, which Perfetto (ui.perfetto.dev) opens.

Times are microseconds since the trace was made. Host spans are measured by the host's clock around calls. Spans of kernels
come from pairs of CUDA events around launches that are enqueued one by one (`kernel_spans`). Each contains the start of its
kernel and, where the device waits for the host, the launch too; CUPTI's records have neither, but need one more library.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from megalith.format.errors import FileError
from megalith.version import __version__

P = ParamSpec("P")
R = TypeVar("R")

HOST = "host"  # the process whose tracks are the threads of this one


@dataclass(frozen=True)
class Span:
    """What was going on on a track, a (process, thread) pair of names."""

    track: tuple[str, str]
    name: str
    begun: float  # microseconds
    end: float
    arguments: dict[str, Any] = field(default_factory=dict)


class Trace:
    """Spans as they end. One that is under way when the trace is written is not in it."""

    def __init__(self) -> None:
        self._origin = time.perf_counter()
        self.spans: list[Span] = []

    def now(self) -> float:
        """Microseconds since the trace was made."""
        return (time.perf_counter() - self._origin) * 1e6

    def add(self, track: tuple[str, str], name: str, begun: float, end: float, **arguments: Any) -> None:
        """A span of known times. Those of one track lie one after another or one within another."""
        self.spans.append(Span(track, name, begun, end, arguments))

    def add_host(self, name: str, begun: float, **arguments: Any) -> None:
        """A span of this thread that ends now."""
        self.add((HOST, threading.current_thread().name), name, begun, self.now(), **arguments)

    @contextmanager
    def span(self, name: str, **arguments: Any) -> Iterator[None]:
        """A host span around a block, also one that raises."""
        begun = self.now()
        try:
            yield
        finally:
            self.add_host(name, begun, **arguments)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object format: metadata that names processes and threads, then complete events in order of their start."""
        processes: dict[str, int] = {}
        threads: dict[tuple[str, str], int] = {}
        events = []
        for span in sorted(self.spans, key=lambda span: (span.begun, -span.end)):
            pid = processes.setdefault(span.track[0], len(processes) + 1)
            tid = threads.setdefault(span.track, len(threads) + 1)
            begun, end = round(1e3 * span.begun), round(1e3 * span.end)  # ns: what is rounded so still nests
            times = {"ts": begun / 1e3, "dur": (end - begun) / 1e3}
            events.append({"ph": "X", "name": span.name, "pid": pid, "tid": tid, **times, "args": span.arguments})
        names = [_metadata("process_name", name, pid, 0) for name, pid in processes.items()]
        names += [_metadata("thread_name", thread, processes[process], tid) for (process, thread), tid in threads.items()]
        return {"traceEvents": names + events, "displayTimeUnit": "ms", "otherData": {"megalith": __version__}}


def _metadata(kind: str, name: str, pid: int, tid: int) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


@contextmanager
def tracing(path: Path | None) -> Iterator[Trace | None]:
    """A trace that is written to `path` at the end, also when an error ended it; None for no path.

    An empty one is written at the start: FileError before the work, not after it.
    """
    if path is None:
        yield None
        return
    trace = Trace()
    _write(trace, path)
    try:
        yield trace
    finally:
        _write(trace, path)


def _write(trace: Trace, path: Path) -> None:
    try:
        path.write_text(json.dumps(trace.to_dict(), separators=(",", ":")))
    except OSError as error:
        raise FileError.wrap(path, error) from None


def host_span(trace: Trace | None, name: str, **arguments: Any) -> AbstractContextManager[None]:
    """A host span where there is a trace."""
    return nullcontext() if trace is None else trace.span(name, **arguments)


def traced(trace: Trace | None, name: str, function: Callable[P, R]) -> Callable[P, R]:
    """`function` itself, or with a host span around every call: what is not traced pays nothing."""
    if trace is None:
        return function

    def call(*arguments: P.args, **keywords: P.kwargs) -> R:
        with trace.span(name):
            return function(*arguments, **keywords)

    return call
