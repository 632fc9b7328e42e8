"""MXFP4: E2M1 codes in blocks of 32 with one E8M0 scale each; decoding, quantising and the tile layout.

Source: OCP Microscaling Formats (MX) v1.0, sections 5.2 and 6.3. A block of 32 elements is 16 bytes, element 2b in the low
nibble of byte b; its scale byte s means 2^(s - 127), 255 is NaN and refused.

Tile layout 3 stores a row block of 16 rows, for each step of 128 columns, as 1024 bytes of codes ([16 rows][4 blocks][16])
and 64 bytes of scales ([16 rows][4 blocks]): lane 4g+t of a warp owns block t of rows g and g+8, 16 bytes each, and the
one scale that belongs to it (specs/format.md, "Tile layout 3").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .constants import TILE_ROWS
from .dtypes import Bits, ConversionLoss
from .rope import F32
from .rows import HALF, RowMap

U8 = NDArray[np.uint8]

BLOCK_ELEMENTS = 32
BLOCK_BYTES = 16
STEP_BLOCKS = 4
STEP_COLUMNS = STEP_BLOCKS * BLOCK_ELEMENTS
STEP_BYTES = TILE_ROWS * STEP_BLOCKS * (BLOCK_BYTES + 1)
SCALE_NAN = 255
_LARGEST_SCALE = 252  # 6 * 2^(252 - 127) is the largest that float32 holds
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

_CHUNK_BLOCKS = 960  # float32 copies of a chunk stay below the size from which malloc maps fresh pages
_CODES_BYTES = TILE_ROWS * STEP_BLOCKS * BLOCK_BYTES
_ROW_CODES = np.dtype(f"V{STEP_BLOCKS * BLOCK_BYTES}")  # one row of one step
_ROW_SCALES = np.dtype("<u4")
_LARGEST_EXPONENT = 2  # of E2M1: 6 = 1.5 * 2^2
_SIGNED = np.array([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], np.float32)
_PAIRS = np.stack([_SIGNED[np.arange(256) & 15], _SIGNED[np.arange(256) >> 4]], axis=1)  # both elements of a byte
_FACTORS = np.append(np.ldexp(np.float32(1.0), np.arange(SCALE_NAN) - 127), np.float32(np.nan)).astype(np.float32)
_MANTISSA_BITS = {"BF16": 7, "F16": 10, "F32": 23}
# Smallest |x| / scale that reaches each code, and whether a tie goes up to it (to the even code).
_THRESHOLDS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


@dataclass(frozen=True)
class QuantisedRows:
    """codes: uint8 [rows, blocks, 16]; scales: uint8 [rows, blocks]."""

    codes: U8
    scales: U8


def decode_blocks(codes: U8, scales: U8) -> F32:
    """float32 values [..., blocks * 32] of codes uint8 [..., blocks, 16] and scales uint8 [..., blocks].

    Exact, but for values of 2^128 and more, which become infinite; NaN for scale 255.
    """
    values = _PAIRS[codes].reshape(*codes.shape[:-1], BLOCK_ELEMENTS)
    with np.errstate(over="ignore"):  # 4 and 6 at scale 253, 2 to 6 at 254 are beyond float32
        values *= _FACTORS[scales][..., None]
    result: F32 = values.reshape(*codes.shape[:-2], -1)
    return result


def quantise_rows(bits: Bits, dtype: str, search: bool = False) -> QuantisedRows:
    """Quantise finite values [rows, columns] given as BF16, F16 or F32 bit patterns; a last block is filled with zeros.

    Scales follow OCP MX 6.3: 2^(floor(log2(max |x|)) - 2), elements are rounded to nearest, ties to even codes, and
    saturate at 6. With `search` the scale is the one of half, once and twice that with the least squared error, written
    with the largest scale that keeps the values. Quantising decoded values again gives the same codes and scales.
    """
    rows, num_blocks = len(bits), -(-bits.shape[1] // BLOCK_ELEMENTS)
    by_block, mantissa_bits = _by_block(bits, dtype)
    codes, scales = np.empty((len(by_block), BLOCK_BYTES), np.uint8), np.empty(len(by_block), np.uint8)
    for start in range(0, len(by_block), _CHUNK_BLOCKS):
        chunk = slice(start, start + _CHUNK_BLOCKS)
        codes[chunk], scales[chunk] = _quantise_blocks(by_block[chunk], mantissa_bits, search)
    return QuantisedRows(codes.reshape(rows, num_blocks, BLOCK_BYTES), scales.reshape(rows, num_blocks))


def _by_block(bits: Bits, dtype: str) -> tuple[Bits, int]:
    """Bit patterns [blocks, 32] in BF16 or F32, and how many bits their mantissa has."""
    if dtype == "F16":  # FP16's subnormals are float32 normals
        bits, dtype = bits.view(np.float16).astype(np.float32).view(np.uint32), "F32"
    rows, columns = bits.shape
    if columns % BLOCK_ELEMENTS or not bits.flags.c_contiguous:
        whole = np.zeros((rows, -(-columns // BLOCK_ELEMENTS) * BLOCK_ELEMENTS), bits.dtype)
        whole[:, :columns] = bits
        bits = whole
    return bits.reshape(-1, BLOCK_ELEMENTS), _MANTISSA_BITS[dtype]


def _quantise_blocks(bits: Bits, mantissa_bits: int, search: bool) -> tuple[U8, U8]:
    """Codes uint8 [blocks, 16] and scales uint8 [blocks]."""
    magnitude = bits & bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    exponents = (_block_max(magnitude) >> bits.dtype.type(mantissa_bits)).astype(np.int32)
    scales = np.maximum(exponents - _LARGEST_EXPONENT, 0)
    if search:
        scales = _best_scales(magnitude, scales, mantissa_bits)
    codes = _encode(magnitude, scales, mantissa_bits)
    if search:
        _raise_scales(codes, scales)
    codes |= ((bits >> bits.dtype.type(8 * bits.itemsize - 4)) & bits.dtype.type(8)).astype(np.uint8)  # signs
    pairs = codes.view("<u2")  # even element in the low byte, odd one in the high byte
    return (pairs | (pairs >> np.uint16(4))).astype(np.uint8), scales.astype(np.uint8)


def _block_max(magnitude: Bits) -> Bits:
    """Largest of each block, [blocks]: halving whole arrays takes half the time of `max` along rows of 32."""
    flat = magnitude.reshape(-1)
    while len(flat) > len(magnitude):
        flat = np.maximum(flat[0::2], flat[1::2])
    return flat


def quantisation_loss(bits: Bits, dtype: str, quantised: QuantisedRows) -> ConversionLoss:
    """What quantising rows [rows, columns] of bit patterns did."""
    by_block, mantissa_bits = _by_block(bits, dtype)
    codes, scales = quantised.codes.reshape(-1, BLOCK_BYTES), quantised.scales.reshape(-1)
    total = ConversionLoss()
    for start in range(0, len(by_block), _CHUNK_BLOCKS):
        chunk = slice(start, start + _CHUNK_BLOCKS)
        total += _blocks_loss(by_block[chunk], mantissa_bits, codes[chunk], scales[chunk])
    return total


def _blocks_loss(bits: Bits, mantissa_bits: int, codes: U8, scales: U8) -> ConversionLoss:
    """Magnitudes alone: a sign is always kept. Twice a code's value is a small integer, told by three comparisons."""
    magnitude = bits & bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    pairs = codes.astype(np.uint16)
    code = ((pairs | (pairs << np.uint16(4))) & np.uint16(0x0707)).astype("<u2", copy=False).view(np.uint8)
    doubled = code + (code >= 5).view(np.uint8)
    doubled += (code >= 6).view(np.uint8)
    doubled += (code >= 7).view(np.uint8) * np.uint8(3)
    values, decoded = _magnitudes(magnitude, mantissa_bits), doubled.astype(np.float32)
    decoded *= (_FACTORS[scales] * np.float32(0.5))[:, None]
    error = np.subtract(values, decoded, out=decoded)
    max_abs_error = float(max(error.max(initial=0.0), -error.min(initial=0.0)))
    return ConversionLoss(
        rounded=int(np.count_nonzero(error != 0.0)),
        flushed=int(np.count_nonzero(magnitude) - np.count_nonzero(doubled)),
        max_abs_error=max_abs_error,
        signal_power=_power(values, float(values.max(initial=0.0))),
        noise_power=_power(error, max_abs_error),
    )


