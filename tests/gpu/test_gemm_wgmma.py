"""`gemm_wgmma.cu` against a float64 product of the same 16-bit inputs (sm_90a only)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from kernel_inputs import Matrix, as_bits, matrix, swiglu, tiled_activation, widen_bits

from megalith.runtime.compile import Build, compile_all
from megalith.runtime.gemm_plan import GemmShape, gemm_shape

pytestmark = pytest.mark.gpu

POISON_BYTES = 1 << 17
_FEW_TESTS = 10  # compile what they need when they need it
EXTRA_TOKENS = 24  # allocated beyond the last token, holding NaN
LANE_COLUMNS = {"tile16x512": 8, "mxfp4": 32}


SHAPES = [
    (16, 32, 1), (48, 96, 5), (112, 576, 17), (576, 2560, 63), (6160, 2560, 64), (2560, 9728, 130), (1000, 2880, 300),
    (2560, 4096, 256), (2560, 9728, 512), (6160, 576, 1000), (1001, 96, 70), (333, 2560, 300),
]  # fmt: skip
TILES = [  # tokens, warpgroups
    (16, 1), (16, 2), (32, 2), (48, 1), (64, 1), (64, 3), (80, 1), (96, 2), (112, 3), (128, 3), (128, 1), (144, 2), (160, 2),
    (160, 3), (176, 1), (176, 3), (192, 1), (192, 2), (192, 3), (208, 2), (224, 2), (240, 1), (256, 1), (256, 2),
]  # fmt: skip


MATRICES_IN_PARTS = [("tile16x512", 2592), ("tile16x512", 4096), ("mxfp4", 4096)]  # layout, columns
PARTS = [(64, 1, 3), (96, 1, 4), (112, 2, 2), (128, 3, 2), (192, 3, 3), (224, 2, 2), (256, 2, 2), (256, 1, 4)]

SWIGLU = [(1552, 300, 0.0), (1552, 63, 7.0), (48, 17, 0.0), (4096, 700, 0.0)]  # rows, tokens, limit
SWIGLU_COLUMNS = 864
GATED = [("tile16x512", "BF16"), ("tile16x512", "F16"), ("mxfp4", "BF16")]


@pytest.fixture(scope="module", autouse=True)
def compiled_ahead(gpu: Any, request: pytest.FixtureRequest) -> None:
    """The builds of this file, on all cores at once."""
    if gpu.arch != "sm_90a":
        pytest.skip("wgmma is for sm_90a")
    if len([item for item in request.session.items if item.path == request.path]) < _FEW_TESTS:
        return
    shapes = [gemm_shape(layout, 0, *case, gpu.num_sms) for case in SHAPES for layout in LANE_COLUMNS]
    shapes += [GemmShape("tile16x512", 0, *tile, aligned=aligned) for tile in TILES for aligned in (32, 64, 128)]
    builds = [defines(replace(shape, epilogue=epilogue), "BF16") for shape in shapes for epilogue in (0, 1)]
    builds += [defines(shape_in_parts(*case, *tile), "BF16") for case in MATRICES_IN_PARTS for tile in PARTS]
    for rows, tokens, _ in SWIGLU:
        for layout, dtype in GATED:
            for shape in swiglu_shapes(layout, rows, tokens, gpu.num_sms):
                builds += [defines(shape, dtype, Y_LANE_COLUMNS=lane_columns) for lane_columns in (8, 32)]
    compile_all(Build.of("gemm_wgmma", gpu.arch, **each) for each in builds)


def shape_in_parts(layout: str, columns: int, tile: int, groups: int, parts: int) -> GemmShape:
    return GemmShape(layout, 1, tile, groups, aligned=math.gcd(columns, 128), parts=parts)


def swiglu_shapes(layout: str, rows: int, tokens: int, num_sms: int) -> list[GemmShape]:
    return [gemm_shape(layout, 2, rows, SWIGLU_COLUMNS, tokens, num_sms), GemmShape(layout, 2, 64, 1)]


def defines(shape: GemmShape, dtype: str, **others: int) -> dict[str, int | str]:
    element = "ELEMENT_F16" if dtype == "F16" else "ELEMENT_BF16"
    return {**shape.defines(), element: 1, "Y_LANE_COLUMNS": 8, "BIAS_F32": 0, "Y_SCALAR": 0, **others}


def poisoned_activation(x: np.ndarray, dtype: str, layout: str) -> np.ndarray:
    """The tiled layout with NaN in all rows beyond the tokens."""
    tokens_padded = -(-len(x) // 8) * 8 + EXTRA_TOKENS
    tiled = tiled_activation(x, dtype, tokens_padded, LANE_COLUMNS[layout])
    tiled[:, len(x) :] = 0xFFFF
    return tiled


def run(
    gpu: Any, weights: Matrix, x: np.ndarray, shape: GemmShape, y: np.ndarray, columns: int, bias: np.ndarray | None = None,
    limit: float = 0.0, lane_columns: int = 8, pitch: int | None = None, blocks: int | None = None,
) -> np.ndarray:  # fmt: skip
    """y after the product, twice the same; `y` is what it holds before. `columns` and `pitch` as the kernel's."""
    others = {
        "Y_LANE_COLUMNS": lane_columns,
        "BIAS_F32": int(bias is not None and bias.dtype == np.float32),
        "Y_SCALAR": int(shape.epilogue != 2 and bool(columns % 4 or y.shape[-1] % 4)),
    }
    kernel = gpu.compile("gemm_wgmma", "gemm_wgmma", **defines(shape, weights.dtype, **others))
    blocks = blocks or gpu.num_sms
    tiled = poisoned_activation(x, weights.dtype, shape.layout)
    packed = gpu.array(np.concatenate([weights.packed, np.full(POISON_BYTES, 0xFF, np.uint8)]))
    activations, partials = gpu.array(tiled), gpu.empty_poisoned((max(16, shape.partials_bytes(blocks)),), np.uint8)
    flags, device_bias = gpu.zeros((max(1, shape.flags(blocks)),), np.uint32), gpu.array(bias) if bias is not None else 0
    results = []
    for _ in range(2):
        target = gpu.array(y)
        args = (
            packed, np.int32(weights.row_blocks), np.int32(weights.steps), activations, np.int32(tiled.shape[1]),
            np.int32(len(x)), target, np.int32(pitch or y.shape[-1]), np.int32(columns), device_bias, np.float32(limit),
            np.int32(shape.token_band(weights.steps * 32, len(x))), partials, flags,
        )  # fmt: skip
        gpu.launch(kernel, (blocks, 1, 1), (shape.threads, 1, 1), args, shared_bytes=shape.shared_bytes)
        results.append(gpu.get(target))
        assert not gpu.get(flags).any()
    np.testing.assert_array_equal(results[0].view(np.uint8), results[1].view(np.uint8))
    first: np.ndarray = results[0]
    return first


