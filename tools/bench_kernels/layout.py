"""The tile layouts where the choice was open: small batches and MXFP4, by both products, from the same bytes.

One matrix of Qwen3-4B (gate and up, 19456 x 2560), packed as a file has it in BF16 and in MXFP4, read by `linear.cu`
(mma.sync) and by `gemm_wgmma.cu` for 1 to 64 tokens. Checked against a float32 product of the packed values, then timed over
several copies, so that none comes from L2. Per cent of nominal bandwidth is of the bytes as they are stored.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megalith.runtime.gemm_plan import gemm_shape
from megalith.runtime.linear_plan import THREADS, linear_shape

sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "tests" / "gpu"))
from kernel_inputs import Matrix, as_bits, matrix, rows_activation, tiled_activation, widen_bits

ROWS, COLUMNS = 19456, 2560
TOKENS = (1, 4, 8, 16, 32, 64)
MOST_TOKENS_OF_LINEAR = 32
LANE_COLUMNS = {"tile16x512": 8, "mxfp4": 32}
_COPIES_BYTES = 600 << 20
_LARGEST_ERROR = 1e-4

Multiply = Callable[[int], None]  # by the copy at an offset in bytes


def bench(gpu: Any) -> list[dict[str, Any]]:
    """One row per codec, number of tokens and product."""
    rows = []
    for layout in LANE_COLUMNS:
        weights = matrix(np.random.default_rng(0), ROWS, COLUMNS, "BF16", layout)
        copies = -(-_COPIES_BYTES // weights.packed.nbytes)
        packed, values = gpu.cupy.tile(gpu.array(weights.packed), copies), gpu.array(weights.values)
        for tokens in TOKENS:
            x = np.random.default_rng(tokens).standard_normal((tokens, COLUMNS)).astype(np.float32)
            expected = gpu.array(widen_bits(as_bits(x, "BF16"), "BF16")) @ values.T
            y = gpu.zeros((tokens, ROWS), np.float32)
            products = {"wgmma": _wgmma(gpu, weights, layout, packed, x, y)} if gpu.arch == "sm_90a" else {}
            if tokens <= MOST_TOKENS_OF_LINEAR:
                products["mma.sync"] = _linear(gpu, weights, layout, packed, x, y)
            for name, multiply in products.items():
                rows.append(_row(gpu, f"{layout} {name}", multiply, weights.packed.nbytes, copies, tokens, y, expected))
    return rows


def _row(
    gpu: Any, name: str, multiply: Multiply, nbytes: int, copies: int, tokens: int, y: Any, expected: Any
) -> dict[str, Any]:  # fmt: skip
    """Checked, then timed."""
    y.fill(np.nan)
    gpu.cupy.cuda.get_current_stream().synchronize()
    multiply(0)
    gpu.synchronize()
    error = float(gpu.cupy.linalg.norm(y - expected) / gpu.cupy.linalg.norm(expected))
    if not error < _LARGEST_ERROR:
        raise SystemExit(f"{name}, {tokens} tokens: relative error {error}")

    def all_copies() -> None:
        for copy in range(copies):
            multiply(copy * nbytes)

    seconds = gpu.time(all_copies) / copies
    gigabytes = nbytes / seconds / 1e9
    return {
        "kernel": "layout", "name": name, "tokens": tokens, "ms": seconds * 1e3, "gbytes_per_s": gigabytes,
        "percent_nominal": 100 * gigabytes / gpu.nominal_gbytes_per_s,
    }  # fmt: skip


def _linear(gpu: Any, weights: Matrix, layout: str, packed: Any, x: np.ndarray, y: Any) -> Multiply:
    shape = linear_shape(layout, len(x), gpu.shared_limit + 1024)
    kernel = gpu.compile(
        "linear", "linear", ELEMENT_BF16=1, EPILOGUE=0, TOKEN_TILES=shape.token_tiles, RING_CHUNKS=shape.ring_chunks,
        Y_TILED=0, Y_LANE_COLUMNS=8, CODEC_MXFP4=int(layout == "mxfp4"),
    )  # fmt: skip
    activations = gpu.array(rows_activation(x, "BF16"))
    grid = shape.grid(gpu.num_sms, len(x))
    partials = gpu.zeros((shape.partials_bytes(gpu.num_sms, len(x)),), np.uint8)
    flags = gpu.zeros((grid[0] * grid[1],), np.uint32)

    def multiply(offset: int) -> None:
        args = (
            int(packed.data.ptr) + offset, np.uint32(weights.row_blocks), np.int32(weights.steps), activations,
            np.int32(activations.shape[1]), np.int32(len(x)), y, np.int32(ROWS), np.int32(ROWS), 0, np.float32(0), partials,
            flags,
        )  # fmt: skip
        gpu.launch(kernel, grid, (THREADS, 1, 1), args, shared_bytes=shape.shared_bytes)

    return multiply


def _wgmma(gpu: Any, weights: Matrix, layout: str, packed: Any, x: np.ndarray, y: Any) -> Multiply:
    shape = gemm_shape(layout, 0, ROWS, COLUMNS, len(x), gpu.num_sms)
    kernel = gpu.compile(
        "gemm_wgmma", "gemm_wgmma", **shape.defines(), ELEMENT_BF16=1, Y_LANE_COLUMNS=8, BIAS_F32=0, Y_SCALAR=0
    )
    tokens_padded = -(-len(x) // 8) * 8
    activations = gpu.array(tiled_activation(x, "BF16", tokens_padded, LANE_COLUMNS[layout]))
    partials = gpu.zeros((shape.partials_bytes(gpu.num_sms),), np.uint8)
    flags = gpu.zeros((shape.flags(gpu.num_sms),), np.uint32)

    def multiply(offset: int) -> None:
        args = (
            int(packed.data.ptr) + offset, np.int32(weights.row_blocks), np.int32(weights.steps), activations,
            np.int32(tokens_padded), np.int32(len(x)), y, np.int32(ROWS), np.int32(ROWS), 0, np.float32(0),
            np.int32(shape.token_band(COLUMNS, len(x))), partials, flags,
        )  # fmt: skip
        gpu.launch(kernel, (gpu.num_sms, 1, 1), (shape.threads, 1, 1), args, shared_bytes=shape.shared_bytes)

    return multiply