def _power(values: F32, largest: float) -> float:
    """Sum of squares, in place: scaled where the square of the largest magnitude would leave float32's range."""
    exponent = min(max(math.frexp(largest)[1], -100), 120)
    if abs(exponent) < 40:
        exponent = 0
    else:
        values *= np.float32(2.0**-exponent)
    return float(np.square(values, out=values).sum()) * 4.0**exponent


def _magnitudes(magnitude: Bits, mantissa_bits: int) -> F32:
    """float32 values of bit patterns without sign."""
    return (magnitude.astype(np.uint32) << np.uint32(23 - mantissa_bits)).view(np.float32)


def _encode(magnitude: Bits, scales: NDArray[np.int32], mantissa_bits: int) -> U8:
    """Codes without sign, uint8 [blocks, 32]: the exponent field minus the scale's is the exponent of x / scale.

    Where x is subnormal or falls below the smallest normal, the difference no longer orders as a float; such values are
    far below half of the smallest code, except under the smallest scales, which the exact path takes.
    """
    signed = np.int16 if magnitude.itemsize == 2 else np.int32
    shift = np.clip((scales.astype(np.int64) - 127) << mantissa_bits, np.iinfo(signed).min + 1, None).astype(signed)
    relative: Bits = np.subtract(magnitude.view(signed), shift[:, None])
    codes = np.zeros(magnitude.shape, np.uint8)
    for limit, tie_goes_up in _THRESHOLDS:
        threshold = signed(int(np.float32(limit).view(np.uint32)) >> (23 - mantissa_bits))
        reached = relative >= threshold if tie_goes_up else relative > threshold
        codes += reached.view(np.uint8)
    tiny = scales <= _LARGEST_EXPONENT
    if tiny.any():
        codes[tiny] = _encode_exact(magnitude[tiny], scales[tiny], mantissa_bits)
    return codes


