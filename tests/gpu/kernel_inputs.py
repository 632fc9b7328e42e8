"""Random operands of the matrix-product kernels, packed as a file has them, beside their values."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from megalith.format import mxfp4, tiles
from megalith.format.rows import RowMap

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}


@dataclass(frozen=True)
class Matrix:
    """A packed matrix: bytes as in the image, and the float32 values of its rows [rows, columns]."""

    packed: np.ndarray
    values: np.ndarray
    dtype: str
    row_blocks: int
    steps: int

    @property
    def rows(self) -> int:
        return len(self.values)


def as_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to the element type, as uint16."""
    return np.asarray(values, np.float32).astype(DTYPES[dtype]).view(np.uint16)


def widen_bits(bits: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values of uint16 patterns."""
    return bits.view(DTYPES[dtype]).astype(np.float32)


def matrix(rng: np.random.Generator, rows: int, columns: int, dtype: str, layout: str) -> Matrix:
    """Random weights of about unit output variance in a tile layout."""
    values = (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)
    row_blocks = -(-rows // 16)
    if layout == "mxfp4":
        codes = rng.integers(0, 256, (rows, -(-columns // 32), 16), np.uint8)
        scales = rng.integers(118, 126, (rows, -(-columns // 32)), np.uint8)
        if columns % 32:
            raise ValueError("blocks are whole in this test")
        steps = -(-columns // mxfp4.STEP_COLUMNS)
        packed = np.zeros((row_blocks, steps, mxfp4.STEP_BYTES), np.uint8)
        quantised = mxfp4.QuantisedRows(codes, scales)
        mxfp4.pack_tiles(quantised, packed, RowMap())
        return Matrix(packed.reshape(-1), mxfp4.decode_blocks(codes, scales)[:, :columns], dtype, row_blocks, steps)
    stored = np.zeros(tiles.tiles_shape(rows, columns), np.uint16)
    bits = as_bits(values, dtype)
    tiles.pack_rows(bits, stored, RowMap())
    return Matrix(stored.reshape(-1).view(np.uint8), widen_bits(bits, dtype), dtype, row_blocks, stored.shape[1])


def rows_activation(x: np.ndarray, dtype: str, unit: int = 128) -> np.ndarray:
    """The "rows" layout: uint16 [num_tokens, columns rounded up], zeros beyond the columns."""
    padded = np.zeros((len(x), -(-x.shape[1] // unit) * unit), np.uint16)
    padded[:, : x.shape[1]] = as_bits(x, dtype)
    return padded


def tiled_activation(x: np.ndarray, dtype: str, tokens_padded: int, lane_columns: int = 8) -> np.ndarray:
    """The "tiled" layout: uint16 [columns/64, tokens_padded, 64] (runtime/kernels/activation.cuh)."""
    flat = rows_activation(x, dtype)
    column = np.arange(flat.shape[1])
    group = 4 * lane_columns
    t, r = column % group // lane_columns, column % lane_columns
    position = column - column % group + 16 * (r // 4) + 8 * (r // 2 % 2) + 2 * t + r % 2
    tiled = np.zeros((flat.shape[1] // 64, tokens_padded, 64), np.uint16)
    for token in range(len(x)):
        chunk = position % 64 // 8 ^ token % 8
        tiled[position // 64, token, chunk * 8 + position % 8] = flat[token]
    return tiled


def swiglu(gate: np.ndarray, up: np.ndarray, limit: float) -> np.ndarray:
    """Plain SwiGLU, or gpt-oss' form with a limit, in the operands' precision."""
    if limit:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit) + 1.0
        return np.asarray(gate / (1.0 + np.exp(-1.702 * gate)) * up)
    return np.asarray(gate / (1.0 + np.exp(-gate)) * up)
