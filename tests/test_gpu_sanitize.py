"""What `tools/gpu_sanitize.py` names exists, every kernel is among it, and its judgement of an output is right."""

from __future__ import annotations

import subprocess
import sys

import gpu_sanitize
import pytest

from megalith.runtime.compile import KERNELS


def test_every_kernel_has_cases_and_every_case_exists() -> None:
    assert set(gpu_sanitize.CASES) == {path.stem for path in KERNELS.glob("*.cu")}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=--import-mode=importlib"]
    command += gpu_sanitize.node_ids("memcheck")
    done = subprocess.run(command, cwd=gpu_sanitize.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(gpu_sanitize.BETWEEN_WARPS) < set(gpu_sanitize.CASES)
    assert set(gpu_sanitize.node_ids("racecheck")) < set(gpu_sanitize.node_ids("racecheck", True))
    wanted = {f"tests/gpu/{name}" for names in [*gpu_sanitize.CASES.values(), gpu_sanitize.WHOLE_MODELS] for name in names}
    assert {line for line in done.stdout.splitlines() if "::" in line} == wanted


@pytest.mark.parametrize(
    ("status", "output", "found"),
    [
        (0, "{n} passed in 3s\n========= ERROR SUMMARY: 0 errors\n", "clean"),
        (0, "{n} passed in 3s\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "clean"),
        (0, "3 passed, 2 skipped in 3s\n========= ERROR SUMMARY: 0 errors\n", "3 of {n} tests passed"),
        (
            9,
            "{n} passed in 3s\n========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 1 error\n",
            "1 reports",
        ),
        (9, "{n} passed\n========= Error: Race reported between Write access at x and Read access at y\n", "1 reports"),
        (1, "1 failed, 3 passed in 3s\n", "the tests ended with 1"),
    ],
)
def test_judgement(status: int, output: str, found: str) -> None:
    wanted = len(gpu_sanitize.node_ids("racecheck"))
    outcome = gpu_sanitize.judge("racecheck", status, output.replace("{n}", str(wanted)), 1.0, wanted)
    assert outcome.status == found.replace("{n}", str(wanted))
    assert outcome.is_clean == (found == "clean")
