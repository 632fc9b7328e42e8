"""One sequence as the scheduler sees it: what was asked for, how far it is, what it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from .executor import PAGE_SIZE, Score
from .guidance import Guide
from .sampler import SamplingParameters


class Finish(Enum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence or stop token, or the grammar is complete
    LENGTH = "length"  # max_tokens or the context
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    NOT_FINITE = "not_finite"  # the logits were NaN or infinite
    FAILED = "failed"


@dataclass(frozen=True)
class Request:
    """A sequence to generate; `deadline` is in seconds of time.monotonic()."""

    id: int
    client: str  # for fair admission: who asks
    prompt_ids: list[int]
    parameters: SamplingParameters
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()  # end the sequence; the token itself is reported
    deadline: float = float("inf")
    score_prompt: bool = False  # report log probabilities of the prompt's tokens
    guide: Guide | None = None


@dataclass(frozen=True)
class Emitted:
    """A token, scores of prompt tokens, an end, or several of these; `token` -1 for none."""

    id: int
    token: int = -1
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    scores: tuple[Score, ...] = ()
    finish: Finish | None = None
    message: str = ""
    cached_tokens: int = 0  # of the prompt, found in the prefix cache; with the first token


@dataclass(eq=False)
class Sequence:
    """Progress of a request. Positions below `planned` are computed or part of a submitted step."""

    request: Request
    output_ids: list[int] = field(default_factory=list)
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of full pages
    num_published: int = 0  # of them findable, or found
    planned: int = 0
    prefill_stop: int = 0  # tokens known at admission
    in_flight: int = 0  # submitted steps that are not collected
    sampling: int = 0  # of them, those that sample
    cached_tokens: int = 0
    num_scored: int = 0  # prompt tokens whose log probabilities are reported
    finish: Finish | None = None
    is_preempted: bool = False  # to be taken off its slot once nothing is in flight

    @property
    def tokens(self) -> list[int]:
        return self.request.prompt_ids + self.output_ids

    @property
    def length(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def is_prefilling(self) -> bool:
        return self.planned < self.prefill_stop

    @property
    def wants_more(self) -> bool:
        """Whether a decode step may be submitted on top of what is in flight."""
        if self.request.guide is not None and self.sampling:
            return False  # the grammar's mask needs the token
        return len(self.output_ids) + self.sampling < self.request.max_tokens

    def is_computing(self, hashes: list[bytes], page: int) -> bool:
        """Whether this prefill will make findable what `hashes` names at `page`; a hash covers all pages before it too."""
        return self.num_published < self.prefill_stop // PAGE_SIZE and self.hashes[page : page + 1] == [hashes[page]]

    def missing_pages(self, stop: int) -> int:
        """How many pages are needed beyond those held to write positions below `stop`."""
        return max(0, -(-stop // PAGE_SIZE) - len(self.pages))

    def prefill_targets(self, start: int, stop: int) -> NDArray[np.int64] | None:
        """The token after each of [start, stop), -1 after the prompt's last; None where no scores are wanted."""
        prompt = self.request.prompt_ids
        if not self.request.score_prompt or self.num_scored >= len(prompt) - 1 or start >= len(prompt) - 1:
            return None
        known = range(start, min(stop, len(prompt) - 1))
        targets = [prompt[i + 1] if i >= self.num_scored else -1 for i in known]
        return np.array(targets + [-1] * (stop - start - len(targets)), np.int64)