def product(weights: Matrix, x: np.ndarray) -> np.ndarray:
    """float64 [tokens, rows]."""
    return widen_bits(as_bits(x, weights.dtype), weights.dtype).astype(np.float64) @ weights.values.T.astype(np.float64)


def relative_bound(columns: int) -> float:
    """The tensor cores' sums lose a little more than float32's: 3e-5 for 2560 columns."""
    return float(1e-5 * np.sqrt(columns / 256 + 1))


def assert_close(found: np.ndarray, expected: np.ndarray, columns: int) -> None:
    bound = relative_bound(columns)
    assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)
    assert np.abs(found - expected).max() < 10 * bound * np.abs(expected).max()


def check_store_and_add(gpu: Any, weights: Matrix, x: np.ndarray, shape: GemmShape, **how: Any) -> None:
    """EPILOGUE 0 with a bias into poisoned rows of a larger pitch, EPILOGUE 1 without into random values."""
    rng = np.random.default_rng(7)
    rows, columns = weights.values.shape
    expected = product(weights, x)
    bias = as_bits(rng.standard_normal(weights.row_blocks * 16), weights.dtype)
    y = np.full((len(x), weights.row_blocks * 16 + 4), np.nan, np.float32)
    found = run(gpu, weights, x, replace(shape, epilogue=0), y, weights.row_blocks * 16, bias, **how)
    assert_close(found[:, :rows], expected + widen_bits(bias[:rows], weights.dtype), columns)
    np.testing.assert_array_equal(found[:, rows:-4], np.tile(widen_bits(bias[rows:], weights.dtype), (len(x), 1)))
    assert np.isnan(found[:, -4:]).all()
    before = rng.standard_normal((len(x), rows)).astype(np.float32)
    added = run(gpu, weights, x, replace(shape, epilogue=1), before, rows, **how).astype(np.float64)
    assert np.linalg.norm(added - before - expected) < relative_bound(columns) * np.linalg.norm(expected)


