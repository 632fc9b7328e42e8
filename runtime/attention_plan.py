"""Launch numbers and work lists of `attention_prefill*.cu` and `attention_decode.cu`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megalith.format.errors import UnsupportedError

from .gpu_buffers import MAX_SPLITS, PAGE_TOKENS, ROWS_TOKENS, head_pitch

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

    def most_items(self, num_tokens: int, num_sequences: int, group: int) -> int:
        """Length of the longest list that `items` gives."""
        return num_tokens * group // self.rows + num_sequences

    def grid(self, most_items: int, num_kv_heads: int, num_sms: int) -> tuple[int, int, int]:
        """Blocks: persistent ones with wgmma, else one for each item and key-value head."""
        work = most_items * num_kv_heads
        return (min(num_sms, work) if self.wgmma else work), 1, 1

    def defines(self, dtype: str, tiled: bool, lane_columns: int = 8, sinks_f32: bool = False) -> dict[str, int | str]:
        """-D options; `tiled` and `lane_columns` are of the output (activation.cuh)."""
        return {
            "ELEMENT_F16" if dtype == "F16" else "ELEMENT_BF16": 1, "HEAD_DIM": self.head_dim, "Y_TILED": int(tiled),
            "Y_LANE_COLUMNS": lane_columns, "SINKS_F32": int(sinks_f32), "PLAN_ROWS": self.rows, "PLAN_THREADS": self.threads,
            "PLAN_SHARED_BYTES": self.shared_bytes,
        }  # fmt: skip

    def items(self, sequences: NDArray[np.int32], group: int, window: int) -> NDArray[np.int32]:
        """int32 [num_items, 2] (sequence, tile of rows), the most to do first, of `sequences` int32 [n, 4]."""
        found = []
        for number, (_, _, num_tokens, context) in enumerate(sequences.tolist()):
            for first_row in range(0, num_tokens * group, self.rows):
                last_row = min(first_row + self.rows, num_tokens * group) - 1
                begin = max(0, context + first_row // group - window + 1) if window else 0
                keys, sixty_fours = context + last_row // group + 1 - begin, (last_row - first_row) // 64 + 1
                found.append((-keys * sixty_fours, number, first_row // self.rows))
        return np.array([item[1:] for item in sorted(found)], np.int32).reshape(-1, 2)

    def items_of_rows(
        self, items: NDArray[np.int32], sequences: NDArray[np.int32], group: int, rows: Sequence[int]
    ) -> NDArray[np.int32]:
        """Those of `items` that have any of these rows of the pass, in their order."""
        _, first, num_tokens, _ = sequences[items[:, 0]].T
        begin = items[:, 1] * self.rows
        end = np.minimum(begin + self.rows, num_tokens * group)
        ordered = np.sort(rows)
        before = np.searchsorted(ordered, first + begin // group)
        found: NDArray[np.int32] = items[np.searchsorted(ordered, first + (end - 1) // group, "right") > before]
        return found


SPLIT_WORKERS = (1, 2, 4, 8, 16, 32)
MIN_SPLIT_TOKENS, MIN_SPLIT_TOKENS_OF_MANY = 256, 1024
_SLICE_TOKENS = 16  # of a ring slot
_RESERVED_BYTES = 1024  # of a multiprocessor's shared memory, for each block
_BLOCKS_PER_SM = 32


@dataclass(frozen=True)
class DecodeAttention:
    """One build of `attention_decode.cu`: `group` query heads share a key-value head, each warp has a ring of its own.

    Contexts of up to `few` sequences are divided finely, so that all multiprocessors have work; those of more coarsely, as
    the rings run empty at the end of every split (docs/performance.md).
    """

    head_dim: int
    group: int
    num_kv_heads: int
    num_sms: int
    warps: int
    ring_slots: int
    few: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def max_splits(self) -> int:
        """Splits of the longest contexts: a power of two, so many that one sequence has a block on most multiprocessors."""
        return max(4, min(MAX_SPLITS, 1 << (max(1, self.num_sms // self.blocks).bit_length() - 1)))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: the rings, a slot of which holds K and V of a slice."""
        return self.warps * self.ring_slots * 2 * _SLICE_TOKENS * 2 * head_pitch(self.head_dim)

    @property
    def static_bytes(self) -> int:
        """The rest, at most: queries and new token, the warps' and the splits' statistics, barriers, a word or two."""
        rows, pitch = min(self.group, 16), head_pitch(self.head_dim)
        statistics = self.warps * 16 * 8 + rows * (4 * MAX_SPLITS + 8)
        return 2 * _SLICE_TOKENS * pitch + 4 * pitch + statistics + 8 * self.warps * (self.ring_slots + 1) + 128

    @property
    def blocks(self) -> int:
        """Of a sequence, for each worker."""
        return self.num_kv_heads * -(-self.group // 16)

    def defines(self) -> dict[str, int | str]:
        return {
            "HEAD_DIM": self.head_dim, "GROUP": self.group, "WARPS": self.warps, "RING_SLOTS": self.ring_slots,
            "MAX_SPLITS": self.max_splits,
        }  # fmt: skip

    def min_split_tokens(self, batch: int) -> int:
        """Positions of the shortest split, whole pages."""
        return MIN_SPLIT_TOKENS if batch <= self.few else MIN_SPLIT_TOKENS_OF_MANY

    def workers(self, longest: int, batch: int) -> int:
        """Blocks that share the context of a sequence: as many as the longest of a batch has splits, a power of two, but no
        more than keep the grid at 32 blocks a multiprocessor, as most are empty where one sequence is much longer than the
        others. Workers take several splits each; what a sequence gets does not depend on their number.
        """
        most = max(1, _BLOCKS_PER_SM * self.num_sms // (batch * self.blocks))
        least = self.min_split_tokens(batch)
        wanted = next(count for count in SPLIT_WORKERS if count * least >= longest or count == self.max_splits)
        return max(count for count in SPLIT_WORKERS if count <= min(wanted, most))

    def reachable_workers(self, max_seq_len: int, batch: int) -> list[int]:
        """All that `workers` gives for sequences up to this length."""
        most = self.workers(max_seq_len, batch)
        return [count for count in SPLIT_WORKERS if count <= most]


def decode_attention(
    head_dim: int, group: int, num_kv_heads: int, shared_limit: int, num_sms: int, few: int = ROWS_TOKENS
) -> DecodeAttention:
    """The build for a GPU whose multiprocessors have `shared_limit` bytes of shared memory; UnsupportedError where none fits.

    On sm_90 exactly one fits beside two products, and no two fit beside one (see `linear_shape`): shared memory and
    registers of narrow heads' eight warps and of wide heads' four are chosen for that. Elsewhere there are fewer warps
    where those do not fit.
    """
    choices = ((4, 2), (2, 3), (2, 2)) if head_dim > 64 else ((8, 2), (4, 3))
    for warps, ring_slots in choices:
        build = DecodeAttention(head_dim, group, num_kv_heads, num_sms, warps, ring_slots, few)
        if build.shared_bytes + build.static_bytes + _RESERVED_BYTES <= shared_limit:
            return build
    needed = build.shared_bytes + build.static_bytes + _RESERVED_BYTES
    raise UnsupportedError(f"head_dim {head_dim}: attention needs {needed} bytes of shared memory, this GPU has {shared_limit}")
