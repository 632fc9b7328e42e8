#!/usr/bin/env python3
"""NVIDIA's compute-sanitizer over small cases of every kernel: memcheck, racecheck and synccheck, at once, each within a limit.

Prints a line per tool and ends with 1 when one of them finds something, fails or takes too long.

- initcheck is left out: the arena and every buffer of a test are written by the host or by memset before a kernel runs, so it
  could find nothing.
- Errors that the driver returns are not reported: the length of a kernel's parameter list is found by asking for one too many,
  and every status is looked at (`runtime/launch.py`).
- The tests allocate without CuPy's pool (`MEGALITH_TEST_POOL=0`), so that each array has bounds that memcheck knows.
- The sanitizer runs one kernel after the other: what programmatic dependent launch overlaps is not seen overlapping. Races
  between kernels are left to the tests, which compare two runs bit by bit.
- racecheck looks at shared memory. It does not connect a bulk copy with the mbarrier that it completes where one warp
  copies and others wait in a loop, and reports a race for each (a known limit for copies by address; its option for
  asynchronous copies is of cp.async alone). So BETWEEN_WARPS, where a producer warp does just that, is left out of it
  unless --all asks: memcheck and synccheck have those kernels, and their tests compare runs bit by bit. In the other kernels
  a warp copies for itself; where warps of linear leave sums for another one, every lane arrives on the mbarrier that the
  reader waits on, as racecheck takes an arrival to order the arriving lane's own writes alone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOUND_ERRORS = 9  # exit status of the sanitizer when it reports something
CASES = {  # by kernel, the smallest that go through all of its parts
    "attention_decode": (
        "test_attention_decode.py::test_attention_and_cache[6-3-3-head-BF16-0-False-False]",
        "test_attention_decode.py::test_attention_and_cache[64-6-2-none-F16-300-False-False]",
        "test_attention_decode.py::test_attention_and_cache[80-12-1-head-BF16-0-True-False]",
    ),
    "attention_prefill": (
        "test_attention_prefill.py::test_lengths[65-attention_prefill-64]",
        "test_attention_prefill.py::test_windows_and_sinks[True-17-attention_prefill-80]",
    ),
    "attention_prefill_wgmma": (
        "test_attention_prefill.py::test_lengths[200-attention_prefill_wgmma-64]",
        "test_attention_prefill.py::test_windows_and_sinks[True-17-attention_prefill_wgmma-128]",
    ),
    "embedding": ("test_embedding.py::test_rows[BF16-49-30]", "test_embedding.py::test_ids_of_slots[ids1]"),
    "gemm_wgmma": (
        "test_gemm_wgmma.py::test_planned_shapes[tile16x512-48-96-5]",
        "test_gemm_wgmma.py::test_planned_shapes[mxfp4-112-576-17]",
        "test_gemm_wgmma.py::test_every_tile[608-128-1]",
        "test_gemm_wgmma.py::test_every_tile[640-48-1]",
        "test_gemm_wgmma.py::test_divided_among_few_and_many_blocks[tile16x512-2560-14]",
        "test_gemm_wgmma.py::test_parts_of_the_columns_are_added_in_turn[tile16x512-4096-64-1-3]",
        "test_gemm_wgmma.py::test_swiglu[48-17-0.0-8-tile16x512-BF16]",
        "test_qkv_post.py::test_product_that_goes_on[64-head-1.0-BF16-2-16-tile16x512]",
        "test_qkv_post.py::test_product_that_goes_on[128-head-1.2-BF16-2-224-mxfp4]",
    ),
    "linear": (
        "test_linear.py::test_products[tile16x512-48-96-5]",
        "test_linear.py::test_products[mxfp4-112-576-8]",
        "test_linear.py::test_swiglu[7.0-BF16]",
    ),
    "qkv_post": (
        "test_qkv_post.py::test_queries_and_cache[80-3-1-none-inf-F16]",
        "test_qkv_post.py::test_queries_and_cache[16-9-3-full-inf-BF16]",
    ),
    "rmsnorm": ("test_rmsnorm.py::test_norm[BF16-False-True-8-577]", "test_rmsnorm.py::test_norm[BF16-False-False-32-30]"),
    "sampling": (
        "test_sampling.py::test_draws_are_the_references[normal-1000]",
        "test_sampling.py::test_penalties_and_biases[333]",
        "test_sampling.py::test_masks_decide_the_token_and_not_the_log_probabilities[1000]",
        "test_sampling.py::test_decode_state_moves_on",
    ),
    "take_rows": ("test_take_rows.py::test_rows[BF16-8-False-False-33]", "test_take_rows.py::test_rows[F16-32-True-True-256]"),
}
BETWEEN_WARPS = ("attention_prefill_wgmma", "gemm_wgmma")
WHOLE_MODELS = ("test_backend.py::test_generation_follows_the_logits[llama2]",)  # graphs, staging; memcheck alone
ACCEPTED_HAZARDS: dict[str, str] = {}  # part of a report's line -> why it is none
TOOLS = {
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": ("--racecheck-report", "all", "--racecheck-memcpy-async", "yes", "--report-api-errors", "no"),
    "synccheck": ("--report-api-errors", "no"),
}
_REPORT = re.compile(r"^=========\s+(?:Error|Warning|Invalid|Race|Barrier|Divergent|Program hit)\b.*", re.M)


@dataclass(frozen=True)
class Outcome:
    """What came of one tool; `reports` are lines that are not accepted."""

    tool: str
    status: str
    seconds: float
    reports: list[str]
    output: str

    @property
    def is_clean(self) -> bool:
        return self.status == "clean"


def node_ids(tool: str, everything: bool = False) -> list[str]:
    """pytest's names of what a tool runs over."""
    left_out = BETWEEN_WARPS if tool == "racecheck" and not everything else ()
    names = [name for kernel, names in CASES.items() if kernel not in left_out for name in names]
    return [str(ROOT / "tests" / "gpu" / name) for name in names + (list(WHOLE_MODELS) if tool == "memcheck" else [])]


