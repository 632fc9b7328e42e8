"""The CuPy backend's launches and what `check` makes of them, without a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeGpu
from golden_models import GoldenModel

import megalith
from megalith.runtime.attention_plan import PrefillAttention
from megalith.runtime.check import NumpyPasses, bounded_prompt, compare, num_comparisons, random_prompt
from megalith.runtime.cupy_passes import CupyPasses
from megalith.runtime.gpu_buffers import Limits, device_buffers
from megalith.runtime.gpu_program import DecodePass, GpuProgram, Places, PrefillPass
from megalith.runtime.numpy_backend import NumpyBackend
from megalith.runtime.program import Kind, Operation, build_program, operation_name


@dataclass
class NoLaunch:
    """A launch that does nothing."""

    kernel: Any
    grid: Any
    block: Any
    args: Any
    shared_bytes: int = 0
    pdl: bool = True
    operation: Operation | None = None
    weight_bytes: int = 0

    @property
    def name(self) -> str:
        return f"{self.kernel.build.source}.{self.kernel.entry}"

    def moved(self, addresses: Mapping[int, int]) -> NoLaunch:
        return replace(self, args=tuple(addresses.get(a, a) if type(a) is int else a for a in self.args))


@dataclass(frozen=True)
class NoKernel:
    """Takes any arguments."""

    build: Any
    entry: str

    def bind(self, *arguments: Any) -> Any:
        return NoLaunch(self, *arguments)


def gpu_program(path: Path, arch: str) -> GpuProgram:
    limits = Limits(4, 256, 128, 16, 132, 228 << 10, arch == "sm_90a")
    with megalith.open(path) as packed:
        buffers = {buffer.name: (i + 1) << 40 for i, buffer in enumerate(device_buffers(packed.index.config, limits))}
        return GpuProgram(packed.index, limits, Places(1 << 30, 1 << 39, buffers), arch, NoKernel)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("golden", ["llama2", "qwen3"], indirect=True)
def test_launches_of_both_passes_know_their_operation(golden: GoldenModel, tmp_path: Path, arch: str) -> None:
    """Norms may be part of the launch that reads them; all else has one of its own, in the program's order."""
    path = golden.pack(tmp_path)
    program = gpu_program(path, arch)
    with megalith.open(path) as packed:
        names = packed.index.blobs.names
        wanted = [op for op in build_program(packed.index) if op.kind is not Kind.NORM]
    decode = program.decode(1, 1, DecodePass(0, 0))
    prefill = program.prefill(PrefillPass(64, 1, *[0] * 9, whole=True))
    for launches in (decode, prefill):
        found = [launch.operation for launch in launches if launch.operation and launch.operation.kind is not Kind.NORM]
        in_order = [op for i, op in enumerate(found) if i == 0 or op != found[i - 1]]  # qkv_proj and what follows it
        assert in_order == wanted
        for launch in launches:
            is_product = launch.name.startswith(("linear", "gemm"))
            assert bool(launch.weight_bytes) == is_product
            if is_product:
                assert launch.operation is not None
                assert operation_name(launch.operation, names) in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("golden", ["qwen3", "qwen2", "mistral_window", "llama_mqa", "llama_bias"], indirect=True)
def test_layers_that_are_alike_have_their_own_addresses(golden: GoldenModel, tmp_path: Path, arch: str) -> None:
    path = golden.pack(tmp_path)
    program, whole = gpu_program(path, arch), gpu_program(path, arch)
    assert len(set(program._likenesses)) < len(program._likenesses)
    whole._likenesses = [(object(),) for _ in whole._likenesses]
    for batch in (1, 4):
        step = DecodePass(7, 8)
        assert program.decode(batch, 2, step) == whole.decode(batch, 2, step)
    for is_whole in (False, True):
        prefill = PrefillPass(64, 2, 5, *range(10, 18), whole=is_whole)
        assert program.prefill(prefill) == whole.prefill(prefill)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("golden", ["qwen3"], indirect=True)
def test_only_chosen_rows_go_through_the_last_layer(golden: GoldenModel, tmp_path: Path, arch: str) -> None:
    program = gpu_program(golden.pack(tmp_path), arch)
    step = PrefillPass(64, 2, 5, *range(10, 18))
    whole = program.prefill(replace(step, whole=True))
    chosen = program.prefill(step)
    none = program.prefill(replace(step, num_rows=0))
    at = next(i for i in reversed(range(len(whole))) if whole[i].operation.kind is Kind.ATTENTION)  # type: ignore[union-attr]
    assert none == whole[:at]
    assert chosen[:at] == whole[:at]
    attention, taken, *following = chosen[at:]
    assert attention.name == whole[at].name
    assert taken.name == "take_rows.take_rows"
    assert taken.grid[0] == 2
    assert [launch.operation for launch in following] == [launch.operation for launch in whole[at + 1 :]]
    x, chosen_x = program._places["x"], program._places["chosen_x"]
    assert not [launch.name for launch in following if x in launch.args]
    assert [launch.operation.kind for launch in following if chosen_x in launch.args] == [  # type: ignore[union-attr]
        Kind.PROJECT, Kind.NORM, Kind.PROJECT, Kind.NORM,
    ]  # fmt: skip


def test_items_of_chosen_rows() -> None:
    rng = np.random.default_rng(0)
    for head_dim, group in ((128, 4), (64, 5), (128, 1)):
        attention = PrefillAttention(head_dim, wgmma=True)
        counts = rng.integers(1, 400, 9)
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        sequences = np.stack([np.arange(9), first, counts, rng.integers(0, 50, 9)], axis=1).astype(np.int32)
        items = attention.items(sequences, group, 0)
        for rows in ([], [0], (first + counts - 1).tolist(), rng.integers(0, counts.sum(), 20).tolist()):
            wanted = []
            for number, tile in items.tolist():
                heads = range(tile * attention.rows, min((tile + 1) * attention.rows, int(counts[number]) * group))
                if {int(first[number]) + row // group for row in heads} & set(rows):
                    wanted.append([number, tile])
            assert attention.items_of_rows(items, sequences, group, rows).tolist() == wanted


@pytest.mark.parametrize("golden", ["llama2", "mixtral"], indirect=True)
def test_launches_are_cut_where_the_residual_stream_is_written(golden: GoldenModel, tmp_path: Path) -> None:
    with megalith.open(golden.pack(tmp_path)) as packed:
        reference, gpu, names = NumpyBackend(packed), FakeGpu(NumpyBackend(packed)), packed.index.blobs.names
    ids = np.array(bounded_prompt(random_prompt(reference.config), reference.config.max_seq_len))
    found = list(compare(NumpyPasses(reference), CupyPasses(gpu), ids, 2, names))  # type: ignore[arg-type]
    assert len(found) == num_comparisons(reference.program, 2)
    assert {one.relative_error for one in found} == {0.0}
    count = len(ids)
    assert gpu.calls == [
        ("reserve", count), ("prefill", count), ("reserve", count + 1), ("decode", count), ("reserve", count + 2),
        ("decode", count + 1),
    ]  # fmt: skip
