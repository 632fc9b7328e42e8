"""Builds and launch numbers of `gemm_wgmma.cu`, the matrix product for many tokens; the kernel asserts that they are its own.

A tile is one block's over all columns, so what a token gets depends on no other token. Where there are too few tiles for all
multiprocessors, several blocks share the columns of each and add to y one after the other, if the product adds to the residual
stream and its weights have 16 bits; else, for few tokens, the matrix is divided evenly and the sums of what shares a tile are
added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

TOKEN_TILES = tuple(range(16, 257, 16))
SPLIT_TILES = (16, 32, 64)
MAX_PARTS = 4
SHARED_LIMIT_BYTES = 227 << 10
EPILOGUE_STORE, EPILOGUE_ADD, EPILOGUE_SWIGLU, EPILOGUE_QKV = 0, 1, 2, 3
FUSED_HEAD_DIMS = (64, 128)  # of EPILOGUE_QKV

_STEP_COLUMNS = {"tile16x512": 32, "mxfp4": 128}
_STEP_BYTES = {"tile16x512": 1024, "mxfp4": 1088}
_GROUP_ROWS = 64
_GROUP_THREADS = 128
_MAX_STAGES = 32
_MIN_STAGES_OF_TWO = 6  # with fewer the ring runs empty
_MOST_TOKENS = {1: 256, 2: 256, 3: 192}  # of row groups, as registers allow
_MOST_FUSED_MXFP4_TOKENS = 224  # likewise, where MXFP4 is decoded and queries and keys are made
_BAND_BYTES = 16 << 20  # of activations that stay in the L2 cache while the weights pass
_PANEL_COLUMNS = 64
_LEAST_PART_COLUMNS = 1024
_PART_LAG_PANELS = 4  # that a part has more than the one before

# The cost of a tile in clock cycles, for choosing among tiles; fitted to every tile's times for 11 numbers of tokens and four
# matrices of a model (docs/performance.md): wgmma of 64 x N x 64 takes 2N, a panel's bytes get into shared memory, and a
# warpgroup does one panel after the other, however small.
_COPY_BYTES_PER_CYCLE = 60
_PANEL_CYCLES, _PANEL_CYCLES_PER_TOKEN, _PANEL_CYCLES_PER_GROUP = 240, 1.4, 150
_EXCHANGE_CYCLES_PER_TOKEN, _MEMORY_BYTES_PER_CYCLE = 150, 1420  # of a divided product, by all multiprocessors
_END_CYCLES_PER_VALUE = {EPILOGUE_STORE: 0.2, EPILOGUE_ADD: 0.1, EPILOGUE_SWIGLU: 0.3, EPILOGUE_QKV: 0.3}
# Likewise for choosing between parts and none, fitted to 102 times of 2560 x 9728 and 2560 x 4096 on an H200, 96 to 768 tokens,
# each a mean over 0.3 s.
_BUSY_PANEL_CYCLES, _BUSY_CYCLES_PER_PRODUCT, _BUSY_END_CYCLES, _BUSY_PART_CYCLES = 117, 1.255, 3460, 3120
_PARTS_SHARE = 0.97  # of the time without them, or less: the fit is off by some per cent
_QKV_POST_CYCLES, _QKV_POST_CYCLES_PER_TOKEN = 9000, 25


@dataclass(frozen=True)
class GemmShape:
    """One build. A block's tile is `row_groups` * 64 rows by `tile_tokens` tokens, with `split` a part of its columns."""

    layout: str
    epilogue: int
    tile_tokens: int
    row_groups: int
    split: bool = False
    head_dim: int = 0  # with EPILOGUE_QKV
    aligned: int = 32  # divides the matrix's stored columns
    parts: int = 1  # blocks that share a tile's columns, with EPILOGUE_ADD

    @property
    def threads(self) -> int:
        return _GROUP_THREADS * (self.row_groups + 1)

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return self.row_groups * _GROUP_ROWS

    @property
    def stage_panels(self) -> int:
        """Panels of 64 columns that are fetched together: a step of MXFP4, else two of small tiles."""
        few = (SHARED_LIMIT_BYTES - self._staging_bytes) // (self._slot_bytes(2) + 16) < _MIN_STAGES_OF_TWO
        return 2 if self.layout == "mxfp4" or not (few or self.aligned % (2 * _PANEL_COLUMNS)) else 1

    @property
    def slot_bytes(self) -> int:
        """A stage in shared memory."""
        return self._slot_bytes(self.stage_panels)

    def _slot_bytes(self, panels: int) -> int:
        weights = 4 * self.row_groups * panels * _PANEL_COLUMNS * _STEP_BYTES[self.layout] // _STEP_COLUMNS[self.layout]
        return -(-(panels * self.tile_tokens * 128 + weights) // 1024) * 1024

    @property
    def _staging_bytes(self) -> int:
        """Of each warpgroup all 32 columns of SwiGLU, else of each of its warps two buffers of 8 tokens of 20 floats.

        With EPILOGUE_QKV two buffers of each head, and of each token six numbers a warpgroup, or ten of two.
        """
        if self.epilogue == EPILOGUE_QKV:
            groups = self.head_dim // _GROUP_ROWS  # of a head
            buffers = 2 * 2 * (16 if self.tile_tokens % 32 else 32) * (self.head_dim + 8)
            return self.row_groups // groups * (buffers + 4 * (4 * groups + 2) * self.tile_tokens)
        return self.row_groups * (2 * 32 * self.tile_tokens if self.epilogue == EPILOGUE_SWIGLU else 4 * 2 * 8 * 20 * 4)

    @property
    def stages(self) -> int:
        """As many as fit."""
        return min(_MAX_STAGES, (SHARED_LIMIT_BYTES - self._staging_bytes) // (self.slot_bytes + 16))

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: ring, staging of the results, two barriers a slot."""
        return self.stages * (self.slot_bytes + 16) + self._staging_bytes

    def defines(self) -> dict[str, int | str]:
        """What follows from the shape; element types, Y_LANE_COLUMNS, BIAS_F32 and Y_SCALAR are the caller's."""
        heads: dict[str, int | str] = {"STAGED_BYTES": self._staging_bytes} if self.epilogue == EPILOGUE_QKV else {}
        return heads | {
            "CODEC_MXFP4": int(self.layout == "mxfp4"),
            "EPILOGUE": self.epilogue,
            "TILE_TOKENS": self.tile_tokens,
            "ROW_GROUPS": self.row_groups,
            "STAGE_PANELS": self.stage_panels,
            "STAGES": self.stages,
            "WHOLE_STAGES": int(self.layout == "mxfp4" or self.aligned % (self.stage_panels * _PANEL_COLUMNS) == 0),
            "SPLIT": int(self.split),
            "PARTS": self.parts,
            "PLAN_SHARED_BYTES": self.shared_bytes,
            "PLAN_THREADS": self.threads,
        }

    def partials_bytes(self, num_sms: int) -> int:
        """Workspace for the sums of tiles that blocks share."""
        return num_sms * self.rows * self.tile_tokens * 4 if self.split else 0

    def flags(self, num_sms: int) -> int:
        """Number of uint32 flags, zero before the first launch."""
        if self.parts > 1:
            return num_sms // self.parts * self.row_groups
        return num_sms * self.row_groups if self.split else 0

    def token_band(self, columns: int, num_tokens: int) -> int:
        """Token tiles that are gone through together, so that their activations stay in the L2 cache."""
        tiles = -(-num_tokens // self.tile_tokens)
        most = max(1, _BAND_BYTES // (2 * columns * self.tile_tokens))
        return -(-tiles // -(-tiles // most))

    def rounds(self, rows: int, num_tokens: int, num_sms: int) -> int:
        """Tiles of the block that has most."""
        return -(-self.tiles(rows, num_tokens) * self.parts // num_sms)

    def tiles(self, rows: int, num_tokens: int) -> int:
        return -(-rows // self.rows) * -(-num_tokens // self.tile_tokens)


@cache
def gemm_shape(
    layout: str, epilogue: int, rows: int, columns: int, num_tokens: int, num_sms: int, invariant: bool = False
) -> GemmShape:
    """The build for a product of `rows` x `columns` stored weights with `num_tokens` tokens: the one that ends first.

    `invariant`: what a token gets does not depend on their number.
    """
    shapes = _whole_shapes(layout, epilogue, columns, num_tokens)
    in_parts: list[GemmShape] = []
    if not invariant:
        aligned = _alignment(columns)
        if epilogue == EPILOGUE_ADD and layout == "tile16x512":
            in_parts = [
                replace(shape, parts=parts)
                for shape, parts in product(shapes, range(2, MAX_PARTS + 1))
                if parts * shape.tiles(rows, num_tokens) <= num_sms and columns >= parts * _LEAST_PART_COLUMNS
            ]
        shapes += [GemmShape(layout, epilogue, tile, 1, True, aligned=aligned) for tile in SPLIT_TILES if tile >= num_tokens]
    best = min(shapes, key=lambda shape: _cycles(shape, rows, columns, num_tokens, num_sms))
    if not in_parts:
        return best
    cycles = {shape: _busy_cycles(shape, rows, columns, num_tokens, num_sms) for shape in (best, *in_parts)}
    fastest = min(in_parts, key=lambda shape: (cycles[shape], shape.row_groups))
    # what is divided evenly is not in the fit; of 16 to 64 tokens parts were always faster
    return fastest if best.split or cycles[fastest] < _PARTS_SHARE * cycles[best] else best


@cache
def qkv_shape(
    layout: str, rows: int, columns: int, num_tokens: int, num_sms: int, head_dim: int, invariant: bool = False
) -> GemmShape | None:
    """The build for a fused projection that goes on to queries and cache; None where a kernel for that alone ends earlier."""
    if head_dim not in FUSED_HEAD_DIMS:
        return None
    shapes = _whole_shapes(layout, EPILOGUE_QKV, columns, num_tokens, head_dim)
    fused = min(shapes, key=lambda shape: _cycles(shape, rows, columns, num_tokens, num_sms))
    if invariant:
        return fused
    apart = gemm_shape(layout, EPILOGUE_STORE, rows, columns, num_tokens, num_sms)
    following = _QKV_POST_CYCLES + _QKV_POST_CYCLES_PER_TOKEN * num_tokens
    both = _cycles(apart, rows, columns, num_tokens, num_sms) + following
    return fused if _cycles(fused, rows, columns, num_tokens, num_sms) <= both else None


def _whole_shapes(layout: str, epilogue: int, columns: int, num_tokens: int, head_dim: int = 0) -> list[GemmShape]:
    most = _MOST_FUSED_MXFP4_TOKENS if head_dim and layout == "mxfp4" else max(TOKEN_TILES)
    return [
        GemmShape(layout, epilogue, tile, groups, head_dim=head_dim, aligned=_alignment(columns))
        for groups, tile in product((2, 3, 1), reversed(TOKEN_TILES))
        if tile <= min(_MOST_TOKENS[groups], most)
        and (tile >= 64 or tile >= num_tokens)  # several narrow ones take longer
        and not groups * _GROUP_ROWS % max(head_dim, 1)
    ]


def _alignment(columns: int) -> int:
    return math.gcd(columns, 2 * _PANEL_COLUMNS)


def _cycles(shape: GemmShape, rows: int, columns: int, num_tokens: int, num_sms: int) -> float:
    """Of the block that has most to do, by a simple model."""
    groups, tokens = shape.row_groups, shape.tile_tokens
    row_bytes = _PANEL_COLUMNS * _STEP_BYTES[shape.layout] // (16 * _STEP_COLUMNS[shape.layout])  # of a panel
    panels = -(-columns // _PANEL_COLUMNS)
    if shape.split:
        return panels * rows * row_bytes / _MEMORY_BYTES_PER_CYCLE + _EXCHANGE_CYCLES_PER_TOKEN * tokens
    multiply = groups * 2 * tokens
    fetch = (tokens * 2 * _PANEL_COLUMNS + shape.rows * row_bytes) / _COPY_BYTES_PER_CYCLE
    steps = _PANEL_CYCLES + _PANEL_CYCLES_PER_TOKEN * tokens + _PANEL_CYCLES_PER_GROUP * groups
    end = _END_CYCLES_PER_VALUE[shape.epilogue] * shape.rows * tokens
    return shape.rounds(rows, num_tokens, num_sms) * (panels * max(multiply, fetch, steps) + end)


def _busy_cycles(shape: GemmShape, rows: int, columns: int, num_tokens: int, num_sms: int) -> float:
    """The same of a card that is kept busy, which power and the L2 cache limit, for tiles with and without parts."""
    panels = -(-columns // _PANEL_COLUMNS) / shape.parts + _PART_LAG_PANELS * (shape.parts - 1) / 2
    panel = _BUSY_PANEL_CYCLES + _BUSY_CYCLES_PER_PRODUCT * shape.row_groups * 2 * shape.tile_tokens
    ends = _BUSY_END_CYCLES + _BUSY_PART_CYCLES * (shape.parts - 1)
    return shape.rounds(rows, num_tokens, num_sms) * (panels * panel + ends)
