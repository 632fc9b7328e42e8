"""Qwen3-MoE: Qwen3 whose layers are mixtures of experts, but for those that the config keeps dense."""

from .architecture import ATTENTION_NAMES, DOWN, EXPERT_NAMES, GATE_UP, MLP_NAMES, Architecture, FusedExperts

QWEN3_MOE = Architecture(
    name="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    layer_names={**ATTENTION_NAMES, **MLP_NAMES, "router.weight": "mlp.gate.weight"},
    expert_names=EXPERT_NAMES,
    fused_experts=(FusedExperts("mlp.experts.gate_up_proj", GATE_UP), FusedExperts("mlp.experts.down_proj", DOWN)),
    config_keys={
        "qkv_bias": "attention_bias",
        "o_bias": "attention_bias",
        "moe_intermediate_size": "moe_intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
    },
    constants={"qk_norm": "head"},
    defaults={
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    sliding_window=True,
)
