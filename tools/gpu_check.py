#!/usr/bin/env python3
"""Everything that needs a GPU, in one command of at most eight minutes: models, tests, figures, distances from FP32.

Makes checkpoints of random weights in real shapes and converts them while the tests marked `gpu` run; then, for each model, a
start to the first token and `megalith bench`; a server with clients (bench_serve_gpu.py); the errors of the logits; and what
transformers does with the same checkpoints where it is installed. Writes one JSON file (docs/benchmarks/), again after each
part, and at the end a readable page beside it (gpu_page.py); prints its tables. A failing test fails the command, and then
nothing is written; served tokens that differ and logits further from FP32 than transformers' BF16 run's fail it too, after
writing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_tests
from gpu_page import LOGITS, RESULTS, page, table

TOOLS = Path(__file__).resolve().parent
PREFILL = ("512", "2048", "8192")
DECODE = ("1:128", "1:2048", "1:8192", "8:512", "16:512", "32:512", "128:512")
FEW_PREFILL, FEW_DECODE = ("2048",), ("1:128", "1:8192", "32:512")
START_PROMPT_TOKENS, START_SAMPLES = 16, 3
PEER_DECODE, PEER_PREFILL = ("1:128",), ("2048",)
LOGIT_CONTEXTS = ("64", "2048")
PACKAGES = (
    "megalith", "cupy-cuda13x", "cupy-cuda12x", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "numpy", "torch",
    "transformers",
)  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A checkpoint as it is converted."""

    shape: str
    dtype: str
    options: tuple[str, ...] = ()
    decode: tuple[str, ...] = FEW_DECODE
    prefill: tuple[str, ...] = FEW_PREFILL

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.dtype}"

    @property
    def file(self) -> str:
        return f"{self.name}.lith"

    @property
    def is_kept(self) -> bool:
        """Whether its weights are the checkpoint's, so that transformers' runs are of the same model."""
        return self.dtype == "bf16"


MODELS = (
    Model("llama-3.2-1b", "bf16", decode=DECODE, prefill=PREFILL),
    Model("qwen3-4b", "bf16", decode=DECODE, prefill=PREFILL),
    Model("llama-3.2-1b", "fp16", ("--dtype", "fp16")),
    Model("llama-3.2-1b", "mxfp4", ("--linear", "mxfp4")),
    Model("qwen3-4b", "mxfp4", ("--linear", "mxfp4")),
)
SERVED = MODELS[1]
SERVE_SECONDS = 150
NUMPY_SHAPE = "llama-3.2-1b"  # small enough for the NumPy backend to be the reference


