"""The scheduler on the NumPy and echo executors: what it computes, what it shares, what it gives back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import megalith
from megalith.format.errors import RequestError
from megalith.runtime.echo_executor import EchoExecutor
from megalith.runtime.engine import Engine
from megalith.runtime.executor import Executor, Sampled, SequenceStep, Ticket
from megalith.runtime.numpy_executor import NumpyExecutor
from megalith.runtime.sampler import SamplingParameters
from megalith.runtime.scheduler import Scheduler
from megalith.runtime.sequences import Emitted, Finish, Request


def echo(num_pages: int = 64, max_sequences: int = 4) -> EchoExecutor:
    return EchoExecutor(num_pages=num_pages, max_sequences=max_sequences, max_seq_len=2048, vocab_size=1000)


def numpy_executor(engine: Engine, num_pages: int = 64, max_sequences: int = 8, steps_ahead: int = 0) -> NumpyExecutor:
    return NumpyExecutor(
        engine.backend, num_pages=num_pages, max_sequences=max_sequences, max_seq_len=2048, steps_ahead=steps_ahead
    )


def request(number: int, prompt: Iterable[int] = (1, 2, 3), max_tokens: int = 8, **more: object) -> Request:
    parameters = more.pop("parameters", SamplingParameters())
    assert isinstance(parameters, SamplingParameters)
    return Request(number, str(more.pop("client", "a")), list(prompt), parameters, max_tokens, **more)  # type: ignore[arg-type]


def finish(scheduler: Scheduler, limit: int = 5000) -> dict[int, list[Emitted]]:
    """Run until idle; what each request got."""
    got: dict[int, list[Emitted]] = {}
    for _ in range(limit):
        for emitted in scheduler.step():
            got.setdefault(emitted.id, []).append(emitted)
        if scheduler.is_idle:
            return got
    raise AssertionError("the scheduler never became idle")


def tokens(emitted: list[Emitted]) -> list[int]:
    return [one.token for one in emitted if one.token >= 0]


def prompts(count: int, vocab_size: int, seed: int = 5) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, vocab_size) for _ in range(source.randrange(2, 200))] for _ in range(count)]


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("num_pages", [200, 16], ids=["roomy", "preempting"])
def test_batched_chunked_and_preempted_equals_alone(packed_llama: Path, steps_ahead: int, num_pages: int) -> None:
    engine = megalith.load(packed_llama)
    scheduler = Scheduler(numpy_executor(engine, num_pages, steps_ahead=steps_ahead), max_batch_tokens=96)
    asked = []
    for number, prompt in enumerate(prompts(24, engine.config.vocab_size)):
        parameters = SamplingParameters(
            temperature=0.7 * (number % 3), seed=number, presence_penalty=0.5, repetition_penalty=1.1, frequency_penalty=0.1
        )
        asked.append(request(number, prompt, 40, parameters=parameters))
        scheduler.add(asked[-1])
    got = finish(scheduler)
    for one in asked:
        alone = Scheduler(numpy_executor(engine))
        alone.add(one)
        assert tokens(got[one.id]) == tokens(finish(alone)[one.id])
        assert got[one.id][-1].finish is Finish.LENGTH
    assert scheduler.load.pages_used == 0
    assert (scheduler.load.preemptions > 0) == (num_pages == 16)


def test_greedy_through_pages_equals_the_engine(packed_llama: Path) -> None:
    engine = megalith.load(packed_llama)
    for prompt in prompts(4, engine.config.vocab_size):
        scheduler = Scheduler(numpy_executor(engine))
        scheduler.add(request(1, prompt, 80))
        expected = [token.id for token in engine.generate_tokens(prompt, max_tokens=80, ignore_eos=True)]
        assert tokens(finish(scheduler)[1]) == expected


def test_a_prefix_is_computed_once_and_gives_the_same_tokens(packed_llama: Path) -> None:
    engine = megalith.load(packed_llama)
    scheduler = Scheduler(numpy_executor(engine))
    prompt = prompts(1, engine.config.vocab_size)[0][:60] * 4
    first, second = request(1, prompt), request(2, prompt)
    scheduler.add(first)
    cold = finish(scheduler)[1]
    scheduler.add(second)
    warm = finish(scheduler)[2]
    assert cold[0].cached_tokens == 0
    assert warm[0].cached_tokens == len(prompt) // 64 * 64
    assert tokens(cold) == tokens(warm)
    other = [*prompt[:64], 5, *prompt[65:]]
    scheduler.add(request(3, other))
    assert finish(scheduler)[3][0].cached_tokens == 64


class Counting(EchoExecutor):
    """Counts the prompt tokens that it is given."""

    num_prompt_tokens = 0

    def submit(self, steps: Sequence[SequenceStep]) -> Ticket:
        self.num_prompt_tokens += sum(step.num_tokens for step in steps if step.token_ids is not None)
        return super().submit(steps)


def counting() -> Counting:
    return Counting(num_pages=200, max_sequences=8, max_seq_len=2048, vocab_size=1000)


def test_identical_prompts_share_one_prefill() -> None:
    """300 tokens are four full pages, and 44 tokens that each sequence computes."""
    executor = counting()
    scheduler = Scheduler(executor, max_batch_tokens=256)
    prompt = list(range(300))
    for number in range(5):
        scheduler.add(request(number, prompt))
    got = finish(scheduler)
    assert executor.num_prompt_tokens == 300 + 4 * 44
    assert [got[number][0].cached_tokens for number in range(5)] == [0, 256, 256, 256, 256]
    assert all(tokens(one) == [0, 1, 2, 3, 4, 5, 6, 7] for one in got.values())
    assert scheduler.load.pages_used == 0


def test_prompts_that_wait_for_one_that_ends_are_computed_all_the_same() -> None:
    executor = counting()
    scheduler = Scheduler(executor, max_batch_tokens=64)
    for number in range(3):
        scheduler.add(request(number, range(300)))
    scheduler.step()
    scheduler.cancel(0)
    got = finish(scheduler)
    assert [got[number][0].cached_tokens for number in (1, 2)] == [0, 256]
    assert all(tokens(got[number]) == [0, 1, 2, 3, 4, 5, 6, 7] for number in (1, 2))


def test_a_prompt_that_shares_little_does_not_wait() -> None:
    """One page of five: all are read in the first pass. Three of five: the second prompt waits for the first."""
    for shared, num_passes in ((64, 1), (192, 3)):
        executor = counting()
        scheduler = Scheduler(executor, max_batch_tokens=1024)
        for number in range(2):
            scheduler.add(request(number, [*range(shared), *[500 + number] * (330 - shared)], 20))
        passes = 0
        while executor.num_prompt_tokens < 2 * 330 - (shared if num_passes > 1 else 0):
            scheduler.step()
            passes += 1
        assert passes == num_passes
        finish(scheduler)


def test_unused_pages_are_taken_least_recently_used_first() -> None:
    scheduler = Scheduler(echo(num_pages=8))
    for number in (1, 2, 3):
        scheduler.add(request(number, [number] * 128, 2))
        finish(scheduler)
    scheduler.add(request(4, [3] * 128, 2))
    assert finish(scheduler)[4][0].cached_tokens == 64
    scheduler.add(request(5, [9] * 400, 2))  # takes seven pages
    finish(scheduler)
    scheduler.add(request(6, [1] * 128, 2))
    assert finish(scheduler)[6][0].cached_tokens == 0


def test_clients_are_admitted_in_turn() -> None:
    scheduler = Scheduler(echo(max_sequences=1), max_batch_tokens=64)
    for number in range(6):
        scheduler.add(request(number, client="greedy", max_tokens=1))
    scheduler.add(request(6, client="modest", max_tokens=1))
    order = list(finish(scheduler))
    assert order.index(6) == 1
    assert [number for number in order if number != 6] == list(range(6))


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_cancelled_request_gives_all_back_within_one_step(steps: int) -> None:
    scheduler = Scheduler(echo(), max_batch_tokens=64)
    scheduler.add(request(1, [1] * 200, 500))  # four passes of prefill
    scheduler.add(request(2, [2] * 20, 500))
    for _ in range(steps):
        scheduler.step()
    scheduler.cancel(1)
    scheduler.cancel(2)
    emitted = scheduler.step()
    assert {one.id: one.finish for one in emitted if one.finish} == {1: Finish.CANCELLED, 2: Finish.CANCELLED}
    assert scheduler.load.pages_used == 0
    assert scheduler.is_idle


def test_deadlines_end_waiting_and_running_requests() -> None:
    now = [0.0]
    scheduler = Scheduler(echo(max_sequences=1), max_batch_tokens=64, clock=lambda: now[0])
    scheduler.add(request(1, max_tokens=1000, deadline=5.0))
    scheduler.add(request(2, deadline=5.0))
    for _ in range(10):
        assert not any(one.finish for one in scheduler.step())
    now[0] = 5.0
    assert {one.id for one in scheduler.step() if one.finish is Finish.DEADLINE} == {1, 2}
    assert scheduler.is_idle


class NotFinite(EchoExecutor):
    """One sequence's logits become NaN at a position."""

    def collect(self, ticket: Ticket) -> list[Sampled]:
        _, steps = self._queue[ticket.number]
        bad = {step.slot for step in steps if step.start + step.num_tokens == 150}
        return [replace(one, token=-1, finite=False) if one.slot in bad else one for one in super().collect(ticket)]


