"""A tiny checkpoint, where its conversion goes, and the bytes that it must have."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from faults import leftovers

from megalith.converter.convert import convert


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", files={"merges.txt": b"a b\n"})


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model.lith"


@pytest.fixture
def reference(tmp_path: Path, source: Path, target: Path) -> bytes:
    """The bytes of an undisturbed conversion."""
    path = tmp_path / "reference.lith"
    convert(source, path, jobs=1)
    assert leftovers(tmp_path) == []
    target.parent.mkdir()
    return path.read_bytes()
