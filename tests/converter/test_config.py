"""What config.json and generation_config.json say: both spellings of transformers, defaults, windows, token ids, lengths."""

from __future__ import annotations

import math
from typing import Any

import pytest
from checkpoints import tiny_config

from megalith.converter.architectures import ARCHITECTURES
from megalith.converter.config import ModelDescription, describe_model
from megalith.converter.rope_config import rope_parameters
from megalith.format.errors import CheckpointError, MegalithError, RequestError, UnsupportedError
from megalith.format.rope import MAX_POSITIONS, RopeParameters

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 24.0, "beta_slow": 2.0, "truncate": False}


def describe(
    config: dict[str, Any], generation: dict[str, Any] | None = None, max_seq_len: int | None = None
) -> ModelDescription:
    return describe_model(config, generation or {}, max_seq_len, "here/config.json")


def rope(**changes: Any) -> RopeParameters:
    return rope_parameters(tiny_config(rope_theta=changes.pop("rope_theta", ...), **changes), "here/config.json")


def windows(architecture: str, **changes: Any) -> list[int]:
    return describe(tiny_config(architecture, num_hidden_layers=4, **changes)).config.layer_windows


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [("default", {}), ("linear", {"factor": 2.0}), ("dynamic", {"factor": 2.0}), ("llama3", LLAMA3), ("yarn", YARN)],
)
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_both_spellings_give_the_same_rope(kind: str, parameters: dict[str, Any], key: str) -> None:
    old = rope(rope_theta=5e5, rope_scaling={key: kind, **parameters})
    new = rope(rope_parameters={key: kind, "rope_theta": 5e5, **parameters})
    both = rope(rope_theta=500000, rope_scaling={key: kind, **parameters}, rope_parameters={key: kind, **parameters})
    assert old == new == both
    assert (old.type, old.theta) == (kind, 5e5)
    assert {name: old.parameters[name] for name in parameters} == parameters


def test_rope_without_any_key_is_the_default() -> None:
    assert rope() == rope(rope_scaling=None, rope_parameters=None) == rope(rope_scaling={}) == RopeParameters("default", 1e4)
    assert rope(rope_parameters={"rope_theta": 2e4}) == RopeParameters("default", 2e4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, "rope_theta is 10000.0"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}}, "type linear and rope_type yarn"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "factor is 2.0 in one place and 4.0 in rope_parameters",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "rope_type is linear in one place and default in rope_parameters",
        ),
        (
            {"original_max_position_embeddings": 32, "rope_parameters": {"rope_type": "yarn", **YARN}},
            "original_max_position_embeddings is 64 in one place and 32 in another",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16}},
            "dynamic RoPE scales from max_position_embeddings = 32",
        ),
    ],
)
def test_contradictions_of_rope_are_errors(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=r"^here/config\.json: ") as caught:
        rope(**changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rope_type": "longrope"}, "rope type longrope is none of default, linear"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"full_attention": {"rope_type": "default"}}, "RoPE per layer type is not supported"),
    ],
)
def test_unknown_rope_is_unsupported(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        rope(rope_parameters=settings)


def test_partial_rotary_factor_of_one_is_whole() -> None:
    assert rope(partial_rotary_factor=1.0) == rope()


@pytest.mark.parametrize("name", ["factor", "low_freq_factor", "high_freq_factor"])
def test_llama3_needs_its_factors(name: str) -> None:
    settings = {key: value for key, value in LLAMA3.items() if key != name}
    with pytest.raises(CheckpointError, match=f"{name} is None: must be a number"):
        rope(rope_scaling={"rope_type": "llama3", **settings})


def test_yarn_defaults() -> None:
    found = rope(rope_scaling={"rope_type": "yarn", "factor": 4.0}).parameters
    assert found["original_max_position_embeddings"] == 32  # max_position_embeddings, as in transformers
    assert (found["beta_fast"], found["beta_slow"], found["truncate"]) == (32.0, 1.0, True)
    assert found["attention_factor"] == pytest.approx(0.1 * math.log(4.0) + 1.0, abs=1e-15)


def test_yarn_mscale() -> None:
    settings = {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0}
    wanted = (0.0707 * math.log(40.0) + 1.0) / (0.1 * math.log(40.0) + 1.0)
    assert rope(rope_scaling=settings).attention_factor == pytest.approx(wanted, abs=1e-15)
    assert rope(rope_scaling={**settings, "attention_factor": 1.5}).attention_factor == 1.5


def test_defaults_of_missing_keys_llama() -> None:
    required = ("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads", "max_position_embeddings")  # fmt: skip
    config = describe({key: value for key, value in tiny_config().items() if key in required}).config
    assert (config.num_key_value_heads, config.head_dim) == (2, 8)
    assert (config.rms_norm_eps, config.tie_word_embeddings) == (1e-6, False)
    assert (config.bos_token_id, config.eos_token_ids) == (None, [])
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm) == (False, False, False, "none")


