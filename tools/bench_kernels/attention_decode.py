"""`attention_decode.cu` on the real models' shapes: a layer's K and V bytes over nominal bandwidth."""

from __future__ import annotations

from typing import Any

import numpy as np

from megalith.runtime.attention_plan import decode_attention
from megalith.runtime.gpu_buffers import MAX_SPLITS
from megalith.runtime.gpu_buffers import PAGE_TOKENS as PAGE

_MODELS = [("qwen3-4b", 32, 8, 128, 1), ("llama-1b", 32, 8, 64, 0)]  # heads, kv heads, head_dim, QK_NORM
_WORK = [(1, 128), (1, 2048), (1, 8192), (8, 512), (32, 512), (128, 512)]  # batch, context
_LAYERS_BYTES = 600 << 20  # layers in turn hold as much, so that none comes from L2
_PATTERNS = 1 << 22


def bench(gpu: Any) -> list[dict[str, Any]]:
    """One row per model, batch and context; tests/gpu/test_attention_decode.py checks the results."""
    return [_row(gpu, *model, *work) for model in _MODELS for work in _WORK]


def _row(
    gpu: Any, name: str, num_heads: int, num_kv_heads: int, head_dim: int, norm: int, batch: int, context: int
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    group, panels = num_heads // num_kv_heads, -(-head_dim // 64)
    pages = -(-context // PAGE)
    page_bytes = 2 * num_kv_heads * panels * PAGE * 128
    layer_bytes = batch * pages * page_bytes
    layers = max(2, -(-_LAYERS_BYTES // layer_bytes))
    noise = (rng.standard_normal(_PATTERNS).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    cache = gpu.array(np.resize(noise, layers * layer_bytes // 2))
    table = gpu.array(rng.permutation(batch * pages).astype(np.int32).reshape(batch, pages))
    rows = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = gpu.array(rng.standard_normal((batch, rows)).astype(np.float32))
    weight = gpu.array(np.full(head_dim, 0x3F80, np.uint16))  # 1.0
    rope = gpu.array(rng.standard_normal((context, head_dim // 2, 2)).astype(np.float32))
    out = gpu.zeros((batch, num_heads * head_dim), np.uint16)
    build = decode_attention(head_dim, group, num_kv_heads, gpu.shared_limit + 1024, gpu.num_sms)
    kernel = gpu.compile(
        "attention_decode", "attention_decode", ELEMENT_BF16=1, **build.defines(), QK_NORM=norm, NORM_F32=0,
        HAS_SINKS=0, SINKS_F32=0, ACTIVATION_TILED=0, ACTIVATION_LANE_COLUMNS=8, EARLY_READS=1,
    )  # fmt: skip
    sums = gpu.zeros((batch, num_kv_heads, MAX_SPLITS, group, head_dim), np.float32)
    stats = gpu.zeros((batch, num_kv_heads, MAX_SPLITS, group, 2), np.float32)
    positions, slots = gpu.array(np.full(batch, context - 1, np.int32)), gpu.array(np.arange(batch, dtype=np.int32))
    arrived = gpu.zeros((batch, num_kv_heads), np.uint32)
    grid = (build.workers(context, batch), build.blocks, batch)

    def all_layers() -> None:
        for layer in range(layers):
            args = (
                qkv, np.int32(rows), weight, weight, np.float32(1e-6), np.float32(np.inf), rope, positions, slots, table,
                np.int32(pages), int(cache.data.ptr) + layer * layer_bytes, np.int32(0), 0, out, np.int32(num_heads * head_dim),
                sums, stats, np.int32(build.max_splits), np.int32(build.min_split_tokens(batch)), arrived,
            )  # fmt: skip
            gpu.launch(kernel, grid, (build.threads, 1, 1), args, shared_bytes=build.shared_bytes)

    seconds = gpu.time(all_layers) / layers
    gigabytes = batch * context * num_kv_heads * head_dim * 4 / seconds / 1e9
    return {
        "kernel": "attention_decode", "name": name, "batch": batch, "context": context, "ms": seconds * 1e3,
        "gbytes_per_s": gigabytes, "percent_nominal": 100 * gigabytes / gpu.nominal_gbytes_per_s,
    }  # fmt: skip
