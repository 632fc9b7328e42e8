"""What the NumPy backend computes between matrix products, in float32: the reference for every kernel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megalith.format.model import ModelConfig
from megalith.format.rope import F32

_GPT_OSS_SLOPE = 1.702
_QUERY_BLOCK_SCORES = 1 << 23  # float32 attention scores held at a time


def route(logits: F32, config: ModelConfig) -> tuple[NDArray[np.int64], F32]:
    """Chosen experts int64 and their shares float32, both [num_tokens, num_experts_per_tok], from logits of all experts.

    Among equal scores the expert with the lower number is chosen.
    """
    count = config.num_experts_per_tok
    if config.router == "top_k_then_softmax":
        chosen = np.argsort(-logits, axis=1, kind="stable")[:, :count]
        return chosen, softmax(np.take_along_axis(logits, chosen, axis=1))
    scores = softmax(logits)
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    shares = np.take_along_axis(scores, chosen, axis=1)
    return chosen, shares / shares.sum(axis=1, keepdims=True) if config.norm_topk_prob else shares


def softmax(x: F32) -> F32:
    """Over the last axis."""
    exponentials: F32 = np.exp(x - x.max(axis=-1, keepdims=True))
    total: F32 = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / total


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467)."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    scaled: F32 = x * (np.float32(1.0) / np.sqrt(mean_square + np.float32(eps)))
    return scaled * weight


def rotate(x: F32, rotation: F32) -> F32:
    """Rotate pairs (i, i + head_dim/2) of x [num_tokens, heads, head_dim] by rotation [num_tokens, head_dim/2, 2]."""
    cos, sin = rotation[:, None, :, 0], rotation[:, None, :, 1]
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


def swiglu(y: F32, limit: float | None) -> F32:
    """silu(gate) * up of y [num_tokens, 2 * intermediate_size] (arXiv 2002.05202).

    With a limit gpt-oss' form: gate = min(gate, limit), up clamped to +-limit, gate * sigmoid(1.702 gate) * (up + 1).
    """
    gate, up = np.split(y, 2, axis=1)
    slope = np.float32(1.0)
    if limit is not None:
        gate, up = np.minimum(gate, np.float32(limit)), np.clip(up, -np.float32(limit), np.float32(limit)) + np.float32(1.0)
        slope = np.float32(_GPT_OSS_SLOPE)
    with np.errstate(over="ignore"):  # exp(-gate) = inf gives the right limit, 0
        sigmoid: F32 = np.float32(1.0) / (np.float32(1.0) + np.exp(-slope * gate))
    return gate * sigmoid * up


def attention(q: F32, keys: F32, values: F32, window: int, sinks: F32 | None = None) -> F32:
    """Causal attention of the last num_tokens positions, with grouped queries.

    q: [num_tokens, num_attention_heads, head_dim]; keys, values: [num_key_value_heads, length, head_dim], these tokens
    included; `window` positions, self included, or 0 for all; `sinks` [num_attention_heads], one more logit per head that
    takes its share and gives nothing. Returns [num_tokens, num_attention_heads * head_dim].
    """
    num_tokens, num_heads, head_dim = q.shape
    length, group = keys.shape[1], num_heads // len(keys)
    by_head = q.transpose(1, 0, 2).reshape(len(keys), group, num_tokens, head_dim) * np.float32(head_dim**-0.5)
    out = np.empty((num_tokens, num_heads, head_dim), np.float32)
    block = max(1, _QUERY_BLOCK_SCORES // (num_heads * length))
    for start in range(0, num_tokens, block):
        stop = min(start + block, num_tokens)
        last = length - num_tokens + stop
        first = max(0, length - num_tokens + start - window + 1) if window else 0
        part = by_head[:, :, start:stop].reshape(len(keys), group * (stop - start), head_dim)
        scores = (part @ keys[:, first:last].swapaxes(1, 2)).reshape(len(keys), group, stop - start, last - first)
        if stop - start > 1 or window:
            position = np.arange(last - (stop - start), last)[:, None]
            key = np.arange(first, last)
            visible = key <= position
            if window:
                visible &= key > position - window
            scores = np.where(visible, scores, np.float32(-np.inf))
        largest = scores.max(axis=-1, keepdims=True)
        if sinks is not None:
            sink = sinks.reshape(len(keys), group, 1, 1)
            largest = np.maximum(largest, sink)
        scores -= largest
        np.exp(scores, out=scores)
        total = scores.sum(axis=-1, keepdims=True)
        scores /= total if sinks is None else total + np.exp(sink - largest)
        mixed = scores.reshape(len(keys), group * (stop - start), last - first) @ values[:, first:last]
        mixed = mixed.reshape(num_heads, stop - start, head_dim)
        out[start:stop] = mixed.swapaxes(0, 1)
    return out.reshape(num_tokens, num_heads * head_dim)