def test_defaults_of_missing_keys_of_other_architectures() -> None:
    large = {"num_attention_heads": 32, "hidden_size": 64, "head_dim": ..., "num_key_value_heads": ...}
    mistral = describe(tiny_config("MistralForCausalLM", **large)).config
    assert (mistral.num_key_value_heads, mistral.head_dim, mistral.layer_windows) == (8, 2, [4096])
    qwen2 = describe(tiny_config("Qwen2ForCausalLM", **large)).config
    assert (qwen2.num_key_value_heads, qwen2.qkv_bias, qwen2.o_bias, qwen2.layer_windows) == (32, True, False, [0])
    qwen3 = describe(tiny_config("Qwen3ForCausalLM", **large)).config
    assert (qwen3.num_key_value_heads, qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias) == (32, 128, "head", False)


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim"])
def test_null_means_derived(key: str) -> None:
    """transformers: null num_key_value_heads is as many as heads, null head_dim is hidden_size / heads."""
    config = describe(tiny_config("MistralForCausalLM", **{key: None})).config
    assert {"num_key_value_heads": 2, "head_dim": 8}[key] == getattr(config, key)


def test_flags() -> None:
    config = describe(tiny_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)).config
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.tie_word_embeddings) == (True, True, True, True)
    config = describe(tiny_config("Qwen3ForCausalLM", attention_bias=True)).config
    assert (config.qkv_bias, config.o_bias, config.qk_norm) == (True, True, "head")


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"architectures": ["BertModel"]}, UnsupportedError, "architecture BertModel is none of LlamaForCausalLM"),
        ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, CheckpointError, "must name one architecture"),
        ({"architectures": ...}, CheckpointError, "architectures is None"),
        ({"model_type": "qwen2"}, CheckpointError, "model_type qwen2 contradicts LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act gelu is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedError, "quantization_config awq"),
        ({"dtype": "float16"}, CheckpointError, "torch_dtype bfloat16 contradicts dtype float16"),
        ({"num_key_value_heads": 3}, CheckpointError, "num_key_value_heads is 3: must divide num_attention_heads = 2"),
        ({"head_dim": 7}, CheckpointError, "head_dim is 7: must be even"),
        ({"rms_norm_eps": 0.0}, CheckpointError, "rms_norm_eps is 0.0: must lie between 0 and 1"),
        ({"rope_theta": 1.0}, CheckpointError, "rope theta is 1.0: must be more than 1"),
        ({"num_hidden_layers": 2**31 - 1}, CheckpointError, "must be an integer from 1 to 16384"),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, CheckpointError, "dynamic needs at least 4"),
    ],
)  # fmt: skip
def test_what_a_config_may_not_say(changes: dict[str, Any], kind: type[MegalithError], words: str) -> None:
    with pytest.raises(kind, match=r"^here/config\.json: ") as caught:
        describe(tiny_config(**changes))
    assert words in str(caught.value)


