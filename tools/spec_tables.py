"""The tables of specs/format.md, for the tests that compare them with the code."""

from __future__ import annotations

import re
from pathlib import Path

SPEC = (Path(__file__).resolve().parent.parent / "specs" / "format.md").read_text()


def table(heading: str) -> list[dict[str, str]]:
    """The first table under a heading: rows as maps from column to text."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", SPEC, re.MULTILINE | re.DOTALL)
    assert found, heading
    return _rows(re.findall(r"(?:^\|.*\n)+", found[1], re.MULTILINE)[0])


def _rows(block: str) -> list[dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def code(text: str) -> str:
    return text.strip("`")
