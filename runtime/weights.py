"""The NumPy backend's weights: float32 matrices decoded from the packed tiles, once or at every use.

sgemv runs at memory speed and NumPy cannot widen bfloat16 faster, so decoding speed asks for a float32 copy, twice the
packed size. It is made at load when it fits `cache_bytes`; otherwise the packed image stays in memory and tiles are
decoded a few MiB at a time at every use. Either way the file is not read again after loading.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megalith.format.constants import STEP_COLUMNS, TILE_ROWS
from megalith.format.dtypes import BIT_TYPES, widen
from megalith.format.entries import TensorEntry
from megalith.format.reader import PackedFile
from megalith.format.rope import F32
from megalith.format.tensors import decode_rows, row_span, rows_per_unit

_SLICE_BYTES = 4 << 20


def default_cache_bytes() -> int:
    """Half of the memory that is available now."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        available = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    return available // 2


class Weights:
    """Matrices and vectors of a packed file by blob number, in logical row order, the parts of a blob one after the other."""

    def __init__(self, packed: PackedFile, cache_bytes: int | None = None) -> None:
        index = packed.index
        self._blobs = [index.blob(i) for i in range(len(index.blobs))]
        self._parts: list[list[TensorEntry]] = [[] for _ in self._blobs]
        for i in range(len(index.tensors)):
            entry = index.tensor(i)
            self._parts[entry.blob].append(entry)
        self._vectors: dict[int, F32] = {}
        self._matrices: dict[int, F32] = {}
        self._packed: dict[int, memoryview] = {}
        wide_bytes = sum(4 * blob.rows * blob.columns for blob in self._blobs)
        self.is_cached = wide_bytes <= (default_cache_bytes() if cache_bytes is None else cache_bytes)
        for number in range(len(self._blobs)):
            self._load(packed, number)

    def _load(self, packed: PackedFile, number: int) -> None:
        blob = self._blobs[number]
        data = packed.read_image(blob.offset, blob.nbytes)
        if blob.layout == "vector":
            rows = np.concatenate([part.row_map.stored_rows(part.rows) for part in self._parts[number]])
            self._vectors[number] = widen(np.frombuffer(data, BIT_TYPES[blob.dtype])[rows], blob.dtype)
            return
        self._packed[number] = memoryview(data)
        if self.is_cached:
            self._matrices[number] = np.concatenate(list(self._decoded(number)))
            del self._packed[number]

    def vector(self, number: int) -> F32:
        """float32 [rows]."""
        return self._vectors[number]

    def matrices(self) -> list[F32]:
        """The cached float32 matrices; empty when tiles are decoded at every use."""
        return list(self._matrices.values())

    def _decoded(self, number: int) -> Iterator[F32]:
        """Consecutive rows of a matrix, float32 [some, columns], decoded from its tiles."""
        blob, data = self._blobs[number], self._packed[number]
        for part in self._parts[number]:
            unit = rows_per_unit(part)
            count = max(1, _SLICE_BYTES // (4 * blob.columns) // unit) * unit
            for start in range(0, part.rows, count):
                stop = min(start + count, part.rows)
                offset, nbytes = row_span(blob, part, start, stop)
                yield decode_rows(data[offset : offset + nbytes], blob, part, stop - start)

    def multiply(self, x: F32, number: int, bias: int = -1) -> F32:
        """x @ weight.T + bias: float32 [num_tokens, columns] -> [num_tokens, rows]."""
        pieces = [self._matrices[number]] if self.is_cached else self._decoded(number)
        # a matrix times one vector is sgemv, which runs at memory speed; sgemm with one row does not
        products = [(w @ x[0])[None] if len(x) == 1 else x @ w.T for w in pieces]
        y = products[0] if len(products) == 1 else np.concatenate(products, axis=1)
        if bias >= 0:
            y += self._vectors[bias]
        return y

    def rows(self, number: int, rows: NDArray[np.int64]) -> F32:
        """Chosen rows of a 16-bit matrix of one part: float32 [len(rows), columns]."""
        if self.is_cached:
            return self._matrices[number][rows]
        blob, columns = self._blobs[number], self._parts[number][0].columns
        tiles = np.frombuffer(self._packed[number], np.uint16).reshape(
            -1, blob.columns // STEP_COLUMNS, TILE_ROWS, STEP_COLUMNS
        )
        pieces = tiles[rows // TILE_ROWS, :, rows % TILE_ROWS]
        return widen(pieces.reshape(len(rows), blob.columns)[:, :columns], blob.dtype)
