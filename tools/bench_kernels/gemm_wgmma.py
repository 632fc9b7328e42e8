"""`gemm_wgmma.cu` on the real models' matrices: TFLOP/s, weight bytes over nominal bandwidth, and cuBLAS beside it."""

from __future__ import annotations

from typing import Any

import numpy as np

from megalith.runtime.gemm_plan import GemmShape, gemm_shape

SHAPES = [
    ("qwen3-4b gate_up", 19456, 2560, 2), ("qwen3-4b down", 2560, 9728, 1), ("qwen3-4b qkv", 6144, 2560, 0),
    ("qwen3-4b o", 2560, 4096, 1), ("llama-1b gate_up", 16384, 2048, 2), ("llama-1b down", 2048, 8192, 1),
    ("llama-1b qkv", 3072, 2048, 0), ("llama-1b o", 2048, 2048, 1),
]  # fmt: skip
TOKENS = (32, 64, 128, 256, 512, 2048, 8192)
_COPIES_BYTES = 600 << 20  # a product's matrix is one of several copies in turn, so that none comes from L2
_CHECKED_ROWS = 64


def bench(gpu: Any) -> list[dict[str, Any]]:
    """One row per matrix and number of tokens."""
    rows = []
    for name, out_features, in_features, epilogue in SHAPES:
        for tokens in TOKENS:
            shape = gemm_shape("tile16x512", epilogue, out_features, in_features, tokens, gpu.num_sms)
            rows.append(row(gpu, name, out_features, in_features, tokens, shape))
    return rows


def tiles(gpu: Any, out_features: int, in_features: int, epilogue: int, tokens: int) -> list[dict[str, Any]]:
    """Every tile without split for one product, the fastest first: what the plan's model is compared with."""
    rows = []
    for groups in (1, 2, 3):
        for tile in (64, 96, 128, 160, 192, 224, 256):
            if groups < 3 or tile <= 160:
                shape = GemmShape("tile16x512", epilogue, tile, groups)
                rows.append(row(gpu, "tiles", out_features, in_features, tokens, shape))
    return sorted(rows, key=lambda found: float(found["ms"]))


