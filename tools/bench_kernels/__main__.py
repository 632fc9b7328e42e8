"""`python tools/bench_kernels [NAME[:FUNCTION] ...]`: benchmarks of the kernels on this machine's GPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from gpu_device import open_device  # noqa: E402 - found by the line above


def shown(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def main() -> None:
    """The command."""
    gpu = open_device()
    if gpu is None:
        raise SystemExit("no CUDA device")
    print(gpu.name, gpu.arch)
    for name in sys.argv[1:] or sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py")):
        module, _, function = name.partition(":")
        for row in getattr(importlib.import_module(module), function or "bench")(gpu):
            print("  ".join(f"{key}={shown(value)}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
