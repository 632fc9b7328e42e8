"""gpt-oss: biases everywhere, attention sinks, alternating windows, clamped SwiGLU; experts in MXFP4, or transposed in BF16."""

from .architecture import ATTENTION_NAMES, DOWN, EXPERT_NAMES, GATE_UP, Architecture, FusedExperts

_GATE_UP_BIAS, _DOWN_BIAS = ("gate_proj.bias", "up_proj.bias"), ("down_proj.bias",)

GPT_OSS = Architecture(
    name="GptOssForCausalLM",
    model_type="gpt_oss",
    layer_names={
        **ATTENTION_NAMES,
        "sinks": "self_attn.sinks",
        "router.weight": "mlp.router.weight",
        "router.bias": "mlp.router.bias",
    },
    expert_names=EXPERT_NAMES,
    fused_experts=(
        FusedExperts("mlp.experts.gate_up_proj_blocks", GATE_UP, interleaved=True, scales="mlp.experts.gate_up_proj_scales"),
        FusedExperts("mlp.experts.down_proj_blocks", DOWN, scales="mlp.experts.down_proj_scales"),
        FusedExperts("mlp.experts.gate_up_proj", GATE_UP, interleaved=True, transposed=True),
        FusedExperts("mlp.experts.down_proj", DOWN, transposed=True),
        FusedExperts("mlp.experts.gate_up_proj_bias", _GATE_UP_BIAS, interleaved=True),
        FusedExperts("mlp.experts.down_proj_bias", _DOWN_BIAS),
    ),
    config_keys={
        "qkv_bias": "attention_bias",
        "o_bias": "attention_bias",
        "moe_intermediate_size": "intermediate_size",
        "swiglu_limit": "swiglu_limit",
    },
    constants={"attention_sinks": True, "router_bias": True, "expert_bias": True, "router": "top_k_then_softmax"},
    defaults={
        "attention_bias": True,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
    },
    rope_defaults={
        "rope_theta": 150_000.0,
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    sliding_window=True,
    alternating_window=True,
)
