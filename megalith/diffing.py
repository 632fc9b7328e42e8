"""Comparing two packed files: tensors by value and by layout, and everything else that they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from megalith.format.checksums import Extent
from megalith.format.constants import TILE_ROWS
from megalith.format.dtypes import ITEM_BYTES, Bits, widen
from megalith.format.reader import PackedFile
from megalith.format.tensors import PackedTensor, rows_per_unit
from megalith.inspection.plain import jsonable
from megalith.inspection.table import source_rows

_SLICE_BYTES = 4 << 20

# What may be said of a tensor, from the least to the most serious.
EQUAL, LAYOUT, CODES, DTYPE, VALUES, SHAPE, ONLY_A, ONLY_B = (
    "equal", "layout", "codes", "dtype", "values", "shape", "only_a", "only_b",
)  # fmt: skip
VERDICTS = {
    EQUAL: "equal",
    LAYOUT: "equal in value, laid out differently",
    CODES: "equal in value, in other MXFP4 codes and scales",
    DTYPE: "equal in value, stored in another dtype",
    VALUES: "different in value",
    SHAPE: "different in shape",
    ONLY_A: "only in A",
    ONLY_B: "only in B",
}

OTHERS = ("config", "rope", "sources", "files", "provenance", "metadata")  # what is compared beside tensors

Progress = Callable[[int], Any]


@dataclass(frozen=True)
class ValueDifference:
    """Elements that differ, errors in float32 values (over pairs that are both finite), and the first place (row, column)."""

    differing: int
    count: int
    max_abs_error: float
    rms_error: float
    nonfinite: int
    first_at: tuple[int, int]
    first_values: tuple[float, float]


def diff(a: PackedFile, b: PackedFile, progress: Progress = lambda _: None) -> dict[str, Any]:
    """JSON-ready. `progress` is called with the number of tensors just compared.

    Tensors of blobs whose stored chunk checksums agree are taken as equal and not read.
    """
    same_blobs, sources = _same_blobs(a, b), (a.index.sources.names, b.index.sources.names)
    tensors, num_unread = [], 0
    for name in _union(a.index.tensors.names, b.index.tensors.names):
        progress(1)
        if name not in a.tensors or name not in b.tensors:
            tensors.append({"name": name, "verdict": ONLY_A if name in a.tensors else ONLY_B})
            continue
        entry, unread = _compare_tensors(a.tensors[name], b.tensors[name], same_blobs, sources)
        num_unread += unread
        if entry["verdict"] != EQUAL:
            tensors.append(entry)
    counts = dict.fromkeys(VERDICTS, 0)
    for entry in tensors:
        counts[entry["verdict"]] += 1
    counts[EQUAL] = len(set(a.tensors) | set(b.tensors)) - len(tensors)
    result: dict[str, Any] = {
        "counts": counts,
        "equal_by_checksum": num_unread,
        "tensors": tensors,
        **{name: differences(*maps) for name, maps in _other_content(a, b).items()},
    }
    return {"identical": not tensors and not any(result[name] for name in OTHERS), **result}


def _other_content(a: PackedFile, b: PackedFile) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    def content(packed: PackedFile) -> dict[str, dict[str, Any]]:
        index = packed.index
        rope = {**index.rope.to_dict(), **index.rope.parameters, "positions": index.rope_positions}
        del rope["parameters"]
        rope["table"] = f"checksum {xxhash.xxh3_64_hexdigest(_stored_checksums(packed, _extent(packed, 'rope')))}"
        return {
            "config": index.config.to_dict(),
            "rope": rope,
            "sources": {
                row["name"]: {name: row[name] for name in ("dtype", "shape", "tensors")} for row in source_rows(packed)
            },
            "files": {file.name: f"{file.nbytes} bytes, sha256 {file.sha256.hex()}" for file in index.files},
            "provenance": index.provenance,
            "metadata": packed.header.metadata,
        }

    in_a, in_b = content(a), content(b)
    return {name: (in_a[name], in_b[name]) for name in in_a}


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Entries that are not the same in both maps; a side that lacks one has no key "a" or "b"."""
    result = []
    for name in _union(a, b):
        sides = {side: jsonable(values[name]) for side, values in (("a", a), ("b", b)) if name in values}
        if len(sides) < 2 or repr(sides["a"]) != repr(sides["b"]):  # repr tells True from 1 and nan from nan
            result.append({"name": str(name), **sides})
    return result


def _union(a: Iterable[str], b: Iterable[str]) -> list[str]:
    """Items of both in the order of `a`, then those of `b` alone."""
    return list(dict.fromkeys([*a, *b]))


def _extent(packed: PackedFile, name: str) -> Extent:
    return next(extent for extent in packed.extents[-3:] if extent.name == name)


def _stored_checksums(packed: PackedFile, extent: Extent) -> bytes:
    return packed.checksums[extent.first_chunk : extent.first_chunk + extent.num_chunks].tobytes()


def _same_blobs(a: PackedFile, b: PackedFile) -> set[str]:
    """Names of blobs with the same dtype, layout, shape and chunk checksums in both files."""
    keys = [
        {name: (_columns(packed, i), packed.extents[i]) for i, name in enumerate(packed.index.blobs.names)} for packed in (a, b)
    ]
    same = set()
    for name, (columns, extent) in keys[0].items():
        if name not in keys[1]:
            continue
        other_columns, other = keys[1][name]
        if columns == other_columns and _stored_checksums(a, extent) == _stored_checksums(b, other):
            same.add(name)
    return same


def _columns(packed: PackedFile, i: int) -> tuple[int, ...]:
    columns = packed.index.blobs.columns
    return tuple(int(columns[name][i]) for name in ("dtype", "layout", "rows", "columns", "nbytes"))


