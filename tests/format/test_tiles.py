"""Row orders and the tile codec, against references written from the formulas of specs/format.md alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.format import tiles
from megalith.format.rows import RowMap, rope_order_applies

PROPERTY = settings(max_examples=120, deadline=None)


def place(order: str, parameter: int, r: int) -> int:
    """Stored row of logical row r, from "Row orders"."""
    if order == "pair8":
        return 16 * (r // 8) + 8 * parameter + r % 8
    if order == "rope":
        i = r % parameter
        return parameter * (r // parameter) + 16 * ((i % (parameter // 2)) // 8) + 8 * (i // (parameter // 2)) + i % 8
    return r


def position(r: int, c: int, columns: int) -> int:
    """Element number of stored element (r, c), from "Tile layout 2"."""
    return (((r // 16) * (columns // 32) + c // 32) * 16 + r % 16) * 32 + c % 32


def owned_by_lane(lane: int, step: int) -> list[tuple[int, int]]:
    """(row, column) within a row block of the two 16-byte pieces of a lane, from "Tile layout 2"."""
    g, t = divmod(lane, 4)
    return [(g + half, 32 * step + 8 * t + k) for half in (0, 8) for k in range(8)]


@st.composite
def matrices(draw: st.DrawFn) -> tuple[RowMap, np.ndarray]:
    order = draw(st.sampled_from(["sequential", "pair8", "rope"]))
    parameter = {"sequential": 0, "pair8": draw(st.integers(0, 1)), "rope": 16 * draw(st.integers(1, 5))}[order]
    num_rows = draw(st.integers(1, 90)) if order != "rope" else parameter * draw(st.integers(1, 3))
    columns = draw(st.integers(1, 700))
    bits = np.random.default_rng(draw(st.integers(0, 2**32))).integers(1, 2**16, (num_rows, columns), np.uint16)
    return RowMap(order, 0, parameter), bits


def empty_tiles(row_map: RowMap, num_rows: int, columns: int, fill: int) -> tiles.Tiles:
    return np.full(tiles.tiles_shape(row_map.stored_span(num_rows), columns), fill, np.uint16)


@PROPERTY
@given(matrices())
def test_packing_is_the_formula(case: tuple[RowMap, np.ndarray]):
    row_map, bits = case
    num_rows, columns = bits.shape
    packed = empty_tiles(row_map, num_rows, columns, 0)
    tiles.pack_rows(bits, packed, row_map)
    stored_columns = packed.shape[1] * 32
    expected = np.zeros(packed.size, np.uint16)
    rows = [place(row_map.order, row_map.param, r) for r in range(num_rows)]
    for r, stored in enumerate(rows):
        start = [position(stored, c, stored_columns) for c in range(0, columns, 32)]
        for c, at in zip(range(0, columns, 32), start, strict=True):
            piece = bits[r, c : c + 32]
            expected[at : at + len(piece)] = piece
    assert np.array_equal(packed.ravel(), expected)
    assert row_map.stored_rows(num_rows).tolist() == rows
    assert row_map.stored_span(num_rows) == len(packed) * 16 > max(rows)


@PROPERTY
@given(matrices())
def test_unpacking_inverts_packing(case: tuple[RowMap, np.ndarray]):
    row_map, bits = case
    packed = empty_tiles(row_map, *bits.shape, 0xFFFF)
    tiles.pack_rows(bits, packed, row_map)
    assert np.array_equal(tiles.unpack_rows(packed, *bits.shape, row_map), bits)


@PROPERTY
@given(matrices())
def test_padding_is_zero(case: tuple[RowMap, np.ndarray]):
    """Whatever the buffer held, but for the slot of the other tensor under pair8, which is left alone."""
    row_map, bits = case
    packed = empty_tiles(row_map, *bits.shape, 0xFFFF)
    tiles.pack_rows(bits, packed, row_map)
    by_row = packed.transpose(0, 2, 1, 3).reshape(len(packed) * 16, -1)
    used = np.zeros(len(by_row), bool)
    used[row_map.stored_rows(len(bits))] = True
    assert not by_row[:, bits.shape[1] :][used].any()
    others = by_row[~used]
    if row_map.order == "pair8":
        mine = np.arange(len(by_row)) // 8 % 2 == row_map.param
        assert (by_row[~mine] == 0xFFFF).all()
        others = by_row[~used & mine]
    assert not others.any()


@PROPERTY
@given(st.integers(0, 200), st.integers(1, 40), st.data())
def test_positions_are_inverse(row: int, steps: int, data: st.DataObject):
    column = data.draw(st.integers(0, 32 * steps - 1))
    at = tiles.element_position(row, column, 32 * steps)
    assert at == position(row, column, 32 * steps)
    assert tiles.element_at(at, 32 * steps) == (row, column)


def test_positions_fill_a_blob():
    found = sorted(tiles.element_position(r, c, 96) for r in range(48) for c in range(96))
    assert found == list(range(48 * 96))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_lane_owns_two_pieces_of_a_step(step: int):
    """Pieces 4g + t and 32 + 4g + t of the 64 pieces of 16 bytes; a warp reads 512 consecutive bytes twice."""
    for lane in range(32):
        elements = [tiles.element_position(r, c, 96) - step * 512 for r, c in owned_by_lane(lane, step)]
        assert elements == [*range(8 * lane, 8 * lane + 8), *range(256 + 8 * lane, 256 + 8 * lane + 8)]


def test_fragments_multiply():
    """The registers of "Tile layout 2", fed to m16n8k16 as the PTX manual defines it, give the matrix product."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(-4, 5, (16, 32)).astype(np.float32), rng.integers(-4, 5, (32, 8)).astype(np.float32)
    product = np.zeros((16, 8), np.float32)
    for first in (0, 4):  # elements of the pieces that the instruction takes
        fragment_a, fragment_b = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        for lane in range(32):
            g, t = divmod(lane, 4)
            piece_low, piece_high, x = a[g, 8 * t :][:8], a[g + 8, 8 * t :][:8], b[8 * t :, g][:8]
            for k in range(2):
                fragment_a[g, 2 * t + k], fragment_a[g + 8, 2 * t + k] = piece_low[first + k], piece_high[first + k]
                fragment_a[g, 2 * t + 8 + k] = piece_low[first + 2 + k]
                fragment_a[g + 8, 2 * t + 8 + k] = piece_high[first + 2 + k]
                fragment_b[2 * t + k, g], fragment_b[2 * t + 8 + k, g] = x[first + k], x[first + 2 + k]
        product += fragment_a @ fragment_b
    assert np.array_equal(product, a @ b)


