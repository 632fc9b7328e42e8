"""From tokens to the text of one choice: incremental decoding and stop strings."""

from __future__ import annotations

from megalith.runtime.tokenizer import TextStream, Tokenizer


class StopMatcher:
    """Lets text through as far as no stop string can begin in it."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """The text that is settled; sets `is_stopped` and drops the rest where a stop string is complete."""
        if not self._stops:
            return text
        held = self._held + text
        found = min((at for at in map(held.find, self._stops) if at >= 0), default=-1)
        if found >= 0:
            self.is_stopped, self._held = True, ""
            return held[:found]
        keep = 0
        for size in range(min(self._longest - 1, len(held)), 0, -1):
            tail = held[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                keep = size
                break
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held, once no more comes."""
        held, self._held = self._held, ""
        return held


class ChoiceText:
    """Text of one sequence as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], stops: tuple[str, ...]) -> None:
        self._stream: TextStream = tokenizer.stream(prompt_ids)
        self._matcher = StopMatcher(stops)

    @property
    def is_stopped(self) -> bool:
        return self._matcher.is_stopped

    def step(self, token: int) -> str:
        """The text that a token settles."""
        return self._matcher.feed(self._stream.step(token))

    def flush(self) -> str:
        return self._matcher.flush()


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token for people; bytes that are no character of their own in the form that OpenAI's API gives them."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
