"""What reaches the CUDA driver, on a driver that takes notes: real structures of the bindings, no GPU."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as bindings

from megalith.runtime.compile import Build
from megalith.runtime.copying import CudaCopier
from megalith.runtime.launch import CudaError, Kernel, Module, capability_of

OK = bindings.CUresult.CUDA_SUCCESS
INVALID = bindings.CUresult.CUDA_ERROR_INVALID_VALUE
PARAMETERS = [(0, 8), (8, 4), (16, 8), (24, 4), (28, 2)]  # pointer, i32, pointer, f32, u16, with a hole after the i32


class FakeDriver:
    """The bindings' types with functions that remember their arguments; `failing` maps a name to its status."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.launched: list[dict[str, Any]] = []
        self.failing: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return getattr(bindings, name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return (self.failing.get(name, OK),) if name in self.failing else (OK, *self.values(name))

        return call

    def values(self, name: str) -> list[Any]:
        known: dict[str, list[Any]] = {
            "cuCtxGetCurrent": [bindings.CUcontext(7)], "cuCtxGetDevice": [bindings.CUdevice(0)], "cuModuleLoadData": [11],
            "cuModuleGetFunction": [12], "cuMemHostAlloc": [1 << 32], "cuEventCreate": [13],
        }  # fmt: skip
        return known.get(name, [])

    def cuFuncGetParamInfo(self, function: Any, index: int) -> tuple[Any, ...]:  # noqa: N802 - the driver's name
        return (OK, *PARAMETERS[index]) if index < len(PARAMETERS) else (INVALID, 0, 0)

    def cuGetErrorName(self, status: Any) -> tuple[Any, bytes]:  # noqa: N802
        return OK, status.name.encode()

    def cuGetErrorString(self, status: Any) -> tuple[Any, bytes]:  # noqa: N802
        return OK, b"the driver's words"

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: int, extra: int) -> tuple[Any]:  # noqa: N802
        addresses = (ctypes.c_void_p * len(PARAMETERS)).from_address(pointers)
        values = [ctypes.string_at(a or 0, size) for a, (_, size) in zip(addresses, PARAMETERS, strict=True)]
        self.launched.append(
            {
                "grid": (config.gridDimX, config.gridDimY, config.gridDimZ),
                "block": (config.blockDimX, config.blockDimY, config.blockDimZ),
                "shared": config.sharedMemBytes,
                "stream": int(config.hStream),
                "pdl": [(a.id.name, a.value.programmaticStreamSerializationAllowed) for a in config.attrs[: config.numAttrs]],
                "values": values,
                "function": function,
            }
        )
        return (self.failing.get("cuLaunchKernelEx", OK),)


ARGS = (0x123456789A, np.int32(-5), 0, np.float32(0.25), np.uint16(65535))


def kernel(driver: FakeDriver, arch: str = "sm_90a") -> Kernel:
    return Module(Build.of("linear", arch), b"cubin", driver).kernel("linear")


def test_a_launch_carries_grid_stream_and_packed_arguments() -> None:
    driver = FakeDriver()
    launch = kernel(driver).bind((3, 2, 1), (256, 1, 1), ARGS, shared_bytes=1000)
    launch(77)
    launch(78)
    launch(78)
    assert [done["stream"] for done in driver.launched] == [77, 78, 78]
    done = driver.launched[0]
    assert (done["grid"], done["block"], done["shared"], done["function"]) == ((3, 2, 1), (256, 1, 1), 1000, 12)
    assert done["pdl"] == [("CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION", 1)]
    assert done["values"] == [
        (0x123456789A).to_bytes(8, "little"), (-5).to_bytes(4, "little", signed=True), bytes(8), np.float32(0.25).tobytes(),
        b"\xff\xff",
    ]  # fmt: skip


def test_early_start_only_where_asked_and_possible() -> None:
    driver = FakeDriver()
    kernel(driver)((1, 1, 1), (32, 1, 1), ARGS, 1, pdl=False)
    kernel(driver, "sm_89")((1, 1, 1), (32, 1, 1), ARGS, 1)
    kernel(driver, "sm_120")((1, 1, 1), (32, 1, 1), ARGS, 1)
    assert [len(done["pdl"]) for done in driver.launched] == [0, 0, 1]
    assert [capability_of(arch) for arch in ("sm_80", "sm_90a", "sm_100f", "sm_120")] == [80, 90, 100, 120]


