"""Mixtral: Mistral with a mixture of experts in every layer; its router always renormalises the chosen experts."""

from .architecture import ATTENTION_NAMES, DOWN, GATE_UP, Architecture, FusedExperts

MIXTRAL = Architecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    layer_names={**ATTENTION_NAMES, "router.weight": ("block_sparse_moe.gate.weight", "mlp.gate.weight")},
    expert_names={
        "gate_proj.weight": "block_sparse_moe.experts.{e}.w1.weight",
        "up_proj.weight": "block_sparse_moe.experts.{e}.w3.weight",
        "down_proj.weight": "block_sparse_moe.experts.{e}.w2.weight",
    },
    fused_experts=(
        FusedExperts("mlp.experts.gate_up_proj", GATE_UP),
        FusedExperts("mlp.experts.down_proj", DOWN),
        FusedExperts("block_sparse_moe.experts.gate_up_proj", GATE_UP),
        FusedExperts("block_sparse_moe.experts.down_proj", DOWN),
    ),
    config_keys={"moe_intermediate_size": "intermediate_size"},
    constants={"norm_topk_prob": True},
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    rope_defaults={"rope_theta": 1e6},
    sliding_window=True,
    uniform_window=True,
)
