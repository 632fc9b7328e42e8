"""The NumPy backend: the reference for correctness, and what runs where there is no GPU. Everything is float32."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megalith.format.reader import PackedFile
from megalith.format.rope import F32, inverse_frequencies, rotation_rows

from .numpy_ops import attention, rms_norm, rotate, route, swiglu
from .program import Kind, Operation, build_program, operation_name
from .sampler import SamplingParameters, TokenCounts, sample
from .trace import Trace, host_span, traced
from .weights import Weights

PREFILL_CHUNK_TOKENS = 512


class Cache(Protocol):
    """Keys and values of one sequence of `length` positions, wherever they lie."""

    length: int

    def append(self, layer: int, k: F32, v: F32) -> None:
        """Write float32 [num_tokens, num_key_value_heads, head_dim] after `length` positions; `length` stays."""

    def view(self, layer: int, stop: int) -> tuple[F32, F32]:
        """Keys and values of the first `stop` positions: float32 [num_key_value_heads, stop, head_dim]."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one sequence in a forward pass.

    `seq_len` is the length the prompt or sequence will have at the end of this prefill (dynamic RoPE asks for it);
    `rows` are those of its tokens whose logits are wanted.
    """

    ids: NDArray[np.int64]  # [num_tokens]
    cache: Cache
    seq_len: int
    rows: slice


@dataclass
class Activations:
    """What the operations of one forward pass hand on, under the names of `program.Kind`; rows are tokens of all spans."""

    x: F32
    h: F32
    q: F32
    a: F32  # after the head: logits
    experts: tuple[NDArray[np.int64], F32]

    @classmethod
    def empty(cls) -> Activations:
        none = np.empty((0, 0), np.float32)
        return cls(none, none, none, none, (np.empty((0, 0), np.int64), none))


class KvCache:
    """Keys and values of one sequence, float32 [num_layers, num_key_value_heads, capacity, head_dim], grown by doubling."""

    def __init__(self, num_layers: int, num_heads: int, head_dim: int) -> None:
        self.length = 0
        shape = (num_layers, num_heads, 64, head_dim)
        self.keys: F32 = np.empty(shape, np.float32)
        self.values: F32 = np.empty(shape, np.float32)

    def reserve(self, length: int) -> None:
        """Make room for `length` positions."""
        capacity = self.keys.shape[2]
        if length <= capacity:
            return
        while capacity < length:
            capacity *= 2
        for name in ("keys", "values"):
            old: F32 = getattr(self, name)
            new = np.empty((*old.shape[:2], capacity, old.shape[3]), np.float32)
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def append(self, layer: int, k: F32, v: F32) -> None:
        stop = self.length + len(k)
        self.reserve(stop)
        self.keys[layer, :, self.length : stop] = k.swapaxes(0, 1)
        self.values[layer, :, self.length : stop] = v.swapaxes(0, 1)

    def view(self, layer: int, stop: int) -> tuple[F32, F32]:
        return self.keys[layer, :, :stop], self.values[layer, :, :stop]


class Rotations:
    """Rows of the RoPE table, and for the dynamic type what lies beyond it.

    As in transformers, a dynamic model rotates each forward pass by the frequencies of its longest position so far;
    keys in the cache keep the rotation they were written with.
    """

    def __init__(self, packed: PackedFile) -> None:
        self._rope, self._head_dim = packed.index.rope, packed.index.config.head_dim
        _, self._table = packed.rope
        self.fixed = self._rope.type != "dynamic"  # a position's rotation never depends on the sequence

    def rows(self, start: int, stop: int, seq_len: int) -> F32:
        """float32 [stop - start, head_dim/2, 2] for a pass that ends at position `seq_len` - 1."""
        if self._rope.type != "dynamic" or seq_len <= self._rope.original_max_position_embeddings:
            return self._table[start:stop]
        inverse = inverse_frequencies(self._rope, self._head_dim, seq_len)
        return rotation_rows(inverse, self._rope.attention_factor, start, stop)


class NumpyBackend:
    """Executes a program over tokens of one sequence or several."""

    def __init__(self, packed: PackedFile, cache_bytes: int | None = None, trace: Trace | None = None) -> None:
        self.config = packed.index.config
        self.max_seq_len = self.config.max_seq_len
        self.program = build_program(packed.index)
        self._names = packed.index.blobs.names
        self._trace = trace
        with host_span(trace, "decode weights"):
            self.weights = Weights(packed, cache_bytes)
        self.rotations = Rotations(packed)

    def new_cache(self) -> KvCache:
        """An empty KV cache."""
        config = self.config
        return KvCache(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)

    def close_cache(self, cache: KvCache) -> None:
        """Nothing to do: its memory is the caller's."""

    def forward(self, ids: NDArray[np.int64], cache: Cache, seq_len: int, last_only: bool) -> F32:
        """Logits float32 [num_tokens or 1, vocab_size] of tokens appended to the sequence in `cache`."""
        wanted = []
        for start in range(0, len(ids), PREFILL_CHUNK_TOKENS):
            chunk = ids[start : start + PREFILL_CHUNK_TOKENS]
            is_last = start + len(chunk) == len(ids)
            rows = slice(None) if not last_only else slice(-1, None) if is_last else slice(0, 0)
            wanted.append(self.forward_batch([Span(chunk, cache, seq_len, rows)]))
        return np.concatenate(wanted)

    def generate(self, tokens: NDArray[np.int64], parameters: SamplingParameters, count: int) -> Generator[int, None, None]:
        """At most `count` tokens after `tokens`, as they come."""
        cache, pending = self.new_cache(), tokens
        counts = TokenCounts(self.config.vocab_size, tokens.tolist()) if parameters.counts_tokens else None
        choose = traced(self._trace, "sample", sample)
        for position in range(len(tokens), len(tokens) + count):
            chosen = choose(self.forward(pending, cache, position, True)[-1], parameters, position, counts)
            if counts is not None:
                counts.add(chosen)
            yield chosen
            pending = np.array([chosen])

    def forward_batch(self, spans: Sequence[Span]) -> F32:
        """Logits float32 [wanted rows of all spans, vocab_size]; the tokens of each span are appended to its cache."""
        state = Activations.empty()
        steps = self.steps(spans, state)
        if self._trace is not None:
            steps = self._traced_steps(steps, self._trace, sum(len(span.ids) for span in spans))
        for _ in steps:
            pass
        return state.a

    def steps(self, spans: Sequence[Span], state: Activations) -> Iterator[Operation]:
        """Execute the program, an operation at a time: it comes when `state` has what it leaves. Caches grow at the end."""
        ids = np.concatenate([span.ids for span in spans])
        starts = [span.cache.length for span in spans]
        rotation = np.concatenate(
            [self.rotations.rows(start, start + len(span.ids), span.seq_len) for span, start in zip(spans, starts, strict=True)]
        )
        state.x = self.weights.rows(self.program[0].weight, ids).astype(np.float32)
        yield self.program[0]
        for op in self.program[1:]:
            self._execute(op, state, rotation, spans)
            yield op
        for span, start in zip(spans, starts, strict=True):
            span.cache.length = start + len(span.ids)

    def _traced_steps(self, steps: Iterator[Operation], trace: Trace, num_tokens: int) -> Iterator[Operation]:
        first = begun = trace.now()
        for op in steps:
            trace.add_host(operation_name(op, self._names), begun, **({"layer": op.layer} if op.layer >= 0 else {}))
            yield op
            begun = trace.now()
        trace.add_host("forward pass", first, tokens=num_tokens)

    def _execute(self, op: Operation, state: Activations, rotation: F32, spans: Sequence[Span]) -> None:
        """Any operation but the embedding."""
        if op.kind is Kind.NORM:
            state.h = rms_norm(state.x, self.weights.vector(op.weight), self.config.rms_norm_eps)
        elif op.kind is Kind.QKV:
            state.q = self._qkv(op, state.h, rotation, spans)
        elif op.kind is Kind.ATTENTION:
            state.a = self._attention(op, state.q, spans)
        elif op.kind is Kind.PROJECT:
            state.x += self.weights.multiply(state.a, op.weight, op.bias)
        elif op.kind is Kind.GATE_UP:
            state.a = swiglu(self.weights.multiply(state.h, op.weight, op.bias), self.config.swiglu_limit)
        elif op.kind is Kind.ROUTE:
            state.experts = route(self.weights.multiply(state.h, op.weight, op.bias), self.config)
        elif op.kind is Kind.EXPERTS:
            state.x += self._experts(op, state.h, *state.experts)
        else:
            assert op.kind is Kind.HEAD
            h = np.concatenate([part[span.rows] for part, span in zip(split(state.h, spans), spans, strict=True)])
            state.a = self.weights.multiply(h, op.weight) if len(h) else np.empty((0, self.config.vocab_size), np.float32)

    def _qkv(self, op: Operation, h: F32, rotation: F32, spans: Sequence[Span]) -> F32:
        """Queries float32 [num_tokens, num_attention_heads, head_dim]; keys and values go to the caches."""
        config, num_tokens = self.config, len(h)
        y = self.weights.multiply(h, op.weight, op.bias)
        q, k, v = np.split(y, (config.q_rows, config.q_rows + config.kv_rows), axis=1)
        if config.qk_norm == "full":
            q, k = self._normalised(op, q, k)
        if config.clip_qkv is not None:
            q, k, v = (np.clip(part, -np.float32(config.clip_qkv), np.float32(config.clip_qkv)) for part in (q, k, v))
        q, k, v = (part.reshape(num_tokens, -1, config.head_dim) for part in (q, k, v))
        if config.qk_norm == "head":
            q, k = self._normalised(op, q, k)
        for span, k_rows, v_rows in zip(spans, split(rotate(k, rotation), spans), split(v, spans), strict=True):
            span.cache.append(op.layer, k_rows, v_rows)
        return rotate(q, rotation)

    def _attention(self, op: Operation, q: F32, spans: Sequence[Span]) -> F32:
        sinks = self.weights.vector(op.sinks) if op.sinks >= 0 else None
        outputs = []
        for span, rows in zip(spans, split(q, spans), strict=True):
            keys, values = span.cache.view(op.layer, span.cache.length + len(span.ids))
            outputs.append(attention(rows, keys, values, op.window, sinks))
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def _normalised(self, op: Operation, q: F32, k: F32) -> tuple[F32, F32]:
        eps = self.config.rms_norm_eps
        return rms_norm(q, self.weights.vector(op.q_norm), eps), rms_norm(k, self.weights.vector(op.k_norm), eps)

    def _experts(self, op: Operation, h: F32, chosen: NDArray[np.int64], shares: F32) -> F32:
        """Sum of the chosen experts' outputs, float32 [num_tokens, hidden_size]; only chosen experts are evaluated."""
        config, total = self.config, np.zeros((len(h), self.config.hidden_size), np.float32)
        for expert in np.unique(chosen).tolist():
            first = op.weight + expert * op.blobs_per_expert
            gate_up, gate_up_bias, down, down_bias = (
                (first, first + 1, first + 2, first + 3) if config.expert_bias else (first, -1, first + 1, -1)
            )
            token, slot = np.nonzero(chosen == expert)
            inner = swiglu(self.weights.multiply(h[token], gate_up, gate_up_bias), config.swiglu_limit)
            total[token] += shares[token, slot][:, None] * self.weights.multiply(inner, down, down_bias)
        return total


def split(rows: F32, spans: Sequence[Span]) -> list[F32]:
    """The rows of each span, views of float32 [num_tokens of all spans, ...]."""
    if len(spans) == 1:
        return [rows]
    return np.split(rows, np.cumsum([len(span.ids) for span in spans])[:-1])
