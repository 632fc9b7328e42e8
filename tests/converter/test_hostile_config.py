"""Hostile config.json and generation_config.json: only the expected errors, each naming its file."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    INVALID,
    packs_or_refuses,
    refused,
    tiny_config,
    tiny_tensors,
    write_checkpoint,
)

from megalith.converter.plan import Options


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (b"", "not JSON"),
        (b"\xff\xff", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"architectures": ["LlamaForCausalLM"], "architectures": []}', "duplicate key 'architectures'"),
        (b'{"a": {"b": 1, "b\\u0000": 2, "b\\u0000": 3}}', "duplicate key 'b\\x00'"),
        (b"[" * 100_000, "not JSON"),
        (b'{"architectures": ' + b"[" * 900 + b"]" * 900 + b"}", "nested deeper than 32"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "not JSON: Exceeds the limit"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_broken_config(name: str, config: bytes, words: str, tmp_path: Path) -> None:
    refused(write_checkpoint(tmp_path / "checkpoint", files={name: config}), INVALID, f"checkpoint/{name}: ", words)


def test_config_too_large(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    for name in ("config.json", "tokenizer.json"):
        with (folder / name).open("ab") as file:
            file.truncate((64 << 20) + 1)
        refused(folder, INVALID, f"{name}: larger than 67108864 bytes")
        os.truncate(folder / name, 0)
        (folder / name).write_text(json.dumps(tiny_config()))


HOSTILE: list[Any] = [None, "x", "", [], [[]], {}, {"a": []}, -1, 0, 0.5, 1e30, 2**31, 2**63, 10**400, True, False,
           math.nan, math.inf, -math.inf, "\x1b[31m\n", "9" * 10_000]  # fmt: skip
KEYS = {
    "LlamaForCausalLM": [
        "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
        "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
        "tie_word_embeddings", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "dtype",
        "quantization_config", "layer_types",
    ],
    "MistralForCausalLM": ["sliding_window", "use_sliding_window", "max_window_layers", "layer_types"],
    "Qwen3ForCausalLM": ["sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "attention_bias"],
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": 32},
    "yarn": {
        "factor": 2.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0,
        "attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": True,
    },
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "key"), [(name, key) for name, keys in KEYS.items() for key in keys])
def test_hostile_values_of_every_config_key(architecture: str, key: str, tmp_path: Path) -> None:
    config = tiny_config(architecture, use_sliding_window=True)
    folder = write_checkpoint(tmp_path / "checkpoint", config)
    outcomes = []
    for value in HOSTILE:
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        outcomes.append(packs_or_refuses(folder, tmp_path / "model.lith", Options(max_seq_len=16)))
    assert any(outcomes), "some of these values are wrong for any key"


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in ROPES.items() for key in ("rope_type", *keys)])
def test_hostile_values_of_every_rope_key(kind: str, key: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    outcomes = []
    for value in HOSTILE:
        settings = {"rope_type": kind, "rope_theta": 1e4, **ROPES[kind], key: value}
        config = tiny_config(rope_theta=..., rope_parameters=settings)
        (folder / "config.json").write_text(json.dumps(config))
        outcomes.append(packs_or_refuses(folder, tmp_path / "model.lith", Options(max_seq_len=16)))
    assert sum(outcome is not None for outcome in outcomes) > len(HOSTILE) // 2


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
def test_hostile_values_of_generation_keys(key: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    for value in HOSTILE:
        (folder / "generation_config.json").write_text(json.dumps({key: value}))
        packs_or_refuses(folder, tmp_path / "model.lith")


def test_a_giant_number_of_layers_costs_nothing(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=2**31 - 1)
    folder = write_checkpoint(tmp_path / "checkpoint", config, tiny_tensors(tiny_config()))
    tracemalloc.start()
    refused(folder, INVALID, "config.json: num_hidden_layers is 2147483647: must be an integer from 1 to 16384")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
