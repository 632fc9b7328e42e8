"""Comparing a packed file with the checkpoint it is said to come from, bit by bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megalith.format.dtypes import Bits
from megalith.format.errors import CheckpointError
from megalith.format.index import encode_index
from megalith.format.model import PartSpec
from megalith.format.reader import PackedFile
from megalith.format.tensors import PackedTensor, rows_per_unit

from .part_reader import PartReader
from .plan import Options, make_plan
from .source import Checkpoint

_SLICE_BYTES = 2 << 20

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Mismatch:
    """One thing that differs; `detail` names the place and both values."""

    name: str
    detail: str


def compare_with_checkpoint(
    packed: PackedFile, folder: str | os.PathLike[str], jobs: int, progress: Progress = lambda _: None
) -> list[Mismatch]:
    """Every tensor, in the stored dtype, and every stored file that differs from the checkpoint's; empty when all agree.

    The checkpoint is planned with the options that the packed file records; what cannot be planned raises as in `convert`.
    """
    recorded = packed.index.provenance.get("options", {})
    try:
        options = Options(**recorded)
    except TypeError:
        raise CheckpointError(f"{packed.path}: records options of another version: {recorded}") from None
    with Checkpoint(folder) as checkpoint:
        plan = make_plan(checkpoint, options)
        mismatches = _compare_files(packed, checkpoint)
        if not mismatches and bytes(encode_index(packed.index)) != plan.index_bytes:
            mismatches.append(Mismatch("index", "the checkpoint's config, names, shapes or options give another index"))
        parts = {plan.mapping.parts[part.role].name: part for spec in plan.specs for part in spec.parts}
        for name in sorted(set(parts) ^ set(packed.tensors)):
            mismatches.append(Mismatch(name, "only in the checkpoint" if name in parts else "only in the packed file"))

        def compare(tensor: PackedTensor) -> Mismatch | None:
            part = parts[tensor.name]
            reader = PartReader(checkpoint, plan.mapping.parts[part.role], part, tensor.blob.dtype, options)
            return _compare_tensor(tensor, part, reader, progress)

        with ThreadPoolExecutor(jobs, thread_name_prefix="compare") as pool:
            found = pool.map(compare, (packed.tensors[name] for name in packed.tensors if name in parts))
            return mismatches + [mismatch for mismatch in found if mismatch]


def _compare_files(packed: PackedFile, checkpoint: Checkpoint) -> list[Mismatch]:
    mismatches = []
    for name in sorted(set(checkpoint.files) | set(packed.file_names())):
        if name not in checkpoint.files or name not in packed.file_names():
            where = "packed file" if name in packed.file_names() else "checkpoint"
            mismatches.append(Mismatch(name, f"only in the {where}"))
        elif checkpoint.files[name] != packed.file(name):
            mismatches.append(Mismatch(name, "contents differ"))
    return mismatches


def _compare_tensor(tensor: PackedTensor, part: PartSpec, reader: PartReader, progress: Progress) -> Mismatch | None:
    entry = tensor.entry
    if (entry.rows, entry.columns) != (part.rows, part.columns):
        return Mismatch(entry.name, f"shape {list(entry.shape)}, the checkpoint has {part.rows} x {part.columns}")
    unit = rows_per_unit(entry)
    count = max(1, _SLICE_BYTES // (entry.columns * 4) // unit) * unit
    for start in range(0, entry.rows, count):
        stop = min(start + count, entry.rows)
        found, expected = _both(tensor, reader, start, stop)
        progress(found.nbytes)
        if not np.array_equal(found, expected):
            row, column = (int(i) for i in np.argwhere(found != expected)[0])
            what = "byte of codes or scales" if tensor.blob.dtype == "MXFP4" else "column"
            values = f"{found[row, column]:#06x}, the checkpoint gives {expected[row, column]:#06x}"
            return Mismatch(entry.name, f"row {start + row}, {what} {column} holds {values}")
    return None


def _both(tensor: PackedTensor, reader: PartReader, start: int, stop: int) -> tuple[Bits, Bits]:
    """Rows as they are stored and as the checkpoint gives them: elements, or MXFP4 codes followed by scales."""
    if tensor.blob.dtype != "MXFP4":
        return tensor.rows(start, stop), reader.rows(start, stop)
    sides = tensor.quantised_rows(start, stop), reader.quantised_rows(start, stop)
    found, expected = (np.concatenate((side.codes.reshape(stop - start, -1), side.scales), axis=1) for side in sides)
    return found, expected
