"""Copies from host to device as `loading` needs them: pinned memory, registered memory, asynchronous copies."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections import deque
from itertools import count
from typing import Any, Protocol

from .launch import check, cuda_driver

_HUGE_PAGE_BYTES = 2 << 20


class Copier(Protocol):
    """A device that takes copies; calls come from several threads."""

    def attach(self) -> None:
        """Make the device current in the calling thread."""

    def register(self, address: int, nbytes: int) -> bool:
        """Pin mapped, read-only pages for direct copies; False when that is refused. Never touches the pages itself."""

    def unregister(self, address: int) -> None:
        """Undo `register`; no copy from there is under way."""

    def allocate_pinned(self, nbytes: int) -> int:
        """Address of new page-locked host memory, aligned to pages."""

    def free_pinned(self, address: int) -> None:
        """Undo `allocate_pinned`."""

    def copy(self, target: int, source: int, nbytes: int) -> object:
        """Enqueue a copy from pinned or registered memory; what to `wait` for."""

    def wait(self, copied: object) -> None:
        """Until a copy and all those before it are complete."""


class CudaCopier:
    """The current CUDA context, copies on streams in turn. Events are used again, and kept until the process ends."""

    def __init__(self, *streams: int, driver: Any = None) -> None:
        self._driver = driver if driver is not None else cuda_driver()
        self._streams = [self._driver.CUstream(stream) for stream in streams]
        self._turn, self._events = count(), deque[Any]()
        self._pinned: dict[int, mmap.mmap] = {}
        self._context = self._call("cuCtxGetCurrent")
        attributes = self._driver.CUdevice_attribute
        device = self._call("cuCtxGetDevice")
        supports = attributes.CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED
        # where the device reads through the host's page tables, registering pins nothing, and a truncated file faults
        shares = attributes.CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES
        self._can_register = bool(self._call("cuDeviceGetAttribute", supports, device)) and not self._call(
            "cuDeviceGetAttribute", shares, device
        )

    def _call(self, name: str, *arguments: Any) -> Any:
        return check(getattr(self._driver, name)(*arguments), f"loading: {name}", self._driver)

    def attach(self) -> None:
        """Make the context current in the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def register(self, address: int, nbytes: int) -> bool:
        """By cuMemHostRegister, read-only."""
        if not self._can_register:
            return False
        (status,) = self._driver.cuMemHostRegister(address, nbytes, self._driver.CU_MEMHOSTREGISTER_READ_ONLY)
        return bool(status == self._driver.CUresult.CUDA_SUCCESS)

    def unregister(self, address: int) -> None:
        """By cuMemHostUnregister."""
        self._call("cuMemHostUnregister", address)

    def allocate_pinned(self, nbytes: int) -> int:
        """Huge pages where the system gives them, touched here and pinned by cuMemHostRegister: several threads do that at
        once, while cuMemHostAlloc takes 0.4 ms a MiB, one after the other (docs/performance.md).
        """
        memory = mmap.mmap(-1, nbytes + _HUGE_PAGE_BYTES)
        start = ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))
        address = -(-start // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        ctypes.memset(address, 0, nbytes)
        self._call("cuMemHostRegister", address, nbytes, 0)
        self._pinned[address] = memory
        return address

    def free_pinned(self, address: int) -> None:
        """By cuMemHostUnregister."""
        self._call("cuMemHostUnregister", address)
        del self._pinned[address]

    def copy(self, target: int, source: int, nbytes: int) -> object:
        """On the next stream, with an event behind it."""
        stream = self._streams[next(self._turn) % len(self._streams)]
        self._call("cuMemcpyHtoDAsync", target, source, nbytes, stream)
        event = self._event()
        self._call("cuEventRecord", event, stream)
        return event

    def _event(self) -> Any:
        try:
            return self._events.popleft()
        except IndexError:
            return self._call("cuEventCreate", self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value)

    def wait(self, copied: object) -> None:
        """Once for each copy: its event then serves another."""
        self._call("cuEventSynchronize", copied)
        self._events.append(copied)
