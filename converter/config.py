"""A Hugging Face config as the packed file states it: every key read is checked, every doubt is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from megalith.format.constants import MAX_DIMENSION
from megalith.format.errors import CheckpointError, FormatError, RequestError, UnsupportedError, printable
from megalith.format.model import MAX_LAYERS, ModelConfig
from megalith.format.rope import MAX_POSITIONS, RopeParameters

from .architectures import ARCHITECTURES, Architecture
from .rope_config import number, rope_parameters


@dataclass(frozen=True)
class ModelDescription:
    """What a checkpoint's config says about its model."""

    architecture: Architecture
    config: ModelConfig
    rope: RopeParameters

    @property
    def rope_positions(self) -> int:
        """Rows of the RoPE table; the dynamic type has a table for its original length only."""
        if self.rope.type == "dynamic":
            return min(self.config.max_seq_len, self.rope.original_max_position_embeddings)
        return self.config.max_seq_len


def describe_model(
    raw: Mapping[str, Any], generation: Mapping[str, Any], max_seq_len: int | None, place: str
) -> ModelDescription:
    """Check a parsed config.json and generation_config.json; `max_seq_len` overrides the longest context."""
    if max_seq_len is not None and not 1 <= max_seq_len <= MAX_POSITIONS:
        raise RequestError(f"--max-seq-len {max_seq_len}: must be from 1 to {MAX_POSITIONS} positions")
    architecture = _architecture(raw, place)
    raw = {**architecture.defaults, **_without_aliases(raw, place)}
    _refuse_unknown_math(raw, architecture, place)
    sizes = {name: _size(raw, name, place) for name in _REQUIRED}
    sizes["num_key_value_heads"] = _size(raw, "num_key_value_heads", place, sizes["num_attention_heads"])
    sizes["head_dim"] = _size(raw, "head_dim", place, sizes["hidden_size"] // sizes["num_attention_heads"])
    rope = rope_parameters(raw, place, architecture.rope_defaults)
    values: dict[str, Any] = {
        **sizes,
        **architecture.constants,
        **_configured(raw, architecture, place),
        **_expert_values(raw, architecture, sizes["num_hidden_layers"], place),
        "architecture": architecture.name,
        "rms_norm_eps": number({"rms_norm_eps": 1e-6, **raw}, "rms_norm_eps", place),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "layer_windows": _layer_windows(raw, architecture, sizes["num_hidden_layers"], place),
        "bos_token_id": _first(_token_ids(raw, generation, "bos_token_id", sizes["vocab_size"], place)),
        "eos_token_ids": _token_ids(raw, generation, "eos_token_id", sizes["vocab_size"], place),
        "max_seq_len": max_seq_len or _longest_context(rope, sizes["max_position_embeddings"]),
    }
    if values["max_seq_len"] > MAX_POSITIONS:
        raise RequestError(
            f"{place}: a context of {values['max_seq_len']} positions is more than {MAX_POSITIONS}: choose --max-seq-len"
        )
    if rope.type == "dynamic" and sizes["head_dim"] < 4:
        raise CheckpointError(f"{place}: head_dim is {sizes['head_dim']}: rope type dynamic needs at least 4")
    template = ModelConfig(**values)
    try:
        config = ModelConfig.from_dict(template.to_dict(), place)
        RopeParameters.from_dict(rope.to_dict(), place)
    except FormatError as error:
        raise CheckpointError(str(error)) from None
    return ModelDescription(architecture, config, rope)


GPT_OSS_SLOPE = 1.702
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def _architecture(raw: Mapping[str, Any], place: str) -> Architecture:
    names = raw.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise CheckpointError(f"{place}: architectures is {printable(names)}: must name one architecture")
    architecture = ARCHITECTURES.get(names[0])
    if architecture is None:
        raise UnsupportedError(f"{place}: architecture {printable(names[0])} is none of {', '.join(ARCHITECTURES)}")
    model_type = raw.get("model_type", architecture.model_type)
    if model_type != architecture.model_type:
        raise CheckpointError(f"{place}: model_type {printable(model_type)} contradicts {architecture.name}")
    return architecture


_ALIASES = {"num_local_experts": "num_experts", "experts_per_token": "num_experts_per_tok"}


def _without_aliases(raw: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The config with one name for keys that architectures and versions spell differently."""
    result = {key: value for key, value in raw.items() if key not in _ALIASES}
    for alias, name in _ALIASES.items():
        if alias in raw and result.setdefault(name, raw[alias]) != raw[alias]:
            raise CheckpointError(f"{place}: {alias} is {printable(raw[alias])}, {name} is {printable(result[name])}")
    return result


def _configured(raw: Mapping[str, Any], architecture: Architecture, place: str) -> dict[str, Any]:
    """Fields that are switched or set by a key of the config: booleans, or numbers that may be absent."""
    values: dict[str, Any] = {}
    for name, key in architecture.config_keys.items():
        if name in _OPTIONAL_NUMBERS:
            values[name] = None if raw.get(key) is None else number(raw, key, place)
        elif name != "moe_intermediate_size":
            values[name] = raw.get(key, False)
    return values


_OPTIONAL_NUMBERS = ("clip_qkv", "swiglu_limit")


def _expert_values(raw: Mapping[str, Any], architecture: Architecture, num_layers: int, place: str) -> dict[str, Any]:
    """Which layers are mixtures of experts, and their sizes."""
    if not architecture.expert_names:
        return {"sparse_layers": [False] * num_layers}
    step = _size(raw, "decoder_sparse_step", place, 1)
    dense = raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise CheckpointError(f"{place}: mlp_only_layers is {printable(dense)}: must be a list of layer numbers")
    sparse = [i not in dense and (i + 1) % step == 0 for i in range(num_layers)]
    if not any(sparse):
        return {"sparse_layers": sparse}
    return {
        "moe_intermediate_size": _size(raw, architecture.config_keys["moe_intermediate_size"], place),
        "num_experts": _size(raw, "num_experts", place),
        "num_experts_per_tok": _size(raw, "num_experts_per_tok", place),
        "sparse_layers": sparse,
    }


def _refuse_unknown_math(raw: Mapping[str, Any], architecture: Architecture, place: str) -> None:
    if raw.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"{place}: hidden_act {printable(raw['hidden_act'])} is not supported, only silu")
    if raw.get("swiglu_alpha", GPT_OSS_SLOPE) != GPT_OSS_SLOPE:
        raise UnsupportedError(f"{place}: swiglu_alpha {printable(raw['swiglu_alpha'])} is not supported, only {GPT_OSS_SLOPE}")
    if raw.get("quantization_config"):
        method = raw["quantization_config"]
        method = method.get("quant_method") if isinstance(method, Mapping) else method
        if method != "mxfp4" or not any(fused.scales for fused in architecture.fused_experts):
            raise UnsupportedError(f"{place}: quantization_config {printable(method)} is not supported")
    old, new = raw.get("torch_dtype"), raw.get("dtype")
    if old is not None and new is not None and old != new:
        raise CheckpointError(f"{place}: torch_dtype {printable(old)} contradicts dtype {printable(new)}")


def _size(raw: Mapping[str, Any], name: str, place: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    limit = MAX_LAYERS if name == "num_hidden_layers" else MAX_DIMENSION
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise CheckpointError(f"{place}: {name} is {printable(value)}: must be an integer from 1 to {limit}")
    return value


def _layer_windows(raw: Mapping[str, Any], architecture: Architecture, num_layers: int, place: str) -> list[int]:
    """Window of each layer, 0 for full attention. `layer_types` wins over `max_window_layers`, as in transformers."""
    types = raw.get("layer_types")
    if types is not None and (not isinstance(types, list) or len(types) != num_layers):
        raise CheckpointError(f"{place}: layer_types must list {num_layers} layers")
    for kind in types or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(f"{place}: layer_types holds {printable(kind)}")
    used = raw.get("use_sliding_window", True)
    if not isinstance(used, bool):
        raise CheckpointError(f"{place}: use_sliding_window is {printable(used)}: must be a boolean")
    if not architecture.sliding_window or not used or raw.get("sliding_window") is None:
        if types is not None and "sliding_attention" in types:
            raise CheckpointError(f"{place}: layer_types asks for sliding_attention, but no window is set")
        windows = [0] * num_layers
    else:
        window = _size(raw, "sliding_window", place)
        first = _first_window_layer(raw, place)
        slides = [i >= first and (i % 2 == 0 or not architecture.alternating_window) for i in range(num_layers)]
        if types:
            slides = [kind == "sliding_attention" for kind in types]
        windows = [window if slide else 0 for slide in slides]
    if architecture.uniform_window and raw.get("sliding_window") is not None and 0 in windows:
        raise CheckpointError(
            f"{place}: sliding_window is {printable(raw['sliding_window'])}, which {architecture.name} applies to every layer, "
            "but layer_types, max_window_layers or use_sliding_window exempts some"
        )
    return windows


def _first_window_layer(raw: Mapping[str, Any], place: str) -> int:
    value = raw.get("max_window_layers", 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{place}: max_window_layers is {printable(value)}: must be an integer of at least 0")
    return value


def _token_ids(raw: Mapping[str, Any], generation: Mapping[str, Any], key: str, vocab_size: int, place: str) -> list[int]:
    """Ids of the generation config, else of the config; ids outside the vocabulary can never occur and are left out."""
    value = generation.get(key)
    if value is None:
        value = raw.get(key)
    else:
        place = str(PurePath(place).with_name("generation_config.json"))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise CheckpointError(f"{place}: {key} is {printable(value)}: must be token ids")
    return [token for token in ids if 0 <= token < vocab_size]


def _first(ids: list[int]) -> int | None:
    return ids[0] if ids else None


def _longest_context(rope: RopeParameters, max_position_embeddings: int) -> int:
    """Positions the model is meant for: YaRN and dynamic NTK reach `factor` times their original length."""
    if rope.type not in ("yarn", "dynamic"):
        return max_position_embeddings
    return max(max_position_embeddings, int(rope.original_max_position_embeddings * float(rope.parameters["factor"])))
