"""Checking every chunk of a packed file against its checksum, in several processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from . import mxfp4, verify_worker
from .checksums import Extent
from .constants import CHUNK_BYTES, STEP_COLUMNS, STEPS_PER_PAGE, TILE_ROWS
from .entries import BlobEntry
from .errors import FileError, printable
from .reader import PackedFile

_CHUNKS_PER_PROCESS = 512  # 64 MiB: less is done before another process has started

Progress = Callable[[int], object]


@dataclass(frozen=True)
class BrokenChunk:
    """A chunk whose bytes do not match: where it lies, and what is in it."""

    extent: str
    chunk: int
    offset: int
    nbytes: int
    tensors: tuple[str, ...]
    pages: tuple[int, int] | None

    def describe(self) -> str:
        """One line for a person."""
        pages = f", pages {self.pages[0]} to {self.pages[1]}" if self.pages else ""
        held = f" (tensors {', '.join(self.tensors)})" if self.tensors else ""
        return f"'{self.extent}'{pages}: {self.nbytes} bytes at offset {self.offset} do not match their checksum{held}"


def verify_checksums(packed: PackedFile, jobs: int, progress: Progress = lambda _: None) -> list[BrokenChunk]:
    """All broken chunks in file order, found by up to `jobs` processes; empty when the file is whole.

    Raises FileError when the file cannot be read or is truncated meanwhile.
    """
    extents = list(packed.extents)
    counts = np.array([extent.num_chunks for extent in extents], np.int64)
    owner = np.repeat(np.arange(len(extents)), counts)  # number of the extent that each chunk is of
    within = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * CHUNK_BYTES
    triples = np.empty((len(owner), 3), "<u8")
    triples[:, 0] = np.array([extent.offset for extent in extents], np.int64)[owner] + within
    triples[:, 1] = np.minimum(CHUNK_BYTES, np.array([extent.nbytes for extent in extents], np.int64)[owner] - within)
    triples[:, 2] = packed.checksums
    jobs = max(1, min(jobs, len(owner) // _CHUNKS_PER_PROCESS))
    with ThreadPoolExecutor(jobs, thread_name_prefix="verify") as pool:
        bounds = [len(owner) * i // jobs for i in range(jobs + 1)]
        found = pool.map(lambda i: _run_worker(packed, triples, bounds[i], bounds[i + 1], progress), range(jobs))
        broken = [number for numbers in found for number in numbers]
    return [_describe(packed, extents[owner[number]], int(within[number]) // CHUNK_BYTES) for number in broken]


def _run_worker(packed: PackedFile, triples: NDArray[np.uint64], start: int, stop: int, progress: Progress) -> list[int]:
    """Numbers of the broken chunks among [start, stop)."""
    installed = os.path.dirname(os.path.dirname(xxhash.__file__))
    command = [sys.executable, "-I", "-S", verify_worker.__file__, str(packed.fileno()), installed]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, pass_fds=[packed.fileno()]) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(triples[start:stop].tobytes())
            worker.stdin.close()
        broken = []
        while word := worker.stdout.read(8):
            value = int.from_bytes(word, "little")
            if value & verify_worker.BROKEN:
                broken.append(start + (value ^ verify_worker.BROKEN))
            else:
                progress(value)
        message = worker.stderr.read().decode(errors="replace").strip()
    if worker.returncode:
        raise FileError(f"{printable(packed.path)}: cannot be verified: {printable(message)}")
    return broken


def _describe(packed: PackedFile, extent: Extent, chunk: int) -> BrokenChunk:
    begin = chunk * CHUNK_BYTES
    nbytes = min(CHUNK_BYTES, extent.nbytes - begin)
    names = packed.index.blobs.names
    if extent.name not in names:
        return BrokenChunk(extent.name, chunk, extent.offset + begin, nbytes, (), None)
    number = names.index(extent.name)
    blob = packed.index.blob(number)
    held = [
        packed.index.tensor(i) for i in range(len(packed.index.tensors)) if packed.index.tensors.columns["blob"][i] == number
    ]
    if blob.layout == "vector":
        return BrokenChunk(extent.name, chunk, extent.offset + begin, nbytes, tuple(t.name for t in held), None)
    rows = range(begin // blob.block_bytes * TILE_ROWS, -(-(begin + nbytes) // blob.block_bytes) * TILE_ROWS)
    touched = [
        t.name for t in held if t.row_map.base < rows.stop and t.row_map.base + t.row_map.stored_span(t.rows) > rows.start
    ]
    pages = page_of(blob, begin), page_of(blob, min(begin + nbytes, blob.nbytes) - 1)
    return BrokenChunk(extent.name, chunk, extent.offset + begin, nbytes, tuple(touched), pages)


def page_of(blob: BlobEntry, position: int) -> int:
    """Number of the page within a tiled blob that holds its byte `position`: 16 steps, fewer at the end of a row block."""
    block, within = divmod(position, blob.block_bytes)
    step_bytes = mxfp4.STEP_BYTES if blob.dtype == "MXFP4" else TILE_ROWS * 2 * STEP_COLUMNS
    page_bytes = STEPS_PER_PAGE * step_bytes
    return block * -(-blob.block_bytes // page_bytes) + within // page_bytes
