"""Chunk checksums: XXH3-64 over every 128 KiB of each extent (specs/format.md, "Checksums section").

An extent is one blob with its padding, or the whole rope, files or records section. Chunks restart at each extent, so
that extents are written and verified independently. 128 KiB is small enough to name a handful of pages and large
enough for xxhash to release the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from .constants import CHUNK_BYTES
from .header import Section
from .index import Index

Checksums = NDArray[np.uint64]


@dataclass(frozen=True)
class Extent:
    """A checksummed range of the file; its chunk i is number `first_chunk + i` of the file."""

    name: str
    offset: int
    nbytes: int
    first_chunk: int

    @property
    def num_chunks(self) -> int:
        return -(-self.nbytes // CHUNK_BYTES)


def extents_of(index: Index, sections: Sequence[Section]) -> list[Extent]:
    """All extents in file order: blobs, then rope, files and records."""
    by_kind = {section.kind: section for section in sections}
    ranges = []
    image = by_kind["image"].offset
    offsets = index.blobs.columns["offset"].tolist()
    for name, start, stop in zip(index.blobs.names, offsets, [*offsets[1:], index.image_bytes], strict=True):
        ranges.append((name, image + start, stop - start))
    ranges += [(kind, by_kind[kind].offset, by_kind[kind].nbytes) for kind in ("rope", "files", "records")]
    extents, first_chunk = [], 0
    for name, offset, nbytes in ranges:
        extents.append(Extent(name, offset, nbytes, first_chunk))
        first_chunk += extents[-1].num_chunks
    return extents


def num_chunks(extents: Sequence[Extent]) -> int:
    """Number of checksums in the file."""
    return extents[-1].first_chunk + extents[-1].num_chunks


class ChunkHasher:
    """Checksums of one extent whose bytes arrive in order, in pieces of any size."""

    def __init__(self) -> None:
        self._digests: list[int] = []
        self._partial = xxhash.xxh3_64()
        self._partial_bytes = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take the next bytes of the extent."""
        view = memoryview(data).cast("B")
        position = 0
        while position < len(view):
            taken = min(CHUNK_BYTES - self._partial_bytes, len(view) - position)
            piece = view[position : position + taken]
            position += taken
            if taken == CHUNK_BYTES:
                self._digests.append(xxhash.xxh3_64_intdigest(piece))
                continue
            self._partial.update(piece)
            self._partial_bytes += taken
            if self._partial_bytes == CHUNK_BYTES:
                self._close_chunk()

    def digests(self) -> Checksums:
        """uint64 [num_chunks]; ends the extent."""
        if self._partial_bytes:
            self._close_chunk()
        return np.array(self._digests, np.uint64)

    def _close_chunk(self) -> None:
        self._digests.append(self._partial.intdigest())
        self._partial.reset()
        self._partial_bytes = 0
