"""`qkv_post.cu` against float64 clamp, q/k norm and RoPE of the same inputs; the paged cache is compared as a whole.

So is the product that does the same to its own results (`gemm_qkv.cuh`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from kernel_inputs import as_bits, matrix, tiled_activation, widen_bits

from megalith.runtime.gemm_plan import EPILOGUE_QKV, GemmShape
from megalith.runtime.gpu_buffers import PAGE_TOKENS as PAGE

POISON = 0xFFFF  # a NaN in both element types
EPS = 1e-3  # large enough to be seen in the results
NORMS = ("none", "head", "full")
UNIT_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11}


@dataclass(frozen=True)
class Heads:
    """The attention shape of a model, and what happens to q, k and v between projection and cache."""

    head_dim: int
    num_heads: int
    num_kv_heads: int
    norm: str = "none"
    clip: float = np.inf
    dtype: str = "BF16"
    norm_f32: bool = False

    @property
    def pitch(self) -> int:
        return -(-self.head_dim // 64) * 64

    @property
    def columns(self) -> tuple[int, int]:
        """Q and K."""
        return self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim

    @property
    def defines(self) -> dict[str, int]:
        return {
            f"ELEMENT_{self.dtype}": 1, "HEAD_DIM": self.head_dim, "QK_NORM": NORMS.index(self.norm),
            "NORM_F32": int(self.norm_f32),
        }  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Projected rows in logical order, and the constants that post-processing needs."""

    q: np.ndarray  # float32 [num_tokens, num_heads, head_dim]
    k: np.ndarray  # float32 [num_tokens, num_kv_heads, head_dim]
    v: np.ndarray
    q_weight: np.ndarray  # uint16 or float32, [head_dim] or all columns
    k_weight: np.ndarray
    rope: np.ndarray  # float32 [num_positions, head_dim / 2, 2]


