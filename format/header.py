"""The header block: version, features, section table, user metadata (specs/format.md, "Header")."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from typing import Any

import xxhash

from . import canonical
from .constants import (
    FEATURES,
    HEADER_BYTES,
    HEADER_CHECKSUM_OFFSET,
    MAGIC,
    MAX_FILE_BYTES,
    MAX_INDEX_STORED_BYTES,
    MAX_METADATA_OBJECTS,
    METADATA_CAPACITY_BYTES,
    METADATA_OFFSET,
    SECTION_ALIGNMENT,
    SECTION_ENTRY_BYTES,
    SECTION_KINDS,
    SECTION_TABLE_OFFSET,
    VERSION_MAJOR,
    VERSION_MINOR,
)
from .errors import CorruptionError, FormatError, RequestError, UnsupportedError
from .tiles import padded

_FIXED = struct.Struct("<8sHHIQQII")
_ENTRY = struct.Struct("<IIQQQ")
assert (_FIXED.size, _ENTRY.size) == (SECTION_TABLE_OFFSET, SECTION_ENTRY_BYTES)

DIGESTED = ("index", "checksums")  # the sections that the header itself holds a checksum of
SECTION_CODES = {name: code for code, name in SECTION_KINDS.items()}
Metadata = dict[str, str | int | float | bool]


@dataclass(frozen=True)
class Section:
    """A section's place in the file; `checksum` is XXH3-64 for index and checksums, 0 for what the chunk checksums cover."""

    kind: str
    offset: int
    nbytes: int
    checksum: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class Header:
    """A parsed header block."""

    sections: tuple[Section, ...]
    features: frozenset[str] = frozenset()
    metadata: Metadata = field(default_factory=dict)

    def section(self, kind: str) -> Section:
        return self.sections[SECTION_CODES[kind] - 1]

    @property
    def file_bytes(self) -> int:
        return padded(self.sections[-1].end, SECTION_ALIGNMENT)

    def encode(self) -> bytes:
        """The header block of 4096 bytes."""
        bits = sum(1 << bit for bit, name in FEATURES.items() if name in self.features)
        metadata = canonical.encode(self.metadata) if self.metadata else b""
        if len(metadata) > METADATA_CAPACITY_BYTES:
            raise RequestError(f"metadata of {len(metadata)} bytes, at most {METADATA_CAPACITY_BYTES} fit the header", "H9")
        fixed = _FIXED.pack(
            MAGIC, VERSION_MAJOR, VERSION_MINOR, HEADER_BYTES, bits, self.file_bytes, len(self.sections), len(metadata)
        )
        entries = b"".join(
            _ENTRY.pack(SECTION_CODES[s.kind], 0, s.offset, s.nbytes, s.checksum if s.kind in DIGESTED else 0)
            for s in self.sections
        )
        block = (fixed + entries).ljust(METADATA_OFFSET, b"\0") + metadata
        block = block.ljust(HEADER_CHECKSUM_OFFSET, b"\0")
        return block + xxhash.xxh3_64_intdigest(block).to_bytes(8, "little")


def place_sections(sizes: dict[str, int]) -> tuple[Section, ...]:
    """All sections one after the other on 4096-byte boundaries; `sizes` in bytes by kind."""
    sections, offset = [], HEADER_BYTES
    for kind in SECTION_KINDS.values():
        sections.append(Section(kind, offset, sizes[kind]))
        offset = padded(offset + sizes[kind], SECTION_ALIGNMENT)
    return tuple(sections)


