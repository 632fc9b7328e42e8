"""`take_rows.cu`: exact copies of chosen rows, from one activation layout into another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_inputs import as_bits, rows_activation, tiled_activation

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("columns", [33, 256, 4096])
@pytest.mark.parametrize(("source_tiled", "target_tiled"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("dtype", "lane_columns"), [("BF16", 8), ("F16", 32)])
def test_rows(gpu: Any, columns: int, source_tiled: bool, target_tiled: bool, dtype: str, lane_columns: int) -> None:
    rng = np.random.default_rng(columns)
    tokens, rows = 45, np.array([44, 0, 7, 8, 7, 31, 13, 14, 15, 16, 21], np.int32)
    x, a = rng.standard_normal((tokens, 3 * columns), np.float32), rng.standard_normal((tokens, columns), np.float32)
    width = -(-columns // 128) * 128

    def laid_out(values: np.ndarray, tiled: bool) -> tuple[np.ndarray, int]:
        padded = -(-len(values) // 8) * 8
        return (
            (tiled_activation(values, dtype, padded, lane_columns), padded)
            if tiled
            else (rows_activation(values, dtype), width)
        )

    (source, pitch), (expected, taken_pitch) = laid_out(a, source_tiled), laid_out(a[rows], target_tiled)
    kernel = gpu.compile(
        "take_rows", "take_rows", LANE_COLUMNS=lane_columns, SOURCE_TILED=int(source_tiled), TARGET_TILED=int(target_tiled),
        **{f"ELEMENT_{dtype}": 1},
    )  # fmt: skip
    taken_x, taken_a = gpu.empty_poisoned((len(rows), x.shape[1]), np.float32), gpu.empty_poisoned(expected.shape, np.uint16)
    args = (
        gpu.array(rows), gpu.array(x), np.int32(x.shape[1]), taken_x, gpu.array(source), np.int32(width), np.int32(pitch),
        taken_a, np.int32(taken_pitch),
    )  # fmt: skip
    gpu.launch(kernel, (len(rows), 1, 1), (256, 1, 1), args)
    np.testing.assert_array_equal(gpu.get(taken_x), x[rows])
    found = gpu.get(taken_a)
    if target_tiled:  # rows beyond the last chosen one are not written
        found, expected = found[:, : len(rows)], expected[:, : len(rows)]
    np.testing.assert_array_equal(found, expected)
    assert as_bits(a[rows], dtype).any()
