"""One sequence at a time in the CuPy backend: its slot and pages, and tokens from it as they come."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megalith.format.errors import RequestError

from .executor import SequenceStep, Ticket
from .gpu_buffers import PAGE_TOKENS, Limits
from .kernel_spans import TRACED_DECODE_STEPS
from .sampler import SamplingParameters
from .trace import traced

if TYPE_CHECKING:
    from .cupy_backend import CupyBackend


@dataclass
class GpuSequence:
    """One sequence's place: a slot, its pages, how many positions it holds."""

    slot: int
    pages: list[int] = field(default_factory=list)
    length: int = 0


class SequencePlaces:
    """Slots and pages, handed out to one sequence each. An engine has a scheduler instead, with places of its own."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._free_slots = list(range(limits.max_sequences))[::-1]
        self._free_pages = list(range(limits.num_pages))[::-1]

    def open(self) -> GpuSequence:
        """An empty sequence; RequestError where all slots are taken."""
        if not self._free_slots:
            raise RequestError(f"{self._limits.max_sequences} sequences are open: close one first")
        return GpuSequence(self._free_slots.pop())

    def close(self, sequence: GpuSequence) -> None:
        """Take a sequence's slot and pages back."""
        self._free_slots.append(sequence.slot)
        self._free_pages += sequence.pages[::-1]
        sequence.pages = []

    def reserve(self, sequence: GpuSequence, length: int) -> bool:
        """Pages for `length` positions, and whether some are new; RequestError when there are not so many, or no positions."""
        if length > self._limits.max_seq_len:
            raise RequestError(f"a sequence of {length} positions: this backend is made for {self._limits.max_seq_len}")
        missing = -(-length // PAGE_TOKENS) - len(sequence.pages)
        if missing <= 0:
            return False
        if missing > len(self._free_pages):
            raise RequestError(f"the KV cache has {self._limits.num_pages} pages of {PAGE_TOKENS} positions, all are taken")
        sequence.pages += [self._free_pages.pop() for _ in range(missing)]
        return True


def generate(
    backend: CupyBackend, tokens: NDArray[np.int64], parameters: SamplingParameters, count: int
) -> Generator[int, None, None]:
    """At most `count` tokens after `tokens`, as they come; the device is one step ahead of what was yielded."""
    executor, sequence, tickets = backend.executor, backend.new_cache(), deque[Ticket]()
    submit_steps, collect = traced(backend.trace, "submit", executor.submit), traced(backend.trace, "collect", executor.collect)
    if backend.kernel_spans is not None:
        backend.kernel_spans.allow(prefills=1, decode_steps=TRACED_DECODE_STEPS)

    def submit(ids: NDArray[np.int64] | None, is_last: bool) -> None:
        start = sequence.length
        sequence.length += 1 if ids is None else len(ids)
        backend.reserve(sequence, sequence.length)
        pages = tuple(sequence.pages)
        ticket = submit_steps([SequenceStep(sequence.slot, ids, start, pages, is_last, sequence.length)])
        tickets.append(ticket)

    try:
        executor.start(sequence.slot, parameters, tokens.tolist())
        for start in range(0, len(tokens), backend.limits.max_prefill_tokens):
            stop = min(start + backend.limits.max_prefill_tokens, len(tokens))
            submit(tokens[start:stop], stop == len(tokens))
        found = produced = 0
        while found < count:
            while len(tickets) <= executor.steps_ahead and produced + 1 < count:
                submit(None, True)
                produced += 1
            for sampled in collect(tickets.popleft()):
                if not sampled.finite:
                    position = len(tokens) + found
                    raise RequestError(f"logits of position {position} are not finite: the weights or the input overflow")
                yield sampled.token
                found += 1
    finally:
        while tickets:
            executor.collect(tickets.popleft())
        backend.close_cache(sequence)
