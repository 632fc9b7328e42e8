"""`generate --check` as a person meets it, on a GPU that is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeGpu
from serving_models import serving_model

from megalith.checking import Report, check
from megalith.cli import run
from megalith.format.errors import RequestError
from megalith.runtime import cupy_backend
from megalith.runtime.check import Difference
from megalith.runtime.numpy_backend import NumpyBackend


@pytest.fixture
def gpu_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets the command find a GPU whose down_proj of layer 0 has some rows scaled."""

    def prepare(scale: float) -> None:
        def backend(packed: Any, **options: int) -> FakeGpu:
            assert set(options) == {"max_seq_len", "max_prefill_tokens"}
            reference = NumpyBackend(packed)
            reference.weights._matrices[list(packed.index.blobs.names).index("layers.0.down_proj")][:4] *= scale
            return FakeGpu(reference)

        monkeypatch.setattr(cupy_backend, "CupyBackend", backend)

    return prepare


def test_the_command_says_that_all_is_well(tmp_path: Path, gpu_with: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = serving_model(tmp_path)
    gpu_with(1.0)
    capsys.readouterr()
    assert run(["generate", str(model), "--check", "--prompt", "hello"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a GPU against NumPy, BF16, 5 prompt tokens, 3 decode steps"
    assert [line.split()[:-4] for line in lines[3:-1]] == [["embed_tokens"], ["0", "o_proj"], ["0", "down_proj"], ["lm_head"]]
    assert lines[-1] == "all relative errors are within 6.25e-02"
    assert run(["generate", str(model), "--check", "--prompt-ids", "3,1,2"]) == 0
    assert capsys.readouterr().out.startswith("a GPU against NumPy, BF16, 3 prompt tokens, 3 decode steps\n")
    assert run(["generate", str(model), "--check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["version"] == 1
    assert (report["ok"], report["first_above"], report["tolerance"], len(report["prompt_ids"])) == (True, None, 0.0625, 64)
    assert len(report["results"]) == 4 * 4
    assert report["results"][0] == {
        "step": 0, "operation": "embed_tokens", "layer": None, "relative_error": 0.0, "largest_difference": 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(("scale", "shown"), [(-1.0, "e-01"), (np.nan, "inf")])
def test_the_command_names_the_first_fault(
    tmp_path: Path, gpu_with: Any, capsys: pytest.CaptureFixture[str], scale: float, shown: str
) -> None:
    model = serving_model(tmp_path)
    gpu_with(scale)
    capsys.readouterr()
    assert run(["generate", str(model), "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("  above") for line in lines[3:-1]] == [False, False, True, True]
    assert lines[-1].startswith("first above 6.25e-02: prefill, layer 0, down_proj: ")
    assert shown in lines[-1] or "e+00" in lines[-1]
    assert run(["generate", str(model), "--check", "--json"]) == 1
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert not report["ok"]
    assert (report["first_above"]["operation"], report["first_above"]["layer"]) == ("down_proj", 0)


def test_a_table_shows_the_worst_decode_step() -> None:
    steps = [Difference(step, "o_proj", 3, [1e-3, 2e-3, 0.5, 3e-3][step], float(step)) for step in range(4)]
    *_, row, verdict = Report("a GPU", "BF16", [1], steps).lines()
    assert row.split() == ["3", "o_proj", "1.00e-03", "0.00e+00", "5.00e-01", "3.00e+00", "above"]
    assert verdict == "first above 6.25e-02: decode step 2, layer 3, o_proj: 5.00e-01"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--check"], 4, "the cupy backend needs"),
        (["--check", "--prompt", "x"], 2, "holds no tokenizer"),
        (["--check", "--backend", "numpy"], 2, "--backend numpy"),
        (["--check", "--trace", "x.json"], 2, "--trace"),
        (["--check", "--prompt", "x", "--chat", "y"], 2, "--prompt, --chat and --prompt-ids"),
        (["--check", "--prompt", "x", "--prompt-ids", "1"], 2, "--prompt, --chat and --prompt-ids"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    packed_llama: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(["generate", str(packed_llama), *words]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err


def test_ids_are_checked(packed_llama: Path) -> None:
    for ids in ([], [10**6]):
        with pytest.raises(RequestError, match="token"):
            check(packed_llama, ids)
