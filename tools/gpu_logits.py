#!/usr/bin/env python3
"""How far the CuPy backend's logits are from an FP32 run, in prefill and in decode steps of several batch sizes.

`gpu_logits.py FILE.lith --reference LOGITS.npz` takes transformers' FP32 run, and its own BF16 run as the yardstick
(`peer_torch.py --logits`); without a reference the NumPy backend, which computes in float32 with the weights as the file has
them, runs the same few tokens. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import megalith
from megalith.format.reader import PackedFile
from megalith.runtime.cupy_backend import CupyBackend
from megalith.runtime.numpy_backend import NumpyBackend

BATCHES = (1, 8, 32)
DECODED = 8  # last tokens of a context that go through decode steps
NUMPY_TOKENS = 24


def relative_error(found: np.ndarray, reference: np.ndarray) -> float:
    """Of the whole array, by its norm."""
    return float(np.linalg.norm(found.astype(np.float64) - reference) / np.linalg.norm(reference.astype(np.float64)))


def prefill_logits(backend: CupyBackend, ids: np.ndarray, rows: int) -> np.ndarray:
    """Of the last `rows` positions."""
    cache = backend.new_cache()
    if len(ids) > rows:
        backend.forward(ids[:-rows], cache, len(ids), True)
    found = backend.forward(ids[-rows:], cache, len(ids), False)
    backend.close_cache(cache)
    return found


def decode_logits(backend: CupyBackend, ids: np.ndarray, batch: int) -> np.ndarray:
    """Of the last DECODED positions, by decode steps of `batch` sequences that are all alike, which must give the same bits."""
    caches = [backend.new_cache() for _ in range(batch)]
    start = len(ids) - DECODED
    for cache in caches:
        backend.forward(ids[:start], cache, start, True)
        backend.reserve(cache, len(ids))
    slots, rows = np.array([cache.slot for cache in caches], np.int32), []
    for position in range(start, len(ids)):
        for cache in caches:
            backend.set_last_token(cache.slot, int(ids[position]))
        backend.decode_step(np.full(batch, position, np.int32), slots)
        logits = backend.read_logits(batch)
        if (logits != logits[0]).any():
            raise SystemExit(f"position {position}: {batch} sequences that are alike get different logits")
        rows.append(logits[0])
    for cache in caches:
        backend.close_cache(cache)
    return np.array(rows)


def errors(backend: CupyBackend, ids: np.ndarray, fp32: np.ndarray, bf16: np.ndarray | None) -> list[dict[str, Any]]:
    """One row for the prefill and one for each batch size of decoding, beside transformers' BF16 error where it is known."""
    rows = []
    for work, batch in [("prefill", 1), *(("decode", batch) for batch in BATCHES)]:
        found = prefill_logits(backend, ids, len(fp32)) if work == "prefill" else decode_logits(backend, ids, batch)
        last = slice(-len(found), None)
        theirs = None if bf16 is None else relative_error(bf16[last], fp32[last])
        error = relative_error(found, fp32[last])
        rows.append({"work": work, "batch": batch, "context": len(ids), "error": error, "transformers_bf16_error": theirs})
    return rows


def backend_for(packed: PackedFile, longest: int) -> CupyBackend:
    return CupyBackend(packed, max_sequences=max(BATCHES), max_seq_len=longest + 1)


def against_transformers(packed: PackedFile, reference: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """For each context of the reference."""
    contexts = sorted(int(name.removeprefix("fp32_")) for name in reference if name.startswith("fp32_"))
    backend, ids = backend_for(packed, contexts[-1]), reference["ids"]
    rows = []
    for context in contexts:
        rows += errors(backend, ids[:context], reference[f"fp32_{context}"], reference[f"bf16_{context}"])
    return rows


def against_numpy(packed: PackedFile) -> list[dict[str, Any]]:
    """Few tokens: the NumPy backend computes all of them."""
    ids = np.random.default_rng(0).integers(0, packed.index.config.vocab_size, NUMPY_TOKENS)
    oracle = NumpyBackend(packed)
    fp32 = oracle.forward(ids, oracle.new_cache(), len(ids), False)
    return errors(backend_for(packed, len(ids)), ids, fp32, None)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--reference", type=Path, metavar="LOGITS.npz")
    arguments = parser.parse_args()
    with megalith.open(arguments.file) as packed:
        rows = against_transformers(packed, np.load(arguments.reference)) if arguments.reference else against_numpy(packed)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