@pytest.mark.parametrize(("rows", "columns", "tokens"), SHAPES)
@pytest.mark.parametrize("layout", ["tile16x512", "mxfp4"])
def test_planned_shapes(gpu: Any, rows: int, columns: int, tokens: int, layout: str) -> None:
    rng = np.random.default_rng(rows + columns)
    weights = matrix(rng, rows, columns, "BF16", layout)
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    check_store_and_add(gpu, weights, x, gemm_shape(layout, 0, rows, columns, tokens, gpu.num_sms))


@pytest.mark.parametrize(("tile", "groups"), TILES)
@pytest.mark.parametrize("columns", [608, 576, 640])
def test_every_tile(gpu: Any, tile: int, groups: int, columns: int) -> None:
    rng = np.random.default_rng(tile)
    weights = matrix(rng, 1104, columns, "BF16", "tile16x512")  # 69 row blocks
    shape = GemmShape("tile16x512", 0, tile, groups, aligned=math.gcd(columns, 128))
    for tokens in (1, tile - 3, 2 * tile + 5):
        x = rng.standard_normal((tokens, columns)).astype(np.float32)
        check_store_and_add(gpu, weights, x, shape)


@pytest.mark.parametrize("columns", [32, 64, 160, 1056])
@pytest.mark.parametrize("blocks", [2, 14, 132])
@pytest.mark.parametrize("groups", [1, 2])
def test_few_and_many_tiles_of_a_block(gpu: Any, groups: int, blocks: int, columns: int) -> None:
    rng = np.random.default_rng(blocks)
    weights = matrix(rng, 1040, columns, "BF16", "tile16x512")
    for tokens in (65, 700):
        x = rng.standard_normal((tokens, columns)).astype(np.float32)
        check_store_and_add(gpu, weights, x, GemmShape("tile16x512", 0, 64, groups), blocks=min(blocks, gpu.num_sms))


