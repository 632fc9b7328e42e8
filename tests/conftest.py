"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes  # noqa: F401 - teaches NumPy, and safetensors with it, the name bfloat16
import pytest
from golden_models import GoldenModel
from hypothesis import HealthCheck, settings

# the same examples in every run, however slow the machine; tools/fuzz_reader.py looks for new ones
settings.register_profile("megalith", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("megalith")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> GoldenModel:
    """The golden model that the test's parameter names."""
    return GoldenModel(request.param)


@pytest.fixture
def packed_llama(tmp_path: Path) -> Path:
    """A small packed file."""
    return GoldenModel("llama2").pack(tmp_path)
