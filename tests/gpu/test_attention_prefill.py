"""`attention_prefill*.cu` against float64 attention over the same 16-bit inputs, through a permuted and poisoned cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from kernel_inputs import as_bits, widen_bits

from megalith.runtime.attention_plan import PrefillAttention
from megalith.runtime.gpu_buffers import PAGE_TOKENS as PAGE
from megalith.runtime.gpu_buffers import items_of_row

NUM_SMS = 132
POISON = 0xFFFF  # a NaN in both element types


@dataclass(frozen=True)
class Problem:
    """Sequences with their whole keys and values, of which the last `num_tokens` are new."""

    dtype: str
    q: list[np.ndarray]  # uint16 [num_tokens, num_heads, head_dim]
    keys: list[np.ndarray]  # uint16 [length, num_kv_heads, head_dim]
    values: list[np.ndarray]
    window: int = 0
    sinks: np.ndarray | None = None  # uint16 [num_heads]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """num_heads, num_kv_heads, head_dim."""
        return self.q[0].shape[1], self.keys[0].shape[1], self.keys[0].shape[2]

    def part(self, number: int, start: int, stop: int) -> Problem:
        """One sequence's new tokens start to stop, those before them already in the cache."""
        length = len(self.keys[number]) - len(self.q[number]) + stop
        q, keys, values = self.q[number][start:stop], self.keys[number][:length], self.values[number][:length]
        return Problem(self.dtype, [q], [keys], [values], self.window, self.sinks)


def problem(
    lengths: list[tuple[int, int]], group: int, head_dim: int, num_kv_heads: int = 2, dtype: str = "BF16", window: int = 0,
    sinks: bool = False,
) -> Problem:  # fmt: skip
    """Random inputs; `lengths` are (tokens before, new tokens)."""
    rng = np.random.default_rng(len(lengths) + lengths[0][1] + group + head_dim)

    def draw(*shape: int) -> np.ndarray:
        return as_bits(1.5 * rng.standard_normal(shape), dtype)

    return Problem(
        dtype,
        [draw(new, num_kv_heads * group, head_dim) for _, new in lengths],
        [draw(context + new, num_kv_heads, head_dim) for context, new in lengths],
        [draw(context + new, num_kv_heads, head_dim) for context, new in lengths],
        window, draw(num_kv_heads * group) if sinks else None,
    )  # fmt: skip