def test_logits_that_are_not_finite_end_their_request_alone_and_are_not_cached() -> None:
    scheduler = Scheduler(NotFinite(num_pages=64, max_sequences=4, max_seq_len=2048, vocab_size=1000))
    scheduler.add(request(1, [1] * 140, 100))
    scheduler.add(request(2, [2] * 10, 20))
    got = finish(scheduler)
    assert got[1][-1].finish is Finish.NOT_FINITE
    assert "position 150" in got[1][-1].message
    assert got[2][-1].finish is Finish.LENGTH
    scheduler.add(request(3, [1] * 140, 1))
    assert finish(scheduler)[3][0].cached_tokens == 0
    assert scheduler.load.pages_used == 0


def test_stop_tokens_end_a_sequence_while_one_more_step_flies() -> None:
    scheduler = Scheduler(echo())
    scheduler.add(request(1, [5, 6, 7, 8], 100, stop_ids=frozenset([7])))
    got = finish(scheduler)[1]
    assert tokens(got) == [5, 6, 7]
    assert got[-1].finish is Finish.STOP


def test_scores_of_prompt_tokens_are_those_of_the_logits(packed_llama: Path) -> None:
    engine = megalith.load(packed_llama)
    scheduler = Scheduler(numpy_executor(engine), max_batch_tokens=64)
    prompt = prompts(3, engine.config.vocab_size)[2]
    scheduler.add(request(1, prompt, 1, score_prompt=True, parameters=SamplingParameters(top_logprobs=2)))
    got = finish(scheduler)[1]
    scores = [score for one in got for score in one.scores]
    logits = engine.logits(prompt).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert len(scores) == len(prompt) - 1
    for i, score in enumerate(scores):
        assert score.logprob == pytest.approx(expected[i, prompt[i + 1]], abs=1e-4)
        assert score.top[0][0] == int(expected[i].argmax())
    assert got[-1].logprob == pytest.approx(expected[-1].max(), abs=1e-4)


