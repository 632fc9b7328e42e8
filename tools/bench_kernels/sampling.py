"""`sampling.cu`: time a step for each way of choosing, after a check against the reference sampler."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from megalith.runtime import sampling_state
from megalith.runtime.sampler import SamplingParameters, sample
from megalith.runtime.sampling_state import ARGUMENTS, RESULT, ROW, SLOT, row_pitch, sampling_grid

VOCAB_SIZES = (("qwen3-4b", 151936), ("llama-1b", 128256))
BATCHES = (1, 8, 32, 128)
WAYS = {
    "greedy": SamplingParameters(), "temperature": SamplingParameters(1.0), "top_p 0.9": SamplingParameters(1.0, 0, 0.9),
    "top_k 50, top_p 0.9": SamplingParameters(0.7, 50, 0.9), "min_p 0.05": SamplingParameters(1.0, 0, 1.0, 0.05),
}  # fmt: skip
SPREADS = (1.0, 4.0)  # standard deviation of the logits: a nucleus of half the vocabulary, and of a few hundred tokens
_POSITION = 5
_BIAS_BYTES = sampling_state.MAX_BIASED_TOKENS * sampling_state.BIAS.itemsize
_REPEATS = 20  # launches in a graph


def bench(gpu: Any) -> list[dict[str, Any]]:
    """One row per vocabulary, batch, spread and way; gbytes_per_s counts the logits once."""
    rows = []
    for model, vocab_size in VOCAB_SIZES:
        for batch in BATCHES:
            for spread in SPREADS:
                logits = spread * np.random.default_rng(batch).standard_normal((batch, vocab_size), np.float32)
                for way, parameters in WAYS.items():
                    seconds = _seconds(gpu, logits, parameters)
                    gigabytes = logits.nbytes / seconds / 1e9
                    rows.append({
                        "kernel": "sampling", "name": f"{model} {way}, spread {spread:g}", "tokens": batch, "ms": seconds * 1e3,
                        "gbytes_per_s": gigabytes, "percent_nominal": 100 * gigabytes / gpu.nominal_gbytes_per_s,
                    })  # fmt: skip
    return rows


def _seconds(gpu: Any, logits: np.ndarray, parameters: SamplingParameters) -> float:
    batch, vocab_size = logits.shape
    pitch = row_pitch(vocab_size)
    padded = np.zeros((batch, pitch), np.float32)
    padded[:, :vocab_size] = logits
    slots = np.zeros(batch, SLOT)
    for i in range(batch):
        slots[i] = (
            parameters.temperature, parameters.top_p, parameters.min_p, i, parameters.top_k, 1.0, 0.0, 0.0, 0, -1, 1 << 30, 1,
        )  # fmt: skip
    buffers = {
        "logits": gpu.array(padded), "work": gpu.zeros((batch * ROW.itemsize,), np.uint8),
        "slots": gpu.array(np.arange(batch, dtype=np.int32)), "positions": gpu.array(np.full(batch, _POSITION - 1, np.int32)),
        "parameters": gpu.array(slots.view(np.uint8)), "biases": gpu.zeros((batch * _BIAS_BYTES,), np.uint8),
        "last_token": gpu.zeros((batch,), np.int32), "finished": gpu.zeros((batch,), np.uint32),
        "eos_tokens": gpu.zeros((1,), np.int32), "ring": gpu.zeros((batch * RESULT.itemsize,), np.uint8),
        "step": gpu.zeros((2,), np.uint32),
    }  # fmt: skip
    arguments = np.zeros((), ARGUMENTS)
    for name, buffer in buffers.items():
        arguments[name] = int(buffer.data.ptr)
    for name, value in (("vocab_size", vocab_size), ("logits_pitch", pitch), ("ring_steps", 1), ("ring_rows", batch)):
        arguments[name] = value
    kernel, grid = gpu.compile("sampling", "sampling"), sampling_grid(gpu.num_sms, batch, vocab_size)

    def step() -> None:
        gpu.launch(kernel, grid, (sampling_state.THREADS, 1, 1), (arguments[()],))

    def steps() -> None:
        for _ in range(_REPEATS):
            step()

    step()
    found = gpu.get(buffers["last_token"])
    for i in {0, batch // 2, batch - 1}:
        expected = sample(logits[i], replace(parameters, seed=i), _POSITION)
        if found[i] != expected:
            raise AssertionError(f"row {i} of {batch}: token {found[i]} instead of {expected} with {parameters}")
    return float(gpu.time(steps)) / _REPEATS
