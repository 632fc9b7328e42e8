"""How prompts and decoding share a device: tokens come evenly, and the host's work is done while the device is busy."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np
import pytest

from megalith.runtime.echo_executor import EchoExecutor
from megalith.runtime.executor import PAGE_SIZE, Sampled, SequenceStep, Ticket
from megalith.runtime.sampler import SamplingParameters
from megalith.runtime.scheduler import Scheduler
from megalith.runtime.sequences import Request

PROMPT, OUTPUT = 512, 128
PASSES = (  # tokens, ms
    (32, 3.9), (96, 4.5), (192, 5.3), (224, 5.55), (320, 6.6), (448, 8.0), (512, 8.6), (640, 10.1), (768, 12.4), (832, 13.4),
    (896, 13.9), (1024, 15.2), (1536, 22.0), (2048, 28.5),
)  # fmt: skip


class ModelledDevice:
    """A device whose passes take a modelled time on a clock of its own; it runs one pass behind the host.

    Qwen3-4B in BF16 on an H100, contexts of 512 to 640 (docs/performance.md): what a pass of so many tokens takes, and what
    each sequence's context adds.
    """

    page_size, vocab_size, steps_ahead, reuses_pages = PAGE_SIZE, 1000, 1, True
    num_pages, max_sequences, max_seq_len = 2048, 128, 1024

    def __init__(self) -> None:
        self.now = self.busy = 0.0  # ms
        self._end = 0.0
        self._passes: dict[int, tuple[float, Sequence[SequenceStep]]] = {}
        self._submitted = 0

    @staticmethod
    def pass_ms(num_prompt: int, num_decoding: int) -> float:
        if not num_prompt:
            return 3.15 + 0.0375 * num_decoding
        return float(np.interp(num_prompt + num_decoding, *zip(*PASSES, strict=True))) + 0.024 * num_decoding

    def start(
        self, slot: int, parameters: SamplingParameters, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()
    ) -> None:
        pass

    def submit(self, steps: Sequence[SequenceStep]) -> Ticket:
        num_decoding = sum(step.token_ids is None for step in steps)
        cost = self.pass_ms(sum(step.num_tokens for step in steps) - num_decoding, num_decoding)
        self._end = max(self._end, self.now) + cost
        self.busy += cost
        self._submitted += 1
        self._passes[self._submitted] = (self._end, steps)
        return Ticket(self._submitted)

    def collect(self, ticket: Ticket) -> list[Sampled]:
        end, steps = self._passes.pop(ticket.number)
        self.now = max(self.now, end)
        return [Sampled(step.slot, 5) for step in steps if step.sample]

    def close(self) -> None:
        pass

    def clock(self) -> float:
        return self.now / 1e3


class Clients:
    """A closed loop: each client asks again some ms after it is answered. In ms: when each sequence's tokens came, and how
    long after they were asked for the first ones came.
    """

    def __init__(self, scheduler: Scheduler, count: int, rounds: int, away: float = 0.0) -> None:
        self._scheduler, self._away = scheduler, away
        self._source = random.Random(3)
        self._left: dict[int, int] = {}
        self._asking: list[tuple[float, int]] = []  # when, and rounds that are left
        self.times: dict[int, list[float]] = {}
        self.first: list[float] = []
        self._asked: dict[int, float] = {}
        for _ in range(count):
            self._ask(0.0, rounds)

    def _ask(self, now: float, rounds: int) -> None:
        number = len(self.times)
        prompt = [self._source.randrange(1000) for _ in range(PROMPT)]
        self._scheduler.add(Request(number, "a", prompt, SamplingParameters(), OUTPUT))
        self._left[number], self.times[number], self._asked[number] = rounds - 1, [], now

    def run(self, device: ModelledDevice, waits: bool = True) -> None:
        """`waits`: passes are planned as late as the scheduler says, as the engine's process does."""
        while self._asking or not self._scheduler.is_idle:
            if waits:
                device.now += 1e3 * self._scheduler.spare_seconds()
            while self._asking and self._asking[0][0] <= device.now:
                self._ask(*self._asking.pop(0))
            for emitted in self._scheduler.step():
                if not self.times[emitted.id]:
                    self.first.append(device.now - self._asked[emitted.id])
                self.times[emitted.id].append(device.now)
                if emitted.finish and self._left[emitted.id]:
                    self._asking.append((device.now + self._away, self._left[emitted.id]))


