"""Rows of the index's tables as objects: blobs, tensors, and checkpoint tensors that several tensors share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import mxfp4
from .constants import BLOB_ALIGNMENT, DTYPES, LAYOUTS, ROW_ORDERS, STEP_COLUMNS, TILE_ROWS
from .dtypes import DTYPE_CODES, ITEM_BYTES
from .model import BlobSpec
from .rows import ROW_ORDER_CODES, RowMap
from .table import Table, build_table
from .tiles import padded

LAYOUT_CODES = {name: code for code, name in LAYOUTS.items()}
STORED_COLUMNS = {"vector": 1, "tile16x512": STEP_COLUMNS, "mxfp4": mxfp4.STEP_COLUMNS}  # stored columns are a multiple
NO_SOURCE = 0xFFFF_FFFF
MAX_SOURCE_DIMENSIONS = 4

BLOB_COLUMNS = {"columns": "<u8", "dtype": "u1", "layout": "u1", "nbytes": "<u8", "offset": "<u8", "rows": "<u8"}
TENSOR_COLUMNS = {
    "blob": "<u4", "column_stride": "<u8", "columns": "<u8", "ndim": "u1", "row_base": "<u8", "row_order": "u1",
    "row_param": "<u4", "row_stride": "<u8", "rows": "<u8", "scales": "<u4", "source": "<u4", "source_dtype": "u1",
    "start": "<u8",
}  # fmt: skip
SOURCE_COLUMNS = {"dim0": "<u8", "dim1": "<u8", "dim2": "<u8", "dim3": "<u8", "dtype": "u1", "ndim": "u1"}


@dataclass(frozen=True)
class BlobEntry:
    """One packed matrix or vector; `offset` is relative to the device image, sizes are of stored elements."""

    name: str
    dtype: str
    layout: str
    rows: int
    columns: int
    offset: int
    nbytes: int

    @property
    def extent_bytes(self) -> int:
        """Bytes up to the next blob: `nbytes` and zero padding."""
        return padded(self.nbytes, BLOB_ALIGNMENT)

    @property
    def block_bytes(self) -> int:
        """Bytes of 16 stored rows of a matrix."""
        return self.nbytes // (self.rows // TILE_ROWS)


@dataclass(frozen=True)
class Placement:
    """Where a tensor's elements lie in the checkpoint tensor number `source`, which holds those of others too.

    Element (r, c) is element `start + r * row_stride + c * column_stride` of the source. For MXFP4 the source holds the
    codes, 16 bytes for 32 columns, and element (r, c) lies in byte `start + r * row_stride + c // 2`; `scales` is the number
    of the source that holds the scales, each at a 16th of its codes' position.
    """

    source: int
    start: int
    row_stride: int
    column_stride: int = 1
    scales: int = NO_SOURCE


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: its logical shape, the dtype it came in, and its rows within blob number `blob`.

    It is the checkpoint tensor of that name or, with a `placement`, a piece of another.
    """

    name: str
    shape: tuple[int, ...]
    source_dtype: str
    blob: int
    row_map: RowMap
    placement: Placement | None = None

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class SourceEntry:
    """A checkpoint tensor whose elements belong to several tensors, such as all experts' `gate_up_proj`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def blob_entry(table: Table, i: int) -> BlobEntry:
    """Row `i` of a blob table."""
    row = table.row(i)
    dtype, layout = DTYPES[row.pop("dtype")], LAYOUTS[row.pop("layout")]
    return BlobEntry(name=table.names[i], dtype=dtype, layout=layout, **row)


def tensor_entry(table: Table, i: int) -> TensorEntry:
    """Row `i` of a tensor table."""
    row = table.row(i)
    shape = (row["rows"], row["columns"])[: row["ndim"]]
    row_map = RowMap(ROW_ORDERS[row["row_order"]], row["row_base"], row["row_param"])
    placement = None
    if row["source"] != NO_SOURCE:
        placement = Placement(row["source"], row["start"], row["row_stride"], row["column_stride"], row["scales"])
    return TensorEntry(table.names[i], shape, DTYPES[row["source_dtype"]], row["blob"], row_map, placement)


def source_entry(table: Table, i: int) -> SourceEntry:
    """Row `i` of a source table."""
    row = table.row(i)
    return SourceEntry(table.names[i], DTYPES[row["dtype"]], tuple(row[f"dim{d}"] for d in range(row["ndim"])))


def blob_nbytes(rows: int, columns: int, dtype: str) -> int:
    """Bytes of stored rows x columns."""
    if dtype == "MXFP4":
        return rows // TILE_ROWS * (columns // mxfp4.STEP_COLUMNS) * mxfp4.STEP_BYTES
    return rows * columns * ITEM_BYTES[dtype]


def build_blob_table(specs: Sequence[BlobSpec], dtypes: Sequence[str]) -> Table:
    """Lay blobs out one after the other; `dtypes[i]` is the stored dtype of blob i."""
    rows: list[dict[str, int]] = []
    offset = 0
    for spec, dtype in zip(specs, dtypes, strict=True):
        layout = "mxfp4" if dtype == "MXFP4" else "tile16x512" if spec.is_matrix else "vector"
        columns = padded(spec.columns, STORED_COLUMNS[layout])
        nbytes = blob_nbytes(spec.rows, columns, dtype)
        codes = {"dtype": DTYPE_CODES[dtype], "layout": LAYOUT_CODES[layout]}
        rows.append({**codes, "columns": columns, "nbytes": nbytes, "offset": offset, "rows": spec.rows})
        offset += padded(nbytes, BLOB_ALIGNMENT)
    return build_table([spec.name for spec in specs], rows, BLOB_COLUMNS)


def build_tensor_table(entries: Sequence[TensorEntry]) -> Table:
    """The tensor table of entries in blob order."""
    rows = []
    for entry in entries:
        place, at = entry.row_map, entry.placement or Placement(NO_SOURCE, 0, 0, 0)
        rows.append(
            {
                "blob": entry.blob, "columns": entry.columns, "rows": entry.rows, "ndim": len(entry.shape),
                "row_base": place.base, "row_order": ROW_ORDER_CODES[place.order], "row_param": place.param,
                "source": at.source, "scales": at.scales, "start": at.start, "row_stride": at.row_stride,
                "column_stride": at.column_stride, "source_dtype": DTYPE_CODES[entry.source_dtype],
            }
        )  # fmt: skip
    return build_table([entry.name for entry in entries], rows, TENSOR_COLUMNS)


def build_source_table(entries: Sequence[SourceEntry]) -> Table:
    """The source table; empty for a checkpoint whose tensors all stand alone."""
    rows = []
    for entry in entries:
        dims = (*entry.shape, *[0] * (MAX_SOURCE_DIMENSIONS - len(entry.shape)))
        sizes = {f"dim{d}": size for d, size in enumerate(dims)}
        rows.append({**sizes, "dtype": DTYPE_CODES[entry.dtype], "ndim": len(entry.shape)})
    return build_table([entry.name for entry in entries], rows, SOURCE_COLUMNS)
