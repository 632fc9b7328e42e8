"""A packed file taken apart and put together again, valid or not: for golden files, fuzzers and tests of the reader."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import zstandard

from megalith.format import canonical
from megalith.format.checksums import ChunkHasher, extents_of
from megalith.format.constants import (
    HEADER_BYTES,
    HEADER_CHECKSUM_OFFSET,
    MAX_INDEX_DEPTH,
    MAX_INDEX_OBJECTS,
    METADATA_OFFSET,
    SECTION_ENTRY_BYTES,
    SECTION_KINDS,
    SECTION_TABLE_OFFSET,
)
from megalith.format.entries import BLOB_COLUMNS, SOURCE_COLUMNS, TENSOR_COLUMNS
from megalith.format.header import DIGESTED, Header, Section, decode_header, place_sections
from megalith.format.index import decode_index, decompress
from megalith.format.reader import PackedFile

COLUMN_TYPES = {"blobs": BLOB_COLUMNS, "sources": SOURCE_COLUMNS, "tensors": TENSOR_COLUMNS}
FEATURES_OFFSET, FILE_BYTES_OFFSET, METADATA_BYTES_OFFSET = 16, 24, 36


@dataclass(frozen=True)
class Parts:
    """What a packed file is made of; nothing of it need be valid. `stored_index` replaces the encoding of `index`."""

    index: Any
    image: bytes
    rope: bytes
    files: bytes
    records: bytes
    checksums: bytes = b""
    features: int = 1
    metadata: bytes = b""
    stored_index: bytes | None = None


def compress(data: bytes) -> bytes:
    """A zstd frame as the format's writer makes it."""
    return zstandard.ZstdCompressor(level=9, write_content_size=True).compress(data)


def assemble(parts: Parts) -> bytes:
    """The file's bytes, with matching digests of header and index."""
    index = compress(canonical.encode(parts.index)) if parts.stored_index is None else parts.stored_index
    content = {kind: index if kind == "index" else getattr(parts, kind) for kind in SECTION_KINDS.values()}
    sections = tuple(
        Section(s.kind, s.offset, s.nbytes, xxhash.xxh3_64_intdigest(content[s.kind]) if s.kind in DIGESTED else 0)
        for s in place_sections({kind: len(data) for kind, data in content.items()})
    )
    header = Header(sections)
    file = bytearray(header.file_bytes)
    file[:HEADER_BYTES] = header.encode()
    for section in sections:
        file[section.offset : section.end] = content[section.kind]
    file[FEATURES_OFFSET : FEATURES_OFFSET + 8] = struct.pack("<Q", parts.features)
    file[METADATA_BYTES_OFFSET : METADATA_BYTES_OFFSET + 4] = struct.pack("<I", len(parts.metadata))
    stored = parts.metadata[: HEADER_CHECKSUM_OFFSET - METADATA_OFFSET]
    file[METADATA_OFFSET : METADATA_OFFSET + len(stored)] = stored
    return reseal(file)


def with_checksums(parts: Parts) -> Parts:
    """`parts` with the chunk checksums of its sections; its index must be valid."""
    index = decode_index(compress(canonical.encode(parts.index)), "parts")
    starts, sections = {}, []
    for kind in SECTION_KINDS.values():
        starts[kind] = 0 if kind in DIGESTED else len(getattr(parts, kind))
        sections.append(Section(kind, sum(starts.values()) - starts[kind], starts[kind]))
    content = parts.image + parts.rope + parts.files + parts.records
    digests = []
    for extent in extents_of(index, sections):
        hasher = ChunkHasher()
        hasher.update(content[extent.offset : extent.offset + extent.nbytes])
        digests.append(hasher.digests())
    return replace(parts, checksums=np.concatenate(digests).astype("<u8").tobytes())


def take_apart(file: bytes) -> Parts:
    """Inverse of `assemble` for a valid file."""
    header = decode_header(file[:HEADER_BYTES], len(file), "file")
    content = {s.kind: file[s.offset : s.end] for s in header.sections}
    data = decompress(content.pop("index"), len(file) * 1000, "file", "I1")
    features, metadata_bytes = (int.from_bytes(file[at : at + n], "little") for at, n in ((FEATURES_OFFSET, 8), (36, 4)))
    metadata = file[METADATA_OFFSET : METADATA_OFFSET + metadata_bytes]
    index = canonical.decode(data, "file", "I2", MAX_INDEX_OBJECTS, MAX_INDEX_DEPTH)
    return Parts(index=index, features=features, metadata=metadata, **content)


def reseal(file: bytes | bytearray) -> bytes:
    """`file` with the checksum that its header has."""
    digest = xxhash.xxh3_64_intdigest(bytes(file[:HEADER_CHECKSUM_OFFSET]))
    return bytes(file[:HEADER_CHECKSUM_OFFSET]) + struct.pack("<Q", digest) + bytes(file[HEADER_BYTES:])


def patch(file: bytes, offset: int, data: bytes) -> bytes:
    """`file` with `data` at `offset`, nothing else changed."""
    return file[:offset] + data + file[offset + len(data) :]


def section_entry(kind: str) -> int:
    """Offset in the header of a section's entry."""
    return SECTION_TABLE_OFFSET + list(SECTION_KINDS.values()).index(kind) * SECTION_ENTRY_BYTES


def edited(value: Any, *path: str | int, to: Any) -> Any:
    """A copy of a nested value with the item at `path` replaced."""
    if not path:
        return to
    copy = list(value) if isinstance(value, list) else dict(value)
    copy[path[0]] = edited(value[path[0]], *path[1:], to=to)
    return copy


def with_index(parts: Parts, *path: str | int, to: Any) -> bytes:
    """The file with one value of its index replaced."""
    return assemble(replace(parts, index=edited(parts.index, *path, to=to)))


def with_cells(parts: Parts, table: str, row: int, **cells: int) -> bytes:
    """The file with some columns of one row of a table replaced."""
    columns = dict(parts.index[table])
    for name, value in cells.items():
        column = np.frombuffer(columns[name], COLUMN_TYPES[table][name]).copy()
        column[row] = value
        columns[name] = column.tobytes()
    return with_index(parts, table, to=columns)


def field(file: bytes, offset: int, layout: str, value: int) -> bytes:
    """The file with one header field replaced and a header checksum that matches."""
    return reseal(patch(file, offset, struct.pack(layout, value)))


def flipped(file: bytes, offset: int) -> bytes:
    """The file with the lowest bit of one byte flipped."""
    return patch(file, offset, bytes([file[offset] ^ 1]))


def start_of(file: bytes, kind: str) -> int:
    """Offset of a section."""
    return int.from_bytes(file[section_entry(kind) + 8 : section_entry(kind) + 16], "little")


def read_everything(path: Path) -> None:
    """Open a packed file and read and check every byte of it; raises the first MegalithError."""
    with PackedFile(path) as packed:
        packed.check_padding()
        for extent in packed.extents:
            packed.check_chunks(extent, packed.read(extent.offset, extent.nbytes))
        assert len(packed.records) == len(packed.tensors)
        assert packed.rope[1].shape[0] == packed.index.rope_positions
        for name in packed.file_names():
            packed.file(name)
        for tensor in packed.tensors.values():
            assert tensor.bits().shape == tensor.shape
        for name in packed.index.sources.names:
            source = packed.tensors.source(name)
            assert source.to_numpy().shape == source.shape
