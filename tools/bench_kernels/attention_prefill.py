"""`attention_prefill*.cu` on the real models' shapes."""

from __future__ import annotations

from typing import Any

import numpy as np

from megalith.runtime.attention_plan import PrefillAttention
from megalith.runtime.gpu_buffers import PAGE_TOKENS as PAGE

_MODELS = [("qwen3-4b", 32, 8, 128), ("llama-1b", 32, 8, 64)]
_NOMINAL_TFLOPS = 989.4  # BF16, dense, H100 SXM and H200


def _row(gpu: Any, build: PrefillAttention, name: str, num_heads: int, num_kv_heads: int, num_tokens: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    group, width, num_pages = num_heads // num_kv_heads, build.panels * 64, -(-num_tokens // PAGE)
    bits = rng.standard_normal(1 << 22).astype(np.float32).view(np.uint32) >> 16
    noise = bits.astype(np.uint16)
    q = gpu.array(np.resize(noise, (num_tokens, num_heads, width)))
    kv = gpu.array(np.resize(noise, (num_pages, 2, num_kv_heads, build.panels, PAGE, 64)))
    sequences = np.array([[0, 0, num_tokens, 0]], np.int32)
    items = build.items(sequences, group, 0)
    y = gpu.zeros((num_heads * build.head_dim // 64, num_tokens, 64), np.uint16)
    kernel = gpu.compile(build.name, build.name, **build.defines("BF16", tiled=True))
    args = (
        q, kv, gpu.array(rng.permutation(num_pages).astype(np.int32)), np.int32(num_pages), gpu.array(sequences),
        gpu.array(items), gpu.array(np.array([len(items)], np.int32)), np.int32(num_kv_heads),
        np.int32(group), np.int32(0), np.float32(build.head_dim**-0.5), 0, y,
        np.int32(num_tokens),
    )  # fmt: skip
    grid = build.grid(len(items), num_kv_heads, gpu.num_sms)

    def launch() -> None:
        gpu.launch(kernel, grid, (build.threads, 1, 1), args, shared_bytes=build.shared_bytes)

    seconds = gpu.time(launch)
    tflops = 4 * num_tokens**2 / 2 * build.head_dim * num_heads / seconds / 1e12
    return {
        "kernel": build.name, "name": name, "tokens": num_tokens, "ms": seconds * 1e3, "tflops": tflops,
        "percent_nominal": 100 * tflops / _NOMINAL_TFLOPS,
    }  # fmt: skip


def bench(gpu: Any) -> list[dict[str, Any]]:
    """One row per model, build and number of tokens of one sequence; tests/gpu/test_attention_prefill.py checks the results."""
    rows = []
    for name, num_heads, num_kv_heads, head_dim in _MODELS:
        for num_tokens in (512, 2048, 8192, 32768) if gpu.arch == "sm_90a" else ():
            rows.append(_row(gpu, PrefillAttention(head_dim, True), name, num_heads, num_kv_heads, num_tokens))
        rows.append(_row(gpu, PrefillAttention(head_dim, False), name, num_heads, num_kv_heads, 2048))
    return rows
