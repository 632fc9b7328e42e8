"""Qwen2 and Qwen2.5: biases on q, k and v; the upper layers may use a sliding window."""

from .architecture import ATTENTION_NAMES, MLP_NAMES, Architecture

QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    layer_names={**ATTENTION_NAMES, **MLP_NAMES},
    constants={"qkv_bias": True},
    defaults={"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
    sliding_window=True,
)
