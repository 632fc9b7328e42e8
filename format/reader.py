"""Opening a packed file: header and index are checked, nothing else is read until asked for.

All reads are `pread` on one descriptor: a file that is replaced meanwhile stays the old one, and one that is truncated
gives an error instead of a SIGBUS.
"""

from __future__ import annotations

import os
import stat
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from .checksums import Checksums, Extent, extents_of, num_chunks
from .constants import (
    CHUNK_BYTES,
    HEADER_BYTES,
    MAX_AUXILIARY_FILE_BYTES,
    RECORD_BYTES,
)
from .errors import CorruptionError, FileError, FormatError, RequestError, printable
from .files import section_bytes as files_section_bytes
from .header import Header, Section, decode_header
from .index import Index, decode_index, decompress, features_of
from .records import TensorRecord, decode_records
from .rope import F32, section_bytes, table_offset
from .tensors import Tensors


class PackedFile:
    """An open packed file. Use as a context manager, or call `close`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._shown = printable(self.path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block
        except OSError as error:
            raise FileError.wrap(self.path, error) from None
        except ValueError as error:  # a NUL in the path
            raise FileError(f"{self._shown}: {error}") from None
        try:
            self.header, self.index = self._open()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _open(self) -> tuple[Header, Index]:
        try:
            status = os.fstat(self._descriptor)
            block = os.pread(self._descriptor, HEADER_BYTES, 0) if stat.S_ISREG(status.st_mode) else b""
        except OSError as error:
            raise FileError.wrap(self.path, error) from None
        if not stat.S_ISREG(status.st_mode):
            raise FileError(f"{self._shown}: is not a regular file")
        self.file_bytes = status.st_size
        header = decode_header(block, self.file_bytes, self._shown)
        section = header.section("index")
        stored = self.read(section.offset, section.nbytes)
        self._check_digest(section, stored)
        index = decode_index(bytes(stored), f"{self._shown}: section 'index'")
        self._check_section_sizes(header, index)
        self.extents = extents_of(index, header.sections)
        expected = num_chunks(self.extents) * 8
        if header.section("checksums").nbytes != expected:
            found = header.section("checksums").nbytes
            raise FormatError(
                f"{self._shown}: section 'checksums' has {found} bytes, the file has {expected // 8} chunks", "C1"
            )
        return header, index

    def _check_section_sizes(self, header: Header, index: Index) -> None:
        config = index.config
        expected = {
            "image": (index.image_bytes, "B4"),
            "rope": (section_bytes(config.head_dim, index.rope_positions), "R3"),
            "files": (files_section_bytes(index.files), "F2"),
            "records": (len(index.tensors) * RECORD_BYTES, "D1"),
        }
        for kind, (nbytes, rule) in expected.items():
            found = header.section(kind).nbytes
            if found != nbytes:
                raise FormatError(f"{self._shown}: section '{kind}' has {found} bytes, the index needs {nbytes}", rule)
        features = features_of(index)
        if header.features != features:
            raise FormatError(
                f"{self._shown}: header: features {sorted(header.features)}, content is {sorted(features)}", "H10"
            )

    def fileno(self) -> int:
        """The open descriptor."""
        return self._descriptor

    def read(self, offset: int, nbytes: int) -> bytearray:
        """`nbytes` of the file from `offset`."""
        data = bytearray(nbytes)
        self.read_into(offset, memoryview(data))
        return data

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the file's bytes from `offset`."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._descriptor, [target[done:]], offset + done)
            except OSError as error:
                raise FileError.wrap(self.path, error) from None
            if count == 0:
                raise FileError(
                    f"{self._shown}: ends at {offset + done}, wanted up to {offset + len(target)}: was it truncated?"
                )
            done += count

    def read_image(self, offset: int, nbytes: int) -> bytearray:
        """`nbytes` of the device image from `offset` within it."""
        return self.read(self.header.section("image").offset + offset, nbytes)

    def _check_digest(self, section: Section, data: bytes | bytearray) -> None:
        actual = xxhash.xxh3_64_intdigest(data)
        if actual != section.checksum:
            raise CorruptionError(
                f"{self._shown}: section '{section.kind}' at offset {section.offset}: "
                f"checksum {section.checksum:#x} expected, bytes give {actual:#x}",
                "S4",
            )

    @cached_property
    def checksums(self) -> Checksums:
        """uint64, one per chunk of the file."""
        section = self.header.section("checksums")
        data = self.read(section.offset, section.nbytes)
        self._check_digest(section, data)
        return np.frombuffer(data, "<u8")

    @cached_property
    def tensors(self) -> Tensors:
        """The checkpoint tensors by name."""
        return Tensors(self)

    def _read_checked(self, kind: str) -> bytearray:
        """A whole rope, files or records section, its chunks compared with their checksums."""
        extent = next(extent for extent in self.extents if extent.name == kind)
        data = self.read(extent.offset, extent.nbytes)
        self.check_chunks(extent, data)
        return data

    def check_chunks(self, extent: Extent, data: bytearray) -> None:
        """CorruptionError for the first chunk of `extent` whose bytes do not match."""
        view = memoryview(data)
        for i in range(extent.num_chunks):
            piece = view[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]
            if xxhash.xxh3_64_intdigest(piece) != int(self.checksums[extent.first_chunk + i]):
                at = extent.offset + i * CHUNK_BYTES
                raise CorruptionError(
                    f"{self._shown}: '{extent.name}': chunk {i} at offset {at} does not match its checksum", "C2"
                )

    def check_padding(self) -> None:
        """FormatError for a byte between two sections, or after the last, that is not zero."""
        sections = self.header.sections
        for section, end in zip(sections, [*(later.offset for later in sections[1:]), self.file_bytes], strict=True):
            padding = self.read(section.end, end - section.end)
            if any(padding):
                at = section.end + next(i for i, byte in enumerate(padding) if byte)
                raise FormatError(f"{self._shown}: padding after section '{section.kind}': offset {at} is not zero", "S5")

    @cached_property
    def rope(self) -> tuple[F32, F32]:
        """inv_freq float32 [head_dim/2] and the table float32 [positions, head_dim/2, 2] of cos and sin."""
        data, half = self._read_checked("rope"), self.index.config.head_dim // 2
        table = np.frombuffer(data, "<f4", offset=table_offset(2 * half)).reshape(self.index.rope_positions, half, 2)
        return np.frombuffer(data, "<f4", half), table

    @cached_property
    def records(self) -> list[TensorRecord]:
        """One record per tensor, in table order."""
        return decode_records(
            bytes(self._read_checked("records")), len(self.index.tensors), f"{self._shown}: section 'records'"
        )

    def file(self, name: str) -> bytes:
        """A stored file such as "tokenizer.json"; RequestError when the checkpoint had none."""
        import hashlib

        entry = next((entry for entry in self.index.files if entry.name == name), None)
        if entry is None:
            raise RequestError(f"{self._shown}: holds no {printable(name)}: the checkpoint had none")
        section = self._files_section
        place = f"{self._shown}: section 'files': {name}"
        frame = bytes(section[entry.offset : entry.offset + entry.stored_nbytes])
        data = decompress(frame, MAX_AUXILIARY_FILE_BYTES, place, "F3")
        if len(data) != entry.nbytes or hashlib.sha256(data).digest() != entry.sha256:
            raise CorruptionError(f"{place}: {len(data)} bytes do not match the recorded sha256", "F4")
        return data

    @cached_property
    def _files_section(self) -> bytearray:
        return self._read_checked("files")

    def file_names(self) -> list[str]:
        """Names of the stored files."""
        return [entry.name for entry in self.index.files]

    def check_rest(self) -> None:
        """What chunk checksums do not see: padding between sections, records, stored files (rules S5, D2, F3, F4)."""
        self.check_padding()
        self.records  # noqa: B018
        for name in self.file_names():
            self.file(name)

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> PackedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"PackedFile({self._shown!r}, {len(self.index.tensors)} tensors)"
