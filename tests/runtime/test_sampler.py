"""Sampling: greedy, filters, seeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.format.errors import RequestError
from megalith.runtime.sampler import SamplingParameters, TokenCounts, adjusted, log_probabilities, sample

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.25, 0.05], np.float32))


def draws(parameters: dict[str, float], count: int = 4000) -> np.ndarray:
    chosen = [sample(LOGITS, SamplingParameters(**parameters), position) for position in range(count)]  # type: ignore[arg-type]
    return np.bincount(chosen, minlength=len(LOGITS)) / count


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals() -> None:
    assert sample(LOGITS, SamplingParameters(), 0) == 1
    assert sample(np.array([1.0, 3.0, 3.0], np.float32), SamplingParameters(), 0) == 1


def test_temperature_one_draws_from_the_distribution() -> None:
    np.testing.assert_allclose(draws({"temperature": 1.0}), [0.1, 0.4, 0.2, 0.25, 0.05], atol=0.03)


def test_temperature_sharpens() -> None:
    expected = np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum()
    np.testing.assert_allclose(draws({"temperature": 0.5}), expected, atol=0.03)


@pytest.mark.parametrize(
    ("parameters", "kept"),
    [
        ({"top_k": 2}, [1, 3]),
        ({"top_p": 0.4}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"min_p": 0.49}, [1, 2, 3]),
        ({"top_k": 3, "top_p": 0.7}, [1, 3]),
        ({"top_p": 0.0}, [1]),
    ],
)
def test_filters_keep_the_likeliest(parameters: dict[str, float], kept: list[int]) -> None:
    share = draws({"temperature": 1.0, **parameters}, 2000)
    assert np.flatnonzero(share).tolist() == kept
    probabilities = np.exp(LOGITS[kept])
    np.testing.assert_allclose(share[kept], probabilities / probabilities.sum(), atol=0.04)


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 10_000))
def test_a_draw_depends_on_seed_and_position_alone(seed: int, position: int) -> None:
    parameters = SamplingParameters(temperature=1.0, seed=seed)
    first = sample(LOGITS, parameters, position)
    sample(LOGITS, parameters, position + 1)
    assert sample(LOGITS, parameters, position) == first


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": float("nan")}, {"temperature": -1.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"top_k": -1}, {"seed": -1}],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(RequestError, match=next(iter(wrong))):
        SamplingParameters(**wrong)  # type: ignore[arg-type]


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(RequestError, match="position 7 are not finite"):
        sample(np.array([1.0, np.nan], np.float32), SamplingParameters(), 7)


def test_penalties_are_those_of_their_definitions() -> None:
    logits = np.array([2.0, -1.0, 0.5, 3.0], np.float32)
    counts = TokenCounts(4, prompt_ids=[0], output_ids=[1, 3, 3])
    parameters = SamplingParameters(
        presence_penalty=0.25, frequency_penalty=0.5, repetition_penalty=2.0, logit_bias=((2, 1.5),)
    )
    # prompt tokens are repeated, not counted: 2/2; -1*2 - 0.5 - 0.25; 0.5 + 1.5; 3/2 - 2*0.5 - 0.25
    expected = np.array([1.0, -2.75, 2.0, 0.25], np.float32)
    np.testing.assert_allclose(adjusted(logits, parameters, counts, None), expected)
    allowed = np.array([True, False, False, True])
    np.testing.assert_allclose(adjusted(logits, parameters, counts, allowed)[[0, 3]], expected[[0, 3]])
    assert sample(logits, parameters, 0, counts) == 2
    assert sample(logits, parameters, 0, counts, allowed) == 0


@given(seed=st.integers(0, 2**32), temperature=st.floats(0.1, 50))
def test_a_token_that_is_not_allowed_is_never_drawn(seed: int, temperature: float) -> None:
    allowed = np.array([False, True, False, True, False])
    assert sample(LOGITS, SamplingParameters(temperature=temperature, seed=seed), 3, None, allowed) in (1, 3)


def test_a_grammar_that_allows_nothing_is_an_error() -> None:
    with pytest.raises(RequestError, match="allows no token"):
        sample(LOGITS, SamplingParameters(), 0, None, np.zeros(5, np.bool_))


def test_log_probabilities_are_of_the_logits_themselves() -> None:
    value, top = log_probabilities(LOGITS, 2, 3)
    assert value == pytest.approx(np.log(0.2), abs=1e-6)
    assert [token for token, _ in top] == [1, 3, 2]
    assert log_probabilities(np.zeros(4, np.float32), 0, 2)[1] == ((0, np.log(0.25)), (1, np.log(0.25)))
    assert len(log_probabilities(LOGITS, 0, 20)[1]) == 5
