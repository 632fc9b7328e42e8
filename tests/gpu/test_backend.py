"""Whole models on the GPU against transformers' FP32 and 16-bit runs (the golden files of the NumPy backend's tests)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import CASES, GoldenModel

import megalith
from megalith.converter.plan import Options
from megalith.runtime.engine import Engine

pytestmark = pytest.mark.gpu
DENSE = [case for case in CASES if GoldenModel(case).folder.parent.name == "models" and case != "llama_dynamic"]
MARGIN = 1.05  # errors of two roundings of one model are close where the model adds little to them


def relative_error(found: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def id_sets(model: GoldenModel) -> list[dict[str, np.ndarray]]:
    arrays = np.load(model.folder / "golden.npz")
    suffixes = [name.removeprefix("ids") for name in arrays.files if name.startswith("ids")]
    keys = ("ids", "positions", "logits_fp32", "logits_bf16")
    return [{key: arrays[key + suffix] for key in keys} for suffix in suffixes]


def load(model: GoldenModel, folder: Path, most_tokens: int) -> Engine:
    declared = model.config["max_position_embeddings"]
    assert isinstance(declared, int)
    return megalith.load(model.pack(folder, Options(max_seq_len=max(most_tokens, declared))), backend="cupy")


@pytest.mark.parametrize("golden", DENSE, indirect=True)
def test_logits_match_transformers(gpu: Any, golden: GoldenModel, tmp_path: Path) -> None:
    sets = id_sets(golden)
    engine = load(golden, tmp_path, max(len(ids["ids"]) for ids in sets))
    for ids in sets:
        found = engine.logits(ids["ids"])[ids["positions"]]
        error, bound = relative_error(found, ids["logits_fp32"]), relative_error(ids["logits_bf16"], ids["logits_fp32"])
        print(golden.name, len(ids["ids"]), f"{error:.3e} against {bound:.3e}")
        assert error <= MARGIN * bound
        np.testing.assert_array_equal(engine.logits(ids["ids"])[ids["positions"]], found)


@pytest.mark.parametrize("golden", ["llama2", "mistral_window", "qwen3", "qwen2", "llama_mqa", "qwen3_tied_mqa"], indirect=True)
def test_decoding_token_by_token_matches_too(gpu: Any, golden: GoldenModel, tmp_path: Path) -> None:
    ids = id_sets(golden)[0]
    engine = load(golden, tmp_path, len(ids["ids"]))
    cache = engine.backend.new_cache()
    rows = [engine.backend.forward(ids["ids"][i : i + 1], cache, i + 1, True)[0] for i in range(len(ids["ids"]))]
    error = relative_error(np.array(rows)[ids["positions"]], ids["logits_fp32"])
    bound = relative_error(ids["logits_bf16"], ids["logits_fp32"])
    print(golden.name, f"{error:.3e} against {bound:.3e}")
    assert error <= MARGIN * bound
