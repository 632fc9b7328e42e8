"""What the scheduler asks of a backend: forward passes over many sequences whose keys and values lie in pages.

A backend owns `num_pages` pages of PAGE_SIZE positions and `max_sequences` slots of sampling state. It runs steps in the
order in which they were submitted, so that what a step writes is there for the next one, and a page may be given to
another sequence once its last step is submitted. Backends: `numpy_executor`, `echo_executor` (no model).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .sampler import SamplingParameters

PAGE_SIZE = 64  # positions of a page

Top = tuple[tuple[int, float], ...]  # (token, log probability), likeliest first


@dataclass(frozen=True)
class SequenceStep:
    """One sequence's part of a forward pass."""

    slot: int  # row of the persistent per-sequence state, 0 .. max_sequences - 1
    token_ids: NDArray[np.int64] | None  # tokens of a prefill chunk; None: decode one, which this slot sampled last
    start: int  # position of the first token of this step
    block_table: tuple[int, ...]  # pages, enough for start + number of tokens
    sample: bool  # whether the last position is sampled: last chunk of a prefill, or decode
    seq_len: int  # positions of the sequence at the end of this prefill or decode; dynamic RoPE asks for it
    allowed: NDArray[np.int32] | None = None  # grammar mask, one bit per token, int32 [ceil(vocab_size / 32)]
    targets: NDArray[np.int64] | None = None  # token after each of token_ids, whose log probability is wanted; -1: not

    @property
    def num_tokens(self) -> int:
        return 1 if self.token_ids is None else len(self.token_ids)


@dataclass(frozen=True)
class Score:
    """Log probability of a prompt token, given those before it."""

    logprob: float
    top: Top


@dataclass(frozen=True)
class Sampled:
    """The result of a step with `sample` or `targets`; `token` is -1 for one that was not sampled or not finite."""

    slot: int
    token: int
    logprob: float | None = None
    top: Top = ()
    finite: bool = True
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Ticket:
    """A submitted forward pass."""

    number: int


class Executor(Protocol):
    """A backend. Any exception it raises ends the engine process, which is started again."""

    num_pages: int
    page_size: int
    max_sequences: int
    max_seq_len: int
    vocab_size: int
    steps_ahead: int  # how many steps to submit before the first is collected, minus one: 1 keeps a device busy
    reuses_pages: bool  # whether a full page's keys and values depend on the tokens up to it alone

    def start(
        self, slot: int, parameters: SamplingParameters, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()
    ) -> None:
        """Reset a slot's sampling state. `output_ids`: generated before the sequence was interrupted."""

    def submit(self, steps: Sequence[SequenceStep]) -> Ticket:
        """Enqueue one forward pass; may return before it is done."""

    def collect(self, ticket: Ticket) -> list[Sampled]:
        """Wait for a pass; one result per step with `sample` or `targets`, in their order."""

    def close(self) -> None:
        """Release the device."""


def unpack_mask(mask: NDArray[np.int32], vocab_size: int) -> NDArray[np.bool_]:
    """bool [vocab_size] from bits int32 [ceil(vocab_size / 32)], the lowest bit of a word first."""
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little", count=vocab_size)
    return bits.astype(np.bool_)
