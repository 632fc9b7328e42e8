"""The engine's interface: ids, limits, generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import megalith
from megalith.format.errors import RequestError, UnsupportedError
from megalith.runtime.sampler import SamplingParameters


def test_generation_continues_greedily_from_the_logits(packed_llama: Path) -> None:
    engine = megalith.load(packed_llama)
    prompt = [5, 9, 2]
    ids = [token.id for token in engine.generate_tokens(prompt, max_tokens=6, ignore_eos=True)]
    for i, token in enumerate(ids):
        assert token == int(engine.logits([*prompt, *ids[:i]])[-1].argmax())


def test_generation_stops_at_the_context_and_at_max_tokens(packed_llama: Path) -> None:
    engine = megalith.load(packed_llama, max_seq_len=8)
    assert len(list(engine.generate_tokens([1, 2, 3], max_tokens=100, ignore_eos=True))) == 5
    assert not list(engine.generate_tokens([1, 2, 3], max_tokens=0))
    assert not list(engine.generate_tokens([1] * 8, max_tokens=3))


def test_generation_stops_at_an_end_token(packed_llama: Path) -> None:
    engine = megalith.load(packed_llama)
    first = next(iter(engine.generate_tokens([1, 2, 3], ignore_eos=True))).id
    engine.config.eos_token_ids[:] = [first]
    assert [token.id for token in engine.generate_tokens([1, 2, 3], max_tokens=9)] == [first]


def test_a_seed_repeats_and_another_differs(packed_llama: Path) -> None:
    engine = megalith.load(packed_llama)

    def ids(seed: int) -> list[int]:
        parameters = SamplingParameters(temperature=1.5, seed=seed)
        return [token.id for token in engine.generate_tokens([1, 2], parameters, max_tokens=12, ignore_eos=True)]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "non-empty"),
        ([[1]], "non-empty"),
        ([1.5], "integers"),
        (["a"], "integers"),
        ([-1], "token 0 is -1"),
        ([1, 10**6], "token 1 is 1000000"),
        ([2**63], "token 0"),
        ([1] * 100_000, "fit the context"),
    ],
)
def test_bad_ids_are_refused(packed_llama: Path, ids: list[int], message: str) -> None:
    engine = megalith.load(packed_llama)
    with pytest.raises(RequestError, match=message):
        engine.logits(ids)
    with pytest.raises(RequestError, match=message):
        engine.generate_tokens(ids)


def test_backends(packed_llama: Path) -> None:
    assert megalith.load(packed_llama, backend="numpy").config.hidden_size > 0
    with pytest.raises(RequestError, match="none of auto, numpy, cupy"):
        megalith.load(packed_llama, backend="torch")
    with pytest.raises(UnsupportedError):
        megalith.load(packed_llama, backend="cupy")


def test_text_needs_a_tokenizer(packed_llama: Path) -> None:
    engine = megalith.load(packed_llama)
    with pytest.raises(RequestError, match="holds no tokenizer"):
        engine.generate("Hello")


def test_open_gives_tensors_without_loading(packed_llama: Path) -> None:
    with megalith.open(packed_llama) as packed:
        weight = packed.tensors["model.layers.0.self_attn.q_proj.weight"].to_numpy()
        assert weight.dtype.name == "bfloat16"
        assert np.isfinite(weight.astype(np.float32)).all()