def test_dtype_in_either_spelling() -> None:
    assert describe(tiny_config(dtype="bfloat16")) == describe(tiny_config(torch_dtype=..., dtype="bfloat16"))


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("architecture", "changes", "wanted"),
    [
        ("LlamaForCausalLM", {}, [0, 0, 0, 0]),
        ("LlamaForCausalLM", {"sliding_window": 8}, [0, 0, 0, 0]),  # Llama has no such key
        ("LlamaForCausalLM", {"layer_types": [FULL] * 4}, [0, 0, 0, 0]),
        ("MistralForCausalLM", {}, [4096] * 4),
        ("MistralForCausalLM", {"sliding_window": 8}, [8, 8, 8, 8]),
        ("MistralForCausalLM", {"sliding_window": None}, [0, 0, 0, 0]),
        ("MistralForCausalLM", {"sliding_window": 8, "layer_types": [SLIDING] * 4}, [8, 8, 8, 8]),
        ("MistralForCausalLM", {"sliding_window": None, "layer_types": [FULL] * 4}, [0, 0, 0, 0]),
        *[
            (architecture, changes, wanted)
            for architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
            for changes, wanted in [
                ({}, [0, 0, 0, 0]),
                ({"sliding_window": 8, "max_window_layers": 0}, [0, 0, 0, 0]),  # use_sliding_window is false by default
                ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, [0, 0, 0, 0]),
                ({"use_sliding_window": True, "sliding_window": 8}, [0, 0, 0, 0]),  # max_window_layers is 28
                ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, [0, 8, 8, 8]),
                ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, [8, 8, 8, 8]),
                ({"use_sliding_window": True, "max_window_layers": 3}, [0, 0, 0, 4096]),
                ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [0, 0, 0, 0]),
                (
                    {"use_sliding_window": True, "sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
                    [8, 0, 8, 0],
                ),
                (
                    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": [FULL] * 4},
                    [0, 0, 0, 0],
                ),
                ({"sliding_window": 8, "layer_types": [FULL] * 4, "use_sliding_window": False}, [0, 0, 0, 0]),
            ]
        ],
    ],
)
def test_layer_windows(architecture: str, changes: dict[str, Any], wanted: list[int]) -> None:
    assert windows(architecture, **changes) == wanted


@pytest.mark.parametrize(
    ("architecture", "changes", "kind", "words"),
    [
        ("LlamaForCausalLM", {"layer_types": [SLIDING] * 4}, CheckpointError, "no window is set"),
        ("Qwen3ForCausalLM", {"layer_types": [SLIDING] * 4}, CheckpointError, "no window is set"),
        ("Qwen3ForCausalLM", {"layer_types": [FULL] * 3}, CheckpointError, "layer_types must list 4 layers"),
        ("Qwen3ForCausalLM", {"layer_types": [FULL] * 3 + ["linear_attention"]}, UnsupportedError, "holds linear_attention"),
        ("Qwen3ForCausalLM", {"layer_types": [FULL] * 3 + [[]]}, UnsupportedError, "layer_types holds []"),
        ("Qwen2ForCausalLM", {"use_sliding_window": "false"}, CheckpointError, "is false: must be a boolean"),
        ("MistralForCausalLM", {"sliding_window": 0}, CheckpointError, "sliding_window is 0: must be an integer from 1"),
        # transformers' Mistral has one window for all layers and ignores what would exempt some
        ("MistralForCausalLM", {"layer_types": [SLIDING, FULL] * 2}, CheckpointError, "exempts some"),
        ("MistralForCausalLM", {"use_sliding_window": False}, CheckpointError, "exempts some"),
        ("MistralForCausalLM", {"max_window_layers": 2}, CheckpointError, "exempts some"),
    ],
)  # fmt: skip
def test_windows_that_contradict(architecture: str, changes: dict[str, Any], kind: type[MegalithError], words: str) -> None:
    with pytest.raises(kind, match=r"^here/config\.json: ") as caught:
        windows(architecture, **changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("config", "generation", "eos", "bos"),
    [
        ({}, {}, [2], 1),
        ({"eos_token_id": [2, 3]}, {}, [2, 3], 1),
        ({"eos_token_id": None, "bos_token_id": None}, {}, [], None),
        ({"eos_token_id": ..., "bos_token_id": ...}, {}, [], None),
        ({}, {"eos_token_id": [4, 5], "bos_token_id": 6}, [4, 5], 6),  # generation_config.json wins
        ({}, {"eos_token_id": None}, [2], 1),
        ({}, {"eos_token_id": []}, [], 1),
        ({"eos_token_id": [2, 12, 400, -1]}, {}, [2], 1),  # of 12 ids the others can never occur
        ({"bos_token_id": 12}, {}, [2], None),
        ({"bos_token_id": [1]}, {}, [2], 1),
    ],
)
def test_token_ids(config: dict[str, Any], generation: dict[str, Any], eos: list[int], bos: int | None) -> None:
    found = describe(tiny_config(**config), generation).config
    assert (found.eos_token_ids, found.bos_token_id) == (eos, bos)


