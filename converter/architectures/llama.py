"""Llama 2, 3, 3.1, 3.2 and what shares their form."""

from .architecture import ATTENTION_NAMES, MLP_NAMES, Architecture

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    layer_names={**ATTENTION_NAMES, **MLP_NAMES},
    config_keys={"qkv_bias": "attention_bias", "o_bias": "attention_bias", "mlp_bias": "mlp_bias"},
)
