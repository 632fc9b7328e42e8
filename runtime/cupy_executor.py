"""The CuPy backend behind the executor's interface: passes are enqueued, tokens chosen on the device, results awaited later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.format.errors import RequestError

from .cupy_backend import CupyBackend, Rows
from .executor import PAGE_SIZE, Sampled, Score, SequenceStep, Ticket
from .gpu_buffers import RING_STEPS
from .gpu_staging import PinnedCopies
from .sampler import SamplingParameters, log_probabilities
from .sampling_state import BIAS, MAX_BIASED_TOKENS, RESULT, SLOT

MIXED_CONTEXT = 4096  # positions of a sequence that decodes in a pass that reads prompts
_LAST_TOKEN = np.array([-1])
_PENDING = 8  # sampled passes whose results may wait to be collected


@dataclass
class _Pass:
    """A pass whose results are on their way: `steps` are those that were sampled, in the order of rows."""

    event: Any
    memory: NDArray[np.void]
    steps: list[SequenceStep]


@dataclass
class _Submitted:
    passes: list[_Pass] = field(default_factory=list)
    scores: dict[int, tuple[Score, ...]] = field(default_factory=dict)  # by slot
    order: list[SequenceStep] = field(default_factory=list)


class CupyExecutor:
    """Runs steps over one backend, which serves nothing else meanwhile."""

    page_size = PAGE_SIZE
    reuses_pages = True

    def __init__(self, backend: CupyBackend, steps_ahead: int = 1) -> None:
        limits = backend.limits
        self.num_pages, self.max_sequences, self.max_seq_len = limits.num_pages, limits.max_sequences, limits.max_seq_len
        self.vocab_size, self.steps_ahead = backend.config.vocab_size, steps_ahead
        self._backend = backend
        self._tables: list[tuple[int, ...]] = [()] * limits.max_sequences
        self._parameters = [SamplingParameters()] * limits.max_sequences
        self._copies = PinnedCopies(backend.cupy, max(SLOT.itemsize, BIAS.itemsize * MAX_BIASED_TOKENS))
        self._results = [backend.pinned(RESULT, limits.max_sequences) for _ in range(_PENDING)]
        self._events = [backend.cupy.cuda.Event(disable_timing=True) for _ in range(_PENDING)]
        self._sampled = 0  # passes so far: the device counts them too, for its ring
        self._collected = 0  # of them
        backend.cupy.cuda.runtime.memsetAsync(backend.address("step"), 0, 8, backend.stream.ptr)
        self._submitted: dict[int, _Submitted] = {}
        self._last_ticket = 0

    def start(
        self, slot: int, parameters: SamplingParameters, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()
    ) -> None:
        """RequestError for more biased tokens than the device keeps."""
        if len(parameters.logit_bias) > MAX_BIASED_TOKENS:
            raise RequestError(f"logit_bias names {len(parameters.logit_bias)} tokens: at most {MAX_BIASED_TOKENS} are taken")
        backend, p = self._backend, parameters
        top = -1 if p.top_logprobs is None else p.top_logprobs
        values = (
            p.temperature, p.top_p, p.min_p, p.seed, p.top_k, p.repetition_penalty, p.presence_penalty, p.frequency_penalty,
            len(p.logit_bias), top, np.iinfo(np.int32).max, 1,
        )  # fmt: skip
        place = backend.address("sampling_slots") + slot * SLOT.itemsize
        self._copies.send(np.array([values], SLOT).view(np.uint8), place, backend.stream)
        if p.logit_bias:
            place = backend.address("sampling_biases") + slot * MAX_BIASED_TOKENS * BIAS.itemsize
            self._copies.send(np.array(list(p.logit_bias), BIAS).view(np.uint8), place, backend.stream)
        if p.counts_tokens:
            backend.count_tokens(slot, prompt_ids, output_ids)
        if len(output_ids):
            backend.set_last_token(slot, output_ids[-1])
        self._parameters[slot], self._tables[slot] = parameters, ()

    def submit(self, steps: Sequence[SequenceStep]) -> Ticket:
        """Prefill chunks go first, as one pass where they fit, then all decode steps as one; or with the last chunks, in a pass
        that reads the weights once for both.
        """
        submitted = _Submitted(order=[step for step in steps if step.sample or step.targets is not None])
        for step in steps:
            self._send_table(step)
        groups = self._prefill_groups([step for step in steps if step.token_ids is not None])
        decode = [step for step in steps if step.token_ids is None]
        if groups and decode and self._go_together(groups[-1], decode):
            groups[-1] += decode
            decode = []
        for group in groups:
            self._prefill(group, submitted)
        if decode:
            self._decode(decode, submitted)
        self._last_ticket += 1
        self._submitted[self._last_ticket] = submitted
        return Ticket(self._last_ticket)

    def collect(self, ticket: Ticket) -> list[Sampled]:
        submitted = self._submitted.pop(ticket.number)
        found: dict[int, Sampled] = {}
        for each in submitted.passes:
            each.event.synchronize()
            self._collected += 1
            for step, result in zip(each.steps, each.memory, strict=False):
                found[step.slot] = self._sampled_of(step, result, submitted.scores.get(step.slot, ()))
        return [
            found[step.slot] if step.sample else Sampled(step.slot, -1, scores=submitted.scores[step.slot])
            for step in submitted.order
        ]

    def close(self) -> None:
        """Wait for what was enqueued; the arena goes with the backend."""
        self._backend.stream.synchronize()
        self._submitted.clear()
        self._collected = self._sampled

    # ---- passes ----------------------------------------------------------------------------------------------------

    def _prefill_groups(self, steps: Sequence[SequenceStep]) -> list[list[SequenceStep]]:
        """Steps of one pass have at most the planned number of tokens together."""
        groups: list[list[SequenceStep]] = []
        room = 0
        for step in steps:
            if step.num_tokens > room:
                groups.append([])
                room = self._backend.limits.max_prefill_tokens
                if step.num_tokens > room:
                    raise RequestError(f"a chunk of {step.num_tokens} tokens: at most {room} are planned for")
            groups[-1].append(step)
            room -= step.num_tokens
        return groups

    def _go_together(self, prompts: Sequence[SequenceStep], decode: Sequence[SequenceStep]) -> bool:
        """Where the attention of a prefill is fast for single tokens too: it does not divide a long context among blocks."""
        limits = self._backend.limits
        count = sum(step.num_tokens for step in prompts) + len(decode)
        longest = max(step.start for step in decode)
        fits = count <= limits.max_prefill_tokens and longest < MIXED_CONTEXT
        return fits and limits.has_wgmma and not limits.batch_invariant

    def _prefill(self, steps: list[SequenceStep], submitted: _Submitted) -> None:
        ids = np.concatenate([_LAST_TOKEN if step.token_ids is None else step.token_ids for step in steps])
        sampled = [step for step in steps if step.sample]
        ends = np.cumsum([step.num_tokens for step in steps])
        rows = [int(end) - 1 for step, end in zip(steps, ends, strict=True) if step.sample]
        firsts = [int(end) - step.num_tokens for step, end in zip(steps, ends, strict=True)]
        sequences = [(step.slot, first, step.num_tokens, step.start) for step, first in zip(steps, firsts, strict=True)]
        is_scored = any(step.targets is not None for step in steps)
        self._backend.prefill(ids, sequences, rows, whole=is_scored)
        if sampled:
            self._sample(sampled, submitted)
        for step, (_, first, count, _) in zip(steps, sequences, strict=True):
            if step.targets is not None:  # after sampling: the logits of other rows take the place of those
                submitted.scores[step.slot] = self._scores(step, range(first, first + count))

    def _decode(self, steps: list[SequenceStep], submitted: _Submitted) -> None:
        positions = np.array([step.start for step in steps], np.int32)
        slots = np.array([step.slot for step in steps], np.int32)
        is_masked = any(step.allowed is not None for step in steps)
        self._backend.decode_step(positions, slots, sampled=not is_masked)
        self._sample(steps, submitted, enqueued=not is_masked)

    def _sample(self, steps: list[SequenceStep], submitted: _Submitted, enqueued: bool = False) -> None:
        backend = self._backend
        if not enqueued:
            positions = np.array([step.start + step.num_tokens - 1 for step in steps], np.int32)
            slots = np.array([step.slot for step in steps], np.int32)
            backend.sample(Rows(positions, slots), [step.allowed for step in steps])
        assert self._sampled - self._collected < _PENDING, "a pass' results would be lost"
        turn = self._sampled % _PENDING
        memory, event = self._results[turn], self._events[turn]
        source = backend.address("sampling_ring") + self._sampled % RING_STEPS * self.max_sequences * RESULT.itemsize
        backend.fetch(memory, source, len(steps) * RESULT.itemsize)
        event.record(backend.stream)
        self._sampled += 1
        submitted.passes.append(_Pass(event, memory, steps))

    def _scores(self, step: SequenceStep, rows: range) -> tuple[Score, ...]:
        assert step.targets is not None
        wanted = self._parameters[step.slot].top_logprobs or 0
        logits = self._backend.logits_of(list(rows))
        pairs = zip(logits, step.targets.tolist(), strict=True)
        return tuple(Score(*log_probabilities(row, target, wanted)) for row, target in pairs if target >= 0)

    def _send_table(self, step: SequenceStep) -> None:
        if self._tables[step.slot] != step.block_table:
            self._backend.send_table(step.slot, step.block_table)
            self._tables[step.slot] = step.block_table

    def _sampled_of(self, step: SequenceStep, result: np.void, scores: tuple[Score, ...]) -> Sampled:
        if result["not_finite"]:
            return Sampled(step.slot, -1, finite=False)
        token = int(result["token"])
        if self._parameters[step.slot].top_logprobs is None:
            return Sampled(step.slot, token, scores=scores)
        count = int(result["num_top"])
        top = zip(result["top_tokens"][:count].tolist(), result["top_logprobs"][:count].tolist(), strict=True)
        return Sampled(step.slot, token, float(result["logprob"]), tuple(top), scores=scores)
