"""Tiny checkpoints as literal bytes: a config, safetensors with any header, files beside them; and how one is refused."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import megalith
from megalith.cli import run
from megalith.converter.convert import convert
from megalith.converter.plan import Options
from megalith.format.errors import CheckpointError, MegalithError, RequestError, UnsupportedError

USAGE, INVALID, UNSUPPORTED, IO = 2, 3, 4, 5
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I8": 1, "U8": 1}
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


class Tensor(NamedTuple):
    """A tensor as safetensors holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def tiny_config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """A config.json of one layer; a change to `...` removes the key."""
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES.get(architecture, "unknown"),
        "vocab_size": 12,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        **changes,
    }
    return {key: value for key, value in config.items() if value is not ...}


def tiny_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint of a `tiny_config`, in the order of the forward pass."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q_rows, kv_rows = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        inside: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q_rows, hidden),
            "self_attn.k_proj.weight": (kv_rows, hidden),
            "self_attn.v_proj.weight": (kv_rows, hidden),
            "self_attn.o_proj.weight": (hidden, q_rows),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if config["model_type"] == "qwen2":
            inside |= {f"self_attn.{p}_proj.bias": (kv_rows if p in "kv" else q_rows,) for p in "qkv"}
        if config["model_type"] == "qwen3":
            inside |= {f"self_attn.{p}_norm.weight": (head_dim,) for p in "qk"}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in inside.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def values(shape: tuple[int, ...], dtype: str, seed: int) -> bytes:
    """Bytes of small finite values, exact in BF16 and F16, different for each seed."""
    numbers = np.random.default_rng(seed).integers(-63, 64, shape).astype(np.float32) / np.float32(64)
    if dtype == "F32":
        return numbers.tobytes()
    if dtype == "F16":
        return numbers.astype(np.float16).tobytes()
    return (numbers.view(np.uint32) >> np.uint32(16)).astype(np.uint16).tobytes()


def tiny_tensors(config: Mapping[str, Any], dtype: str = "BF16", seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of the checkpoint of a `tiny_config`."""
    shapes = tiny_shapes(config)
    return {name: Tensor(dtype, shape, values(shape, dtype, seed + i)) for i, (name, shape) in enumerate(shapes.items())}


def header_entries(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The JSON header of a safetensors file of `tensors`, one after the other."""
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + len(tensor.data)
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    return entries


def safetensors_bytes(tensors: Mapping[str, Tensor], header: object = None) -> bytes:
    """A safetensors file; `header` replaces the true one: bytes as they are, anything else as JSON."""
    entries = header_entries(tensors) if header is None else header
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensor.data for tensor in tensors.values())


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any] | bytes | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    header: object = None,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """A checkpoint in `folder`, which is made: config.json, model.safetensors and `files`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config() if config is None else config
    (folder / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    if tensors is None:
        assert not isinstance(config, bytes)
        tensors = tiny_tensors(config)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, header))
    for name, data in (files or {}).items():
        (folder / name).write_bytes(data)
    return folder


def write_sharded(folder: Path, weight_map: Mapping[str, object] | bytes, shards: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """A checkpoint in shards; `weight_map` as bytes is the whole index file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    index = weight_map if isinstance(weight_map, bytes) else json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    (folder / "model.safetensors.index.json").write_bytes(index)
    for name, tensors in shards.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(safetensors_bytes(tensors))
    return folder


def replaced(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    """The tiny checkpoint's tensors with one of them replaced, added or, for None, removed."""
    tensors: dict[str, Tensor | None] = {**tiny_tensors(tiny_config()), name: tensor}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def spoiled(name: str, bits: int, dtype: str = "BF16", position: int = 3) -> dict[str, Tensor]:
    """Tensors of one dtype, one element of one of them set to a bit pattern."""
    tensors = tiny_tensors(tiny_config(), dtype)
    elements = np.frombuffer(tensors[name].data, np.uint32 if dtype == "F32" else np.uint16).copy()
    elements[position] = bits
    return {**tensors, name: tensors[name]._replace(data=elements.tobytes())}


def refused(folder: Path, code: int, *words: str, options: tuple[str, ...] = ()) -> str:
    """Convert through the CLI; checks exit code, the words of its one line and that nothing is left; returns the line."""
    output = folder.parent / "output"
    output.mkdir(exist_ok=True)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        found = run(["convert", str(folder), str(output / "model.lith"), *options])
    line = err.getvalue()
    assert found == code, line
    assert line.startswith("megalith: ")
    assert line.count("\n") == 1
    assert line.rstrip("\n").isprintable()
    for word in words:
        assert word in line
    assert out.getvalue() == ""
    assert list(output.iterdir()) == []
    return line


EXPECTED = (CheckpointError, UnsupportedError, RequestError)


def failure(folder: Path, target: Path, options: Options | None = None) -> MegalithError | None:
    """The error of a conversion, if it is one of the three that a checkpoint may cause."""
    try:
        convert(folder, target, options, jobs=1)
    except EXPECTED as error:
        return error
    return None


def packs_or_refuses(folder: Path, target: Path, options: Options | None = None) -> MegalithError | None:
    """Convert: a whole file, or an expected error that names a file of the checkpoint and leaves nothing."""
    error = failure(folder, target, options)
    if error is None:
        with megalith.open(target):
            target.unlink()
        return None
    assert str(folder) in str(error)
    assert str(error).isprintable()
    assert len(str(error)) < 1000
    assert list(target.parent.glob(target.name + "*")) == []
    return error