def row(gpu: Any, name: str, out_features: int, in_features: int, tokens: int, shape: GemmShape) -> dict[str, Any]:
    """Checked, then timed."""
    rng = np.random.default_rng(0)
    nbytes = out_features * in_features * 2
    copies = max(1, -(-_COPIES_BYTES // nbytes))
    pattern = (rng.integers(0, 1 << 16, 1 << 22, dtype=np.uint16) & 0x807F | 0x3C00).view(np.uint8)  # +-2^-7 to 2^-6
    weights = gpu.cupy.resize(gpu.array(pattern), copies * nbytes)
    tokens_padded = -(-tokens // 8) * 8
    x = gpu.array((rng.standard_normal(tokens_padded * in_features, np.float32).view(np.uint32) >> 16).astype(np.uint16))
    swiglu = shape.epilogue == 2
    columns = -(-out_features // 128) * 64 if swiglu else out_features
    y = gpu.zeros((tokens_padded * columns,), np.uint16 if swiglu else np.float32)
    kernel = gpu.compile(
        "gemm_wgmma", "gemm_wgmma", **shape.defines(), ELEMENT_BF16=1, Y_LANE_COLUMNS=8, BIAS_F32=0, Y_SCALAR=0
    )
    partials = gpu.zeros((shape.partials_bytes(gpu.num_sms),), np.uint8)
    flags = gpu.zeros((shape.flags(gpu.num_sms),), np.uint32)

    def multiply(copy: int) -> None:
        args = (
            int(weights.data.ptr) + copy * nbytes, np.int32(out_features // 16), np.int32(in_features // 32), x,
            np.int32(tokens_padded), np.int32(tokens), y, np.int32(tokens_padded if swiglu else columns), np.int32(columns), 0,
            np.float32(0), np.int32(shape.token_band(in_features, tokens)), partials, flags,
        )  # fmt: skip
        gpu.launch(kernel, (gpu.num_sms, 1, 1), (shape.threads, 1, 1), args, shared_bytes=shape.shared_bytes)

    def all_copies() -> None:
        for copy in range(copies):
            multiply(copy)

    multiply(0)
    check(gpu, weights[:nbytes], x, y, out_features, in_features, tokens, swiglu)
    seconds = gpu.time(all_copies) / copies
    flops, gigabytes = 2 * out_features * in_features * tokens, nbytes / seconds / 1e9
    reference = cublas_seconds(gpu, out_features, in_features, tokens)
    return {
        "kernel": "gemm_wgmma", "name": name, "tokens": tokens, "ms": seconds * 1e3, "tflops": flops / seconds / 1e12,
        "cublas_tflops": flops / reference / 1e12, "percent_cublas": 100 * reference / seconds, "gbytes_per_s": gigabytes,
        "percent_nominal": 100 * gigabytes / gpu.nominal_gbytes_per_s,
        "tile": f"{shape.row_groups * 64}x{shape.tile_tokens}",
    }  # fmt: skip


def check(gpu: Any, weights: Any, x: Any, y: Any, rows: int, columns: int, tokens: int, swiglu: bool) -> None:
    """The last rows of all tokens against float32 products of the same elements, after one call into zeros."""
    cupy = gpu.cupy
    fragments = weights.view(np.uint16).reshape(rows // 16, columns // 32, 16, 32)[-_CHECKED_ROWS // 16 :]
    w = as_float(cupy, fragments.transpose(0, 2, 1, 3).reshape(_CHECKED_ROWS, columns))
    expected = untiled(cupy, x.reshape(columns // 64, -1, 64))[:tokens] @ w.T
    if swiglu:
        pairs = expected.reshape(tokens, -1, 2, 8)
        gate, up = (pairs[:, :, i].reshape(tokens, -1) for i in range(2))
        expected = gate / (1 + cupy.exp(-gate)) * up
        found = untiled(cupy, y.reshape(rows // 128, -1, 64))[:tokens, rows // 2 - expected.shape[1] : rows // 2]
    else:
        found = y.reshape(-1, rows)[:tokens, -_CHECKED_ROWS:]
    error = float(cupy.linalg.norm(found - expected) / cupy.linalg.norm(expected))
    if not error < (4e-3 if swiglu else 1e-4):
        raise SystemExit(f"gemm_wgmma {rows} x {columns}, {tokens} tokens: relative error {error}")


def as_float(cupy: Any, bits: Any) -> Any:
    """float32 of BF16 patterns."""
    return (bits.astype(cupy.uint32) << 16).view(cupy.float32)


def untiled(cupy: Any, bits: Any) -> Any:
    """float32 [tokens, columns] of the tiled layout [columns/64, tokens, 64]."""
    panels, tokens = bits.shape[:2]
    column = np.arange(panels * 64)
    t, r = column % 32 // 8, column % 8
    position = column - column % 32 + 16 * (r // 4) + 8 * (r // 2 % 2) + 2 * t + r % 2
    token = cupy.arange(tokens)[:, None]
    panel, chunk, within = (cupy.asarray(v)[None, :] for v in (position // 64, position % 64 // 8, position % 8))
    return as_float(cupy, bits[panel, token, (chunk ^ token % 8) * 8 + within])


def cublas_seconds(gpu: Any, rows: int, columns: int, tokens: int) -> float:
    """float16 with FP32 accumulation, the same work; cuBLAS refuses CuPy's stream capture."""
    cupy = gpu.cupy
    x, w = (
        cupy.random.standard_normal(shape, dtype=np.float32).astype(np.float16)
        for shape in ((tokens, columns), (rows, columns))
    )
    y = cupy.empty((tokens, rows), np.float16)
    calls = max(1, int(2e-3 / (2 * rows * columns * tokens / 6e14 + 1e-5)))

    def several() -> None:
        for _ in range(calls):
            cupy.matmul(x, w.T, out=y)

    return float(gpu.time(several, graph=False)) / calls
