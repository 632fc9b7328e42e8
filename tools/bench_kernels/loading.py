"""Loading a packed file: from the page cache by mapping and by the ring, and cold through the ring.

The file is the one that $MEGALITH_BENCH_FILE names, or one in the shape of Qwen3-4B with random weights, made in $TMPDIR (16 GB
while it is converted) and removed again. Evicting a file from the page cache needs nobody else to use it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megalith.format.reader import PackedFile
from megalith.runtime.arena import FileSpan
from megalith.runtime.copying import CudaCopier
from megalith.runtime.loading import LoadOptions, load

_REPEATS = 5
_SAMPLE_BYTES = 64 << 20
_MAPPED = LoadOptions(way="mapped")
_RING = LoadOptions(way="ring", direct=False)
VARIANTS = [
    *((f"mapped, {n} threads", replace(_MAPPED, threads=n), False) for n in (1, 4, 8)),
    ("mapped, 8 threads, verified", replace(_MAPPED, verify=True), False),
    *((f"ring, {n} threads", replace(_RING, threads=n), False) for n in (4, 8, 16)),
    ("ring, 16 threads, verified", replace(_RING, threads=16, verify=True), False),
    ("cold, ring, 16 threads", replace(_RING, threads=16), True),
    ("cold, ring, 16 threads, O_DIRECT", replace(_RING, threads=16, direct=True), True),
    ("cold, mapped", _MAPPED, True),
]


def bench(gpu: Any) -> list[dict[str, Any]]:
    """One row per way; bytes are compared with the file's before the first timing of each."""
    with _file() as path, PackedFile(path) as packed:
        span = FileSpan.of(packed.header)
        arena = gpu.empty_poisoned((span.nbytes,), np.uint8)
        return [_row(gpu, packed, span, arena, *variant) for variant in VARIANTS]


def _row(
    gpu: Any, packed: PackedFile, span: FileSpan, arena: Any, name: str, options: LoadOptions, is_cold: bool
) -> dict[str, Any]:
    copier, seconds = CudaCopier(gpu.stream.ptr), []
    gpu.cupy.cuda.runtime.memsetAsync(arena.data.ptr, 0xFF, arena.nbytes, gpu.stream.ptr)
    gpu.synchronize()
    report = load(packed, int(arena.data.ptr), copier, options)  # also brings the file into the page cache, unless direct
    _check(gpu, packed, span, arena)
    for _ in range(_REPEATS):
        if is_cold:
            os.fsync(packed.fileno())
            os.posix_fadvise(packed.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        report = load(packed, int(arena.data.ptr), copier, options)
        seconds.append(report.seconds)
    median = statistics.median(seconds)
    return {
        "kernel": "loading", "name": name, "nbytes": span.nbytes, "mapped_bytes": report.mapped_bytes,
        "direct": report.is_direct, "ms": median * 1e3, "gbytes_per_s": span.nbytes / median / 1e9,
    }  # fmt: skip


def _check(gpu: Any, packed: PackedFile, span: FileSpan, arena: Any) -> None:
    for begin in range(0, span.nbytes, _SAMPLE_BYTES):
        stop = min(begin + _SAMPLE_BYTES, span.nbytes)
        if gpu.get(arena[begin:stop]).tobytes() != packed.read(span.offset + begin, stop - begin):
            raise SystemExit(f"loaded bytes {begin} to {stop} are not the file's")


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