class Clock:
    """What is left of the time for everything."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self, most: float = 1e9) -> float:
        """Seconds, at most `most`."""
        return min(most, self._end - time.monotonic())


def run(*command: object, seconds: float | None = None) -> str:
    """Standard output of a command that succeeds; nothing that it started outlives a timeout."""
    words = [str(word) for word in command]
    print("+", *words, file=sys.stderr, flush=True)
    with subprocess.Popen(words, text=True, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with a server that it may have started, which holds memory of the GPU
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, words)
    return output


def python(*arguments: object, seconds: float | None = None) -> str:
    return run(sys.executable, *arguments, seconds=seconds)


def prepare(folder: Path, models: Sequence[Model]) -> None:
    """Checkpoints and packed files that are not there yet."""

    def write(shape: str) -> None:
        if not (folder / shape).exists():
            python(TOOLS / "random_checkpoint.py", shape, folder / shape)

    def convert(model: Model) -> None:
        if not (folder / model.file).exists():
            python("-m", "megalith", "convert", folder / model.shape, folder / model.file, *model.options, "--no-progress")

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, dict.fromkeys(model.shape for model in models)))
        list(pool.map(convert, models))


def measure(packed: Path, model: Model) -> tuple[str, list[dict[str, Any]]]:
    """Name of the GPU, and rows of the fixed schema; a start is a whole process here, not what `bench` calls so."""
    options = [word for pair in model.decode for word in ("--decode", pair)]
    options += [word for tokens in model.prefill for word in ("--prefill", tokens)]
    found = json.loads(python("-m", "megalith", "bench", packed, *options, "--json"))
    rows = [row for row in found["results"] if row["work"] != "start"]
    return found["gpu"], [{"system": "megalith", "model": model.shape, "dtype": model.dtype, **row} for row in rows]


def measure_start(packed: Path, model: Model) -> dict[str, Any]:
    """From the start of `megalith generate` to its first token: median of whole processes, kernels and file in their caches."""
    ids = ",".join(str(17 * i) for i in range(1, START_PROMPT_TOKENS + 1))
    command = [
        sys.executable,
        "-m",
        "megalith",
        "generate",
        packed,
        "--backend",
        "cupy",
        "--prompt-ids",
        ids,
        "--max-tokens",
        "1",
    ]
    seconds = []
    for _ in range(START_SAMPLES + 1):
        begun = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            seconds.append(time.perf_counter() - begun)
            rest = process.stdout.read()
        if process.returncode or not (first + rest).split():
            raise SystemExit(f"megalith generate {packed} ended with {process.returncode} and wrote {first + rest!r}")
    median = statistics.median(seconds[1:])  # the first one fills the caches
    return {
        "system": "megalith", "model": model.shape, "dtype": model.dtype, "work": "start", "path": None, "batch": 1,
        "context": START_PROMPT_TOKENS, "ms": median * 1e3, "tokens_per_s": None, "gbytes_per_s": None, "percent_nominal": None,
    }  # fmt: skip


def peer(folder: Path, shape: str, options: list[str], seconds: float) -> str | None:
    """What transformers prints; None where it is missing or takes too long, which is said."""
    if seconds <= 0:
        return None
    try:
        return python(TOOLS / "peer_torch.py", folder / shape, *options, seconds=seconds)
    except subprocess.SubprocessError as error:
        print(f"nothing of transformers for {shape}: {type(error).__name__}", file=sys.stderr)
        return None


def measure_peer(folder: Path, shape: str, seconds: float) -> list[dict[str, Any]]:
    """transformers' rows."""
    output = peer(folder, shape, ["--decode", *PEER_DECODE, "--prefill", *PEER_PREFILL], seconds)
    return [{**row, "model": shape} for row in json.loads(output.splitlines()[-1])["rows"]] if output else []


def logit_errors(folder: Path, model: Model, seconds: float) -> list[dict[str, Any]]:
    """Against transformers' FP32 run, or the NumPy backend where the weights are not the checkpoint's."""
    options: list[object] = []
    if model.is_kept:
        target = folder / f"{model.shape}.npz"
        if peer(folder, model.shape, ["--logits", str(target), "--contexts", *LOGIT_CONTEXTS], seconds) is None:
            return []
        options = ["--reference", target]
    elif model.shape != NUMPY_SHAPE:
        return []
    rows = json.loads(python(TOOLS / "gpu_logits.py", folder / model.file, *options))
    reference = "transformers fp32" if model.is_kept else "numpy fp32, the file's weights"
    return [{"model": model.shape, "dtype": model.dtype, "reference": reference, **row} for row in rows]


def measure_serve(folder: Path, commit: str, seconds: float) -> dict[str, Any] | None:
    """What bench_serve_gpu.py writes; None where there is no time for it, which is said."""
    if seconds < SERVE_SECONDS / 2:
        print(f"no server: {seconds:.0f} s are left", file=sys.stderr)
        return None
    out = folder / "serve.json"
    options = ["--model", SERVED.shape, "--dtype", SERVED.dtype, "--commit", commit, "--out", out]
    try:
        python(TOOLS / "bench_serve_gpu.py", folder / SERVED.file, *options, seconds=min(seconds, SERVE_SECONDS))
    except subprocess.SubprocessError as error:
        print(f"server: {error}", file=sys.stderr)
    found: dict[str, Any] | None = json.loads(out.read_text()) if out.exists() else None
    return found


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def further_than_transformers(logits: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        row for row in logits if row["transformers_bf16_error"] is not None and row["error"] > row["transformers_bf16_error"]
    ]


