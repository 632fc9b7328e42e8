"""Logits of every architecture and option against transformers' FP32 and 16-bit runs (tools/make_golden.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden_models import CASES, GoldenModel, relative_error

import megalith
from megalith.converter.plan import Options
from megalith.runtime.engine import Engine

LONG = 8192


def load(model: GoldenModel, folder: Path, **options: int) -> Engine:
    longest = max(len(ids["ids"]) for ids in model.id_sets())
    declared = model.config["max_position_embeddings"]
    assert isinstance(declared, int)
    packed = model.pack(folder, Options(max_seq_len=max(longest, declared)))
    return megalith.load(packed, backend="numpy", **options)


@pytest.mark.parametrize("golden", CASES, indirect=True)
def test_logits_match_transformers(golden: GoldenModel, tmp_path: Path) -> None:
    engine = load(golden, tmp_path)
    for ids in golden.id_sets():
        logits = engine.logits(ids["ids"])
        assert logits.dtype == np.float32
        assert logits.shape == (len(ids["ids"]), engine.config.vocab_size)
        found, reference = logits[ids["positions"]], ids["logits_fp32"]
        error = relative_error(found, reference)
        assert error < 1e-5
        assert error <= relative_error(ids["logits_bf16"], reference)
        worst = np.abs(found - reference).max(axis=1) / np.abs(reference).max(axis=1)
        assert worst.max() < 1e-5


def test_every_kind_of_rope_is_tested_beyond_8192_positions() -> None:
    long = {case for case in CASES if any(len(ids["ids"]) > LONG for ids in GoldenModel(case).id_sets())}
    assert long >= {"llama3_rope", "llama_linear", "llama_dynamic", "llama_yarn"}


@pytest.mark.parametrize("golden", ["llama2", "mistral_window", "qwen3", "llama_mqa"], indirect=True)
def test_decoding_token_by_token_equals_prefill(golden: GoldenModel, tmp_path: Path) -> None:
    engine = load(golden, tmp_path)
    ids = golden.id_sets()[0]["ids"]
    whole = engine.logits(ids)
    cache = engine.backend.new_cache()
    one_by_one = [engine.backend.forward(ids[i : i + 1], cache, i + 1, True)[0] for i in range(len(ids))]
    assert relative_error(np.array(one_by_one), whole) < 2e-6


@pytest.mark.parametrize("golden", ["llama_bias", "qwen3", "llama_fp16"], indirect=True)
def test_decoding_tiles_at_every_use_gives_the_same_logits(golden: GoldenModel, tmp_path: Path) -> None:
    ids = golden.id_sets()[0]["ids"]
    cached = load(golden, tmp_path)
    engine = Engine(tmp_path / f"{golden.name}.lith", cache_bytes=0)
    assert cached.backend.weights.is_cached
    assert not engine.backend.weights.is_cached
    assert relative_error(engine.logits(ids), cached.logits(ids)) < 1e-6


@pytest.mark.parametrize("golden", ["llama3_rope"], indirect=True)
@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 1e-5), ("fp16", 1e-3)])
def test_a_chosen_dtype(golden: GoldenModel, tmp_path: Path, dtype: str, bound: float) -> None:
    packed = golden.pack(tmp_path, Options(dtype=dtype, max_seq_len=64))
    ids = golden.id_sets()[0]
    logits = megalith.load(packed).logits(ids["ids"])[ids["positions"]]
    assert relative_error(logits, ids["logits_fp32"]) < bound


def test_a_truncated_file_does_not_harm_a_loaded_engine(packed_llama: Path) -> None:
    engine = megalith.load(packed_llama)
    before = engine.logits([1, 2, 3])
    packed_llama.write_bytes(b"")
    np.testing.assert_array_equal(engine.logits([1, 2, 3]), before)
