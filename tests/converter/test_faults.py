"""Kills, full disks, failing devices and sources that change during a conversion: a whole file under the final name, or none.

A fault is placed at every system call that changes a file. Kills are real: a forked child gets SIGKILL before the call,
or halfway through what it writes.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import safetensors_bytes, tiny_config, tiny_tensors
from faults import (
    CHANGING_CALLS,
    EVERY,
    NONE,
    Act,
    assert_whole_or_absent,
    convert_with,
    converts_until,
    fails,
    half,
    journal_of,
    kill_before,
    kill_within,
    killed_late,
    leftovers,
    partial_of,
    resume,
)

import megalith
from megalith.cli import run
from megalith.converter.convert import convert
from megalith.converter.plan import Options
from megalith.format.errors import CheckpointError, FileError, RequestError


@pytest.mark.parametrize("act", [kill_before, kill_within])
def test_kill_at_every_call_then_resume(
    act: Act, source: Path, target: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = convert_with(monkeypatch, NONE, half, source, source.with_name("counted.lith"))
    assert set(names) == set(CHANGING_CALLS)
    renamed = names.index("replace")
    resumed = []
    for number in range(len(names)):
        assert converts_until(number, act, source, target)
        assert target.exists() == (number > renamed or (number == renamed and act is kill_within))
        assert_whole_or_absent(target, reference)
        result = resume(source, target)
        assert target.read_bytes() == reference
        assert result.already_complete == (number > renamed or (number == renamed and act is kill_within))
        if not result.already_complete:
            resumed.append(result.resumed_bytes)
            assert leftovers(target.parent) == []
        for path in target.parent.iterdir():
            path.unlink()
    image = sum(extent.nbytes for extent in result.plan.extents[:-3])
    assert resumed == sorted(resumed), "a later kill never leaves less to go on with"
    assert (resumed[0], resumed[-1]) == (0, image)
    assert len(set(resumed)) == len(result.plan.specs) + 1, "every finished blob is kept"


def test_resumed_runs_that_are_killed_too_make_progress(source: Path, target: Path, reference: bytes) -> None:
    runs = 0
    while converts_until(9, kill_within, source, target, resume=True):
        assert_whole_or_absent(target, reference)
        runs += 1
        assert runs < 30
    assert target.read_bytes() == reference
    assert runs > 3


def test_every_damaged_journal_gives_the_same_bytes(source: Path, target: Path, reference: bytes) -> None:
    killed_late(source, target)
    partial, journal = partial_of(target).read_bytes(), journal_of(target).read_bytes()
    lines = journal.split(b"\n")
    cases = {
        "empty": b"",
        "only newlines": b"\n\n",
        "not text": bytes(range(256)),
        "first line gone": b"\n".join(lines[1:]),
        "first line torn": lines[0][:20],
        "last line torn": journal[: len(journal) - len(lines[-2]) // 2],
        "a line torn in the middle": b"\n".join([*lines[:2], lines[2][:30], *lines[3:]]),
        "two lines in one": b"\n".join([*lines[:2], lines[2] + lines[3], *lines[4:]]),
        "a digit changed": journal.replace(b'"checksums": "', b'"checksums": "0', 1),
        "lines swapped": b"\n".join([lines[0], *reversed(lines[1:])]),
        "lines doubled": journal + journal,
        "not JSON though the digest is right": journal + journal_line(b"{"),
        "another kind of line": journal + journal_line(b"[1]") + journal_line(b'{"later": 1}'),
    }
    kept = {}
    for name, damaged in cases.items():
        partial_of(target).write_bytes(partial)
        journal_of(target).write_bytes(damaged)
        kept[name] = resume(source, target).resumed_bytes
        assert target.read_bytes() == reference, name
        target.unlink()
    assert kept["empty"] == kept["first line gone"] == kept["first line torn"] == 0
    assert kept["lines swapped"] == kept["lines doubled"] == kept["another kind of line"] > kept["two lines in one"] > 0
    assert kept["last line torn"] < kept["lines swapped"]


def journal_line(text: bytes) -> bytes:
    import xxhash

    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def test_damage_to_the_partial_file_is_packed_again(source: Path, target: Path, reference: bytes) -> None:
    killed_late(source, target)
    partial, journal = partial_of(target).read_bytes(), journal_of(target).read_bytes()
    untouched = resume(source, target).resumed_bytes
    target.unlink()
    for position in range(4096, len(partial), 4096):
        damaged = bytearray(partial)
        damaged[position + 5] ^= 0x10
        partial_of(target).write_bytes(damaged)
        journal_of(target).write_bytes(journal)
        assert resume(source, target).resumed_bytes <= untouched
        assert target.read_bytes() == reference
        target.unlink()
    for content in (b"", partial[:-1], partial + b"\0", bytes(len(partial))):
        partial_of(target).write_bytes(content)
        journal_of(target).write_bytes(journal)
        assert resume(source, target).resumed_bytes == 0
        assert target.read_bytes() == reference
        target.unlink()


@pytest.mark.parametrize("options", [Options(dtype="fp16"), Options(max_seq_len=16), Options(allow_nonfinite=True)])
def test_a_partial_file_of_other_options_is_not_continued(
    source: Path, target: Path, reference: bytes, options: Options
) -> None:
    killed_late(source, target, options=options)
    assert resume(source, target).resumed_bytes == 0
    assert target.read_bytes() == reference


def other_weights(source: Path) -> bytes:
    return safetensors_bytes(tiny_tensors(json.loads((source / "config.json").read_text()), seed=1000))


def overwrite(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.write(data)


def overwrite_with_old_times(path: Path, data: bytes) -> None:
    before = path.stat()
    overwrite(path, data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path, data: bytes) -> None:
    before = path.stat()
    new = path.with_suffix(".new")
    new.write_bytes(data)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(new, path)


@pytest.mark.parametrize("change", [overwrite, overwrite_with_old_times, replace])
def test_a_source_that_changed_since_the_kill_is_packed_again(
    change: Callable[[Path, bytes], None], source: Path, target: Path, reference: bytes
) -> None:
    killed_late(source, target)
    change(source / "model.safetensors", other_weights(source))
    assert resume(source, target).resumed_bytes == 0
    convert(source, target.with_name("fresh.lith"), jobs=1)
    assert target.read_bytes() == target.with_name("fresh.lith").read_bytes() != reference


def test_resume_of_a_finished_file_compares_the_weights(
    source: Path, target: Path, reference: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(source, target, jobs=1)
    assert resume(source, target).already_complete
    overwrite_with_old_times(source / "model.safetensors", other_weights(source))
    with pytest.raises(RequestError, match="exists; --force replaces it"):
        resume(source, target)
    assert target.read_bytes() == reference
    target.write_bytes(b"something else")
    assert run(["convert", str(source), str(target), "--resume"]) == 2
    assert "exists; --force replaces it" in capsys.readouterr().err
    assert target.read_bytes() == b"something else"


@pytest.mark.parametrize("change", [overwrite, overwrite_with_old_times, replace])
def test_a_source_that_changes_meanwhile_gives_no_file(
    change: Callable[[Path, bytes], None], source: Path, target: Path, reference: bytes
) -> None:
    def on_plan(_: object) -> Callable[[int], None]:
        change(source / "model.safetensors", other_weights(source))
        return lambda _: None

    with pytest.raises(CheckpointError, match=r"checkpoint/model\.safetensors: changed while it was read"):
        convert(source, target, jobs=1, on_plan=on_plan)
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_every_call(
    code: int, source: Path, target: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = convert_with(monkeypatch, NONE, half, source, source.with_name("counted.lith"))
    for number, name in enumerate(names):
        with pytest.raises(FileError) as caught:
            convert_with(monkeypatch, number, fails(code), source, target)
        assert caught.value.exit_code == 5
        assert str(target) in str(caught.value)
        assert os.strerror(code) in str(caught.value)
        assert target.exists() == (number > names.index("replace"))
        assert_whole_or_absent(target, reference)
        if name == "posix_fallocate":
            assert list(target.parent.iterdir()) == [], "what found no room takes none"
        resume(source, target)
        assert target.read_bytes() == reference
        target.unlink()


def test_short_writes_are_continued(source: Path, target: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    names = convert_with(monkeypatch, EVERY, half, source, target)
    assert target.read_bytes() == reference
    assert len(names) > 200


def test_short_journal_writes_lose_no_entry(
    source: Path, target: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if name == "replace":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return half(name, call, arguments)

    with pytest.raises(FileError):
        convert_with(monkeypatch, EVERY, short, source, target)
    result = resume(source, target)
    assert result.resumed_bytes == sum(extent.nbytes for extent in result.plan.extents[:-3])
    assert target.read_bytes() == reference


def test_short_reads_of_the_source_are_continued(
    source: Path, target: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    convert(source, target, jobs=1)
    assert target.read_bytes() == reference


def test_every_failing_read_of_the_source_names_it(
    source: Path, target: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, number, messages = os.preadv, 0, []
    while not target.exists():
        count = 0

        def failing(fd: int, views: list[memoryview], offset: int) -> int:
            nonlocal count
            count += 1
            if count == number + 1:  # noqa: B023
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return preadv(fd, views, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", failing)
            try:
                convert(source, target, jobs=1)
            except FileError as error:
                messages.append(str(error))
        number += 1
    assert messages == [f"{source}/model.safetensors: Input/output error"] * len(tiny_tensors(tiny_config()))
    assert target.read_bytes() == reference


@pytest.mark.parametrize("keep", [0, 700, -1])
def test_source_truncated_meanwhile(keep: int, source: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = source / "model.safetensors"
    size = weights.stat().st_size

    def on_plan(_: object) -> Callable[[int], None]:
        os.truncate(weights, keep if keep >= 0 else size + keep)
        return lambda _: None

    target.parent.mkdir()
    with pytest.raises(FileError, match=r"model\.safetensors: ends at byte \d+, inside 'model\.|lm_head") as caught:
        convert(source, target, jobs=2, on_plan=on_plan)
    assert caught.value.exit_code == 5
    assert not target.exists()


def test_shard_removed_meanwhile(source: Path, target: Path) -> None:
    def on_plan(_: object) -> Callable[[int], None]:
        (source / "model.safetensors").unlink()
        return lambda _: None

    target.parent.mkdir()
    with pytest.raises(FileError, match=r"model\.safetensors: No such file or directory"):
        convert(source, target, jobs=2, on_plan=on_plan)
    assert not target.exists()


def test_the_result_opens(source: Path, target: Path, reference: bytes) -> None:
    killed_late(source, target)
    resume(source, target)
    with megalith.open(target) as packed:
        assert packed.file("merges.txt") == b"a b\n"
