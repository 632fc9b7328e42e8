"""One page of a tensor's tiles: every stored piece with its file offset, lane, logical row, columns and values."""

from __future__ import annotations

from typing import Any

import numpy as np

from megalith.format.constants import STEP_COLUMNS, STEPS_PER_PAGE, TILE_ROWS
from megalith.format.dtypes import widen
from megalith.format.entries import STORED_COLUMNS
from megalith.format.errors import RequestError, printable
from megalith.format.reader import PackedFile
from megalith.format.rows import HALF
from megalith.format.tensors import PackedTensor

from . import tile_mxfp4
from .plain import jsonable

LANE_COLUMNS = 8
LANE_BYTES = 2 * LANE_COLUMNS
PIECE_BYTES = 2 * STEP_COLUMNS
LANES_PER_ROW = STEP_COLUMNS // LANE_COLUMNS
_SHORT_STEPS = 2  # shown from the front when the page is cut, and one from its end

ORDER = (
    f"order: steps of {STEP_COLUMNS} columns; in a step {TILE_ROWS} pieces of {PIECE_BYTES} bytes, one per stored row; "
    f"in a piece {LANES_PER_ROW} x {LANE_BYTES} bytes.\n"
    f"Lane 4g+t of a warp reads {LANE_COLUMNS} columns, {LANE_COLUMNS}t.., of stored rows g and g+{HALF}: "
    "the A fragments of two mma.m16n8k16."
)


