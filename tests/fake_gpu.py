"""A CuPy backend without a GPU, for what runs its launches one by one: it computes as the NumPy backend does."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.format.rope import F32
from megalith.runtime.numpy_backend import Activations, NumpyBackend, Span
from megalith.runtime.program import Kind, Operation


class FakeGpu:
    """What `CupyPasses` asks of a backend; its launches write x as the reference would, late or in parts."""

    def __init__(self, reference: NumpyBackend) -> None:
        self.config, self.stream = reference.config, SimpleNamespace(ptr=1)
        self.facts = SimpleNamespace(name="a GPU")
        self.program = SimpleNamespace(logits_pitch=reference.config.vocab_size + 6, element="BF16")
        self.calls: list[tuple[str, int]] = []
        self._reference, self._cache = reference, reference.new_cache()
        self._state, self._last = Activations.empty(), -1
        self._steps: Iterator[Operation] = iter(())

    def new_cache(self) -> Any:
        return SimpleNamespace(slot=2, length=0)

    def reserve(self, sequence: Any, length: int) -> None:
        self.calls.append(("reserve", length))

    def set_last_token(self, slot: int, token: int) -> None:
        self._last = token

    def decode_launches(self, positions: NDArray[np.int32], slots: NDArray[np.int32]) -> list[Any]:
        self.calls.append(("decode", int(positions[0])))
        return self._launches(np.array([self._last]))

    def prefill_launches(self, ids: NDArray[np.int64], sequences: Any, rows: Any, whole: bool) -> list[Any]:
        assert whole
        assert sequences == [(2, 0, len(ids), 0)]
        assert rows == [len(ids) - 1]
        self.calls.append(("prefill", len(ids)))
        return self._launches(ids)

    def _launches(self, ids: NDArray[np.int64]) -> list[Any]:
        """Norms belong to no launch, and products to two, of which the second does the work."""
        span = Span(ids, self._cache, self._cache.length + len(ids), slice(-1, None))
        self._steps = self._reference.steps([span], self._state)
        program = [op for op in self._reference.program if op.kind is not Kind.NORM]
        launches: list[Any] = []
        for op in program:
            if op.kind in (Kind.PROJECT, Kind.HEAD):
                launches.append(FakeLaunch(op, lambda op: None))
            launches.append(FakeLaunch(op, self._advance))
        return [*launches, FakeLaunch(None, lambda op: next(self._steps, None))]  # such as sampling; ends the pass

    def _advance(self, op: Operation) -> None:
        while next(self._steps) != op:
            pass

    def read(self, name: str, rows: int, columns: int) -> F32:
        found = {"x": self._state.x, "logits": np.pad(self._state.a, ((0, 0), (0, 6)), constant_values=np.nan)}[name]
        assert found.shape == (rows, columns)
        return found.copy()


class FakeLaunch:
    def __init__(self, op: Operation | None, work: Any) -> None:
        self.operation, self._work = op, work

    def __call__(self, stream: int) -> None:
        self._work(self.operation)
