"""One GPU for kernel tests and benches: arrays, compiling by name, launching, timing."""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from megalith.runtime.compile import Build, compiled
from megalith.runtime.launch import Dim3, Kernel, Module

# vendor's figures; the clocks that the driver reports give up to 2.5 % more
_NOMINAL_GBYTES_PER_S = {"H200": 4800.0, "H100 PCIe": 2000.0, "H100 NVL": 3900.0, "H100": 3350.0}
_SUFFIXED = {90: "sm_90a"}  # wgmma needs the architecture-specific target
_MIN_GRAPH_SECONDS = 2e-3
_MAX_GRAPH_CALLS = 200


def open_device() -> GpuDevice | None:
    """The current device; None where CuPy or a device is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy warns about toolkits that it does not find and that we do not use
        try:
            import cupy
        except ImportError:
            return None
    try:
        if cupy.cuda.runtime.getDeviceCount() < 1:
            return None
    except cupy.cuda.runtime.CUDARuntimeError:
        return None
    return GpuDevice(cupy)


class GpuDevice:
    """The first device, with a stream of its own that CuPy uses too."""

    def __init__(self, cupy: Any) -> None:
        self.cupy = cupy
        self.device = cupy.cuda.Device(0)
        self.device.use()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.stream.use()
        if os.environ.get("MEGALITH_TEST_POOL") == "0":  # each array an allocation of its own: see gpu_sanitize.py
            cupy.cuda.set_allocator(None)
        self._modules: dict[Build, Module] = {}
        self._kernels: dict[tuple[Build, str], Kernel] = {}
        properties = cupy.cuda.runtime.getDeviceProperties(self.device.id)
        self.name: str = properties["name"].decode()
        self.num_sms = int(properties["multiProcessorCount"])
        self.shared_limit = int(properties["sharedMemPerBlockOptin"])
        self.l2_bytes = int(properties["l2CacheSize"])
        self.capability = 10 * int(properties["major"]) + int(properties["minor"])

    @property
    def arch(self) -> str:
        """What kernels are compiled for here, such as "sm_90a"."""
        return _SUFFIXED.get(self.capability, f"sm_{self.capability}")

    @cached_property
    def nominal_gbytes_per_s(self) -> float:
        """Memory bandwidth by the vendor's figure, for unknown cards by the clock that the driver reports."""
        for name, rate in _NOMINAL_GBYTES_PER_S.items():
            if name in self.name:
                return rate
        attributes = self.device.attributes
        return float(2e3 * attributes["MemoryClockRate"] * attributes["GlobalMemoryBusWidth"] / 8 / 1e9)

    def compile(self, source: str, entry: str, **defines: int | str) -> Kernel:
        """Entry point `entry` of `source`.cu with -D options, compiled for this device."""
        build = Build.of(source, self.arch, **defines)
        if build not in self._modules:
            self._modules[build] = Module(build, compiled(build))
        if (build, entry) not in self._kernels:
            self._kernels[build, entry] = self._modules[build].kernel(entry)
        return self._kernels[build, entry]

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, args: Any, shared_bytes: int = 0, pdl: bool = True) -> None:
        """Enqueue on the device's stream. CuPy arrays stand for their pointers, ints too; all else is a NumPy scalar."""
        kernel(grid, block, [self._argument(arg) for arg in args], self.stream.ptr, shared_bytes, pdl)

    def _argument(self, value: Any) -> Any:
        if value is None:
            return 0
        return int(value.data.ptr) if isinstance(value, self.cupy.ndarray) else value

    def array(self, values: Any) -> Any:
        """A NumPy array on the device, C-contiguous."""
        return self.cupy.asarray(np.ascontiguousarray(values))

    def zeros(self, shape: Any, dtype: Any) -> Any:
        return self.cupy.zeros(shape, dtype)

    def empty_poisoned(self, shape: Any, dtype: Any) -> Any:
        """Every byte 0xFF: NaN in all floating types."""
        array = self.cupy.empty(shape, dtype)
        self.cupy.cuda.runtime.memsetAsync(array.data.ptr, 0xFF, array.nbytes, self.stream.ptr)
        return array

    def get(self, array: Any) -> Any:
        """As a NumPy array, once all that was enqueued is done."""
        return array.get(stream=self.stream)

    def synchronize(self) -> None:
        """Wait for all that was enqueued; errors of kernels surface here."""
        self.stream.synchronize()

    def time(self, function: Callable[[], object], repeats: int = 20, graph: bool = True) -> float:
        """Median seconds of one call of `function`, which enqueues work on the device's stream.

        The calls are captured into a graph of at least 2 ms, so that the host's part is not measured; pass graph=False for
        one that cannot be captured: then a sample is one call between two events, enqueued by the host as it goes.
        """
        for _ in range(3):
            function()
        self.synchronize()
        if not graph:
            return statistics.median(self._seconds(function) for _ in range(repeats))
        single = self._capture(function, 1)
        self._seconds(single)
        seconds = min(self._seconds(single) for _ in range(3))
        calls = max(1, min(_MAX_GRAPH_CALLS, int(np.ceil(_MIN_GRAPH_SECONDS / max(seconds, 1e-7)))))
        many = self._capture(function, calls)
        self._seconds(many)
        return statistics.median(self._seconds(many) for _ in range(repeats)) / calls

    def _capture(self, function: Callable[[], object], calls: int) -> Callable[[], object]:
        self.stream.begin_capture()
        try:
            for _ in range(calls):
                function()
        finally:
            graph = self.stream.end_capture()
        return lambda: graph.launch(self.stream)

    def _seconds(self, function: Callable[[], object]) -> float:
        start, stop = self.cupy.cuda.Event(), self.cupy.cuda.Event()
        start.record(self.stream)
        function()
        stop.record(self.stream)
        stop.synchronize()
        return float(self.cupy.cuda.get_elapsed_time(start, stop)) / 1e3
