"""Make the mixture-of-experts golden parity cases in tests/golden/moe/<case>/, in the form of tools/make_golden.py.

golden.json has one more entry: `smallest_router_gap`, the least distance between the last chosen and the first
rejected router logit over all tokens and sparse layers of the FP32 run (null where every expert is chosen). It is kept
above LEAST_ROUTER_GAP by the choice of seeds; the BF16 run need not choose the same experts.

Run as tools/make_golden.py is: /tmp/golden-venv/bin/python tools/make_golden_moe.py [--out ...] [case ...]
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_golden import (
    Case,
    Tensors,
    dense,
    distribution,
    golden_arrays,
    load,
    make_cases,
    write_config,
    write_golden,
    write_tensors,
)
from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedConfig

LEAST_ROUTER_GAP = 1e-3
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)  # by code; bit 3 is the sign


@dataclass(frozen=True)
class Weights:
    """`model`: the parameters as transformers names and shapes them; `mxfp4`: gpt-oss's stored blocks and scales."""

    model: Tensors
    mxfp4: Tensors


@dataclass(frozen=True)
class MoeCase(Case):
    store: Callable[[Weights], Tensors] = lambda weights: weights.model  # tensors of the checkpoint
    scales: tuple[int, int] = (0, 0)  # MXFP4: the lowest and the highest scale byte of gate_up_proj


def split_experts(weights: Weights, block: str, gate_up_down: tuple[str, str, str]) -> Tensors:
    """One matrix for each expert: gate_up_proj [E, 2I, H] and down_proj [E, H, I] split and renamed."""
    gate, up, down = gate_up_down
    stored = {}
    for name, tensor in weights.model.items():
        prefix, _, kind = name.partition("mlp.experts.")
        if not kind:
            stored[name.replace("mlp.gate.", f"{block}.gate.")] = tensor
            continue
        for e, expert in enumerate(tensor):
            parts = zip((gate, up), expert.chunk(2), strict=True) if kind == "gate_up_proj" else [(down, expert)]
            for part, matrix in parts:
                stored[f"{prefix}{block}.experts.{e}.{part}.weight"] = matrix.contiguous()
    return stored


def mixtral_names(weights: Weights) -> Tensors:
    return split_experts(weights, "block_sparse_moe", ("w1", "w3", "w2"))


def expert_names(weights: Weights) -> Tensors:
    return split_experts(weights, "mlp", ("gate_proj", "up_proj", "down_proj"))


def mxfp4_names(weights: Weights) -> Tensors:
    """gpt-oss's original form: _blocks and _scales instead of the dequantised experts."""
    dequantised = {name.removesuffix("_blocks") for name in weights.mxfp4}
    return {name: tensor for name, tensor in weights.model.items() if name not in dequantised} | weights.mxfp4


