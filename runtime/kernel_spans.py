"""Spans of GPU kernels by pairs of CUDA events around separate launches, for `trace`; which passes get them is counted out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .launch import Launch
from .program import operation_name
from .trace import Trace

TRACED_DECODE_STEPS = 4
_PAIRS = 512  # of events: more launches than a pass of 50 layers has; what is longer is measured in parts


class KernelSpans:
    """Enqueues the launches of chosen passes; all its events are made at the start.

    A measured pass starts on an idle device and is waited for, so that its events can be used again: it costs time, and hides
    how the host runs ahead elsewhere. Device times are put onto the host's clock by an event that is recorded while the device
    is idle, which is exact to the few microseconds that recording takes.
    """

    def __init__(self, trace: Trace, cuda: Any, stream: Any, device_name: str, blob_names: Sequence[str]) -> None:
        self._trace, self._cuda, self._stream, self._names = trace, cuda, stream, blob_names
        self._track = (device_name, "kernels, launched one by one")
        self._origin = cuda.Event()
        self._pairs = [(cuda.Event(), cuda.Event()) for _ in range(_PAIRS)]
        self._left = {"prefill": 0, "decode step": 0}
        self._number = 0
        self._pass: dict[str, Any] = {}
        self.is_on = False

    def allow(self, prefills: int = 0, decode_steps: int = 0) -> None:
        """Measure that many of the passes that come next."""
        self._left = {"prefill": prefills, "decode step": decode_steps}
        self.is_on = False

    def begin(self, work: str, **sizes: int) -> bool:
        """Before every pass, a "prefill" or a "decode step": whether it, and what follows it before the next, is measured."""
        self.is_on = self._left[work] > 0
        if self.is_on:
            self._left[work] -= 1
            self._number += 1
            self._pass = {"pass": f"{self._number}: {work}", **sizes}
        return self.is_on

    def enqueue(self, launches: Sequence[Launch]) -> None:
        """Enqueue and wait."""
        for start in range(0, len(launches), len(self._pairs)):
            self._measure(launches[start : start + len(self._pairs)])

    def _measure(self, launches: Sequence[Launch]) -> None:
        self._stream.synchronize()
        begun = self._trace.now()
        self._origin.record(self._stream)
        pairs = self._pairs[: len(launches)]
        for launch, (before, after) in zip(launches, pairs, strict=True):
            before.record(self._stream)
            launch(self._stream.ptr)
            after.record(self._stream)
        self._stream.synchronize()
        for launch, pair in zip(launches, pairs, strict=True):
            first, last = (begun + 1e3 * self._cuda.get_elapsed_time(self._origin, event) for event in pair)
            self._add(launch, first, last)

    def _add(self, launch: Launch, begun: float, end: float) -> None:
        words = [launch.name.rpartition(".")[2]]
        arguments: dict[str, Any] = {**self._pass, "kernel": launch.name}
        op = launch.operation
        if op is not None:
            words.append(operation_name(op, self._names))
            arguments["operation"] = words[-1]
            if op.layer >= 0:
                words.append(str(op.layer))
                arguments["layer"] = op.layer
        arguments |= {"grid": launch.grid, "block": launch.block, "shared_bytes": launch.shared_bytes}
        if launch.weight_bytes:
            arguments |= {"weight_bytes": launch.weight_bytes, "GB/s": round(launch.weight_bytes / (end - begun) / 1e3, 1)}
        self._trace.add(self._track, " ".join(words), begun, end, **arguments)