@pytest.mark.parametrize("value", ["2", 2.0, True, [2, None], {"id": 2}, [[2]]])
def test_token_ids_of_a_wrong_type(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"here/config\.json: eos_token_id is .*: must be token ids"):
        describe(tiny_config(eos_token_id=value))
    with pytest.raises(CheckpointError, match=r"here/generation_config\.json: eos_token_id is .*: must be token ids"):
        describe(tiny_config(), {"eos_token_id": value})


def test_too_many_eos_tokens() -> None:
    with pytest.raises(CheckpointError, match=r"eos_token_ids is .*: must be a list of at most 64"):
        describe(tiny_config(eos_token_id=[2] * 65))


@pytest.mark.parametrize(
    ("changes", "wanted", "table"),
    [
        ({}, 32, 32),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 32, 32),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, 32, 32),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 128, 128),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}}, 32, 32),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}}, 40, 40),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 128, 32),  # beyond it, the angles depend on the length
    ],
)
def test_longest_context(changes: dict[str, Any], wanted: int, table: int) -> None:
    description = describe(tiny_config(**changes))
    assert (description.config.max_seq_len, description.rope_positions) == (wanted, table)
    assert description.config.max_position_embeddings == 32


def test_max_seq_len_overrides() -> None:
    assert describe(tiny_config(), max_seq_len=7).config.max_seq_len == 7
    assert describe(tiny_config(), max_seq_len=77).config.max_seq_len == 77
    dynamic = describe(tiny_config(rope_scaling={"type": "dynamic", "factor": 4.0}), max_seq_len=7)
    assert (dynamic.config.max_seq_len, dynamic.rope_positions) == (7, 7)
    huge = describe(tiny_config(max_position_embeddings=2**31 - 1), max_seq_len=7)
    assert (huge.config.max_seq_len, huge.config.max_position_embeddings) == (7, 2**31 - 1)


@pytest.mark.parametrize("length", [0, -1, MAX_POSITIONS + 1])
def test_max_seq_len_out_of_range(length: int) -> None:
    with pytest.raises(RequestError, match=f"--max-seq-len {length}: must be from 1 to {MAX_POSITIONS}"):
        describe(tiny_config(), max_seq_len=length)


def test_a_context_beyond_the_tables_asks_for_max_seq_len() -> None:
    with pytest.raises(RequestError, match="choose --max-seq-len"):
        describe(tiny_config(max_position_embeddings=MAX_POSITIONS + 1))


def test_rope_defaults_of_architectures() -> None:
    """Checked against transformers 5.23: gpt-oss is YaRN unless the config names another scaling; Mixtral's theta is 1e6."""
    gpt_oss = ARCHITECTURES["GptOssForCausalLM"].rope_defaults
    length = {"max_position_embeddings": 131_072}
    plain = rope_parameters(length, "config.json", gpt_oss)
    assert (plain.type, plain.theta, plain.parameters["factor"], plain.parameters["truncate"]) == (
        "yarn",
        150_000.0,
        32.0,
        False,
    )
    assert plain.parameters["original_max_position_embeddings"] == 4096.0
    assert plain.attention_factor == pytest.approx(1.3465736)
    assert rope_parameters({**length, "rope_theta": 1e4}, "config.json", gpt_oss).parameters == plain.parameters
    scaled = rope_parameters({**length, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "config.json", gpt_oss)
    assert (scaled.theta, scaled.parameters["truncate"]) == (150_000.0, True)
    assert scaled.parameters["original_max_position_embeddings"] == 131_072.0
    assert rope_parameters(length, "config.json", ARCHITECTURES["MixtralForCausalLM"].rope_defaults).theta == 1e6