def draw_inputs(rng: np.random.Generator, heads: Heads, num_tokens: int, num_positions: int) -> Inputs:
    """Random; every head has a scale of its own, so that "head" and "full" norms differ."""

    def rows(count: int) -> np.ndarray:
        scale = rng.uniform(0.5, 2.0, (num_tokens, count, 1))
        return (scale * rng.standard_normal((num_tokens, count, heads.head_dim))).astype(np.float32)

    def weight(columns: int) -> np.ndarray:
        values = rng.uniform(0.5, 1.5, heads.head_dim if heads.norm == "head" else columns).astype(np.float32)
        return values if heads.norm_f32 else as_bits(values, heads.dtype)

    angle = np.arange(num_positions)[:, None] * rng.uniform(0.001, 1.0, heads.head_dim // 2)
    rope = np.stack((np.cos(angle), np.sin(angle)), axis=2).astype(np.float32)
    q_columns, k_columns = heads.columns
    q, k, v = rows(heads.num_heads), rows(heads.num_kv_heads), rows(heads.num_kv_heads)
    return Inputs(q, k, v, weight(q_columns), weight(k_columns), rope)


def stored_rows(heads: Heads, inputs: Inputs) -> np.ndarray:
    """float32 [num_tokens, qkv_rows] in stored-row order (specs/format.md, "Row orders"), NaN where no row is."""
    i = np.arange(heads.head_dim)
    half = heads.head_dim // 2
    place = 16 * (i % half // 8) + 8 * (i // half) + i % 8 if heads.head_dim % 16 == 0 else i
    parts = []
    for part in (inputs.q, inputs.k, inputs.v):
        stored = np.empty_like(part)
        stored[:, :, i if part is inputs.v else place] = part
        flat = stored.reshape(len(part), -1)
        parts.append(np.pad(flat, ((0, 0), (0, -flat.shape[1] % 16)), constant_values=np.nan))
    return np.concatenate(parts, axis=1)


def prepared(heads: Heads, inputs: Inputs, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k and v as float64, before they are rounded."""

    def normalised(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        wide = weight if heads.norm_f32 else widen_bits(weight, heads.dtype)
        axis = (1, 2) if heads.norm == "full" else 2
        rms = np.sqrt(np.mean(x**2, axis=axis, keepdims=True) + EPS)
        return np.asarray(x / rms * wide.astype(np.float64).reshape((-1, heads.head_dim)))

    def rotated(x: np.ndarray) -> np.ndarray:
        turn = inputs.rope[positions].astype(np.float64)
        x = (x[..., : heads.head_dim // 2] + 1j * x[..., heads.head_dim // 2 :]) * (turn[..., 0] + 1j * turn[..., 1])[:, None]
        return np.concatenate((x.real, x.imag), axis=2)

    q, k, v = (x.astype(np.float64) for x in (inputs.q, inputs.k, inputs.v))
    if heads.norm == "full":
        q, k = normalised(q, inputs.q_weight), normalised(k, inputs.k_weight)
    q, k, v = (np.clip(x, -heads.clip, heads.clip) for x in (q, k, v))
    if heads.norm == "head":
        q, k = normalised(q, inputs.q_weight), normalised(k, inputs.k_weight)
    return rotated(q), rotated(k), v


def cache_places(heads: Heads, pages: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Element index in the pool of every column of tokens: [num_tokens, 2 (K, V), num_kv_heads, pitch]."""
    slot, column = (positions % PAGE)[:, None, None, None], np.arange(heads.pitch)
    part, head = np.arange(2)[:, None, None], np.arange(heads.num_kv_heads)[:, None]
    panel = (pages[:, None, None, None] * 2 + part) * heads.num_kv_heads + head
    panel = panel * (heads.pitch // 64) + column // 64
    return np.asarray((panel * PAGE + slot) * 64 + (column % 64 // 8 ^ slot % 8) * 8 + column % 8)


def empty_pool(heads: Heads, num_pages: int) -> np.ndarray:
    return np.full(num_pages * 2 * heads.num_kv_heads * heads.pitch * PAGE, POISON, np.uint16)


def assert_rounded(bits: np.ndarray, expected: np.ndarray, dtype: str, error_before: float = 4e-6) -> None:
    """`bits` [..., columns rounded up to 64] are `expected` rounded, but for float32's own error, and zeros beyond."""
    columns = expected.shape[-1]
    assert not bits[..., columns:].any()
    error = np.abs(widen_bits(np.ascontiguousarray(bits[..., :columns]), dtype) - expected)
    assert (
        error <= UNIT_ROUNDOFF[dtype] * np.abs(expected) + error_before * (1 + np.abs(expected).max(axis=-1, keepdims=True))
    ).all()


CASES = [
    Heads(128, 32, 8, "head"), Heads(128, 4, 4, "full", 1.0), Heads(64, 8, 2, "none", 0.8),
    Heads(80, 3, 1, "none", dtype="F16"),
    Heads(96, 6, 2, "head", 1.2, norm_f32=True), Heads(16, 9, 3, "full"), Heads(256, 4, 1, "head", dtype="F16"),
    Heads(6, 3, 3, "full"), Heads(250, 2, 1, "head", 1.0), Heads(2, 5, 1), Heads(72, 5, 5, "full", norm_f32=True, dtype="F16"),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(
    "heads", CASES, ids=lambda h: f"{h.head_dim}-{h.num_heads}-{h.num_kv_heads}-{h.norm}-{h.clip}-{h.dtype}"
)
def test_queries_and_cache(gpu: Any, heads: Heads) -> None:
    rng = np.random.default_rng(heads.head_dim)
    lengths = ((1, 0, 70), (3, 64, 65), (0, 191, 210))  # slot, first and last position + 1 of a chunk
    positions = np.concatenate([np.arange(first, last) for _, first, last in lengths]).astype(np.int32)
    slots = np.repeat([slot for slot, _, _ in lengths], [last - first for _, first, last in lengths]).astype(np.int32)
    table = rng.permutation(20).astype(np.int32).reshape(4, 5)
    inputs = draw_inputs(rng, heads, len(positions), 256)
    unused = np.full(2, -1, np.int32)  # behind the others
    kernel = gpu.compile("qkv_post", "qkv_post", **heads.defines)
    rows = np.pad(stored_rows(heads, inputs), ((0, len(unused)), (0, 0)), constant_values=np.nan)
    given = (gpu.array(rows), gpu.array(inputs.q_weight), gpu.array(inputs.k_weight))
    constants = [gpu.array(x) for x in (inputs.rope, np.append(positions, unused), np.append(slots, unused), table)]
    found = []
    for blocks in (1, 2, 2):  # the same results however the heads are spread
        q = gpu.empty_poisoned((len(rows), heads.num_heads, heads.pitch), np.uint16)
        pool = gpu.array(empty_pool(heads, table.size))
        args = (
            given[0], np.int32(given[0].shape[1]), np.int32(heads.num_heads), np.int32(heads.num_kv_heads), *given[1:],
            np.float32(EPS), np.float32(heads.clip), *constants, np.int32(table.shape[1]), q, pool,
        )  # fmt: skip
        gpu.launch(kernel, (len(rows), blocks, 1), (256, 1, 1), args)
        found.append((gpu.get(q), gpu.get(pool)))
        np.testing.assert_array_equal(found[0][0], found[-1][0])
        np.testing.assert_array_equal(found[0][1], found[-1][1])
    expected_q, expected_k, expected_v = prepared(heads, inputs, positions)
    (q, pool), places = found[0], cache_places(heads, table[slots, positions // PAGE], positions)
    assert (q[len(positions) :] == POISON).all()
    assert_rounded(q[: len(positions)], expected_q, heads.dtype)
    assert_rounded(pool[places[:, 0]], expected_k, heads.dtype)
    np.testing.assert_array_equal(pool[places[:, 1, :, : heads.head_dim]], as_bits(expected_v, heads.dtype))
    assert not pool[places[:, 1, :, heads.head_dim :]].any()
    pool[places] = POISON
    assert (pool == POISON).all()


@pytest.mark.gpu
def test_not_a_number_stays(gpu: Any) -> None:
    heads = Heads(64, 1, 1, "head", 2.0)
    inputs = draw_inputs(np.random.default_rng(1), heads, 1, 1)
    inputs.q[0, 0, 3] = inputs.v[0, 0, 5] = np.nan
    q, pool = gpu.zeros((1, 1, 64), np.uint16), gpu.zeros((2 * 64 * PAGE,), np.uint16)
    row = stored_rows(heads, inputs)
    args = (
        gpu.array(row), np.int32(row.shape[1]), np.int32(1), np.int32(1), gpu.array(inputs.q_weight),
        gpu.array(inputs.k_weight), np.float32(EPS), np.float32(2.0), gpu.array(inputs.rope), gpu.zeros((1,), np.int32),
        gpu.zeros((1,), np.int32), gpu.zeros((1, 1), np.int32), np.int32(1), q, pool,
    )  # fmt: skip
    gpu.launch(gpu.compile("qkv_post", "qkv_post", **heads.defines), (1, 1, 1), (256, 1, 1), args)
    assert np.isnan(widen_bits(gpu.get(q), "BF16")).all()  # the norm spreads it over the head
    k, v = (
        widen_bits(gpu.get(pool)[cache_places(heads, np.zeros(1, np.int64), np.zeros(1, np.int64))[0, i, 0]], "BF16")
        for i in (0, 1)
    )
    assert not np.isnan(k).any()
    assert np.flatnonzero(np.isnan(v)).tolist() == [5]


PRODUCTS = [  # heads, warpgroups, tile, layout, whether there is a bias
    (Heads(128, 4, 1, "head"), 2, 256, "tile16x512", False),
    (Heads(128, 2, 2, "none", 0.8), 2, 96, "tile16x512", True),
    (Heads(128, 3, 1, "head", 1.2, norm_f32=True), 2, 224, "mxfp4", False),
    (Heads(64, 4, 2, "none"), 3, 160, "tile16x512", True),
    (Heads(64, 3, 1, "head", dtype="F16"), 1, 256, "tile16x512", False),
    (Heads(64, 8, 1, "head", 1.0), 2, 16, "tile16x512", True),
    (Heads(64, 2, 1, "none"), 1, 64, "mxfp4", False),
    (Heads(128, 3, 1, "head", 0.9), 2, 112, "tile16x512", False),
    (Heads(64, 2, 1, "head"), 1, 48, "tile16x512", False),
]


def logical(heads: Heads, rows: np.ndarray) -> np.ndarray:
    """[num_tokens, heads, head_dim] of columns in the order in which q and k are stored."""
    half = heads.head_dim // 2
    i = np.arange(heads.head_dim)
    return rows.reshape(len(rows), -1, heads.head_dim)[:, :, 16 * (i % half // 8) + 8 * (i // half) + i % 8]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "groups", "tile", "layout", "has_bias"), PRODUCTS,
    ids=[f"{h.head_dim}-{h.norm}-{h.clip}-{h.dtype}-{groups}-{tile}-{layout}" for h, groups, tile, layout, _ in PRODUCTS],
)  # fmt: skip
def test_product_that_goes_on(gpu: Any, heads: Heads, groups: int, tile: int, layout: str, has_bias: bool) -> None:
    if gpu.arch != "sm_90a":
        pytest.skip("wgmma is for sm_90a")
    rng = np.random.default_rng(tile)
    columns, (q_rows, k_rows) = 288 if has_bias else 384, heads.columns
    lengths = ((1, 0, 70), (-1, 0, 9), (3, 64, 65), (0, 191, 200 + tile))  # slot, first and last position + 1 of a chunk
    positions = np.concatenate([np.arange(first, last) for _, first, last in lengths]).astype(np.int32)
    slots = np.repeat([slot for slot, _, _ in lengths], [last - first for _, first, last in lengths]).astype(np.int32)
    table = rng.permutation(32).astype(np.int32).reshape(4, 8)
    inputs = draw_inputs(rng, heads, 0, 512)
    weights = matrix(rng, q_rows + 2 * k_rows, columns, heads.dtype, layout)
    x = rng.standard_normal((len(positions), columns)).astype(np.float32)
    bias = as_bits(rng.standard_normal(q_rows + 2 * k_rows), heads.dtype) if has_bias else None
    aligned = math.gcd(columns, 128)
    shape = GemmShape(layout, EPILOGUE_QKV, tile, groups, head_dim=heads.head_dim, aligned=aligned)
    build = {**shape.defines(), **heads.defines, "Y_LANE_COLUMNS": 8, "Y_SCALAR": 0, "BIAS_F32": 0}
    kernel = gpu.compile("gemm_wgmma", "gemm_wgmma", **build)
    tokens_padded = -(-len(x) // 8) * 8 + 24
    tiled = tiled_activation(x, heads.dtype, tokens_padded, 32 if layout == "mxfp4" else 8)
    tiled[:, len(x) :] = 0xFFFF
    packed, device_bias = gpu.array(weights.packed), gpu.array(bias) if bias is not None else 0
    constants = [gpu.array(each) for each in (inputs.rope, positions, slots, table)]
    norms = gpu.array(inputs.q_weight), gpu.array(inputs.k_weight)
    found = []
    for blocks in (gpu.num_sms, 3, gpu.num_sms):
        q = gpu.empty_poisoned((len(x), heads.num_heads, heads.head_dim), np.uint16)
        pool = gpu.array(empty_pool(heads, table.size))
        args = (
            packed, np.int32(weights.row_blocks), np.int32(weights.steps), gpu.array(tiled), np.int32(tokens_padded),
            np.int32(len(x)), q, np.int32(0), np.int32(len(weights.values)), device_bias, np.float32(0), np.int32(1), 0, 0,
            *norms, np.float32(EPS), np.float32(heads.clip), *constants, np.int32(table.shape[1]), np.int32(heads.num_heads),
            np.int32(heads.num_kv_heads), pool,
        )  # fmt: skip
        gpu.launch(kernel, (blocks, 1, 1), (shape.threads, 1, 1), args, shared_bytes=shape.shared_bytes)
        found.append((gpu.get(q), gpu.get(pool)))
        np.testing.assert_array_equal(found[0][0], found[-1][0])
        np.testing.assert_array_equal(found[0][1], found[-1][1])
    rows = widen_bits(as_bits(x, heads.dtype), heads.dtype).astype(np.float64) @ weights.values.T.astype(np.float64)
    if bias is not None:
        rows += widen_bits(bias, heads.dtype)
    used = slots >= 0
    rows, positions, slots = rows[used], positions[used], slots[used]
    projected = replace(
        inputs, q=logical(heads, rows[:, :q_rows]), k=logical(heads, rows[:, q_rows : q_rows + k_rows]),
        v=rows[:, q_rows + k_rows :].reshape(len(rows), -1, heads.head_dim),
    )  # fmt: skip
    expected_q, expected_k, expected_v = prepared(heads, projected, positions)
    (q, pool), places = found[0], cache_places(heads, table[slots, positions // PAGE], positions)
    assert (q[~used] == POISON).all()
    for bits, expected in ((q[used], expected_q), (pool[places[:, 0]], expected_k), (pool[places[:, 1]], expected_v)):
        assert_rounded(bits, expected, heads.dtype, 3e-5)
    pool[places] = POISON
    assert (pool == POISON).all()
