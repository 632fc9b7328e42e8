"""Launch numbers and work lists of `attention_prefill*.cu`; the kernels assert that the numbers are theirs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .gpu_buffers import PAGE_TOKENS

WGMMA_HEAD_DIMS = (64, 128)
_PAGE_PANEL_BYTES = PAGE_TOKENS * 128


@dataclass(frozen=True)
class PrefillAttention:
    """One build: `wgmma` for sm_90a and head_dim 64 or 128, else mma.sync. The kernels assert that the numbers are theirs."""

    head_dim: int
    wgmma: bool

    def __post_init__(self) -> None:
        if self.wgmma and self.head_dim not in WGMMA_HEAD_DIMS:
            raise ValueError(f"head_dim {self.head_dim}: attention_prefill_wgmma is for {WGMMA_HEAD_DIMS}")

    @property
    def name(self) -> str:
        """Of the file and of its kernel."""
        return "attention_prefill_wgmma" if self.wgmma else "attention_prefill"

    @property
    def panels(self) -> int:
        return -(-self.head_dim // 64)

    @property
    def rows(self) -> int:
        """Rows, (token, query head) pairs, of a work item and key-value head."""
        if not self.wgmma:
            return 64
        return 128 if self.head_dim == 128 else 192

    @property
    def threads(self) -> int:
        return 128 + 2 * self.rows if self.wgmma else 128

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        if not self.wgmma:
            return 3 * self.panels * _PAGE_PANEL_BYTES
        stages = 2 if self.head_dim == 128 else 4
        queries, tile = self.panels * self.rows * 128, 2 * self.panels * _PAGE_PANEL_BYTES
        barriers, tiles = 8 * (4 + 4 * stages), 2 * 32
        return 1024 + 2 * queries + 2 * stages * tile + barriers + tiles

    def grid(self, num_items: int, num_kv_heads: int, num_sms: int) -> tuple[int, int, int]:
        """Blocks: persistent ones with wgmma, else one for each item and key-value head."""
        work = num_items * num_kv_heads
        return (min(num_sms, work) if self.wgmma else work), 1, 1

    def defines(self, dtype: str, tiled: bool, lane_columns: int = 8, sinks_f32: bool = False) -> dict[str, int | str]:
        """-D options; `tiled` and `lane_columns` are of the output (activation.cuh)."""
        return {
            "ELEMENT_F16" if dtype == "F16" else "ELEMENT_BF16": 1, "HEAD_DIM": self.head_dim, "Y_TILED": int(tiled),
            "Y_LANE_COLUMNS": lane_columns, "SINKS_F32": int(sinks_f32), "PLAN_ROWS": self.rows, "PLAN_THREADS": self.threads,
            "PLAN_SHARED_BYTES": self.shared_bytes,
        }  # fmt: skip

    def items(self, sequences: NDArray[np.int32], group: int, window: int) -> NDArray[np.int32]:
        """int32 [num_items, 2] (sequence, tile of rows), longest first, of `sequences` int32 [n, 4]."""
        found = []
        for number, (_, _, num_tokens, context) in enumerate(sequences.tolist()):
            for first_row in range(0, num_tokens * group, self.rows):
                last_row = min(first_row + self.rows, num_tokens * group) - 1
                begin = max(0, context + first_row // group - window + 1) if window else 0
                found.append((begin - (context + last_row // group + 1), number, first_row // self.rows))
        return np.array([item[1:] for item in sorted(found)], np.int32).reshape(-1, 2)
