"""The tensor table: one column per field, computed from the index's arrays, so that 20,000 tensors print at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.format import mxfp4
from megalith.format.constants import DTYPES, LAYOUTS, ROW_ORDERS, STEP_COLUMNS, TILE_ROWS
from megalith.format.dtypes import DTYPE_CODES
from megalith.format.entries import LAYOUT_CODES, NO_SOURCE
from megalith.format.reader import PackedFile
from megalith.format.records import RECORD_TYPE
from megalith.format.rows import HALF, ROW_ORDER_CODES

Columns = dict[str, list[Any]]
Counts = NDArray[np.int64]

_HEADINGS = ("name", "dtype", "shape", "layout", "rows", "file offset", "stored", "padding", "blob")
_LEFT_ALIGNED = (0, 1, 3, 4, 8)
_PIECE_BYTES = 2 * STEP_COLUMNS  # what one stored row has in one step, without MXFP4's scales: the same in both layouts


def stored_bytes(elements: Counts, dtype: Counts) -> Counts:
    """Bytes of numbers of elements in dtypes given by code; MXFP4's are whole blocks and count with their scales."""
    blocks = elements // mxfp4.BLOCK_ELEMENTS
    plain = elements * np.where(dtype == DTYPE_CODES["F32"], 4, 2)
    return np.where(dtype == DTYPE_CODES["MXFP4"], blocks * (mxfp4.BLOCK_BYTES + 1), plain)