class Report:
    """The JSON file; written again whenever something was added, so that a run that is cut leaves what it has."""

    def __init__(self, path: Path, commit: str) -> None:
        words = " ".join(Path(word).name if word.startswith("/") else word for word in sys.argv[1:])
        self._path = path
        self.content: dict[str, Any] = {
            "commit": commit, "command": f"python tools/gpu_check.py {words}".strip(), "gpu": "", "versions": versions(),
            "results": [], "logits": [],
        }  # fmt: skip

    def write(self) -> None:
        self._path.write_text(json.dumps(self.content, indent=2) + "\n")


def add_figures(report: Report, folder: Path, models: Sequence[Model], clock: Clock, peer_seconds: float) -> bool:
    """Our own figures first: what transformers takes may be cut. Whether what was served is right."""
    content = report.content
    for model in models:
        packed = folder / model.file
        start = measure_start(packed, model)  # fills the caches: what `bench` loads has the interpreter's lock to itself
        content["gpu"], found = measure(packed, model)
        content["results"] += [start, *found]
        report.write()
    served = measure_serve(folder, content["commit"], clock.left()) if SERVED in models else None
    if served is not None:
        content["results"] += served["results"]
        content["serve"] = served["serve"]
        report.write()
    for model in models:
        content["logits"] += logit_errors(folder, model, clock.left(peer_seconds))
        report.write()
    for shape in dict.fromkeys(model.shape for model in models):
        content["results"] += measure_peer(folder, shape, clock.left(peer_seconds))
        report.write()
    return served is None or served_the_same(served["serve"])


def served_the_same(serve: dict[str, Any]) -> bool:
    """Streams as whole answers, and the seeded request in any company."""
    return bool(serve["greedy_stream_equals_whole"]) and all(
        serve["seeded"][name]["same_tokens"] for name in ("again", "among_others")
    )


def main() -> int:
    """The command."""
    names = [model.name for model in MODELS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--commit", help="of the tree that runs; default: git's")
    parser.add_argument("--folder", type=Path, help="for checkpoints and packed files, kept; default: a temporary one")
    parser.add_argument("--seconds", type=float, default=480, help="for everything; server and transformers get what is left")
    parser.add_argument("--peer-seconds", type=float, default=60, help="for each call of transformers; 0: leave it out")
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--no-tests", action="store_true")
    arguments = parser.parse_args()
    models = [model for model in MODELS if model.name in arguments.models]
    clock = Clock(arguments.seconds)
    commit = arguments.commit or run("git", "-C", TOOLS, "rev-parse", "--short", "HEAD").strip()
    report = Report(arguments.out, commit)
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(1) as pool:
        folder = arguments.folder or Path(temporary)
        preparing = pool.submit(prepare, folder, models)
        if not arguments.no_tests and not gpu_tests.report(gpu_tests.run_all()):
            return 1
        preparing.result()
        is_served = add_figures(report, folder, models, clock, arguments.peer_seconds)
    results, logits = report.content["results"], report.content["logits"]
    print(table(results, RESULTS))
    print(table(logits, LOGITS))
    arguments.out.with_suffix(".md").write_text(page(report.content, arguments.out.name))
    print(f"{clock.left():.0f} s left", file=sys.stderr)
    wrong = further_than_transformers(logits)
    for row in wrong:
        print(f"further from FP32 than transformers: {row}", file=sys.stderr)
    if not is_served:
        print("what was served differs", file=sys.stderr)
    return 1 if wrong or not is_served else 0


if __name__ == "__main__":
    sys.exit(main())
