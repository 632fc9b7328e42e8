"""Device memory of the CuPy backend beyond the file's own sections: every buffer by name, sized at plan time."""

from __future__ import annotations

from dataclasses import dataclass

from megalith.format.model import ModelConfig, layer_specs
from megalith.format.tiles import padded

from .gemm_plan import SPLIT_TILES, GemmShape
from .linear_plan import linear_shape
from .sampling_state import row_pitch, state_bytes

PAGE_TOKENS = 64
MAX_SPLITS = 32
ROWS_TOKENS = 8  # tokens of a product by mma.sync where wgmma takes more
COLUMN_UNIT = 128  # activations are padded to whole steps of every weight codec
TILE_SLACK_TOKENS = 256  # a tile of tokens may reach beyond the last panel
RING_STEPS = 4
_LEAST_ROWS = 64  # query rows of a tile of attention
ALIGNMENT = 4096


@dataclass(frozen=True)
class Limits:
    """What a backend is planned for."""

    max_sequences: int
    max_seq_len: int
    max_prefill_tokens: int
    num_pages: int
    num_sms: int
    shared_limit: int
    has_wgmma: bool
    batch_invariant: bool = False  # products of any number of tokens sum in the same order

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.max_seq_len // PAGE_TOKENS)

    @property
    def max_tokens(self) -> int:
        return max(self.max_prefill_tokens, self.max_sequences)

    @property
    def rows_tokens(self) -> int:
        """Tokens that the "rows" activation layout must hold: those of a product by mma.sync."""
        if not self.has_wgmma:
            return self.max_tokens
        return 0 if self.batch_invariant else ROWS_TOKENS


@dataclass(frozen=True)
class Buffer:
    """A region of the arena."""

    name: str
    nbytes: int
    formula: str


def head_pitch(head_dim: int) -> int:
    """Columns of a head in queries and in the cache."""
    return padded(head_dim, 64)


def qkv_rows(config: ModelConfig) -> int:
    """Stored rows of the fused q, k, v matrix."""
    return next(spec.rows for spec in layer_specs(config, False) if spec.name == "qkv_proj")


