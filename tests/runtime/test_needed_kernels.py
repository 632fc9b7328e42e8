"""What is said to be needed covers whatever passes within the limits ask for, and is little more."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from golden_models import GoldenModel

import megalith
from megalith.converter.plan import Options
from megalith.format.index import Index
from megalith.runtime.compile import Build
from megalith.runtime.cupy_backend import CupyBackend
from megalith.runtime.gpu_buffers import Limits, device_buffers
from megalith.runtime.gpu_program import DecodePass, GpuProgram, Places, PrefillPass, can_use_wgmma
from megalith.runtime.launch import Launch
from megalith.runtime.loaded_kernels import LoadedKernels
from megalith.runtime.needed_kernels import KernelNeeds, batch_bucket, batch_buckets, token_classes

NUM_SMS = 132
CASES = [("llama2", "sm_90a"), ("qwen3", "sm_90a"), ("qwen3", "sm_89"), ("mistral_window", "sm_80"), ("qwen2", "sm_120")]


class Asked:
    """Every kernel that the whole program asks for."""

    def __init__(self, index: Index, limits: Limits, arch: str) -> None:
        self.kernels: set[tuple[Build, str]] = set()
        places = Places(0, 0, {buffer.name: 0 for buffer in device_buffers(index.config, limits)})
        self.program = GpuProgram(index, limits, places, arch, self._get)

    def _get(self, build: Build, entry: str) -> Asked:
        self.kernels.add((build, entry))
        return self

    def bind(self, *arguments: object, **named: object) -> Launch:
        launch = SimpleNamespace(operation=None)
        launch.moved = lambda addresses: SimpleNamespace()
        return cast(Launch, launch)


@pytest.mark.parametrize(("name", "arch"), CASES)
@pytest.mark.parametrize("mxfp4", [False, True])
def test_every_pass_finds_its_kernels(name: str, arch: str, mxfp4: bool, tmp_path: Path) -> None:
    path = GoldenModel(name).pack(tmp_path, Options(linear="mxfp4") if mxfp4 else None)
    with megalith.open(path) as packed:
        index = packed.index
    has_wgmma = can_use_wgmma(arch, index.config)
    limits = Limits(70, 4096, 1500, 64, NUM_SMS, (228 if arch == "sm_90a" else 100) << 10, has_wgmma)
    needs, asked = KernelNeeds(index, limits, arch), Asked(index, limits, arch)
    everything = needs.everything()
    assert len(set(everything)) == len(everything)
    for batch in batch_buckets(limits.max_sequences):
        asked.program.decode(batch, 1, DecodePass(0, 0))
    counts = [*range(1, 40), *np.random.default_rng(0).integers(40, 1501, 60).tolist(), 1500]
    for count in counts:
        rows = min(count, limits.max_sequences)
        for whole in (False, True):
            asked.program.prefill(PrefillPass(count, rows, *[0] * 9, whole=whole))
    asked.program.sample(1, 0, 0)
    asked.program.count_tokens(0, 0, 1, False)
    assert asked.kernels <= set(everything)
    assert set(needs.decode([1])) < set(everything)
    assert len(everything) < 90


def test_batch_invariance_takes_one_product_for_all_numbers_of_tokens(tmp_path: Path) -> None:
    with megalith.open(GoldenModel("qwen3").pack(tmp_path)) as packed:
        index = packed.index
    limits = Limits(200, 4096, 2048, 64, NUM_SMS, 228 << 10, has_wgmma=True, batch_invariant=True)
    products = [build for build, _ in KernelNeeds(index, limits, "sm_90a").everything() if "EPILOGUE" in dict(build.defines)]
    assert {build.source for build in products} == {"gemm_wgmma"}
    assert {dict(build.defines)["SPLIT"] for build in products} == {0}
    assert not [buffer for buffer in device_buffers(index.config, limits) if "rows" in buffer.name and buffer.nbytes]


def test_buckets_and_classes() -> None:
    assert batch_buckets(11) == [1, 2, 4, 8, 11]
    assert batch_buckets(64) == [1, 2, 4, 8, 16, 32, 64]
    assert [batch_bucket(count, 11) for count in (1, 3, 8, 9, 11)] == [1, 4, 8, 11, 11]
    assert token_classes(40) == [1, 16, 32, 40]
    assert token_classes(7) == [1, 7]


def test_a_bench_gets_its_kernels_at_once(tmp_path: Path) -> None:
    with megalith.open(GoldenModel("qwen3").pack(tmp_path)) as packed:
        index = packed.index
    limits = Limits(20, 4096, 1500, 64, NUM_SMS, 228 << 10, has_wgmma=True)
    loads: list[set[tuple[Build, str]]] = []
    backend = CupyBackend.__new__(CupyBackend)  # there is no GPU: what this needs of one
    backend.limits, backend._needs, backend._has_all_kernels = limits, KernelNeeds(index, limits, "sm_90a"), False
    backend._kernels = cast(LoadedKernels, SimpleNamespace(load=lambda wanted: loads.append(set(wanted))))
    backend.load_kernels([1, 13, 20], [512, 1500])
    asked = Asked(index, limits, "sm_90a")
    for batch in (1, 16, 20):
        asked.program.decode(batch, 1, DecodePass(0, 0))
    for count in (512, 1500):
        asked.program.prefill(PrefillPass(count, 0, *[0] * 9))
    asked.program.head(1, 0)
    [loaded] = loads
    assert asked.kernels <= loaded