@pytest.mark.parametrize("blocks", [2, 4, 14, 66, 132])
@pytest.mark.parametrize(("layout", "columns"), [("tile16x512", 2592), ("tile16x512", 2560), ("mxfp4", 2560)])
def test_divided_among_few_and_many_blocks(gpu: Any, layout: str, columns: int, blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    weights = matrix(rng, 720, columns, "BF16", layout)
    for tokens, tile in ((11, 16), (27, 32), (33, 64)):
        x = rng.standard_normal((tokens, weights.values.shape[1])).astype(np.float32)
        shape = GemmShape(layout, 0, tile, 1, split=True, aligned=math.gcd(columns, 128))
        check_store_and_add(gpu, weights, x, shape, blocks=min(blocks, gpu.num_sms))


@pytest.mark.parametrize(("tile", "groups", "parts"), PARTS)
@pytest.mark.parametrize(("layout", "columns"), MATRICES_IN_PARTS)
def test_parts_of_the_columns_are_added_in_turn(
    gpu: Any, layout: str, columns: int, tile: int, groups: int, parts: int
) -> None:
    """With a bias, which is added once; `run` asks twice for the same bits."""
    rng = np.random.default_rng(tile)
    rows = 560
    weights = matrix(rng, rows, columns, "BF16", layout)  # 35 row blocks
    shape = shape_in_parts(layout, columns, tile, groups, parts)
    bias = as_bits(10 * rng.standard_normal(rows), "BF16")
    for tokens in (1, tile - 3, 2 * tile + 5):
        x = rng.standard_normal((tokens, weights.values.shape[1])).astype(np.float32)
        before = rng.standard_normal((tokens, rows)).astype(np.float32)
        added = run(gpu, weights, x, shape, before, rows, bias).astype(np.float64)
        expected = product(weights, x) + widen_bits(bias, "BF16")
        assert np.linalg.norm(added - before - expected) < relative_bound(columns) * np.linalg.norm(expected)


def test_f16_and_float_bias(gpu: Any) -> None:
    rng = np.random.default_rng(9)
    weights = matrix(rng, 576, 576, "F16", "tile16x512")
    x = rng.standard_normal((300, 576)).astype(np.float32)
    bias = rng.standard_normal(576).astype(np.float32)
    shape = gemm_shape("tile16x512", 0, 576, 576, 300, gpu.num_sms)
    found = run(gpu, weights, x, shape, np.full((300, 576), np.nan, np.float32), 576, bias)
    assert_close(found, product(weights, x) + bias, 576)


@pytest.mark.parametrize(("layout", "dtype"), GATED)
@pytest.mark.parametrize("lane_columns", [8, 32])
@pytest.mark.parametrize(("rows", "tokens", "limit"), SWIGLU)
def test_swiglu(gpu: Any, layout: str, dtype: str, lane_columns: int, rows: int, tokens: int, limit: float) -> None:
    rng = np.random.default_rng(rows + tokens)
    weights = matrix(rng, rows, SWIGLU_COLUMNS, dtype, layout)  # already in pair8 order: 8 gate rows, 8 up rows
    x = 2 * rng.standard_normal((tokens, SWIGLU_COLUMNS)).astype(np.float32)
    pairs = product(weights, x).reshape(tokens, -1, 2, 8)
    expected = swiglu(pairs[:, :, 0].reshape(tokens, -1), pairs[:, :, 1].reshape(tokens, -1), limit)
    unit = 8 * lane_columns if lane_columns == 8 else 4 * lane_columns
    padded_columns = -(-expected.shape[1] // unit) * unit
    tokens_padded = -(-tokens // 8) * 8 + 16
    for shape in swiglu_shapes(layout, rows, tokens, gpu.num_sms):
        y = np.full((padded_columns // 64, tokens_padded, 64), 0xFFFF, np.uint16)
        bits = run(gpu, weights, x, shape, y, padded_columns, None, limit, lane_columns, tokens_padded)
        assert (bits[:, tokens:] == 0xFFFF).all()
        flat = untiled(bits, tokens, lane_columns)
        found = widen_bits(flat[:, : expected.shape[1]], dtype)
        assert np.abs(found - expected).max() < np.abs(expected).max() * (2**-8 if dtype == "BF16" else 2**-10)
        assert np.linalg.norm(found - expected) < 4e-3 * np.linalg.norm(expected)
        assert not (flat[:, expected.shape[1] :] & 0x7FFF).any()


def untiled(bits: np.ndarray, tokens: int, lane_columns: int) -> np.ndarray:
    """[tokens, columns] of the tiled layout, through the places of numbered elements."""
    panels = len(bits)
    flat = np.empty((tokens, panels * 64), np.uint16)
    column = np.arange(panels * 64)
    group = 4 * lane_columns
    t, r = column % group // lane_columns, column % lane_columns
    position = column - column % group + 16 * (r // 4) + 8 * (r // 2 % 2) + 2 * t + r % 2
    for token in range(tokens):
        flat[token] = bits[position // 64, token, (position % 64 // 8 ^ token % 8) * 8 + position % 8]
    return flat


@pytest.mark.parametrize("layout", ["tile16x512", "mxfp4"])
def test_what_a_token_gets_does_not_depend_on_the_others(gpu: Any, layout: str) -> None:
    rng = np.random.default_rng(5)
    rows, columns = 720, 2560
    weights = matrix(rng, rows, columns, "BF16", layout)
    x = rng.standard_normal((512, columns)).astype(np.float32)

    def products(tokens: int, shape: GemmShape) -> np.ndarray:
        return run(gpu, weights, x[:tokens], shape, np.zeros((tokens, rows), np.float32), rows)

    most = products(512, GemmShape(layout, 0, 256, 2))
    for tokens, tile, groups in ((1, 64, 1), (17, 16, 2), (33, 256, 2), (300, 128, 3)):
        part = products(tokens, GemmShape(layout, 0, tile, groups))
        np.testing.assert_array_equal(part, most[:tokens])
