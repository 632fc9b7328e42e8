"""Loading a packed file that is in the page cache: the ring by threads, slots, streams and kinds of memory, and the mapped way.

`python tools/bench_kernels loading` takes about a minute; `loading:cold` reads from storage. As a program of its own this file
needs no GPU: `python tools/bench_kernels/loading.py [FILE]` prints what the page cache gives the ring's threads when nothing is
copied on, and as many processes for comparison.
The file is the one that $MEGALITH_BENCH_FILE names, or one in the shape of Qwen3-4B with random weights, made in $TMPDIR (16 GB
while it is converted) and removed again. Evicting a file from the page cache needs nobody else to use it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from megalith.format.reader import PackedFile
from megalith.runtime.arena import FileSpan
from megalith.runtime.copying import CudaCopier
from megalith.runtime.loading import LoadOptions, load
from megalith.runtime.pinned_ring import RingSize, load_ring, slices

_MIB = 1 << 20
_REPEATS, _COLD_REPEATS, _HOST_REPEATS = 3, 3, 3
_THREADS, _SLOTS, _STREAMS = (4, 8, 10, 16), (_MIB, 2 * _MIB, 4 * _MIB, 8 * _MIB), (1, 2)
_HOST_BYTES = 2 << 30  # of the file
_HOST_THREADS, _HOST_SLOTS = (1, 2, 4, 8, 16), (_MIB // 4, _MIB, 2 * _MIB, 8 * _MIB)
_WRITE_COMBINED = 4  # CU_MEMHOSTALLOC_WRITECOMBINED


class DriverCopier(CudaCopier):
    """Slots that the driver allocates."""

    def allocate_pinned(self, nbytes: int) -> int:
        return int(self._call("cuMemHostAlloc", nbytes, 0))

    def free_pinned(self, address: int) -> None:
        self._call("cuMemFreeHost", address)


class WriteCombinedCopier(DriverCopier):
    """Slots that the processor's caches do not hold."""

    def allocate_pinned(self, nbytes: int) -> int:
        return int(self._call("cuMemHostAlloc", nbytes, _WRITE_COMBINED))


class HostCopier:
    """Copies nothing, and has its slots already: what is left is reading."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, nbytes)
        self._address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self._memory))
        ctypes.memset(self._address, 1, nbytes)
        self._taken = itertools.count()

    def attach(self) -> None:
        """There is no device."""

    def register(self, address: int, nbytes: int) -> bool:
        return False

    def unregister(self, address: int) -> None:
        """Nothing was registered."""

    def allocate_pinned(self, nbytes: int) -> int:
        return self._address + nbytes * next(self._taken)  # every thread asks once, for as much

    def free_pinned(self, address: int) -> None:
        """They go with this object."""

    def copy(self, target: int, source: int, nbytes: int) -> object:
        return source

    def wait(self, copied: object) -> None:
        """At once."""


@dataclass(frozen=True)
class Variant:
    name: str
    options: LoadOptions
    streams: int = 1
    copier: type[CudaCopier] = CudaCopier
    is_cold: bool = False


def ring(threads: int, slot_bytes: int) -> LoadOptions:
    return LoadOptions(way="ring", direct=False, ring=RingSize(threads, slot_bytes))


def variants() -> Iterator[Variant]:
    """What `bench` measures."""
    for streams in _STREAMS:
        for threads in _THREADS:
            for slot_bytes in _SLOTS:
                name = f"ring, {threads} threads, slots of {slot_bytes / _MIB:g} MiB, {streams} streams"
                yield Variant(name, ring(threads, slot_bytes), streams)
    for threads in (8, 16):
        for slot_bytes in (_MIB, 8 * _MIB):
            what = f"{threads} threads, slots of {slot_bytes // _MIB} MiB"
            yield Variant(f"ring, {what}, the driver's memory", ring(threads, slot_bytes), copier=DriverCopier)
            yield Variant(f"ring, {what}, write-combined", ring(threads, slot_bytes), copier=WriteCombinedCopier)
            yield Variant(f"ring, {what}, verified", replace(ring(threads, slot_bytes), verify=True))
    for threads in (1, 8):
        yield Variant(f"mapped, {threads} threads", LoadOptions(way="mapped", register_threads=threads))


def bench(gpu: Any) -> list[dict[str, Any]]:
    """Host alone, then one row per variant; every load's bytes are compared with the file's."""
    with _file() as path:
        command = [sys.executable, __file__, str(path)]  # a process without a context: it forks
        rows: list[dict[str, Any]] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        return rows + _allocations(gpu) + _rows(gpu, path, list(variants()))


def _allocations(gpu: Any) -> list[dict[str, Any]]:
    """What pinning the slots takes of a load."""
    rows = []
    for size in sorted({RingSize(threads, slot_bytes).nbytes for threads in _THREADS for slot_bytes in _SLOTS}):
        copier, seconds = CudaCopier(gpu.stream.ptr), []
        for _ in range(_REPEATS):
            begun = time.perf_counter()
            address = copier.allocate_pinned(size)
            seconds.append(time.perf_counter() - begun)
            copier.free_pinned(address)
        rows.append(_result(f"pinning {size // _MIB} MiB", size, seconds))
    return rows


def cold(gpu: Any) -> list[dict[str, Any]]:
    """From storage."""
    with _file() as path:
        found = [
            Variant("cold, ring", ring(16, 8 * _MIB), is_cold=True),
            Variant("cold, ring, O_DIRECT", replace(ring(16, 8 * _MIB), direct=True), is_cold=True),
            Variant("cold, mapped", LoadOptions(way="mapped"), is_cold=True),
        ]
        return _rows(gpu, path, found)


def _rows(gpu: Any, path: Path, found: Sequence[Variant]) -> list[dict[str, Any]]:
    with PackedFile(path) as packed:
        span = FileSpan.of(packed.header)
        arena, reference = (gpu.empty_poisoned((span.nbytes,), np.uint8) for _ in range(2))
        gpu.synchronize()
        for begin in range(0, span.nbytes, 64 * _MIB):
            nbytes = min(64 * _MIB, span.nbytes - begin)
            reference[begin : begin + nbytes] = gpu.array(np.frombuffer(packed.read(span.offset + begin, nbytes), np.uint8))
        return [_row(gpu, packed, span, arena, reference, variant) for variant in found]


def _row(gpu: Any, packed: PackedFile, span: FileSpan, arena: Any, reference: Any, variant: Variant) -> dict[str, Any]:
    others = [gpu.cupy.cuda.Stream(non_blocking=True) for _ in range(variant.streams - 1)]
    copier, seconds = variant.copier(gpu.stream.ptr, *(stream.ptr for stream in others)), []
    for _ in range(_COLD_REPEATS if variant.is_cold else _REPEATS):
        gpu.cupy.cuda.runtime.memsetAsync(arena.data.ptr, 0xFF, arena.nbytes, gpu.stream.ptr)
        gpu.synchronize()
        if variant.is_cold:
            os.fsync(packed.fileno())
            os.posix_fadvise(packed.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        report = load(packed, int(arena.data.ptr), copier, variant.options)
        seconds.append(report.seconds)
        if not bool(gpu.cupy.array_equal(arena, reference)):
            raise SystemExit(f"{variant.name}: what was loaded is not what the file holds")
    return _result(variant.name, span.nbytes, seconds)


def _result(name: str, nbytes: int, seconds: Sequence[float]) -> dict[str, Any]:
    median = statistics.median(seconds)
    return {
        "kernel": "loading", "name": name, "ms": median * 1e3, "gbytes_per_s": nbytes / median / 1e9,
        "best_gbytes_per_s": nbytes / min(seconds) / 1e9,
    }  # fmt: skip


# ---- without a GPU -------------------------------------------------------------------------------------------------------


def host_rows(path: Path) -> list[dict[str, Any]]:
    """The ring's threads, and processes, that read the same part of the file into slots of their own."""
    rows = []
    with PackedFile(path) as packed:
        span = FileSpan.of(packed.header)
        nbytes = min(span.nbytes, _HOST_BYTES)
        _read_by_process(str(path), span.offset, nbytes, 8 * _MIB)  # into the page cache
        for count in _HOST_THREADS:
            for slot_bytes in _HOST_SLOTS:
                threads = [_by_threads(packed, span.offset, nbytes, RingSize(count, slot_bytes)) for _ in range(_HOST_REPEATS)]
                slots = f"slots of {slot_bytes / _MIB:g} MiB"
                rows.append(_result(f"host alone, {count} threads, {slots}", nbytes, threads))
                if slot_bytes in (_MIB, 8 * _MIB):
                    processes = [_by_processes(path, span.offset, nbytes, count, slot_bytes) for _ in range(_HOST_REPEATS)]
                    rows.append(_result(f"host alone, {count} processes, {slots}", nbytes, processes))
    return rows


