"""Row orders: where a tensor's logical rows lie among the stored rows of its blob (specs/format.md, "Row orders")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .constants import ROW_ORDERS, TILE_ROWS

ROW_ORDER_CODES = {name: code for code, name in ROW_ORDERS.items()}
HALF = TILE_ROWS // 2


@dataclass(frozen=True)
class RowMap:
    """One tensor's place in a blob: its rows start at stored row `base`, a multiple of 16.

    `param` is the slot (0 or 1) for "pair8", the head_dim for "rope", 0 for "sequential".
    """

    order: str = "sequential"
    base: int = 0
    param: int = 0

    @property
    def rows_per_block(self) -> int:
        """Logical rows of this tensor in a 16-row block: 8 where two tensors share it."""
        return HALF if self.order == "pair8" else TILE_ROWS

    def stored_span(self, num_rows: int) -> int:
        """Number of stored rows, a multiple of 16, that `num_rows` logical rows reach over."""
        return -(-num_rows // self.rows_per_block) * TILE_ROWS

    def stored_rows(self, num_rows: int) -> NDArray[np.int64]:
        """Stored row of each logical row, int64 [num_rows]."""
        row = np.arange(num_rows, dtype=np.int64)
        if self.order == "pair8":
            row = row // HALF * TILE_ROWS + self.param * HALF + row % HALF
        elif self.order == "rope":
            head, i = np.divmod(row, self.param)
            half, i = np.divmod(i, self.param // 2)
            row = head * self.param + i // HALF * TILE_ROWS + half * HALF + i % HALF
        return row + self.base


def rope_order_applies(head_dim: int) -> bool:
    """Whether rows i and i + head_dim/2 of a head can share a 16-row block."""
    return head_dim % TILE_ROWS == 0
