"""Commands as a person meets them: help, start-up time, exit codes, one line for an error."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from golden_models import GoldenModel

import megalith
from megalith.cli import COMMANDS, run


def best_seconds(*arguments: str) -> float:
    """The fastest of five runs of a fresh interpreter: what others do on the machine only adds."""
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def test_start_up_is_fast() -> None:
    assert best_seconds("-c", "import megalith") < 0.150
    assert best_seconds("-m", "megalith", "--help") < 0.300


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert name in text
        assert run([name, "--help"]) == 0
        assert "Usage: megalith " + name in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"megalith {megalith.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nonsense"], 2, "No such command"),
        (["convert", "{dir}"], 2, "Missing argument"),
        (["convert", "{dir}/absent", "{dir}/x.lith"], 2, "not a folder"),
        (["convert", "{dir}", "{dir}/x.lith"], 3, "config.json is missing"),
        (["verify", "{dir}/absent.lith"], 5, "No such file"),
        (["inspect", "{dir}/absent.lith"], 5, "No such file"),
        (["inspect", "{dir}/text.lith"], 3, "not a Megalith file"),
        (["inspect", "{dir}"], 5, "not a regular file"),
        (["unpack", "{dir}/text.lith", "{dir}/out"], 3, "not a Megalith file"),
        (["diff", "{dir}/text.lith", "{dir}/text.lith"], 3, "not a Megalith file"),
        (["generate", "{dir}/text.lith", "--prompt", "x"], 3, "not a Megalith file"),
        (["generate", "{dir}/text.lith"], 2, "--prompt and --chat"),
        (["generate", "{packed}", "--prompt", "x"], 2, "holds no tokenizer"),
        (["generate", "{packed}", "--prompt", "x", "--temperature", "nan"], 2, "temperature is nan"),
        (["generate", "{packed}", "--prompt", "x", "--backend", "cupy"], 4, "cupy"),
        (["unpack", "{packed}", "{dir}"], 2, "not an empty folder"),
        (["unpack", "{packed}", "/proc/nowhere/out"], 5, "/proc/nowhere"),
    ],
)
def test_exit_codes_and_messages(
    arguments: list[str], code: int, message: str, packed_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.lith").write_text("hello")
    capsys.readouterr()
    filled = [argument.format(dir=tmp_path, packed=packed_llama) for argument in arguments]
    assert run(filled) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert "Traceback" not in output.err
    if code != 2:
        assert output.err.count("\n") == 1


def test_convert_prints_its_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, target = GoldenModel("qwen2"), tmp_path / "model.lith"
    assert run(["convert", str(model.folder), str(target), "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not target.exists()
    assert run(["convert", str(model.folder), str(target), "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["version"] == planned["version"] == 1
    assert manifest["file_bytes"] == planned["file_bytes"] == target.stat().st_size
    assert manifest["sections"] == planned["sections"]
    assert manifest["padding_bytes"] == planned["padding_bytes"] > 0
    assert run(["convert", str(model.folder), str(target)]) == 2
    assert run(["convert", str(model.folder), str(target), "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["already_complete"]


def test_a_closed_pipe_is_no_error(packed_llama: Path) -> None:
    command = [sys.executable, "-m", "megalith", "inspect", str(packed_llama), "--stats"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