def _by_threads(packed: PackedFile, offset: int, nbytes: int, size: RingSize) -> float:
    pieces, copier = list(slices(offset, nbytes, size.slot_bytes)), HostCopier(size.nbytes)
    begun = time.perf_counter()
    load_ring(packed, offset, 0, copier, pieces, size, -1, lambda _: None)
    return time.perf_counter() - begun


def _by_processes(path: Path, offset: int, nbytes: int, count: int, slot_bytes: int) -> float:
    """Seconds of the slowest, each with an equal part of the file."""
    part = -(-nbytes // count)
    parts = [(str(path), offset + i * part, min(part, nbytes - i * part), slot_bytes) for i in range(count)]
    with get_context("fork").Pool(count) as pool:
        return max(pool.starmap(_read_by_process, parts, chunksize=1))


def _read_by_process(path: str, offset: int, nbytes: int, slot_bytes: int) -> float:
    slots = memoryview(mmap.mmap(-1, 2 * slot_bytes))
    slots[:] = bytes(2 * slot_bytes)
    descriptor = os.open(path, os.O_RDONLY)
    begun = time.perf_counter()
    for turn, at in enumerate(range(offset, offset + nbytes, slot_bytes)):
        begin = turn % 2 * slot_bytes
        os.preadv(descriptor, [slots[begin : begin + min(slot_bytes, offset + nbytes - at)]], at)
    seconds = time.perf_counter() - begun
    os.close(descriptor)
    return seconds


@contextmanager
def _file() -> Iterator[Path]:
    given = os.environ.get("MEGALITH_BENCH_FILE")
    if given:
        yield Path(given)
        return
    from random_checkpoint import SHAPES, write_checkpoint

    from megalith.converter.convert import convert
    from megalith.converter.plan import Options

    with tempfile.TemporaryDirectory() as folder:
        checkpoint, path = Path(folder, "checkpoint"), Path(folder, "model.lith")
        write_checkpoint(checkpoint, SHAPES["qwen3-4b"])
        convert(checkpoint, path, Options())
        shutil.rmtree(checkpoint)
        yield path


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(host_rows(Path(sys.argv[1]))))
    else:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        with _file() as made:
            print(json.dumps(host_rows(made), indent=1))