@pytest.mark.parametrize(("columns", "pages"), [(32, 1), (512, 1), (513, 2), (576, 2), (1024, 2), (2880, 6)])
def test_pages(columns: int, pages: int):
    assert tiles.pages_per_block(columns) == pages


def test_two_tensors_share_a_block():
    gate, up = np.full((20, 24), 1, np.uint16), np.full((20, 24), 2, np.uint16)
    packed = np.empty(tiles.tiles_shape(48, 24), np.uint16)
    for slot, bits in enumerate((gate, up)):
        tiles.pack_rows(bits, packed, RowMap("pair8", 0, slot))
    assert packed[:, 0, :, 0].ravel().tolist() == [1] * 8 + [2] * 8 + [1] * 8 + [2] * 8 + [1] * 4 + [0] * 4 + [2] * 4 + [0] * 4


@pytest.mark.parametrize(("head_dim", "applies"), [(16, True), (64, True), (128, True), (24, False), (10, False)])
def test_rope_order_applies(head_dim: int, applies: bool):
    assert rope_order_applies(head_dim) == applies


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
def test_rotated_rows_share_a_block_eight_apart(head_dim: int):
    stored = RowMap("rope", 32, head_dim).stored_rows(2 * head_dim).reshape(2, 2, head_dim // 2)
    assert (stored[:, 1] - stored[:, 0] == 8).all()
    assert (stored // 16 % 1 == 0).all()
    assert sorted(stored.ravel().tolist()) == list(range(32, 32 + 2 * head_dim))
