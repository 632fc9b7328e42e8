"""The output's place: existing files, names and folders that cannot be written, rivals, locks, interrupts."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from checkpoints import Tensor, tiny_config, tiny_tensors, write_checkpoint
from faults import (
    NONE,
    Calls,
    convert_with,
    converts_until,
    fails,
    fork,
    half,
    journal_of,
    kill_within,
    leftovers,
    partial_of,
    resume,
)

from megalith.cli import run
from megalith.converter.convert import convert
from megalith.format.errors import CheckpointError, FileError, MegalithError, RequestError
from megalith.format.writer import PartialFile


def cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code of `megalith convert` and the one line that it put on standard error."""
    code = run(["convert", *map(str, arguments)])
    captured = capsys.readouterr()
    if code == 0:
        return code, captured.out
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("megalith: ")
    return code, captured.err


def test_existing_output_is_kept_without_force(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "model.lith"
    target.write_bytes(b"old")
    code, line = cli(capsys, source, target)
    assert (code, line) == (2, f"megalith: {target}: exists; --force replaces it\n")
    assert target.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_force_replaces_only_when_complete(source: Path, target: Path, reference: bytes) -> None:
    target.write_bytes(b"old")

    def progress(_: int) -> None:
        assert target.read_bytes() == b"old"

    convert(source, target, jobs=1, force=True, on_plan=lambda _: progress)
    assert target.read_bytes() == reference


def test_kill_with_force_keeps_the_old_file_until_the_rename(
    source: Path, target: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = convert_with(monkeypatch, NONE, half, source, source.with_name("counted.lith"))
    for number in range(0, len(names), 5):
        target.write_bytes(b"old")
        assert converts_until(number, kill_within, source, target, force=True)
        assert target.read_bytes() == (b"old" if number < names.index("replace") else reference)


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda path: path.mkdir(), 2, "model.lith: is a folder"),
        (lambda path: partial_of(path).mkdir(), 5, "model.lith.partial: Is a directory"),
        (lambda path: partial_of(path).symlink_to("elsewhere"), 5, "model.lith.partial: Too many levels of symbolic links"),
        (lambda path: journal_of(path).symlink_to("elsewhere"), 5, "model.lith.partial: Too many levels of symbolic links"),
        (lambda path: path.parent.rmdir(), 5, "model.lith.partial: No such file or directory"),
        (lambda path: (path.parent.rmdir(), path.parent.write_bytes(b"")), 5, "model.lith.partial: Not a directory"),
    ],
)
def test_output_that_cannot_be_written(
    make: Callable[[Path], None], code: int, message: str, source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target.parent.mkdir()
    make(target)
    found, line = cli(capsys, source, target, "--force")
    assert found == code
    assert line.endswith(f"{message}\n")
    assert not (target.parent / "elsewhere").exists()


def test_output_name_too_long(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for length in (240, 250, 300):
        for option in ("--resume", "--force"):
            code, line = cli(capsys, source, tmp_path / ("n" * length), option)
            assert code == 5
            assert line.endswith("File name too long\n")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_read_only_folder(
    code: int, source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target.parent.mkdir()
    real = os.open

    def refusing(path: Any, flags: int, mode: int = 0o777, **keywords: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(code, os.strerror(code), os.fspath(path))
        return real(path, flags, mode, **keywords)

    monkeypatch.setattr(os, "open", refusing)
    assert cli(capsys, source, target) == (5, f"megalith: {partial_of(target)}: {os.strerror(code)}\n")
    assert list(target.parent.iterdir()) == []


def test_the_second_of_two_converters_fails_at_once(source: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target.parent.mkdir()
    with PartialFile(target, "first", 4096, resume=False):
        for options in ([], ["--resume"], ["--force"]):
            code, line = cli(capsys, source, target, *options)
            assert (code, line) == (5, f"megalith: {partial_of(target)}: another process is writing it\n")
    assert partial_of(target).stat().st_size == 4096
    assert cli(capsys, source, target)[0] == 0


def test_a_kill_releases_the_lock(source: Path, target: Path, reference: bytes) -> None:
    def work() -> int:
        with PartialFile(target, "killed", 4096, resume=False):
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert os.WIFSIGNALED(fork(work))
    assert leftovers(target.parent) == ["model.lith.partial", "model.lith.partial.journal"]
    convert(source, target, jobs=1)
    assert target.read_bytes() == reference
    assert leftovers(target.parent) == []


def test_a_failed_start_releases_the_lock(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target.parent.mkdir()
    open_files = len(os.listdir("/proc/self/fd"))
    for number in range(3):  # ftruncate, posix_fallocate, the journal's first line
        with pytest.raises(FileError):
            convert_with(monkeypatch, number, fails(errno.EIO), source, target)
    assert len(os.listdir("/proc/self/fd")) == open_files
    convert(source, target, jobs=1)


def before_the_first_lock(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    flock, actions = fcntl.flock, [action]

    def wrapper(descriptor: int, operation: int) -> None:
        if actions:
            actions.pop()()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", wrapper)


@pytest.mark.parametrize("ends", ["renamed", "discarded"])
def test_rival_that_ends_between_open_and_lock(
    ends: str, source: Path, target: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = target.with_name("elsewhere")

    def end() -> None:
        os.replace(partial_of(target), elsewhere) if ends == "renamed" else os.unlink(partial_of(target))

    before_the_first_lock(monkeypatch, end)
    convert(source, target, jobs=1)
    assert target.read_bytes() == reference
    assert not elsewhere.exists() or elsewhere.read_bytes() == b"", "the rival's file is left alone"


def test_rival_that_finishes_between_check_and_lock(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target.parent.mkdir()
    before_the_first_lock(monkeypatch, lambda: os.replace(partial_of(target), target))
    with pytest.raises(RequestError, match="exists; --force replaces it"):
        convert(source, target, jobs=1)
    assert target.read_bytes() == b""
    assert leftovers(target.parent) == []


def test_a_journal_that_a_rival_removed_does_no_harm(
    source: Path, target: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_plan(_: object) -> Callable[[int], None]:
        return lambda _: journal_of(target).unlink(missing_ok=True)

    convert(source, target, jobs=1, on_plan=on_plan)
    assert target.read_bytes() == reference


def test_interrupt_keeps_what_resume_needs(source: Path, target: Path, reference: bytes) -> None:
    def interrupt(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return call(*arguments)

    def work() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        Calls(18, interrupt).install(setattr)
        return run(["convert", str(source), str(target), "--jobs", "1"])

    assert os.WEXITSTATUS(fork(work)) == 130
    assert leftovers(target.parent) == ["model.lith.partial", "model.lith.partial.journal"]
    assert not target.exists()
    assert resume(source, target).resumed_bytes > 0
    assert target.read_bytes() == reference


def test_an_interrupt_starts_no_further_blob(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target.parent.mkdir()
    shutdown, noticed, starts = ThreadPoolExecutor.shutdown, Event(), 0

    def noticing(pool: ThreadPoolExecutor, *arguments: Any, **keywords: Any) -> None:
        noticed.set()
        shutdown(pool, *arguments, **keywords)

    def progress(_: int) -> None:
        nonlocal starts
        starts += 1
        if starts == 1:
            raise KeyboardInterrupt
        assert noticed.wait(60)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", noticing)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, jobs=1, on_plan=lambda _: progress)
    assert starts <= 2, "the thread may have begun another blob before the interrupt was noticed, but no third"
    assert leftovers(target.parent) == ["model.lith.partial", "model.lith.partial.journal"]


def test_a_checkpoint_error_leaves_nothing(tmp_path: Path, target: Path) -> None:
    tensors = tiny_tensors(tiny_config())
    tensors["lm_head.weight"] = Tensor("BF16", (12, 16), b"\x80\x7f" * 192)
    source = write_checkpoint(tmp_path / "infinite", tensors=tensors)
    target.parent.mkdir()
    for again in (False, True):
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            convert(source, target, jobs=2, resume=again, force=again)
        assert list(target.parent.iterdir()) == []


def test_the_same_error_whichever_thread_is_first(tmp_path: Path, target: Path) -> None:
    """Of several bad tensors the same one is named in every run."""
    config = tiny_config(num_hidden_layers=3)
    tensors = {name: Tensor(t.dtype, t.shape, b"\xff\x7f" * (len(t.data) // 2)) for name, t in tiny_tensors(config).items()}
    source = write_checkpoint(tmp_path / "bad", config, tensors)
    target.parent.mkdir()
    messages = set()
    for jobs in (1, 2, 4, 8) * 3:
        with pytest.raises(MegalithError) as caught:
            convert(source, target, jobs=jobs)
        messages.add(str(caught.value))
    assert len(messages) == 1
    assert "model.embed_tokens.weight" in messages.pop()