@pytest.mark.parametrize(("prompt", "max_tokens"), [([], 1), ([1] * 5000, 1), ([1], 0), ([1], 5000)])
def test_requests_that_never_fit_are_refused(prompt: list[int], max_tokens: int) -> None:
    with pytest.raises(RequestError):
        Scheduler(echo()).add(request(1, prompt, max_tokens))


@pytest.mark.parametrize("seed", range(6))
def test_random_work_with_cancellations_ends_with_every_page_free(seed: int) -> None:
    source = random.Random(seed)
    executor: Executor = echo(num_pages=24, max_sequences=6)
    scheduler = Scheduler(executor, max_batch_tokens=80)
    ended: set[int] = set()
    for number in range(200):
        shared = [source.randrange(3)] * source.choice([1, 64, 130])
        tail = [source.randrange(1000) for _ in range(source.randrange(1, 300))]
        scheduler.add(request(number, shared + tail, source.randrange(1, 120), client=str(number % 3)))
        for _ in range(source.randrange(8)):
            ended |= {one.id for one in scheduler.step() if one.finish}
        if source.random() < 0.4:
            scheduler.cancel(source.randrange(number + 1))
    ended |= {number for number, got in finish(scheduler, 50_000).items() if got[-1].finish}
    assert ended == set(range(200))
    assert scheduler.load.pages_used == scheduler.load.running == scheduler.load.waiting == 0