def check(tool: str, limit_seconds: float, everything: bool = False) -> Outcome:
    """One tool over its cases, in a process of its own."""
    nodes = node_ids(tool, everything)
    command = [
        "compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND_ERRORS), "--target-processes", "application-only",
        "--print-limit", "50", *TOOLS[tool], sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider",
        "-o", "addopts=--strict-markers --import-mode=importlib", "-W", "ignore::DeprecationWarning", *nodes,
    ]  # fmt: skip
    begun = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "MEGALITH_TEST_POOL": "0"}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=limit_seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        return Outcome(tool, f"not done after {limit_seconds:.0f} s", time.monotonic() - begun, [], output)
    return judge(tool, done.returncode, done.stdout, time.monotonic() - begun, len(nodes))


def judge(tool: str, status: int, output: str, seconds: float, wanted: int) -> Outcome:
    """Clean: the tests passed, none was left out, and all that is reported is accepted."""
    reports = [line for line in _REPORT.findall(output) if not any(part in line for part in ACCEPTED_HAZARDS)]
    passed = re.search(r"^(\d+) passed", output, re.M)
    if status == FOUND_ERRORS and passed and not reports and ACCEPTED_HAZARDS:
        status = 0
    if status or reports:
        found = f"{len(reports)} reports" if status in (0, FOUND_ERRORS) else f"the tests ended with {status}"
        return Outcome(tool, found, seconds, reports, output)
    if passed is None or int(passed[1]) != wanted:
        return Outcome(tool, f"{passed[1] if passed else 0} of {wanted} tests passed", seconds, [], output)
    return Outcome(tool, "clean", seconds, [], output)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=TOOLS, action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=230, help="limit of each tool; they run at the same time")
    parser.add_argument("--all", action="store_true", help="racecheck of kernels that copy from one warp to others too")
    arguments = parser.parse_args()
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on PATH: it comes with the CUDA toolkit", file=sys.stderr)
        return 2
    tools = arguments.tool or list(TOOLS)
    with ThreadPoolExecutor(len(tools)) as pool:
        outcomes = list(pool.map(lambda tool: check(tool, arguments.seconds, arguments.all), tools))
    for outcome in outcomes:
        if not outcome.is_clean:
            print(outcome.output[-8000:], file=sys.stderr)
    for outcome in outcomes:
        print(
            f"{outcome.tool:10} {outcome.seconds:6.1f} s  {len(node_ids(outcome.tool, arguments.all))} tests  {outcome.status}"
        )
        for line in outcome.reports[:20]:
            print("    " + line)
    return 0 if all(outcome.is_clean for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
