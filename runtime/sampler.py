"""Choosing the next token from logits. In this order:

1. the log probabilities that are reported come from the model's own logits, before anything below;
2. plus logit_bias;
3. repetition penalty r on tokens of prompt and output: logit / r where positive, logit * r where not (arXiv 1909.05858);
4. minus frequency_penalty * count and minus presence_penalty, on tokens of the output alone;
5. tokens that the grammar does not allow are out;
6. temperature 0 takes the largest, the lowest id among equals; else logits / temperature, then top-k, top-p and min-p.

A draw depends on the seed and the token's position alone: u = Philox(key = seed, counter = position), inverted through
the cumulative probabilities in order of falling probability, lower ids first among equals. So a request gives the same
tokens alone or among others, on any backend whose logits agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megalith.format.errors import RequestError
from megalith.format.rope import F32

MAX_SEED = 2**64 - 1
MAX_TOP_LOGPROBS = 20
MAX_BIASED_TOKENS = 300
_RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.01, 100.0),
)


@dataclass(frozen=True)
class SamplingParameters:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0, penalties 0 and repetition_penalty 1 are off.

    `logit_bias` holds (token, bias) in order of tokens; `top_logprobs` None asks for no log probabilities, 0 for the chosen
    token's, n for those of the n likeliest too.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not math.isfinite(value) or not low <= value <= high:
                raise RequestError(f"{name} is {value}: must be from {low:g} to {high:g}")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}: must be 0 (off) or more")
        if not 0 <= self.seed <= MAX_SEED:
            raise RequestError(f"seed is {self.seed}: must be from 0 to 2^64 - 1")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise RequestError(f"top_logprobs is {self.top_logprobs}: must be from 0 to {MAX_TOP_LOGPROBS}")
        if len(self.logit_bias) > MAX_BIASED_TOKENS:
            raise RequestError(f"logit_bias names {len(self.logit_bias)} tokens: at most {MAX_BIASED_TOKENS} are taken")
        for token, bias in self.logit_bias:
            if token < 0 or not math.isfinite(bias) or not -100 <= bias <= 100:
                raise RequestError(f"logit_bias of token {token} is {bias}: ids are 0 or more, biases from -100 to 100")

    @property
    def counts_tokens(self) -> bool:
        """Whether the choice depends on the tokens before it."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0


class TokenCounts:
    """How often each token came: int32 [vocab_size] in the output, bool [vocab_size] whether in prompt or output."""

    def __init__(self, vocab_size: int, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()) -> None:
        self.output = np.bincount(np.asarray(output_ids, np.int64), minlength=vocab_size).astype(np.int32)
        self.seen = self.output > 0
        self.seen[np.asarray(prompt_ids, np.int64)] = True

    def add(self, token: int) -> None:
        """Count a generated token."""
        self.output[token] += 1
        self.seen[token] = True


def sample(
    logits: F32,
    parameters: SamplingParameters,
    position: int,
    counts: TokenCounts | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """The id chosen from logits float32 [vocab_size] for the token at `position`.

    `counts` is what came before, needed where `parameters.counts_tokens`; `allowed` bool [vocab_size] is the grammar's mask.
    """
    if not np.isfinite(logits).all():
        raise RequestError(f"logits of position {position} are not finite: the weights or the input overflow")
    logits = adjusted(logits, parameters, counts, allowed)
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
    last = int(np.count_nonzero(weights)) - 1  # a token that is not allowed has no weight
    return int(order[min(int(np.searchsorted(cumulative, draw, side="right")), last)])


def adjusted(logits: F32, parameters: SamplingParameters, counts: TokenCounts | None, allowed: NDArray[np.bool_] | None) -> F32:
    """Logits float32 [vocab_size] after steps 2 to 5; -inf for tokens that are not allowed."""
    if parameters.logit_bias:
        tokens, biases = zip(*parameters.logit_bias, strict=True)
        logits = logits.copy()
        logits[list(tokens)] += np.asarray(biases, np.float32)
    if counts is not None and parameters.counts_tokens:
        repetition = np.float32(parameters.repetition_penalty)
        repeated = np.where(logits > 0, logits / repetition, logits * repetition)
        logits = np.where(counts.seen, repeated, logits)
        logits = logits - np.float32(parameters.frequency_penalty) * counts.output.astype(np.float32)
        logits = logits - np.float32(parameters.presence_penalty) * (counts.output > 0).astype(np.float32)
    if allowed is not None:
        if not allowed.any():
            raise RequestError("the grammar allows no token of the vocabulary here")
        logits = np.where(allowed, logits, np.float32(-np.inf))
    return logits


def log_probabilities(logits: F32, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """ln softmax of logits float32 [vocab_size]: of `token`, and the `count` likeliest as (id, value), lower ids first."""
    wide = logits.astype(np.float64)
    values = wide - wide.max()
    values -= math.log(float(np.exp(values).sum()))
    count = min(count, len(values))
    if not count:
        return float(values[token]), ()
    least = np.partition(values, len(values) - count)[len(values) - count]
    candidates = np.flatnonzero(values >= least)
    best = candidates[np.argsort(-values[candidates], kind="stable")][:count]
    return float(values[token]), tuple((int(i), float(values[i])) for i in best)
