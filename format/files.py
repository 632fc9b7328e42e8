"""The files section: config, tokenizer and chat template as the checkpoint had them (specs/format.md, "Files section")."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import zstandard

from .constants import MAX_AUXILIARY_FILE_BYTES
from .errors import FormatError, printable

ZSTD_LEVEL = 9
FILE_NAMES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_KEYS = {"name", "nbytes", "offset", "sha256", "stored_nbytes"}


@dataclass(frozen=True)
class FileEntry:
    """One stored file; `offset` and `stored_nbytes` delimit its zstd frame within the section."""

    name: str
    offset: int
    stored_nbytes: int
    nbytes: int
    sha256: bytes

    def to_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in sorted(_KEYS)}


def pack_files(files: Mapping[str, bytes]) -> tuple[list[FileEntry], bytes]:
    """Entries in name order and the section's bytes."""
    entries, frames, offset = [], [], 0
    for name in sorted(files):
        frame = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True).compress(files[name])
        digest = hashlib.sha256(files[name]).digest()
        entries.append(FileEntry(name, offset, len(frame), len(files[name]), digest))
        frames.append(frame)
        offset += len(frame)
    return entries, b"".join(frames)


def decode_file_entries(raw: Any, place: str) -> list[FileEntry]:
    """Checked against rules F1 and F2."""
    if not isinstance(raw, list):
        raise FormatError(f"{place}: files must be a list", "F1")
    entries: list[FileEntry] = []
    offset = 0
    for item in raw:
        if not isinstance(item, dict) or set(item) != _KEYS:
            raise FormatError(f"{place}: a file entry has the keys {sorted(_KEYS)}", "F1")
        entry = FileEntry(**item)
        if entry.name not in FILE_NAMES or (entries and entry.name <= entries[-1].name):
            raise FormatError(f"{place}: file {printable(entry.name)} is unknown or out of order", "F1")
        sizes = (entry.offset, entry.stored_nbytes, entry.nbytes)
        if any(type(size) is not int or not 0 <= size <= MAX_AUXILIARY_FILE_BYTES * 2 for size in sizes):
            raise FormatError(f"{place}: file {entry.name}: sizes {sizes} are out of range", "F2")
        if entry.offset != offset or entry.nbytes > MAX_AUXILIARY_FILE_BYTES:
            raise FormatError(f"{place}: file {entry.name}: {entry.nbytes} bytes at {entry.offset}, expected at {offset}", "F2")
        if not isinstance(entry.sha256, bytes) or len(entry.sha256) != 32:
            raise FormatError(f"{place}: file {entry.name}: sha256 must be 32 bytes", "F2")
        offset += entry.stored_nbytes
        entries.append(entry)
    return entries


def section_bytes(entries: list[FileEntry]) -> int:
    """Size of the files section."""
    return entries[-1].offset + entries[-1].stored_nbytes if entries else 0
