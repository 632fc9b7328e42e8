"""Structured logs: one JSON object a line on standard error."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

import msgspec

LEVELS = {"debug": 0, "info": 1, "error": 2, "none": 3}
_settings = {"level": LEVELS["info"]}
_encode = msgspec.json.Encoder().encode


def set_level(name: str) -> None:
    """Lines below this level are dropped."""
    _settings["level"] = LEVELS[name]


def log(level: str, event: str, **fields: Any) -> None:
    """Write a line; values that are not JSON are errors of ours."""
    if LEVELS[level] < _settings["level"]:
        return
    line = {"time": round(time.time(), 3), "level": level, "event": event, **fields}
    with contextlib.suppress(OSError, ValueError):  # whoever read the log is gone: serving and stopping go on
        sys.stderr.buffer.write(_encode(line) + b"\n")
        sys.stderr.buffer.flush()
