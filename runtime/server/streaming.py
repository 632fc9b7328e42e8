"""Server-sent events: frames of which all but the text is built once."""

from __future__ import annotations

from typing import Any

import msgspec

_encode = msgspec.json.Encoder().encode
DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """One event with a JSON document."""
    return b"data: " + _encode(value) + b"\n\n"


class Frames:
    """Events of one response; `opening` is the key and what precedes the text of a choice, such as `"text":`."""

    def __init__(self, head: dict[str, Any], opening: bytes, closing: bytes, with_usage: bool) -> None:
        self._head = head | ({"usage": None} if with_usage else {})
        self._with_usage = with_usage
        self._before = b"data: " + _encode(self._head)[:-1] + b',"choices":[{"index":'
        self._opening = b"," + opening
        self._closing = closing + b',"logprobs":null,"finish_reason":null}]}\n\n'
        self._starts: dict[int, bytes] = {}

    def text(self, index: int, text: str) -> bytes:
        """An event with text alone."""
        start = self._starts.get(index)
        if start is None:
            start = self._starts[index] = self._before + str(index).encode() + self._opening
        return start + _encode(text) + self._closing

    def choice(self, choice: dict[str, Any]) -> bytes:
        """An event with any choice."""
        return event({**self._head, "choices": [choice]})

    def last(self, usage: dict[str, object]) -> bytes:
        """What ends a stream: the counts, where they are asked for, and the mark."""
        counts = event({**self._head, "choices": [], "usage": usage}) if self._with_usage else b""
        return counts + DONE
