"""`attention_decode.cu` against float64 attention, through a permuted block table; the cache is NaN where nobody may look."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from kernel_inputs import as_bits, widen_bits
from test_attention_prefill import offsets
from test_qkv_post import (
    EPS,
    PAGE,
    POISON,
    UNIT_ROUNDOFF,
    Heads,
    Inputs,
    assert_rounded,
    cache_places,
    draw_inputs,
    empty_pool,
    prepared,
    stored_rows,
)

from megalith.runtime.attention_plan import SPLIT_WORKERS, decode_attention
from megalith.runtime.gpu_buffers import MAX_SPLITS

LENGTHS = (1, 0, 257, 64, 9000, 2, 63, 1000, 65, 0, 256, 255)  # the new token included; 0 is an empty row
_CUT = 1.01  # of the error bound, for float32's own error and queries that float64 rounds to the other side


@dataclass(frozen=True)
class Case:
    """What one launch decodes: sequence i is row i of the batch and row `slots[i]` of the block table."""

    heads: Heads
    lengths: np.ndarray
    inputs: Inputs
    keys: list[np.ndarray]  # uint16 [length - 1, num_kv_heads, head_dim], those of the cache
    values: list[np.ndarray]
    slots: np.ndarray
    table: np.ndarray
    window: int = 0
    sinks: np.ndarray | None = None  # uint16 [num_heads]
    tiled: bool = False
    lane_columns: int = 8

    def row(self, i: int) -> Case:
        """Sequence i alone."""
        one = slice(i, i + 1)
        inputs = replace(self.inputs, q=self.inputs.q[one], k=self.inputs.k[one], v=self.inputs.v[one])
        return replace(
            self, lengths=self.lengths[one], inputs=inputs, keys=self.keys[one], values=self.values[one], slots=self.slots[one]
        )

    def first(self, i: int) -> int:
        """First position that sequence i sees."""
        return max(0, int(self.lengths[i]) - self.window) if self.window else 0


def draw_case(heads: Heads, lengths: tuple[int, ...] = LENGTHS, window: int = 0, sinks: bool = False, **layout: Any) -> Case:
    """Random inputs."""
    rng = np.random.default_rng(heads.head_dim + heads.num_heads)
    inputs = draw_inputs(rng, heads, len(lengths), max(lengths) + 1)
    keys, values = (
        [as_bits(1.3 * rng.standard_normal((max(0, n - 1), heads.num_kv_heads, heads.head_dim)), heads.dtype) for n in lengths]
        for _ in range(2)
    )
    slots = rng.permutation(len(lengths) + 1)[: len(lengths)].astype(np.int32)
    counts = [-(-n // PAGE) for n in lengths]
    pages, table = rng.permutation(sum(counts)) + 1, np.zeros((len(lengths) + 1, max(counts) + 2), np.int32)  # page 0: nobody's
    for slot, part in zip(slots, np.split(pages, np.cumsum(counts)[:-1]), strict=True):
        table[slot, : len(part)] = part
    logits = as_bits(3 * rng.standard_normal(heads.num_heads), heads.dtype) if sinks else None
    return Case(heads, np.array(lengths, np.int32), inputs, keys, values, slots, table, window, logits, **layout)


def cache(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The pool, NaN where nothing is seen or written yet, and the block table without pages that a window has left behind."""
    heads, table = case.heads, case.table.copy()
    pool = empty_pool(heads, int(case.table.max()) + 1)
    for i, slot in enumerate(case.slots):
        seen = np.arange(case.first(i), max(0, int(case.lengths[i]) - 1))
        both = np.stack((case.keys[i][seen], case.values[i][seen]), axis=1)
        padded = np.pad(both, ((0, 0), (0, 0), (0, 0), (0, heads.pitch - heads.head_dim)))
        pool[cache_places(heads, case.table[slot, seen // PAGE], seen)] = padded
        table[slot, : case.first(i) // PAGE] = 0
    return pool, table


def reference(case: Case, i: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 [num_heads * head_dim] of sequence i: attention, and the same of the values' magnitudes."""
    heads, position = case.heads, case.lengths[i : i + 1] - 1
    one = case.row(i).inputs
    q, k, v = (widen_bits(as_bits(x, heads.dtype), heads.dtype).astype(np.float64)[0] for x in prepared(heads, one, position))
    keys, values = (
        np.concatenate((widen_bits(old, heads.dtype), new[None]))[case.first(i) :]
        for old, new in ((case.keys[i], k), (case.values[i], v))
    )
    group = heads.num_heads // heads.num_kv_heads
    mixed, magnitude = np.empty_like(q), np.empty_like(q)
    for head in range(heads.num_heads):
        scores = keys[:, head // group] @ q[head] / np.sqrt(heads.head_dim)
        sink = -np.inf if case.sinks is None else float(widen_bits(case.sinks[head : head + 1], heads.dtype)[0])
        weights = np.exp(scores - max(scores.max(), sink))
        weights /= weights.sum() + np.exp(sink - max(scores.max(), sink))
        mixed[head], magnitude[head] = weights @ values[:, head // group], weights @ np.abs(values[:, head // group])
    return mixed.reshape(-1), magnitude.reshape(-1)


@dataclass(frozen=True)
class Results:
    out: np.ndarray  # uint16 [batch, num_heads * head_dim]
    pool: np.ndarray


def run(
    gpu: Any, case: Case, workers: int, early_reads: int = 0, shared_limit: int = 1 << 20, split_tokens: int = 256
) -> Results:
    """One launch, of the build for so much shared memory or what there is; checks what it may touch besides its results."""
    heads, batch = case.heads, len(case.lengths)
    group = heads.num_heads // heads.num_kv_heads
    columns = heads.num_heads * heads.head_dim
    unit = 128 if case.lane_columns == 32 else 64
    padded, pitch = -(-columns // unit) * unit, -(-batch // 8) * 8 + 8
    pool, table = cache(case)
    build = decode_attention(heads.head_dim, group, heads.num_kv_heads, min(shared_limit, gpu.shared_limit + 1024), gpu.num_sms)
    blocks, rows = build.blocks, min(group, 16)
    defines = {
        **heads.defines, **build.defines(), "HAS_SINKS": int(case.sinks is not None), "SINKS_F32": 0,
        "EARLY_READS": early_reads, "ACTIVATION_TILED": int(case.tiled), "ACTIVATION_LANE_COLUMNS": case.lane_columns,
    }  # fmt: skip
    device_pool, out = gpu.array(pool), gpu.empty_poisoned((pitch * padded,), np.uint16)
    sums = gpu.empty_poisoned((batch, blocks, MAX_SPLITS, rows, -(-heads.head_dim // 16) * 16), np.float32)
    stats = gpu.empty_poisoned((batch, blocks, MAX_SPLITS, rows, 2), np.float32)
    arrived, stored = gpu.zeros((batch, blocks), np.uint32), stored_rows(heads, case.inputs)
    args = (
        gpu.array(stored), np.int32(stored.shape[1]), gpu.array(case.inputs.q_weight), gpu.array(case.inputs.k_weight),
        np.float32(EPS), np.float32(heads.clip), gpu.array(case.inputs.rope), gpu.array(case.lengths - 1),
        gpu.array(case.slots), gpu.array(table), np.int32(table.shape[1]), device_pool, np.int32(case.window),
        0 if case.sinks is None else gpu.array(case.sinks), out, np.int32(pitch if case.tiled else padded), sums, stats,
        np.int32(MAX_SPLITS), np.int32(split_tokens), arrived,
    )  # fmt: skip
    kernel = gpu.compile("attention_decode", "attention_decode", **defines)
    gpu.launch(kernel, (workers, blocks, batch), (build.threads, 1, 1), args, shared_bytes=build.shared_bytes)
    assert not gpu.get(arrived).any()
    found = gpu.get(out)
    where = offsets(batch, padded, case.tiled, case.lane_columns, pitch if case.tiled else padded)
    results = found[where]
    found[where] = POISON
    assert (found == POISON).all()
    assert not results[:, columns:].any()
    return Results(results[:, :columns], gpu.get(device_pool))


def check(case: Case, results: Results) -> None:
    """Outputs against the reference, and the cache: the new tokens' rows and not one byte besides."""
    heads, (pool, _) = case.heads, cache(case)
    written = np.flatnonzero(case.lengths)
    positions = case.lengths[written] - 1
    _, k, v = (x[written] for x in prepared(heads, case.inputs, np.maximum(case.lengths - 1, 0)))
    places = cache_places(heads, case.table[case.slots[written], positions // PAGE], positions)
    assert_rounded(results.pool[places[:, 0]], k, heads.dtype)
    np.testing.assert_array_equal(results.pool[places[:, 1, :, : heads.head_dim]], as_bits(v, heads.dtype))
    assert not results.pool[places[:, 1, :, heads.head_dim :]].any()
    pool[places] = results.pool[places]
    np.testing.assert_array_equal(results.pool, pool)
    found, roundoff = widen_bits(np.ascontiguousarray(results.out), heads.dtype), UNIT_ROUNDOFF[heads.dtype]
    assert not results.out[case.lengths == 0].any()
    for i in written:
        expected, magnitude = reference(case, int(i))
        error = np.abs(found[i] - expected)  # probabilities and result are rounded once each
        assert (error <= 2 * _CUT * roundoff * magnitude + 1e-6).all(), (case.lengths[i], (error / magnitude).max())
        assert np.linalg.norm(error) <= roundoff * np.linalg.norm(expected), case.lengths[i]


CASES = [
    draw_case(Heads(128, 8, 2, "head")),
    draw_case(Heads(128, 2, 2, "full", 1.5), tiled=True),
    draw_case(Heads(64, 16, 2, "none", 1.0), sinks=True, window=128, tiled=True, lane_columns=32),
    draw_case(Heads(64, 6, 2, dtype="F16"), window=300),
    draw_case(Heads(80, 12, 1, "head", norm_f32=True), sinks=True),
    draw_case(Heads(96, 4, 1, "none", dtype="F16"), tiled=True, window=1),
    draw_case(Heads(16, 24, 2, "full"), (1, 300, 0, 70)),
    draw_case(Heads(256, 8, 1, "head"), (257, 1, 0, 2100), sinks=True, tiled=True),
    draw_case(Heads(256, 16, 1, "none", dtype="F16"), (70, 600), window=65),
    draw_case(Heads(72, 40, 2, "full", norm_f32=True), (530, 0, 17)),  # 20 queries to a head: two row blocks, the last of 4
    draw_case(Heads(6, 3, 3, "head", 1.0), (1, 65, 400)),
    draw_case(Heads(200, 5, 5), (33, 513)),
]  # fmt: skip


def name(case: Case) -> str:
    h = case.heads
    return f"{h.head_dim}-{h.num_heads}-{h.num_kv_heads}-{h.norm}-{h.dtype}-{case.window}-{case.sinks is not None}-{case.tiled}"


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES if case.heads.head_dim > 128], ids=name)
def test_builds_for_less_shared_memory(gpu: Any, case: Case) -> None:
    """Those of GPUs that have 100 KiB a multiprocessor, such as sm_89 and sm_120."""
    for workers in (1, 3):
        check(case, run(gpu, case, workers, shared_limit=100 << 10))


@pytest.mark.parametrize("shared_limit", [100 << 10, 164 << 10, 228 << 10])
def test_builds_fit_every_gpu(shared_limit: int) -> None:
    for head_dim in range(2, 257, 2):
        for group in (1, 8, 16, 40):
            build = decode_attention(head_dim, group, 2, shared_limit, 132)
            assert build.shared_bytes + build.static_bytes <= shared_limit - 1024
            assert build.warps == (8 if head_dim <= 64 else 4) or shared_limit < 228 << 10
    assert decode_attention(128, 4, 8, 100 << 10, 132).warps == 4


def test_workers_are_bounded_and_never_too_few() -> None:
    build = decode_attention(128, 4, 8, 228 << 10, 132)
    assert [build.workers(n, 1) for n in (1, 256, 257, 1024, 8192, 40960)] == [1, 1, 2, 4, 16, 16]
    assert [build.workers(n, 9) for n in (256, 1024, 1025, 8192, 40960)] == [1, 1, 2, 8, 16]
    assert [build.workers(40960, batch) for batch in (1, 16, 32, 64, 128, 256)] == [16, 16, 16, 8, 4, 2]
    for batch in (1, 7, 64, 1000):
        assert build.workers(40960, batch) * batch * build.blocks <= max(32 * 132, batch * build.blocks)
        found = {build.workers(n, batch) for n in range(1, 9000)}
        assert sorted(found) == build.reachable_workers(9000, batch)
        assert found <= set(SPLIT_WORKERS)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=name)
def test_attention_and_cache(gpu: Any, case: Case) -> None:
    results = run(gpu, case, 32)
    check(case, results)
    for workers, early_reads in ((32, 0), (3, 1), (1, 0)):  # neither when nor by whom a split is done matters
        again = run(gpu, case, workers, early_reads)
        np.testing.assert_array_equal(again.out, results.out)
        np.testing.assert_array_equal(again.pool, results.pool)
    check(case, run(gpu, case, 2, 1, split_tokens=1024))


@pytest.mark.gpu
def test_what_a_sequence_gets_does_not_depend_on_the_others(gpu: Any) -> None:
    case = CASES[0]
    whole = run(gpu, case, 8)
    for i in (2, 4, 5):
        np.testing.assert_array_equal(run(gpu, case.row(i), 32).out[0], whole.out[i])


@pytest.mark.gpu
def test_values_that_are_not_numbers_reach_their_own_sequence_alone(gpu: Any) -> None:
    case = draw_case(Heads(64, 4, 2), (100, 300, 0, 40))
    case.inputs.q[1, 2, 7] = np.nan
    found = widen_bits(np.ascontiguousarray(run(gpu, case, 2).out), "BF16").reshape(4, 4, 64)
    assert np.isnan(found[1, 2]).all()
    found[1, 2] = 0
    assert np.isfinite(found).all()
