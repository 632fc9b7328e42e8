"""What every endpoint works with, and a job: the sequences that one request has in the engine."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import TracebackType

from megalith.format.errors import RequestError
from megalith.format.model import ModelConfig
from megalith.runtime.guidance import Grammars
from megalith.runtime.messages import Submit, pack_ids
from megalith.runtime.sampler import SamplingParameters
from megalith.runtime.tokenizer import Tokenizer

from .bodies import Sampling
from .engine_client import EngineClient, Item, Stream
from .errors import ApiError, invalid
from .http import ClientGoneError, Exchange
from .metrics import Metrics
from .renderer import ChatRenderer

_GRACE_SECONDS = 2.0  # after which the server no longer waits for the engine to end a request that is over time
_ABANDON_SECONDS = 30.0  # after which a client that does not read is given up
_THREAD_CHARACTERS = 4096  # texts beyond this are tokenized in a thread


@dataclass(frozen=True)
class Limits:
    """Bounds on what one request and all of them may take."""

    max_seq_len: int
    max_outstanding: int  # sequences that run or wait
    max_body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    request_seconds: float = 600.0


class Places:
    """How many sequences may run and wait: beyond it requests are refused at once."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    def take(self, count: int = 1) -> None:
        if self.taken + count > self.limit:
            raise ApiError(429, "the queue is full", "queue_full", retry_after=1)
        self.taken += count

    def give_back(self, count: int) -> None:
        self.taken -= count


@dataclass
class Service:
    """The parts of a server; one per process."""

    model_id: str
    created: int
    config: ModelConfig
    tokenizer: Tokenizer | None
    engine: EngineClient
    renderer: ChatRenderer
    limits: Limits
    metrics: Metrics
    places: Places
    facts: dict[str, object] = field(default_factory=dict)
    is_draining: bool = False

    @property
    def is_ready(self) -> bool:
        return self.engine.is_ready and not self.is_draining

    @cached_property
    def grammars(self) -> Grammars:
        """RequestError where the file has no tokenizer."""
        text = self.need_tokenizer().json
        return Grammars(text, self.config.vocab_size, self.config.eos_token_ids)

    def need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise invalid("the model file holds no tokenizer: give token ids", "prompt", "no_tokenizer")
        return self.tokenizer

    def check_model(self, model: str | None) -> None:
        if model is not None and model != self.model_id:
            raise ApiError(404, f"the model {model[:100]!r} is not served here", "model_not_found", "model")

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; long texts do not stop other requests."""
        tokenizer = self.need_tokenizer()
        if len(text) < _THREAD_CHARACTERS:
            return tokenizer.encode(text, add_special_tokens)
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens)

    async def check_grammar(self, grammar: str | None) -> None:
        """400 for a grammar that does not compile."""
        if grammar is not None:
            await asyncio.to_thread(lambda: self.grammars.check(grammar))

    def check_prompt(self, ids: list[int], max_tokens: int | None) -> int:
        """How many tokens may be generated; 400 where prompt and tokens exceed the context."""
        limit = self.limits.max_seq_len
        wrong = next((token for token in ids if not 0 <= token < self.config.vocab_size), None)
        if wrong is not None:
            raise invalid(f"token {wrong}: ids go from 0 to {self.config.vocab_size - 1}", "prompt")
        if not ids:
            raise invalid("the prompt is empty", "prompt")
        room = limit - len(ids)
        if room < 1 or (max_tokens or 1) > room:
            wanted = f" and {max_tokens} tokens are asked for" if max_tokens else ""
            text = f"the context is {limit} tokens long: the prompt has {len(ids)}{wanted}"
            raise invalid(text, "prompt", "context_length_exceeded")
        return max_tokens or room


def sampling_parameters(body: Sampling, top_logprobs: int | None, vocab_size: int) -> SamplingParameters:
    """The parameters of a body; those left out are OpenAI's, None is the default."""
    if body.seed is not None and not -(2**63) <= body.seed < 2**64:
        raise invalid("seed must be from -2^63 to 2^64 - 1", "seed")
    bias = []
    for name, value in (body.logit_bias or {}).items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < vocab_size):
            raise invalid(f"logit_bias: {name[:40]!r} is no token id below {vocab_size}", "logit_bias")
        bias.append((int(name), value))

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    try:
        return SamplingParameters(
            temperature=given(body.temperature, 1.0),
            top_k=max(0, body.top_k or 0),
            top_p=given(body.top_p, 1.0),
            min_p=given(body.min_p, 0.0),
            seed=secrets.randbits(63) if body.seed is None else body.seed % 2**64,
            presence_penalty=given(body.presence_penalty, 0.0),
            frequency_penalty=given(body.frequency_penalty, 0.0),
            repetition_penalty=given(body.repetition_penalty, 1.0),
            logit_bias=tuple(sorted(bias)),
            top_logprobs=top_logprobs,
        )
    except RequestError as error:
        raise invalid(str(error)) from None


