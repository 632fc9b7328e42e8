"""A Hugging Face checkpoint folder as a converter may believe it: JSON, safetensors ranges and tokenizer files.

Nothing is unpickled, no code of the checkpoint is run, no path leaves the folder.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path, PurePosixPath
from typing import Any

from megalith.format.constants import MAX_AUXILIARY_FILE_BYTES
from megalith.format.dtypes import Bits
from megalith.format.errors import CheckpointError, FileError, RequestError, UnsupportedError, printable
from megalith.format.files import FILE_NAMES

from .safetensors_header import SourceTensor, load_json, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Checkpoint:
    """An opened checkpoint folder. `tensors` lists every tensor, `config` is the parsed config.json."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        try:
            if not self.folder.is_dir():
                raise RequestError(f"{printable(self.folder)}: not a folder: a checkpoint is a folder with config.json")
            self.files = self._read_files()
            self.config = self.json("config.json")
            self._refuse_code()
            self.tensors = self._read_tensors()
            self.identity = self._identity()
        except OSError as error:
            raise FileError.wrap(error.filename or self.folder, error) from None

    def _read_files(self) -> dict[str, bytes]:
        if not (self.folder / "config.json").is_file():
            raise CheckpointError(f"{printable(self.folder)}: config.json is missing")
        files = {}
        for name in FILE_NAMES:
            if os.path.lexists(self.folder / name):
                files[name] = _read_small(self._inside(name))
        return files

    def json(self, name: str) -> dict[str, Any]:
        """The parsed JSON object of a file of the folder; empty when it is absent."""
        if name not in self.files:
            return {}
        value = load_json(self.files[name], printable(self.folder / name))
        if not isinstance(value, dict):
            raise CheckpointError(f"{printable(self.folder / name)}: not a JSON object")
        return value

    def _refuse_code(self) -> None:
        if "auto_map" in self.config:
            place = printable(self.folder / "config.json")
            raise UnsupportedError(f"{place}: auto_map asks to run code of the checkpoint, which is never done")

    def _inside(self, name: str) -> Path:
        """`name` within the folder; CheckpointError for absolute paths, `..` and symlinks that leave it."""
        pure = PurePosixPath(name)
        place = f"{printable(self.folder)}: file '{printable(name)}'"
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not pure.parts:
            raise CheckpointError(f"{place}: must be a relative path inside the folder")
        path = self.folder / pure
        try:
            resolved, root = Path(os.path.realpath(path)), Path(os.path.realpath(self.folder))
        except ValueError:  # lone surrogates
            raise CheckpointError(f"{place}: is not a file name") from None
        # the hub's cache links snapshots/REV/NAME to ../../blobs/HASH
        allowed = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
        if not any(resolved.is_relative_to(base) for base in allowed):
            raise CheckpointError(f"{place}: is a symlink that leaves the folder")
        try:
            if not resolved.is_file():
                raise CheckpointError(f"{place}: is missing")
        except OSError as error:
            raise FileError(f"{place}: {error.strerror}") from None
        return path

    def _read_tensors(self) -> dict[str, SourceTensor]:
        if os.path.lexists(self.folder / INDEX_NAME):
            return self._read_sharded()
        if not os.path.lexists(self.folder / SINGLE_NAME):
            pickled = sorted(path.name for path in self.folder.iterdir() if path.suffix in _PICKLED)
            hint = f": {printable(pickled[0])} is a pickle, which is never loaded" if pickled else ""
            raise CheckpointError(f"{printable(self.folder)}: neither {SINGLE_NAME} nor {INDEX_NAME} is there{hint}")
        return read_header(self._inside(SINGLE_NAME))

    def _read_sharded(self) -> dict[str, SourceTensor]:
        place = printable(self.folder / INDEX_NAME)
        raw = load_json(_read_small(self._inside(INDEX_NAME)), place)
        weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{place}: has no weight_map from tensor to file")
        shards = {name: read_header(self._inside(name)) for name in sorted(set(weight_map.values()))}
        tensors: dict[str, SourceTensor] = {}
        for shard, contents in shards.items():
            for name, tensor in contents.items():
                if weight_map.get(name) != shard:
                    where = weight_map.get(name, "nothing")
                    raise CheckpointError(
                        f"{place}: maps '{printable(name)}' to {printable(where)}, but {printable(shard)} holds it too"
                    )
                tensors[name] = tensor
        missing = sorted(set(weight_map) - set(tensors))
        if missing:
            shard = weight_map[missing[0]]
            raise CheckpointError(f"{place}: '{printable(missing[0])}' is not in {printable(shard)}, where the index puts it")
        return tensors

    def _identity(self) -> list[list[Any]]:
        """Names, sizes and times of the weight files: enough to notice that they were written to or replaced."""
        stats = [(path, path.stat()) for path in sorted({tensor.path for tensor in self.tensors.values()})]
        # nobody can set the time of the last status change
        return [[path.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for path, s in stats]

    def check_unchanged(self) -> None:
        """CheckpointError when a weight file was written to or replaced since the checkpoint was opened."""
        try:
            found = self._identity()
        except OSError as error:
            raise FileError.wrap(error.filename, error) from None
        for before, now in zip(self.identity, found, strict=True):
            if before != now:
                raise CheckpointError(f"{printable(self.folder / now[0])}: changed while it was read")

    def read_elements(self, tensor: SourceTensor, start: int, target: Bits) -> None:
        """Fill contiguous `target`, of any shape, with the tensor's elements from `start`; safe from several threads."""
        view = target.data.cast("B")
        offset = tensor.offset + start * target.itemsize
        while view:
            try:
                count = os.preadv(self._descriptor(tensor.path), [view], offset)
            except OSError as error:
                raise FileError.wrap(tensor.path, error) from None
            if not count:
                raise FileError(f"{printable(tensor.path)}: ends at byte {offset}, inside '{printable(tensor.name)}'")
            view, offset = view[count:], offset + count

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise FileError.wrap(path, error) from None
            return self._descriptors[path]

    def close(self) -> None:
        """Close the weight files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_small(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_AUXILIARY_FILE_BYTES:
            raise CheckpointError(f"{printable(path)}: larger than {MAX_AUXILIARY_FILE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise FileError.wrap(path, error) from None
