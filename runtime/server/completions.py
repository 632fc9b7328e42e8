"""POST /v1/completions."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from megalith.runtime.messages import Top
from megalith.runtime.tokenizer import Tokenizer

from .bodies import MAX_PROMPTS, CompletionBody, decode
from .choices import Choices, Piece, usage
from .errors import invalid
from .http import SSE, Exchange
from .service import Job, Plan, Service, sampling_parameters
from .streaming import Frames
from .text import token_text

_decoder = msgspec.json.Decoder(CompletionBody)


async def completions(service: Service, exchange: Exchange) -> None:
    """Continue prompts."""
    begun = time.monotonic()
    data = await exchange.body(service.limits.max_body_bytes, service.limits.body_seconds)
    body: CompletionBody = decode(data, _decoder)
    service.check_model(body.model)
    if body.suffix:
        raise invalid("suffix is not supported: this server fills in nothing", "suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of is not supported beyond n", "best_of")
    prompts, texts = await _prompts(service, body)
    plan = _plan(service, body, prompts)
    async with Job(service, exchange, plan, begun) as job:
        choices = Choices(service, job, plan)
        answer = _Answer(service.need_tokenizer(), body, plan, texts, f"cmpl-{exchange.request_id}", service.model_id)
        try:
            if body.stream:
                await _stream(exchange, choices, answer)
            else:
                async for pieces in choices.pieces():
                    for piece in pieces:
                        answer.add(piece)
                await exchange.json(
                    answer.document(usage(exchange.prompt_tokens, answer.tokens(choices), choices.cached_tokens))
                )
        finally:
            exchange.completion_tokens = answer.tokens(choices)


async def _prompts(service: Service, body: CompletionBody) -> tuple[list[list[int]], list[str]]:
    """Token ids and, for `echo`, texts of all prompts."""
    tokenizer = service.need_tokenizer()
    given: list[Any] = [body.prompt] if isinstance(body.prompt, str) else list(body.prompt)
    if all(isinstance(item, int) for item in given):
        given = [given]
    if len({type(item) for item in given}) != 1:
        raise invalid("prompt mixes texts, token ids and lists", "prompt")
    if len(given) > MAX_PROMPTS:
        raise invalid(f"{len(given)} prompts, at most {MAX_PROMPTS} are taken", "prompt")
    if isinstance(given[0], str):
        return [await service.encode(text) for text in given], given
    size = service.config.vocab_size
    if any(token >= size for ids in given for token in ids):
        raise invalid(f"prompt: token ids go from 0 to {size - 1}", "prompt")
    return given, [tokenizer.decode(ids, skip_special_tokens=False) for ids in given] if body.echo else []


def _plan(service: Service, body: CompletionBody, prompts: list[list[int]]) -> Plan:
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens 0 goes with echo", "max_tokens")
    wanted = None if body.max_tokens is None else max(1, body.max_tokens)
    return Plan(
        prompts,
        body.n or 1,
        sampling_parameters(body, body.logprobs, service.config.vocab_size),
        [service.check_prompt(ids, wanted) for ids in prompts],
        stop_strings(body.stop),
        stop_tokens(service, body.stop_token_ids, body.ignore_eos),
        score_prompt=bool(body.echo) and body.logprobs is not None,
    )


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def stop_tokens(service: Service, extra: list[int] | None, ignore_eos: bool) -> tuple[int, ...]:
    """Ids that end a sequence."""
    return (*(() if ignore_eos else service.config.eos_token_ids), *(extra or ()))


async def _stream(exchange: Exchange, choices: Choices, answer: _Answer) -> None:
    frames, is_open = answer.frames, False
    async for pieces in choices.pieces():
        out = b"".join([answer.frame(piece) for piece in pieces])
        if not is_open:
            await exchange.start(200, SSE)
            is_open = True
        if out:
            await exchange.write(out)
    counts = usage(exchange.prompt_tokens, answer.tokens(choices), choices.cached_tokens)
    await exchange.write(frames.last(counts), more=False)


@dataclass
class _Choice:
    """What one choice has so far, all of it or what the next event takes."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)


