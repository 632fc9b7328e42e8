"""Compiled kernels on disk, named by a digest of all that went into them.

An entry is MAGIC, the SHA-256 of its content, the content. It is written under another name and renamed, so that processes
that start together see it whole or not at all; one that does not match its digest is as good as absent and is written
again. Nothing here fails: without a folder to write to every start compiles.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

_MAGIC = b"lithbin1"
_DIGEST_BYTES = 32


def key_of(parts: Iterable[str]) -> str:
    """Hexadecimal digest of a list of texts."""
    digest = hashlib.sha256(_MAGIC)
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def folder() -> Path | None:
    """$MEGALITH_CACHE, $XDG_CACHE_HOME/megalith or ~/.cache/megalith; None without a home."""
    if chosen := os.environ.get("MEGALITH_CACHE"):
        return Path(chosen)
    if (base := os.environ.get("XDG_CACHE_HOME", "")).startswith("/"):  # its specification: ignore one that is relative
        return Path(base) / "megalith"
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".cache" / "megalith"
    return None


def read(key: str) -> bytes | None:
    """The content of an entry; None when it is absent, unreadable or damaged."""
    where = folder()
    if where is None:
        return None
    try:
        data = (where / f"{key}.cubin").read_bytes()
    except (OSError, ValueError):
        return None
    content = data[len(_MAGIC) + _DIGEST_BYTES :]
    return content if data == _entry(content) else None


def write(key: str, content: bytes) -> bool:
    """Store an entry; False when nothing can be written."""
    where = folder()
    if where is None:
        return False
    temporary = None
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(suffix=".part", dir=where)
        with open(descriptor, "wb") as file:
            file.write(_entry(content))
        os.replace(temporary, where / f"{key}.cubin")  # rename is atomic on local and distributed file systems
    except (OSError, ValueError):
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        return False
    return True


def _entry(content: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(content).digest() + content
