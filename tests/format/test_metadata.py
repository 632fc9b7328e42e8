"""Editing metadata in place: the header block changes, nothing else does."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packed_parts import read_everything

from megalith.format.constants import HEADER_BYTES
from megalith.format.errors import CorruptionError, FileError, RequestError
from megalith.format.metadata import edit_metadata
from megalith.format.reader import PackedFile

Copied = Callable[[str], Path]


def metadata_of(path: Path) -> dict[str, Any]:
    with PackedFile(path) as packed:
        return packed.header.metadata


@pytest.mark.parametrize("name", ["minimal", "metadata"])
def test_set_change_and_remove(copied: Copied, name: str):
    path = copied(name)
    before = path.read_bytes()
    for metadata in ({"note": "é \u4e2d", "n": -5, "x": 0.25, "ok": False}, {"b": 2**64 - 1}, {"text": "x" * 3000}):
        edit_metadata(path, metadata)
        assert metadata_of(path) == metadata
        assert path.read_bytes()[HEADER_BYTES:] == before[HEADER_BYTES:]
        assert path.read_bytes()[:36] == before[:36]
        read_everything(path)
    edit_metadata(path, {})
    assert metadata_of(path) == {}


def test_removing_gives_the_first_bytes(copied: Copied, minimal: bytes):
    path = copied("minimal")
    edit_metadata(path, {"a": 1})
    assert path.read_bytes() != minimal
    edit_metadata(path, {})
    assert path.read_bytes() == minimal


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": "x" * 3100},
        {"a": [1]},
        {"a": {}},
        {"a": None},
        {"a": float("nan")},
        {"a": float("inf")},
        {"a": 2**64},
        {"a": "\ud800"},
        {1: "a"},
        {"a": object()},
        {"a": b"bytes"},
        {str(i): i for i in range(200)},
    ],
    ids=lambda metadata: f"{len(metadata)}-{type(next(iter(metadata.values()))).__name__}",
)
def test_what_does_not_fit_changes_nothing(copied: Copied, metadata: Any):
    path = copied("metadata")
    before = path.read_bytes()
    with pytest.raises(RequestError, match=r"\[H9\]$") as caught:
        edit_metadata(path, metadata)
    assert caught.value.exit_code == 2
    assert path.read_bytes() == before


def test_broken_file_is_not_touched(copied: Copied):
    path = copied("minimal")
    data = bytearray(path.read_bytes())
    data[4200] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError, match="S4"):
        edit_metadata(path, {"a": 1})
    assert path.read_bytes() == data


def test_locked_file(copied: Copied):
    path = copied("minimal")
    with path.open("rb") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(FileError, match="another process is writing it"):
            edit_metadata(path, {"a": 1})


def test_changed_meanwhile(copied: Copied, golden: Path, monkeypatch: pytest.MonkeyPatch):
    path, real_open = copied("minimal"), os.open

    def replacing_open(target: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_RDWR:
            path.write_bytes((golden / "valid" / "dense.lith").read_bytes())
        return real_open(target, flags, *rest, **more)

    monkeypatch.setattr(os, "open", replacing_open)
    with pytest.raises(FileError, match="changed while its metadata was edited"):
        edit_metadata(path, {"a": 1})
    assert metadata_of(path) == {}


def test_one_write_and_sync(copied: Copied, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    real_write, real_sync = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: (calls.append((len(data), at)), real_write(fd, data, at))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_sync(fd))[1])
    edit_metadata(copied("minimal"), {"a": 1})
    assert calls == [(4096, 0), "fsync"]


def test_missing_file(tmp_path: Path):
    with pytest.raises(FileError, match="No such file"):
        edit_metadata(tmp_path / "missing.lith", {"a": 1})
