#!/usr/bin/env python3
"""The readable page of what `tools/gpu_check.py` measured: `python tools/gpu_page.py FILE.json` writes FILE.md beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

EXPLANATION = """\
Random weights, medians. The run fails where a test does. `start` is a whole process from its start to the first token on
standard output, kernels and file in their caches; `load` copies the file from the page cache once more; a decode step includes
sampling and the host's part; `serve` is what streaming clients get over HTTP: ms between tokens (median), output tokens a
second, prompts included beyond one client. transformers runs its whole decode step in one CUDA graph, not compiled. GB/s are
weights and cached keys and values that are read, per cent of the memory's nominal bandwidth."""
RESULTS = (
    "system", "model", "dtype", "work", "batch", "context", "ms", "tokens_per_s", "gbytes_per_s", "percent_nominal",
)  # fmt: skip
MANY = ("clients", "rounds", "output_tokens_per_s", "total_tokens_per_s")
TIMES = (("ttft", "first token"), ("itl", "between tokens"))
LOGITS = ("model", "dtype", "reference", "work", "batch", "context", "error", "transformers_bf16_error")


def table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row[name] for name in columns]
        lines.append(
            "| " + " | ".join("" if c is None else f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |"
        )
    return "\n".join(lines)


def page(report: dict[str, Any], name: str) -> str:
    """Markdown of a whole report, which is in the file `name` beside it."""
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    parts = [
        f"# GPU figures: {report['gpu']}",
        f"`{report['command']}` at commit {report['commit']}, with {versions}. As JSON: [{name}]({name}).",
        EXPLANATION,
        table(report["results"], RESULTS),
    ]
    if report.get("logits"):
        parts += ["## Distance from FP32", "Relative errors of logits.", table(report["logits"], LOGITS)]
    if report.get("serve"):
        parts += ["## Serving", *serving(report["serve"])]
    return "\n\n".join(parts) + "\n"


def serving(serve: dict[str, Any]) -> list[str]:
    """What `tools/bench_serve_gpu.py` found."""
    single, rows = serve["single"], []
    for one in serve["many"]:
        times = {f"{name}, {which} ms": one[key][f"{which}_ms"] for key, name in TIMES for which in ("median", "p99")}
        over = one["itl"]["p99_ms"] / one["itl"]["median_ms"]
        rows.append({name: one[name] for name in MANY} | times | {"p99 over median": over})
    lines = [
        "Qwen3-4B, random prompts of 512 tokens, 128 tokens of each answer; with many clients each asks again as soon as it is "
        "answered, and in the first round all ask at once. "
        f"One stream: {single['decode_tokens_per_s']} tokens/s against {single['bench_tokens_per_s']:.1f} of `megalith bench` "
        f"at the same context, ratio {single['ratio']}; first token after {single['ttft_ms']} ms. "
        f"With `--batch-invariant` {serve['invariant']['decode_tokens_per_s']} tokens/s.",
        table(rows, tuple(rows[0])),
    ]
    for name, how in (("seeded", "with `--batch-invariant`"), ("seeded_by_default", "without it")):
        found = serve[name]
        same = [
            f"{_same(found[key]['same_tokens'])} tokens, {_same(found[key]['same_logprobs'])} bits of log probabilities {when}"
            for key, when in (("again", "when asked again"), ("among_others", f"among {found['others']} others"))
        ]
        lines.append(f"A seeded request at temperature 1, {how}: {'; '.join(same)}.")
    lines.append(
        "Weights are random, so that hardly a token is clearly the likeliest: any other last bit soon gives another token."
    )
    return lines


def _same(is_same: bool) -> str:
    return "the same" if is_same else "other"


def main(words: list[str] | None = None) -> int:
    """The command."""
    for word in words or sys.argv[1:]:
        path = Path(word)
        path.with_suffix(".md").write_text(page(json.loads(path.read_text()), path.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
