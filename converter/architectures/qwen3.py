"""Qwen3: per-head RMSNorm on q and k before RoPE, no biases unless the config asks."""

from .architecture import ATTENTION_NAMES, MLP_NAMES, Architecture

QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    layer_names={**ATTENTION_NAMES, **MLP_NAMES},
    config_keys={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
    constants={"qk_norm": "head"},
    defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
    },
    sliding_window=True,
)