def _encode_exact(magnitude: Bits, scales: NDArray[np.int32], mantissa_bits: int) -> U8:
    """Codes without sign through float64, for blocks near the smallest scale."""
    relative = np.ldexp(_magnitudes(magnitude, mantissa_bits).astype(np.float64), (127 - scales)[:, None])
    codes = np.zeros(relative.shape, np.uint8)
    for limit, tie_goes_up in _THRESHOLDS:
        codes += (relative >= limit) if tie_goes_up else (relative > limit)
    return codes


def _best_scales(magnitude: Bits, base: NDArray[np.int32], mantissa_bits: int) -> NDArray[np.int32]:
    """Of base + 1, base, base - 1 the one with the least squared error."""
    values = _magnitudes(magnitude, mantissa_bits).astype(np.float64)
    best, least = base, np.full(base.shape, np.inf)
    for step in (1, 0, -1):
        scales = np.clip(base + step, 0, _LARGEST_SCALE)
        decoded = np.ldexp(_SIGNED[_encode(magnitude, scales, mantissa_bits)].astype(np.float64), (scales - 127)[:, None])
        error = np.square(values - decoded).sum(axis=1)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    return best


def _raise_scales(codes: U8, scales: NDArray[np.int32]) -> None:
    """Double scales, in place, as long as every value stays one of E2M1's: one value, one way to write it.

    Without it a block whose codes are all even multiples would be found under another scale when quantised again.
    `codes` have no signs.
    """
    halved = np.array([0, 0, 1, 0, 2, 3, 4, 5], np.uint8)  # code of half the value; 0.5 and 1.5 have none
    for _ in range(3):  # from 4 or 6 down to 0.5 or 1.5
        odd = (codes == 1) | (codes == 3)
        rising = ~odd.any(axis=1) & codes.any(axis=1) & (scales < _LARGEST_SCALE)
        if not rising.any():
            break
        codes[rising] = halved[codes[rising]]
        scales[rising] += 1
    scales[~codes.any(axis=1)] = 0