def _compare_tensors(
    a: PackedTensor, b: PackedTensor, same_blobs: set[str], sources: tuple[list[str], list[str]]
) -> tuple[dict[str, Any], bool]:
    """The verdict on a tensor that both files have, and whether checksums alone gave it; `sources` are each file's."""
    entry: dict[str, Any] = {"name": a.name, "verdict": EQUAL}
    if a.shape != b.shape:
        return {**entry, "verdict": SHAPE, "a": list(a.shape), "b": list(b.shape)}, False
    layouts = _layout(a, sources[0]), _layout(b, sources[1])
    if layouts[0] != layouts[1]:
        changed = [name for name in layouts[0] if layouts[0][name] != layouts[1][name]]
        entry["layout"] = {name: [layouts[0][name], layouts[1][name]] for name in changed}
        entry["verdict"] = LAYOUT
    dtypes = a.blob.dtype, b.blob.dtype
    if dtypes[0] != dtypes[1]:
        entry.update(verdict=DTYPE, dtype=list(dtypes))
    same_rows = a.entry.row_map == b.entry.row_map
    if a.blob.name == b.blob.name and a.blob.name in same_blobs and same_rows:
        return entry, True
    found = compare_values(a, b)
    if found is not None:
        values = {name: getattr(found, name) for name in found.__dataclass_fields__}
        values["first_at"] = found.first_at[: len(a.shape)]
        entry.update(verdict=VALUES, values=jsonable(values))
    elif dtypes == ("MXFP4", "MXFP4") and (blocks := _other_blocks(a, b)):
        entry.update(verdict=CODES, codes=dict(zip(("differing", "count"), blocks, strict=True)))
    return entry, False


def _layout(tensor: PackedTensor, sources: list[str]) -> dict[str, Any]:
    entry, blob, place = tensor.entry, tensor.blob, tensor.entry.placement
    held = place and [sources[place.source], place.start, place.row_stride, place.column_stride]
    return {
        "source_dtype": entry.source_dtype,
        "source": held,
        "scales": sources[place.scales] if place and entry.source_dtype == "MXFP4" else None,
        "blob": blob.name,
        "layout": blob.layout,
        "row_order": [entry.row_map.order, entry.row_map.base, entry.row_map.param],
        "stored_shape": [blob.rows, blob.columns],
        "image_offset": blob.offset,
    }


def compare_values(a: PackedTensor, b: PackedTensor) -> ValueDifference | None:
    """None when equal: bit for bit in one stored dtype, else as numbers; MXFP4 as the BF16 values that it decodes to.

    Reads both tensors side by side, a few MiB at a time.
    """
    differing, nonfinite, squares, largest = 0, 0, 0.0, 0.0
    first: tuple[tuple[int, int], tuple[float, float]] | None = None
    for start, bits_a, bits_b in _slice_pairs(a, b):
        if a.dtype == b.dtype and np.array_equal(bits_a, bits_b):
            continue
        left, right = widen(bits_a, a.dtype).astype(np.float64), widen(bits_b, b.dtype).astype(np.float64)
        if a.blob.dtype == b.blob.dtype:
            changed = bits_a != bits_b
        else:
            changed = (left != right) & ~(np.isnan(left) & np.isnan(right))
        places = np.flatnonzero(changed)
        if not places.size:
            continue
        differing += places.size
        left, right = left.flat[places], right.flat[places]
        if first is None:
            row, column = divmod(int(places[0]), bits_a.shape[1])
            first = (start + row, column), (float(left[0]), float(right[0]))
        finite = np.isfinite(left) & np.isfinite(right)
        nonfinite += places.size - int(np.count_nonzero(finite))
        error = np.abs(left[finite] - right[finite])
        squares += float(np.square(error).sum())
        largest = max(largest, float(error.max(initial=0.0)))
    if first is None:
        return None
    count = a.entry.rows * a.entry.columns
    return ValueDifference(differing, count, largest, math.sqrt(squares / count), nonfinite, *first)


def _slice_pairs(a: PackedTensor, b: PackedTensor) -> Iterator[tuple[int, Bits, Bits]]:
    """(first row, bits of A, bits of B) of the same rows of two tensors of one shape."""
    if "vector" in (a.blob.layout, b.blob.layout):
        columns = a.entry.columns
        yield 0, a.bits().reshape(-1, columns), b.bits().reshape(-1, columns)
        return
    for start, stop in _slices(a, b):
        yield start, a.rows(start, stop), b.rows(start, stop)


def _slices(a: PackedTensor, b: PackedTensor) -> Iterator[tuple[int, int]]:
    """Ranges of rows that can be read of both matrices."""
    unit = math.lcm(rows_per_unit(a.entry), rows_per_unit(b.entry), TILE_ROWS)
    row_bytes = a.entry.columns * max(ITEM_BYTES[a.dtype], ITEM_BYTES[b.dtype])
    count = max(1, _SLICE_BYTES // row_bytes // unit) * unit
    for start in range(0, a.entry.rows, count):
        yield start, min(start + count, a.entry.rows)


def _other_blocks(a: PackedTensor, b: PackedTensor) -> tuple[int, int] | None:
    """Of two MXFP4 tensors of equal values, the blocks whose codes or scales differ, and all blocks; None when all agree."""
    differing, count = 0, 0
    for start, stop in _slices(a, b):
        left, right = a.quantised_rows(start, stop), b.quantised_rows(start, stop)
        differing += int(np.count_nonzero((left.codes != right.codes).any(axis=2) | (left.scales != right.scales)))
        count += left.scales.size
    return (differing, count) if differing else None
