"""Loading cubins and launching their kernels through the CUDA driver, with programmatic dependent launch.

The context must be current: CuPy's primary one, or another. Launches go to the stream they are given, and into the graph
that this stream is capturing.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megalith.format.errors import DeviceError

from .compile import Build, Compiled

if TYPE_CHECKING:
    from .program import Operation

Dim3 = tuple[int, int, int]
Argument = int | np.generic  # int: a device pointer or u64; all else is a NumPy scalar of the width of the parameter

_FIRST_WITH_PDL = 90  # compute capability 9.0


class CudaError(DeviceError):
    """The CUDA driver refused; names what was done and the driver's error."""


def check(result: tuple[Any, ...], doing: str, driver: Any) -> Any:
    """The value of a driver call: none, one, or a tuple of several. CudaError for any other status than success."""
    status, *values = result
    if status != driver.CUresult.CUDA_SUCCESS:
        words = [driver.cuGetErrorName(status), driver.cuGetErrorString(status)]
        name, text = ((value or b"").decode() if not error else str(int(status)) for error, value in words)
        raise CudaError(f"{doing}: {name or int(status)} ({text})")
    return values[0] if len(values) == 1 else tuple(values) or None


class Launch:
    """A kernel with its grid and arguments, packed once: calling it with a stream costs one driver call.

    `pdl`: the kernel may start before its predecessor in the stream has ended, and waits itself (griddepcontrol.wait).
    """

    operation: Operation | None = None  # of the program, that this launch is or is a part of
    weight_bytes: int = 0  # of the matrix that it reads

    def __init__(
        self, kernel: Kernel, grid: Dim3, block: Dim3, args: Sequence[Argument], shared_bytes: int = 0, pdl: bool = True
    ) -> None:
        self.name, self.grid, self.block, self.shared_bytes = kernel.name, grid, block, shared_bytes
        self._kernel = kernel
        self._arguments = _pack(kernel, args)
        self._addresses = [(at, value) for value, (at, _) in zip(args, kernel.parameters, strict=True) if type(value) is int]
        self._point()
        kernel.allow_shared(shared_bytes)
        self._config = _Config(_launch_config(kernel, grid, block, shared_bytes, pdl))

    def _point(self) -> None:
        base, parameters = ctypes.addressof(self._arguments), self._kernel.parameters
        self._pointers = (ctypes.c_void_p * max(1, len(parameters)))(*[base + offset for offset, _ in parameters])

    def moved(self, addresses: Mapping[int, int]) -> Launch:
        """The same launch, of which other pointers take the place of some."""
        other = copy.copy(self)
        other._arguments = type(self._arguments).from_buffer_copy(self._arguments)
        other._addresses = [(at, addresses.get(value, value)) for at, value in self._addresses]
        for (at, value), (_, before) in zip(other._addresses, self._addresses, strict=True):
            if value != before:
                ctypes.c_uint64.from_buffer(other._arguments, at).value = value
        other._point()
        return other

    def __call__(self, stream: int) -> None:
        """Enqueue on a stream, given as the integer of its handle."""
        kernel, config = self._kernel, self._config
        if stream != config.stream:
            config.values.hStream = kernel.driver.CUstream(stream)
            config.stream = stream
        (status,) = kernel.driver.cuLaunchKernelEx(config.values, kernel.function, ctypes.addressof(self._pointers), 0)
        if status != kernel.success:
            check((status,), f"{kernel.name}: launch {self.grid[0]} x {self.grid[1]}", kernel.driver)


@dataclass
class _Config:
    """The driver's structure, which launches that differ in arguments alone share, and the stream that is in it."""

    values: Any
    stream: int = 0  # as a fresh one has it


def _launch_config(kernel: Kernel, grid: Dim3, block: Dim3, shared_bytes: int, pdl: bool) -> Any:
    driver = kernel.driver
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes = shared_bytes
    if pdl and kernel.has_pdl:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    return config


