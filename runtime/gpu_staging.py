"""What the host sends for one pass: int32 fields packed into pinned memory, one copy to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIELD_ALIGNMENT = 16
_RING = 4  # passes whose memory may still be read by a copy


class Staging:
    """A ring of pinned host buffers and the one device buffer that they are copied to."""

    def __init__(self, cupy: Any, device_address: int, nbytes: int) -> None:
        self._cuda, self._device, self._nbytes = cupy.cuda, device_address, nbytes
        self._memory = [cupy.cuda.alloc_pinned_memory(nbytes) for _ in range(_RING)]
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(_RING)]
        self._turn = 0

    def send(self, fields: Sequence[NDArray[np.int32]], stream: Any) -> list[int]:
        """Device address of each field, once the stream gets there."""
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


class PinnedRows:
    """Rows of int32 on their way to rows of a device table."""

    def __init__(self, cupy: Any, width: int) -> None:
        self._cuda, self._width = cupy.cuda, width
        self._memory = [cupy.cuda.alloc_pinned_memory(4 * width) for _ in range(4 * _RING)]
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in self._memory]
        self._turn = 0

    def send(self, values: Sequence[int] | NDArray[np.int32], address: int, stream: Any) -> None:
        """Copy to a device address."""
        memory, event = self._memory[self._turn], self._events[self._turn]
        self._turn = (self._turn + 1) % len(self._memory)
        event.synchronize()
        np.frombuffer(memory, np.int32, self._width)[: len(values)] = values
        self._cuda.runtime.memcpyAsync(address, memory.ptr, 4 * len(values), self._cuda.runtime.memcpyHostToDevice, stream.ptr)
        event.record(stream)
