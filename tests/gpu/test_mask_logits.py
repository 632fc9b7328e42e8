"""`mask_logits.cu`: what a grammar does not allow becomes the least finite float, all else stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1000, 151936])
def test_masks(gpu: Any, vocab_size: int) -> None:
    rng, rows, pitch = np.random.default_rng(vocab_size), 3, -(-vocab_size // 8) * 8
    logits = rng.standard_normal((rows, pitch)).astype(np.float32)
    masks = rng.integers(0, 1 << 32, (rows, -(-vocab_size // 32)), np.uint32)
    masks[1], masks[2] = 0, 0xFFFFFFFF
    device = gpu.array(logits)
    args = (device, np.int32(pitch), np.int32(vocab_size), gpu.array(masks))
    gpu.launch(gpu.compile("mask_logits", "mask_logits", ELEMENT_BF16=1), (2, rows, 1), (256, 1, 1), args)
    allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little", count=vocab_size).astype(bool)
    expected = logits.copy()
    expected[:, :vocab_size][~allowed] = np.finfo(np.float32).min
    np.testing.assert_array_equal(gpu.get(device), expected)