def logical_bytes(packed: PackedFile) -> Counts:
    """For each tensor the bytes of its own elements as stored, a row's last MXFP4 block whole."""
    tensors = packed.index.tensors.columns
    dtype = packed.index.blobs.columns["dtype"][tensors["blob"]].astype(np.int64)
    rows, columns = tensors["rows"].astype(np.int64), tensors["columns"].astype(np.int64)
    blocks = -(-columns // mxfp4.BLOCK_ELEMENTS)
    return stored_bytes(rows * np.where(dtype == DTYPE_CODES["MXFP4"], blocks * mxfp4.BLOCK_ELEMENTS, columns), dtype)


def tensor_columns(packed: PackedFile) -> Columns:
    """Fields of all tensors in file order; reads the records section.

    `offset` is the place in the file of the tensor's first element, `stored_shape` and `bytes` count its own stored rows
    and columns, `padding` is the part of `bytes` that holds no element. `source` names the checkpoint tensor that it is a
    piece of; `sqnr_db` is None where nothing was quantised, or nothing was lost.
    """
    index = packed.index
    tensors, blobs = index.tensors.columns, index.blobs.columns
    of_blob = {name: column[tensors["blob"]].astype(np.int64) for name, column in blobs.items()}
    rows, columns, base, param = (tensors[name].astype(np.int64) for name in ("rows", "columns", "row_base", "row_param"))
    is_vector = of_blob["layout"] == LAYOUT_CODES["vector"]
    paired = tensors["row_order"] == ROW_ORDER_CODES["pair8"]
    unit = np.where(paired, HALF, TILE_ROWS)
    stored_rows = -(-rows // unit) * unit
    slot = np.where(paired, param * HALF, 0)
    first_row = stored_bytes((base + np.where(is_vector, slot, 0)) * of_blob["columns"], of_blob["dtype"])
    nbytes = stored_bytes(stored_rows * of_blob["columns"], of_blob["dtype"])
    image = packed.header.section("image").offset
    orders = zip(tensors["row_order"].tolist(), param.tolist(), strict=True)
    numbers = zip(rows.tolist(), columns.tolist(), tensors["ndim"].tolist(), strict=True)
    sources = [*index.sources.names, None]
    return {
        "name": index.tensors.names,
        "dtype": [DTYPES[code] for code in of_blob["dtype"].tolist()],
        "source_dtype": [DTYPES[code] for code in tensors["source_dtype"].tolist()],
        "shape": [[r, c] if ndim == 2 else [r] for r, c, ndim in numbers],
        "layout": [LAYOUTS[code] for code in of_blob["layout"].tolist()],
        "row_order": [ROW_ORDERS[code] for code, _ in orders],
        "row_base": base.tolist(),
        "row_param": param.tolist(),
        "blob": [index.blobs.names[i] for i in tensors["blob"].tolist()],
        "offset": (image + of_blob["offset"] + first_row + np.where(is_vector, 0, slot * _PIECE_BYTES)).tolist(),
        "bytes": nbytes.tolist(),
        "stored_shape": np.stack([stored_rows, of_blob["columns"]], axis=1).tolist(),
        "padding": (nbytes - logical_bytes(packed)).tolist(),
        "source": [sources[min(i, len(sources) - 1)] for i in tensors["source"].tolist()],
        "sqnr_db": sqnr_db(records_of(packed)),
    }


def sqnr_db(records: NDArray[np.void]) -> list[float | None]:
    """`ConversionLoss.sqnr_db` of every record, rounded to hundredths; None also for powers that are no numbers."""
    signal, noise = records["signal_power"], records["noise_power"]
    known = (signal > 0.0) & (noise > 0.0) & np.isfinite(signal) & np.isfinite(noise)
    ratios = np.full(len(records), np.nan)
    ratios[known] = 10.0 * (np.log10(signal[known]) - np.log10(noise[known]))
    return [value if is_known else None for value, is_known in zip(ratios.round(2).tolist(), known.tolist(), strict=True)]


def source_rows(packed: PackedFile) -> list[dict[str, Any]]:
    """JSON-ready: the checkpoint tensors held in pieces, each with the number of tensors that hold its elements."""
    index = packed.index
    counts = np.zeros(len(index.sources), np.int64)
    for name in ("source", "scales"):
        numbers = index.tensors.columns[name]
        counts += np.bincount(numbers[numbers != NO_SOURCE], minlength=len(counts))
    entries = [index.source(i) for i in range(len(index.sources))]
    return [
        {"name": entry.name, "dtype": entry.dtype, "shape": list(entry.shape), "tensors": count}
        for entry, count in zip(entries, counts.tolist(), strict=True)
    ]


def sources_text(rows: list[dict[str, Any]]) -> list[str]:
    """A line per checkpoint tensor that is held in pieces; none without one."""
    if not rows:
        return []
    shapes = ["x".join(map(str, row["shape"])) for row in rows]
    cells = [[row["name"] for row in rows], [row["dtype"] for row in rows], shapes, [f"{row['tensors']:,}" for row in rows]]
    return [aligned(("checkpoint tensors held in pieces", "dtype", "shape", "tensors"), cells, (0, 1, 2))]


def tensor_rows(columns: Columns) -> list[dict[str, Any]]:
    """The same table as one JSON-ready map per tensor."""
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def records_of(packed: PackedFile) -> NDArray[np.void]:
    """The records section as it is stored, whatever its checksums say: `verify` checks, `inspect` shows."""
    section = packed.header.section("records")
    return np.frombuffer(packed.read(section.offset, section.nbytes), RECORD_TYPE)


def table_text(columns: Columns) -> str:
    """The table in aligned columns. Names go out as they are: rule T1 makes them printable ASCII."""
    dtypes = zip(columns["dtype"], columns["source_dtype"], strict=True)
    orders = zip(columns["row_order"], columns["row_param"], strict=True)
    headings: tuple[str, ...] = _HEADINGS
    cells: list[list[str]] = [
        columns["name"],
        [dtype if dtype == source else f"{dtype}<{source}" for dtype, source in dtypes],
        ["x".join(map(str, shape)) for shape in columns["shape"]],
        columns["layout"],
        [order if order == "sequential" else f"{order}({param})" for order, param in orders],
        list(map(str, columns["offset"])),
        [f"{rows}x{width}" for rows, width in columns["stored_shape"]],
        list(map(str, columns["padding"])),
        columns["blob"],
    ]
    if "MXFP4" in columns["dtype"]:
        headings = (*headings[:-1], "SQNR dB", headings[-1])
        cells.insert(-1, ["" if ratio is None else f"{ratio:.2f}" for ratio in columns["sqnr_db"]])
    return aligned(headings, cells, (*_LEFT_ALIGNED[:-1], len(headings) - 1))


def aligned(headings: tuple[str, ...], cells: list[list[str]], left: tuple[int, ...]) -> str:
    """Columns of text under their headings, those numbered in `left` flush left; one string, without a final newline."""
    widths = [max(len(heading), max(map(len, column), default=0)) for heading, column in zip(headings, cells, strict=True)]
    widths[-1] *= len(widths) - 1 not in left  # no blanks at the ends of lines
    template = "  ".join(f"%{'-' if i in left else ''}{width}s" for i, width in enumerate(widths))
    return "\n".join(map(template.__mod__, [headings, *zip(*cells, strict=True)]))
