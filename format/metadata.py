"""Editing the user metadata of a packed file in place (specs/format.md, "User metadata")."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from .constants import HEADER_BYTES
from .errors import FileError, FormatError, RequestError, printable
from .header import decode_header
from .reader import PackedFile


def edit_metadata(path: str | os.PathLike[str], metadata: Mapping[str, str | int | float | bool]) -> None:
    """Replace the user metadata of a packed file; an empty map removes it.

    The file is checked as by opening it; then its header block, and nothing else, is rewritten in one 4096-byte write.
    RequestError for metadata that does not fit; FileError when the file cannot be written or changes meanwhile.
    """
    with PackedFile(path) as packed:
        old, new = packed.header.encode(), _encode_block(packed, metadata)
        try:
            _rewrite(packed.path, old, new)
        except OSError as error:
            raise FileError.wrap(packed.path, error) from None


def _encode_block(packed: PackedFile, metadata: Mapping[str, str | int | float | bool]) -> bytes:
    """The new header block, read back once as a reader will."""
    place = printable(packed.path)
    try:
        block = replace(packed.header, metadata=dict(metadata)).encode()
        decode_header(block, packed.file_bytes, place)
    except FormatError as error:
        raise RequestError(str(error)) from None
    except (TypeError, ValueError, OverflowError) as error:  # not MessagePack: an object, a lone surrogate, 2^64
        raise RequestError(f"{place}: metadata: {printable(error)}", "H9") from None
    return block


def _rewrite(path: Path, old: bytes, new: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.pread(descriptor, HEADER_BYTES, 0) != old:
            raise FileError(f"{printable(path)}: changed while its metadata was edited")
        if os.pwrite(descriptor, new, 0) != HEADER_BYTES:
            raise FileError(f"{printable(path)}: header: short write")
        os.fsync(descriptor)
    except BlockingIOError:
        raise FileError(f"{printable(path)}: another process is writing it") from None
    finally:
        os.close(descriptor)
