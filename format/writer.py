"""Writing a packed file: under a temporary name, locked, resumable, and under its own name only when complete.

`PartialFile` owns `DST.partial` and its journal. The journal names each finished extent with its checksums; a resumed
run believes an entry only after the bytes on disk give the same checksums, so no order of writes and crashes matters.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import xxhash

from .checksums import ChunkHasher, Extent
from .errors import FileError, MegalithError, RequestError, printable
from .flush import BackgroundFlush

_READ_BYTES = 4 << 20


class PartialFile:
    """The file being written. On success call `finish`; leaving the context otherwise keeps what `resume` can use.

    `fingerprint` stands for the plan and the source: a journal with another one is discarded. After an error of the
    checkpoint itself (any MegalithError but FileError) nothing is kept.
    """

    def __init__(self, path: Path, fingerprint: str, file_bytes: int, resume: bool) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.journal = path.with_name(path.name + ".partial.journal")
        self._fingerprint = fingerprint
        self._journal_descriptor = -1
        self._journal_lock = Lock()
        self._write_lock = Lock()
        try:
            self._descriptor = _open_locked(self.partial)
        except OSError as error:
            raise FileError.wrap(self.partial, error) from None
        self._flush = BackgroundFlush(self._descriptor)
        try:
            self._entries = self._read_journal() if resume else {}
            self._prepare(file_bytes)
        except OSError as error:
            self._close()
            raise FileError.wrap(self.partial, error) from None
        except BaseException:
            self._close()
            raise

    def _prepare(self, file_bytes: int) -> None:
        if self._entries and os.fstat(self._descriptor).st_size == file_bytes:
            self._journal_descriptor = self._open_journal()
            self._write_journal(b"\n")  # ends a line that a kill tore
            return
        self._entries = {}
        os.ftruncate(self._descriptor, 0)
        try:
            os.posix_fallocate(self._descriptor, 0, file_bytes)  # a full disk is found before the work
        except OSError:
            self.discard()
            raise
        self._journal_descriptor = self._open_journal(os.O_CREAT | os.O_TRUNC)
        self._append({"fingerprint": self._fingerprint})

    def _open_journal(self, flags: int = 0) -> int:
        return os.open(self.journal, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o666)

    def _read_journal(self) -> dict[str, dict[str, Any]]:
        """Intact entries by extent name; empty when the journal is of another plan."""
        try:
            lines = self.journal.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        entries = [entry for line in lines if (entry := _parse_line(line)) is not None]
        if not entries or entries[0] != {"fingerprint": self._fingerprint}:
            return {}
        return {entry["extent"]: entry for entry in entries[1:] if "extent" in entry}

    def finished(self, extent: Extent) -> dict[str, Any] | None:
        """The journal's entry for an extent whose bytes on disk still match it."""
        entry = self._entries.get(extent.name)
        if entry is None:
            return None
        hasher = ChunkHasher()
        for start in range(extent.offset, extent.offset + extent.nbytes, _READ_BYTES):
            stop = min(start + _READ_BYTES, extent.offset + extent.nbytes)
            try:
                hasher.update(os.pread(self._descriptor, stop - start, start))
            except OSError as error:
                raise FileError.wrap(self.partial, error) from None
        return entry if hasher.digests().tobytes().hex() == entry["checksums"] else None

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at `offset`; safe from several threads."""
        view = memoryview(data).cast("B")
        while view:
            try:
                with self._write_lock:  # file systems write one at a time anyway, and spin meanwhile
                    count = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                raise FileError.wrap(self.partial, error) from None
            self._flush.written(count)
            view, offset = view[count:], offset + count

    def record(self, extent: Extent, checksums: bytes, details: Any) -> None:
        """Journal a finished extent."""
        self._append({"extent": extent.name, "checksums": checksums.hex(), "details": details})

    def _append(self, entry: dict[str, Any]) -> None:
        text = json.dumps(entry, sort_keys=True).encode()
        self._write_journal(_line_digest(text) + b" " + text + b"\n")

    def _write_journal(self, line: bytes) -> None:
        try:
            with self._journal_lock:
                while line:
                    line = line[os.write(self._journal_descriptor, line) :]
        except OSError as error:
            raise FileError.wrap(self.journal, error) from None

    def finish(self, header: bytes) -> None:
        """Write the header, make everything durable and give the file its name."""
        self.write(0, header)
        try:
            self._flush.close()
            os.fsync(self._descriptor)
            os.replace(self.partial, self.path)  # atomic on local and distributed file systems
            fsync_folder(self.path.parent)
            self.journal.unlink(missing_ok=True)
        except OSError as error:
            raise FileError.wrap(self.path, error) from None

    def discard(self) -> None:
        """Remove the partial file and its journal; the partial file last, because its lock guards both."""
        for path in (self.journal, self.partial):
            path.unlink(missing_ok=True)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, MegalithError) and not isinstance(error, FileError):
            self.discard()
        self._close()

    def _close(self) -> None:
        with contextlib.suppress(OSError):
            self._flush.close()
        for descriptor in (self._journal_descriptor, self._descriptor):
            if descriptor >= 0:
                os.close(descriptor)


def _open_locked(partial: Path) -> int:
    """An exclusive lock on the partial file, which is created when absent."""
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(descriptor, partial):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise FileError(f"{printable(partial)}: another process is writing it") from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder finished and renamed it between our open and our lock


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def fsync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(path: Path, force: bool) -> None:
    """RequestError when `path` exists and may not be replaced, or is not a file."""
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise FileError.wrap(path, error) from None
    if is_folder:
        raise RequestError(f"{printable(path)}: is a folder")
    if exists and not force:
        raise RequestError(f"{printable(path)}: exists; --force replaces it")


def _line_digest(text: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(text).encode()


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """A journal line, or None when it is torn."""
    digest, _, text = line.partition(b" ")
    if not text or digest != _line_digest(text):
        return None
    try:
        entry = json.loads(text)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
