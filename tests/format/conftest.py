"""Shared by the tests of the format: the golden files, and the tools that take files apart."""

import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder specs/golden."""
    return REPOSITORY / "specs" / "golden"


@pytest.fixture(scope="session")
def minimal(golden: Path) -> bytes:
    """The smallest valid file."""
    return (golden / "valid" / "minimal.lith").read_bytes()


@pytest.fixture
def copied(golden: Path, tmp_path: Path):
    """A function that copies a valid golden file to a temporary folder and gives its path."""

    def copy(name: str) -> Path:
        path = tmp_path / f"{name}.lith"
        path.write_bytes((golden / "valid" / f"{name}.lith").read_bytes())
        return path

    return copy
