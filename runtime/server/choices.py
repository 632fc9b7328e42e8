"""What the engine gives, as text: pieces of each choice until all have ended."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from megalith.runtime.messages import Emission, Top
from megalith.runtime.sequences import Finish

from .errors import ApiError
from .service import Job, Plan, Service
from .text import ChoiceText

_FAILURES = {
    Finish.DEADLINE.value: (504, "the request took longer than it may", "deadline"),
    Finish.NOT_FINITE.value: (500, "the model gave values that are not finite", "not_finite"),
    Finish.FAILED.value: (400, "the request cannot be served", "failed"),
    Finish.CANCELLED.value: (500, "the request was cancelled", "cancelled"),
}


@dataclass(slots=True)
class Piece:
    """A token of one choice and the text that it settles; `token` -1 for none."""

    number: int
    token: int
    text: str
    logprob: float | None = None
    top: Top = ()
    scores: tuple[tuple[float, Top], ...] = ()
    finish: str | None = None


class Choices:
    """All choices of a job; counts their tokens."""

    def __init__(self, service: Service, job: Job, plan: Plan) -> None:
        tokenizer = service.need_tokenizer()
        self._job, self._plan = job, plan
        self._texts = [ChoiceText(tokenizer, prompt, plan.stops) for prompt in plan.prompts for _ in range(plan.n)]
        self._open = set(range(plan.num_choices))
        self.num_tokens = 0
        self.cached_tokens = 0

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """Pieces as they come, several at once where they came faster than they were taken."""
        async for items in self._job.items():
            pieces = []
            for number, item in items:
                if number not in self._open:
                    continue
                if isinstance(item, int):
                    pieces.append(self._token(number, item, None))
                else:
                    pieces.append(self._emission(number, item))
            if pieces:
                yield pieces
            if not self._open:
                return

    def _emission(self, number: int, item: Emission) -> Piece:
        if item.finish in _FAILURES:
            status, text, code = _FAILURES[item.finish]
            raise ApiError(status, f"{text}: {item.message}" if item.message else text, code)
        if number % self._plan.n == 0:  # the other choices share the first one's prompt, which is counted once
            self.cached_tokens += item.cached_tokens
        piece = Piece(number, -1, "") if item.token < 0 else self._token(number, item.token, item.finish)
        piece.logprob, piece.top, piece.scores = item.logprob, item.top, item.scores
        return piece

    def _token(self, number: int, token: int, finish: str | None) -> Piece:
        self.num_tokens += 1
        choice = self._texts[number]
        text = "" if token in self._plan.stop_ids else choice.step(token)
        if choice.is_stopped:
            if finish is None:
                self._job.end(number)
            finish = Finish.STOP.value
        elif finish is not None:
            text += choice.flush()
        if finish is not None:
            self._open.discard(number)
        return Piece(number, token, text, finish=finish)


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, object]:
    """OpenAI's token counts."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
