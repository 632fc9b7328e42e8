"""`embedding.cu`: exact copies of the rows of a packed matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_inputs import matrix

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("vocab_size", "hidden_size"), [(17, 8), (49, 30), (1000, 577), (515, 2560), (64, 8192)])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_rows(gpu: Any, vocab_size: int, hidden_size: int, dtype: str) -> None:
    rng = np.random.default_rng(hidden_size)
    table = matrix(rng, vocab_size, hidden_size, dtype, "tile16x512")
    ids = np.concatenate([[0, vocab_size - 1, 15, 16, vocab_size, 2**31 - 1], rng.integers(0, vocab_size, 30)]).astype(np.int32)
    kernel, blob = gpu.compile("embedding", "embedding", **{f"ELEMENT_{dtype}": 1}), gpu.array(table.packed)
    x = gpu.empty_poisoned((len(ids), hidden_size), np.float32)
    sizes = (np.int32(vocab_size), np.int32(hidden_size))
    gpu.launch(kernel, (len(ids), 1, 1), (256, 1, 1), (blob, *sizes, gpu.array(ids), None, None, x))
    np.testing.assert_array_equal(gpu.get(x), table.values[np.clip(ids, 0, vocab_size - 1)])


@pytest.mark.parametrize("ids", [None, [-1, -1, -1, -(2**31)], [-1, 7, -1, 98]])
def test_ids_of_slots(gpu: Any, ids: list[int] | None) -> None:
    table = matrix(np.random.default_rng(0), 100, 64, "BF16", "tile16x512")
    last_token, slots = np.array([5, 99, -3, 142], np.int32), np.array([3, 0, -1, 1], np.int32)
    x = gpu.empty_poisoned((4, 64), np.float32)
    first = None if ids is None else gpu.array(np.array(ids, np.int32))
    args = (gpu.array(table.packed), np.int32(100), np.int32(64), first, gpu.array(slots), gpu.array(last_token), x)
    gpu.launch(gpu.compile("embedding", "embedding", ELEMENT_BF16=1), (4, 1, 1), (256, 1, 1), args)
    np.testing.assert_array_equal(gpu.get(x), table.values[[99, 7, 0, 98] if ids and ids[1] == 7 else [99, 5, 0, 99]])
