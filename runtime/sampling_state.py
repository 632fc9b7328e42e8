"""Device state and launch numbers of `sampling.cu`: the structures of `kernels/sampling_state.cuh` as NumPy dtypes."""

from __future__ import annotations

import numpy as np

THREADS = 512
MAX_TOP_LOGPROBS = 20
MAX_BIASED_TOKENS = 300
MAX_VOCAB_SIZE = 1 << 19  # so many fixed-point weights of at most 1 do not overflow 64 bits
_BINS = 1024
_LIST = 2048
_GATHERS = 16
_TOKENS_PER_LOAD = 4

SLOT = np.dtype([
    ("temperature", "<f8"), ("top_p", "<f8"), ("min_p", "<f8"), ("seed", "<u8"), ("top_k", "<i4"),
    ("repetition_penalty", "<f4"), ("presence_penalty", "<f4"), ("frequency_penalty", "<f4"), ("num_biases", "<i4"),
    ("top_logprobs", "<i4"), ("last_position", "<i4"), ("ignore_eos", "<u4"),
])  # fmt: skip
BIAS = np.dtype([("token", "<i4"), ("bias", "<f4")])
RESULT = np.dtype([
    ("token", "<i4"), ("not_finite", "<u4"), ("logprob", "<f4"), ("num_top", "<i4"), ("top_tokens", "<i4", MAX_TOP_LOGPROBS),
    ("top_logprobs", "<f4", MAX_TOP_LOGPROBS),
])  # fmt: skip
ROW = np.dtype([
    ("arrivals", "<u4"), ("exits", "<u4"), ("not_finite", "<u4"), ("unused", "<u4"), ("best", "<u8", 2), ("lowest", "<u8", 2),
    ("raw_mass", "<u8"), ("min_p_mass", "<u8"), ("list_count", "<u4", _GATHERS), ("mass", "<u8", _BINS),
    ("count", "<u4", _BINS), ("list", "<u8", 2 * _LIST),
])  # fmt: skip
ARGUMENTS = np.dtype([
    ("logits", "<u8"), ("adjusted", "<u8"), ("work", "<u8"), ("slots", "<u8"), ("positions", "<u8"), ("parameters", "<u8"),
    ("biases", "<u8"), ("counts", "<u8"), ("last_token", "<u8"), ("finished", "<u8"), ("eos_tokens", "<u8"), ("ring", "<u8"),
    ("masks", "<u8"), ("step", "<u8"), ("vocab_size", "<i4"), ("logits_pitch", "<i4"), ("counts_pitch", "<i4"),
    ("num_eos_tokens", "<i4"), ("ring_steps", "<i4"), ("ring_rows", "<i4"),
])  # fmt: skip
STRUCTURES = {
    "SamplingSlot": SLOT,
    "BiasEntry": BIAS,
    "SamplingResult": RESULT,
    "SamplingRow": ROW,
    "SamplingArguments": ARGUMENTS,
}


def sampling_grid(num_sms: int, rows: int, vocab_size: int) -> tuple[int, int, int]:
    """Blocks of a row wait for each other: no more than are resident at once, one per multiprocessor."""
    most = -(-vocab_size // (_TOKENS_PER_LOAD * THREADS))
    return max(1, min(num_sms // rows, most)), rows, 1


def row_pitch(vocab_size: int) -> int:
    """Elements from one row of logits or counts to the next: rows are read 16 bytes at a time."""
    return -(-vocab_size // 8) * 8


def state_bytes(max_rows: int, max_slots: int, vocab_size: int, ring_steps: int, with_penalties: bool) -> dict[str, int]:
    """Device memory by buffer. `adjusted` serves penalties and masks, `counts` (2 bytes per slot and token) penalties."""
    pitch = row_pitch(vocab_size)
    return {
        "sampling_work": max_rows * ROW.itemsize,
        "sampling_slots": max_slots * SLOT.itemsize,
        "sampling_biases": max_slots * MAX_BIASED_TOKENS * BIAS.itemsize,
        "sampling_ring": ring_steps * max_rows * RESULT.itemsize,
        "adjusted_logits": max_rows * pitch * 4,
        "token_counts": max_slots * pitch * 2 if with_penalties else 0,
    }
