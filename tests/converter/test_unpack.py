"""`unpack`: a whole checkpoint under the folder's name or nothing, and nothing else touched."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import megalith
from megalith.cli import run
from megalith.converter.unpack import unpack
from megalith.format.errors import FileError


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("name", ["mkdir", "fsync", "rename"])
def test_an_error_leaves_nothing(
    name: str, code: int, packed_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, number, before = getattr(os, name), 0, sorted(tmp_path.iterdir())
    with megalith.open(packed_llama) as packed:
        while not (tmp_path / "back").exists():
            calls = 0

            def failing(*arguments: object, **keywords: object) -> object:
                nonlocal calls
                calls += 1
                if calls == number + 1:  # noqa: B023
                    raise OSError(code, os.strerror(code))
                return real(*arguments, **keywords)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, failing)
                try:
                    unpack(packed, tmp_path / "back")
                except FileError as error:
                    assert str(error) == f"{tmp_path / 'back'}: {os.strerror(code)}"  # noqa: PT017
                    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
                    if (tmp_path / "back").exists():  # it had its name already when the folder above could not be flushed
                        assert (name, calls) == ("fsync", number + 1)
                    else:
                        assert sorted(tmp_path.iterdir()) == before
            number += 1
    assert number > 1
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "back").iterdir()}


def test_a_folder_of_another_is_left_alone(packed_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "back.partial").mkdir()
    (tmp_path / "back.partial" / "thesis.tex").write_text("years")
    (tmp_path / "back").mkdir()
    assert run(["unpack", str(packed_llama), str(tmp_path / "back")]) == 0
    assert (tmp_path / "back.partial" / "thesis.tex").read_text() == "years"
    assert (tmp_path / "back" / "model.safetensors").exists()


def test_the_current_folder_is_refused(
    packed_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert run(["unpack", str(packed_llama), "."]) == 2
    assert capsys.readouterr().err == "megalith: .: is where the command runs; name a folder in it\n"
