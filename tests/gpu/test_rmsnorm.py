"""`rmsnorm.cu` against float64, in both activation layouts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_inputs import as_bits, rows_activation, tiled_activation, widen_bits

pytestmark = pytest.mark.gpu

EPS = 1e-6


def run(
    gpu: Any, x: np.ndarray, weight: np.ndarray, dtype: str, tiled: bool, lane_columns: int, rows: np.ndarray | None
) -> np.ndarray:
    """Activation elements as written: [tokens, Kp] or [Kp/64, tokens_padded, 64]; poison where nothing was."""
    hidden_size, unit = x.shape[1], 128 if lane_columns == 32 else 64
    columns, tokens = -(-hidden_size // unit) * unit, len(x) if rows is None else len(rows)
    tokens_padded = -(-tokens // 8) * 8
    kernel = gpu.compile(
        "rmsnorm", "rmsnorm", HIDDEN_SIZE=hidden_size, WEIGHT_F32=int(weight.dtype == np.float32), ACTIVATION_TILED=int(tiled),
        LANE_COLUMNS=lane_columns, **{f"ELEMENT_{dtype}": 1},
    )  # fmt: skip
    device_x, device_weight = gpu.array(x), gpu.array(weight)
    device_rows = None if rows is None else gpu.array(rows)
    found = []
    for _ in range(2):
        h = gpu.empty_poisoned((columns // 64, tokens_padded, 64) if tiled else (tokens, columns), np.uint16)
        args = (device_x, device_rows, device_weight, np.float32(EPS), h, np.int32(tokens_padded if tiled else columns))
        gpu.launch(kernel, (tokens, 1, 1), (256, 1, 1), args)
        found.append(gpu.get(h))
    np.testing.assert_array_equal(found[0], found[1])
    return np.asarray(found[0])


def reference(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return np.asarray(wide / np.sqrt((wide**2).mean(1, keepdims=True) + EPS) * weight.astype(np.float64))


def values_of(layout: np.ndarray, tiled: bool, lane_columns: int, hidden_size: int, dtype: str) -> np.ndarray:
    """float32 [tokens_padded, columns], through the index of each element in the layout."""
    if not tiled:
        return widen_bits(layout, dtype)
    tokens, columns = layout.shape[1], layout.shape[0] * 64
    flat = np.empty((tokens, columns), np.uint16)
    for first in range(0, columns, 1 << 10):  # an index fits FP16's integers: 2048
        width = min(1 << 10, columns - first)
        index = np.zeros((tokens, columns), np.float32)
        index[:, first : first + width] = np.arange(1, width + 1)
        place = tiled_activation(index, "F16", tokens, lane_columns)[: columns // 64].view(np.float16).astype(int)
        for panel, token, element in zip(*np.nonzero(place), strict=True):
            flat[token, first + place[panel, token, element] - 1] = layout[panel, token, element]
    return widen_bits(flat, dtype)


@pytest.mark.parametrize("hidden_size", [1, 30, 64, 577, 1538, 2560, 8192])
@pytest.mark.parametrize(("tiled", "lane_columns"), [(False, 8), (True, 8), (True, 32), (False, 32)])
@pytest.mark.parametrize(("dtype", "weight_f32"), [("BF16", False), ("F16", True)])
def test_norm(gpu: Any, hidden_size: int, tiled: bool, lane_columns: int, dtype: str, weight_f32: bool) -> None:
    rng = np.random.default_rng(hidden_size)
    x = 3 * rng.standard_normal((11, hidden_size), np.float32)
    weight = 1 + 0.3 * rng.standard_normal(hidden_size, np.float32)
    stored = weight if weight_f32 else as_bits(weight, dtype)
    layout = run(gpu, x, stored, dtype, tiled, lane_columns, None)
    found = values_of(layout, tiled, lane_columns, hidden_size, dtype)[:11]
    expected = reference(x, weight if weight_f32 else widen_bits(stored, dtype))
    assert (found[:, hidden_size:] == 0).all()
    unit = 2**-8 if dtype == "BF16" else 2**-11
    assert (np.abs(found[:, :hidden_size] - expected) <= 1.02 * unit * np.abs(expected) + 2**-24).all()
    rounded = rows_activation(expected.astype(np.float32), dtype)[:, :hidden_size]
    assert (rounded != as_bits(found[:, :hidden_size], dtype)).mean() < 0.01  # only values near the middle of two


def test_chosen_rows(gpu: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 2560), np.float32)
    weight = as_bits(rng.standard_normal(2560, np.float32), "BF16")
    whole = run(gpu, x, weight, "BF16", False, 8, None)
    rows = np.array([19, 0, -1, 7, 7], np.int32)
    chosen = run(gpu, x, weight, "BF16", False, 8, rows)
    np.testing.assert_array_equal(chosen[[0, 1, 3, 4]], whole[[19, 0, 7, 7]])
    assert not (chosen[2] & 0x7FFF).any()
