"""A ring of pinned slots between a file and the device, filled by threads with `pread`, around the page cache if asked."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import xxhash

from megalith.format.constants import CHUNK_BYTES, SECTION_ALIGNMENT
from megalith.format.errors import CorruptionError, printable
from megalith.format.reader import PackedFile
from megalith.format.tiles import padded

from .arena import FileSpan
from .copying import Copier

Progress = Callable[[int], object]

SLOTS_PER_THREAD = 2  # one is read while the other is copied


@dataclass(frozen=True)
class RingSize:
    """Threads and their slots. What the processor's last cache holds from the read to the copy spares a write to memory and a
    read (docs/performance.md); each slot's turn costs tens of microseconds of the driver, which all threads share.
    """

    threads: int
    slot_bytes: int

    @property
    def nbytes(self) -> int:
        return self.threads * SLOTS_PER_THREAD * self.slot_bytes


CACHED_RING = RingSize(10, 4 << 20)  # for a file in the page cache
STORAGE_RING = RingSize(16, 8 << 20)  # many large requests at once


@dataclass(frozen=True)
class Piece:
    """A range of the file for one slot, and the chunks in it: begin within the piece, bytes, number in the file."""

    offset: int
    nbytes: int
    chunks: tuple[tuple[int, int, int], ...] = ()


def load_ring(
    packed: PackedFile, origin: int, target: int, copier: Copier, pieces: Sequence[Piece], size: RingSize, direct: int,
    progress: Progress,
) -> None:  # fmt: skip
    """Bring pieces of the file to the device, offset `origin` of the file to `target`.

    Each thread fills its slots in turn. `direct` is a descriptor or -1.
    """
    if not pieces:
        return
    threads = min(size.threads, len(pieces))
    pending, lock = deque(pieces), Lock()

    def work(_: int) -> None:
        copier.attach()
        busy: list[object | None] = [None] * SLOTS_PER_THREAD

        def settle() -> None:
            for copied in busy:
                if copied is not None:
                    copier.wait(copied)

        turn = 0
        with contextlib.ExitStack() as ending:
            ending.callback(pending.clear)  # the others stop too when this one failed
            slots = ending.enter_context(_pinned(copier, SLOTS_PER_THREAD * size.slot_bytes))
            ending.callback(settle)
            places = [slots + i * size.slot_bytes for i in range(SLOTS_PER_THREAD)]
            views = [memoryview((ctypes.c_ubyte * size.slot_bytes).from_address(place)).cast("B") for place in places]
            while (piece := _next(pending)) is not None:
                earlier = busy[turn]
                if earlier is not None:
                    busy[turn] = None
                    copier.wait(earlier)
                _read(packed, direct, piece, views[turn])
                _check_chunks(packed, piece, views[turn])
                busy[turn] = copier.copy(target + piece.offset - origin, places[turn], piece.nbytes)
                turn = (turn + 1) % SLOTS_PER_THREAD
                with lock:
                    progress(piece.nbytes)

    with ThreadPoolExecutor(threads, thread_name_prefix="ring") as pool:
        for future in [pool.submit(work, i) for i in range(threads)]:
            future.result()


@contextlib.contextmanager
def _pinned(copier: Copier, nbytes: int) -> Iterator[int]:
    """Each thread has its own, which takes it some milliseconds, while others do the same, read and copy."""
    address = copier.allocate_pinned(nbytes)
    try:
        yield address
    finally:
        copier.free_pinned(address)


def _next(pending: deque[Piece]) -> Piece | None:
    try:
        return pending.popleft()
    except IndexError:
        return None


def _read(packed: PackedFile, direct: int, piece: Piece, data: memoryview) -> None:
    """Around the page cache where `direct` is a descriptor; what this does not bring comes the other way."""
    done = 0
    if direct >= 0:
        with contextlib.suppress(OSError):
            done = min(os.preadv(direct, [data[: padded(piece.nbytes, SECTION_ALIGNMENT)]], piece.offset), piece.nbytes)
    packed.read_into(piece.offset + done, data[done : piece.nbytes])


def slices(offset: int, nbytes: int, slot_bytes: int) -> Iterator[Piece]:
    """A range of the file in pieces of a slot."""
    for begin in range(0, nbytes, slot_bytes):
        yield Piece(offset + begin, min(slot_bytes, nbytes - begin))


def chunk_pieces(packed: PackedFile, span: FileSpan, slot_bytes: int) -> Iterator[Piece]:
    """The span in pieces that end where chunks do."""
    assert slot_bytes >= CHUNK_BYTES
    begin, chunks, stop = span.offset, list[tuple[int, int, int]](), span.offset
    for extent in packed.extents:
        if not span.offset <= extent.offset < span.offset + span.nbytes:
            continue
        for i in range(extent.num_chunks):
            at = extent.offset + i * CHUNK_BYTES
            nbytes = min(CHUNK_BYTES, extent.nbytes - i * CHUNK_BYTES)
            if at + nbytes - begin > slot_bytes:
                yield Piece(begin, at - begin, tuple(chunks))
                begin, chunks = at, []
            chunks.append((at - begin, nbytes, extent.first_chunk + i))
            stop = at + nbytes
    yield Piece(begin, stop - begin, tuple(chunks))


def _check_chunks(packed: PackedFile, piece: Piece, data: memoryview) -> None:
    for begin, nbytes, number in piece.chunks:
        if xxhash.xxh3_64_intdigest(data[begin : begin + nbytes]) != int(packed.checksums[number]):
            name = next(e.name for e in packed.extents if e.first_chunk <= number < e.first_chunk + e.num_chunks)
            at = f"{nbytes} bytes at offset {piece.offset + begin}"
            raise CorruptionError(f"{printable(packed.path)}: '{name}': {at} do not match their checksum", "C2")


@contextlib.contextmanager
def direct_descriptor(packed: PackedFile, wanted: bool) -> Iterator[int]:
    """The same open file again with O_DIRECT, whatever its name is now; -1 where that is not to be had."""
    descriptor = -1
    if wanted:
        with contextlib.suppress(OSError):
            descriptor = os.open(f"/proc/self/fd/{packed.fileno()}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    try:
        yield descriptor
    finally:
        if descriptor >= 0:
            os.close(descriptor)
