"""The parts of `tools/gpu_check.py` and `tools/gpu_tests.py` that need no GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu_check
import gpu_page
import gpu_tests
import pytest
from serving import until


def test_every_file_of_tests_is_run_once() -> None:
    names = [path.name for path in gpu_tests.test_files()] + list(gpu_tests.ALONE)
    assert sorted(names) == sorted(path.name for path in gpu_tests.TESTS.glob("test_*.py"))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("statuses", "outputs", "good"),
    [
        ((0, 0), ("3 passed in 1s", "5 skipped in 1s"), True),
        ((0, 0), ("3 skipped in 1s", "5 skipped in 1s"), False),
        ((0, 1), ("3 passed in 1s", "1 failed, 4 passed in 1s"), False),
    ],
)
def test_report(statuses: tuple[int, int], outputs: tuple[str, str], good: bool, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [gpu_tests.Outcome("test_x.py", status, 1.0, output) for status, output in zip(statuses, outputs, strict=True)]
    assert gpu_tests.report(outcomes) is good
    assert outputs[1] in capsys.readouterr().err


def test_tests_of_this_folder_skip_themselves_and_are_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = gpu_tests.run_file(gpu_tests.TESTS / "test_embedding.py")
    assert outcome.status == 0
    assert ("skipped" in outcome.summary) or ("passed" in outcome.summary)


@pytest.mark.parametrize(("script", "error"), [("echo 17", None), ("exit 3", "ended with 3"), ("true", "ended with 0")])
def test_a_start_is_timed_to_the_first_token(
    script: str, error: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nsleep 0.05\n{script}\nsleep 0.3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    if error:
        with pytest.raises(SystemExit, match=error):
            gpu_check.measure_start(tmp_path / "x.lith", gpu_check.MODELS[0])
        return
    row = gpu_check.measure_start(tmp_path / "x.lith", gpu_check.MODELS[0])
    assert row["ms"] >= 50
    assert row["work"] == "start"


def test_a_command_that_takes_too_long_leaves_no_process(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_check.run("sh", "-c", f"sleep 60 & echo $! > {noted}; wait", seconds=1)
    pid = int(noted.read_text())
    until(lambda: not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text())
    with pytest.raises(subprocess.CalledProcessError):
        gpu_check.run("sh", "-c", "exit 3")
    assert gpu_check.run("echo", 17) == "17\n"


def test_logits_further_than_transformers_are_found() -> None:
    rows = [{"error": e, "transformers_bf16_error": t} for e, t in ((1e-3, 2e-3), (3e-3, 2e-3), (1.0, None))]
    assert gpu_check.further_than_transformers(rows) == [rows[1]]


@pytest.mark.parametrize("name", ["gpu", "gpu-h100"])
def test_pages_are_of_their_files(name: str) -> None:
    path = Path(__file__).parent.parent / "docs" / "benchmarks" / f"{name}.json"
    report = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == gpu_page.page(report, path.name)
    assert "## Serving" in gpu_page.page(report, path.name)
    assert "## Serving" not in gpu_page.page({**report, "serve": None, "logits": []}, path.name)


def test_table() -> None:
    row = {"system": "megalith", "ms": 1.23456, "batch": None}
    assert gpu_page.table([row], ("system", "batch", "ms")).splitlines()[-1] == "| megalith |  | 1.235 |"
