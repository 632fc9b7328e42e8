"""Make the dense golden parity cases in tests/golden/models/<case>/.

Each case is a tiny random checkpoint in Hugging Face form and the logits that `transformers` computes from it:

- config.json, model.safetensors (or shards with an index): every weight is exact in the case's 16-bit format
  (BF16 for the FP32 case), so the FP32 run uses exactly the stored values.
- golden.npz, for each id set (suffix "" for the first, "_2", "_3", ... for the next): `ids` int64 [n], `positions`
  int64 [p] (whose logits are kept), `logits_fp32` float32 [p, vocab] from the FP32 run, `logits_bf16` float32
  [p, vocab] from the BF16 run (the FP16 run where the checkpoint is FP16).
- golden.json: case, what it covers, seed and the versions that made it.

Runs outside the project's environment, which never depends on torch:

    python3.11 -m venv /tmp/golden-venv
    /tmp/golden-venv/bin/pip install torch==2.13.0
    /tmp/golden-venv/bin/pip install transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
    /tmp/golden-venv/bin/python tools/make_golden.py [--out tests/golden/models] [case ...]
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

Tensors = dict[str, torch.Tensor]

LONGEST_EAGER = 1024  # tokens; eager attention materialises [heads, n, n] scores, so longer id sets use SDPA
LONGEST_FULL = 64  # tokens; longer id sets keep the logits of spread_positions only


@dataclass(frozen=True)
class Case:
    """One checkpoint. `config` is spelled the transformers-4 way (written as it is) or the transformers-5 way
    (written by `save_pretrained`, defaults included)."""

    name: str
    seed: int
    what: str
    config: dict[str, Any]
    spelling: int = 4
    dtype: torch.dtype = torch.bfloat16
    lengths: tuple[int, ...] = (40,)  # tokens of each id set
    shards: int = 1
    extra: Callable[[Tensors], Tensors] | None = None  # further tensors to store
    load_options: dict[str, Any] = field(default_factory=dict)  # for from_pretrained


def dense(model_type: str, shape: str, **more: Any) -> dict[str, Any]:
    """A dense config; `shape` is "hidden intermediate layers heads kv_heads vocab", kv_heads "-" leaves it out."""
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
    sizes = {name: int(size) for name, size in zip(names.split(), shape.split(), strict=True) if size != "-"}
    common = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
    return {"model_type": model_type, **sizes, **common, **more}


def equal_lm_head(tensors: Tensors) -> Tensors:
    """The redundant head of a tied checkpoint. Equal, because transformers 5 unties when the values differ."""
    return {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def old_rotary_buffers(tensors: Tensors) -> Tensors:
    """F32 inv_freq buffers of old checkpoints, one a layer; every value is wrong, so that using them shows."""
    prefixes = [name.removesuffix("q_proj.weight") for name in tensors if name.endswith("q_proj.weight")]
    return {f"{prefix}rotary_emb.inv_freq": torch.arange(1, 7, dtype=torch.float32) / 7 for prefix in prefixes}


LLAMA3_SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN_OPTIONS = {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.707, "truncate": False}

CaseT = TypeVar("CaseT", bound=Case)

CASES = (
    Case("llama2", 101, "MHA, untied head, default RoPE with theta 1e4",
         dense("llama", "72 184 2 6 6 131", max_position_embeddings=4096, rope_theta=10000.0, rope_scaling=None,
               tie_word_embeddings=False)),
    Case("llama3_rope", 102, "GQA, tied, llama3 RoPE scaling with all three bands, short and beyond 8192 positions",
         dense("llama", "120 104 2 4 2 257", head_dim=64, max_position_embeddings=131072, tie_word_embeddings=True,
               rope_parameters={"rope_theta": 500000.0, "original_max_position_embeddings": 8192, **LLAMA3_SCALING}),
         spelling=5, lengths=(40, 8400)),
    Case("llama3_rope_v4", 103, "llama3 RoPE scaling spelled rope_scaling and rope_theta, small original length",
         dense("llama", "88 104 2 4 2 131", max_position_embeddings=512, rope_theta=500000.0, tie_word_embeddings=True,
               rope_scaling={**LLAMA3_SCALING, "original_max_position_embeddings": 64})),
    Case("llama_linear", 104, "linear RoPE scaling by 4 spelled with the old key `type`, short and beyond 8192 positions",
         dense("llama", "72 104 2 3 1 131", max_position_embeddings=16384, rope_theta=10000.0,
               rope_scaling={"type": "linear", "factor": 4.0}, tie_word_embeddings=False),
         lengths=(40, 8400)),
    Case("llama_dynamic", 105, "dynamic NTK: within max_position_embeddings, just beyond it, and beyond 8192 positions",
         dense("llama", "100 104 2 5 5 131", max_position_embeddings=48, tie_word_embeddings=False,
               rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
         spelling=5, lengths=(40, 61, 8400)),
    Case("llama_yarn", 106, "YaRN with default betas and computed attention factor, short and beyond 8192 positions",
         dense("llama", "72 104 2 3 3 131", head_dim=32, max_position_embeddings=32768, tie_word_embeddings=False,
               rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0,
                                "original_max_position_embeddings": 4096}),
         spelling=5, lengths=(40, 8400)),
    Case("llama_yarn_opts", 107, "YaRN with betas, mscale, mscale_all_dim and truncate=false",
         dense("llama", "72 104 2 3 1 131", head_dim=32, max_position_embeddings=1024, rope_theta=150000.0,
               rope_scaling={"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64,
                             **YARN_OPTIONS}, tie_word_embeddings=False)),
    Case("llama_mqa", 108, "one KV head, head_dim 32 != 100 / 5, tied with an equal redundant lm_head.weight stored",
         dense("llama", "100 104 2 5 1 257", head_dim=32, max_position_embeddings=2048, rope_theta=10000.0,
               tie_word_embeddings=True), extra=equal_lm_head),
    Case("llama_bias", 109, "attention_bias (q, k, v, o) and mlp_bias",
         dense("llama", "90 104 2 9 3 131", attention_bias=True, mlp_bias=True, max_position_embeddings=2048,
               rope_theta=10000.0, tie_word_embeddings=False)),
    Case("mistral_window", 110, "sliding window of 16 in every layer, 60 tokens, explicit head_dim",
         dense("mistral", "72 184 3 4 2 131", head_dim=24, sliding_window=16, max_position_embeddings=4096,
               rope_theta=10000.0, tie_word_embeddings=False), lengths=(60,)),
    Case("mistral_nowindow", 111, "sliding_window null, no head_dim in the config",
         dense("mistral", "72 184 2 4 2 131", sliding_window=None, max_position_embeddings=4096,
               rope_theta=1000000.0, tie_word_embeddings=False)),
    Case("qwen2", 112, "q, k, v biases, tied; use_sliding_window false with a sliding_window that must not apply",
         dense("qwen2", "84 184 2 6 2 257", use_sliding_window=False, sliding_window=8, max_window_layers=0,
               max_position_embeddings=4096, rope_theta=1000000.0, tie_word_embeddings=True)),
    Case("qwen2_window", 113, "use_sliding_window: window of 12 in layers 1 and 2 of 3, layer 0 full, no layer_types",
         dense("qwen2", "72 104 3 6 3 131", use_sliding_window=True, sliding_window=12, max_window_layers=1,
               max_position_embeddings=4096, rope_theta=1000000.0, tie_word_embeddings=False)),
    Case("qwen3", 114, "q_norm and k_norm, head_dim 32 != 72 / 4, GQA, untied",
         dense("qwen3", "72 184 2 4 2 257", head_dim=32, max_position_embeddings=4096, tie_word_embeddings=False,
               rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}), spelling=5),
    Case("qwen3_tied_mqa", 115, "q_norm and k_norm with one KV head, tied, hidden_size no multiple of the heads",
         dense("qwen3", "76 104 2 3 1 131", head_dim=24, max_position_embeddings=4096, rope_theta=1000000.0,
               rope_scaling=None, tie_word_embeddings=True)),
    Case("llama_fp16", 116, "FP16 checkpoint with FP16-exact weights; logits_bf16 is the FP16 run",
         dense("llama", "72 104 2 6 2 131", max_position_embeddings=2048, rope_theta=10000.0,
               tie_word_embeddings=False), dtype=torch.float16),
    Case("llama_fp32", 117, "FP32 checkpoint whose values are BF16-exact",
         dense("llama", "72 104 2 6 2 131", max_position_embeddings=2048, rope_theta=10000.0,
               tie_word_embeddings=False), dtype=torch.float32),
    Case("llama_sharded", 118, "three shards with an index, named zero-based `of-00002`",
         dense("llama", "136 104 3 4 2 131", max_position_embeddings=2048, tie_word_embeddings=False,
               rope_parameters={"rope_type": "default", "rope_theta": 10000.0}), spelling=5, shards=3),
    Case("llama_old_buffers", 119, "old rotary_emb.inv_freq buffers (with wrong values) stored; no kv heads, no theta",
         dense("llama", "60 104 2 5 - 131", max_position_embeddings=2048, tie_word_embeddings=False),
         extra=old_rotary_buffers),
)  # fmt: skip


def write_config(case: Case, folder: Path) -> PreTrainedConfig:
    """Write config.json in the case's spelling and return what transformers reads back."""
    dtype = str(case.dtype).removeprefix("torch.")
    architectures = ["".join(word.capitalize() for word in case.config["model_type"].split("_")) + "ForCausalLM"]
    if case.spelling == 5:
        AutoConfig.for_model(**case.config, architectures=architectures, dtype=dtype).save_pretrained(folder)
    else:
        config = {"architectures": architectures, **case.config, "torch_dtype": dtype, "transformers_version": "4.46.0"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return AutoConfig.from_pretrained(folder)


def draw_weights(case: Case, config: PreTrainedConfig) -> Tensors:
    """Random weights for each parameter (tied ones once), on the case's 16-bit grid, in the case's dtype."""
    with torch.device("meta"):
        parameters = list(AutoModelForCausalLM.from_config(config).named_parameters())
    rng = np.random.default_rng(case.seed)
    grid = torch.float16 if case.dtype == torch.float16 else torch.bfloat16
    tensors = {}
    for name, parameter in parameters:
        mean, std = distribution(name, parameter.shape)
        values = mean + std * rng.standard_normal(tuple(parameter.shape))
        tensors[name] = torch.from_numpy(values).to(grid).to(case.dtype)
    return tensors


def distribution(name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and standard deviation that keep activations and attention scores of order one."""
    if name.endswith("bias"):
        return 0.0, 0.2
    if name.endswith("norm.weight"):
        return 1.0, 0.2
    if name.endswith("embed_tokens.weight"):
        return 0.0, 1.0
    return 0.0, 1.5 / math.sqrt(shape[1])  # [out_features, in_features]


def write_tensors(case: Case, tensors: Tensors, folder: Path) -> None:
    """Store `tensors` in one file, or dealt round over `case.shards` files whose names lie about their number."""
    metadata = {"format": "pt"}
    if case.shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return
    files = [f"model-{i:05d}-of-{case.shards - 1:05d}.safetensors" for i in range(case.shards)]
    weight_map = {name: files[i % case.shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file, metadata)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def load(folder: Path, dtype: torch.dtype, num_tokens: int, weights: Tensors, **options: Any) -> PreTrainedModel:
    """The checkpoint as transformers loads it, checked to hold exactly `weights`."""
    attention = "eager" if num_tokens <= LONGEST_EAGER else "sdpa"
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, output_loading_info=True, **options
    )
    if any(info.values()):
        raise RuntimeError(f"{folder}: transformers reports {info}")
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, weights[name].to(dtype)):
            raise RuntimeError(f"{folder}: {name} was not loaded as stored")
    return model.eval()


def spread_positions(num_tokens: int) -> np.ndarray:
    """All positions of a short id set; of a long one the first, the last and those around powers of two."""
    if num_tokens <= LONGEST_FULL:
        return np.arange(num_tokens)
    spread = [0, 1, 63, 500, 2047, 4095, 4096, 8191, 8192, num_tokens - 3, num_tokens - 2, num_tokens - 1]
    return np.array([position for position in spread if position < num_tokens])


@torch.no_grad()
def run(model: PreTrainedModel, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Logits [p, vocab] of `positions`, as float32."""
    keep = torch.from_numpy(positions)
    return model(torch.from_numpy(ids)[None], use_cache=False, logits_to_keep=keep).logits[0].float().numpy()


def golden_arrays(case: Case, folder: Path, weights: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays of golden.npz. Each run gets a fresh model: dynamic RoPE keeps state between calls."""
    low = torch.float16 if case.dtype == torch.float16 else torch.bfloat16
    rng = np.random.default_rng(case.seed + 1)
    for i, num_tokens in enumerate(case.lengths):
        suffix = f"_{i + 1}" if i else ""
        ids = rng.integers(0, case.config["vocab_size"], num_tokens, dtype=np.int64)
        positions = spread_positions(num_tokens)
        yield f"ids{suffix}", ids
        yield f"positions{suffix}", positions
        for name, dtype in (("fp32", torch.float32), ("bf16", low)):
            model = load(folder, dtype, num_tokens, weights, **case.load_options)
            yield f"logits_{name}{suffix}", run(model, ids, positions)


def make_case(case: Case, folder: Path) -> None:
    weights = draw_weights(case, write_config(case, folder))
    write_tensors(case, weights | (case.extra(weights) if case.extra else {}), folder)
    write_golden(case, folder, dict(golden_arrays(case, folder, weights)))


def write_golden(case: Case, folder: Path, arrays: dict[str, np.ndarray], **more: Any) -> None:
    """Write golden.npz and golden.json; `more` are further entries of the latter."""
    np.savez_compressed(folder / "golden.npz", **arrays)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__}
    record = {"case": case.name, **versions, "seed": case.seed, "what": case.what, **more}
    (folder / "golden.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"{case.name}: {sum(file.stat().st_size for file in folder.iterdir()):,} bytes")


def make_cases(what: str, out: Path, cases: Sequence[CaseT], make: Callable[[CaseT, Path], None]) -> None:
    """The command line: make the named cases, each in its folder."""
    parser = argparse.ArgumentParser(description=f"Make the {what} golden parity cases.")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("cases", nargs="*", metavar="case", help="names; all when left out")
    args = parser.parse_args()
    if unknown := set(args.cases) - {case.name for case in cases}:
        parser.error(f"unknown case {', '.join(sorted(unknown))}")
    torch.set_num_threads(2)
    for case in cases:
        if not args.cases or case.name in args.cases:
            (args.out / case.name).mkdir(parents=True, exist_ok=True)
            make(case, args.out / case.name)


if __name__ == "__main__":
    make_cases("dense", Path("tests/golden/models"), CASES, make_case)