def decode_header(block: bytes, file_bytes: int, path: str) -> Header:
    """Parse and check the first 4096 bytes of a file of `file_bytes` bytes."""
    place = f"{path}: header"
    if block[: len(MAGIC)] != MAGIC:
        found = block[: len(MAGIC)].hex(" ") or "nothing"
        raise FormatError(f"{place}: offset 0 holds {found}: not a Megalith file, which starts with {MAGIC.hex(' ')}", "H1")
    if len(block) < HEADER_BYTES:
        raise FormatError(f"{place}: file has {len(block)} bytes, the header takes {HEADER_BYTES}", "H2")
    _, major, minor, header_bytes, bits, declared, num_sections, metadata_bytes = _FIXED.unpack_from(block)
    _check_version(major, minor, place)
    if header_bytes != HEADER_BYTES:
        raise FormatError(f"{place}: offset 12 gives a header of {header_bytes} bytes, must be {HEADER_BYTES}", "H4")
    stored = int.from_bytes(block[HEADER_CHECKSUM_OFFSET:], "little")
    actual = xxhash.xxh3_64_intdigest(block[:HEADER_CHECKSUM_OFFSET])
    if stored != actual:
        raise CorruptionError(
            f"{place}: checksum at offset {HEADER_CHECKSUM_OFFSET} is {stored:#x}, bytes give {actual:#x}", "H5"
        )
    unknown = bits & ~sum(1 << bit for bit in FEATURES)
    if unknown:
        raise UnsupportedError(
            f"{place}: needs unknown feature bit {unknown.bit_length() - 1}: a newer Megalith reads it", "H6"
        )
    sections = _decode_sections(block, num_sections, place)
    metadata = _decode_metadata(block, metadata_bytes, place)
    header = Header(sections, frozenset(name for bit, name in FEATURES.items() if bits >> bit & 1), metadata)
    if declared != file_bytes or declared != header.file_bytes:
        raise FormatError(
            f"{place}: file has {file_bytes} bytes, header declares {declared}, sections end at {header.file_bytes}", "H7"
        )
    encoded = header.encode()
    if encoded != block:
        at = next(i for i, (ours, theirs) in enumerate(zip(encoded, block, strict=True)) if ours != theirs)
        raise FormatError(f"{place}: byte {at} is {block[at]:#04x}, must be {encoded[at]:#04x}: reserved", "H8")
    return header


def _check_version(major: int, minor: int, place: str) -> None:
    if (major, minor) == (VERSION_MAJOR, VERSION_MINOR):
        return
    ours = f"{VERSION_MAJOR}.{VERSION_MINOR}"
    if (major, minor) > (VERSION_MAJOR, VERSION_MINOR):
        raise UnsupportedError(
            f"{place}: format {major}.{minor} needs version >= {major}.{minor} of the reader, this is {ours}", "H3"
        )
    raise UnsupportedError(f"{place}: format {major}.{minor} predates {ours}: convert the checkpoint again", "H3")


def _decode_sections(block: bytes, num_sections: int, place: str) -> tuple[Section, ...]:
    if num_sections != len(SECTION_KINDS):
        raise FormatError(f"{place}: {num_sections} sections, must be {len(SECTION_KINDS)}", "S1")
    sections: list[Section] = []
    expected = HEADER_BYTES
    for i, kind in enumerate(SECTION_KINDS.values()):
        at = SECTION_TABLE_OFFSET + i * SECTION_ENTRY_BYTES
        code, _, offset, nbytes, checksum = _ENTRY.unpack_from(block, at)
        if code != SECTION_CODES[kind]:
            raise FormatError(f"{place}: offset {at} holds section kind {code}, must be {SECTION_CODES[kind]} ({kind})", "S1")
        if nbytes > MAX_FILE_BYTES or offset != expected:
            raise FormatError(f"{place}: section '{kind}' lies at {offset} with {nbytes} bytes, must start at {expected}", "S2")
        if kind == "index" and nbytes > MAX_INDEX_STORED_BYTES:
            raise FormatError(f"{place}: index of {nbytes} bytes, at most {MAX_INDEX_STORED_BYTES} are allowed", "S3")
        expected = padded(offset + nbytes, SECTION_ALIGNMENT)
        sections.append(Section(kind, offset, nbytes, checksum))
    return tuple(sections)


def _decode_metadata(block: bytes, nbytes: int, place: str) -> Metadata:
    if not nbytes:
        return {}
    if nbytes > METADATA_CAPACITY_BYTES:
        raise FormatError(f"{place}: metadata of {nbytes} bytes, at most {METADATA_CAPACITY_BYTES} fit", "H9")
    data = block[METADATA_OFFSET : METADATA_OFFSET + nbytes]
    value = canonical.decode(data, f"{place}: metadata", "H9", MAX_METADATA_OBJECTS, 1)
    return check_metadata(value, place)


def check_metadata(value: Any, place: str) -> Metadata:
    """Metadata is a non-empty flat map from text to text, finite numbers and booleans (rule H9)."""
    flat = isinstance(value, dict) and value and all(isinstance(v, str | int | float | bool) for v in value.values())
    finite = flat and all(math.isfinite(v) for v in value.values() if isinstance(v, float))
    if not finite or not all(isinstance(key, str) for key in value):
        raise FormatError(f"{place}: metadata must be a non-empty map from text to text, finite numbers or booleans", "H9")
    return dict(value)
