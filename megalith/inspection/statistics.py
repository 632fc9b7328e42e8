"""Statistics of a tensor's values, streamed: a histogram over bit patterns gives all but the place of the largest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.format.dtypes import BIT_TYPES, Bits, widen
from megalith.format.reader import PackedFile
from megalith.format.tensors import PackedTensor

from .plain import jsonable
from .table import aligned

_EXPONENT = {"BF16": (7, 0xFF, 127), "F16": (10, 0x1F, 15), "F32": (23, 0xFF, 127)}  # shift, mask, bias
_BAR = 50
_MAX_EXPONENT_LINES = 24

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Statistics:
    """Of the finite values, but for the counts; std is that of the population. `exponents[e]` counts |w| in [2^e, 2^(e+1)).

    `abs_max_in` is the tensor that holds the largest magnitude, at (row, column) `abs_max_at` of it.
    """

    count: int
    minimum: float
    maximum: float
    mean: float
    std: float
    abs_max: float
    abs_max_at: tuple[int, int]
    abs_max_in: str
    zeros: int
    subnormals: int
    nans: int
    infinities: int
    exponents: dict[int, int]

    def to_dict(self, ndim: int) -> dict[str, Any]:
        """JSON-ready; the place of the largest magnitude has as many coordinates as the tensor has dimensions."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "abs_max_in"}
        exponents = {str(exponent): count for exponent, count in self.exponents.items()}
        return jsonable({**values, "abs_max_at": self.abs_max_at[:ndim], "exponents": exponents})  # type: ignore[no-any-return]


def statistics(*tensors: PackedTensor) -> Statistics:
    """Of one tensor, or of several of one dtype together; read once, a few MiB at a time. MXFP4 as decoded."""
    dtype = tensors[0].dtype
    patterns, counts, (holder, at) = _histogram(tensors)
    shift, mask, bias = _EXPONENT[dtype]
    exponent = (patterns >> shift) & mask
    fraction = patterns & ((1 << shift) - 1)
    is_finite = exponent != mask
    values = widen(patterns.astype(BIT_TYPES[dtype]), dtype).astype(np.float64)[is_finite]
    weights = counts[is_finite]
    total = int(weights.sum())
    mean = float((values * weights).sum() / total) if total else math.nan
    is_normal = is_finite & (exponent != 0)
    histogram = np.bincount(exponent[is_normal], counts[is_normal], mask + 1).astype(np.int64)
    return Statistics(
        count=int(counts.sum()),
        minimum=float(values.min(initial=math.inf)) if total else math.nan,
        maximum=float(values.max(initial=-math.inf)) if total else math.nan,
        mean=mean,
        std=math.sqrt(float((np.square(values - mean) * weights).sum() / total)) if total else math.nan,
        abs_max=float(np.abs(values).max()) if total else math.nan,
        abs_max_at=at,
        abs_max_in=holder,
        zeros=int(counts[(exponent == 0) & (fraction == 0)].sum()),
        subnormals=int(counts[(exponent == 0) & (fraction != 0)].sum()),
        nans=int(counts[~is_finite & (fraction != 0)].sum()),
        infinities=int(counts[~is_finite & (fraction == 0)].sum()),
        exponents={int(code) - bias: int(histogram[code]) for code in np.flatnonzero(histogram)},
    )


def _histogram(tensors: Sequence[PackedTensor]) -> tuple[Counts, Counts, tuple[str, tuple[int, int]]]:
    """Bit patterns that occur, their counts, and the tensor and (row, column) of the first finite largest magnitude."""
    dtype = tensors[0].dtype
    dense = np.zeros(1 << 16, np.int64)  # of 16-bit patterns
    sparse: list[Bits] = []  # patterns of F32: vectors only, which come in one slice
    largest, holder, at = -1, "", (0, 0)
    for tensor in tensors:
        first_row = 0
        for bits in tensor.slices():
            if dtype == "F32":
                sparse.append(bits.ravel())
            else:
                dense += np.bincount(bits.ravel(), minlength=1 << 16)
            magnitude, place = _largest(bits, dtype)
            if magnitude > largest:
                row, column = divmod(place, bits.shape[1])
                largest, holder, at = magnitude, tensor.name, (first_row + row, column)
            first_row += len(bits)
    if sparse:
        patterns, counts = np.unique(np.concatenate(sparse), return_counts=True)
        return patterns.astype(np.int64), counts.astype(np.int64), (holder, at)
    return np.flatnonzero(dense), dense[dense > 0], (holder, at)


def _largest(bits: Bits, dtype: str) -> tuple[int, int]:
    """Bit pattern without sign of the largest finite magnitude, and its flat index; patterns order as magnitudes do."""
    shift, mask, _ = _EXPONENT[dtype]
    magnitudes = bits & bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    if int(magnitudes.max()) >= mask << shift:
        magnitudes[magnitudes >= mask << shift] = 0
    place = int(magnitudes.argmax())
    return int(magnitudes.flat[place]), place


def statistics_text(data: dict[str, Any]) -> list[str]:
    """Lines for one tensor's `Statistics.to_dict`."""
    place = ", ".join(map(str, data["abs_max_at"]))
    holder = f" of {data['abs_max_in']}" if "abs_max_in" in data else ""
    lines = [
        f"  elements   {data['count']:,}",
        f"  range      {_number(data['minimum'])} to {_number(data['maximum'])}",
        f"  mean, std  {_number(data['mean'])}, {_number(data['std'])}",
        f"  largest    |w| = {_number(data['abs_max'])} at ({place}){holder}",
        f"  zeros {data['zeros']:,}  subnormals {data['subnormals']:,}  NaN {data['nans']:,}  infinite {data['infinities']:,}",
        "  magnitudes, share of all elements (without zeros and subnormals)",
    ]
    exponents = sorted(((int(exponent), count) for exponent, count in data["exponents"].items()), reverse=True)
    most = max((count for _, count in exponents), default=1)
    for exponent, count in exponents[:_MAX_EXPONENT_LINES]:
        bar = "#" * math.ceil(_BAR * count / most)
        lines.append(f"  2^{exponent:<4} {100 * count / data['count']:8.4f} %  {bar}")
    rest = exponents[_MAX_EXPONENT_LINES:]
    if rest:
        lines.append(f"  smaller {100 * sum(count for _, count in rest) / data['count']:7.4f} %  down to 2^{rest[-1][0]}")
    return lines


def all_statistics(packed: PackedFile, show_progress: bool) -> list[dict[str, Any]]:
    """Statistics of every tensor in file order, with a progress bar on stderr if wanted."""
    from tqdm import tqdm

    rows = []
    bar = tqdm(packed.tensors.values(), total=len(packed.tensors), unit="tensor", desc="reading", disable=not show_progress)
    for tensor in bar:
        found = statistics(tensor).to_dict(len(tensor.shape))
        rows.append({"name": tensor.name, "dtype": tensor.blob.dtype, "shape": list(tensor.shape), **found})
    return rows


def all_statistics_text(rows: list[dict[str, Any]]) -> list[str]:
    """One line per tensor."""
    names = ("minimum", "maximum", "mean", "std", "abs_max")
    cells = [[row["name"] for row in rows]]
    cells += [[_number(row[name]) for row in rows] for name in names]
    cells.append([",".join(map(str, row["abs_max_at"])) for row in rows])
    cells += [[str(row[name]) for row in rows] for name in ("zeros", "subnormals", "nans", "infinities")]
    headings = ("name", "min", "max", "mean", "std", "|max|", "at", "zeros", "subnormals", "NaN", "infinite")
    return [aligned(headings, cells, (0,))]


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
