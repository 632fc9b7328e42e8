"""Tensors of an open file, read a few MiB at a time: as they lie in one blob, or as the checkpoint had them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import mxfp4
from .constants import STEP_COLUMNS, TILE_ROWS
from .dtypes import BIT_TYPES, ITEM_BYTES, Bits, widen
from .entries import NO_SOURCE, BlobEntry, SourceEntry, TensorEntry
from .errors import RequestError
from .mxfp4 import QuantisedRows
from .rope import F32
from .tiles import padded, unpack_rows

if TYPE_CHECKING:
    from .reader import PackedFile

_SLICE_BYTES = 4 << 20


def rows_per_unit(entry: TensorEntry) -> int:
    """Slices of a tensor begin at multiples of this many rows: a row block's worth, or a whole head."""
    order = entry.row_map
    return order.param if order.order == "rope" else TILE_ROWS


def row_span(blob: BlobEntry, entry: TensorEntry, start: int, stop: int) -> tuple[int, int]:
    """Offset within the blob and number of bytes of the row blocks of a matrix that hold logical rows [start, stop)."""
    first, last = (entry.row_map.stored_span(n) // TILE_ROWS for n in (start, stop))
    return (entry.row_map.base // TILE_ROWS + first) * blob.block_bytes, (last - first) * blob.block_bytes


def decode_codes(data: bytes | bytearray | memoryview, entry: TensorEntry, num_rows: int) -> QuantisedRows:
    """MXFP4 codes and scales of logical rows out of the row blocks that hold them."""
    steps = padded(entry.columns, mxfp4.STEP_COLUMNS) // mxfp4.STEP_COLUMNS
    tiles = np.frombuffer(data, np.uint8).reshape(-1, steps, mxfp4.STEP_BYTES)
    return mxfp4.unpack_tiles(tiles, num_rows, entry.columns, entry.row_map)


def decode_rows(data: bytes | bytearray | memoryview, blob: BlobEntry, entry: TensorEntry, num_rows: int) -> F32:
    """float32 values [num_rows, columns] of logical rows of a matrix out of the row blocks that hold them."""
    if blob.dtype == "MXFP4":
        found = decode_codes(data, entry, num_rows)
        return mxfp4.decode_blocks(found.codes, found.scales)[:, : entry.columns]
    tiles = np.frombuffer(data, np.uint16).reshape(-1, blob.columns // STEP_COLUMNS, TILE_ROWS, STEP_COLUMNS)
    return widen(unpack_rows(tiles, num_rows, entry.columns, entry.row_map), blob.dtype)


class PackedTensor:
    """One tensor of an open file; nothing is read before `bits`, `to_numpy`, `rows` or `slices`."""

    def __init__(self, file: PackedFile, number: int) -> None:
        self._file = file
        self.number = number
        self.entry: TensorEntry = file.index.tensor(number)
        self.blob: BlobEntry = file.index.blob(self.entry.blob)

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> str:
        """The dtype of what is read: BF16, F16 or F32; BF16, which holds every decoded value, for stored MXFP4."""
        return "BF16" if self.blob.dtype == "MXFP4" else self.blob.dtype

    def slices(self) -> Iterator[Bits]:
        """Bit patterns [rows, columns] of consecutive rows in logical order, a few MiB at a time."""
        unit = rows_per_unit(self.entry)
        count = max(1, _SLICE_BYTES // (self.entry.columns * ITEM_BYTES[self.dtype]) // unit) * unit
        for start in range(0, self.entry.rows, count):
            yield self.rows(start, min(start + count, self.entry.rows))

    def rows(self, start: int, stop: int) -> Bits:
        """Bit patterns [stop - start, columns] of logical rows; `start` must be a multiple of `rows_per_unit`."""
        entry, blob = self.entry, self.blob
        if blob.dtype == "MXFP4":
            found = self.quantised_rows(start, stop)
            values = mxfp4.decode_blocks(found.codes, found.scales)[:, : entry.columns]
            return (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)  # exact: two significant bits
        whole = self._whole_rows(start, stop)
        if blob.layout == "vector":
            stored = np.frombuffer(self._file.read_image(blob.offset, blob.nbytes), BIT_TYPES[blob.dtype])
            return stored[entry.row_map.stored_rows(entry.rows)[start:stop]][:, None]
        offset, nbytes = row_span(blob, entry, start, whole)
        tiles = np.frombuffer(self._file.read_image(blob.offset + offset, nbytes), np.uint16)
        tiles = tiles.reshape(-1, blob.columns // STEP_COLUMNS, TILE_ROWS, STEP_COLUMNS)
        return unpack_rows(tiles, whole - start, entry.columns, entry.row_map)[: stop - start]

    def quantised_rows(self, start: int, stop: int) -> QuantisedRows:
        """Codes and scales of logical rows of an MXFP4 tensor; `start` as for `rows`."""
        whole = self._whole_rows(start, stop)
        offset, nbytes = row_span(self.blob, self.entry, start, whole)
        found = decode_codes(self._file.read_image(self.blob.offset + offset, nbytes), self.entry, whole - start)
        return QuantisedRows(found.codes[: stop - start], found.scales[: stop - start])

    def _whole_rows(self, start: int, stop: int) -> int:
        """`stop` rounded up to whole units."""
        unit, rows = rows_per_unit(self.entry), self.entry.rows
        if not 0 <= start < stop <= rows or start % unit:
            raise RequestError(f"{self.name}: rows {start} to {stop} of {rows} do not start at a multiple of {unit}")
        return min(padded(stop, unit), rows)

    def bits(self) -> Bits:
        """The whole tensor as bit patterns in its logical shape."""
        return np.concatenate(list(self.slices())).reshape(self.shape)

    def to_numpy(self) -> NDArray[Any]:
        """The whole tensor as in the checkpoint: ml_dtypes.bfloat16, float16 or float32; decoded to bfloat16 from MXFP4."""
        return as_numpy(self.bits(), self.dtype)

    def to_float32(self) -> F32:
        """The whole tensor widened to float32."""
        return widen(self.bits(), self.dtype)

    def pieces(self) -> Iterator[Bits]:
        """All elements in row-major order, in flat pieces: what a checkpoint file holds."""
        for rows in self.slices():
            yield rows.reshape(-1)


class PackedSource:
    """A checkpoint tensor whose elements lie in several blobs: experts fused into one, or MXFP4 codes or scales."""

    def __init__(self, file: PackedFile, number: int) -> None:
        self.entry: SourceEntry = file.index.source(number)
        columns = file.index.tensors.columns
        self._is_scales = bool((columns["scales"] == number).any())
        held = np.flatnonzero(columns["scales" if self._is_scales else "source"] == number)
        tensors = [PackedTensor(file, i) for i in held[np.argsort(columns["start"][held], kind="stable")].tolist()]
        self._parts = [_SourcePart(tensor, self._is_scales) for tensor in tensors]

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> str:
        """The dtype of what is read: U8 for MXFP4 codes and scales, else that of the tensors in it."""
        return "U8" if self.entry.dtype == "U8" else self._parts[0].tensor.dtype

    def pieces(self) -> Iterator[Bits]:
        """All elements in row-major order, in flat pieces."""
        for group in self._groups():
            first, columns = group[0], group[0].columns
            side_by_side = all(
                part.column_stride == 1 and part.columns == columns and part.row_stride == len(group) * columns
                for part in group
            )
            yield from _interleaved(group) if side_by_side else [_scattered(group, first.start)]

    def _groups(self) -> Iterator[list[_SourcePart]]:
        """Runs of parts whose ranges of elements overlap."""
        group: list[_SourcePart] = []
        end = 0
        for part in self._parts:
            if group and part.start >= end:
                yield group
                group = []
            group.append(part)
            end = max(end, part.end)
        yield group

    def to_numpy(self) -> NDArray[Any]:
        """The whole tensor as in the checkpoint."""
        return as_numpy(np.concatenate(list(self.pieces())).reshape(self.shape), self.dtype)


class _SourcePart:
    """One tensor as a source sees it: places in the source's elements."""

    def __init__(self, tensor: PackedTensor, is_scales: bool) -> None:
        assert tensor.entry.placement is not None
        place, self.tensor, self._is_scales = tensor.entry.placement, tensor, is_scales
        self._is_native = tensor.entry.source_dtype == "MXFP4"
        scale = mxfp4.BLOCK_BYTES if is_scales else 1
        self.start, self.row_stride, self.column_stride = place.start // scale, place.row_stride // scale, place.column_stride
        self.rows, self.columns = tensor.entry.rows, tensor.entry.columns
        if self._is_native:
            self.columns //= 32 if is_scales else 2
        self.end = self.start + (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
        self.dtype = np.dtype(np.uint8) if self._is_native else np.dtype(BIT_TYPES[tensor.dtype])

    def read(self, start: int, stop: int) -> Bits:
        """[stop - start, columns] elements."""
        if not self._is_native:
            return self.tensor.rows(start, stop)
        found = self.tensor.quantised_rows(start, stop)
        return found.scales if self._is_scales else found.codes.reshape(stop - start, -1)


def _interleaved(group: list[_SourcePart]) -> Iterator[Bits]:
    """Parts whose rows alternate, or one part alone, some rows at a time."""
    first = group[0]
    unit = rows_per_unit(first.tensor.entry)
    count = max(1, _SLICE_BYTES // (len(group) * first.columns * first.dtype.itemsize) // unit) * unit
    for start in range(0, first.rows, count):
        stop = min(start + count, first.rows)
        rows = np.empty((stop - start, len(group), first.columns), first.dtype)
        for i, part in enumerate(group):
            rows[:, i] = part.read(start, stop)
        yield rows.reshape(-1)


def _scattered(group: list[_SourcePart], base: int) -> Bits:
    """Parts at any strides, such as one expert's transposed gate and up, as a whole."""
    flat = np.zeros(max(part.end for part in group) - base, group[0].dtype)
    for part in group:
        size = flat.itemsize
        strides = (part.row_stride * size, part.column_stride * size)
        view = np.lib.stride_tricks.as_strided(flat[part.start - base :], (part.rows, part.columns), strides)
        view[...] = part.read(0, part.rows)
    return flat


def as_numpy(bits: Bits, dtype: str) -> NDArray[Any]:
    """Bit patterns as an array of their values' type."""
    if dtype == "BF16":
        import ml_dtypes

        return bits.view(ml_dtypes.bfloat16)
    return bits if dtype == "U8" else bits.view(np.float16 if dtype == "F16" else np.float32)


class Tensors(Mapping[str, PackedTensor]):
    """The tensors of an open file by name, in file order; `source` finds those that the checkpoint held fused."""

    def __init__(self, file: PackedFile) -> None:
        self._file = file
        self._numbers = {name: i for i, name in enumerate(file.index.tensors.names)}
        self._sources = {name: i for i, name in enumerate(file.index.sources.names)}

    def __getitem__(self, name: str) -> PackedTensor:
        return PackedTensor(self._file, self._numbers[name])

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def source(self, name: str) -> PackedSource:
        """A tensor of the checkpoint that several tensors share; KeyError when it is none."""
        return PackedSource(self._file, self._sources[name])

    def checkpoint(self) -> Iterator[PackedTensor | PackedSource]:
        """Every tensor of the checkpoint: those that stand alone, then those that several tensors share."""
        alone = np.flatnonzero(self._file.index.tensors.columns["source"] == NO_SOURCE)
        for number in alone.tolist():
            yield PackedTensor(self._file, number)
        for number in self._sources.values():
            yield PackedSource(self._file, number)
