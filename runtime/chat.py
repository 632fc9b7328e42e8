"""Chat messages to prompt text, through the template that the packed file carries."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megalith.format.errors import RequestError, printable

from . import chat_worker
from .tokenizer import Tokenizer

_WALL_SECONDS = 10.0


def render_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
    """The prompt text for messages such as {"role": "user", "content": "Hello"}, ready for the assistant's turn.

    RequestError when the file has no template, or the template fails or exceeds its time or memory.
    """
    if tokenizer.chat_template is None:
        raise RequestError("the file holds no chat template: give a plain prompt instead")
    context = {
        "messages": list(messages),
        "tools": tools,
        "add_generation_prompt": True,
        **tokenizer.special_tokens,
    }
    request = json.dumps({"template": tokenizer.chat_template, "context": context}).encode()
    command = [sys.executable, "-P", chat_worker.__file__]  # -P: this folder stays off its import path
    try:
        done = subprocess.run(command, input=request, capture_output=True, timeout=_WALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise RequestError("the chat template ran longer than it may") from None
    if done.returncode:
        raise RequestError("the chat template used more processor time or memory than it may")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise RequestError(f"the chat template failed: {printable(answer['error'])}")
    return str(answer["text"])
