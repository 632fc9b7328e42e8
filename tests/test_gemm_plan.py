"""Shapes of `gemm_wgmma.cu`, and NumPy twins of its schedule and of its index maps."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from kernel_inputs import Matrix, as_bits, matrix, tiled_activation, widen_bits

from megalith.runtime.gemm_plan import (
    SHARED_LIMIT_BYTES,
    SPLIT_TILES,
    TOKEN_TILES,
    GemmShape,
    gemm_shape,
    qkv_shape,
)
from megalith.runtime.gpu_buffers import Limits, gemm_workspace

NUM_SMS = 132
MATRICES = [(19456, 2560, 2), (6144, 2560, 0), (2560, 9728, 1), (2560, 4096, 1), (151936, 2560, 0), (16, 32, 0), (48, 96, 2)]
TOKENS = [1, 16, 17, 64, 65, 130, 256, 257, 300, 512, 2048, 8192, 16384]


def range_begin(total: int, block: int) -> int:
    return block * (total // NUM_SMS) + min(block, total % NUM_SMS)


def tiles(shape: GemmShape, rows: int, columns: int, num_tokens: int, block: int) -> list[tuple[int, int, int, int]]:
    """(row tile, first token, first stage, end) of one block, as `Schedule::pop` goes through them."""
    row_tiles, token_tiles = -(-rows // shape.rows), -(-num_tokens // shape.tile_tokens)
    stages = -(-columns // (64 * shape.stage_panels))
    found = []
    if shape.split:
        position, stop = (range_begin(row_tiles * stages, block + i) for i in (0, 1))
        while position < stop:
            begin = position % stages
            end = min(stages, begin + stop - position)
            found.append((position // stages, 0, begin, end))
            position += end - begin
        return found
    token_band = shape.token_band(columns, num_tokens)
    for turn in range(block, shape.parts * row_tiles * token_tiles, NUM_SMS):
        part, number = divmod(turn, row_tiles * token_tiles)
        band, place = divmod(number, token_band * row_tiles)
        width = min(token_band, token_tiles - band * token_band)
        begin, end = (part_begin(shape, stages, part + i) for i in (0, 1))
        found.append((place // width, (band * token_band + place % width) * shape.tile_tokens, begin, end))
    return found


def part_begin(shape: GemmShape, stages: int, part: int) -> int:
    return stages * part // shape.parts - 4 // shape.stage_panels * part * (shape.parts - part) // 2


@pytest.mark.parametrize(("rows", "columns", "epilogue"), MATRICES)
@pytest.mark.parametrize("layout", ["tile16x512", "mxfp4"])
def test_every_stage_of_every_tile_belongs_to_one_block(rows: int, columns: int, epilogue: int, layout: str) -> None:
    for num_tokens in TOKENS:
        shapes = [gemm_shape(layout, epilogue, rows, columns, num_tokens, NUM_SMS)]
        shapes += [GemmShape(layout, epilogue, tile, 1, split=True) for tile in SPLIT_TILES if tile >= num_tokens]
        for shape in shapes:
            by_tile: dict[tuple[int, int], list[tuple[int, int]]] = {}
            for block in range(NUM_SMS):
                for row_tile, token, begin, end in tiles(shape, rows, columns, num_tokens, block):
                    by_tile.setdefault((row_tile, token), []).append((begin, end))
            row_tiles = range(-(-rows // shape.rows))
            assert sorted(by_tile) == [(r, t) for r in row_tiles for t in range(0, num_tokens, shape.tile_tokens)]
            for ranges in by_tile.values():  # in the order of the blocks: the first has the tile's start
                assert ranges[0][0] == 0
                assert ranges[-1][1] == -(-columns // (64 * shape.stage_panels))
                assert all(a[1] == b[0] for a, b in pairwise(ranges))
                assert shape.split or len(ranges) == shape.parts
                assert all(begin < end for begin, end in ranges)


def test_shapes_fit_and_are_used_well() -> None:
    limits = Limits(128, 4096, 2048, 64, NUM_SMS, 228 << 10, has_wgmma=True)
    planned = {name: nbytes for name, nbytes, _ in gemm_workspace(limits)}
    for rows, columns, epilogue in MATRICES:
        for num_tokens in TOKENS:
            for layout in ("tile16x512", "mxfp4"):
                shape = gemm_shape(layout, epilogue, rows, columns, num_tokens, NUM_SMS)
                assert shape.tile_tokens in TOKEN_TILES
                assert shape.stages >= 2
                assert shape.shared_bytes <= SHARED_LIMIT_BYTES
                assert not shape.split or shape.tile_tokens >= num_tokens
                assert shape.partials_bytes(NUM_SMS) <= planned["gemm_partials"]
                assert 4 * shape.flags(NUM_SMS) <= planned["gemm_flags"]
                assert shape.parts == 1 or shape.parts * shape.tiles(rows, num_tokens) <= NUM_SMS  # all resident
                invariant = gemm_shape(layout, epilogue, rows, columns, num_tokens, NUM_SMS, invariant=True)
                assert not invariant.split
                assert invariant.parts == 1
    assert gemm_shape("mxfp4", 1, 2560, 9728, 32, NUM_SMS).split
    for columns, num_tokens, expected in (
        (9728, 32, (1, 32, 3)), (4096, 32, (1, 32, 2)), (9728, 128, (1, 128, 3)), (4096, 128, (1, 64, 1)),
        (9728, 640, (2, 224, 2)), (4096, 640, (2, 112, 1)),
    ):  # fmt: skip
        found = gemm_shape("tile16x512", 1, 2560, columns, num_tokens, NUM_SMS)
        assert (found.row_groups, found.tile_tokens, found.parts) == expected
    large = gemm_shape("tile16x512", 0, 6144, 2560, 8192, NUM_SMS)
    assert (large.row_groups, large.tile_tokens) == (2, 256)


def test_a_fused_projection_goes_on_to_the_cache() -> None:
    for layout in ("tile16x512", "mxfp4"):
        for head_dim in (64, 128):
            for num_tokens in TOKENS:
                always = qkv_shape(layout, 6144, 2560, num_tokens, NUM_SMS, head_dim, invariant=True)
                assert always is not None
                assert not always.rows % head_dim
                assert not always.split
                assert always.stages >= 2
                assert always.shared_bytes <= SHARED_LIMIT_BYTES
                assert qkv_shape(layout, 6144, 2560, num_tokens, NUM_SMS, head_dim) in (always, None)
        assert qkv_shape(layout, 6144, 2560, 8192, NUM_SMS, 80, invariant=True) is None
    assert qkv_shape("tile16x512", 6144, 2560, 8192, NUM_SMS, 128) is not None


def warpgroup_product(weights: Matrix, tiled: np.ndarray, tile_tokens: int) -> np.ndarray:
    """Sums [4 warps, 32 lanes, tile_tokens / 2] of the first 64 rows: A from page bytes, B through swizzled descriptors."""
    elements = weights.packed.view(np.uint16).reshape(weights.row_blocks, weights.steps, 16 * 32)
    lane, sums = np.arange(32), np.zeros((4, 16, tile_tokens))
    for panel in range(len(tiled)):
        memory = tiled[panel, :tile_tokens].reshape(-1)  # one bulk copy, to an address that is a multiple of 1024
        for product in range(4):
            step, q = 2 * panel + product // 2, product % 2
            if step == weights.steps:
                continue  # the kernel's A is zero
            n, k = np.meshgrid(np.arange(tile_tokens), np.arange(16), indexing="ij")
            address = 32 * product + n // 8 * 1024 + n % 8 * 128 + 2 * k  # descriptor: start, 1024 every 8 rows
            b = widen_bits(memory[(address ^ (address >> 7 & 7) << 4) // 2], "BF16")
            for warp in range(4):
                a = np.zeros((16, 16), np.uint16)
                for half in range(2):  # rows g, g + 8: a lane's 16 bytes at 16 lane, and 512 bytes on
                    piece = elements[warp, step].reshape(2, 32, 8)[half]
                    for u in range(2):
                        for e in range(2):
                            a[lane // 4 + 8 * half, 8 * u + 2 * (lane % 4) + e] = piece[:, 4 * q + 2 * u + e]
                sums[warp] += widen_bits(a, "BF16") @ b.T
    lanes = np.zeros((4, 32, tile_tokens // 2))
    for i in range(tile_tokens // 2):
        lanes[:, :, i] = sums[:, lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2]
    return lanes


@pytest.mark.parametrize("columns", [32, 96, 160])
def test_fragments_and_swizzled_panels_make_the_product(columns: int) -> None:
    rng = np.random.default_rng(columns)
    weights = matrix(rng, 64, columns, "BF16", "tile16x512")
    x = rng.standard_normal((16, columns)).astype(np.float32)
    lanes = warpgroup_product(weights, tiled_activation(x, "BF16", 24)[: -(-columns // 64)], 16)
    expected = widen_bits(as_bits(x, "BF16"), "BF16").astype(np.float64) @ weights.values.T
    # staging of EPILOGUE 0 and 1: [token][68]
    staged = np.full((16, 68), np.nan)
    warp, lane = np.meshgrid(np.arange(4), np.arange(32), indexing="ij")
    for j in range(2):
        for i in range(4):
            staged[8 * j + 2 * (lane % 4) + i % 2, 16 * warp + lane // 4 + 8 * (i // 2)] = lanes[:, :, 4 * j + i]
    np.testing.assert_allclose(staged[:, :64], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lane_columns", [8, 32])
def test_staging_of_swiglu_is_the_tiled_layout(lane_columns: int) -> None:
    """Two warpgroups' 32 columns each, through words of the staging buffer to their place."""
    values = np.arange(1, 1 + 11 * 64, dtype=np.uint16).reshape(11, 64)
    y = np.zeros((2, 16, 64), np.uint16)
    for first in (0, 32):
        for token in range(11):
            staged = np.zeros(32, np.uint16)
            for column in range(32):
                staged[staged_position(column, lane_columns)] = values[token, first + column]
            for i in range(0, 32, 8 if lane_columns == 8 else 2):
                if lane_columns == 8:
                    chunk = first % 64 // 8 + i // 8
                    y[first // 64, token, (chunk ^ token % 8) * 8 :][:8] = staged[i : i + 8]
                else:
                    c = first + i
                    position = 16 * (c % 32 // 4) + 8 * (c // 2 % 2) + 2 * (c // 32)
                    place = (position % 64 // 8 ^ token % 8) * 8 + position % 8
                    y[position // 64, token, place : place + 2] = staged[i : i + 2]
    bits = values.view(np.uint16)
    expected = tiled_bits(bits, lane_columns)
    np.testing.assert_array_equal(y[:, :11], expected)


def staged_position(column: int, lane_columns: int) -> int:
    if lane_columns == 32:
        return column
    t, r = divmod(column, 8)
    return 16 * (r // 4) + 8 * (r // 2 % 2) + 2 * t + r % 2


def tiled_bits(bits: np.ndarray, lane_columns: int) -> np.ndarray:
    """`tiled_activation` of bit patterns: every uint16 below 2^15 is some float16."""
    return tiled_activation(bits.view(np.float16).astype(np.float32), "F16", len(bits), lane_columns)