V4 = {"max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": False}
V5 = {"max_position_embeddings": 4096, "tie_word_embeddings": False,
      "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 256}  # fmt: skip
GPT_OSS = {"attention_bias": True, "head_dim": 16, "max_position_embeddings": 8192, "tie_word_embeddings": False,
           "swiglu_limit": 7.0, "sliding_window": 16}  # fmt: skip
GPT_OSS_V4 = {"rope_theta": 150000.0, "rope_scaling": YARN, "quantization_config": {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    "quant_method": "mxfp4"}}  # fmt: skip
GPT_OSS_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
DEQUANTISE = {"quantization_config": Mxfp4Config(dequantize=True)}


def experts(key: str, num_experts: int, top_k: int) -> dict[str, int]:
    return {key: num_experts, "num_experts_per_tok": top_k}


CASES = (
    MoeCase("mixtral", 201, "4 experts top-2, GQA, block_sparse_moe.experts.E.w1/w2/w3",
            dense("mixtral", "72 104 2 6 2 131", sliding_window=None, **experts("num_local_experts", 4, 2), **V4),
            store=mixtral_names),
    MoeCase("mixtral_mqa_ntk", 202, "12 heads on one KV head, 16 experts top-4, dynamic NTK within and beyond 48 positions",
            dense("mixtral", "96 40 2 12 1 131", head_dim=8, **experts("num_local_experts", 16, 4),
                  **{**V4, "max_position_embeddings": 48}, rope_scaling={"type": "dynamic", "factor": 2.0}),
            lengths=(40, 61), store=mixtral_names),
    MoeCase("mixtral_fused", 203, "fused mlp.experts.gate_up_proj and down_proj, config as transformers 5 writes it",
            dense("mixtral", "72 104 2 6 2 131", **experts("num_local_experts", 4, 2), **V5), spelling=5),
    MoeCase("mixtral_topk_all", 204, "top-4 of 4 experts: every expert is chosen",
            dense("mixtral", "72 72 2 4 2 131", **experts("num_local_experts", 4, 4), **V4), store=mixtral_names),
    MoeCase("olmoe", 205, "q_norm and k_norm over the whole width, GQA, norm_topk_prob false, 8 experts top-2",
            dense("olmoe", "72 96 2 6 3 131", norm_topk_prob=False, clip_qkv=None, **experts("num_experts", 8, 2), **V4),
            store=expert_names),
    MoeCase("olmoe_clip", 206, "clip_qkv 0.9 after the norms, norm_topk_prob true, MHA",
            dense("olmoe", "72 72 2 6 6 131", norm_topk_prob=True, clip_qkv=0.9, **experts("num_experts", 8, 2), **V5),
            spelling=5, store=expert_names),
    MoeCase("qwen3_moe", 216, "layers 1 and 5 of 6 sparse: decoder_sparse_step 2, mlp_only_layers [3]; spelled "
            "num_local_experts as transformers 5 does",
            dense("qwen3_moe", "72 104 6 4 2 131", head_dim=24, moe_intermediate_size=72, decoder_sparse_step=2,
                  mlp_only_layers=[3], norm_topk_prob=True, **experts("num_experts", 8, 2), **V5),
            spelling=5, store=expert_names),
    MoeCase("qwen3_moe_fused", 208, "fused experts, norm_topk_prob false, one KV head",
            dense("qwen3_moe", "72 104 2 4 1 131", head_dim=24, moe_intermediate_size=56, decoder_sparse_step=1,
                  mlp_only_layers=[], norm_topk_prob=False, **experts("num_experts", 8, 2), **V4)),
    MoeCase("gpt_oss_mxfp4", 236, "MXFP4 experts as stored originally, 6 experts top-2, sinks, biases, YaRN, windows of 16",
            dense("gpt_oss", "96 96 3 6 2 131", layer_types=GPT_OSS_LAYERS, experts_per_token=2,
                  **experts("num_local_experts", 6, 2), **GPT_OSS, **GPT_OSS_V4),
            lengths=(60, 300), load_options=DEQUANTISE, store=mxfp4_names, scales=(119, 125)),
    MoeCase("gpt_oss_bf16", 236, "gpt_oss_mxfp4's weights in BF16, experts stored transposed, no quantization_config",
            dense("gpt_oss", "96 96 3 6 2 131", layer_types=GPT_OSS_LAYERS, **experts("num_local_experts", 6, 2),
                  **GPT_OSS, rope_parameters={"rope_theta": 150000.0, **YARN}),
            spelling=5, lengths=(60, 300), scales=(119, 125)),
    MoeCase("gpt_oss_wide", 211, "MXFP4, hidden_size 2880, one layer, no layer_types, 3 experts top-2",
            dense("gpt_oss", "2880 96 1 2 1 43", **experts("num_local_experts", 3, 2), **GPT_OSS, **GPT_OSS_V4),
            load_options=DEQUANTISE, store=mxfp4_names, scales=(117, 122)),
)  # fmt: skip


def draw_weights(case: MoeCase, config: PreTrainedConfig) -> Weights:
    """Random BF16-exact weights for each parameter; gpt-oss's experts are drawn as MXFP4 and dequantised."""
    with torch.device("meta"):
        parameters = list(AutoModelForCausalLM.from_config(config).named_parameters())
    rng = np.random.default_rng(case.seed)
    model: Tensors = {}
    mxfp4: Tensors = {}
    for name, parameter in parameters:
        shape = parameter.shape
        if config.model_type == "gpt_oss" and re.search(r"mlp\.experts\.(gate_up|down)_proj$", name):
            low, high = case.scales if "gate_up" in name else (116, 122)
            blocks = rng.integers(0, 256, (shape[0], shape[2], shape[1] // 32, 16), dtype=np.uint8)
            scales = rng.integers(low, high + 1, blocks.shape[:3], dtype=np.uint8)
            mxfp4 |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
            values = dequantise(blocks, scales).swapaxes(1, 2)
        else:
            mean, std = moe_distribution(name, shape)
            values = mean + std * rng.standard_normal(tuple(shape))
        model[name] = torch.from_numpy(values).to(torch.bfloat16).contiguous()
    return Weights(model, mxfp4)


def moe_distribution(name: str, shape: torch.Size) -> tuple[float, float]:
    """Mean and standard deviation; router logits spread by about 3, so that few of them nearly tie."""
    if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
        return 0.0, 3.0 / math.sqrt(shape[1])
    if name.endswith("sinks"):
        return 0.0, 1.0
    if "mlp.experts." in name and not name.endswith("bias"):
        return 0.0, 1.5 / math.sqrt(shape[2])  # [E, out_features, in_features]
    return distribution(name, shape)


def dequantise(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float32 [E, out, 32 G] of E2M1 blocks [E, out, G, 16] (low nibble first) and E8M0 scales [E, out, G] (OCP MX 1.0)."""
    codes = np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(*blocks.shape[:3], 32)
    values = np.where(codes & 8, -1, 1) * E2M1[codes & 7]
    return np.ldexp(values.astype(np.float32), scales[..., None].astype(np.int32) - 127).reshape(*blocks.shape[:2], -1)


@torch.no_grad()
def smallest_router_gap(case: MoeCase, folder: Path, weights: Tensors, arrays: dict[str, np.ndarray]) -> float:
    """Over all id sets, tokens and sparse layers of the FP32 run; infinite where every expert is chosen."""
    gaps = [math.inf]

    def measure(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        ordered = output[0].sort(dim=-1, descending=True).values  # [num_tokens, num_experts]
        if router.top_k < router.num_experts:
            gaps.append((ordered[:, router.top_k - 1] - ordered[:, router.top_k]).min().item())

    for name, ids in arrays.items():
        if name.startswith("ids"):
            model = load(folder, torch.float32, len(ids), weights, **case.load_options)
            for module in model.modules():
                if type(module).__name__.endswith("TopKRouter"):
                    module.register_forward_hook(measure)
            model(torch.from_numpy(ids)[None], use_cache=False, logits_to_keep=1)
    return min(gaps)


def make_case(case: MoeCase, folder: Path) -> None:
    weights = draw_weights(case, write_config(case, folder))
    write_tensors(case, case.store(weights), folder)
    arrays = dict(golden_arrays(case, folder, weights.model))
    gap = smallest_router_gap(case, folder, weights.model, arrays)
    if gap <= LEAST_ROUTER_GAP:
        raise RuntimeError(f"{case.name}: the smallest router gap is {gap:.2e}; choose another seed")
    write_golden(case, folder, arrays, smallest_router_gap=gap if math.isfinite(gap) else None)


if __name__ == "__main__":
    make_cases("mixture-of-experts", Path("tests/golden/moe"), CASES, make_case)
