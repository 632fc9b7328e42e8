"""Tables of the index: names and equally long columns of little-endian integers (specs/format.md, "Index")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .constants import MAX_NAME_BYTES, MAX_TENSORS
from .errors import FormatError, is_name, printable

Column = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Table:
    """Names and one integer per name in every column."""

    names: list[str]
    columns: dict[str, Column]

    def __len__(self) -> int:
        return len(self.names)

    def row(self, i: int) -> dict[str, int]:
        return {name: int(column[i]) for name, column in self.columns.items()}

    def reject(self, bad: NDArray[np.bool_], place: str, what: str, rule: str) -> None:
        """Raise for the first row where `bad` is true; `what` may use the row's columns."""
        if bad.any():
            i = int(bad.argmax())
            raise FormatError(f"{place}: {printable(self.names[i])}: {what.format(**self.row(i))}", rule)

    def to_dict(self) -> dict[str, Any]:
        columns: dict[str, Any] = {name: column.tobytes() for name, column in self.columns.items()}
        return {**columns, "names": "\n".join(self.names)}


def build_table(names: list[str], rows: Sequence[Mapping[str, int]], types: Mapping[str, str]) -> Table:
    """A table of the columns that `types` names, from one map per row."""
    return Table(names, {name: np.array([row[name] for row in rows], kind) for name, kind in types.items()})


def decode_table(raw: Any, types: Mapping[str, str], place: str, rule: str) -> Table:
    """Inverse of `Table.to_dict`, checked: exact columns, unique printable names, at most MAX_TENSORS of them."""
    if not isinstance(raw, dict) or set(raw) != {*types, "names"} or not isinstance(raw["names"], str):
        raise FormatError(f"{place}: columns must be {sorted(types)} and names", rule)
    num_rows = raw["names"].count("\n") + 1  # counted before anything is built of them
    if num_rows > MAX_TENSORS:
        raise FormatError(f"{place}: {num_rows} rows, at most {MAX_TENSORS} are allowed", rule)
    names = raw["names"].split("\n") if raw["names"] else []
    if len(set(names)) != len(names):
        raise FormatError(f"{place}: duplicate name {printable(_first_duplicate(names))}", rule)
    for name in names:
        if not is_name(name, MAX_NAME_BYTES):
            raise FormatError(f"{place}: name {printable(name)} is not 1 to {MAX_NAME_BYTES} printable ASCII characters", rule)
    columns = {}
    for name, kind in types.items():
        data = raw[name]
        if not isinstance(data, bytes) or len(data) != len(names) * np.dtype(kind).itemsize:
            raise FormatError(f"{place}: column {name} does not hold {len(names)} values of {kind}", rule)
        columns[name] = np.frombuffer(data, kind)
    return Table(names, columns)


def _first_duplicate(names: list[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
