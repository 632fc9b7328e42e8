"""Loading onto a device that is a bytearray: every byte arrives by every way, and a file that shrinks is an error."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from megalith.format.errors import CorruptionError, FileError
from megalith.format.reader import PackedFile
from megalith.runtime import loading, pinned_ring
from megalith.runtime.arena import FileSpan
from megalith.runtime.loading import LoadOptions, load, terminal_progress
from megalith.runtime.pinned_ring import RingSize

# the test's file is 200 KiB: slots and pieces so small that it takes several
SMALL, OF_A_CHUNK = RingSize(3, 32 << 10), RingSize(3, 128 << 10)
MAPPED = LoadOptions(way="mapped", ring=SMALL, register_threads=3)
RING = LoadOptions(way="ring", ring=SMALL)


@dataclass
class FakeDevice:
    """Copies at once, into `memory` at address 0 + `base`; keeps what must be undone."""

    memory: bytearray
    refuses: Callable[[int], bool] = lambda _: False  # by number of the registration
    before_copy: Callable[[], object] = lambda: None
    base: int = 1 << 40
    registered: dict[int, int] = field(default_factory=dict)
    pinned: dict[int, ctypes.Array[ctypes.c_char]] = field(default_factory=dict)
    waiting: dict[int, int] = field(default_factory=dict)  # copy to source
    from_mapping: int = 0
    registrations: int = 0
    copies: int = 0
    attached: set[int] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def attach(self) -> None:
        self.attached.add(threading.get_ident())

    def register(self, address: int, nbytes: int) -> bool:
        assert threading.get_ident() in self.attached
        assert address % 4096 == nbytes % 4096 == 0
        with self.lock:
            self.registrations += 1
            if self.refuses(self.registrations - 1):
                return False
            self.registered[address] = nbytes
            return True

    def unregister(self, address: int) -> None:
        assert not self.waiting, "unregistered under a copy"
        del self.registered[address]

    def allocate_pinned(self, nbytes: int) -> int:
        buffer = ctypes.create_string_buffer(nbytes + 4096)
        address = -(-ctypes.addressof(buffer) // 4096) * 4096
        self.pinned[address] = buffer
        return address

    def free_pinned(self, address: int) -> None:
        with self.lock:
            nbytes = ctypes.sizeof(self.pinned.pop(address))
            assert not any(address <= source < address + nbytes for source in self.waiting.values()), "freed under a copy"

    def copy(self, target: int, source: int, nbytes: int) -> object:
        self.before_copy()
        at = target - self.base
        assert 0 <= at <= at + nbytes <= len(self.memory)
        is_mapped = any(start <= source < start + size for start, size in self.registered.items())
        self.memory[at : at + nbytes] = ctypes.string_at(source, nbytes)
        with self.lock:
            self.copies += 1
            self.from_mapping += nbytes * is_mapped
            self.waiting[self.copies] = source
            return self.copies

    def wait(self, copied: object) -> None:
        assert isinstance(copied, int)
        with self.lock:
            del self.waiting[copied]  # each once

    @property
    def is_clean(self) -> bool:
        return not (self.registered or self.pinned or self.waiting)


def device(packed: PackedFile) -> FakeDevice:
    return FakeDevice(bytearray(b"\xff" * FileSpan.of(packed.header).nbytes))


def expected(packed: PackedFile) -> bytearray:
    span = FileSpan.of(packed.header)
    return packed.read(span.offset, span.nbytes)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_PIECE_BYTES", 48 << 10)


@pytest.mark.parametrize("options", [MAPPED, RING, replace(RING, direct=True), replace(RING, ring=RingSize(1, 32 << 10))])
def test_every_byte_arrives(packed_llama: Path, options: LoadOptions) -> None:
    with PackedFile(packed_llama) as packed:
        target, done = device(packed), list[int]()
        report = load(packed, target.base, target, options, done.append)
        assert target.memory == expected(packed)
        assert sum(done) == report.nbytes == len(target.memory)
        assert report.mapped_bytes == target.from_mapping == (len(target.memory) if options.way == "mapped" else 0)
    assert target.copies > 2
    assert target.is_clean


@pytest.mark.parametrize("refused", [{0}, {1}, {0, 1, 2, 3, 4, 5, 6, 7}])
def test_what_cannot_be_registered_goes_through_the_ring(packed_llama: Path, refused: set[int]) -> None:
    with PackedFile(packed_llama) as packed:
        target = device(packed)
        target.refuses = refused.__contains__
        report = load(packed, target.base, target, MAPPED)
        assert target.memory == expected(packed)
    assert report.mapped_bytes == target.from_mapping < report.nbytes
    assert target.is_clean


def test_the_ring_is_the_default(packed_llama: Path) -> None:
    with PackedFile(packed_llama) as packed:
        target = device(packed)
        assert load(packed, target.base, target).mapped_bytes == 0
        assert target.memory == expected(packed)


@pytest.mark.parametrize("options", [MAPPED, RING])
@pytest.mark.parametrize("place", ["image", "rope"])
def test_verification_finds_a_flipped_bit(packed_llama: Path, options: LoadOptions, place: str) -> None:
    with PackedFile(packed_llama) as packed:
        target = device(packed)
        load(packed, target.base, target, replace(options, ring=OF_A_CHUNK, verify=True))
        assert target.memory == expected(packed)
        section = packed.header.section(place)
    data = bytearray(packed_llama.read_bytes())
    at = section.offset + section.nbytes - 5
    data[at] ^= 4
    packed_llama.write_bytes(data)
    with PackedFile(packed_llama) as packed:
        with pytest.raises(CorruptionError, match="do not match their checksum"):
            load(packed, target.base, target, replace(options, ring=OF_A_CHUNK, verify=True))
        load(packed, target.base, target, options)
    assert target.is_clean


def test_the_rings_pieces_hold_every_chunk_once(packed_llama: Path) -> None:
    with PackedFile(packed_llama) as packed:
        span = FileSpan.of(packed.header)
        pieces = list(pinned_ring.chunk_pieces(packed, span, OF_A_CHUNK.slot_bytes))
        at = span.offset
        for piece in pieces:
            assert piece.offset == at
            assert piece.nbytes <= OF_A_CHUNK.slot_bytes
            at += piece.nbytes
        assert at == span.offset + span.nbytes
        numbers = [number for piece in pieces for _, _, number in piece.chunks]
        extents = [e for e in packed.extents if e.name not in ("files", "records")]
        assert numbers == list(range(extents[-1].first_chunk + extents[-1].num_chunks))


@pytest.mark.parametrize("options", [MAPPED, RING, replace(RING, direct=True)])
def test_a_file_that_is_truncated_before_is_an_error(packed_llama: Path, options: LoadOptions) -> None:
    with PackedFile(packed_llama) as packed:
        target = device(packed)
        os.truncate(packed_llama, packed.header.section("image").offset + 8192)
        with pytest.raises(FileError, match="truncated"):
            load(packed, target.base, target, options)
    assert target.is_clean


@pytest.mark.parametrize("options", [MAPPED, RING])
def test_a_file_that_is_truncated_while_it_loads_is_an_error(
    packed_llama: Path, options: LoadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver refuses to pin pages that are gone, as the kernel makes it; nothing else looks at the mapping."""
    with PackedFile(packed_llama) as packed:
        target = device(packed)
        monkeypatch.setattr(loading, "_check_size", lambda _: os.truncate(packed_llama, 20480))
        target.refuses = lambda _: True
        with pytest.raises(FileError, match="truncated"):
            load(packed, target.base, target, options)
    assert target.is_clean


