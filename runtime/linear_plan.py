"""Launch numbers of `linear.cu`, the matrix product for few tokens; its constants are compared with these by a test."""

from __future__ import annotations

from dataclasses import dataclass

from megalith.format.tiles import padded

WARPS = 7  # that stream; one more finishes
CHUNK_STEPS = 4
STEP_BYTES = {"tile16x512": 1024, "mxfp4": 1088}
THREADS = 32 * (WARPS + 1)
_TOKENS_PER_TILE = 8
_RESERVED_BYTES = 1024  # that the driver adds to a block's shared memory
_FRAGMENT_BYTES = 32 * 16  # one token tile's sums of one row block


@dataclass(frozen=True)
class LinearShape:
    """One build of the kernel: how many tokens a block takes at once, and how deep its rings are."""

    layout: str
    token_tiles: int
    ring_chunks: int
    least_shared_bytes: int = 0  # what a block takes of a multiprocessor even if it needs less

    @property
    def tokens(self) -> int:
        """Tokens of one block; more take more blocks."""
        return _TOKENS_PER_TILE * self.token_tiles

    @property
    def needed_bytes(self) -> int:
        """Shared memory that the kernel uses: rings, a set of sums, one barrier per ring slot and two for the sums."""
        slots = WARPS * self.ring_chunks
        return slots * CHUNK_STEPS * STEP_BYTES[self.layout] + WARPS * self.token_tiles * _FRAGMENT_BYTES + 8 * (slots + 2)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a launch."""
        return max(self.needed_bytes, self.least_shared_bytes)

    def grid(self, num_sms: int, num_tokens: int) -> tuple[int, int, int]:
        """One block per multiprocessor for every `tokens` tokens."""
        return num_sms, -(-num_tokens // self.tokens), 1

    def partials_bytes(self, num_sms: int, num_tokens: int) -> int:
        """Workspace for the sums of row blocks that two blocks share; flags come on top, 4 bytes a block."""
        blocks = num_sms * -(-num_tokens // self.tokens)
        return blocks * self.token_tiles * _FRAGMENT_BYTES


def linear_shape(layout: str, num_tokens: int, shared_limit: int) -> LinearShape:
    """The build for a number of tokens on a multiprocessor with `shared_limit` bytes of shared memory.

    A block takes a little more than a third of that, so that two products are resident, the one that runs and the next, whose
    first weights are then on their way, and the attention between them, but no third product: one that starts two kernels early
    takes the place of an attention or a product that is needed before it, on some multiprocessors and not on others.
    """
    tiles = 1 if num_tokens <= 8 else 2 if num_tokens <= 16 else 4
    least = padded(shared_limit // 3 - _RESERVED_BYTES + 1, 128)
    shape = LinearShape(layout, tiles, 2, least)
    return shape if shape.shared_bytes + _RESERVED_BYTES <= shared_limit else LinearShape(layout, tiles, 1, least)
