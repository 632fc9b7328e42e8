"""POST /v1/chat/completions."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from megalith.runtime.guidance import json_grammar
from megalith.runtime.tokenizer import Tokenizer

from .bodies import ChatBody, ResponseFormat, decode
from .choices import Choices, Piece, usage
from .completions import stop_strings, stop_tokens
from .errors import invalid
from .http import SSE, Exchange
from .service import Job, Plan, Service, sampling_parameters
from .streaming import Frames
from .text import token_text
from .tools import Call, CallParser, ToolUse, tool_use

_decoder = msgspec.json.Decoder(ChatBody)
_ROLES = ("system", "developer", "user", "assistant", "tool")


async def chat_completions(service: Service, exchange: Exchange) -> None:
    """Answer messages."""
    begun = time.monotonic()
    data = await exchange.body(service.limits.max_body_bytes, service.limits.body_seconds)
    body: ChatBody = decode(data, _decoder)
    service.check_model(body.model)
    tokenizer = service.need_tokenizer()
    use = tool_use(body, tokenizer)
    plan = await _plan(service, body, use)
    async with Job(service, exchange, plan, begun) as job:
        choices = Choices(service, job, plan)
        answer = _Answer(tokenizer, body, plan, use, f"chatcmpl-{exchange.request_id}", service.model_id)
        try:
            if body.stream:
                await _stream(exchange, choices, answer)
            else:
                async for pieces in choices.pieces():
                    for piece in pieces:
                        answer.add(piece)
                counts = usage(exchange.prompt_tokens, choices.num_tokens, choices.cached_tokens)
                await exchange.json(answer.document(counts))
        finally:
            exchange.completion_tokens = choices.num_tokens


async def _plan(service: Service, body: ChatBody, use: ToolUse | None) -> Plan:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs goes with logprobs", "top_logprobs")
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    parameters = sampling_parameters(body, top_logprobs, service.config.vocab_size)
    grammar = use.grammar(service.need_tokenizer()) if use else format_grammar(body.response_format)
    await service.check_grammar(grammar)
    messages = normalised(body.messages)
    text = await service.renderer.render(messages, msgspec.to_builtins(body.tools) if body.tools else None)
    ids = await service.encode(text, add_special_tokens=False)
    wanted = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    max_tokens = service.check_prompt(ids, wanted)
    stop_ids = stop_tokens(service, body.stop_token_ids, body.ignore_eos)
    return Plan([ids], body.n or 1, parameters, [max_tokens], stop_strings(body.stop), stop_ids, grammar=grammar)


def format_grammar(wanted: ResponseFormat | None) -> str | None:
    """The grammar of a response_format."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return json_grammar()
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise invalid("response_format json_schema needs json_schema.schema", "response_format")
    return json_grammar(wanted.json_schema.schema)


