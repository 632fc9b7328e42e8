"""Writing a checkpoint back out of a packed file: safetensors shards, config and tokenizer files as they were.

Tensors stream through slices, so memory stays small whatever their size. The folder appears under its name only when
it is complete.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megalith.format.dtypes import ITEM_BYTES
from megalith.format.errors import FileError, RequestError, printable
from megalith.format.reader import PackedFile
from megalith.format.tensors import PackedSource, PackedTensor
from megalith.format.writer import fsync_folder

from .source import INDEX_NAME, SINGLE_NAME

SHARD_BYTES = 5_000_000_000  # as transformers shards
_HF_DTYPES = {"BF16": "bfloat16", "F16": "float16"}

Progress = Callable[[int], object]
CheckpointTensor = PackedTensor | PackedSource


@dataclass(frozen=True)
class Unpacked:
    """What was written."""

    files: list[str]
    tensors: int
    nbytes: int
    converted: bool


def unpack(packed: PackedFile, folder: str | os.PathLike[str], progress: Progress = lambda _: None) -> Unpacked:
    """Write the checkpoint into `folder`, which must not exist or be empty; nothing is there unless it is complete.

    Every weight has the bits that the packed file holds; where the conversion changed the dtype, config.json's dtype
    is changed with it and `converted` is true.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(f"{printable(target)}: exists and is not an empty folder")
    if not target.name:
        raise RequestError(f"{printable(target)}: is where the command runs; name a folder in it")
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        result = _write_folder(packed, partial, progress)
        fsync_folder(partial)
        partial.rename(target)  # takes the place of an empty folder, and of nothing else
        fsync_folder(target.parent)
    except OSError as error:
        raise FileError.wrap(target, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after the rename there is none
    return result


def _write_folder(packed: PackedFile, folder: Path, progress: Progress) -> Unpacked:
    converted = any(t.blob.dtype != t.entry.source_dtype for t in packed.tensors.values())
    for name in packed.file_names():
        data = packed.file(name)
        _write_file(folder / name, _with_dtype(data, packed) if name == "config.json" and converted else data)
    shards = _shards(packed)
    names = [SINGLE_NAME]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(_nbytes(tensor) for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_file(folder / INDEX_NAME, json.dumps(index, indent=2).encode() + b"\n")
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            _write_shard(file, shard, progress)
            file.flush()
            os.fsync(file.fileno())
    written = sorted(path.name for path in folder.iterdir())
    nbytes = sum((folder / name).stat().st_size for name in written)
    return Unpacked(written, len(packed.tensors), nbytes, converted)


def _shards(packed: PackedFile) -> list[list[CheckpointTensor]]:
    shards: list[list[CheckpointTensor]] = [[]]
    filled = 0
    for tensor in packed.tensors.checkpoint():
        if filled and filled + _nbytes(tensor) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += _nbytes(tensor)
    return shards


def _nbytes(tensor: CheckpointTensor) -> int:
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def _write_shard(file: BinaryIO, tensors: list[CheckpointTensor], progress: Progress) -> None:
    """One safetensors file; its header is written with JSON as the format's README defines it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + _nbytes(tensor)
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        for piece in tensor.pieces():
            file.write(piece.tobytes())
            progress(piece.nbytes)


def _write_file(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _with_dtype(config: bytes, packed: PackedFile) -> bytes:
    """config.json with the dtype that most of the weights now have."""
    raw = json.loads(config)
    dtypes = [tensor.dtype for tensor in packed.tensors.values() if tensor.blob.layout != "vector"]
    name = _HF_DTYPES.get(max(set(dtypes), key=dtypes.count))
    for key in [key for key in ("torch_dtype", "dtype") if key in raw] or ["torch_dtype"]:
        raw[key] = name
    return json.dumps(raw, indent=2, ensure_ascii=False).encode() + b"\n"
