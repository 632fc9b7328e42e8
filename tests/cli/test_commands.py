"""Commands as a person meets them: help, start-up time, exit codes, one line for an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from golden_models import GoldenModel
from stopwatch import fastest_seconds

import megalith
from megalith.cli import COMMANDS, run


@pytest.mark.parametrize(
    ("limit", "arguments"),
    [(0.150, ["-c", "import megalith"]), *((0.300, ["-m", "megalith", *command, "--help"]) for command in ([], ["convert"]))],
)
def test_start_up_is_fast(limit: float, arguments: list[str]) -> None:
    assert fastest_seconds(limit, *arguments)[0] <= limit


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    """What makes help fast, whatever the machine is busy with."""
    script = "import sys; from megalith.cli import run; assert run(sys.argv[1:]) == 0; print(*sys.modules, file=sys.stderr)"
    arguments = [sys.executable, "-c", script, *command, "--help"]
    loaded = subprocess.run(arguments, capture_output=True, text=True, check=True).stderr.split()
    heavy = {"numpy", "ml_dtypes", "tokenizers", "jinja2", "tqdm", "msgpack", "zstandard", "xxhash", "cupy"}
    assert not heavy & set(loaded)


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
        (["generate", "{dir}/text.lith"], 2, "one of --prompt, --chat and --prompt-ids"),
        (["generate", "{packed}", "--prompt-ids", "1,x"], 2, "give token ids with commas between"),
        (["generate", "{packed}", "--prompt-ids", "1,99999999", "--backend", "numpy"], 2, "token 1 is 99999999"),
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


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["inspect", "{packed}", "--stats"]])
def test_a_closed_pipe_is_no_error(arguments: list[str], packed_llama: Path) -> None:
    command = [sys.executable, "-m", "megalith", *(argument.format(packed=packed_llama) for argument in arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    "arguments", [["--help"], ["diff", "--help"], ["verify", "{packed}"], ["inspect", "{packed}", "--json"]]
)
def test_output_that_cannot_be_written_is_no_difference_found(arguments: list[str], packed_llama: Path) -> None:
    command = [sys.executable, "-m", "megalith", *(argument.format(packed=packed_llama) for argument in arguments)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (5, "megalith: standard output: No space left on device\n")
