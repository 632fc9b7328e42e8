"""An executor without a model: it answers with the prompt's tokens, again and again. It measures everything around a model.

`step_seconds` is what a forward pass takes, however many sequences it holds; passes follow one another without a gap.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from .executor import PAGE_SIZE, Sampled, Score, SequenceStep, Ticket
from .sampler import SamplingParameters


class EchoExecutor:
    """Samples the prompt's tokens in their order, whatever the parameters."""

    page_size = PAGE_SIZE
    steps_ahead = 1
    reuses_pages = True

    def __init__(
        self, *, num_pages: int, max_sequences: int, max_seq_len: int, vocab_size: int, step_seconds: float = 0.0
    ) -> None:
        self.num_pages, self.max_sequences = num_pages, max_sequences
        self.max_seq_len, self.vocab_size = max_seq_len, vocab_size
        self._step_seconds = step_seconds
        self._done = time.monotonic()
        self._prompts: list[Sequence[int]] = [()] * max_sequences
        self._wanted: list[int | None] = [None] * max_sequences
        self._queue: dict[int, tuple[float, Sequence[SequenceStep]]] = {}
        self._submitted = 0

    def start(
        self, slot: int, parameters: SamplingParameters, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()
    ) -> None:
        self._prompts[slot] = prompt_ids
        self._wanted[slot] = parameters.top_logprobs

    def submit(self, steps: Sequence[SequenceStep]) -> Ticket:
        self._submitted += 1
        now = time.monotonic()
        begin = self._done if self._queue else now
        self._done = max(begin + self._step_seconds, now)
        self._queue[self._submitted] = (self._done, steps)
        return Ticket(self._submitted)

    def collect(self, ticket: Ticket) -> list[Sampled]:
        done, steps = self._queue.pop(ticket.number)
        if self._step_seconds:
            time.sleep(max(0.0, done - time.monotonic()))
        return [self._result(step) for step in steps if step.sample or step.targets is not None]

    def close(self) -> None:
        self._queue.clear()

    def _result(self, step: SequenceStep) -> Sampled:
        prompt, wanted = self._prompts[step.slot], self._wanted[step.slot]
        scores: tuple[Score, ...] = ()
        if step.targets is not None:
            scores = tuple(Score(0.0, self._top(target, wanted)) for target in step.targets.tolist() if target >= 0)
        if not step.sample:
            return Sampled(step.slot, -1, scores=scores)
        token = int(prompt[(step.start + step.num_tokens) % len(prompt)])
        if wanted is None:
            return Sampled(step.slot, token, scores=scores)
        return Sampled(step.slot, token, 0.0, self._top(token, wanted), scores=scores)

    @staticmethod
    def _top(token: int, wanted: int | None) -> tuple[tuple[int, float], ...]:
        return ((token, 0.0),) if wanted else ()
