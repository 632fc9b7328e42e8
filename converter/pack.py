"""Packing one blob: source rows in, tiles out, a slice at a time (specs/format.md, "Device image").

A slice is about 1 MiB, so that what is read, hashed, permuted and written stays in a core's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from megalith.format import mxfp4
from megalith.format.checksums import Checksums, ChunkHasher
from megalith.format.constants import STEP_COLUMNS, TILE_ROWS
from megalith.format.dtypes import BIT_TYPES, Bits
from megalith.format.entries import BlobEntry
from megalith.format.model import BlobSpec, PartSpec
from megalith.format.records import TensorRecord
from megalith.format.tiles import pack_rows

from .mapping import PartSource
from .part_reader import PartReader, RowRegion
from .plan import Options
from .source import Checkpoint

SLICE_BYTES = 1 << 20

Write = Callable[[int, "memoryview | bytes"], None]


@dataclass(frozen=True)
class PackedBlob:
    """What is known of a blob once its bytes are written: chunk checksums, and one record per part."""

    checksums: Checksums
    records: list[TensorRecord]


def pack_blob(
    checkpoint: Checkpoint,
    spec: BlobSpec,
    entry: BlobEntry,
    sources: dict[str, PartSource],
    options: Options,
    write: Write,
) -> PackedBlob:
    """Write blob `entry` with its padding; `write(offset, data)` takes offsets from the start of the blob."""
    region = RowRegion(checkpoint)
    readers = {p.role: PartReader(checkpoint, sources[p.role], p, entry.dtype, options, region) for p in spec.parts}
    hasher, offset = ChunkHasher(), 0
    pieces = _vector_pieces(spec, entry, readers) if entry.layout == "vector" else _tile_pieces(spec, entry, readers)
    for piece in pieces:
        view = piece.data.cast("B")
        hasher.update(view)
        write(offset, view)
        offset += len(view)
    padding = bytes(entry.extent_bytes - offset)
    hasher.update(padding)
    write(offset, padding)
    return PackedBlob(hasher.digests(), [readers[part.role].record() for part in spec.parts])


def _vector_pieces(spec: BlobSpec, entry: BlobEntry, readers: dict[str, PartReader]) -> Iterator[Bits]:
    stored = np.zeros(entry.rows, BIT_TYPES[entry.dtype])
    for part in spec.parts:
        stored[part.row_map.stored_rows(part.rows)] = readers[part.role].rows(0, part.rows)[:, 0]
    yield stored


def _tile_pieces(spec: BlobSpec, entry: BlobEntry, readers: dict[str, PartReader]) -> Iterator[Bits]:
    """Slices of whole row blocks; parts that share row blocks are packed together."""
    wanted = max(1, SLICE_BYTES // entry.block_bytes)
    for _, group in groupby(spec.parts, key=lambda part: part.row_map.base):
        parts = list(group)
        unit = parts[0].row_map.param // TILE_ROWS if parts[0].row_map.order == "rope" else 1
        num_blocks = parts[0].row_map.stored_span(parts[0].rows) // TILE_ROWS
        count = min(max(1, wanted // unit) * unit, num_blocks)
        tiles = _empty_tiles(count, entry)
        for first in range(0, num_blocks, count):
            piece = tiles[: min(count, num_blocks - first)]
            for part in parts:
                _pack_part(part, readers[part.role], first, piece, entry.dtype)
            yield piece


def _empty_tiles(num_blocks: int, entry: BlobEntry) -> Bits:
    if entry.dtype == "MXFP4":
        return np.empty((num_blocks, entry.columns // mxfp4.STEP_COLUMNS, mxfp4.STEP_BYTES), np.uint8)
    return np.empty((num_blocks, entry.columns // STEP_COLUMNS, TILE_ROWS, STEP_COLUMNS), np.uint16)


def _pack_part(part: PartSpec, reader: PartReader, first_block: int, tiles: Bits, dtype: str) -> None:
    start = first_block * part.row_map.rows_per_block
    stop = min(part.rows, start + len(tiles) * part.row_map.rows_per_block)
    if dtype == "MXFP4":
        mxfp4.pack_tiles(reader.quantised_rows(start, stop), tiles, part.row_map)
    else:
        pack_rows(reader.rows(start, stop), tiles, part.row_map)
