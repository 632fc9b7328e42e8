"""Builds and launch numbers of `gemm_wgmma.cu`, the matrix product for many tokens; the kernel asserts that they are its own.

Two ways to divide a product. For few tokens it streams weights: every cluster of blocks gets an equal range of the matrix, and
ranges that share a tile are added in order, so what a token gets depends on the matrix and the number of blocks, not on the
other tokens. For more, a tile is one cluster's over all columns; where tiles do not fill the last round of the clusters, those
of that round may be divided in the same way, which makes the order of additions depend on the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

TOKEN_TILES = (16, 32, 64, 96, 128, 160, 192, 224, 256)
SPLIT_TOKENS = 256  # that `split_shape` takes, for all of whose numbers a token gets the same
STREAMED_TOKENS = 128  # that are its work where nobody asks for that
SHARED_LIMIT_BYTES = 227 << 10
EPILOGUE_STORE, EPILOGUE_ADD, EPILOGUE_SWIGLU = 0, 1, 2

_STEP_COLUMNS = {"tile16x512": 32, "mxfp4": 128}
_STEP_BYTES = {"tile16x512": 1024, "mxfp4": 1088}
_GROUP_ROWS = 64
_GROUP_THREADS = 128
_MAX_STAGES = 8
_MAX_TOKENS_OF_3_GROUPS = 128  # what their registers hold
_BAND_BYTES = 16 << 20  # of activations that stay in the L2 cache while the weights pass

# The cost of a tile in clock cycles, for choosing among tiles: wgmma of 64 x N x 64 takes 2N and some to start; what a
# multiprocessor gets from the L2 cache; stores; the start and end of a tile.
_START_CYCLES = 48
_L2_BYTES_PER_CYCLE = 36
_EPILOGUE_CYCLES_PER_VALUE = {EPILOGUE_STORE: 0.10, EPILOGUE_ADD: 0.15, EPILOGUE_SWIGLU: 0.12}
_TILE_CYCLES = 1500
_DIVIDED_COST = 1.1  # beside whole rounds: the other way leaves multiprocessors idle, and the rest a higher clock
_EXCHANGE_CYCLES = 1500  # of one cluster's partial sums, left or added, beside their bytes


@dataclass(frozen=True)
class GemmShape:
    """One build. A block's tile is `row_groups` * 64 rows by `tile_tokens` tokens, its stages `stage_panels` * 64 columns."""

    layout: str
    epilogue: int
    tile_tokens: int
    row_groups: int
    stage_panels: int
    cluster: int
    split: bool
    has_whole: bool = False  # split: only what does not fill a round of whole tiles

    @property
    def threads(self) -> int:
        return _GROUP_THREADS * (self.row_groups + 1)

    @property
    def cluster_rows(self) -> int:
        """Rows of a cluster's tile."""
        return self.cluster * self.row_groups * _GROUP_ROWS

    @property
    def slot_bytes(self) -> int:
        """A stage in shared memory."""
        steps = 64 * self.stage_panels // _STEP_COLUMNS[self.layout]
        weights = 4 * self.row_groups * steps * _STEP_BYTES[self.layout]
        return -(-(self.stage_panels * self.tile_tokens * 128 + weights) // 1024) * 1024

    @property
    def _staging_bytes(self) -> int:
        pitch = 20 if self.epilogue == EPILOGUE_SWIGLU else 68
        return self.row_groups * 2 * min(32, self.tile_tokens) * pitch * 4

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
        return {
            "CODEC_MXFP4": int(self.layout == "mxfp4"),
            "EPILOGUE": self.epilogue,
            "TILE_TOKENS": self.tile_tokens,
            "ROW_GROUPS": self.row_groups,
            "STAGE_PANELS": self.stage_panels,
            "STAGES": self.stages,
            "CLUSTER": self.cluster,
            "SPLIT": self.split + self.has_whole,
            "PLAN_SHARED_BYTES": self.shared_bytes,
            "PLAN_THREADS": self.threads,
        }

    def blocks(self, num_sms: int) -> int:
        """Grid size: whole clusters, all resident at once."""
        return num_sms // self.cluster * self.cluster

    def partials_bytes(self, num_sms: int) -> int:
        """Workspace for the sums of tiles that clusters share."""
        return self.blocks(num_sms) * self.row_groups * _GROUP_ROWS * self.tile_tokens * 4 if self.split else 0

    def flags(self, num_sms: int) -> int:
        """Number of uint32 flags, zero before the first launch."""
        return self.blocks(num_sms) * self.row_groups if self.split else 0

    def token_band(self, columns: int, num_tokens: int) -> int:
        """Token tiles that are gone through together, so that their activations stay in the L2 cache."""
        tiles = -(-num_tokens // self.tile_tokens)
        most = max(1, _BAND_BYTES // (2 * columns * self.tile_tokens))
        return -(-tiles // -(-tiles // most))

    def rounds(self, rows: int, num_tokens: int, num_sms: int) -> tuple[int, int]:
        """Whole tiles of each cluster, and tiles that are left, which some have or, with split, all divide."""
        tiles = -(-rows // self.cluster_rows) * -(-num_tokens // self.tile_tokens)
        return divmod(tiles, num_sms // self.cluster)


@cache
def gemm_shape(
    layout: str, epilogue: int, rows: int, columns: int, num_tokens: int, num_sms: int, invariant: bool = False
) -> GemmShape:
    """The build for a product of `rows` x `columns` stored weights with `num_tokens` tokens.

    `invariant`: what a token gets does not depend on their number; at most SPLIT_TOKENS.
    """
    if num_tokens <= STREAMED_TOKENS or invariant:
        return split_shape(layout, epilogue, rows, num_tokens, num_sms)
    return whole_shape(layout, epilogue, rows, columns, num_tokens, num_sms)


def split_shape(layout: str, epilogue: int, rows: int, num_tokens: int, num_sms: int) -> GemmShape:
    """For few tokens. All but `tile_tokens`, and with it the order of additions, is the same for any number of tokens.

    Two warpgroups a block halve what is read of the activations, one leaves half the partial sums to add: the latter for
    matrices whose tiles are shared by several clusters.
    """
    if not 1 <= num_tokens <= SPLIT_TOKENS:
        raise ValueError(f"{num_tokens} tokens: a split product takes 1 to {SPLIT_TOKENS}")
    tile_tokens = next(tile for tile in TOKEN_TILES if tile >= num_tokens)
    groups = 2 if 2 * rows >= num_sms * 2 * _GROUP_ROWS else 1
    return GemmShape(layout, epilogue, tile_tokens, groups, stage_panels=2, cluster=1, split=True)


def whole_shape(layout: str, epilogue: int, rows: int, columns: int, num_tokens: int, num_sms: int) -> GemmShape:
    """For many tokens: the tile that ends first, by a simple model, last round divided or not; of equals the largest."""
    panels = 2 if layout == "mxfp4" else 1
    shapes = [
        GemmShape(layout, epilogue, tile, groups, panels, 1, split, split and tile < num_tokens)
        for split, groups, tile in product((False, True), (2, 3, 1), reversed(TOKEN_TILES))
        if groups < 3 or (tile <= _MAX_TOKENS_OF_3_GROUPS and not split)
    ]
    return min(shapes, key=lambda shape: _cycles(shape, rows, columns, num_tokens, num_sms))


def _cycles(shape: GemmShape, rows: int, columns: int, num_tokens: int, num_sms: int) -> float:
    """Of the busiest cluster."""
    clusters = num_sms // shape.cluster
    rounds, left = shape.rounds(rows, num_tokens, num_sms)
    if shape.split and not shape.has_whole:  # all tiles are divided
        rounds, left = 0, rounds * clusters + left
    values = shape.row_groups * _GROUP_ROWS * shape.tile_tokens
    weights = shape.row_groups * _GROUP_ROWS * 64 * _STEP_BYTES[shape.layout] // (16 * _STEP_COLUMNS[shape.layout])
    fetch = (weights + shape.tile_tokens * 128 / shape.cluster) / _L2_BYTES_PER_CYCLE
    multiply = shape.row_groups * (2 * shape.tile_tokens + _START_CYCLES)
    stages, stage = -(-columns // 64), max(fetch, multiply)
    ends = _EPILOGUE_CYCLES_PER_VALUE[shape.epilogue] * values + _TILE_CYCLES
    tile = stages * stage + ends
    if not left:
        return rounds * tile
    if not shape.split:
        return (rounds + 1) * tile
    partials = -(-clusters // left) + (left > clusters)  # that a cluster leaves and adds
    exchange = partials * (_EXCHANGE_CYCLES + 4 * values / _L2_BYTES_PER_CYCLE)
    divided = -(-left * stages // clusters) * stage + -(-left // clusters) * ends + exchange
    return _DIVIDED_COST * (rounds * tile + divided) if rounds else divided
