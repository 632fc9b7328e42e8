"""RoPE against float64 references, published check values, and itself in blocks of other sizes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.format import rope
from megalith.format.errors import FormatError
from megalith.format.rope import RopeParameters, inverse_frequencies

LLAMA3 = RopeParameters(
    "llama3", 5e5, {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192.0}
)
YARN = RopeParameters(
    "yarn", 1.5e5,
    {"attention_factor": rope.yarn_attention_factor(32, None, None), "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
     "original_max_position_embeddings": 4096.0, "truncate": False},
)  # fmt: skip
DYNAMIC = RopeParameters("dynamic", 1e4, {"factor": 4.0, "original_max_position_embeddings": 2048.0})


def powers(theta: float, head_dim: int) -> np.ndarray:
    return theta ** (np.arange(0, head_dim, 2) / head_dim)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6, 150000.0, 1.5])
@pytest.mark.parametrize("head_dim", [2, 10, 64, 128])
def test_default(theta: float, head_dim: int):
    """Within the rounding of the exponent to float32, times its power's derivative, and two roundings of the result."""
    found = inverse_frequencies(RopeParameters("default", theta), head_dim)
    tolerance = 2**-24 * (math.log(theta) + 2)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 1 / powers(theta, head_dim), rtol=tolerance)


def test_powers_are_correctly_rounded():
    """Exponents that are exact in float32 leave one rounding: exact powers of 10000 come out exact."""
    found = rope._powers(1e4, 64)
    exact = 1e4 ** (np.arange(32) / 32)
    assert found[8] == 10.0
    assert found[16] == 100.0
    assert (np.abs(found - exact) <= np.spacing(found) * 0.5001).all()


def test_linear():
    found = inverse_frequencies(RopeParameters("linear", 1e4, {"factor": 4.0}), 64)
    assert np.array_equal(found, inverse_frequencies(RopeParameters("default", 1e4), 64) / np.float32(4))


def test_llama3_bands():
    plain = inverse_frequencies(RopeParameters("default", 5e5), 128)
    found = inverse_frequencies(LLAMA3, 128)
    unchanged, scaled = found == plain, found == plain / np.float32(8)
    assert (scaled.sum(), 64 - scaled.sum() - unchanged.sum(), unchanged.sum()) == (29, 6, 29)
    assert unchanged[:29].all()
    assert scaled[35:].all()


def test_llama3_values():
    plain = 1 / powers(5e5, 128)
    wavelength = 2 * np.pi / plain
    smooth = (8192 / wavelength - 1) / 3
    blended = (1 - smooth) * plain / 8 + smooth * plain
    expected = np.where(wavelength > 8192, plain / 8, np.where(wavelength < 2048, plain, blended))
    np.testing.assert_allclose(inverse_frequencies(LLAMA3, 128), expected, rtol=3e-6)


def test_yarn_values():
    low, high = (rope._correction_dim(beta, 64, 1.5e5, 4096) for beta in (32.0, 1.0))
    assert (round(low, 4), round(high, 4)) == (8.0928, 17.3980)
    assert YARN.attention_factor == pytest.approx(1.3465736, abs=5e-8)
    ramp = np.clip((np.arange(32) - low) / (high - low), 0, 1)
    plain = 1 / powers(1.5e5, 64)
    np.testing.assert_allclose(inverse_frequencies(YARN, 64), plain / 32 * ramp + plain * (1 - ramp), rtol=3e-6)


def test_yarn_truncates_to_whole_dimensions():
    whole = RopeParameters("yarn", 1.5e5, {**YARN.parameters, "truncate": True})
    ramp = np.clip((np.arange(32) - 8) / (18 - 8), 0, 1)
    plain = 1 / powers(1.5e5, 64)
    np.testing.assert_allclose(inverse_frequencies(whole, 64), plain / 32 * ramp + plain * (1 - ramp), rtol=3e-6)