def tile(packed: PackedFile, tensor: PackedTensor, block: int, page: int) -> dict[str, Any]:
    """The page that holds row block `block` (counted from the tensor's first stored row) and page column `page`."""
    entry, blob = tensor.entry, tensor.blob
    if blob.layout == "vector":
        raise RequestError(f"{printable(packed.path)}: {printable(tensor.name)} is a vector: it has no tiles")
    step_columns = STORED_COLUMNS[blob.layout]
    step_bytes = blob.block_bytes * step_columns // blob.columns
    blocks = entry.row_map.stored_span(entry.rows) // TILE_ROWS
    pages = -(-blob.columns // (STEPS_PER_PAGE * step_columns))
    if block >= blocks or page >= pages:
        raise RequestError(
            f"{printable(packed.path)}: {printable(tensor.name)} has row blocks 0 to {blocks - 1} and page columns 0 to "
            f"{pages - 1}: no tile {block},{page}"
        )
    number = entry.row_map.base // TILE_ROWS + block
    first_step = page * STEPS_PER_PAGE
    num_steps = min(STEPS_PER_PAGE, blob.columns // step_columns - first_step)
    offset = blob.offset + number * blob.block_bytes + first_step * step_bytes
    data = packed.read_image(offset, num_steps * step_bytes)
    file_offset = packed.header.section("image").offset + offset
    place = file_offset, first_step * step_columns, number * TILE_ROWS, row_owners(packed, entry.blob, number)
    is_mxfp4 = blob.dtype == "MXFP4"
    return {
        "tensor": tensor.name,
        "blob": blob.name,
        "dtype": blob.dtype,
        "row_block": block,
        "blob_row_block": number,
        "page_column": page,
        "row_blocks": blocks,
        "page_columns": pages,
        "rows": TILE_ROWS,
        "columns": num_steps * step_columns,
        "logical_columns": entry.columns,
        "offset": file_offset,
        "bytes": len(data),
        "pieces": tile_mxfp4.pieces(data, *place) if is_mxfp4 else _pieces(data, blob.dtype, *place),
    }


def row_owners(packed: PackedFile, blob: int, number: int) -> list[tuple[str, int] | None]:
    """(tensor, logical row) of the 16 stored rows of a blob's row block; None for padding."""
    owners: list[tuple[str, int] | None] = [None] * TILE_ROWS
    first = number * TILE_ROWS
    for i in np.flatnonzero(packed.index.tensors.columns["blob"] == blob).tolist():
        entry = packed.index.tensor(i)
        stored = entry.row_map.stored_rows(entry.rows)
        for row in np.flatnonzero((stored >= first) & (stored < first + TILE_ROWS)).tolist():
            owners[int(stored[row]) - first] = (entry.name, row)
    return owners


def _pieces(
    data: bytearray, dtype: str, offset: int, first_column: int, first_row: int, owners: list[tuple[str, int] | None]
) -> list[dict[str, Any]]:
    """One map per 64-byte piece, in stored order: step by step, row by row."""
    values = widen(np.frombuffer(data, np.uint16), dtype).reshape(-1, TILE_ROWS, STEP_COLUMNS)
    pieces = []
    for step, rows in enumerate(values.tolist()):
        column = first_column + step * STEP_COLUMNS
        for i, row in enumerate(rows):
            start = (step * TILE_ROWS + i) * PIECE_BYTES
            lane = i % HALF * LANES_PER_ROW
            owner = owners[i]
            pieces.append(
                {
                    "offset": offset + start,
                    "step": step,
                    "stored_row": first_row + i,
                    "tensor": owner[0] if owner else None,
                    "row": owner[1] if owner else None,
                    "columns": [column, column + STEP_COLUMNS],
                    "lanes": [lane, lane + LANES_PER_ROW],
                    "fragment": "rows g" if i < HALF else f"rows g+{HALF}",
                    "hex": data[start : start + PIECE_BYTES].hex(),
                    "values": jsonable(row),
                }
            )
    return pieces


def tile_text(data: dict[str, Any], as_hex: bool) -> list[str]:
    """A line per piece with some of its values; with `as_hex` a line per lane with raw bytes and all values."""
    is_mxfp4 = data["dtype"] == "MXFP4"
    lines = [
        f"page {data['row_block']},{data['page_column']} of {data['tensor']} ({data['row_blocks']} row blocks x "
        f"{data['page_columns']} pages): {data['rows']} rows x {data['columns']} columns of {data['dtype']}, "
        f"{data['bytes']:,} bytes at file offset {data['offset']}",
        f"row block {data['blob_row_block']} of blob {data['blob']}",
        *(tile_mxfp4.ORDER if is_mxfp4 else ORDER).split("\n"),
    ]
    pieces, names = data["pieces"], _short_names(data["pieces"])
    width = max(len(_row(piece, names)) for piece in pieces)
    heading = f"{'offset':>14}  step  stored  {'row':<{width}}  {'columns':<11}"
    if as_hex:
        heading += f"  lane  {'bytes':<32}{'  scale      ' * is_mxfp4}  values"
        return [*lines, heading, *(line for piece in pieces for line in _lane_lines(piece, names, width, data))]
    of_lane = "scale of each lane's block, and its first ..." if is_mxfp4 else "values of each lane: its first ..."
    lines.append(f"{heading}  lanes  {of_lane}")
    steps = len(pieces) // TILE_ROWS
    for piece in pieces:
        if steps - 1 > _SHORT_STEPS and piece["step"] == _SHORT_STEPS and piece["stored_row"] % TILE_ROWS == 0:
            lines.append(f"{'...':>14}  {steps - 1 - _SHORT_STEPS} more steps: --hex shows them all, with bytes")
        if piece["step"] < _SHORT_STEPS or piece["step"] == steps - 1:
            lines.append(_piece_line(piece, names, width, data))
    return lines


def _short_names(pieces: list[dict[str, Any]]) -> dict[str, str]:
    """Names without the modules they share."""
    names = sorted({piece["tensor"] for piece in pieces if piece["tensor"]})
    paths = [name.split(".") for name in names]
    return {name: path[-2] if len(path) > 1 and path[-1] in ("weight", "bias") else path[-1]
            for name, path in zip(names, paths, strict=True)}  # fmt: skip


def _row(piece: dict[str, Any], names: dict[str, str]) -> str:
    return f"{names[piece['tensor']]}[{piece['row']}]" if piece["tensor"] else "padding"


def _head(piece: dict[str, Any], names: dict[str, str], width: int, offset: int, columns: tuple[int, int]) -> str:
    span = f"{columns[0]}-{columns[1] - 1}"
    return f"{offset:>14}  {piece['step']:>4}  {piece['stored_row']:>6}  {_row(piece, names):<{width}}  {span:<11}"


def _piece_line(piece: dict[str, Any], names: dict[str, str], width: int, data: dict[str, Any]) -> str:
    start, stop = piece["columns"]
    lane_columns, scales = (stop - start) // LANES_PER_ROW, piece.get("scales")
    shown = []
    for lane in range(LANES_PER_ROW):
        first = piece["values"][lane * lane_columns : lane * lane_columns + 2]
        text = " ".join(f"{_value(value):>10}" for value in first) + " .."
        if scales:
            text = f"{tile_mxfp4.scale_text(scales[lane]):>6} {text}"
        inside = start + lane * lane_columns < data["logical_columns"]
        shown.append(text if inside else f"{'padding':>{len(text)}}")
    lanes = f"{piece['lanes'][0]:>2}-{piece['lanes'][1] - 1:<2}"
    return f"{_head(piece, names, width, piece['offset'], (start, stop))}  {lanes}  {'  '.join(shown)}"


def _lane_lines(piece: dict[str, Any], names: dict[str, str], width: int, data: dict[str, Any]) -> list[str]:
    lane_columns, scales = (piece["columns"][1] - piece["columns"][0]) // LANES_PER_ROW, piece.get("scales")
    lines = []
    for lane in range(LANES_PER_ROW):
        start = piece["columns"][0] + lane * lane_columns
        head = _head(piece, names, width, piece["offset"] + lane * LANE_BYTES, (start, start + lane_columns))
        raw = piece["hex"][2 * lane * LANE_BYTES : 2 * (lane + 1) * LANE_BYTES]
        if scales:
            raw += f"  {scales[lane]:02x} = {tile_mxfp4.scale_text(scales[lane]):<6}"
        values = piece["values"][lane * lane_columns : (lane + 1) * lane_columns]
        text = " ".join(f"{_value(value):>10}" for value in values) if start < data["logical_columns"] else "padding"
        lines.append(f"{head}  {piece['lanes'][0] + lane:>4}  {raw}  {text}")
    return lines


def _value(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