class Kernel:
    """One entry point of a loaded module."""

    def __init__(self, module: Module, entry: str) -> None:
        self.driver = module.driver
        self.name = f"{module.build.source}.{entry}"
        self.success = self.driver.CUresult.CUDA_SUCCESS
        self._module = module  # a function lives as long as its module
        self.function = check(self.driver.cuModuleGetFunction(module.handle, entry.encode()), self.name, self.driver)
        check(self.driver.cuFuncLoad(self.function), f"{self.name}: load", self.driver)  # else at its first launch
        self._prefer_shared_memory()
        self.parameters = self._read_parameters()  # (offset, bytes) of each
        self.has_pdl = capability_of(module.build.arch) >= _FIRST_WITH_PDL
        self._shared_bytes = 0  # dynamic shared memory allowed so far; what is static counts too, so each amount is asked for

    def _prefer_shared_memory(self) -> None:
        """One split of L1 and shared memory for all: kernels that prefer different ones are not on a multiprocessor at once."""
        attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        percent = int(self.driver.CUshared_carveout.CU_SHAREDMEM_CARVEOUT_MAX_SHARED)
        check(self.driver.cuFuncSetAttribute(self.function, attribute, percent), f"{self.name}: shared memory", self.driver)

    def _read_parameters(self) -> list[tuple[int, int]]:
        """The driver tells the end of the list by CUDA_ERROR_INVALID_VALUE."""
        found: list[tuple[int, int]] = []
        while True:
            result = self.driver.cuFuncGetParamInfo(self.function, len(found))
            if result[0] == self.driver.CUresult.CUDA_ERROR_INVALID_VALUE:
                return found
            found.append(check(result, f"{self.name}: parameter {len(found)}", self.driver))

    def bind(self, grid: Dim3, block: Dim3, args: Sequence[Argument], shared_bytes: int = 0, pdl: bool = True) -> Launch:
        """A launch with everything but its stream. Raises CudaError when arguments are not those that the kernel takes."""
        return Launch(self, grid, block, args, shared_bytes, pdl)

    def __call__(
        self, grid: Dim3, block: Dim3, args: Sequence[Argument], stream: int, shared_bytes: int = 0, pdl: bool = True
    ) -> None:
        """Enqueue once; `bind` is for what runs again."""
        self.bind(grid, block, args, shared_bytes, pdl)(stream)

    def allow_shared(self, nbytes: int) -> None:
        """Let launches have that much dynamic shared memory."""
        if nbytes <= self._shared_bytes:
            return
        attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        doing = f"{self.name}: {nbytes} bytes of dynamic shared memory"
        check(self.driver.cuFuncSetAttribute(self.function, attribute, nbytes), doing, self.driver)
        self._shared_bytes = nbytes


def _pack(kernel: Kernel, args: Sequence[Argument]) -> ctypes.Array[Any]:
    """Each argument at the offset of its parameter, checked against the parameter's size."""
    if len(args) != len(kernel.parameters):
        raise CudaError(f"{kernel.name}: takes {len(kernel.parameters)} arguments, got {len(args)}")
    total = max((offset + nbytes for offset, nbytes in kernel.parameters), default=1)
    packed = bytearray(total)
    for i, (value, (offset, nbytes)) in enumerate(zip(args, kernel.parameters, strict=True)):
        data = _argument_bytes(value)
        if data is None:
            rule = "a pointer is an int from 0 to 2^64 - 1, all else a NumPy scalar"
            raise CudaError(f"{kernel.name}: argument {i} is {value!r}: {rule}")
        if len(data) != nbytes:
            raise CudaError(f"{kernel.name}: argument {i} is {value!r} of {len(data)} bytes, the parameter has {nbytes}")
        packed[offset : offset + nbytes] = data
    buffer = (ctypes.c_uint64 * -(-total // 8))()  # aligned for every parameter type up to 8 bytes
    ctypes.memmove(buffer, bytes(packed), total)
    return buffer


def _argument_bytes(value: Argument) -> bytes | None:
    if isinstance(value, np.generic):
        return value.tobytes()
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 64:
        return value.to_bytes(8, "little")
    return None


def capability_of(arch: str) -> int:
    """90 for "sm_90a"."""
    return int(arch.removeprefix("sm_").rstrip("af"))


class Module:
    """A cubin in the current context. It is never unloaded: kernels are needed until the process ends."""

    def __init__(self, build: Build, compiled: Compiled | bytes, driver: Any = None) -> None:
        self.driver = driver if driver is not None else cuda_driver()
        self.build = build
        image = compiled if isinstance(compiled, bytes) else compiled.cubin
        self.handle = check(self.driver.cuModuleLoadData(image), f"{build}: load", self.driver)

    def kernel(self, entry: str) -> Kernel:
        """An `extern "C" __global__` function of the source."""
        return Kernel(self, entry)


def cuda_driver() -> Any:
    """The bindings of the CUDA driver; they import without one, their calls need it."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise CudaError(f"no CUDA bindings: pip install 'megalith[cuda13]' or [cuda12] ({error})") from None
    return driver
