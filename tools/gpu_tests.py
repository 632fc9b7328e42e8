#!/usr/bin/env python3
"""The tests marked `gpu`, a pytest process for each file and several at a time: compiling kernels takes most of their time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests" / "gpu"
ALONE = ("test_allocation.py",)  # compares the free memory of the device before and after
LARGEST = ("test_gemm_wgmma.py", "test_backend.py", "test_attention_prefill.py")  # first, so that they do not end last
AT_ONCE = 5


@dataclass(frozen=True)
class Outcome:
    """How a file's tests ended."""

    name: str
    status: int
    seconds: float
    output: str

    @property
    def summary(self) -> str:
        """pytest's last line."""
        lines = reversed(self.output.splitlines())
        return next((line for line in lines if re.search(r"\d+ (passed|failed|error|skipped)", line)), "no summary")


def test_files() -> list[Path]:
    """The largest first."""
    files = {path.name: path for path in sorted(TESTS.glob("test_*.py")) if path.name not in ALONE}
    return [files.pop(name) for name in LARGEST] + list(files.values())


def run_file(path: Path) -> Outcome:
    """One pytest process."""
    options = ["-o", "addopts=--strict-markers --import-mode=importlib", "-W", "ignore::DeprecationWarning"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *options, str(path)]
    begun = time.monotonic()
    done = subprocess.run(
        command, cwd=TESTS.parent.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    return Outcome(path.name, done.returncode, time.monotonic() - begun, done.stdout)


def run_all() -> list[Outcome]:
    """Every file; those that want the device for themselves last."""
    with ThreadPoolExecutor(min(AT_ONCE, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(run_file, test_files()))
    return outcomes + [run_file(TESTS / name) for name in ALONE]


def report(outcomes: Sequence[Outcome]) -> bool:
    """Prints a line per file, and the output of those that failed; whether none did, and not all were skipped."""
    for one in outcomes:
        if one.status:
            print(one.output, file=sys.stderr)
    for one in outcomes:
        print(f"{one.name:28} {one.seconds:6.1f} s  {one.summary}", file=sys.stderr, flush=True)
    return not any(one.status for one in outcomes) and any(" passed" in one.summary for one in outcomes)


if __name__ == "__main__":
    sys.exit(0 if report(run_all()) else 1)
