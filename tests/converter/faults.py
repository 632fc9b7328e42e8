"""Faults at the n-th system call that changes a file: a kill of a forked child, an error, a short write."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalith.converter.convert import Result, convert
from megalith.format.reader import PackedFile
from megalith.format.verify import verify_checksums

CHANGING_CALLS = ("ftruncate", "posix_fallocate", "pwrite", "write", "fsync", "replace", "unlink")

EVERY, NONE = -1, 1 << 31

Act = Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]


class Calls:
    """Counts the calls that change files; number `number`, or EVERY one, is handed to `act(name, call, arguments)`."""

    def __init__(self, number: int, act: Act) -> None:
        self.names: list[str] = []
        self._number = number
        self._act = act
        self._lock = threading.Lock()

    def install(self, patch: Callable[[object, str, object], None]) -> Calls:
        for name in CHANGING_CALLS:
            patch(os, name, self._wrapped(name, getattr(os, name)))
        return self

    def _wrapped(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            with self._lock:
                number = len(self.names)
                self.names.append(name)
            if self._number in (number, EVERY):
                return self._act(name, call, arguments)
            return call(*arguments, **keywords)

        return wrapper


def half(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """The call with at least one but only about half of the bytes it was to write."""
    if name not in ("write", "pwrite"):
        return call(*arguments)
    descriptor, data, *offset = arguments
    return call(descriptor, data[: (len(data) + 1) // 2], *offset)


def kill_before(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # in another thread than the one that takes the signal


def kill_within(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    half(name, call, arguments)
    kill_before(name, call, arguments)


def fails(code: int) -> Act:
    def act(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        raise OSError(code, os.strerror(code))

    return act


def fork(work: Callable[[], int]) -> int:
    """The wait status of a child that runs `work` and exits with what it returns; 99 for an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside other libraries' threads
        child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def converts_until(number: int, act: Act, source: Path, target: Path, **options: Any) -> bool:
    """Convert in a child with a fault at call `number`; whether it was killed rather than finished."""

    def work() -> int:
        Calls(number, act).install(setattr)
        convert(source, target, jobs=1, **options)
        return 0

    status = fork(work)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def convert_with(monkeypatch: pytest.MonkeyPatch, number: int, act: Act, source: Path, target: Path) -> list[str]:
    """Convert with a fault in this process; returns the names of the calls."""
    with monkeypatch.context() as patch:
        calls = Calls(number, act).install(patch.setattr)
        convert(source, target, jobs=1)
    return calls.names


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".partial" in path.name)


def resume(source: Path, target: Path) -> Result:
    return convert(source, target, jobs=1, resume=True)


def assert_whole_or_absent(target: Path, reference: bytes) -> None:
    if target.exists():
        assert target.read_bytes() == reference
        with PackedFile(target) as packed:
            assert verify_checksums(packed, 1) == []


def killed_late(source: Path, target: Path, **options: Any) -> None:
    """Leave a partial file with several finished blobs."""
    assert converts_until(18, kill_within, source, target, **options)


def journal_of(target: Path) -> Path:
    return target.with_name(target.name + ".partial.journal")


def partial_of(target: Path) -> Path:
    return target.with_name(target.name + ".partial")