@dataclass(frozen=True)
class Plan:
    """The sequences of a request: `n` for each prompt, in order."""

    prompts: list[list[int]]
    n: int
    parameters: SamplingParameters
    max_tokens: list[int]  # of each prompt
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    score_prompt: bool = False
    grammar: str | None = None

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n


class Job:
    """The sequences of one request while they are in the engine: none is left there when the context ends."""

    def __init__(self, service: Service, exchange: Exchange, plan: Plan, begun: float) -> None:
        self._service, self._exchange, self._plan = service, exchange, plan
        self._stream = Stream()
        self._ids: list[int] = []
        self._extra = plan.num_choices - 1  # places beyond the one that the request took
        self._task: asyncio.Task[object] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self.begun = begun
        self.is_gone = False

    async def __aenter__(self) -> Job:
        service, plan = self._service, self._plan
        service.places.take(self._extra)
        self._task = asyncio.current_task()
        self._watcher = asyncio.create_task(self._watch())
        deadline = self.begun + service.limits.request_seconds
        self._set_timers(deadline - time.monotonic() + _GRACE_SECONDS)
        try:
            for number in range(plan.num_choices):
                submit = partial(self._submit, number, deadline)
                self._ids.append(service.engine.submit(self._stream, number, submit))
        except BaseException:
            self._leave()
            raise
        self._exchange.prompt_tokens = sum(map(len, plan.prompts))
        service.metrics.prompt_tokens.inc(self._exchange.prompt_tokens)
        return self

    def _submit(self, number: int, deadline: float, sequence_id: int) -> Submit:
        plan, config = self._plan, self._service.config
        parameters = plan.parameters
        if plan.n > 1:  # choices of one prompt differ, and each can be repeated
            seed = (parameters.seed + number % plan.n) % 2**64
            parameters = replace(parameters, seed=seed)
        return Submit(
            sequence_id,
            self._exchange.identity,
            pack_ids(plan.prompts[number // plan.n]),
            parameters,
            plan.max_tokens[number // plan.n],
            [token for token in plan.stop_ids if token < config.vocab_size],
            deadline,
            plan.score_prompt,
            plan.grammar,
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()
        if kind is asyncio.CancelledError and self.is_gone and self._task is not None:
            self._task.uncancel()
            raise ClientGoneError

    def _set_timers(self, seconds: float) -> None:
        """The engine ends what is over time: these are for one that hangs, and for a client that stops reading."""
        loop = asyncio.get_running_loop()
        late = ApiError(504, "the engine did not answer in time", "engine_timeout")
        self._timers = [
            loop.call_later(seconds, self._stream.fail, late),
            loop.call_later(seconds + _ABANDON_SECONDS, self._abandon),
        ]

    def _leave(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for sequence_id in self._ids:
            self._service.engine.cancel(sequence_id)
        self._service.places.give_back(self._extra)
        if self._watcher is not None:
            self._watcher.cancel()

    async def _watch(self) -> None:
        await self._exchange.gone()
        self._abandon()

    def _abandon(self) -> None:
        self.is_gone = True
        if self._task is not None:
            self._task.cancel()

    async def items(self) -> AsyncIterator[list[Item]]:
        """All that came, as often as something did; the caller knows when to stop."""
        last = self.begun
        metrics = self._service.metrics
        is_first = True
        while True:
            items = await self._stream.take()
            now = time.monotonic()
            if is_first:
                metrics.first_token.observe(now - last)
                is_first = False
            else:
                metrics.inter_token.observe((now - last) * self._plan.num_choices / len(items))
            last = now
            yield items

    def end(self, number: int) -> None:
        """A choice is complete by its text: the engine need not go on."""
        self._service.engine.cancel(self._ids[number])
