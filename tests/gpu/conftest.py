"""The device of the kernel tests; a test that asks for it is skipped where there is none."""

from __future__ import annotations

import pytest
from gpu_device import GpuDevice, open_device


@pytest.fixture(scope="session")
def _device() -> GpuDevice | None:
    return open_device()


@pytest.fixture(scope="module")
def gpu(_device: GpuDevice | None) -> GpuDevice:
    """The device, its stream idle at the end of each module."""
    if _device is None:
        pytest.skip("no CuPy or no CUDA device")
    return _device
