"""Element types: widening, narrowing with counted losses, and the search for values that are not finite.

Arrays of 16-bit floats are carried as uint16 bit patterns, float32 as uint32 or float32 (specs/format.md, "Element types").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .constants import DTYPES
from .errors import CheckpointError

Bits = NDArray[Any]  # uint16 or uint32, see BIT_TYPES

DTYPE_CODES = {name: code for code, name in DTYPES.items()}
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1}
BIT_TYPES: dict[str, type[np.uint16] | type[np.uint32]] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000}


@dataclass(frozen=True)
class ConversionLoss:
    """What a change of dtype did to one tensor: counts of elements, the largest absolute difference, and for MXFP4 the
    sums of squares of values and of differences.
    """

    rounded: int = 0
    flushed: int = 0
    nonfinite: int = 0
    max_abs_error: float = 0.0
    signal_power: float = 0.0
    noise_power: float = 0.0

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantisation noise ratio in decibels; None where nothing was quantised or nothing lost."""
        if self.noise_power <= 0.0 or self.signal_power <= 0.0:
            return None
        return 10.0 * math.log10(self.signal_power / self.noise_power)

    def __add__(self, other: ConversionLoss) -> ConversionLoss:
        return ConversionLoss(
            self.rounded + other.rounded,
            self.flushed + other.flushed,
            self.nonfinite + other.nonfinite,
            max(self.max_abs_error, other.max_abs_error),
            self.signal_power + other.signal_power,
            self.noise_power + other.noise_power,
        )


def widen(bits: Bits, dtype: str) -> NDArray[np.float32]:
    """The float32 values of a bit-pattern array of any shape; exact for every dtype."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "F16":
        return bits.view(np.float16).astype(np.float32)
    return bits.view(np.float32)


def narrow(values: NDArray[np.float32], dtype: str) -> Bits:
    """Bit patterns of float32 values in `dtype`, rounded to nearest even; finite values may become infinite."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    is_nan = np.isnan(values)
    if is_nan.any():  # rounding could carry a NaN's payload into infinity
        rounded[is_nan] = ((bits[is_nan] >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
    return rounded


def count_nonfinite(bits: Bits, dtype: str) -> int:
    """Number of NaN and infinite elements; two reductions when there are none."""
    if not bits.size:
        return 0
    infinity = _INFINITY[dtype]
    sign = 1 << (8 * bits.itemsize - 1)
    signed = bits.view(np.int16 if bits.itemsize == 2 else np.int32)
    if int(signed.max()) < infinity and int(bits.max()) < (sign | infinity):
        return 0
    return int(np.count_nonzero((bits & np.asarray(sign - 1, bits.dtype)) >= infinity))


def convert_bits(bits: Bits, source: str, target: str) -> tuple[Bits, ConversionLoss]:
    """Bit patterns in `target` and what was lost; CheckpointError when a finite value overflows to infinity."""
    nonfinite = count_nonfinite(bits, source)
    if source == target:
        return bits, ConversionLoss(nonfinite=nonfinite)
    values = widen(bits, source)
    result = narrow(values, target)
    overflowed = count_nonfinite(result, target) - nonfinite
    if overflowed:
        largest = float(np.max(np.abs(values[np.isfinite(values)])))
        raise CheckpointError(f"{overflowed} finite values up to {largest:g} overflow {target}")
    back = widen(result, target)
    with np.errstate(invalid="ignore"):
        error = np.abs(back.astype(np.float64) - values)
    error[~np.isfinite(error)] = 0.0
    changed = error != 0.0
    loss = ConversionLoss(
        rounded=int(np.count_nonzero(changed)),
        flushed=int(np.count_nonzero(changed & (back == 0.0))),
        nonfinite=nonfinite,
        max_abs_error=float(error.max(initial=0.0)),
    )
    return result, loss
