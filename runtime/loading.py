"""From the file to the arena: the image and the RoPE section, verbatim, by one of two ways.

Mapped: the file is mapped, its pages are registered with the driver and copied from where they lie in the page cache.
Ring: threads `pread` into pinned slots that are copied one after the other. The default, and what serves where the driver
does not register pages.

A file that another process truncates meanwhile must not kill this one by SIGBUS, which is what touching a mapped page
beyond the end of a file does. So the CPU never touches the mapping:
- page tables are filled by madvise and pages pinned by cuMemHostRegister, which both fail where there is no page;
- pinned pages stay in memory when the file loses them, so the copy that follows reads what was there;
- copies from the mapping are large: the driver hands small ones to the device by the CPU;
- verification reads in processes of its own (`format.verify`), or from the ring's slots.
What could not be registered is read by the ring, where a short read is an error that names the file. A file that is
replaced is no matter, the descriptor keeps the old one. One that is overwritten in place gives a mixture of both that only
verification finds.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megalith.format.constants import SECTION_ALIGNMENT
from megalith.format.errors import CorruptionError, FileError, printable
from megalith.format.reader import PackedFile
from megalith.format.tiles import padded
from megalith.format.verify import BrokenChunk, verify_checksums

from .arena import FileSpan
from .copying import Copier
from .pinned_ring import (
    CACHED_RING,
    STORAGE_RING,
    Progress,
    RingSize,
    chunk_pieces,
    direct_descriptor,
    load_ring,
    slices,
)

_PIECE_BYTES = 256 << 20  # of the mapping, registered and copied at once
_COLD_SAMPLES = 256
_COLD_SHARE = 1 / 16  # of samples that are not in the page cache
_MADV_POPULATE_READ = 22  # of <linux/mman.h>, Linux 5.14; not in the mmap module


@dataclass(frozen=True)
class LoadOptions:
    """`way` is "ring", by measurement the faster one (docs/performance.md), or "mapped". `direct`: the ring bypasses the page
    cache; None: for a cold file that would fill more than half of the memory that is available, as others' pages are worth
    more then.
    """

    verify: bool = False
    way: str = "ring"
    direct: bool | None = None
    ring: RingSize | None = None
    register_threads: int = 8


@dataclass(frozen=True)
class LoadReport:
    """What came by which way."""

    nbytes: int
    mapped_bytes: int
    is_direct: bool
    seconds: float


def load(
    packed: PackedFile, target: int, copier: Copier, options: LoadOptions | None = None, progress: Progress = lambda _: None
) -> LoadReport:
    """Bring the file's span to device address `target`; done when this returns.

    Raises FileError when the file is shorter than when it was opened or cannot be read, CorruptionError for a chunk that
    does not match its checksum when `options.verify` asks. `progress` is called with numbers of bytes, from any thread.
    """
    options = options or LoadOptions()
    started = time.perf_counter()
    span = FileSpan.of(packed.header)
    _check_size(packed)
    is_cold = _is_cold(packed.fileno(), span)
    ring = options.ring or (STORAGE_RING if is_cold else CACHED_RING)
    rest, is_direct = [(span.offset, span.nbytes)], False
    if options.way == "mapped":
        with _verification(packed, options) as verified:
            rest = _load_mapped(packed, span, target, copier, options, progress)
            left = [piece for each in rest for piece in slices(*each, ring.slot_bytes)]
            load_ring(packed, span.offset, target, copier, left, ring, -1, progress)
            verified()
    else:
        slot_bytes = ring.slot_bytes
        pieces = list(chunk_pieces(packed, span, slot_bytes) if options.verify else slices(*rest[0], slot_bytes))
        direct = options.direct if options.direct is not None else is_cold and span.nbytes > _available_bytes() // 2
        with direct_descriptor(packed, direct) as descriptor:
            load_ring(packed, span.offset, target, copier, pieces, ring, descriptor, progress)
            is_direct = descriptor >= 0
    mapped_bytes = span.nbytes - sum(nbytes for _, nbytes in rest)
    return LoadReport(span.nbytes, mapped_bytes, is_direct, time.perf_counter() - started)


@contextlib.contextmanager
def terminal_progress(total_bytes: int, wanted: bool = True) -> Iterator[Progress]:
    """A bar on standard error when that is a terminal."""
    from tqdm import tqdm

    disabled = not (wanted and sys.stderr.isatty())
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="loading", leave=False, disable=disabled) as bar:
        yield bar.update


# ---- mapped --------------------------------------------------------------------------------------------------------------


def _load_mapped(
    packed: PackedFile, span: FileSpan, target: int, copier: Copier, options: LoadOptions, progress: Progress
) -> list[tuple[int, int]]:
    """Copy what can be registered; ranges of the file, (offset, bytes), that could not."""
    length = padded(span.nbytes, SECTION_ALIGNMENT)
    try:
        mapped = mmap.mmap(packed.fileno(), length, mmap.MAP_SHARED, mmap.PROT_READ, offset=span.offset)
    except (OSError, ValueError):
        return [(span.offset, span.nbytes)]
    with mapped:
        view = np.frombuffer(mapped, np.uint8)  # for its address alone
        try:
            return _copy_mapped(int(view.ctypes.data), span, target, copier, options, progress)
        finally:
            del view


def _copy_mapped(
    address: int, span: FileSpan, target: int, copier: Copier, options: LoadOptions, progress: Progress
) -> list[tuple[int, int]]:
    size = padded(-(-span.nbytes // max(1, span.nbytes // _PIECE_BYTES)), SECTION_ALIGNMENT)  # all pieces are large
    pieces = [(begin, min(size, span.nbytes - begin)) for begin in range(0, span.nbytes, size)]
    refused, registered, copies = [], [], deque[tuple[object, int]]()
    populate = ctypes.CDLL(None).madvise
    populate.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def register(piece: tuple[int, int]) -> bool:
        begin, nbytes = address + piece[0], padded(piece[1], SECTION_ALIGNMENT)
        copier.attach()
        populate(begin, nbytes, _MADV_POPULATE_READ)  # in parallel; registering alone does it too, in one thread
        if not copier.register(begin, nbytes):
            return False
        registered.append(begin)
        return True

    try:
        with ThreadPoolExecutor(options.register_threads, thread_name_prefix="register") as pool:
            for (begin, nbytes), is_registered in zip(pieces, pool.map(register, pieces), strict=True):
                if is_registered:
                    copies.append((copier.copy(target + begin, address + begin, nbytes), nbytes))
                else:
                    refused.append((span.offset + begin, nbytes))
        while copies:
            copied, nbytes = copies.popleft()
            copier.wait(copied)
            progress(nbytes)
    finally:
        for copied, _ in copies:
            copier.wait(copied)
        for begin in registered:
            copier.unregister(begin)
    return refused


# ---- file ----------------------------------------------------------------------------------------------------------------


def _check_size(packed: PackedFile) -> None:
    found = os.fstat(packed.fileno()).st_size
    if found < packed.file_bytes:
        raise FileError(
            f"{printable(packed.path)}: has {found} bytes, had {packed.file_bytes} when it was opened: was it truncated?"
        )


@contextlib.contextmanager
def _verification(packed: PackedFile, options: LoadOptions) -> Iterator[Callable[[], None]]:
    """Runs beside the copy; what is yielded waits for it and raises CorruptionError for the first chunk that is broken."""
    with ThreadPoolExecutor(1, thread_name_prefix="verify") as pool:
        jobs = max(1, len(os.sched_getaffinity(0)) // 2)
        running: Future[list[BrokenChunk]] | None = None
        if options.verify:
            running = pool.submit(verify_checksums, packed, jobs)

        def wait() -> None:
            broken = running.result() if running is not None else []
            if broken:
                more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
                raise CorruptionError(f"{printable(packed.path)}: {broken[0].describe()}{more}", "C2")

        yield wait


def _is_cold(descriptor: int, span: FileSpan) -> bool:
    """Whether more than a few sampled pages are not in the page cache; False where the file system does not tell."""
    missing, byte = 0, bytearray(1)
    for i in range(_COLD_SAMPLES):
        try:
            os.preadv(descriptor, [byte], span.offset + span.nbytes * i // _COLD_SAMPLES, os.RWF_NOWAIT)
        except BlockingIOError:
            missing += 1
        except OSError:
            return False
    return missing > _COLD_SHARE * _COLD_SAMPLES


def _available_bytes() -> int:
    from .weights import default_cache_bytes

    return 2 * default_cache_bytes()
