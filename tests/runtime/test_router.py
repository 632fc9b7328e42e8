"""Routing against the rules of specs/format.md, "Model config", with many equal logits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from golden_models import GoldenModel

import megalith
from megalith.runtime.numpy_ops import route


@pytest.mark.parametrize("golden", ["mixtral", "mixtral_topk_all", "olmoe", "qwen3_moe", "gpt_oss_mxfp4"], indirect=True)
def test_of_equal_logits_the_lower_expert_is_chosen(golden: GoldenModel, tmp_path: Path) -> None:
    with megalith.open(golden.pack(tmp_path)) as packed:
        config = packed.index.config
    logits = np.random.default_rng(0).integers(-1, 2, (200, config.num_experts)).astype(np.float32)
    logits[0] = 0.5
    chosen, shares = route(logits, config)
    assert chosen.shape == shares.shape == (200, config.num_experts_per_tok)
    for row, experts, found in zip(logits.tolist(), chosen.tolist(), shares, strict=True):
        wanted = sorted(range(config.num_experts), key=lambda e: (-row[e], e))[: config.num_experts_per_tok]
        assert experts == wanted
        among = wanted if config.router == "top_k_then_softmax" or config.norm_topk_prob else range(config.num_experts)
        total = math.fsum(math.exp(row[e]) for e in among)
        np.testing.assert_allclose(found, [math.exp(row[e]) / total for e in wanted], rtol=1e-6)
