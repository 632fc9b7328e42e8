"""Servers that tests share: the tiny model on NumPy, and the echo engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ServerProcess
from serving_models import serving_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving_model(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[ServerProcess]:
    """The NumPy backend."""
    with ServerProcess(model) as running:
        yield running


@pytest.fixture(scope="session")
def slow(model: Path) -> Iterator[ServerProcess]:
    """The echo engine, two sequences at a time, 20 ms a pass, a short queue."""
    options = (
        "--backend",
        "echo",
        "--max-sequences",
        "2",
        "--max-queue",
        "4",
        "--echo-step-ms",
        "20",
        "--max-batch-tokens",
        "64",
    )
    with ServerProcess(model, *options) as running:
        yield running
