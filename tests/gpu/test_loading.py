"""Loading a real packed file into real device memory, by every way, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import GoldenModel

from megalith.format.errors import CorruptionError
from megalith.format.reader import PackedFile
from megalith.runtime import loading
from megalith.runtime.arena import FileSpan
from megalith.runtime.copying import CudaCopier
from megalith.runtime.loading import LoadOptions, load
from megalith.runtime.pinned_ring import RingSize

pytestmark = pytest.mark.gpu
MAPPED, RING = LoadOptions(way="mapped"), LoadOptions(way="ring", ring=RingSize(4, 1 << 20))


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return GoldenModel("qwen3").pack(tmp_path_factory.mktemp("loading"))


def loaded(gpu: Any, packed: PackedFile, options: LoadOptions) -> tuple[np.ndarray, loading.LoadReport]:
    """The arena's bytes after loading between two guards, and the report."""
    span, guard = FileSpan.of(packed.header), 4096
    arena = gpu.empty_poisoned((span.nbytes + 2 * guard,), np.uint8)
    gpu.synchronize()
    report = load(packed, int(arena.data.ptr) + guard, CudaCopier(gpu.stream.ptr), options)
    found = gpu.get(arena)
    assert (found[:guard] == 0xFF).all()
    assert (found[-guard:] == 0xFF).all()
    return found[guard:-guard], report


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("options", [MAPPED, RING, replace(RING, direct=True)])
def test_the_arena_holds_the_files_bytes(
    gpu: Any, packed_file: Path, options: LoadOptions, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_PIECE_BYTES", 64 << 10)
    with PackedFile(packed_file) as packed:
        span = FileSpan.of(packed.header)
        for _ in range(2):  # registering the same file again must work
            found, report = loaded(gpu, packed, replace(options, verify=verify))
            assert found.tobytes() == packed.read(span.offset, span.nbytes)
            print(options.way, report)
            assert report.mapped_bytes in ((0, span.nbytes) if options.way == "mapped" else (0,))


@pytest.mark.parametrize("options", [MAPPED, RING])
def test_a_flipped_bit_is_found(gpu: Any, packed_file: Path, options: LoadOptions, tmp_path: Path) -> None:
    data = bytearray(packed_file.read_bytes())
    with PackedFile(packed_file) as packed:
        data[FileSpan.of(packed.header).offset + 4321] ^= 1
    broken = tmp_path / "broken.lith"
    broken.write_bytes(data)
    with PackedFile(broken) as packed, pytest.raises(CorruptionError, match="do not match their checksum"):
        loaded(gpu, packed, replace(options, verify=True))