def tiles_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """Shape of the uint8 array that holds `rows` x `columns`: [row blocks, steps, bytes of a step]."""
    return -(-rows // TILE_ROWS), -(-columns // STEP_COLUMNS), STEP_BYTES


def pack_tiles(quantised: QuantisedRows, tiles: U8, row_map: RowMap) -> None:
    """Write logical rows into tiles uint8 [row blocks, steps, 1088]; padding becomes zero.

    As `tiles.pack_rows`: whole heads for "rope", and "pair8" leaves the other slot untouched.
    """
    codes, scales = quantised.codes, quantised.scales
    missing = -len(codes) % row_map.rows_per_block
    if missing:
        codes, scales = (np.concatenate((a, np.zeros((missing, *a.shape[1:]), np.uint8))) for a in (codes, scales))
    rows, num_blocks = scales.shape
    whole, rest = divmod(num_blocks, STEP_BLOCKS)
    for flat, piece, stored in _piece_views(codes.reshape(rows, -1), scales, tiles):
        if whole:
            logical = flat[:, : whole * piece.itemsize].view(piece)
            left, right = _ordered(logical, stored[:, :whole], row_map, whole)
            np.copyto(right, left)
        if rest:  # the last step is not full
            last = np.zeros((rows, piece.itemsize), np.uint8)
            last[:, : flat.shape[1] - whole * piece.itemsize] = flat[:, whole * piece.itemsize :]
            left, right = _ordered(last.view(piece), stored[:, whole:], row_map, 1)
            np.copyto(right, left)


def unpack_tiles(tiles: U8, num_rows: int, columns: int, row_map: RowMap) -> QuantisedRows:
    """Inverse of `pack_tiles`: codes [num_rows, ceil(columns / 32), 16] and scales [num_rows, ceil(columns / 32)]."""
    rows = -(-num_rows // row_map.rows_per_block) * row_map.rows_per_block
    steps, blocks = tiles.shape[1], -(-columns // BLOCK_ELEMENTS)
    codes = np.empty((rows, steps * STEP_BLOCKS * BLOCK_BYTES), np.uint8)
    scales = np.empty((rows, steps * STEP_BLOCKS), np.uint8)
    for flat, piece, stored in _piece_views(codes, scales, tiles):
        logical, place = _ordered(flat.view(piece), stored, row_map, steps)
        np.copyto(logical, place)
    return QuantisedRows(codes.reshape(rows, -1, BLOCK_BYTES)[:num_rows, :blocks], scales[:num_rows, :blocks])


def _piece_views(codes: U8, scales: U8, tiles: U8) -> list[tuple[U8, np.dtype[Any], NDArray[Any]]]:
    """For codes and for scales: row-major bytes, the piece that one row has in one step, and the pieces in the tiles."""
    stored_codes = tiles[..., :_CODES_BYTES].view(_ROW_CODES)
    stored_scales = tiles[..., _CODES_BYTES:].view(_ROW_SCALES)
    return [(codes, _ROW_CODES, stored_codes), (scales, _ROW_SCALES, stored_scales)]


def _ordered(logical: NDArray[Any], stored: NDArray[Any], row_map: RowMap, steps: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both sides with equal shapes; stored is [row blocks, steps, 16]."""
    if row_map.order == "pair8":
        slot = stored[:, :, row_map.param * HALF :][:, :, :HALF]
        return logical.reshape(-1, HALF, steps), slot.transpose(0, 2, 1)
    if row_map.order == "rope":
        blocks = row_map.param // TILE_ROWS
        return logical.reshape(-1, 2, blocks, HALF, steps), _split(stored, blocks).transpose(0, 3, 1, 4, 2)
    return logical.reshape(-1, TILE_ROWS, steps), stored.transpose(0, 2, 1)


def _split(stored: NDArray[Any], blocks: int) -> NDArray[Any]:
    """[row blocks, steps, 16] as [heads, blocks, steps, 2, 8] without a copy: the pieces of a step lie side by side."""
    outer, step, piece = stored.strides
    shape = (len(stored) // blocks, blocks, stored.shape[1], 2, HALF)
    return np.lib.stride_tricks.as_strided(stored, shape, (outer * blocks, outer, step, HALF * piece, piece))
