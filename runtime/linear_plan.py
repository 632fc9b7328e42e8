"""Launch numbers of `linear.cu`, the matrix product for few tokens; its constants are compared with these by a test."""

from __future__ import annotations

from dataclasses import dataclass

WARPS = 8
CHUNK_STEPS = 4
STEP_BYTES = {"tile16x512": 1024, "mxfp4": 1088}
THREADS = 32 * WARPS
_TOKENS_PER_TILE = 8
_FRAGMENT_BYTES = 32 * 16  # one token tile's sums of one row block


@dataclass(frozen=True)
class LinearShape:
    """One build of the kernel: how many tokens a block takes at once, and how deep its rings are."""

    layout: str
    token_tiles: int
    ring_chunks: int

    @property
    def tokens(self) -> int:
        """Tokens of one block; more take more blocks."""
        return _TOKENS_PER_TILE * self.token_tiles

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory: rings, two sets of partial sums, one barrier per ring slot."""
        slots = WARPS * self.ring_chunks
        return slots * CHUNK_STEPS * STEP_BYTES[self.layout] + 2 * WARPS * self.token_tiles * _FRAGMENT_BYTES + 8 * slots

    def grid(self, num_sms: int, num_tokens: int) -> tuple[int, int, int]:
        """One block per multiprocessor for every `tokens` tokens."""
        return num_sms, -(-num_tokens // self.tokens), 1

    def partials_bytes(self, num_sms: int, num_tokens: int) -> int:
        """Workspace for the sums of row blocks that two blocks share; flags come on top, 4 bytes a block."""
        blocks = num_sms * -(-num_tokens // self.tokens)
        return blocks * self.token_tiles * _FRAGMENT_BYTES


def linear_shape(layout: str, num_tokens: int, shared_limit: int) -> LinearShape:
    """The build for a number of tokens.

    Rings of two chunks stream as fast as deeper ones, and leave a multiprocessor room for the next product and the attention
    between them: a kernel that does not fit beside those before it starts unevenly, two blocks on one multiprocessor.
    """
    tiles = 1 if num_tokens <= 8 else 2 if num_tokens <= 16 else 4
    shape = LinearShape(layout, tiles, 2)
    return shape if shape.shared_bytes + 1024 <= shared_limit else LinearShape(layout, tiles, 1)
