"""What an architecture module says: names of tensors and where its config keeps what. Names and shapes only, no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GLOBAL_NAMES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}

ATTENTION_NAMES = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
    **{f"{p}_proj.{kind}": f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")},
    "q_norm.weight": "self_attn.q_norm.weight",
    "k_norm.weight": "self_attn.k_norm.weight",
}

MLP_NAMES = {f"{p}_proj.{kind}": f"mlp.{p}_proj.{kind}" for p in ("gate", "up", "down") for kind in ("weight", "bias")}
EXPERT_NAMES = {role: name.replace("mlp.", "mlp.experts.{e}.") for role, name in MLP_NAMES.items()}

GATE_UP = ("gate_proj.weight", "up_proj.weight")
DOWN = ("down_proj.weight",)


@dataclass(frozen=True)
class FusedExperts:
    """One checkpoint tensor per layer that holds all experts' matrices of the given roles, `name` under `model.layers.N.`.

    Its shape is [experts, len(roles) * rows, columns], or [experts, columns, len(roles) * rows] when `transposed`. Rows
    of the roles follow each other, or alternate when `interleaved`. With `scales` it holds MXFP4 codes
    [experts, rows, columns / 32, 16] and that tensor their scales. Biases have no columns.
    """

    name: str
    roles: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False
    scales: str = ""

    def shape(self, num_experts: int, rows: int, columns: int) -> tuple[int, ...]:
        """Shape for matrices of `rows` x `columns` each; `columns` is 1 for a bias."""
        fused = len(self.roles) * rows
        if self.scales:
            return (num_experts, fused, columns // 32, 16)
        if self.roles[0].endswith(".bias"):
            return (num_experts, fused)
        return (num_experts, columns, fused) if self.transposed else (num_experts, fused, columns)

    def place(self, expert: int, role: str, rows: int, columns: int) -> tuple[int, int, int]:
        """First element, and strides of rows and columns, of one expert's matrix; in bytes of codes for MXFP4."""
        count, number = len(self.roles), self.roles.index(role)
        first = expert * count * rows
        if self.transposed:
            return (
                first * columns + (number if self.interleaved else number * rows),
                count if self.interleaved else 1,
                count * rows,
            )
        width = columns // 2 if self.scales else columns
        start = first + (number if self.interleaved else number * rows)
        return start * width, (count if self.interleaved else 1) * width, 1


@dataclass(frozen=True)
class Architecture:
    """One `architectures` entry of a config.json.

    `layer_names` maps a role within a layer to the tensor's name under `model.layers.N.`, or to several names that
    checkpoints use; `expert_names` a role within expert `{e}`. `fused_experts` lists the forms that hold all experts at
    once. `config_keys` maps fields of `ModelConfig` to their keys in the config, `constants` gives those that the
    architecture fixes. `defaults` are transformers' values for keys a config may omit, `rope_defaults` those
    of RoPE: `rope_theta`, and the rest where the config says nothing of scaling.
    `sliding_window` says whether the architecture knows windows at all, `uniform_window` whether every layer then has it,
    whatever else the config says, `alternating_window` whether by default every second layer has it.
    """

    name: str
    model_type: str
    layer_names: Mapping[str, str | tuple[str, ...]]
    expert_names: Mapping[str, str] = field(default_factory=dict)
    fused_experts: tuple[FusedExperts, ...] = ()
    config_keys: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str | bool] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rope_defaults: Mapping[str, Any] = field(default_factory=dict)
    sliding_window: bool = False
    uniform_window: bool = False
    alternating_window: bool = False

    def tensor_names(self, role: str) -> list[str]:
        """Names that a part such as "layers.3.q_proj.weight" may have in a checkpoint."""
        if not role.startswith("layers."):
            return [GLOBAL_NAMES[role]]
        _, layer, inner = role.split(".", 2)
        if inner.startswith("experts."):
            _, expert, inner = inner.split(".", 2)
            names: str | tuple[str, ...] = self.expert_names[inner].format(e=expert)
        else:
            names = self.layer_names[inner]
        return [f"model.layers.{layer}.{name}" for name in ((names,) if isinstance(names, str) else names)]
