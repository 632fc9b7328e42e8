"""The first GPU's context, made early: it takes the driver a few tenths of a second, in which a command imports and reads.

For commands only: a program that uses this package may have chosen another device.
"""

from __future__ import annotations

from functools import cache
from threading import Thread


@cache
def wake_device() -> None:
    """Start making the context in a thread, once in a process. Whatever fails is left to whoever uses the device to report."""
    Thread(target=_retain_context, name="wake device", daemon=True).start()


def _retain_context() -> None:
    """The primary context, which the CUDA runtime and CuPy share; it is kept until the process ends."""
    try:
        from cuda.bindings import driver

        driver.cuInit(0)
        status, device = driver.cuDeviceGet(0)
        if status == driver.CUresult.CUDA_SUCCESS:
            driver.cuDevicePrimaryCtxRetain(device)
    except (ImportError, RuntimeError):
        pass
