"""The comparison of two backends: NumPy against itself, against its own rounding to 16 bits, and against faults put in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from golden_models import DENSE_CASES, GoldenModel
from numpy.typing import NDArray

import megalith
from megalith.format.rope import F32
from megalith.runtime.check import (
    COMPARED,
    DECODE_STEPS,
    MAX_PROMPT_TOKENS,
    UNIT_ROUNDOFF,
    NumpyPasses,
    Step,
    bounded_prompt,
    compare,
    difference,
    first_above,
    num_comparisons,
    random_prompt,
    tolerance,
)
from megalith.runtime.numpy_backend import Activations, KvCache, NumpyBackend, Span
from megalith.runtime.program import Kind

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16}


def element_of(path: Path) -> str:
    with megalith.open(path) as packed:
        blobs = map(packed.index.blob, range(len(packed.index.blobs)))
        return next(blob.dtype for blob in blobs if blob.layout == "tile16x512")


def backend_of(path: Path) -> NumpyBackend:
    with megalith.open(path) as packed:
        return NumpyBackend(packed)


def names_of(path: Path) -> Sequence[str]:
    with megalith.open(path) as packed:
        return packed.index.blobs.names


class RoundedCache(KvCache):
    """Keys and values as 16-bit types keep them."""

    element = "BF16"

    def append(self, layer: int, k: F32, v: F32) -> None:
        super().append(layer, rounded(k, self.element), rounded(v, self.element))


def rounded(values: F32, element: str) -> F32:
    return values.astype(DTYPES[element]).astype(np.float32)


class RoundedPasses:
    """The NumPy backend with all rounded that the GPU keeps in 16 bits."""

    def __init__(self, backend: NumpyBackend, element: str) -> None:
        config = backend.config
        self._backend, self._element = backend, element
        self._cache = RoundedCache(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        self._cache.element = element

    def run(self, ids: NDArray[np.int64]) -> Iterator[Step]:
        state = Activations.empty()
        for op in self._backend.steps([Span(ids, self._cache, self._cache.length + len(ids), slice(-1, None))], state):
            if op.kind in COMPARED:
                yield op, state.a if op.kind is Kind.HEAD else state.x
            elif op.kind is Kind.NORM:
                state.h = rounded(state.h, self._element)
            elif op.kind is Kind.QKV:
                state.q = rounded(state.q, self._element)
            elif op.kind in (Kind.ATTENTION, Kind.GATE_UP):
                state.a = rounded(state.a, self._element)


def prompt(backend: NumpyBackend) -> NDArray[np.int64]:
    return np.array(bounded_prompt(random_prompt(backend.config), backend.config.max_seq_len))


def test_a_backend_equals_itself(packed_llama: Path) -> None:
    backend, names = backend_of(packed_llama), names_of(packed_llama)
    found = list(compare(NumpyPasses(backend), NumpyPasses(backend), prompt(backend), 2, names))
    assert len(found) == num_comparisons(backend.program, 2)
    per_pass = ["embed_tokens", *["o_proj", "down_proj"] * backend.config.num_hidden_layers, "lm_head"]
    assert [one.operation for one in found] == per_pass * 3
    assert [one.step for one in found] == [step for step in range(3) for _ in per_pass]
    assert {(one.relative_error, one.largest_difference) for one in found} == {(0.0, 0.0)}


@pytest.mark.parametrize("golden", DENSE_CASES, indirect=True)
def test_rounding_to_16_bits_is_within_the_tolerance(golden: GoldenModel, tmp_path: Path) -> None:
    path = golden.pack(tmp_path)
    backend, element = backend_of(path), element_of(path)
    found = list(compare(NumpyPasses(backend), RoundedPasses(backend, element), prompt(backend), 3, names_of(path)))
    units = [one.relative_error / UNIT_ROUNDOFF[element] for one in found]
    assert 1 < max(units) < 7.3  # as check.py says
    assert first_above(found, tolerance(element)) is None


@pytest.mark.parametrize(("layer", "name"), [(0, "o_proj"), (1, "down_proj"), (1, "o_proj")])
@pytest.mark.parametrize("golden", ["llama2", "qwen3"], indirect=True)
def test_a_wrong_matrix_is_found_where_it_first_acts(golden: GoldenModel, tmp_path: Path, layer: int, name: str) -> None:
    path = golden.pack(tmp_path)
    reference, broken, names = backend_of(path), backend_of(path), names_of(path)
    matrix = broken.weights._matrices[list(names).index(f"layers.{layer}.{name}")]
    matrix[: len(matrix) // 8] *= -1
    found = list(compare(NumpyPasses(reference), NumpyPasses(broken), prompt(reference), 1, names))
    first = first_above(found, tolerance("BF16"))
    assert first is not None
    assert (first.step, first.layer, first.operation) == (0, layer, name)


def test_a_fault_of_the_cache_is_found_in_the_first_decode_step(packed_llama: Path) -> None:
    """The prefill is right: only the next pass reads what it left."""
    backend = backend_of(packed_llama)

    class Forgetful(NumpyPasses):
        def run(self, ids: NDArray[np.int64]) -> Iterator[Step]:
            yield from super().run(ids)
            self._cache.keys[:, :, : len(ids)] = self._cache.keys[:, :, : len(ids)][:, :, ::-1].copy()

    found = list(compare(NumpyPasses(backend), Forgetful(backend), prompt(backend), 2, names_of(packed_llama)))
    first = first_above(found, tolerance("BF16"))
    assert first is not None
    assert (first.step, first.layer, first.operation) == (1, 0, "o_proj")


def test_a_pass_that_lacks_an_operation_is_no_comparison(packed_llama: Path) -> None:
    backend = backend_of(packed_llama)

    class Short(NumpyPasses):
        def run(self, ids: NDArray[np.int64]) -> Iterator[Step]:
            return (step for i, step in enumerate(super().run(ids)) if i < 3)

    with pytest.raises(ValueError, match="shorter"):
        list(compare(NumpyPasses(backend), Short(backend), prompt(backend), 0, names_of(packed_llama)))


def test_the_error_is_that_of_the_worst_token() -> None:
    """A token with large activations hides no other."""
    reference = np.array([[3000, 4000], [3, 4], [0, 0]], np.float32)
    found = reference + np.array([[0, 5], [0, 1], [0, 0]], np.float32)
    assert difference(reference, found) == (pytest.approx(0.2), 5.0)
    assert difference(reference, reference + np.array([[0, 0], [0, 0], [1e-9, 0]], np.float32))[0] == np.inf
    for value in (np.nan, np.inf):
        assert difference(reference, np.full_like(reference, value)) == (np.inf, np.inf)


def test_prompts_are_cut_to_one_prefill_with_room_for_decoding(packed_llama: Path) -> None:
    config = backend_of(packed_llama).config
    assert len(bounded_prompt([1] * 5000, config.max_seq_len)) == min(MAX_PROMPT_TOKENS, config.max_seq_len - DECODE_STEPS)
    assert list(bounded_prompt([1, 2, 3], config.max_seq_len)) == [1, 2, 3]
