"""Mistral: Llama's form, every layer within a sliding window when the config gives one."""

from .architecture import ATTENTION_NAMES, MLP_NAMES, Architecture

MISTRAL = Architecture(
    name="MistralForCausalLM",
    model_type="mistral",
    layer_names={**ATTENTION_NAMES, **MLP_NAMES},
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    sliding_window=True,
    uniform_window=True,
)
