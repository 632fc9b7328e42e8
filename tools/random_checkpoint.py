#!/usr/bin/env python3
"""Write a checkpoint of random weights in the shape of a real model: config.json and safetensors, as from the hub.

Matrices have a standard deviation of one over the root of their columns, so that activations keep their size; norms are
near one. The values repeat every few million elements, at a different offset for each tensor. The tokenizer has a text of
its own for every id, a byte or a word of ASCII letters, so that any id can be served.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from megalith.converter.config import describe_model
from megalith.format.model import blob_specs

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128001,
    },
    "qwen3-4b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151645,
        "attention_bias": False, "hidden_act": "silu", "use_sliding_window": False,
    },
}  # fmt: skip
_PATTERN_ELEMENTS = 1 << 23
_SHARD_BYTES = 2 << 30
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int = 0) -> int:
    """BF16 shards and their index, config and tokenizer; returns the bytes of weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    word_tokenizer(config["vocab_size"]).save(str(folder / "tokenizer.json"), pretty=False)
    description = describe_model(config, {}, None, str(folder))
    rng = np.random.default_rng(seed)
    pattern = rng.standard_normal(_PATTERN_ELEMENTS).astype(np.float32)
    shards: list[dict[str, np.ndarray]] = [{}]
    total = held = 0
    for spec in blob_specs(description.config):
        for part in spec.parts:
            count, start = part.rows * part.columns, int(rng.integers(_PATTERN_ELEMENTS))
            scaled = 1.0 + 0.1 * pattern if "norm" in part.role else pattern * np.float32(part.columns**-0.5)
            values = np.resize(np.roll(scaled.astype(ml_dtypes.bfloat16), start), count)
            shape = (part.rows, part.columns) if spec.is_matrix else (part.rows,)
            if held > _SHARD_BYTES:
                total, held = total + _save(folder, shards, last=False), 0
            shards[-1][description.architecture.tensor_names(part.role)[0]] = values.reshape(shape)
            held += values.nbytes
    return total + _save(folder, shards, last=True)


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level without merges: 256 bytes, then words that no text is ever split into; ValueError below 256 tokens."""
    texts = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(texts):
        raise ValueError(f"vocab_size {vocab_size}: a byte-level tokenizer has at least {len(texts)} tokens")
    texts += [f"\u0120{_word(number)}" for number in range(vocab_size - len(texts))]  # \u0120 stands for the space
    tokenizer = Tokenizer(models.BPE({text: number for number, text in enumerate(texts)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _word(number: int) -> str:
    """a, b, .. z, aa, ab, ..: every number its own."""
    letters = ""
    number += 1
    while number:
        number, letter = divmod(number - 1, len(_LETTERS))
        letters = _LETTERS[letter] + letters
    return letters


def _save(folder: Path, shards: list[dict[str, np.ndarray]], last: bool) -> int:
    """Writes the newest shard; after the last, the index."""
    tensors = shards[-1]
    save_file(tensors, folder / f"model-{len(shards):05d}.safetensors")
    nbytes = sum(values.nbytes for values in tensors.values())
    shards[-1] = dict.fromkeys(tensors, np.empty(0))  # names stay for the index
    if last:
        names = {name: f"model-{i + 1:05d}.safetensors" for i, shard in enumerate(shards) for name in shard}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    shards.append({})
    return nbytes


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = dict(SHAPES[arguments.shape])
    if arguments.layers:
        config["num_hidden_layers"] = arguments.layers
    nbytes = write_checkpoint(arguments.folder, config, arguments.seed)
    print(f"{arguments.folder}: {config['architectures'][0]}, {nbytes:,} bytes of weights")


if __name__ == "__main__":
    main()
