"""Chat templates for many requests: a few sandboxed worker processes that stay."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import msgspec

from megalith.format.errors import printable
from megalith.runtime import chat_worker
from megalith.runtime.tokenizer import Tokenizer

from .errors import invalid

WORKERS = 2
WALL_SECONDS = 10.0


class ChatRenderer:
    """Renders messages with the file's template; a worker that fails or hangs is replaced."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._idle: list[asyncio.subprocess.Process] = []
        self._places = asyncio.Semaphore(WORKERS)

    async def render(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> str:
        """The prompt text, ready for the assistant's turn."""
        if self._tokenizer is None or self._tokenizer.chat_template is None:
            raise invalid("the model file holds no chat template: use /v1/completions", "messages", "no_chat_template")
        context = {"messages": messages, "tools": tools, "add_generation_prompt": True, **self._tokenizer.special_tokens}
        async with self._places:
            answer = await self._ask(self._tokenizer.chat_template, msgspec.json.encode(context))
        if "error" in answer:
            raise invalid(f"the chat template failed: {printable(answer['error'])}", "messages", "chat_template")
        return str(answer["text"])

    async def stop(self) -> None:
        """End the workers."""
        for worker in self._idle:
            worker.kill()
            await worker.wait()
        self._idle.clear()

    async def _ask(self, template: str, context: bytes) -> dict[str, str]:
        worker = self._idle.pop() if self._idle else await self._start(template)
        try:
            async with asyncio.timeout(WALL_SECONDS):
                answer = await _exchange(worker, context)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            return {"error": "ran longer or used more memory than it may"}
        else:
            self._idle.append(worker)
            return answer
        finally:
            if worker not in self._idle:  # also when the client went away meanwhile
                worker.kill()

    async def _start(self, template: str) -> asyncio.subprocess.Process:
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-P", chat_worker.__file__, "serve",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert worker.stdin is not None
        worker.stdin.write(_framed(msgspec.json.encode(template)))
        return worker


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


async def _exchange(worker: asyncio.subprocess.Process, context: bytes) -> dict[str, str]:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(_framed(context))
    await worker.stdin.drain()
    length = int.from_bytes(await worker.stdout.readexactly(4), "little")
    answer: dict[str, str] = msgspec.json.decode(await worker.stdout.readexactly(length))
    return answer
