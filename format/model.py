"""The model as the runtime needs it, and the blobs that a file of it holds (specs/format.md, "Model config", "Model table").

A blob is one packed matrix or vector of the device image. It is made of one or more parts, each one checkpoint tensor;
`blob_specs` is the single statement of names, shapes, row orders and execution order: the converter plans from it, the
reader checks against it, the runtime looks blobs up by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from .constants import MAX_DIMENSION, TILE_ROWS
from .errors import FormatError, is_name, printable
from .rows import RowMap, rope_order_applies
from .tiles import padded

MAX_LAYERS = 16_384
MAX_EOS_TOKENS = 64
MAX_EXPERTS = 4096
QK_NORMS = ("none", "head", "full")
ROUTERS = ("softmax_then_top_k", "top_k_then_softmax")


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of a decoder-only transformer, in Hugging Face's terms.

    `layer_windows[i]` is the number of positions that layer i attends to, itself included; 0 is all of them.
    `qk_norm` "head" normalises each head of q and k, "full" all of q and all of k. Layer i is a mixture of experts
    where `sparse_layers[i]` is true. `swiglu_limit` is the clamp of gpt-oss' activation, None for plain SwiGLU.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    max_seq_len: int
    layer_windows: list[int]
    sparse_layers: list[bool]
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    clip_qkv: float | None = None
    attention_sinks: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    router: str = ROUTERS[0]
    norm_topk_prob: bool = False
    router_bias: bool = False
    expert_bias: bool = False
    swiglu_limit: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, raw: Any, place: str) -> ModelConfig:
        """Checked against rule I4: exact keys, exact types, values in range."""
        names = {f.name for f in fields(cls)}
        if not isinstance(raw, dict) or set(raw) != names:
            found = sorted(set(raw) ^ names) if isinstance(raw, dict) else type(raw).__name__
            raise FormatError(f"{place}: config keys are not those of this version: {printable(found)}", "I4")
        config = cls(**raw)
        for name, problem in config._problems():
            raise FormatError(f"{place}: config.{name} is {printable(raw[name])}: {problem}", "I4")
        return config

    def _problems(self) -> Iterator[tuple[str, str]]:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
            "head_dim", "max_position_embeddings", "max_seq_len", "num_hidden_layers",
        ):  # fmt: skip
            limit = MAX_LAYERS if name == "num_hidden_layers" else MAX_DIMENSION
            if not _is_int(getattr(self, name), 1, limit):
                yield name, f"must be an integer from 1 to {limit}"
        for name in (
            "tie_word_embeddings", "qkv_bias", "o_bias", "mlp_bias", "attention_sinks", "norm_topk_prob", "router_bias",
            "expert_bias",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                yield name, "must be a boolean"
        for name, known in (("qk_norm", QK_NORMS), ("router", ROUTERS)):
            if getattr(self, name) not in known:
                yield name, f"must be one of {', '.join(known)}"
        for name in ("clip_qkv", "swiglu_limit"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, float) and 0.0 < value <= MAX_DIMENSION):
                yield name, "must be nil or a positive number"
        yield from self._expert_problems()
        if not is_name(self.architecture, 64):
            yield "architecture", "must be 1 to 64 printable ASCII characters"
        if not isinstance(self.rms_norm_eps, float) or not 0.0 < self.rms_norm_eps < 1.0:
            yield "rms_norm_eps", "must lie between 0 and 1"
        if self.num_attention_heads % self.num_key_value_heads:
            yield "num_key_value_heads", f"must divide num_attention_heads = {self.num_attention_heads}"
        if self.head_dim % 2:
            yield "head_dim", "must be even for RoPE"
        windows = self.layer_windows
        if not isinstance(windows, list) or len(windows) != self.num_hidden_layers:
            yield "layer_windows", "must hold one entry per layer"
        elif not all(_is_int(window, 0, MAX_DIMENSION) for window in windows):
            yield "layer_windows", "entries must be integers of at least 0"
        if self.bos_token_id is not None and not _is_int(self.bos_token_id, 0, self.vocab_size - 1):
            yield "bos_token_id", f"must be below vocab_size = {self.vocab_size}"
        eos = self.eos_token_ids
        if not isinstance(eos, list) or len(eos) > MAX_EOS_TOKENS:
            yield "eos_token_ids", f"must be a list of at most {MAX_EOS_TOKENS}"
        elif not all(_is_int(token, 0, self.vocab_size - 1) for token in eos):
            yield "eos_token_ids", f"entries must be below vocab_size = {self.vocab_size}"

    def _expert_problems(self) -> Iterator[tuple[str, str]]:
        sparse = self.sparse_layers
        if not isinstance(sparse, list) or len(sparse) != self.num_hidden_layers or not all(type(x) is bool for x in sparse):
            yield "sparse_layers", "must hold one boolean per layer"
            return
        limits = {"num_experts": MAX_EXPERTS, "num_experts_per_tok": MAX_EXPERTS, "moe_intermediate_size": MAX_DIMENSION}
        for name, limit in limits.items():
            low, high = (1, limit) if any(sparse) else (0, 0)
            if not _is_int(getattr(self, name), low, high):
                yield name, f"must be an integer from {low} to {high} here"
        if self.num_experts_per_tok > self.num_experts:
            yield "num_experts_per_tok", f"must be at most num_experts = {self.num_experts}"

    @property
    def q_rows(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        return self.num_key_value_heads * self.head_dim


def _is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class PartSpec:
    """One checkpoint tensor inside a blob; vectors have one column."""

    role: str
    rows: int
    columns: int
    row_map: RowMap


@dataclass(frozen=True)
class BlobSpec:
    """One packed matrix or vector. A matrix lies in tiles; only one that `may_be_mxfp4` may hold MXFP4."""

    name: str
    parts: tuple[PartSpec, ...]
    is_matrix: bool = False
    may_be_mxfp4: bool = False

    @cached_property
    def rows(self) -> int:
        """Stored rows."""
        return padded(max(part.row_map.base + part.row_map.stored_span(part.rows) for part in self.parts), TILE_ROWS)

    @property
    def columns(self) -> int:
        """Logical columns; 1 for a vector."""
        return self.parts[0].columns

    def placed(self, prefix: str) -> BlobSpec:
        """The same blob and parts under a prefix such as "layers.3."."""
        parts = tuple(PartSpec(prefix + p.role, p.rows, p.columns, p.row_map) for p in self.parts)
        return BlobSpec(prefix + self.name, parts, self.is_matrix, self.may_be_mxfp4)


def _vector(name: str, role: str, length: int) -> BlobSpec:
    return BlobSpec(name, (PartSpec(role, length, 1, RowMap()),))


def _matrix(name: str, role: str, rows: int, columns: int, may_be_mxfp4: bool = True) -> BlobSpec:
    return BlobSpec(name, (PartSpec(role, rows, columns, RowMap()),), True, may_be_mxfp4)


def _qkv_maps(config: ModelConfig) -> tuple[RowMap, RowMap, RowMap]:
    """Row maps of q, k and v in their fused blob."""
    rope = ("rope", config.head_dim) if rope_order_applies(config.head_dim) else ("sequential", 0)
    k_base = padded(config.q_rows, TILE_ROWS)
    v_base = k_base + padded(config.kv_rows, TILE_ROWS)
    return RowMap(rope[0], 0, rope[1]), RowMap(rope[0], k_base, rope[1]), RowMap("sequential", v_base)


def _attention_specs(config: ModelConfig) -> Iterator[BlobSpec]:
    maps = _qkv_maps(config)
    rows = (config.q_rows, config.kv_rows, config.kv_rows)
    parts = tuple(zip(("q_proj", "k_proj", "v_proj"), rows, maps, strict=True))
    yield _vector("input_layernorm", "input_layernorm.weight", config.hidden_size)
    weights = tuple(PartSpec(f"{name}.weight", count, config.hidden_size, m) for name, count, m in parts)
    yield BlobSpec("qkv_proj", weights, True, True)
    if config.qkv_bias:
        yield BlobSpec("qkv_bias", tuple(PartSpec(f"{name}.bias", count, 1, m) for name, count, m in parts))
    if config.qk_norm != "none":
        whole = config.qk_norm == "full"
        yield _vector("q_norm", "q_norm.weight", config.q_rows if whole else config.head_dim)
        yield _vector("k_norm", "k_norm.weight", config.kv_rows if whole else config.head_dim)
    if config.attention_sinks:
        yield _vector("sinks", "sinks", config.num_attention_heads)
    yield _matrix("o_proj", "o_proj.weight", config.hidden_size, config.q_rows)
    if config.o_bias:
        yield _vector("o_bias", "o_proj.bias", config.hidden_size)
    yield _vector("post_attention_layernorm", "post_attention_layernorm.weight", config.hidden_size)


def _mlp_specs(hidden: int, inner: int, has_bias: bool) -> Iterator[BlobSpec]:
    """gate, up and down of a dense MLP or of one expert."""
    pairs = (("gate_proj", RowMap("pair8", 0, 0)), ("up_proj", RowMap("pair8", 0, 1)))
    yield BlobSpec("gate_up_proj", tuple(PartSpec(f"{name}.weight", inner, hidden, m) for name, m in pairs), True, True)
    if has_bias:
        yield BlobSpec("gate_up_bias", tuple(PartSpec(f"{name}.bias", inner, 1, m) for name, m in pairs))
    yield _matrix("down_proj", "down_proj.weight", hidden, inner)
    if has_bias:
        yield _vector("down_bias", "down_proj.bias", hidden)


def expert_specs(config: ModelConfig) -> list[BlobSpec]:
    """The blobs of one expert, in the order in which they follow each other."""
    return list(_mlp_specs(config.hidden_size, config.moe_intermediate_size, config.expert_bias))


def layer_specs(config: ModelConfig, is_sparse: bool) -> list[BlobSpec]:
    """The blobs of one layer, named without its number."""
    specs = list(_attention_specs(config))
    if not is_sparse:
        return [*specs, *_mlp_specs(config.hidden_size, config.intermediate_size, config.mlp_bias)]
    specs.append(_matrix("router", "router.weight", config.num_experts, config.hidden_size, may_be_mxfp4=False))
    if config.router_bias:
        specs.append(_vector("router_bias", "router.bias", config.num_experts))
    expert = expert_specs(config)
    return specs + [spec.placed(f"experts.{e}.") for e in range(config.num_experts) for spec in expert]


def num_blobs(config: ModelConfig) -> int:
    """Number of blobs of a model, known without listing them."""
    per_expert = 4 if config.expert_bias else 2
    attention = len(list(_attention_specs(config)))
    dense = attention + (4 if config.mlp_bias else 2)
    sparse = attention + 1 + config.router_bias + config.num_experts * per_expert
    return sum(sparse if x else dense for x in config.sparse_layers) + 3 - config.tie_word_embeddings


def outer_specs(config: ModelConfig) -> tuple[list[BlobSpec], list[BlobSpec]]:
    """The blobs before the first layer and after the last."""
    first = [_matrix("embed_tokens", "embed_tokens.weight", config.vocab_size, config.hidden_size, may_be_mxfp4=False)]
    last = [_vector("norm", "norm.weight", config.hidden_size)]
    if not config.tie_word_embeddings:
        last.append(_matrix("lm_head", "lm_head.weight", config.vocab_size, config.hidden_size, may_be_mxfp4=False))
    return first, last


def blob_specs(config: ModelConfig) -> list[BlobSpec]:
    """Every blob of a model, in execution order, which is their order in the device image."""
    kinds = {is_sparse: layer_specs(config, is_sparse) for is_sparse in set(config.sparse_layers)}
    first, last = outer_specs(config)
    layers = [spec.placed(f"layers.{i}.") for i, sparse in enumerate(config.sparse_layers) for spec in kinds[sparse]]
    return [*first, *layers, *last]
