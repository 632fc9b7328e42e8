"""What the host sends for one pass: int32 fields packed into pinned memory, one copy to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIELD_ALIGNMENT = 16
_RING = 4  # passes whose memory may still be read by a copy
_COPIES = 16


class Staging:
    """A ring of pinned host buffers and the one device buffer that they are copied to."""

    def __init__(self, cupy: Any, device_address: int, nbytes: int) -> None:
        self._cuda, self._device, self._nbytes = cupy.cuda, device_address, nbytes
        self._memory = [cupy.cuda.alloc_pinned_memory(nbytes) for _ in range(_RING)]
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(_RING)]
        self._turn = 0

    def send(self, fields: Sequence[NDArray[np.signedinteger[Any]]], stream: Any) -> list[int]:
        """Device address of each field, as int32, once the stream gets there."""
        memory, event = self._memory[self._turn], self._events[self._turn]
        self._turn = (self._turn + 1) % _RING
        event.synchronize()
        view = np.frombuffer(memory, np.uint8, self._nbytes)
        addresses, at = [], 0
        for values in fields:
            flat = np.ascontiguousarray(values, np.int32).reshape(-1).view(np.uint8)
            view[at : at + flat.size] = flat
            addresses.append(self._device + at)
            at += -(-flat.size // FIELD_ALIGNMENT) * FIELD_ALIGNMENT
        self._cuda.runtime.memcpyAsync(self._device, memory.ptr, at, self._cuda.runtime.memcpyHostToDevice, stream.ptr)
        event.record(stream)
        return addresses


class PinnedCopies:
    """Small pieces of host memory on their way to places on the device."""

    def __init__(self, cupy: Any, nbytes: int) -> None:
        self._cuda, self._nbytes = cupy.cuda, nbytes
        self._memory = [cupy.cuda.alloc_pinned_memory(nbytes) for _ in range(_COPIES)]
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in self._memory]
        self._turn = 0

    def send(self, values: NDArray[Any], address: int, stream: Any) -> None:
        """Copy to a device address; at most the planned number of bytes."""
        memory, event = self._memory[self._turn], self._events[self._turn]
        self._turn = (self._turn + 1) % len(self._memory)
        event.synchronize()
        flat = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        np.frombuffer(memory, np.uint8, self._nbytes)[: flat.size] = flat
        runtime = self._cuda.runtime
        runtime.memcpyAsync(address, memory.ptr, flat.size, runtime.memcpyHostToDevice, stream.ptr)
        event.record(stream)
