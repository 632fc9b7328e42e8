"""Stop strings, tool calls and token bytes, piece by piece."""

from __future__ import annotations

from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st

import megalith
from megalith.runtime.server.bodies import Tool
from megalith.runtime.server.text import StopMatcher
from megalith.runtime.server.tools import Call, CallParser, ToolUse
from megalith.runtime.tokenizer import Tokenizer

TOOLS = [msgspec.convert({"type": "function", "function": {"name": name}}, Tool) for name in ("f", "g")]
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@given(
    text=st.text("abc", max_size=40),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(1, 5), min_size=40, max_size=40),
)
def test_stop_strings_are_found_wherever_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher, shown, at = StopMatcher(tuple(stops)), "", 0
    for cut in cuts:
        if at >= len(text) or matcher.is_stopped:
            break
        # one character at a time within a piece, as the whole text would be searched
        for character in text[at : at + cut]:
            if not matcher.is_stopped:
                shown += matcher.feed(character)
        at += cut
    ends = [i for i in range(1, len(text) + 1) if any(text[:i].endswith(stop) for stop in stops)]
    if not ends:
        assert shown + matcher.flush() == text
        return
    first = ends[0]
    assert matcher.is_stopped
    assert shown == text[: min(text[:first].find(stop) for stop in stops if stop in text[:first])]


def parse(text: str, size: int, is_tagged: bool = True) -> list[str | Call]:
    parser = CallParser(ToolUse(TOOLS, is_tagged, False, True))
    parts: list[str | Call] = []
    for start in range(0, len(text), size):
        parts += parser.feed(text[start : start + size])
    merged: list[str | Call] = []
    for part in parts + parser.flush():
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def test_calls_are_found_wherever_text_is_cut() -> None:
    call = Call("f", '{"x": 1}')
    for size in range(1, 80):
        assert parse(f"Well. {CALL}", size) == ["Well. ", call]
        assert parse(f"{CALL}\n{CALL}", size) == [call, call]
        assert parse("a <tool_ b", size) == ["a <tool_ b"]
        assert parse('{"name": "g", "parameters": {}}', size, is_tagged=False) == [Call("g", "{}")]
        assert parse("{no call", size, is_tagged=False) == ["{no call"]
        assert parse("plain", size, is_tagged=False) == ["plain"]


def test_what_is_no_call_stays_text() -> None:
    for inner in ("{", '{"name": "h", "arguments": {}}', '{"name": "f", "arguments": 1}', "[]"):
        text = f"<tool_call>{inner}</tool_call>"
        assert parse(text, 7) == [text]


def test_token_bytes(model: Path) -> None:
    with megalith.open(model) as packed:
        tokenizer = Tokenizer(packed)
    text = "Grüße, 世界\n"
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert tokenizer.token_bytes(2) == b"</s>"
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.is_special("</s>")
    assert not tokenizer.is_special("a")