def test_a_moved_launch_has_other_pointers_and_leaves_the_first_alone() -> None:
    driver = FakeDriver()
    first = kernel(driver).bind((1, 2, 3), (32, 1, 1), ARGS, 64)
    pointers = [value for value in ARGS if type(value) is int]
    moved = first.moved({pointers[0]: 0x1234567890, 999: 1})
    first(5)
    moved(5)
    moved(6)
    first(6)
    assert [done["stream"] for done in driver.launched] == [5, 5, 6, 6]
    one, other, *_ = driver.launched
    assert one["values"][0] == pointers[0].to_bytes(8, "little")
    assert other["values"][0] == (0x1234567890).to_bytes(8, "little")
    assert other["values"][1:] == one["values"][1:]
    assert {name: one[name] for name in ("grid", "block", "shared", "pdl")} == {
        name: other[name] for name in ("grid", "block", "shared", "pdl")
    }
    assert driver.launched[3]["values"] == one["values"]


def test_shared_memory_is_preferred_and_asked_for_when_more_is_needed() -> None:
    driver = FakeDriver()
    function = kernel(driver)
    for nbytes in (0, 100_000, 90_000, 200_000):
        function.bind((1, 1, 1), (32, 1, 1), ARGS, nbytes)
    attribute = bindings.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    split = bindings.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
    asked = [call[1:] for call in driver.calls if call[0] == "cuFuncSetAttribute"]
    assert asked == [(12, split, 100), (12, attribute, 100_000), (12, attribute, 200_000)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (ARGS[:4], "takes 5 arguments, got 4"),
        ((*ARGS[:1], 5, *ARGS[2:]), "argument 1 is 5 of 8 bytes, the parameter has 4"),
        ((np.int32(1), *ARGS[1:]), "argument 0 is .* of 4 bytes, the parameter has 8"),
        ((*ARGS[:3], 0.25, ARGS[4]), "argument 3 is 0.25"),
        ((-1, *ARGS[1:]), "argument 0 is -1"),
        ((1 << 64, *ARGS[1:]), "argument 0 is"),
        ((True, *ARGS[1:]), "argument 0 is True"),
    ],
)
def test_wrong_arguments_name_kernel_and_argument(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(CudaError, match=f"linear.linear: {message}"):
        kernel(FakeDriver()).bind((1, 1, 1), (32, 1, 1), args)


@pytest.mark.parametrize("name", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernelEx"])
def test_the_drivers_errors_name_the_kernel(name: str) -> None:
    driver = FakeDriver()
    driver.failing[name] = bindings.CUresult.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(CudaError, match=r"linear.*CUDA_ERROR_INVALID_IMAGE \(the driver's words\)"):
        kernel(driver)((1, 1, 1), (32, 1, 1), ARGS, 1, 60_000)


def copier(driver: FakeDriver, supported: int, shares_tables: int) -> CudaCopier:
    attributes = bindings.CUdevice_attribute
    found = {
        attributes.CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED: supported,
        attributes.CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES: shares_tables,
    }
    driver.cuDeviceGetAttribute = lambda attribute, device: (OK, found[attribute])  # type: ignore[attr-defined]
    return CudaCopier(5, 6, driver=driver)


def test_copies_go_to_the_streams_in_turn_with_an_event_behind_them() -> None:
    driver = FakeDriver()
    one = copier(driver, 1, 0)
    one.attach()
    assert one.register(4096, 8192)
    one.wait(one.copy(100, 4096, 50))
    one.wait(one.copy(150, 5000, 20))
    one.unregister(4096)
    calls = [(name, *(int(a) if not isinstance(a, int) else a for a in arguments)) for name, *arguments in driver.calls]
    assert calls[2:] == [
        ("cuCtxSetCurrent", 7), ("cuMemHostRegister", 4096, 8192, 8), ("cuMemcpyHtoDAsync", 100, 4096, 50, 5),
        ("cuEventCreate", 2), ("cuEventRecord", 13, 5), ("cuEventSynchronize", 13), ("cuMemcpyHtoDAsync", 150, 5000, 20, 6),
        ("cuEventRecord", 13, 6), ("cuEventSynchronize", 13), ("cuMemHostUnregister", 4096),
    ]  # fmt: skip


@pytest.mark.parametrize(("supported", "shares_tables"), [(0, 0), (1, 1)])
def test_devices_that_do_not_pin_read_only_pages_register_nothing(supported: int, shares_tables: int) -> None:
    driver = FakeDriver()
    assert not copier(driver, supported, shares_tables).register(4096, 8192)
    assert "cuMemHostRegister" not in [call[0] for call in driver.calls]


def test_a_refused_registration_is_no_error_and_a_refused_copy_is() -> None:
    driver = FakeDriver()
    one = copier(driver, 1, 0)
    driver.failing = {"cuMemHostRegister": INVALID, "cuMemcpyHtoDAsync": INVALID}
    assert not one.register(4096, 8192)
    with pytest.raises(CudaError, match="cuMemcpyHtoDAsync: CUDA_ERROR_INVALID_VALUE"):
        one.copy(1, 2, 3)