class _Answer:
    """Choices in OpenAI's form, whole or event by event."""

    def __init__(
        self, tokenizer: Tokenizer, body: CompletionBody, plan: Plan, texts: list[str], response_id: str, model: str
    ) -> None:
        self._tokenizer, self._body, self._plan, self._texts = tokenizer, body, plan, texts
        self._head = {"id": response_id, "object": "text_completion", "created": int(time.time()), "model": model}
        options = body.stream_options
        self.frames = Frames(self._head, b'"text":', b"", options is not None and options.include_usage)
        self._is_plain = body.logprobs is None and not body.echo and not body.return_token_ids
        self._choices = [_Choice() for _ in range(plan.num_choices)]
        self._offsets = [0] * plan.num_choices
        self._scores: list[list[tuple[float, Top]]] = [[] for _ in self._choices]
        self._has_prompt = [not body.echo] * plan.num_choices
        self._finishes: list[str | None] = [None] * plan.num_choices

    def tokens(self, choices: Choices) -> int:
        return 0 if self._body.max_tokens == 0 else choices.num_tokens

    def frame(self, piece: Piece) -> bytes:
        """The event of a piece, b"" while there is nothing to say."""
        if self._is_plain and piece.finish is None:
            return self.frames.text(piece.number, piece.text) if piece.text else b""
        self.add(piece)
        choice = self._choices[piece.number]
        if piece.token < 0 and piece.finish is None:
            return b""
        shown = self._shown(piece.number)
        self._choices[piece.number] = _Choice()
        return self.frames.choice(shown) if choice.text or choice.tokens or piece.finish or choice.token_ids else b""

    def add(self, piece: Piece) -> None:
        """Take a piece into its choice."""
        number, choice = piece.number, self._choices[piece.number]
        self._scores[number] += piece.scores
        if piece.token >= 0 and not self._has_prompt[number]:
            self._has_prompt[number] = True
            self._add_prompt(number, choice)
        if piece.finish is not None:
            self._finishes[number] = piece.finish
        if piece.token < 0 or self._body.max_tokens == 0:
            return
        choice.text.append(piece.text)
        if self._body.return_token_ids:
            choice.token_ids.append(piece.token)
        if piece.logprob is not None:
            self._add_logprob(number, piece.token, piece.logprob, piece.top)

    def _add_prompt(self, number: int, choice: _Choice) -> None:
        prompt = number // self._plan.n
        choice.text.append(self._texts[prompt])
        if self._body.logprobs is None:
            return
        ids = self._plan.prompts[prompt]
        self._add_logprob(number, ids[0], None, None)
        for token, (logprob, top) in zip(ids[1:], self._scores[number], strict=True):
            self._add_logprob(number, token, logprob, top)

    def _add_logprob(self, number: int, token: int, logprob: float | None, top: Top | None) -> None:
        choice, text = self._choices[number], token_text(self._tokenizer, token)
        choice.tokens.append(text)
        choice.token_logprobs.append(logprob)
        choice.top_logprobs.append(None if top is None else {token_text(self._tokenizer, other): value for other, value in top})
        choice.text_offset.append(self._offsets[number])
        self._offsets[number] += len(text)

    def _shown(self, number: int) -> dict[str, Any]:
        choice = self._choices[number]
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = {
                "tokens": choice.tokens,
                "token_logprobs": choice.token_logprobs,
                "top_logprobs": choice.top_logprobs,
                "text_offset": choice.text_offset,
            }
        shown = {
            "index": number,
            "text": "".join(choice.text),
            "logprobs": logprobs,
            "finish_reason": self._finishes[number],
        }
        return shown | ({"token_ids": choice.token_ids} if self._body.return_token_ids else {})

    def document(self, counts: dict[str, object]) -> dict[str, Any]:
        """The whole response."""
        return {**self._head, "choices": [self._shown(i) for i in range(len(self._choices))], "usage": counts}
