"""How commands speak: JSON or text on stdout, progress on stderr, sizes for people."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

JSON_VERSION = 1
_JSON_LEVELS = 3  # of objects with a line per key


def print_json(value: dict[str, Any]) -> None:
    """One JSON document on stdout; every document says the version of its form."""
    click.echo(json_text({"version": JSON_VERSION, **value}))


TRACE_HELP = (
    "Write spans in the Chrome trace event format, for Perfetto (ui.perfetto.dev): {what}. Those kernels are launched one by "
    "one between CUDA events: without the overlap of programmatic launch, each with the start of its kernel, which a profiler "
    "leaves out."
)


def print_traced(report: dict[str, Any] | None, trace_path: Path | None) -> None:
    """A report as JSON, where there is one; the path of a trace goes into it, else to stderr."""
    traced = {"trace": str(trace_path)} if trace_path is not None else {}
    if report is not None:
        print_json(report | traced)
    elif trace_path is not None:
        click.echo(f"trace: {trace_path}", err=True)


def json_text(value: Any, level: int = 0) -> str:
    """ASCII JSON with a line per key of the outer objects and a line per object or list in their lists.

    `json.dumps(..., indent=2)` would write every number on a line of its own, with an encoder in Python.
    """
    indent = "\n" + "  " * (level + 1)
    if isinstance(value, dict) and value and level < _JSON_LEVELS:
        items = [f"{json.dumps(str(key))}: {json_text(item, level + 1)}" for key, item in value.items()]
        return f"{{{indent}{f',{indent}'.join(items)}{indent[:-2]}}}"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return f"[{indent}{f',{indent}'.join(map(json.dumps, value))}{indent[:-2]}]"
    return json.dumps(value)


def human_bytes(count: int) -> str:
    """A size such as "1.5 MiB", exact below 1 KiB."""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def show_progress(wanted: bool) -> bool:
    """Whether to draw a progress bar: when wanted and stderr is a terminal."""
    return wanted and sys.stderr.isatty()
