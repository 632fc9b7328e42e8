"""Usage logs: how often each expert was chosen, as JSON Lines.

A line is an object `{"layer": 3, "expert": 17, "count": 4}`: the layer's number in the model, the expert's number, and how
many tokens it was chosen for, 1 when left out. Lines for the same expert add up; blank lines count for nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

from megalith.format.errors import FileError, RequestError, printable
from megalith.format.experts import ExpertIndex

MAX_LINE_BYTES = 1024
MAX_COUNT = 2**53

Counts = list[list[int]]  # [num_sparse_layers][num_experts]


def read_usage(path: Path, index: ExpertIndex) -> Counts:
    """Counts by sparse layer and expert; reads a line at a time. RequestError names the line that is wrong."""
    counts = [[0] * index.num_experts for _ in index.layers]
    rows = dict(zip(index.layers.tolist(), counts, strict=True))
    try:
        with open(path, "rb") as file:
            _add_lines(file, rows, printable(path))
    except OSError as error:
        raise FileError.wrap(path, error) from None
    return counts


def _add_lines(file: BinaryIO, rows: dict[int, list[int]], place: str) -> None:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise RequestError(f"{place}: line {number}: is longer than {MAX_LINE_BYTES} bytes")
        if line.isspace():
            continue
        problem = _add(line, rows)
        if problem:
            raise RequestError(f"{place}: line {number}: {problem}")


def _add(line: bytes, rows: dict[int, list[int]]) -> str:
    """Add one line's count to its expert; what is wrong with it, or nothing."""
    try:
        entry: Any = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {printable(error)}"
    if not isinstance(entry, dict) or not {"layer", "expert"} <= set(entry) <= {"layer", "expert", "count"}:
        return 'must be an object such as {"layer": 3, "expert": 17, "count": 4}'
    layer, expert, count = entry["layer"], entry["expert"], entry.get("count", 1)
    if type(layer) is not int or layer not in rows:
        return f"layer {printable(layer)}: the file's layers with experts are {min(rows)} to {max(rows)}"
    row = rows[layer]
    if type(expert) is not int or not 0 <= expert < len(row):
        return f"expert {printable(expert)}: a layer has experts 0 to {len(row) - 1}"
    if type(count) is not int or not 0 <= count <= MAX_COUNT - row[expert]:
        return f"count {printable(count)}: an expert's must be integers of at least 0 that add up to at most 2^53"
    row[expert] += count
    return ""