def reference(case: Problem, number: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 [num_tokens, num_heads * head_dim]: attention, and its weights' mean of the values' magnitudes."""
    num_heads, num_kv_heads, head_dim = case.sizes
    q, keys, values = (widen_bits(x[number], case.dtype).astype(np.float64) for x in (case.q, case.keys, case.values))
    position = np.arange(len(keys) - len(q), len(keys))[:, None]
    key = np.arange(len(keys))
    seen = (key <= position) & (key > position - (case.window or len(keys)))
    mixed, magnitude = np.empty_like(q), np.empty_like(q)
    for head in range(num_heads):
        kv_head = head * num_kv_heads // num_heads
        scores = np.where(seen, q[:, head] @ keys[:, kv_head].T * head_dim**-0.5, -np.inf)
        sink = -np.inf if case.sinks is None else float(widen_bits(case.sinks[head : head + 1], case.dtype)[0])
        top = np.maximum(scores.max(axis=1, keepdims=True), sink)
        weights = np.exp(scores - top)
        weights /= weights.sum(axis=1, keepdims=True) + np.exp(sink - top)
        mixed[:, head], magnitude[:, head] = weights @ values[:, kv_head], weights @ np.abs(values[:, kv_head])
    return mixed.reshape(len(q), -1), magnitude.reshape(len(q), -1)


def cache(case: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The pool and the block table, sequences in its rows from the last to the first; whatever nobody may use is NaN."""
    _, num_kv_heads, head_dim = case.sizes
    counts = [-(-len(keys) // PAGE) for keys in case.keys]
    order = np.random.default_rng(1).permutation(sum(counts) + 1).astype(np.int32)
    panels, poisoned, order = -(-head_dim // 64), order[-1], order[:-1]
    pool = np.full((len(order) + 1, 2, num_kv_heads, panels, PAGE, 64), POISON, np.uint16)
    table = np.full((len(counts) + 1, max(counts) + 3), poisoned, np.int32)
    slot, chunk = np.arange(PAGE)[:, None], np.arange(8)
    for number, count in enumerate(counts):
        pages, order = order[:count], order[count:]
        first_seen = max(0, len(case.keys[number]) - len(case.q[number]) - case.window + 1) if case.window else 0
        table[len(counts) - number, first_seen // PAGE : count] = pages[first_seen // PAGE :]
        for part, rows in enumerate((case.keys[number], case.values[number])):
            padded = np.zeros((count * PAGE, num_kv_heads, panels * 64), np.uint16)
            padded[:, :, :head_dim] = POISON
            padded[: len(rows), :, :head_dim] = rows
            chunks = padded.reshape(count, PAGE, num_kv_heads, panels, 8, 8).transpose(0, 2, 3, 1, 4, 5)
            pool[pages, part] = chunks[:, :, :, slot, chunk ^ (slot & 7)].reshape(count, num_kv_heads, panels, PAGE, 64)
    return pool, table


def offsets(num_tokens: int, columns: int, tiled: bool, lane_columns: int, pitch: int) -> np.ndarray:
    """Element index of (token, column) in an activation (runtime/kernels/activation.cuh)."""
    token, column = np.arange(num_tokens)[:, None], np.arange(columns)[None]
    if not tiled:
        return token * pitch + column
    group = 4 * lane_columns
    t, r = column % group // lane_columns, column % lane_columns
    position = column - column % group + 16 * (r // 4) + 8 * (r // 2 % 2) + 2 * t + r % 2
    return (position // 64 * pitch + token) * 64 + (position % 64 // 8 ^ token & 7) * 8 + position % 8


def run(
    gpu: Any, build: PrefillAttention, case: Problem, tiled: bool = True, lane_columns: int = 8, num_sms: int = NUM_SMS
) -> list[np.ndarray]:
    """uint16 [num_tokens, num_heads * head_dim] of each sequence; twice, and nothing else may be written."""
    if build.wgmma and gpu.arch != "sm_90a":
        pytest.skip(f"{build.name} is for sm_90a, this is {gpu.arch}")
    num_heads, num_kv_heads, head_dim = case.sizes
    group, unit = num_heads // num_kv_heads, max(64, 4 * lane_columns)
    counts = [len(q) for q in case.q]
    starts = np.cumsum([0, *counts])
    queries = np.zeros((starts[-1], num_heads, build.panels * 64), np.uint16)
    queries[:, :, :head_dim] = np.concatenate(case.q)
    pool, table = cache(case)
    sequences = np.array(
        [[len(counts) - i, starts[i], counts[i], len(case.keys[i]) - counts[i]] for i in range(len(counts))], np.int32
    )
    items = build.items(sequences, group, case.window)
    columns = num_heads * head_dim
    padded, tokens_padded = -(-columns // unit) * unit, -(-int(starts[-1]) // 8) * 8 + 8
    kernel = gpu.compile(build.name, build.name, **build.defines(case.dtype, tiled, lane_columns))
    inputs = [gpu.array(x) for x in (queries, pool, table, sequences, items, np.array([len(items)], np.int32))]
    results = []
    for _ in range(2):
        y = gpu.empty_poisoned((tokens_padded * padded,), np.uint16)
        args = (
            *inputs[:3], np.int32(table.shape[1]), *inputs[3:], np.int32(num_kv_heads), np.int32(group),
            np.int32(case.window), np.float32(head_dim**-0.5), gpu.array(case.sinks) if case.sinks is not None else 0, y,
            np.int32(tokens_padded if tiled else padded),
        )  # fmt: skip
        grid = build.grid(len(items) + 2, num_kv_heads, num_sms)  # the list may be shorter than it could be
        gpu.launch(kernel, grid, (build.threads, 1, 1), args, shared_bytes=build.shared_bytes)
        results.append(gpu.get(y))
    np.testing.assert_array_equal(results[0], results[1])
    where = offsets(int(starts[-1]), columns, tiled, lane_columns, tokens_padded if tiled else padded)
    untouched = np.ones(len(results[0]), bool)
    untouched[where] = False
    assert (results[0][untouched] == POISON).all()
    return [results[0][where[starts[i] : starts[i + 1]]] for i in range(len(counts))]


def check(case: Problem, found: list[np.ndarray]) -> None:
    """Within the rounding of weights and result: half a unit in the last place each, doubled for everything else."""
    bound, norm = (2.0**-8, 4e-3) if case.dtype == "BF16" else (2.0**-11 * 2, 6e-4)
    for number, bits in enumerate(found):
        expected, magnitude = reference(case, number)
        error = np.abs(widen_bits(bits, case.dtype) - expected)
        assert (error <= bound * (np.abs(expected) + magnitude)).all(), (number, np.nanmax(error), np.isnan(error).sum())
        assert np.linalg.norm(error) < norm * np.linalg.norm(expected)


BUILDS = [PrefillAttention(64, True), PrefillAttention(128, True), *(PrefillAttention(d, False) for d in (64, 128))]
OTHER_DIMS = [PrefillAttention(d, False) for d in (16, 80, 96, 256, 42)]


def _name(value: object) -> str | None:
    return f"{value.name}-{value.head_dim}" if isinstance(value, PrefillAttention) else None


@pytest.mark.gpu
@pytest.mark.parametrize("build", [*BUILDS, *OTHER_DIMS], ids=_name)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_lengths(gpu: Any, build: PrefillAttention, length: int) -> None:
    case = problem([(0, length)], 4, build.head_dim)
    check(case, run(gpu, build, case))


@pytest.mark.gpu
@pytest.mark.parametrize("build", [*BUILDS, PrefillAttention(80, False)], ids=_name)
@pytest.mark.parametrize(("group", "num_kv_heads"), [(1, 3), (3, 2), (8, 1), (12, 1)])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_groups(gpu: Any, build: PrefillAttention, group: int, num_kv_heads: int, dtype: str) -> None:
    case = problem([(0, 130)], group, build.head_dim, num_kv_heads, dtype)
    check(case, run(gpu, build, case))


@pytest.mark.gpu
@pytest.mark.parametrize("build", BUILDS, ids=_name)
@pytest.mark.parametrize("group", [1, 4])
def test_long(gpu: Any, build: PrefillAttention, group: int) -> None:
    case = problem([(0, 1000), (1117, 333)], group, build.head_dim, 8)
    check(case, run(gpu, build, case))


@pytest.mark.gpu
@pytest.mark.parametrize("build", [*BUILDS, *OTHER_DIMS], ids=_name)
@pytest.mark.parametrize("window", [128, 17])
@pytest.mark.parametrize("sinks", [False, True])
def test_windows_and_sinks(gpu: Any, build: PrefillAttention, window: int, sinks: bool) -> None:
    case = problem([(300, 161), (0, 90), (77, 1)], 3, build.head_dim, 2, window=window, sinks=sinks)
    check(case, run(gpu, build, case))


@pytest.mark.gpu
@pytest.mark.parametrize("build", [*BUILDS, PrefillAttention(80, False)], ids=_name)
@pytest.mark.parametrize(("tiled", "lane_columns"), [(False, 8), (True, 32)])
def test_output_layouts(gpu: Any, build: PrefillAttention, tiled: bool, lane_columns: int) -> None:
    case = problem([(5, 70)], 3, build.head_dim, 1, sinks=True)
    check(case, run(gpu, build, case, tiled, lane_columns))


@pytest.mark.gpu
@pytest.mark.parametrize("build", [*BUILDS, PrefillAttention(80, False)], ids=_name)
@pytest.mark.parametrize("window", [0, 100])
def test_sequence_and_chunks_alone_or_among_others(gpu: Any, build: PrefillAttention, window: int) -> None:
    """What a token gets depends on its own sequence alone, bit for bit, in chunks too."""
    case = problem([(0, 200), (130, 75), (64, 130)], 4, build.head_dim, 2, window=window)
    together = run(gpu, build, case, num_sms=5)  # persistent blocks take several items
    check(case, together)
    for number in range(3):
        alone = run(gpu, build, case.part(number, 0, len(case.q[number])))
        np.testing.assert_array_equal(alone[0], together[number])
    chunks = [run(gpu, build, case.part(0, *span))[0] for span in ((0, 37), (37, 129), (129, 200))]
    np.testing.assert_array_equal(np.concatenate(chunks), together[0])


def test_work_lists_hold_every_row_once_and_the_most_to_do_first() -> None:
    build = PrefillAttention(128, True)
    items = build.items(np.array([[0, 0, 100, 0], [1, 100, 33, 500]], np.int32), 4, 0)
    assert items.tolist() == [[1, 0], [1, 1], [0, 2], [0, 1], [0, 3], [0, 0]]
    assert build.items(np.array([[0, 0, 129, 0]], np.int32), 1, 16).tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("build", [PrefillAttention(64, True), PrefillAttention(128, True), PrefillAttention(80, False)])
def test_work_lists_are_no_longer_than_planned(build: PrefillAttention) -> None:
    rng = np.random.default_rng(0)
    for group in (1, 3, 5, 71):
        for counts in ([1] * 9, [65, 64, 63], rng.integers(1, 300, 5).tolist()):
            first = np.cumsum([0, *counts])[:-1]
            sequences = np.array([(i, at, n, 0) for i, (at, n) in enumerate(zip(first, counts, strict=True))], np.int32)
            items = build.items(sequences, group, 0)
            assert len(items) <= build.most_items(sum(counts), len(counts), group)
            for row in range(sum(counts)):
                assert 1 <= len(build.items_of_rows(items, sequences, group, [row])) <= items_of_row(group, build.rows)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_matrix_descriptors_name_the_elements_that_are_meant(head_dim: int) -> None:
    """wgmma's addressing with the 128-byte swizzle (ptx.cuh, swizzled_descriptor) over a tile of two pages as copied."""
    build, keys = PrefillAttention(head_dim, True), 2 * PAGE
    rng = np.random.default_rng(0)
    tile = rng.permutation(keys * head_dim).astype(np.uint16).reshape(keys, head_dim)  # distinct values
    shared = np.zeros((build.panels, keys, 64), np.uint16)
    row, chunk = np.arange(PAGE)[:, None], np.arange(8)
    for page in range(2):
        panels = tile[page * PAGE : (page + 1) * PAGE].reshape(PAGE, build.panels, 8, 8)
        for panel in range(build.panels):  # what the cache holds, in a place of its own
            shared[panel, page * PAGE : (page + 1) * PAGE] = panels[row, panel, chunk ^ (row & 7)].reshape(PAGE, 64)
    image = shared.reshape(-1)

    def fetch(address_bytes: np.ndarray) -> np.ndarray:
        return image[(address_bytes ^ (address_bytes >> 7 & 7) << 4) // 2]

    panel_bytes, k = keys * 128, np.arange(16)[None]
    for step in range(head_dim // 16):  # B of S: n = key, k = column; K-major, stride 1024
        n, start = np.arange(keys)[:, None], step // 4 * panel_bytes + step % 4 * 32
        found = fetch(start + n // 8 * 1024 + n % 8 * 128 + k * 2)
        np.testing.assert_array_equal(found, tile[:, 16 * step : 16 * step + 16])
    for step in range(keys // 16):  # B of O: n = column, k = key; MN-major, leading panel_bytes, stride 1024
        n = np.arange(head_dim)[:, None]
        found = fetch(2048 * step + n // 64 * panel_bytes + n % 64 * 2 + k // 8 * 1024 + k % 8 * 128)
        np.testing.assert_array_equal(found.T, tile[16 * step : 16 * step + 16])
