"""`check` on real launches: the golden models pass, and a matrix broken in the arena is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import DENSE_CASES, GoldenModel

import megalith
from megalith.checking import check
from megalith.cli import run
from megalith.runtime.check import (
    DECODE_STEPS,
    NumpyPasses,
    bounded_prompt,
    compare,
    first_above,
    num_comparisons,
    random_prompt,
    tolerance,
)
from megalith.runtime.cupy_backend import CupyBackend
from megalith.runtime.cupy_passes import CupyPasses
from megalith.runtime.numpy_backend import NumpyBackend

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("golden", DENSE_CASES, indirect=True)
def test_golden_models_pass(gpu: Any, golden: GoldenModel, tmp_path: Path) -> None:
    path = golden.pack(tmp_path)
    report = check(path)
    worst = max(one.relative_error for one in report.differences)
    print(golden.name, f"{worst:.2e} of {report.tolerance:.2e}")
    with megalith.open(path) as packed:
        assert len(report.differences) == num_comparisons(NumpyBackend(packed).program, DECODE_STEPS)
    assert worst > 0
    assert report.first_above is None
    assert run(["generate", str(path), "--check"]) == 0


@pytest.mark.parametrize("golden", ["llama2", "qwen3"], indirect=True)
@pytest.mark.parametrize("name", ["layers.0.o_proj", "layers.1.down_proj"])
def test_a_matrix_that_is_broken_on_the_device_is_named(gpu: Any, golden: GoldenModel, tmp_path: Path, name: str) -> None:
    with megalith.open(golden.pack(tmp_path)) as packed:
        config, names = packed.index.config, packed.index.blobs.names
        ids = np.array(bounded_prompt(random_prompt(config), config.max_seq_len))
        backend, reference = CupyBackend(packed, max_seq_len=256), NumpyBackend(packed)
        blob = packed.index.blob(names.index(name))
    address = backend.address("weights") + blob.offset
    backend.cupy.cuda.runtime.memset(address, 0, blob.nbytes // 2)
    differences = list(compare(NumpyPasses(reference), CupyPasses(backend), ids, 1, names))
    first = first_above(differences, tolerance(backend.program.element))
    assert first is not None
    assert f"layers.{first.layer}.{first.operation}" == name
    assert first.step == 0