def normalised(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates read them: content as text, arguments of calls as objects."""
    out = []
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        role = message.get("role")
        if role not in _ROLES:
            raise invalid(f"{place}.role must be one of {', '.join(_ROLES)}", place)
        content = message.get("content")
        if content is None and role != "assistant":
            raise invalid(f"{place}.content is missing", place)
        calls = message.get("tool_calls")
        shown = {**message, "role": "system" if role == "developer" else role, "content": _text(content, place)}
        if calls is not None:
            shown["tool_calls"] = _calls(calls, f"{place}.tool_calls")
        out.append(shown)
    return out


def _text(content: Any, place: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if not isinstance(content, list) or len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise invalid(f"{place}.content must be text or a list of text parts", place)
    return "".join(map(str, texts))


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    out = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise invalid(f"{place} must be a list of function calls", place)
        arguments = function.get("arguments", "{}")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise invalid(f"{place}: arguments are not JSON", place) from None
        out.append(dict(call or {}) | {"function": {**function, "arguments": arguments}})
    return out


async def _stream(exchange: Exchange, choices: Choices, answer: _Answer) -> None:
    is_open = False
    async for pieces in choices.pieces():
        out = b"".join([answer.frame(piece) for piece in pieces])
        if not is_open:
            await exchange.start(200, SSE)
            out = answer.roles() + out
            is_open = True
        if out:
            await exchange.write(out)
    counts = usage(exchange.prompt_tokens, choices.num_tokens, choices.cached_tokens)
    await exchange.write(answer.frames.last(counts), more=False)


@dataclass
class _Choice:
    text: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish: str | None = None


class _Answer:
    """Choices in OpenAI's form, whole or event by event."""

    def __init__(
        self, tokenizer: Tokenizer, body: ChatBody, plan: Plan, use: ToolUse | None, response_id: str, model: str
    ) -> None:
        self._tokenizer, self._body = tokenizer, body
        head = {"id": response_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
        self._head = {**head, "object": "chat.completion"}
        options = body.stream_options
        self.frames = Frames(head, b'"delta":{"content":', b"}", options is not None and options.include_usage)
        self._is_plain = not body.logprobs and use is None and not body.return_token_ids
        self._choices = [_Choice() for _ in range(plan.num_choices)]
        self._parsers = [CallParser(use) if use else None for _ in self._choices]
        self._num_calls = [0] * plan.num_choices

    def roles(self) -> bytes:
        """The first event of every choice."""
        delta = {"role": "assistant", "content": ""}
        rows = range(len(self._choices))
        return b"".join(self.frames.choice(_shown_delta(i, delta, None, None)) for i in rows)

    def frame(self, piece: Piece) -> bytes:
        """The events of a piece, b"" while there is nothing to say."""
        if self._is_plain:
            text = self.frames.text(piece.number, piece.text) if piece.text else b""
            if piece.finish is None:
                return text
            return text + self.frames.choice(_shown_delta(piece.number, {}, None, piece.finish))
        self.add(piece)
        choice, self._choices[piece.number] = self._choices[piece.number], _Choice()
        delta: dict[str, Any] = {}
        if choice.text:
            delta["content"] = "".join(choice.text)
        if choice.calls:
            delta["tool_calls"] = choice.calls
        logprobs = {"content": choice.logprobs, "refusal": None} if choice.logprobs else None
        out = b""
        if delta or logprobs or choice.token_ids:
            shown = _shown_delta(piece.number, delta, logprobs, None)
            out = self.frames.choice(shown | ({"token_ids": choice.token_ids} if choice.token_ids else {}))
        if choice.finish:
            out += self.frames.choice(_shown_delta(piece.number, {}, None, choice.finish))
        return out

    def add(self, piece: Piece) -> None:
        """Take a piece into its choice."""
        choice, parser = self._choices[piece.number], self._parsers[piece.number]
        if piece.token >= 0 and self._body.return_token_ids:
            choice.token_ids.append(piece.token)
        if piece.logprob is not None:
            entry = _logprob(self._tokenizer, piece.token, piece.logprob)
            top = [_logprob(self._tokenizer, token, value) for token, value in piece.top]
            choice.logprobs.append({**entry, "top_logprobs": top})
        if parser is None:
            choice.text.append(piece.text)
        else:
            parts = parser.feed(piece.text) + (parser.flush() if piece.finish else [])
            for part in parts:
                if isinstance(part, str):
                    choice.text.append(part)
                else:
                    choice.calls.append(self._call(piece.number, part))
        if piece.finish is not None:
            called = self._num_calls[piece.number] and piece.finish == "stop"
            choice.finish = "tool_calls" if called else piece.finish

    def _call(self, number: int, call: Call) -> dict[str, Any]:
        index = self._num_calls[number]
        self._num_calls[number] += 1
        function = {"name": call.name, "arguments": call.arguments}
        shown = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        return {"index": index, **shown} if self._body.stream else shown

    def document(self, counts: dict[str, object]) -> dict[str, Any]:
        """The whole response."""
        return {**self._head, "choices": [self._shown(i) for i in range(len(self._choices))], "usage": counts}

    def _shown(self, number: int) -> dict[str, Any]:
        choice = self._choices[number]
        text = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not choice.calls else None, "refusal": None}
        if choice.calls:
            message["tool_calls"] = choice.calls
        logprobs = {"content": choice.logprobs, "refusal": None} if self._body.logprobs else None
        shown = {"index": number, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}
        return shown | ({"token_ids": choice.token_ids} if self._body.return_token_ids else {})


def _shown_delta(number: int, delta: dict[str, Any], logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _logprob(tokenizer: Tokenizer, token: int, value: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": token_text(tokenizer, token), "logprob": value, "bytes": list(data)}
