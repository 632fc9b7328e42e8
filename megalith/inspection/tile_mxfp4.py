"""Pages of MXFP4 tiles: for each step and stored row the codes, the scales and the values that they give."""

from __future__ import annotations

from typing import Any

import numpy as np

from megalith.format.constants import TILE_ROWS
from megalith.format.mxfp4 import BLOCK_BYTES, BLOCK_ELEMENTS, SCALE_NAN, STEP_BLOCKS, STEP_BYTES, STEP_COLUMNS, decode_blocks
from megalith.format.rows import HALF

from .plain import jsonable

PIECE_BYTES = STEP_BLOCKS * BLOCK_BYTES  # codes that one stored row has in one step
CODES_BYTES = TILE_ROWS * PIECE_BYTES
_SCALE_BIAS = 127

ORDER = (
    f"order: steps of {STEP_COLUMNS} columns, {STEP_BYTES} bytes each: {CODES_BYTES} bytes of codes, for each stored row "
    f"{STEP_BLOCKS} blocks of {BLOCK_BYTES} bytes,\n"
    f"then {STEP_BYTES - CODES_BYTES} bytes of scales, for each stored row {STEP_BLOCKS}. A block is {BLOCK_ELEMENTS} E2M1 "
    "codes, two in a byte, the first in the low nibble,\n"
    f"and scale byte s means 2^(s-{_SCALE_BIAS}). Lane 4g+t of a warp reads block t, columns {BLOCK_ELEMENTS}t.., of stored "
    f"rows g and g+{HALF}, and its scale."
)


def pieces(
    data: bytearray, offset: int, first_column: int, first_row: int, owners: list[tuple[str, int] | None]
) -> list[dict[str, Any]]:
    """One map per 64 bytes of codes, in stored order: step by step, row by row; `offset` is the place of `data` in the file."""
    steps = np.frombuffer(data, np.uint8).reshape(-1, STEP_BYTES)
    codes = steps[:, :CODES_BYTES].reshape(-1, TILE_ROWS, STEP_BLOCKS, BLOCK_BYTES)
    scales = steps[:, CODES_BYTES:].reshape(-1, TILE_ROWS, STEP_BLOCKS)
    values = decode_blocks(codes, scales)
    found = []
    for step in range(len(steps)):
        column, start = first_column + step * STEP_COLUMNS, offset + step * STEP_BYTES
        for row in range(TILE_ROWS):
            lane, owner = row % HALF * STEP_BLOCKS, owners[row]
            found.append(
                {
                    "offset": start + row * PIECE_BYTES,
                    "scales_offset": start + CODES_BYTES + row * STEP_BLOCKS,
                    "step": step,
                    "stored_row": first_row + row,
                    "tensor": owner[0] if owner else None,
                    "row": owner[1] if owner else None,
                    "columns": [column, column + STEP_COLUMNS],
                    "lanes": [lane, lane + STEP_BLOCKS],
                    "fragment": "rows g" if row < HALF else f"rows g+{HALF}",
                    "hex": codes[step, row].tobytes().hex(),
                    "scales": scales[step, row].tolist(),
                    "values": jsonable(values[step, row].tolist()),
                }
            )
    return found


def scale_text(scale: int) -> str:
    """A scale byte as a power of two."""
    return "NaN" if scale == SCALE_NAN else f"2^{scale - _SCALE_BIAS}"
