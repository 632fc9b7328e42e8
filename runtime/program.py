"""The program of a model: the ordered operations of one forward pass, built once from the index.

Every backend executes the same list. An operation is as large as one fused kernel: what stands between two matrix
products belongs to the operation that can do it in its epilogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from megalith.format.index import Index
from megalith.format.model import expert_specs


class Kind(Enum):
    """What an operation computes; x is the residual stream, h the normalised one, a the attention's or MLP's inner state."""

    EMBED = "x = embed_tokens[ids]"
    NORM = "h = rmsnorm(x) * weight"
    QKV = "q, k, v = h @ weight.T + bias; q/k norm; clamp; rope; append k, v to the layer's cache"
    ATTENTION = "a = softmax(q @ k.T / sqrt(head_dim)) @ v, with one more logit per head, a sink, where the model has it"
    PROJECT = "x += a @ weight.T + bias"
    GATE_UP = "a = silu(h @ gate.T + bias) * (h @ up.T + bias)"
    ROUTE = "the num_experts_per_tok experts of each token and their shares, from h @ weight.T + bias"
    EXPERTS = "x += sum over chosen experts of share * down(activation(gate_up(h)))"
    HEAD = "logits = h @ weight.T"


@dataclass(frozen=True)
class Operation:
    """One step; blobs are numbers in the index's table, -1 for none; `window` is 0 for full attention.

    The blobs of expert e are those from `weight + e * blobs_per_expert` on, in the order of `expert_specs`.
    """

    kind: Kind
    layer: int = -1
    weight: int = -1
    bias: int = -1
    q_norm: int = -1
    k_norm: int = -1
    sinks: int = -1
    window: int = 0
    blobs_per_expert: int = 0


def build_program(index: Index) -> list[Operation]:
    """The forward pass of a decoder."""
    config = index.config
    numbers = {name: i for i, name in enumerate(index.blobs.names)}
    program = [Operation(Kind.EMBED, weight=numbers["embed_tokens"])]
    for layer, is_sparse in enumerate(config.sparse_layers):
        blob = _LayerBlobs(numbers, layer)
        program += [
            Operation(Kind.NORM, layer, blob("input_layernorm")),
            Operation(Kind.QKV, layer, blob("qkv_proj"), blob("qkv_bias"), blob("q_norm"), blob("k_norm")),
            Operation(Kind.ATTENTION, layer, sinks=blob("sinks"), window=config.layer_windows[layer]),
            Operation(Kind.PROJECT, layer, blob("o_proj"), blob("o_bias")),
            Operation(Kind.NORM, layer, blob("post_attention_layernorm")),
        ]
        if is_sparse:
            per_expert = len(expert_specs(config))
            program += [
                Operation(Kind.ROUTE, layer, blob("router"), blob("router_bias")),
                Operation(Kind.EXPERTS, layer, blob("experts.0.gate_up_proj"), blobs_per_expert=per_expert),
            ]
        else:
            program += [
                Operation(Kind.GATE_UP, layer, blob("gate_up_proj"), blob("gate_up_bias")),
                Operation(Kind.PROJECT, layer, blob("down_proj"), blob("down_bias")),
            ]
    head = numbers["embed_tokens" if config.tie_word_embeddings else "lm_head"]
    return [*program, Operation(Kind.NORM, weight=numbers["norm"]), Operation(Kind.HEAD, weight=head)]


def operation_name(op: Operation, blob_names: Sequence[str]) -> str:
    """What people call it: the matrix or vector that it reads, such as "o_proj", or what it computes."""
    if op.kind is Kind.HEAD:
        return "lm_head"  # also where its matrix is the embedding's
    if op.kind in (Kind.ATTENTION, Kind.EXPERTS):
        return op.kind.name.lower()
    return blob_names[op.weight].rpartition(".")[2]


class _LayerBlobs:
    """Numbers of a layer's blobs by name, -1 for those it does not have."""

    def __init__(self, numbers: dict[str, int], layer: int) -> None:
        self._numbers = numbers
        self._layer = layer

    def __call__(self, name: str) -> int:
        return self._numbers.get(f"layers.{self._layer}.{name}", -1)
