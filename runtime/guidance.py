"""Grammars that bound what is generated: JSON, JSON schemas and tool calls, by the llguidance library."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.format.errors import RequestError, printable

MAX_GRAMMAR_BYTES = 1 << 18
# one space where JSON may have any number: small models do not always stop writing them
COMPACT = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


class Grammars:
    """Compiles grammars for one tokenizer, in the engine's process and in the server's."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: list[int]) -> None:
        import llguidance

        self._library = llguidance
        self._tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=eos_token_ids or None)
        self._vocab_size = vocab_size

    def check(self, grammar: str) -> None:
        """RequestError for a grammar that cannot be compiled within the library's limits."""
        if len(grammar) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"the grammar has {len(grammar)} characters, at most {MAX_GRAMMAR_BYTES} are taken")
        problem = self._library.LLMatcher.validate_grammar(grammar, self._tokenizer)
        if problem and not problem.startswith("WARNING"):
            raise RequestError(f"the grammar or schema is not usable: {printable(problem)}")

    def guide(self, grammar: str) -> Guide:
        """The start of a grammar."""
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"the grammar or schema is not usable: {printable(matcher.get_error())}")
        return Guide(matcher, self._vocab_size)


class Guide:
    """Where one sequence is in its grammar."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    def mask(self) -> NDArray[np.int32]:
        """Allowed tokens, one bit each: int32 [ceil(vocab_size / 32)]."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        if self._matcher.is_error():
            raise RequestError(f"the grammar failed: {printable(self._matcher.get_error())}")
        return mask[: self._words]

    def advance(self, token: int) -> bool:
        """Consume a token; whether the grammar is complete."""
        if not self._matcher.consume_token(token):
            raise RequestError(f"the grammar failed: {printable(self._matcher.get_error())}")
        return bool(self._matcher.is_stopped())


def json_grammar(schema: dict[str, Any] | None = None) -> str:
    """A grammar for JSON that follows a schema, or for any JSON object."""
    from llguidance import LLMatcher

    try:
        return str(
            LLMatcher.grammar_from_json_schema(json.dumps(COMPACT | (schema if schema is not None else {"type": "object"})))
        )
    except ValueError as error:
        raise RequestError(f"the schema is not usable: {printable(error)}") from None
