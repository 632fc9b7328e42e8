"""The header of a safetensors file, believed only after every entry is checked.

The `safetensors` library maps whole files and reads no bfloat16 into NumPy; a converter that promises bounded memory and
no SIGBUS needs the byte ranges alone, and those are a length and some JSON. Format: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalith.format.constants import MAX_DIMENSION, MAX_TENSORS
from megalith.format.errors import CheckpointError, FileError, printable

MAX_HEADER_BYTES = 64 << 20
_MAX_DIMENSIONS = 8
_MAX_JSON_VALUES = 10 * MAX_TENSORS  # a tensor's header entry is 8 for two dimensions
_MAX_JSON_DEPTH = 32
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class SourceTensor:
    """Where one tensor's row-major bytes lie."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def load_json(text: bytes, place: str) -> Any:
    """JSON without duplicate keys; CheckpointError otherwise."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{place}: duplicate key '{printable(twice)}'")
        return result

    if text.count(b",") + text.count(b"[") + text.count(b"{") > _MAX_JSON_VALUES:
        raise CheckpointError(f"{place}: more than {_MAX_JSON_VALUES} JSON values")
    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place}: not JSON: {printable(error)}") from None
    _check_depth(value, place)
    return value


def _check_depth(value: Any, place: str) -> None:
    """Deeper values than any checkpoint has would exhaust the stack of whoever prints or compares them."""
    level = [value]
    for _ in range(_MAX_JSON_DEPTH):
        parents = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in parents for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return
    raise CheckpointError(f"{place}: JSON is nested deeper than {_MAX_JSON_DEPTH}")


def read_header(path: Path) -> dict[str, SourceTensor]:
    """Every tensor of a safetensors file by name: ranges inside the file, without overlap or hole."""
    shown = printable(path)
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or length > min(MAX_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(f"{shown}: header of {length} bytes in a file of {file_bytes}: not safetensors")
            text = file.read(length)
    except OSError as error:
        raise FileError.wrap(path, error) from None
    if len(text) != length:
        raise CheckpointError(f"{shown}: header ends early")
    raw = load_json(text, f"{shown}: header")
    if not isinstance(raw, dict):
        raise CheckpointError(f"{shown}: header is not a JSON object")
    raw.pop("__metadata__", None)
    if len(raw) > MAX_TENSORS:
        raise CheckpointError(f"{shown}: {len(raw)} tensors, at most {MAX_TENSORS} are allowed")
    tensors = {name: _tensor(name, entry, path, 8 + length) for name, entry in raw.items()}
    _check_coverage(list(tensors.values()), 8 + length, file_bytes, shown)
    return tensors


def _tensor(name: str, entry: Any, path: Path, data_start: int) -> SourceTensor:
    place = f"{printable(path)}: tensor '{printable(name)}'"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise CheckpointError(f"{place}: header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{place}: dtype {printable(dtype)} is not known")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(_is_count(n, MAX_DIMENSION) for n in shape):
        raise CheckpointError(f"{place}: shape {printable(shape)}: dimensions must be 0 to {MAX_DIMENSION}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n, 2**62) for n in offsets):
        raise CheckpointError(f"{place}: data_offsets {printable(offsets)} are not two byte offsets")
    nbytes = math.prod(shape) * _ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(f"{place}: data_offsets {offsets} do not span the {nbytes} bytes of {dtype} {shape}")
    return SourceTensor(name, path, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _is_count(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _check_coverage(tensors: list[SourceTensor], start: int, file_bytes: int, shown: str) -> None:
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != start:
            raise CheckpointError(
                f"{shown}: tensor '{printable(tensor.name)}' starts at byte {tensor.offset}, expected {start}: overlap or hole"
            )
        start += tensor.nbytes
    if start != file_bytes:
        raise CheckpointError(f"{shown}: tensors end at byte {start}, the file at {file_bytes}")
