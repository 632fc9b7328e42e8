"""A matrix as a small picture: mean magnitudes of its bins, on a logarithmic colour scale, as a PNG."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megalith.format.dtypes import Bits, count_nonfinite, widen
from megalith.format.tensors import PackedTensor

MAX_BINS = 512
ZERO, NONFINITE, FIRST_LEVEL = 0, 1, 2  # levels of a picture: two without a magnitude, then the scale from low to high
COLOUR_PERCENTILE = 0.5  # of the bins; smaller means would take most of the colours, and get the first

# Anchors of the colour scale, from small to large: even steps of lightness, also for colour-blind eyes (viridis).
_ANCHORS = (
    (68, 1, 84), (72, 36, 117), (65, 68, 135), (53, 95, 141), (42, 120, 142), (33, 145, 140),
    (34, 168, 132), (68, 191, 112), (122, 209, 81), (189, 223, 38), (253, 231, 37),
)  # fmt: skip
_ZERO_COLOUR, _NONFINITE_COLOUR = (128, 128, 128), (230, 0, 60)


@dataclass(frozen=True)
class Magnitudes:
    """`means` is float64 [row_bins, column_bins], NaN where a bin holds a value that is not finite.

    Bin i covers the rows (columns) from edges[i] up to edges[i + 1], the last one up to the tensor's end.
    """

    means: NDArray[np.float64]
    row_edges: NDArray[np.int64]
    column_edges: NDArray[np.int64]


def magnitudes(tensor: PackedTensor) -> Magnitudes:
    """Mean |w| of at most 512 x 512 bins, read a few MiB at a time; a vector is one row."""
    is_vector = len(tensor.shape) == 1
    rows, columns = (1, tensor.shape[0]) if is_vector else (tensor.entry.rows, tensor.entry.columns)
    row_edges, column_edges = _edges(rows), _edges(columns)
    sums = np.zeros((len(row_edges), len(column_edges)))
    start = 0
    for bits in tensor.slices():
        part = bits.reshape(1, -1) if is_vector else bits
        by_column = np.add.reduceat(_absolute(part, tensor.dtype), column_edges, axis=1)
        bins = np.searchsorted(row_edges, np.arange(start, start + len(part)), side="right") - 1
        first = np.flatnonzero(np.diff(bins, prepend=-1))
        sums[bins[first]] += np.add.reduceat(by_column, first, axis=0)
        start += len(part)
    counts = np.diff(row_edges, append=rows)[:, None] * np.diff(column_edges, append=columns)
    return Magnitudes(sums / counts, row_edges, column_edges)


def _edges(count: int) -> NDArray[np.int64]:
    bins = min(count, MAX_BINS)
    return np.arange(bins, dtype=np.int64) * count // bins


def _absolute(bits: Bits, dtype: str) -> NDArray[np.float64]:
    values = np.abs(widen(bits, dtype).astype(np.float64))
    if count_nonfinite(bits, dtype):
        values[np.isinf(values)] = np.nan
    return values


@dataclass(frozen=True)
class Scale:
    """A logarithmic scale from `low` to `high`, both positive."""

    low: float
    high: float

    def levels(self, means: NDArray[np.float64], count: int) -> NDArray[np.int64]:
        """Levels 0 (zero), 1 (not finite) and 2 to count - 1, evenly spaced in log |w| and clipped to the scale."""
        with np.errstate(divide="ignore", invalid="ignore"):
            place = (np.log(means) - math.log(self.low)) / max(math.log(self.high / self.low), 1e-12)
        place = np.clip(np.nan_to_num(place, nan=0.0, neginf=0.0, posinf=0.0), 0.0, 1.0)
        levels = FIRST_LEVEL + np.rint(place * (count - 1 - FIRST_LEVEL)).astype(np.int64)
        levels[means == 0.0] = ZERO
        levels[np.isnan(means)] = NONFINITE
        return levels


def scale_of(means: NDArray[np.float64], lowest_percentile: float = 0.0) -> Scale:
    """From the given percentile of the positive means to the largest; 1 to 1 when there is none."""
    positive = means[means > 0.0]
    if not positive.size:
        return Scale(1.0, 1.0)
    return Scale(float(np.percentile(positive, lowest_percentile)), float(positive.max()))


def palette() -> NDArray[np.uint8]:
    """uint8 [256, 3]: the colour of each level."""
    steps = np.linspace(0, len(_ANCHORS) - 1, 256 - FIRST_LEVEL)
    channels = [np.interp(steps, np.arange(len(_ANCHORS)), channel) for channel in zip(*_ANCHORS, strict=True)]
    colours = np.rint(np.stack(channels, axis=1)).astype(np.uint8)
    return np.concatenate([np.array([_ZERO_COLOUR, _NONFINITE_COLOUR], np.uint8), colours])


def png(levels: NDArray[np.int64]) -> bytes:
    """A PNG with 8-bit palette indices `levels` [height, width] (PNG specification, third edition)."""
    height, width = levels.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row after its filter type, 0
    rows[:, 1:] = levels
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = (b"IHDR", header), (b"PLTE", palette().tobytes()), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
