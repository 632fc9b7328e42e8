"""MXFP4: decoding, quantising and tiles, against references written from the text of specs/format.md alone."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tiles import place

from megalith.format import mxfp4
from megalith.format.dtypes import BIT_TYPES, widen
from megalith.format.mxfp4 import QuantisedRows, decode_blocks, pack_tiles, quantisation_loss, quantise_rows, unpack_tiles
from megalith.format.rows import RowMap

PROPERTY = settings(max_examples=300, deadline=None)
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EVEN_FIRST = (0, 2, 4, 6, 1, 3, 5, 7)
FINITE_BITS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F80_0000}  # the first magnitude that is not
ONE = {"BF16": 0x3F80, "F16": 0x3C00, "F32": 0x3F80_0000}


def value(code: int, scale: int) -> float:
    """An element in float64, from "MXFP4"."""
    return math.ldexp(math.copysign(MAGNITUDES[code & 7], -1 if code & 8 else 1), scale - 127)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Codes of elements [..., 32] of blocks of 16 bytes."""
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], 32)


def nearest(values: np.ndarray, scale: int) -> np.ndarray:
    """Magnitude codes of one block: the nearest, of two the even one."""
    relative = np.ldexp(np.abs(values), 127 - scale)
    distance = np.abs(relative[:, None] - np.array([MAGNITUDES[code] for code in EVEN_FIRST]))
    return np.array(EVEN_FIRST)[distance.argmin(axis=1)]  # the first of equals


def ocp_scale(values: np.ndarray) -> int:
    largest = float(np.abs(values).max())
    return max(math.frexp(largest)[1] - 1 - 2 + 127, 0) if largest else 0


def squared_error(values: np.ndarray, codes: np.ndarray, scale: int) -> float:
    return float(np.square(np.abs(values) - np.ldexp(np.array(MAGNITUDES)[codes], scale - 127)).sum())


def candidates(values: np.ndarray) -> list[tuple[float, int]]:
    """Error and scale of those a search looks at."""
    base = ocp_scale(values)
    scales = [min(max(base + step, 0), 252) for step in (1, 0, -1)]
    return [(squared_error(values, nearest(values, s), s), s) for s in scales]


def blocks_of(bits: np.ndarray, dtype: str) -> np.ndarray:
    """float64 [rows, blocks, 32], the last block filled with zeros."""
    values = widen(bits, dtype).astype(np.float64)
    return np.pad(values, ((0, 0), (0, -values.shape[1] % 32))).reshape(len(values), -1, 32)