def test_a_replaced_file_is_no_matter(packed_llama: Path) -> None:
    with PackedFile(packed_llama) as packed:
        target, content = device(packed), expected(packed)
        other = packed_llama.with_name("other")
        other.write_bytes(b"something else")
        os.replace(other, packed_llama)
        load(packed, target.base, target, MAPPED)
        assert target.memory == content


@pytest.mark.parametrize("options", [MAPPED, RING])
def test_a_failing_copy_leaves_nothing_behind(packed_llama: Path, options: LoadOptions) -> None:
    class CopyError(Exception):
        pass

    with PackedFile(packed_llama) as packed:
        target = device(packed)

        def fail() -> None:
            if target.copies >= 2:
                raise CopyError

        target.before_copy = fail
        with pytest.raises(CopyError):
            load(packed, target.base, target, options)
    assert target.is_clean


def test_residence_of_a_file_just_written(tmp_path: Path) -> None:
    path = tmp_path / "warm"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 20))
    descriptor = os.open(path, os.O_RDONLY)
    span = FileSpan(0, 1 << 20, 1 << 20, 0)
    try:
        assert not loading._is_cold(descriptor, span)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("first_missing", "is_cold"), [(0, True), (1 << 19, True), (1 << 20, False)])
def test_a_file_is_cold_where_pages_are_missing(monkeypatch: pytest.MonkeyPatch, first_missing: int, is_cold: bool) -> None:
    """Of a page cache that answers as it should: a real one reads ahead while it is asked."""

    def preadv(descriptor: int, buffers: list[bytearray], offset: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        if offset >= 4096 + first_missing:
            raise BlockingIOError
        return 1

    monkeypatch.setattr(os, "preadv", preadv)
    assert loading._is_cold(-1, FileSpan(4096, 1 << 20, 1 << 20, 0)) == is_cold


def test_a_file_system_that_does_not_tell_is_not_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    def preadv(*arguments: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "preadv", preadv)
    assert not loading._is_cold(-1, FileSpan(0, 1 << 20, 1 << 20, 0))


def test_no_bar_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_progress(100) as progress:
        progress(100)
    assert capsys.readouterr() == ("", "")
