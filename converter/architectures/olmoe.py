"""OLMoE: experts in every layer, RMSNorm over all of q and all of k, an optional clamp on q, k and v."""

from .architecture import ATTENTION_NAMES, DOWN, EXPERT_NAMES, GATE_UP, Architecture, FusedExperts

OLMOE = Architecture(
    name="OlmoeForCausalLM",
    model_type="olmoe",
    layer_names={**ATTENTION_NAMES, "router.weight": "mlp.gate.weight"},
    expert_names=EXPERT_NAMES,
    fused_experts=(FusedExperts("mlp.experts.gate_up_proj", GATE_UP), FusedExperts("mlp.experts.down_proj", DOWN)),
    config_keys={
        "qkv_bias": "attention_bias",
        "o_bias": "attention_bias",
        "clip_qkv": "clip_qkv",
        "moe_intermediate_size": "intermediate_size",
        "norm_topk_prob": "norm_topk_prob",
    },
    constants={"qk_norm": "full"},
    defaults={"num_experts": 64, "num_experts_per_tok": 8, "rms_norm_eps": 1e-5},
)