@st.composite
def bit_patterns(draw: st.DrawFn, dtypes: tuple[str, ...] = ("BF16", "F16", "F32")) -> tuple[np.ndarray, str]:
    """Finite elements of many kinds, and their dtype."""
    dtype, kind = draw(st.sampled_from(dtypes)), draw(st.sampled_from(["any", "near", "ties", "small", "large", "zeros"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 140))
    unsigned = BIT_TYPES[dtype]
    top, bits = FINITE_BITS[dtype], np.dtype(unsigned).itemsize * 8
    if kind == "any":
        magnitude = rng.integers(0, top, shape)
    elif kind == "near":  # within some octaves of each other
        magnitude = rng.integers(*sorted(rng.choice(top, 2, replace=False)), shape)
        magnitude = np.minimum(magnitude, int(magnitude.min()) + ONE[dtype] // 8)
    elif kind == "ties":
        eighths = rng.integers(0, 64, shape) / 8 * 2.0 ** rng.integers(-9, 9)
        magnitude = narrowed(eighths, dtype).astype(np.int64)
    elif kind == "small":
        magnitude = rng.integers(0, top // 16 if rng.random() < 0.5 else 200, shape)
    elif kind == "large":
        magnitude = top - 1 - rng.integers(0, top // 16, shape)
    else:
        magnitude = rng.integers(0, top, shape) * (rng.random(shape) < 0.1)
    signs = rng.integers(0, 2, shape) << (bits - 1)
    return (magnitude | signs).astype(unsigned), dtype


def narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """Bit patterns of values that the dtype holds exactly."""
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.astype(np.float32).view(np.uint32)
    return bits if dtype == "F32" else (bits >> 16).astype(np.uint16)


def test_every_code_and_scale_decodes_exactly():
    bytes_of_all_codes = np.array([low | (low + 8) % 16 << 4 for low in range(16)], np.uint8)
    codes = np.broadcast_to(bytes_of_all_codes, (255, 1, 16))
    found = decode_blocks(codes, np.arange(255, dtype=np.uint8)[:, None])
    assert found.dtype == np.float32
    for scale in range(255):
        for k in range(32):
            code = (int(bytes_of_all_codes[k // 2]) >> 4 * (k % 2)) & 15
            exact = value(code, scale)
            if abs(exact) >= 2.0**128:
                exact = math.copysign(math.inf, exact)
            assert float(found[scale, k]) == exact
            assert math.copysign(1, found[scale, k]) == math.copysign(1, exact)


def test_beyond_float32_is_infinite():
    codes = np.full((3, 1, 16), 0x76, np.uint8)  # 4 and 6
    found = decode_blocks(codes, np.array([[252], [253], [254]], np.uint8))
    assert np.isfinite(found[0]).all()
    assert np.isinf(found[1:]).all()


def test_scale_255_is_nan():
    found = decode_blocks(np.arange(16, dtype=np.uint8)[None, None], np.array([[255]], np.uint8))
    assert np.isnan(found).all()


def test_low_nibble_comes_first():
    codes = np.zeros((1, 1, 16), np.uint8)
    codes[0, 0, :2] = 0x21, 0xF7
    assert decode_blocks(codes, np.array([[128]], np.uint8))[0, :4].tolist() == [1.0, 2.0, 12.0, -12.0]


@PROPERTY
@given(bit_patterns())
def test_quantising_is_the_rule(case: tuple[np.ndarray, str]):
    bits, dtype = case
    found = quantise_rows(bits, dtype)
    blocks = blocks_of(bits, dtype)
    assert found.codes.shape == (*blocks.shape[:2], 16)
    assert found.scales.shape == blocks.shape[:2]
    for row, b in np.ndindex(*blocks.shape[:2]):
        scale = ocp_scale(blocks[row, b])
        assert found.scales[row, b] == scale
        signs = np.signbit(blocks[row, b]) * 8
        assert nibbles(found.codes[row, b]).tolist() == (nearest(blocks[row, b], scale) | signs).tolist()


@PROPERTY
@given(bit_patterns())
def test_search_is_a_brute_force(case: tuple[np.ndarray, str]):
    """The least error of three scales, no worse than the rule's, at the largest scale that keeps the values."""
    bits, dtype = case
    found, plain = quantise_rows(bits, dtype, True), quantise_rows(bits, dtype)
    blocks = blocks_of(bits, dtype)
    for row, b in np.ndindex(*blocks.shape[:2]):
        values, scale = blocks[row, b], int(found.scales[row, b])
        codes = nibbles(found.codes[row, b])
        magnitudes = codes & 7
        assert (codes >> 3).tolist() == np.signbit(values).tolist()
        tried = candidates(values)
        error, least = squared_error(values, magnitudes, scale), min(tried)[0]
        assert error <= least * (1 + 1e-9)
        assert error <= squared_error(values, nibbles(plain.codes[row, b]) & 7, int(plain.scales[row, b])) * (1 + 1e-9)
        decoded = np.ldexp(np.array(MAGNITUDES)[magnitudes], scale - 127)
        equal = [s for e, s in tried if np.array_equal(np.ldexp(np.array(MAGNITUDES)[nearest(values, s)], s - 127), decoded)]
        assert equal
        if not magnitudes.any():
            assert scale == 0
        else:
            halves = np.array(MAGNITUDES)[magnitudes] / 2
            assert scale == 252 or not np.isin(halves, MAGNITUDES).all()


@PROPERTY
@given(bit_patterns(), st.booleans())
def test_quantising_again_changes_nothing(case: tuple[np.ndarray, str], search: bool):
    bits, dtype = case
    once = quantise_rows(bits, dtype, search)
    decoded = decode_blocks(once.codes, once.scales)
    for kind in ("F32", "BF16"):  # both hold every decoded value
        again = quantise_rows(narrowed(decoded, kind), kind, search)
        assert np.array_equal(again.scales, once.scales)
        assert np.array_equal(again.codes, once.codes)


@PROPERTY
@given(st.integers(0, 2**32), st.integers(0, 252), st.booleans())
def test_any_code_and_scale_that_quantising_makes_is_stable(seed: int, scale: int, search: bool):
    """Values of arbitrary codes, not only those that quantising gives: once quantised they stay."""
    codes = np.random.default_rng(seed).integers(0, 256, (1, 3, 16), np.uint8)
    values = decode_blocks(codes, np.full((1, 3), scale, np.uint8))
    once = quantise_rows(values.view(np.uint32), "F32", search)
    assert np.array_equal(decode_blocks(once.codes, once.scales), values) or not search
    again = quantise_rows(decode_blocks(once.codes, once.scales).view(np.uint32), "F32", search)
    assert np.array_equal(again.codes, once.codes)
    assert np.array_equal(again.scales, once.scales)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("search", [False, True])
def test_zeros_of_both_signs(dtype: str, search: bool):
    bits = narrowed(np.array([[0.0, -0.0] * 16]), dtype)
    found = quantise_rows(bits, dtype, search)
    assert (found.codes.tolist(), found.scales.tolist()) == ([[[0x80] * 16]], [[0]])


@pytest.mark.parametrize(
    ("value", "code"),
    [(0.25, 0), (0.26, 1), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6), (5.01, 7), (6.0, 7), (7.99, 7)],
)
def test_ties_and_saturation(value: float, code: int):
    """Elements of a block whose scale is 1, since its largest magnitude is below 8 and at least 4."""
    block = np.full((1, 32), value, np.float32)
    block[0, 1:3] = -value, 4.0
    found = quantise_rows(block.view(np.uint32), "F32")
    assert found.scales.tolist() == [[127]]
    assert nibbles(found.codes)[0, 0, :3].tolist() == [code, code | 8, 6]


@pytest.mark.parametrize(("dtype", "scale"), [("BF16", 252), ("F32", 252), ("F16", 140)])
def test_largest_finite_values_saturate(dtype: str, scale: int):
    bits = np.full((2, 33), FINITE_BITS[dtype] - 1, BIT_TYPES[dtype])
    found = quantise_rows(bits, dtype)
    assert found.scales.tolist() == [[scale] * 2] * 2
    assert set(found.codes[:, 0].ravel().tolist()) == {0x77}
    assert np.isfinite(decode_blocks(found.codes, found.scales)).all()


@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 64, 95])
def test_a_last_block_is_filled(columns: int):
    bits = np.full((3, columns), 0xBF80, np.uint16)
    found = quantise_rows(bits, "BF16")
    assert found.codes.shape == (3, -(-columns // 32), 16)
    decoded = decode_blocks(found.codes, found.scales)
    assert (decoded[:, :columns] == -1.0).all()
    assert not decoded[:, columns:].any()


def test_views_are_quantised_as_copies():
    bits = np.random.default_rng(5).integers(0x3C00, 0x4400, (40, 128), np.uint16)
    for view in (bits[::2, :64], bits[:, 1:33], bits.T):
        for dtype in ("BF16", "F16"):
            found, expected = quantise_rows(view, dtype), quantise_rows(view.copy(), dtype)
            assert np.array_equal(found.codes, expected.codes)
            assert np.array_equal(found.scales, expected.scales)


@PROPERTY
@given(bit_patterns(), st.booleans())
def test_losses_are_counted(case: tuple[np.ndarray, str], search: bool):
    bits, dtype = case
    found = quantise_rows(bits, dtype, search)
    loss = quantisation_loss(bits, dtype, found)
    values = widen(bits, dtype).astype(np.float64)
    decoded = decode_blocks(found.codes, found.scales)[:, : bits.shape[1]].astype(np.float64)
    changed = values != decoded
    assert loss.rounded == changed.sum()
    assert loss.flushed == (changed & (decoded == 0)).sum()
    assert loss.nonfinite == 0
    assert loss.max_abs_error == np.abs(values - decoded).max()
    assert loss.signal_power == pytest.approx(np.square(values).sum(), rel=1e-4)
    assert loss.noise_power == pytest.approx(np.square(values - decoded).sum(), rel=1e-4)


@pytest.mark.parametrize("exponent", [-126, -70, 0, 70, 127])
def test_powers_do_not_leave_their_range(exponent: int):
    """Squares of float32 values need more than float32's range."""
    bits = np.full((4, 1000), (exponent + 127) << 7 | 1, np.uint16)
    loss = quantisation_loss(bits, "BF16", quantise_rows(bits, "BF16"))
    assert loss.signal_power == pytest.approx(4000 * (129 / 128 * 2.0**exponent) ** 2, rel=1e-4)
    assert loss.noise_power == pytest.approx(4000 * (1 / 128 * 2.0**exponent) ** 2, rel=1e-4)
    assert loss.sqnr_db == pytest.approx(20 * math.log10(129), rel=1e-4)


@st.composite
def quantised(draw: st.DrawFn) -> tuple[RowMap, QuantisedRows, int]:
    """A row map, random codes and scales, and columns."""
    order = draw(st.sampled_from(["sequential", "pair8", "rope"]))
    parameter = {"sequential": 0, "pair8": draw(st.integers(0, 1)), "rope": 16 * draw(st.integers(1, 5))}[order]
    num_rows = draw(st.integers(1, 90)) if order != "rope" else parameter * draw(st.integers(1, 3))
    columns = draw(st.integers(1, 600))
    rng, blocks = np.random.default_rng(draw(st.integers(0, 2**32))), -(-columns // 32)
    codes = rng.integers(1, 256, (num_rows, blocks, 16), np.uint8)
    return RowMap(order, 0, parameter), QuantisedRows(codes, rng.integers(1, 256, (num_rows, blocks), np.uint8)), columns


def empty_tiles(row_map: RowMap, num_rows: int, columns: int, fill: int) -> np.ndarray:
    return np.full(mxfp4.tiles_shape(row_map.stored_span(num_rows), columns), fill, np.uint8)


@PROPERTY
@given(quantised())
def test_packing_is_the_formula(case: tuple[RowMap, QuantisedRows, int]):
    row_map, rows, columns = case
    packed = empty_tiles(row_map, len(rows.codes), columns, 0)
    pack_tiles(rows, packed, row_map)
    num_steps, expected = -(-columns // 128), np.zeros(packed.size, np.uint8)
    for r, b in np.ndindex(*rows.scales.shape):
        stored, c = place(row_map.order, row_map.param, r), 32 * b
        step = ((stored // 16) * num_steps + c // 128) * 1088
        codes = step + stored % 16 * 64 + c % 128 // 2
        expected[codes : codes + 16] = rows.codes[r, b]
        expected[step + 1024 + stored % 16 * 4 + c % 128 // 32] = rows.scales[r, b]
    assert np.array_equal(packed.ravel(), expected)


@PROPERTY
@given(quantised())
def test_unpacking_inverts_packing(case: tuple[RowMap, QuantisedRows, int]):
    row_map, rows, columns = case
    packed = empty_tiles(row_map, len(rows.codes), columns, 0xEE)
    pack_tiles(rows, packed, row_map)
    found = unpack_tiles(packed, len(rows.codes), columns, row_map)
    assert np.array_equal(found.codes, rows.codes)
    assert np.array_equal(found.scales, rows.scales)


@PROPERTY
@given(quantised())
def test_padding_is_zero(case: tuple[RowMap, QuantisedRows, int]):
    """Whatever the buffer held, but for the slot of the other tensor under pair8, which is left alone."""
    row_map, rows, columns = case
    packed = empty_tiles(row_map, len(rows.codes), columns, 0xEE)
    pack_tiles(rows, packed, row_map)
    fresh = empty_tiles(row_map, len(rows.codes), columns, 0)
    pack_tiles(rows, fresh, row_map)
    if row_map.order == "pair8":
        other = RowMap("pair8", 0, 1 - row_map.param)
        zeros = QuantisedRows(np.zeros_like(rows.codes), np.zeros_like(rows.scales))
        before = unpack_tiles(packed, len(rows.codes), columns, other)
        assert (before.codes == 0xEE).all()
        assert (before.scales == 0xEE).all()
        pack_tiles(zeros, packed, other)
    assert np.array_equal(packed, fresh)


def test_packing_part_of_a_larger_buffer():
    """As the packer does: a slice of a buffer of more row blocks."""
    rows = quantise_rows(np.random.default_rng(1).integers(0, 0x4000, (32, 300), np.uint16), "BF16")
    for row_map in (RowMap(), RowMap("rope", 0, 32), RowMap("pair8", 0, 1)):
        num_blocks = row_map.stored_span(32) // 16
        buffer = np.zeros((num_blocks + 3, 3, mxfp4.STEP_BYTES), np.uint8)
        pack_tiles(rows, buffer[1 : 1 + num_blocks], row_map)
        found = unpack_tiles(buffer[1 : 1 + num_blocks], 32, 300, row_map)
        assert np.array_equal(found.codes, rows.codes)
        assert np.array_equal(found.scales, rows.scales)
        assert not buffer[0].any()
        assert not buffer[1 + num_blocks :].any()


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_feeds_eight_instructions(step: int):
    """The lane's bytes of "Tile layout 3", fed to m16n8k16 as the PTX manual defines it, give the matrix product."""
    rng = np.random.default_rng(step)
    weights = QuantisedRows(rng.integers(0, 256, (16, 8, 16), np.uint8), rng.integers(125, 130, (16, 8), np.uint8))
    packed = np.empty((1, 2, mxfp4.STEP_BYTES), np.uint8)
    pack_tiles(weights, packed, RowMap())
    w = decode_blocks(weights.codes, weights.scales)[:, 128 * step : 128 * step + 128]
    x = rng.integers(-4, 5, (128, 8)).astype(np.float32)
    data, product = packed[0, step], np.zeros((16, 8), np.float32)
    scales_read: list[int] = []
    for q in range(8):
        fragment_a, fragment_b = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        for lane in range(32):
            g, t = divmod(lane, 4)
            for half, (unit, scale_at) in enumerate(((lane, 1024 + lane), (32 + lane, 1056 + lane))):
                codes = data[16 * unit : 16 * unit + 16]
                scales_read += [scale_at] if q == 0 else []
                for k in range(4):
                    element = 4 * q + k
                    code = int(codes[element // 2]) >> 4 * (element % 2) & 15
                    column = 2 * t + k % 2 + 8 * (k // 2)  # a0..a3 of row g or g + 8, then a4..a7
                    fragment_a[g + 8 * half, column] = value(code, int(data[scale_at]))
            for k in range(4):
                fragment_b[2 * t + k % 2 + 8 * (k // 2), g] = x[32 * t + 4 * q + k, g]
        product += fragment_a @ fragment_b
    assert np.array_equal(product, w @ x)
    assert sorted(scales_read) == list(range(1024, 1088))  # each belongs to one lane