@pytest.mark.parametrize(
    ("factor", "mscale", "mscale_all_dim", "expected"),
    [(32, None, None, 0.1 * math.log(32) + 1), (1, None, None, 1.0), (40, 1.0, 1.0, 1.0), (40, 0.707, 1.0, None)],
)
def test_yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None, expected: float | None):
    if expected is None:
        expected = (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    assert rope.yarn_attention_factor(factor, mscale, mscale_all_dim) == pytest.approx(expected, rel=1e-14)


def test_dynamic_grows_with_the_sequence():
    plain = inverse_frequencies(RopeParameters("default", 1e4), 64)
    assert np.array_equal(inverse_frequencies(DYNAMIC, 64), plain)
    assert np.array_equal(inverse_frequencies(DYNAMIC, 64, 2048), plain)
    grown = 1e4 * (4 * 4096 / 2048 - 3) ** (64 / 62)
    np.testing.assert_allclose(inverse_frequencies(DYNAMIC, 64, 4096), 1 / powers(grown, 64), rtol=3e-6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 2.0**23, width=32), min_size=1, max_size=50))
def test_cos_sin_against_float64(angles: list[float]):
    """At most one unit of the last float32 place from the float64 values of the C library, which are good to 1e-16."""
    array = np.array(angles, np.float32)
    cos, sin = rope.cos_sin(array)
    for found, exact in ((cos, np.cos(array.astype(np.float64))), (sin, np.sin(array.astype(np.float64)))):
        assert (np.abs(found - exact) <= 0.5001 * np.spacing(np.abs(exact).astype(np.float32)) + 1e-16).all()


@pytest.mark.parametrize(
    ("angle", "cos", "sin"),
    [(0.0, 1.0, 0.0), (1.0, 0.5403023, 0.84147096), (3.0, -0.9899925, 0.14112), (5.0, 0.2836622, -0.9589243)],
)
def test_cos_sin_literals(angle: float, cos: float, sin: float):
    found = rope.cos_sin(np.array([angle], np.float32))
    assert (found[0][0], found[1][0]) == (np.float32(cos), np.float32(sin))


def test_table_is_the_same_in_any_blocks(monkeypatch: pytest.MonkeyPatch):
    whole = b"".join(rope.section_pieces(YARN, 64, 3000))
    assert len(whole) == rope.section_bytes(64, 3000)
    inverse = inverse_frequencies(YARN, 64)
    assert whole[: 32 * 4] == inverse.tobytes()
    assert whole[rope.table_offset(64) :] == rope.rotation_rows(inverse, YARN.attention_factor, 0, 3000).tobytes()
    for angles in (1, 32, 7 * 32, 1 << 20):
        monkeypatch.setattr(rope, "_BLOCK_ANGLES", angles)
        if angles > 32 or angles == 1:
            assert b"".join(rope.section_pieces(YARN, 64, 300)) == whole[: rope.section_bytes(64, 300)]


def test_table_holds_cos_and_sin_times_the_attention_factor():
    inverse = inverse_frequencies(YARN, 64)
    table = rope.rotation_rows(inverse, YARN.attention_factor, 0, 500)
    angles = (np.arange(500, dtype=np.float32)[:, None] * inverse).astype(np.float64)
    np.testing.assert_allclose(table[..., 0], np.cos(angles) * YARN.attention_factor, rtol=0, atol=1.7e-7)
    np.testing.assert_allclose(table[..., 1], np.sin(angles) * YARN.attention_factor, rtol=0, atol=1.7e-7)


@pytest.mark.parametrize(("head_dim", "offset"), [(2, 256), (64, 256), (128, 256), (130, 512)])
def test_table_offset(head_dim: int, offset: int):
    assert rope.table_offset(head_dim) == offset


@pytest.mark.parametrize("kind", [LLAMA3, YARN, DYNAMIC, RopeParameters("default", 1e4)])
def test_parameters_survive(kind: RopeParameters):
    assert RopeParameters.from_dict(kind.to_dict(), "place") == kind


def test_error_names_place_and_value():
    with pytest.raises(FormatError, match=r"^here: rope theta is 0.5: must be more than 1 \[R1\]$"):
        RopeParameters.from_dict({"type": "default", "theta": 0.5, "parameters": {}}, "here")
