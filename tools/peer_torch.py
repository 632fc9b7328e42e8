#!/usr/bin/env python3
"""What transformers and torch do with a checkpoint on the same GPU: logits in FP32 and BF16, and times of a decode step
and of a prefill. Needs torch and transformers, which nothing else of this project does.

Decoding: a static cache, the whole step in one CUDA graph. Nothing is compiled by torch, which would be faster still. Medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, StaticCache

WARMUP_CALLS, TIMED_CALLS = 3, 20


def seconds_of(work: Callable[[], object], calls: int = TIMED_CALLS) -> float:
    """Median over CUDA events."""
    for _ in range(WARMUP_CALLS):
        work()
    times = []
    for _ in range(calls):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def load(folder: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", device_map="cuda")
    return model.eval()


@torch.inference_mode()
def write_logits(folder: Path, ids: np.ndarray, contexts: list[int], rows: int, target: Path) -> None:
    """Logits float32 of the last `rows` positions of the first `context` ids, for each context, from FP32 and BF16 runs."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    found = {"ids": ids}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = load(folder, dtype)
        for context in contexts:
            tokens = torch.tensor(ids[None, :context], device="cuda")
            logits = model(tokens, use_cache=False, logits_to_keep=min(rows, context)).logits[0]
            found[f"{name}_{context}"] = logits.float().cpu().numpy()
        del model
        torch.cuda.empty_cache()
    np.savez(target, **found)


@torch.inference_mode()
def decode_seconds(model: Any, batch: int, context: int) -> float:
    """One step of `batch` sequences that hold `context` positions."""
    cache = StaticCache(config=model.config, max_cache_len=context + 64)
    ids = torch.randint(0, model.config.vocab_size, (batch, context), device="cuda")
    for start in range(0, context, 2048):
        model(ids[:, start : start + 2048], past_key_values=cache, use_cache=True, logits_to_keep=1)
    token, position = ids[:, :1].clone(), torch.tensor([[context]], device="cuda").expand(batch, 1).clone()

    def step() -> Any:
        return model(token, position_ids=position, cache_position=position[0], past_key_values=cache, use_cache=True).logits

    for _ in range(WARMUP_CALLS):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return seconds_of(graph.replay)


@torch.inference_mode()
def prefill_seconds(model: Any, tokens: int) -> float:
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device="cuda")
    return seconds_of(lambda: model(ids, use_cache=False, logits_to_keep=1), 5)


def row(work: str, batch: int, context: int, seconds: float) -> dict[str, Any]:
    tokens = batch if work == "decode" else context
    return {
        "system": f"torch {torch.__version__}, transformers {transformers.__version__}", "dtype": "bf16", "work": work,
        "path": "graph" if work == "decode" else None, "batch": batch, "context": context, "ms": seconds * 1e3,
        "tokens_per_s": tokens / seconds, "gbytes_per_s": None, "percent_nominal": None,
    }  # fmt: skip


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--logits", type=Path, help="write logits of random tokens to this .npz")
    parser.add_argument("--contexts", nargs="*", type=int, default=[64], metavar="TOKENS", help="how many tokens")
    parser.add_argument("--rows", type=int, default=64, help="last positions whose logits are kept")
    parser.add_argument("--decode", nargs="*", default=[], metavar="BATCH:CONTEXT")
    parser.add_argument("--prefill", nargs="*", type=int, default=[], metavar="TOKENS")
    arguments = parser.parse_args()
    if arguments.logits:
        vocab_size = json.loads((arguments.checkpoint / "config.json").read_text())["vocab_size"]
        ids = np.random.default_rng(0).integers(0, vocab_size, max(arguments.contexts))
        write_logits(arguments.checkpoint, ids, arguments.contexts, arguments.rows, arguments.logits)
    rows = []
    if arguments.decode or arguments.prefill:
        begun = time.perf_counter()
        model = load(arguments.checkpoint, torch.bfloat16)
        for pair in arguments.decode:
            batch, context = map(int, pair.split(":"))
            rows.append(row("decode", batch, context, decode_seconds(model, batch, context)))
        for tokens in arguments.prefill:
            rows.append(row("prefill", 1, tokens, prefill_seconds(model, tokens)))
        print(json.dumps({"rows": rows, "seconds": time.perf_counter() - begun}))


if __name__ == "__main__":
    main()
