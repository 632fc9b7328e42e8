"""`linear.cu` on the real models' matrices: time a product, and weight bytes over nominal bandwidth."""

from __future__ import annotations

from typing import Any

import numpy as np

from megalith.runtime.linear_plan import THREADS, LinearShape, linear_shape

MODELS = {  # layers, (matrix, rows, columns) of a layer, head
    "qwen3-4b": (
        36,
        [("qkv", 6144, 2560), ("o", 2560, 4096), ("gate_up", 19456, 2560), ("down", 2560, 9728)],
        ("head", 151936, 2560),
    ),
    "llama-3.2-1b": (
        16,
        [("qkv", 3072, 2048), ("o", 2048, 2048), ("gate_up", 16384, 2048), ("down", 2048, 8192)],
        ("head", 128256, 2048),
    ),
}
_COPIES_BYTES = 600 << 20  # a product's matrix is one of several copies in turn, so that none comes from L2
_PATTERN_ELEMENTS = 1 << 22


class _Products:
    """Products of random weights on a device."""

    def __init__(self, gpu: Any, tokens: int, most_columns: int, most_rows: int) -> None:
        self._gpu, self.tokens = gpu, tokens
        self.shape: LinearShape = linear_shape("tile16x512", tokens, 227 << 10)
        rng = np.random.default_rng(0)
        values = rng.standard_normal((tokens, most_columns)).astype(np.float32)
        self._x = gpu.array((values.view(np.uint32) >> 16).astype(np.uint16))
        self._y = gpu.zeros((tokens, most_rows), np.float32)
        self._pitch, self._rows = most_columns, most_rows
        self._kernel = gpu.compile(
            "linear", "linear", ELEMENT_BF16=1, EPILOGUE=0, TOKEN_TILES=self.shape.token_tiles,
            RING_CHUNKS=self.shape.ring_chunks, Y_TILED=0, Y_LANE_COLUMNS=8,
        )  # fmt: skip
        self._grid = self.shape.grid(gpu.num_sms, tokens)
        self._partials = gpu.zeros((self.shape.partials_bytes(gpu.num_sms, tokens),), np.uint8)
        self._flags = gpu.zeros((gpu.num_sms * self._grid[1],), np.uint32)

    def __call__(self, weights: int, rows: int, columns: int) -> None:
        args = (
            weights, np.uint32(rows // 16), np.int32(columns // 32), self._x, np.int32(self._pitch), np.int32(self.tokens),
            self._y, np.int32(self._rows), np.int32(rows), 0, np.float32(0), self._partials, self._flags,
        )  # fmt: skip
        self._gpu.launch(self._kernel, self._grid, (THREADS, 1, 1), args, shared_bytes=self.shape.shared_bytes)


def _random_weights(gpu: Any, nbytes: int) -> Any:
    rng = np.random.default_rng(0)
    pattern = rng.integers(0, 1 << 16, _PATTERN_ELEMENTS, dtype=np.uint16) & 0x8FFF | 0x3000  # finite, at most 2
    return gpu.cupy.tile(gpu.array(pattern), -(-nbytes // pattern.nbytes)).view(np.uint8)


def bench(gpu: Any) -> list[dict[str, Any]]:
    """One row per matrix and number of tokens, then all products of a decode step in one graph."""
    rows = []
    for tokens in (1, 8, 16):
        for model, (layers, matrices, head) in MODELS.items():
            product = _Products(gpu, tokens, max(m[2] for m in matrices), head[1])
            for name, out_features, in_features in [*matrices, head]:
                nbytes = out_features * in_features * 2
                copies = max(1, -(-_COPIES_BYTES // nbytes))
                weights = _random_weights(gpu, copies * nbytes)
                places = [(int(weights.data.ptr) + copy * nbytes, out_features, in_features) for copy in range(copies)]
                rows.append(_row(gpu, f"{model} {name}", product, places, copies, copies * nbytes))
            places, nbytes = [], 0
            for _, out_features, in_features in [*matrices * layers, head]:
                places.append((nbytes, out_features, in_features))
                nbytes += out_features * in_features * 2
            weights = _random_weights(gpu, nbytes)
            places = [(int(weights.data.ptr) + offset, r, c) for offset, r, c in places]
            rows.append(_row(gpu, f"{model} all products of a step", product, places, 1, nbytes))
            del weights
            gpu.cupy.get_default_memory_pool().free_all_blocks()
    return rows


def _row(
    gpu: Any, name: str, product: _Products, places: list[tuple[int, int, int]], count: int, nbytes: int
) -> dict[str, Any]:
    def all_products() -> None:
        for weights, rows, columns in places:
            product(weights, rows, columns)

    seconds = gpu.time(all_products)
    gigabytes = nbytes / seconds / 1e9
    return {
        "kernel": "linear", "name": name, "tokens": product.tokens, "ms": seconds * 1e3 / count, "gbytes_per_s": gigabytes,
        "percent_nominal": 100 * gigabytes / gpu.nominal_gbytes_per_s,
    }  # fmt: skip
