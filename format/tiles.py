"""The tile codec: 16-row blocks of 16-bit elements in `mma` A-fragment order, and its inverse.

A row block of K columns is stored as [K/32][16][32]: for each step of 32 columns the 64-byte pieces of its 16 rows.
Lane 4g+t of a warp owns 16 bytes (columns 8t..8t+7) of rows g and g+8. Sixteen steps are one page of 16 KiB
(specs/format.md, "Tile layout 2").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .constants import STEP_COLUMNS, TILE_COLUMNS, TILE_ROWS
from .rows import HALF, RowMap

Tiles = NDArray[np.uint16]  # [num_blocks, K/32, 16, 32]
_PIECE = np.dtype("V64")  # one row of one step: numpy copies it as a unit


def padded(count: int, unit: int) -> int:
    """`count` rounded up to a multiple of `unit`."""
    return -(-count // unit) * unit


def tiles_shape(rows: int, columns: int) -> tuple[int, int, int, int]:
    """Shape of the tile array that holds a matrix of `rows` x `columns` logical elements."""
    return -(-rows // TILE_ROWS), -(-columns // STEP_COLUMNS), TILE_ROWS, STEP_COLUMNS


def _piece_views(rows: NDArray[np.uint16], tiles: Tiles, row_map: RowMap) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """The same pieces seen from the row-major side and from the tile side, as two views of equal shape.

    rows: uint16 [R, K], contiguous, K a multiple of 32, R a multiple of the order's unit; tiles: contiguous.
    """
    steps = rows.shape[1] // STEP_COLUMNS
    logical = rows.view(_PIECE)
    stored = tiles.reshape(-1, steps, TILE_ROWS * STEP_COLUMNS).view(_PIECE)
    if row_map.order == "pair8":
        slot = stored[:, :, row_map.param * HALF :][:, :, :HALF]
        return logical.reshape(-1, HALF, steps), slot.transpose(0, 2, 1)
    if row_map.order == "rope":
        blocks = row_map.param // TILE_ROWS
        by_head = logical.reshape(-1, 2, blocks, HALF, steps)
        return by_head, stored.reshape(-1, blocks, steps, 2, HALF).transpose(0, 3, 1, 4, 2)
    return logical.reshape(-1, TILE_ROWS, steps), stored.transpose(0, 2, 1)


def pack_rows(rows: NDArray[np.uint16], tiles: Tiles, row_map: RowMap) -> None:
    """Write logical rows into the tiles that hold them; padding columns and rows become zero.

    rows: uint16 [R, K] bit patterns, for "rope" whole heads; tiles: uint16 [blocks, ceil(K/32), 16, 32], contiguous,
    holding exactly the stored rows of `rows` (`row_map.base` is not added). "pair8" leaves the other slot untouched.
    """
    num_rows, columns = rows.shape
    target = (padded(num_rows, row_map.rows_per_block), padded(columns, STEP_COLUMNS))
    if target != rows.shape or not rows.flags.c_contiguous:
        whole = np.zeros(target, np.uint16)
        whole[:num_rows, :columns] = rows
        rows = whole
    logical, stored = _piece_views(rows, tiles, row_map)
    np.copyto(stored, logical)


def unpack_rows(tiles: Tiles, num_rows: int, columns: int, row_map: RowMap) -> NDArray[np.uint16]:
    """Inverse of `pack_rows`: the logical rows, uint16 [num_rows, columns]."""
    rows = np.empty((padded(num_rows, row_map.rows_per_block), tiles.shape[1] * STEP_COLUMNS), np.uint16)
    logical, stored = _piece_views(rows, tiles, row_map)
    np.copyto(logical, stored)
    return rows[:num_rows, :columns]


def element_position(row: int, column: int, columns: int) -> int:
    """Index of stored element (row, column) within its blob, in elements; `columns` is the blob's stored K."""
    block, i = divmod(row, TILE_ROWS)
    step, j = divmod(column, STEP_COLUMNS)
    return ((block * (columns // STEP_COLUMNS) + step) * TILE_ROWS + i) * STEP_COLUMNS + j


def element_at(position: int, columns: int) -> tuple[int, int]:
    """Inverse of `element_position`: stored (row, column) of the element at `position`."""
    piece, j = divmod(position, STEP_COLUMNS)
    step_piece, i = divmod(piece, TILE_ROWS)
    block, step = divmod(step_piece, columns // STEP_COLUMNS)
    return block * TILE_ROWS + i, step * STEP_COLUMNS + j


def pages_per_block(columns: int) -> int:
    """Number of pages of a row block; the last one may be narrower than 512 columns."""
    return -(-columns // TILE_COLUMNS)
