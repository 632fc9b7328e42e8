"""`linear.cu` against a float64 product of the same 16-bit inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_inputs import Matrix, as_bits, matrix, rows_activation, swiglu, widen_bits

from megalith.runtime.linear_plan import THREADS, LinearShape

pytestmark = pytest.mark.gpu

NUM_SMS = 132
POISON_BYTES = 1 << 16


def run(
    gpu: Any, weights: Matrix, x: np.ndarray, epilogue: int, shape: LinearShape, y: np.ndarray, bias: np.ndarray | None,
    limit: float = 0.0, blocks: int = NUM_SMS,
) -> np.ndarray:  # fmt: skip
    """y after the product; `y` is what it holds before."""
    defines: dict[str, int] = {
        "ELEMENT_F16" if weights.dtype == "F16" else "ELEMENT_BF16": 1, "EPILOGUE": epilogue, "TOKEN_TILES": shape.token_tiles,
        "RING_CHUNKS": shape.ring_chunks, "Y_TILED": 0, "Y_LANE_COLUMNS": 8, "CODEC_MXFP4": int(shape.layout == "mxfp4"),
    }  # fmt: skip
    kernel = gpu.compile("linear", "linear", **defines)
    grid = shape.grid(blocks, len(x))
    pitch = rows_activation(x, weights.dtype).shape[1]
    columns = y.shape[1] if epilogue != 2 else weights.rows // 2
    activations, target = gpu.array(rows_activation(x, weights.dtype)), gpu.array(y)
    packed = gpu.array(np.concatenate([weights.packed, np.full(POISON_BYTES, 0xFF, np.uint8)]))
    partials = gpu.empty_poisoned((shape.partials_bytes(blocks, len(x)),), np.uint8)
    flags = gpu.zeros((blocks * grid[1],), np.uint32)
    device_bias = gpu.array(as_bits(bias, weights.dtype)) if bias is not None else 0
    args = (
        packed, np.uint32(weights.row_blocks), np.int32(weights.steps), activations, np.int32(pitch), np.int32(len(x)), target,
        np.int32(y.shape[1]), np.int32(columns), device_bias, np.float32(limit), partials, flags,
    )  # fmt: skip
    gpu.launch(kernel, grid, (THREADS, 1, 1), args, shared_bytes=shape.shared_bytes)
    first: np.ndarray = gpu.get(target)
    assert not gpu.get(flags).any()
    again = gpu.array(y)
    gpu.launch(kernel, grid, (THREADS, 1, 1), (*args[:6], again, *args[7:]), shared_bytes=shape.shared_bytes)
    np.testing.assert_array_equal(gpu.get(again).view(np.uint8), first.view(np.uint8))
    return first


CASES = [
    (16, 32, 1), (48, 96, 5), (112, 576, 8), (576, 1536, 1), (6160, 2560, 3), (2560, 9728, 1), (2560, 4096, 16),
    (1000, 2880, 13),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "columns", "tokens"), CASES)
@pytest.mark.parametrize("layout", ["tile16x512", "mxfp4"])
def test_products(gpu: Any, rows: int, columns: int, tokens: int, layout: str) -> None:
    rng = np.random.default_rng(rows + columns)
    weights = matrix(rng, rows, columns, "BF16", layout)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    bias = rng.standard_normal(weights.row_blocks * 16).astype(np.float32)
    shape = LinearShape(layout, 1 if tokens <= 8 else 2, 3)
    expected = widen_bits(as_bits(x, "BF16"), "BF16").astype(np.float64) @ weights.values.T.astype(np.float64)
    expected += widen_bits(as_bits(bias[:rows], "BF16"), "BF16")
    pitch = weights.row_blocks * 16
    poisoned = np.full((tokens, pitch), np.nan, np.float32)
    found = run(gpu, weights, x, 0, shape, poisoned, bias)[:, :rows]
    assert np.linalg.norm(found - expected) < 2e-6 * np.sqrt(columns / 32 + 1) * np.linalg.norm(expected)
    before = rng.standard_normal((tokens, rows)).astype(np.float32)
    added = run(gpu, weights, x, 1, shape, before, None)
    without = expected - widen_bits(as_bits(bias[:rows], "BF16"), "BF16")
    assert np.linalg.norm(added - before - without) < 1e-5 * np.linalg.norm(without)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("limit", [0.0, 7.0])
def test_swiglu(gpu: Any, dtype: str, limit: float) -> None:
    rng = np.random.default_rng(3)
    weights = matrix(rng, 1552, 864, dtype, "tile16x512")  # already in pair8 order: rows 8 gate, 8 up
    x = 2 * rng.standard_normal((7, 864)).astype(np.float32)
    product = widen_bits(as_bits(x, dtype), dtype).astype(np.float64) @ weights.values.T.astype(np.float64)
    pairs = product.reshape(7, -1, 2, 8)
    expected = swiglu(pairs[:, :, 0].reshape(7, -1), pairs[:, :, 1].reshape(7, -1), limit)
    y = np.full((7, 832), 0xFFFF, np.uint16)
    bits = run(gpu, weights, x, 2, LinearShape("tile16x512", 1, 3), y, None, limit)
    found = widen_bits(bits[:, :776], dtype)
    assert np.abs(found - expected).max() < np.abs(expected).max() * (2**-8 if dtype == "BF16" else 2**-10)
    assert (bits[:, 776:] == 0xFFFF).all()


@pytest.mark.parametrize("blocks", [1, 7, 132])
def test_what_a_token_gets_does_not_depend_on_the_others(gpu: Any, blocks: int) -> None:
    rng = np.random.default_rng(5)
    weights = matrix(rng, 720, 2560, "BF16", "tile16x512")
    x = rng.standard_normal((40, 2560)).astype(np.float32)
    whole = run(gpu, weights, x, 0, LinearShape("tile16x512", 4, 2), np.zeros((40, 720), np.float32), None, blocks=blocks)
    for tokens, tiles in ((1, 1), (9, 2)):
        part = run(
            gpu,
            weights,
            x[:tokens],
            0,
            LinearShape("tile16x512", tiles, 3),
            np.zeros((tokens, 720), np.float32),
            None,
            blocks=blocks,
        )
        np.testing.assert_array_equal(part, whole[:tokens])