@pytest.mark.parametrize("count", [32, 128])
def test_tokens_come_evenly_while_prompts_are_read(count: int) -> None:
    device = ModelledDevice()
    clients = Clients(Scheduler(device, max_batch_tokens=2048, clock=device.clock), count, rounds=4)
    clients.run(device)
    between = np.concatenate([np.diff(times) for times in clients.times.values()])
    median, high = np.percentile(between, [50, 99])
    assert high < 2 * median
    assert device.busy == pytest.approx(device.now)  # the device never waits
    # what it would take with all prompts read first and every decode step full
    least = 4 * (count * PROMPT / 2048 * device.pass_ms(2048, 0) + OUTPUT * device.pass_ms(0, count))
    assert device.now < least / 0.88


@pytest.mark.parametrize("count", [32, 128])
def test_passes_are_planned_late_enough_for_what_comes_while_one_runs(count: int) -> None:
    """A client that asks again within 2 ms waits for one pass less, and the device waits for nobody."""
    soonest = []
    for waits in (False, True):
        device = ModelledDevice()
        clients = Clients(Scheduler(device, max_batch_tokens=2048, clock=device.clock), count, rounds=4, away=2.0)
        clients.run(device, waits)
        soonest.append(np.percentile(clients.first, 10))  # most came together, and wait for one another
        assert device.busy == pytest.approx(device.now)
    assert soonest[0] - soonest[1] > 0.9 * device.pass_ms(4 * count, count - 1)


def test_a_pass_that_was_slow_once_makes_no_others_late(monkeypatch: pytest.MonkeyPatch) -> None:
    device = ModelledDevice()
    usual, slow = device.pass_ms, [2000.0]

    def pass_ms(num_prompt: int, num_decoding: int) -> float:
        """The first one without prompts is the slow one."""
        return usual(num_prompt, num_decoding) if num_prompt or not slow else slow.pop()

    monkeypatch.setattr(device, "pass_ms", pass_ms)
    Clients(Scheduler(device, max_batch_tokens=2048, clock=device.clock), 32, rounds=1).run(device)
    assert device.now - device.busy < 50


def test_planning_waits_for_nobody_where_nobody_could_come_in() -> None:
    device = ModelledDevice()
    scheduler = Scheduler(device, max_batch_tokens=2048, clock=device.clock)
    for number in range(device.max_sequences):
        scheduler.add(Request(number, "a", [number] * PROMPT, SamplingParameters(), OUTPUT))
    while len(scheduler.step()) < device.max_sequences:
        if scheduler.load.running == device.max_sequences:
            assert scheduler.spare_seconds() == 0
    assert scheduler.spare_seconds() == 0


def test_the_host_works_while_the_device_is_busy() -> None:
    """128 sequences at 4 ms a pass. Other work on the machine only adds, so one good attempt shows it."""
    step, passes = 4e-3, 80
    shares = []
    for _ in range(20):
        executor = EchoExecutor(num_pages=2048, max_sequences=128, max_seq_len=1024, vocab_size=1000, step_seconds=step)
        scheduler = Scheduler(executor, max_batch_tokens=128 * PROMPT)
        for number in range(128):
            scheduler.add(Request(number, "a", [number] * PROMPT, SamplingParameters(), OUTPUT))
        for _ in range(20):  # the first reads all prompts
            scheduler.step()
        begun = time.monotonic()
        emitted = sum(len(scheduler.step()) for _ in range(passes))
        shares.append(passes * step / (time.monotonic() - begun))
        assert emitted == 128 * passes
        if shares[-1] >= 0.97:
            return
    raise AssertionError(f"the device was busy for {max(shares):.3f} of the time at best")
