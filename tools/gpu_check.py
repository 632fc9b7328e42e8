#!/usr/bin/env python3
"""Everything that needs a GPU, in one command: models, tests, figures.

Makes checkpoints of random weights in real shapes, converts them, runs the tests marked `gpu`, then `megalith bench` on each
model, and what transformers does with the same checkpoints where it is installed. Writes one JSON file (docs/benchmarks/) and
prints a table. A failing test fails the command, and then nothing is written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
MODELS = ("llama-3.2-1b", "qwen3-4b")
DECODE = ("1:128", "1:2048", "1:8192", "8:512", "16:512", "32:512", "128:512")
PREFILL = ("512", "2048", "8192")
START_PROMPT_TOKENS, START_SAMPLES = 16, 3
PEER_DECODE, PEER_PREFILL = ("1:128",), ("2048",)
PACKAGES = (
    "megalith",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "numpy",
    "torch",
    "transformers",
)


def run(*command: object, seconds: float | None = None) -> str:
    """Standard output of a command that succeeds."""
    words = [str(word) for word in command]
    print("+", *words, file=sys.stderr, flush=True)
    return subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE, timeout=seconds).stdout


def python(*arguments: object, seconds: float | None = None) -> str:
    return run(sys.executable, *arguments, seconds=seconds)


def prepare(folder: Path, model: str) -> Path:
    """The packed file of a model; its checkpoint lies beside it."""
    packed = folder / f"{model}.lith"
    if not packed.exists():
        python(TOOLS / "random_checkpoint.py", model, folder / model)
        python("-m", "megalith", "convert", folder / model, packed, "--no-progress")
    return packed


def measure(packed: Path, model: str) -> tuple[str, list[dict[str, Any]]]:
    """Name of the GPU, and rows of the fixed schema."""
    options = [word for pair in DECODE for word in ("--decode", pair)] + [word for n in PREFILL for word in ("--prefill", n)]
    found = json.loads(python("-m", "megalith", "bench", packed, *options, "--json"))
    return found["gpu"], [{"system": "megalith", "model": model, "dtype": "bf16", **row} for row in found["results"]]


def measure_start(packed: Path, model: str) -> dict[str, Any]:
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
        "system": "megalith", "model": model, "dtype": "bf16", "work": "start", "path": "process", "batch": 1,
        "context": START_PROMPT_TOKENS, "ms": median * 1e3, "tokens_per_s": None, "gbytes_per_s": None, "percent_nominal": None,
    }  # fmt: skip


def measure_peer(folder: Path, model: str, seconds: float) -> list[dict[str, Any]]:
    """transformers' rows; none where it is missing or takes too long, which is said."""
    options = ["--decode", *PEER_DECODE, "--prefill", *PEER_PREFILL]
    try:
        rows = json.loads(python(TOOLS / "peer_torch.py", folder / model, *options, seconds=seconds).splitlines()[-1])["rows"]
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        print(f"no figures of transformers for {model}: {type(error).__name__}", file=sys.stderr)
        return []
    return [{**row, "model": model} for row in rows]


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| system | model | work | batch | context | ms | tokens/s | GB/s | % nominal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        numbers = [row[key] for key in ("ms", "tokens_per_s", "gbytes_per_s", "percent_nominal")]
        cells = [row["system"], row["model"], row["work"], row["batch"], row["context"], *numbers]
        lines.append(
            "| " + " | ".join("" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--commit", help="of the tree that runs; default: git's")
    parser.add_argument("--folder", type=Path, help="for checkpoints and packed files, kept; default: a temporary one")
    parser.add_argument("--peer-seconds", type=float, default=0, help="time for transformers per model; 0: leave it out")
    parser.add_argument("--no-tests", action="store_true")
    arguments = parser.parse_args()
    commit = arguments.commit or run("git", "-C", TOOLS, "rev-parse", "--short", "HEAD").strip()
    if not arguments.no_tests:
        options = ["-o", "addopts=--strict-markers --import-mode=importlib", "-W", "ignore::DeprecationWarning"]
        python("-m", "pytest", "-q", "-m", "gpu", *options, TOOLS.parent / "tests" / "gpu")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        rows, gpu = [], ""
        for model in MODELS:
            packed = prepare(folder, model)
            gpu, found = measure(packed, model)
            rows += [measure_start(packed, model), *found]
            if arguments.peer_seconds:
                rows += measure_peer(folder, model, arguments.peer_seconds)
    command = "python tools/gpu_check.py " + " ".join(word for word in sys.argv[1:] if not word.startswith("/"))
    report = {"commit": commit, "command": command, "gpu": gpu, "versions": versions(), "results": rows}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
