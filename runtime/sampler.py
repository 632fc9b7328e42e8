"""Choosing the next token from logits: greedy, or by temperature, top-k, top-p and min-p, in that order.

A draw depends on the seed and the token's position alone: u = Philox(key = seed, counter = position), inverted through
the cumulative probabilities in order of falling probability, lower ids first among equals. So a request gives the same
tokens alone or among others, on any backend whose logits agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megalith.format.errors import RequestError
from megalith.format.rope import F32

MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class SamplingParameters:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0.0, 100.0), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0)):
            value = getattr(self, name)
            if not math.isfinite(value) or not low <= value <= high:
                raise RequestError(f"{name} is {value}: must be from {low:g} to {high:g}")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}: must be 0 (off) or more")
        if not 0 <= self.seed <= MAX_SEED:
            raise RequestError(f"seed is {self.seed}: must be from 0 to 2^64 - 1")


def sample(logits: F32, parameters: SamplingParameters, position: int) -> int:
    """The id chosen from logits float32 [vocab_size] for the token at `position`; the lowest id among equal logits."""
    if not np.isfinite(logits).all():
        raise RequestError(f"logits of position {position} are not finite: the weights or the input overflow")
    if parameters.temperature == 0.0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")
    if parameters.top_k:
        order = order[: parameters.top_k]
    scaled = logits[order].astype(np.float64) / parameters.temperature
    weights = np.exp(scaled - scaled[0])
    weights /= weights.sum()
    if parameters.top_p < 1.0:
        before = np.cumsum(weights) - weights
        weights = weights[: max(1, int(np.count_nonzero(before < parameters.top_p)))]
    if parameters.min_p > 0.0:
        weights = weights[: max(1, int(np.count_nonzero(weights >= parameters.min_p * weights[0])))]
    cumulative = np.cumsum(weights)
    draw = np.random.Generator(np.random.Philox(key=parameters.seed, counter=position)).random() * cumulative[-1]
    return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), len(weights) - 1)])
