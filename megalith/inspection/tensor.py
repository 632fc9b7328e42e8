"""One tensor: where it lies, what the conversion did to it, and the statistics of its values; or one held in pieces."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np

from megalith.format.errors import RequestError, printable
from megalith.format.reader import PackedFile
from megalith.format.tensors import PackedTensor

from .plain import fields, jsonable
from .statistics import statistics, statistics_text
from .table import records_of, tensor_columns

_MAX_PIECES = 24  # listed in text


def find_tensor(packed: PackedFile, name: str) -> PackedTensor:
    """RequestError, with the nearest names, when the file has no such tensor or holds it in pieces."""
    if name in packed.tensors:
        return packed.tensors[name]
    place = printable(packed.path)
    if is_source(packed, name):
        piece = printable(_pieces(packed, name)[0].name)
        raise RequestError(f"{place}: {printable(name)} is held in pieces: ask for one of them, such as {piece}")
    near = difflib.get_close_matches(name[:256], [*packed.index.tensors.names, *packed.index.sources.names], 3, 0.5)
    hint = f": did you mean {', '.join(map(printable, near))}?" if near else ""
    raise RequestError(f"{place}: no tensor {printable(name)}{hint}")


def is_source(packed: PackedFile, name: str) -> bool:
    """Whether `name` is a checkpoint tensor that the file holds in pieces."""
    return name in packed.index.sources.names


def _pieces(packed: PackedFile, name: str) -> list[PackedTensor]:
    """The tensors that hold elements of a source, in its order."""
    columns, number = packed.index.tensors.columns, packed.index.sources.names.index(name)
    held = np.flatnonzero((columns["source"] == number) | (columns["scales"] == number))
    return [PackedTensor(packed, i) for i in held[np.argsort(columns["start"][held], kind="stable")].tolist()]


def tensor_entry(packed: PackedFile, tensor: PackedTensor) -> dict[str, Any]:
    """JSON-ready; reads the tensor and its record."""
    columns = tensor_columns(packed)
    record, placement = records_of(packed)[tensor.number], tensor.entry.placement
    placed: dict[str, Any] = {}
    if placement is not None:
        placed = {"start": placement.start, "row_stride": placement.row_stride, "column_stride": placement.column_stride}
        if tensor.entry.source_dtype == "MXFP4":
            placed = {"scales": packed.index.sources.names[placement.scales], **placed}
    return {
        **{name: values[tensor.number] for name, values in columns.items()},
        **placed,
        "source_digest": bytes(record["source_digest"]).hex(),
        **{name: jsonable(record[name].item()) for name in ("rounded", "flushed", "max_abs_error")},
        "statistics": statistics(tensor).to_dict(len(tensor.shape)),
    }


def tensor_text(entry: dict[str, Any]) -> list[str]:
    """Lines for people."""
    described = {name: value for name, value in entry.items() if name not in ("name", "statistics") and value is not None}
    decoded = "values, decoded" if entry["dtype"] == "MXFP4" else "values"
    return [printable(entry["name"]), *fields(described), decoded, *statistics_text(entry["statistics"])]


def source_entry(packed: PackedFile, name: str) -> dict[str, Any]:
    """JSON-ready: a checkpoint tensor held in pieces, their names, and the statistics of them all; reads them.

    Of MXFP4 codes and of scales, the statistics are those of the values that both give.
    """
    pieces, source = _pieces(packed, name), packed.tensors.source(name).entry
    found = statistics(*pieces)
    return {
        "name": name,
        "dtype": source.dtype,
        "shape": list(source.shape),
        "stored_dtype": pieces[0].blob.dtype,
        "tensors": [piece.name for piece in pieces],
        "statistics": {**found.to_dict(len(pieces[0].shape)), "abs_max_in": found.abs_max_in},
    }


def source_text(entry: dict[str, Any]) -> list[str]:
    """Lines for people."""
    names, shape = entry["tensors"], "x".join(map(str, entry["shape"]))
    decoded = "values, decoded" if entry["stored_dtype"] == "MXFP4" else "values"
    lines = [
        printable(entry["name"]),
        f"  {entry['dtype']} {shape} in the checkpoint, held as {entry['stored_dtype']} in {len(names):,} tensors",
        *(f"    {name}" for name in names[:_MAX_PIECES]),
    ]
    if len(names) > _MAX_PIECES:
        lines.append(f"    and {len(names) - _MAX_PIECES:,} more: --json lists them all")
    return [*lines, decoded, *statistics_text(entry["statistics"])]
