"""How the CuPy executor divides steps among passes, on a backend that takes notes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megalith.runtime import cupy_executor
from megalith.runtime.cupy_executor import MIXED_CONTEXT, CupyExecutor
from megalith.runtime.executor import SequenceStep
from megalith.runtime.gpu_buffers import Limits


class Backend:
    """What an executor asks of a backend; passes are (ids, sequences, rows) of prefills, (positions, slots) else."""

    def __init__(self, has_wgmma: bool = True, batch_invariant: bool = False) -> None:
        self.limits = Limits(8, 8192, 256, 100, 132, 228 << 10, has_wgmma, batch_invariant)
        self.config, self.stream = SimpleNamespace(vocab_size=100), SimpleNamespace(ptr=1)
        event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
        self.cupy = SimpleNamespace(
            cuda=SimpleNamespace(Event=lambda **options: event, runtime=SimpleNamespace(memsetAsync=lambda *arguments: None))
        )
        self.passes: list[Any] = []
        self.sampled: list[list[int]] = []

    def pinned(self, dtype: np.dtype[Any], count: int) -> Any:
        return np.zeros(count, dtype)

    def address(self, name: str) -> int:
        return 0

    def fetch(self, target: Any, source: int, nbytes: int) -> None:
        pass

    def send_table(self, slot: int, pages: Any) -> None:
        pass

    def prefill(self, ids: Any, sequences: Any, rows: Any, whole: bool) -> None:
        assert not whole
        self.passes.append((ids.tolist(), sequences, rows))

    def decode_step(self, positions: Any, slots: Any, sampled: bool) -> None:
        self.passes.append((positions.tolist(), slots.tolist()))

    def sample(self, rows: Any, masks: Any) -> None:
        self.sampled.append(rows.slots.tolist())


@pytest.fixture(autouse=True)
def no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_executor, "PinnedCopies", lambda cupy, nbytes: None)


def chunk(slot: int, start: int, count: int, is_last: bool) -> SequenceStep:
    return SequenceStep(slot, np.arange(count), start, (slot,), is_last, start + count)


def decode(slot: int, start: int) -> SequenceStep:
    return SequenceStep(slot, None, start, (slot,), True, start + 1)


def test_decoding_shares_the_pass_of_prompts() -> None:
    backend = Backend()
    executor = CupyExecutor(backend)  # type: ignore[arg-type]
    ticket = executor.submit([decode(4, 77), chunk(1, 0, 3, False), decode(2, 5), chunk(0, 10, 2, True)])
    [(ids, sequences, rows)] = backend.passes
    assert ids == [0, 1, 2, 0, 1, -1, -1]
    assert sequences == [(1, 0, 3, 0), (0, 3, 2, 10), (4, 5, 1, 77), (2, 6, 1, 5)]
    assert rows == [4, 5, 6]
    assert backend.sampled == [[0, 4, 2]]
    assert [sampled.slot for sampled in executor.collect(ticket)] == [4, 2, 0]


@pytest.mark.parametrize(
    ("backend", "steps"),
    [
        (Backend(has_wgmma=False), [chunk(0, 0, 9, True), decode(1, 5)]),
        (Backend(batch_invariant=True), [chunk(0, 0, 9, True), decode(1, 5)]),
        (Backend(), [chunk(0, 0, 9, True), decode(1, MIXED_CONTEXT)]),
        (Backend(), [chunk(0, 0, 256, True), decode(1, 5)]),
    ],
)
def test_other_steps_have_a_pass_of_their_own(backend: Backend, steps: list[SequenceStep]) -> None:
    CupyExecutor(backend).submit(steps)  # type: ignore[arg-type]
    (prefill, step) = backend.passes
    assert -1 not in prefill[0]
    assert step == ([steps[1].start], [1])


def test_only_the_last_chunks_have_company() -> None:
    backend = Backend()
    CupyExecutor(backend).submit([chunk(0, 0, 200, True), chunk(2, 0, 100, True), decode(1, 5)])  # type: ignore[arg-type]
    assert [(len(ids), ids.count(-1)) for ids, _, _ in backend.passes] == [(200, 0), (101, 1)]
