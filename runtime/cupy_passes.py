"""A sequence in the CuPy backend whose launches are enqueued one by one, so that `check` can look at what each leaves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from .check import COMPARED, Step
from .cupy_backend import CupyBackend
from .program import Kind


class CupyPasses:
    """A prompt goes through the launches of a prefill, one token through those of a decode step."""

    def __init__(self, backend: CupyBackend) -> None:
        self._backend, self._sequence = backend, backend.new_cache()

    def run(self, ids: NDArray[np.int64]) -> Iterator[Step]:
        backend, sequence = self._backend, self._sequence
        before, count = sequence.length, len(ids)
        sequence.length += count
        backend.reserve(sequence, sequence.length)
        if before:
            assert count == 1
            backend.set_last_token(sequence.slot, int(ids[0]))
            launches = backend.decode_launches(np.array([before], np.int32), np.array([sequence.slot], np.int32))
        else:
            launches = backend.prefill_launches(ids, [(sequence.slot, 0, count, 0)], [count - 1], whole=True)
        config = backend.config
        following = [launch.operation for launch in launches[1:]] + [None]
        for launch, next_op in zip(launches, following, strict=True):
            launch(backend.stream.ptr)
            op = launch.operation
            if op is None or op.kind not in COMPARED or op == next_op:  # an operation may take several launches
                continue
            if op.kind is Kind.HEAD:
                yield op, backend.read("logits", 1, backend.program.logits_pitch)[:, : config.vocab_size]
            else:
                yield op, backend.read("x", count, config.hidden_size)
