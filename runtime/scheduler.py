"""Continuous batching: which tokens of which sequences go into the next forward pass.

Every pass holds one token of each decoding sequence, and chunks of prompts. Alone these fill `max_batch_tokens`; beside
decoding sequences they are kept to `prefill_chunk` tokens, or some for each of the sequences that run or wait, and more for
those whose prompts are not read yet: at most about as much as takes a device as long as the decoding does, so that passes are
at most twice as long and tokens come evenly, and less while all decode, so that most passes are alike.
Where the executor runs ahead, a pass is planned before the last one's tokens are known: a sequence that turns out to have
ended had one more token computed, and keeps slot and pages until that pass is collected. A sequence most of whose prompt
another one is just computing waits for its pages. When pages run out, the sequence admitted last gives its pages up and is
computed again later. What comes while a pass runs can be in the next one, if that is planned late enough: `spare_seconds` says
how long planning may wait.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from megalith.format.errors import RequestError

from .admission import Waiting
from .executor import PAGE_SIZE, Executor, Sampled, SequenceStep, Ticket
from .pages import Pages, PrefixHash
from .sequences import Emitted, Finish, Request, Sequence

PREFILL_CHUNK = 192
CHUNK_PER_SEQUENCE = 4  # the more decode, the longer a pass takes anyway, and the more end and make room for others
CHUNK_PER_PROMPT = 4  # beside that, where prompts wait: a queue that fills at once is read in large passes
_EXPIRY_SECONDS = 0.01  # between looks at deadlines
_PLANNING_SECONDS, _PLANNING_SHARE = 2e-3, 0.25  # so long, or such a share, before a pass ends the next one is planned
_LONGEST_WAIT_SECONDS = 0.02  # for requests: more where one pass was slow would keep the device waiting
_ALIKE_TOKENS = 32  # passes that differ by fewer tokens are expected to take as long
_SLOWER, _SLOWER_SECONDS = 1.1, 1e-4  # expectations rise by so much at once: one pass that was late must not make others late

Planned = list[tuple[Sequence, SequenceStep]]


@dataclass(frozen=True)
class Load:
    """What the scheduler holds now."""

    waiting: int
    running: int
    pages_used: int
    pages_total: int
    preemptions: int
    prefix_tokens: int  # found in the prefix cache, in all
    prompt_tokens: int  # of all admitted prompts


class Scheduler:
    """Owns the sequences, the pages and the passes in flight; `step` does one pass' worth of work."""

    def __init__(
        self,
        executor: Executor,
        max_batch_tokens: int = 512,
        prefill_chunk: int = PREFILL_CHUNK,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if max_batch_tokens <= executor.max_sequences:
            raise RequestError(f"max_batch_tokens {max_batch_tokens}: must be more than the {executor.max_sequences} sequences")
        self._executor = executor
        self._max_batch_tokens, self._prefill_chunk = max_batch_tokens, prefill_chunk
        self._clock = clock
        self._pages = Pages(executor.num_pages)
        self._prefixes = PrefixHash()
        self._free_slots = list(range(executor.max_sequences))[::-1]
        self._waiting = Waiting()
        self._running: list[Sequence] = []  # in order of admission
        self._by_id: dict[int, Sequence] = {}
        self._flying: deque[tuple[Ticket, Planned]] = deque()
        self._emitted: list[Emitted] = []
        self._preemptions = self._prefix_tokens = self._prompt_tokens = 0
        self._next_expiry = 0.0
        self._begun = 0.0  # when the oldest pass in flight began to run
        self._expected: dict[int, float] = {}  # seconds of passes by their tokens

    @property
    def is_idle(self) -> bool:
        """Nothing waits, runs or flies."""
        return not (self._by_id or self._running or self._flying or self._emitted)

    @property
    def load(self) -> Load:
        used = self._pages.num_pages - self._pages.num_free
        return Load(
            len(self._waiting),
            len(self._running),
            used,
            self._pages.num_pages,
            self._preemptions,
            self._prefix_tokens,
            self._prompt_tokens,
        )

    def add(self, request: Request) -> None:
        """Queue a request; RequestError where it could never run."""
        limit = min(self._executor.max_seq_len, self._executor.num_pages * PAGE_SIZE)
        if not request.prompt_ids or len(request.prompt_ids) >= limit:
            raise RequestError(f"{len(request.prompt_ids)} prompt tokens: must be from 1 to {limit - 1}")
        if request.max_tokens < 1 or len(request.prompt_ids) + request.max_tokens > limit:
            raise RequestError(f"{len(request.prompt_ids)} prompt tokens and max_tokens {request.max_tokens} exceed {limit}")
        sequence = Sequence(request)
        self._by_id[request.id] = sequence
        self._waiting.push(sequence)

    def cancel(self, request_id: int) -> None:
        """End a request whose client is gone; its pages are free once what is in flight is collected."""
        sequence = self._by_id.get(request_id)
        if sequence is not None:
            self._end(sequence, Finish.CANCELLED)

    def step(self) -> list[Emitted]:
        """Submit a pass if there is one, collect the oldest if enough are in flight; what came of it."""
        self._expire()
        planned = self._plan()
        if planned:
            ticket = self._executor.submit([step for _, step in planned])
            if not self._flying:
                self._begun = self._clock()
            self._flying.append((ticket, planned))
        if self._flying and (not planned or len(self._flying) > self._executor.steps_ahead):
            self._collect()
        emitted, self._emitted = self._emitted, []
        return emitted

    def spare_seconds(self) -> float:
        """How long the next `step` may wait for requests without keeping the device waiting; 0 where none could be admitted."""
        if not self._free_slots or not len(self._flying) == self._executor.steps_ahead == 1:
            return 0.0
        expected = self._expected.get(_size(self._flying[0][1]), 0.0)
        longest = min(expected - max(_PLANNING_SHARE * expected, _PLANNING_SECONDS), _LONGEST_WAIT_SECONDS)
        return max(0.0, self._begun + longest - self._clock())

    def _expire(self) -> None:
        now = self._clock()
        if now < self._next_expiry:
            return
        self._next_expiry = now + _EXPIRY_SECONDS
        late = [sequence for sequence in self._by_id.values() if sequence.request.deadline <= now]
        for sequence in late:
            self._end(sequence, Finish.DEADLINE)

    # planning

    def _plan(self) -> Planned:
        preemptions = self._preemptions
        planned: Planned = []
        for sequence in list(self._running):
            if self._may_run(sequence) and not sequence.is_prefilling and sequence.wants_more:
                planned += self._decode(sequence)
        # those that gave up their pages for others of this pass
        planned = [(sequence, step) for sequence, step in planned if self._may_run(sequence)]
        budget = self._prompt_tokens_beside(len(planned))
        for sequence in list(self._running):
            if sequence.is_prefilling and self._may_run(sequence) and budget > 0:
                budget -= self._prefill(sequence, budget, planned)
        while budget > 0 and preemptions == self._preemptions and self._admit():
            budget -= self._prefill(self._running[-1], budget, planned)
        for sequence, step in planned:
            sequence.in_flight += 1
            sequence.sampling += step.sample
            sequence.planned = step.start + step.num_tokens
        return planned

    def _prompt_tokens_beside(self, num_decoding: int) -> int:
        """How many tokens of prompts go into a pass."""
        room = self._max_batch_tokens - num_decoding
        if not num_decoding:
            return room
        crowd = min(len(self._running) + len(self._waiting), self._executor.max_sequences)
        wanted = CHUNK_PER_SEQUENCE * crowd + CHUNK_PER_PROMPT * (crowd - num_decoding)
        return min(room, max(self._prefill_chunk, wanted))

    @staticmethod
    def _may_run(sequence: Sequence) -> bool:
        return sequence.slot >= 0 and not sequence.finish and not sequence.is_preempted

    def _decode(self, sequence: Sequence) -> Iterable[tuple[Sequence, SequenceStep]]:
        start, guide = sequence.planned, sequence.request.guide
        if not self._reserve(sequence, start + 1):
            return
        try:
            mask = guide.mask() if guide is not None else None
        except RequestError as error:
            self._end(sequence, Finish.FAILED, str(error))
            return
        yield sequence, SequenceStep(sequence.slot, None, start, tuple(sequence.pages), True, start + 1, mask)

    def _prefill(self, sequence: Sequence, budget: int, planned: Planned) -> int:
        """Plan the next chunk of a prompt, whose pages it has since its admission; the number of tokens."""
        start, length = sequence.planned, sequence.prefill_stop
        stop = min(length, start + budget)
        if stop < length:  # whole pages, so that chunks do not depend on what else runs more than they must
            stop = max(start + 1, stop // PAGE_SIZE * PAGE_SIZE)
        guide = sequence.request.guide
        try:
            mask = guide.mask() if guide is not None and stop == length else None
        except RequestError as error:
            self._end(sequence, Finish.FAILED, str(error))
            return 0
        ids = np.array(sequence.tokens[start:stop], np.int64)
        targets = sequence.prefill_targets(start, stop)
        pages = tuple(sequence.pages)
        planned.append((sequence, SequenceStep(sequence.slot, ids, start, pages, stop == length, length, mask, targets)))
        return stop - start

    def _admit(self) -> bool:
        """Move the next waiting sequence to a slot, with the pages that its prefix finds."""
        sequence = self._waiting.peek()
        if sequence is None or not self._free_slots:
            return False
        if self._executor.reuses_pages and not sequence.request.score_prompt:
            tokens = sequence.tokens
            self._prefixes.extend(sequence.hashes, tokens)
            # the last token is always computed: its logits are needed
            sequence.pages = self._pages.find(sequence.hashes[: (len(tokens) - 1) // PAGE_SIZE])
        sequence.planned = len(sequence.pages) * PAGE_SIZE
        sequence.num_published = len(sequence.pages)
        taken = None if self._is_on_its_way(sequence) else self._pages.take(sequence.missing_pages(sequence.length + 1))
        if taken is None:
            self._pages.release(sequence.pages)
            sequence.pages = []
            return False
        sequence.pages += taken
        self._waiting.pop()
        sequence.prefill_stop = sequence.length
        if not sequence.output_ids:
            sequence.cached_tokens = sequence.planned
            self._prefix_tokens += sequence.planned
            self._prompt_tokens += sequence.length
        sequence.slot = self._free_slots.pop()
        self._running.append(sequence)
        request = sequence.request
        self._executor.start(sequence.slot, request.parameters, request.prompt_ids, sequence.output_ids)
        return True

    def _is_on_its_way(self, sequence: Sequence) -> bool:
        """Whether a running prefill will share more than half of the full pages that this one would compute."""
        lacking = range(len(sequence.pages), min(len(sequence.hashes), (sequence.length - 1) // PAGE_SIZE))
        if not lacking:
            return False
        page = lacking[len(lacking) // 2]
        return any(self._may_run(other) and other.is_computing(sequence.hashes, page) for other in self._running)

    def _reserve(self, sequence: Sequence, stop: int) -> bool:
        """Pages for positions below `stop`, preempting later sequences where there are too few."""
        while (missing := sequence.missing_pages(stop)) > 0:
            taken = self._pages.take(missing)
            if taken is not None:
                sequence.pages += taken
                break
            victim = next((other for other in reversed(self._running) if self._may_run(other)), None)
            if victim is None:
                return False  # pages come back when what is in flight is collected
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._preemptions += 1
        victim.is_preempted = True
        self._settle(victim)

    # results

    def _collect(self) -> None:
        ticket, planned = self._flying.popleft()
        results = iter(self._executor.collect(ticket))
        now, size = self._clock(), _size(planned)
        slowest = self._expected.get(size, math.inf) * _SLOWER + _SLOWER_SECONDS
        self._expected[size] = min(now - self._begun, slowest)
        self._begun = now  # of the next one, which was waiting
        for sequence, step in planned:
            sequence.in_flight -= 1
            sequence.sampling -= step.sample
            if step.sample or step.targets is not None:
                self._take(sequence, step, next(results))
            self._settle(sequence)

    def _take(self, sequence: Sequence, step: SequenceStep, result: Sampled) -> None:
        if sequence.finish:
            return
        if not result.finite:
            position = step.start + step.num_tokens
            self._end(sequence, Finish.NOT_FINITE, f"logits of position {position} are not finite")
            return
        sequence.num_scored += len(result.scores)
        if not step.sample:
            self._emitted.append(Emitted(sequence.request.id, scores=result.scores))
            return
        is_first = not sequence.output_ids
        self._publish(sequence, step.start + step.num_tokens)
        sequence.output_ids.append(result.token)
        finish, message = self._finish_after(sequence, result.token)
        cached = sequence.cached_tokens if is_first else 0
        self._emitted.append(
            Emitted(sequence.request.id, result.token, result.logprob, result.top, result.scores, finish, message, cached)
        )
        if finish:
            self._close(sequence, finish)

    def _finish_after(self, sequence: Sequence, token: int) -> tuple[Finish | None, str]:
        request = sequence.request
        if token in request.stop_ids:
            return Finish.STOP, ""
        if request.guide is not None:
            try:
                if request.guide.advance(token):
                    return Finish.STOP, ""
            except RequestError as error:
                return Finish.FAILED, str(error)
        return (Finish.LENGTH if len(sequence.output_ids) >= request.max_tokens else None), ""

    def _publish(self, sequence: Sequence, stop: int) -> None:
        """Make pages findable whose positions all lie below `stop`; their logits were finite."""
        if not self._executor.reuses_pages or stop // PAGE_SIZE <= sequence.num_published:
            return
        self._prefixes.extend(sequence.hashes, sequence.tokens)
        for page in range(sequence.num_published, stop // PAGE_SIZE):
            self._pages.publish(sequence.pages[page], sequence.hashes[page])
        sequence.num_published = stop // PAGE_SIZE

    def _end(self, sequence: Sequence, finish: Finish, message: str = "") -> None:
        """End from outside a token: reported here."""
        if sequence.finish:
            return
        self._emitted.append(Emitted(sequence.request.id, finish=finish, message=message))
        self._close(sequence, finish)

    def _close(self, sequence: Sequence, finish: Finish) -> None:
        sequence.finish = finish
        self._by_id.pop(sequence.request.id, None)
        if sequence.slot < 0:
            self._waiting.remove(sequence)
        self._settle(sequence)

    def _settle(self, sequence: Sequence) -> None:
        """Take a finished or preempted sequence off its slot once nothing of it is in flight."""
        if sequence.in_flight or sequence.slot < 0 or not (sequence.finish or sequence.is_preempted):
            return
        self._running.remove(sequence)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        self._pages.release(sequence.pages, keep=sequence.finish is not Finish.NOT_FINITE)
        sequence.pages = []
        if not sequence.finish:
            sequence.is_preempted = False
            self._waiting.push_preempted(sequence)


def _size(planned: Planned) -> int:
    """What passes that are alike share."""
    return sum(step.num_tokens for _, step in planned) // _ALIKE_TOKENS
