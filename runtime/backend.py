"""What the engine asks of a backend: logits of one sequence's tokens. NumPy and CuPy implement it."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megalith.format.model import ModelConfig
from megalith.format.rope import F32

from .sampler import SamplingParameters


class Backend(Protocol):
    """Executes a program; a cache is one sequence's keys and values, of a type of the backend's own."""

    config: ModelConfig
    max_seq_len: int  # positions that a sequence can have

    def new_cache(self) -> Any:
        """An empty sequence."""

    def close_cache(self, cache: Any) -> None:
        """The sequence is done with: its memory may serve another."""

    def forward(self, ids: NDArray[np.int64], cache: Any, seq_len: int, last_only: bool) -> F32:
        """Logits float32 [num_tokens or 1, vocab_size] of tokens appended to the sequence in `cache`.

        `seq_len` is the length the prompt or sequence will have at the end of this prefill (dynamic RoPE asks for it).
        """

    def generate(self, tokens: NDArray[np.int64], parameters: SamplingParameters, count: int) -> Generator[int, None, None]:
        """At most `count` tokens after `tokens`, as they come; the caller stops where it wants."""
