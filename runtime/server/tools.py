"""Tool calls: the grammar that a choice of tools asks for, and the calls in what was generated.

Two forms are known, told apart by the chat template: `<tool_call>` around JSON with `arguments` (Hermes, Qwen), and bare JSON
with `parameters` (Llama 3).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from megalith.runtime.guidance import COMPACT
from megalith.runtime.tokenizer import Tokenizer

from .bodies import ChatBody, ChosenTool, Tool
from .errors import invalid

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """One call; `arguments` is JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class ToolUse:
    """How a request may call tools."""

    tools: list[Tool]
    is_tagged: bool
    is_forced: bool
    many: bool

    def schema(self) -> dict[str, Any]:
        """One call as JSON."""
        key = "arguments" if self.is_tagged else "parameters"
        return COMPACT | {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": tool.function.name},
                        key: tool.function.parameters or {"type": "object"},
                    },
                    "required": ["name", key],
                    "additionalProperties": False,
                }
                for tool in self.tools
            ]
        }

    def grammar(self, tokenizer: Tokenizer) -> str | None:
        """What bounds the output; None for bare JSON that the model may or may not write."""
        schema = json.dumps(self.schema())
        if not self.is_tagged:
            return f"start: %json {schema}" if self.is_forced else None
        is_special = tokenizer.is_special(OPEN)
        if self.is_forced:
            opening, closing = (OPEN, CLOSE) if is_special else (json.dumps(OPEN), json.dumps(CLOSE))
            calls = 'call ("\\n" call)*' if self.many else "call"
            return f'start: {calls}\ncall: {opening} "\\n" body "\\n" {closing}\nbody: %json {schema}\n'
        from llguidance import StructTag

        tag = StructTag(trigger=OPEN, begin=f"{OPEN}\n", grammar=self.schema(), end="\n" if is_special else f"\n{CLOSE}")
        return str(StructTag.to_grammar([tag], assume_special=is_special))


def tool_use(body: ChatBody, tokenizer: Tokenizer) -> ToolUse | None:
    """None where no tool may be called."""
    if not body.tools:
        if body.tool_choice not in (None, "none"):
            raise invalid("tool_choice goes with tools", "tool_choice")
        return None
    template = tokenizer.chat_template or ""
    if "tools" not in template:
        raise invalid("the model's chat template takes no tools", "tools", "no_tools")
    if body.tool_choice == "none":
        return None
    if body.response_format is not None and body.response_format.type != "text":
        raise invalid("response_format and tools cannot be asked for together", "response_format")
    tools = body.tools
    if isinstance(body.tool_choice, ChosenTool):
        name = body.tool_choice.function.name
        tools = [tool for tool in tools if tool.function.name == name]
        if not tools:
            raise invalid(f"tool_choice: {name[:64]!r} is none of the tools", "tool_choice")
    is_forced = body.tool_choice not in (None, "auto")
    many = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, ChosenTool)
    return ToolUse(tools, OPEN in template, is_forced, many)


class CallParser:
    """Splits text, as it comes, into content and calls."""

    def __init__(self, use: ToolUse) -> None:
        self._is_tagged = use.is_tagged
        self._names = {tool.function.name for tool in use.tools}
        self._held = ""
        self._has_called = False

    def feed(self, text: str) -> list[str | Call]:
        """What is settled, in order."""
        self._held += text
        if not self._is_tagged:  # a bare call is the whole text
            return [] if self._held.lstrip()[:1] in ("", "{") else self.flush()
        out: list[str | Call] = []
        while True:
            start = self._held.find(OPEN)
            if start < 0:
                keep = next((n for n in range(len(OPEN) - 1, 0, -1) if self._held.endswith(OPEN[:n])), 0)
                settled = self._held[: len(self._held) - keep]
                if not self._is_gap(settled):
                    out.append(settled)
                    self._held = self._held[len(settled) :]
                return out
            stop = self._held.find(CLOSE, start)
            if stop < 0:
                if not self._is_gap(self._held[:start]):
                    out.append(self._held[:start])
                self._held = self._held[start:]
                return out
            if not self._is_gap(self._held[:start]):
                out.append(self._held[:start])
            inner = self._held[start + len(OPEN) : stop]
            out.append(self._call(inner, "arguments") or self._held[start : stop + len(CLOSE)])
            self._held = self._held[stop + len(CLOSE) :]
            self._has_called |= isinstance(out[-1], Call)

    def _is_gap(self, text: str) -> bool:
        """Nothing, or the space between calls, which is no content."""
        return not text or (self._has_called and not text.strip())

    def flush(self) -> list[str | Call]:
        """What is left, once no more comes."""
        held, self._held = self._held, ""
        if self._is_gap(held):
            return []
        if self._is_tagged:
            return [self._call(held.removeprefix(OPEN), "arguments") or held]
        return [self._call(held, "parameters") or held]

    def _call(self, text: str, key: str) -> Call | None:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict) or value.get("name") not in self._names or not isinstance(value.get(key), dict):
            return None
        return Call(value["name"], json.dumps(value[key], ensure_ascii=False))