def page_bytes(config: ModelConfig) -> int:
    """K and V of one page in all layers."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * head_pitch(config.head_dim) * PAGE_TOKENS * 2


def device_buffers(config: ModelConfig, limits: Limits) -> list[Buffer]:
    """All of them; sizes in bytes with the formula that gives them."""
    tokens, batch, rows_tokens = limits.max_tokens, limits.max_sequences, limits.rows_tokens
    widths = {"h": config.hidden_size, "a": config.q_rows, "inner": config.intermediate_size}
    group = config.num_attention_heads // config.num_key_value_heads
    row_blocks, rows = -(-group // 16), min(group, 16)
    blocks = batch * config.num_key_value_heads * row_blocks
    columns = padded(config.head_dim, 16)
    linear = linear_shape("tile16x512", rows_tokens, limits.shared_limit)
    vocab_pitch = row_pitch(config.vocab_size)
    sampling = state_bytes(batch, batch, config.vocab_size, RING_STEPS, with_penalties=True)
    sizes: list[tuple[str, int, str]] = [
        ("kv_cache", page_bytes(config) * limits.num_pages, f"{limits.num_pages} pages x {page_bytes(config)}"),
        ("x", 4 * tokens * config.hidden_size, f"{tokens} tokens x {config.hidden_size} x 4"),
        ("qkv", 4 * tokens * qkv_rows(config), f"{tokens} tokens x {qkv_rows(config)} x 4"),
    ]
    for name, width in widths.items():
        pitch = padded(width, COLUMN_UNIT)
        sizes.append((f"{name}_rows", 2 * rows_tokens * pitch, f"{rows_tokens} tokens x {pitch} x 2"))
        if limits.has_wgmma:
            count = padded(tokens, 8) + TILE_SLACK_TOKENS
            sizes.append((f"{name}_tiled", 2 * count * pitch, f"{count} tokens x {pitch} x 2"))
    query_pitch = config.num_attention_heads * head_pitch(config.head_dim)
    chosen, pitch = padded(batch, 8) + TILE_SLACK_TOKENS if limits.has_wgmma else batch, padded(config.q_rows, COLUMN_UNIT)
    sizes += [
        ("chosen_x", 4 * batch * config.hidden_size, f"{batch} sequences x {config.hidden_size} x 4"),
        ("chosen_a", 2 * chosen * pitch, f"{chosen} tokens x {pitch} x 2"),
        ("q", 2 * tokens * query_pitch, f"{tokens} tokens x {query_pitch} x 2"),
        ("logits", 4 * batch * vocab_pitch, f"{batch} sequences x {vocab_pitch} x 4"),
        ("linear_partials", linear.partials_bytes(limits.num_sms, rows_tokens), "two blocks may share a row block"),
        ("linear_flags", 4 * limits.num_sms * -(-rows_tokens // linear.tokens), "4 a block"),
        *(gemm_workspace(limits) if limits.has_wgmma else []),
        ("attention_sums", 4 * blocks * MAX_SPLITS * rows * columns, f"{blocks} heads x {MAX_SPLITS} x {rows} x {columns} x 4"),
        ("attention_stats", 8 * blocks * MAX_SPLITS * rows, f"{blocks} heads x {MAX_SPLITS} x {rows} x 8"),
        ("attention_arrived", 4 * blocks, f"{blocks} heads x 4"),
        *((name, nbytes, "sampling_state.py") for name, nbytes in sampling.items()),
        ("last_token", 4 * batch, f"{batch} sequences x 4"),
        ("finished", 4 * batch, f"{batch} sequences x 4"),
        ("eos_tokens", 4 * max(1, len(config.eos_token_ids)), "4 an id"),
        ("step", 8, "two counters"),
        ("block_table", 4 * batch * limits.pages_per_sequence, f"{batch} sequences x {limits.pages_per_sequence} x 4"),
        ("staging", staging_bytes(config, limits), "ids, positions, slots and work items of a pass"),
    ]
    return [Buffer(*entry) for entry in sizes]


def gemm_workspace(limits: Limits) -> list[tuple[str, int, str]]:
    """(name, bytes, formula) of what the divided products of `gemm_wgmma.cu` share."""
    largest = GemmShape("tile16x512", 0, max(SPLIT_TILES), 1, split=True)
    in_parts = GemmShape("tile16x512", 1, 64, 3, parts=2)
    flags = max(shape.flags(limits.num_sms) for shape in (largest, in_parts))
    return [
        ("gemm_partials", largest.partials_bytes(limits.num_sms), "blocks may share a tile"),
        ("gemm_flags", 4 * flags, "4 a warpgroup"),
    ]


def max_items(config: ModelConfig, limits: Limits) -> int:
    """Most tiles of query rows that a prefill can have."""
    group = config.num_attention_heads // config.num_key_value_heads
    return limits.max_tokens * group // _LEAST_ROWS + limits.max_sequences


def items_of_row(group: int, rows: int) -> int:
    """Most tiles of so many query rows that one token's heads lie in."""
    return (group + rows - 2) // rows + 1


def staging_bytes(config: ModelConfig, limits: Limits) -> int:
    """Bytes that the host sends for one pass at most: see `gpu_staging.Fields`."""
    per_token, per_item = 3 * 4, 8
    mask = 4 * -(-config.vocab_size // 32)  # of a grammar: a bit per token of the vocabulary
    group = config.num_attention_heads // config.num_key_value_heads
    per_sequence = 6 * 4 + 16 + per_item * items_of_row(group, _LEAST_ROWS) + mask
    fields = per_token * limits.max_tokens + per_sequence * limits.max_sequences + per_item * max_items(config, limits)
    return padded(fields + 16 * 16, ALIGNMENT)
