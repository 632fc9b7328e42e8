"""Rotary position embeddings: inverse frequencies and the cos/sin table (specs/format.md, "RoPE section").

The recipe follows transformers' order of float32 operations, so that a table entry is what a float32 run there computes,
but takes powers and logarithms from `decimal` and cos/sin from IEEE additions and multiplications alone: the same bytes
on every machine, whatever its math library.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Context, Decimal, localcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .constants import MAX_DIMENSION
from .errors import FormatError, printable

F32 = NDArray[np.float32]

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
PARAMETERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "factor", "original_max_position_embeddings", "truncate"),
    "llama3": ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings"),
}
MAX_POSITIONS = 1 << 23  # of angles up to which cos_sin is exact: no inverse frequency exceeds 1
_CONTEXT = Context(prec=40)
_INV_FREQ_ALIGNMENT = 256
_BLOCK_ANGLES = 1 << 15


@dataclass(frozen=True)
class RopeParameters:
    """Kind and constants of a model's RoPE; `parameters` holds exactly the names that its type needs."""

    type: str
    theta: float
    parameters: dict[str, float | bool] = field(default_factory=dict)

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by: 1 but for YaRN."""
        return float(self.parameters.get("attention_factor", 1.0))

    @property
    def original_max_position_embeddings(self) -> int:
        return int(self.parameters["original_max_position_embeddings"])

    def to_dict(self) -> dict[str, Any]:
        return {"parameters": dict(self.parameters), "theta": self.theta, "type": self.type}

    @classmethod
    def from_dict(cls, raw: Any, place: str) -> RopeParameters:
        """Checked against rule R1."""
        if not isinstance(raw, dict) or set(raw) != {"parameters", "theta", "type"}:
            raise FormatError(f"{place}: rope must be a map of parameters, theta, type", "R1")
        kind, theta, parameters = raw["type"], raw["theta"], raw["parameters"]
        if kind not in ROPE_TYPES:
            raise FormatError(f"{place}: rope type {printable(kind)} is none of {', '.join(ROPE_TYPES)}", "R1")
        if not isinstance(parameters, dict) or tuple(sorted(parameters)) != PARAMETERS[kind]:
            raise FormatError(f"{place}: rope type {kind} takes the parameters {PARAMETERS[kind]}", "R1")
        for name, value in {**parameters, "theta": theta}.items():
            wanted = bool if name == "truncate" else float
            if type(value) is not wanted or not (wanted is bool or 0.0 < value <= MAX_DIMENSION):
                raise FormatError(f"{place}: rope {name} is {printable(value)}: must be a positive {wanted.__name__}", "R1")
        for name, problem in _problems(theta, parameters):
            raise FormatError(f"{place}: rope {name} {problem}", "R1")
        return cls(kind, theta, parameters)


def _problems(theta: float, parameters: dict[str, float | bool]) -> Iterator[tuple[str, str]]:
    """What would divide by zero, or make an inverse frequency exceed 1."""
    if theta <= 1.0:
        yield "theta", f"is {theta}: must be more than 1"
    if parameters.get("factor", 1.0) < 1.0:
        yield "factor", f"is {parameters['factor']}: must be at least 1"
    original = float(parameters.get("original_max_position_embeddings", 1.0))
    if original < 1.0 or not original.is_integer():
        yield "original_max_position_embeddings", f"is {original}: must be a whole number"
    if "low_freq_factor" in parameters and not parameters["low_freq_factor"] < parameters["high_freq_factor"]:
        yield "low_freq_factor", f"is {parameters['low_freq_factor']}: must be below high_freq_factor"


def inverse_frequencies(rope: RopeParameters, head_dim: int, seq_len: int = 0) -> F32:
    """float32 [head_dim/2]; `seq_len` matters to the dynamic type beyond its original length only."""
    theta = rope.theta
    if rope.type == "dynamic":
        theta = _dynamic_theta(rope, head_dim, seq_len)
    powers = _powers(theta, head_dim)
    if rope.type == "yarn":
        return _yarn(rope, powers, head_dim)
    inverse = np.float32(1.0) / powers
    if rope.type == "linear":
        return inverse / np.float32(rope.parameters["factor"])
    if rope.type == "llama3":
        return _llama3(rope, inverse)
    return inverse


def _powers(theta: float, head_dim: int) -> F32:
    """theta ** (2i / head_dim) with the exponent in float32 and the power correctly rounded to float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    with localcontext(_CONTEXT):
        base = Decimal(theta)
        return np.array([float(base ** Decimal(float(p))) for p in exponents], np.float32)


def _dynamic_theta(rope: RopeParameters, head_dim: int, seq_len: int) -> float:
    """NTK-aware base for a sequence of `seq_len` positions, as transformers' `_compute_dynamic_ntk_parameters`."""
    original, factor = rope.original_max_position_embeddings, float(rope.parameters["factor"])
    if seq_len <= original:
        return rope.theta
    growth = np.float32(factor) * np.float32(seq_len) / np.float32(original) - np.float32(factor - 1)
    with localcontext(_CONTEXT):
        power = float(Decimal(float(growth)) ** Decimal(head_dim / (head_dim - 2)))
    return float(np.float32(power) * np.float32(rope.theta))


def _llama3(rope: RopeParameters, inverse: F32) -> F32:
    p = {name: float(value) for name, value in rope.parameters.items()}
    factor, low, high = p["factor"], p["low_freq_factor"], p["high_freq_factor"]
    original = p["original_max_position_embeddings"]
    one = np.float32(1.0)
    wavelength = one / inverse * np.float32(2 * math.pi)
    is_long, is_short = wavelength > np.float32(original / low), wavelength < np.float32(original / high)
    scaled = np.where(is_long, inverse / np.float32(factor), inverse)
    smooth = (one / wavelength * np.float32(original) - np.float32(low)) / np.float32(high - low)
    blended = (one - smooth) * scaled / np.float32(factor) + smooth * scaled
    result: F32 = np.where(~is_long & ~is_short, blended, scaled)
    return result


def _yarn(rope: RopeParameters, powers: F32, head_dim: int) -> F32:
    p = {name: float(value) for name, value in rope.parameters.items()}
    low = _correction_dim(p["beta_fast"], head_dim, rope.theta, p["original_max_position_embeddings"])
    high = _correction_dim(p["beta_slow"], head_dim, rope.theta, p["original_max_position_embeddings"])
    if rope.parameters["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    index = np.arange(head_dim // 2, dtype=np.float32)
    ramp = np.clip((index - np.float32(low)) / np.float32(high - low), np.float32(0), np.float32(1))
    kept = np.float32(1.0) - ramp
    interpolated = np.float32(1.0) / (np.float32(p["factor"]) * powers)
    blended: F32 = interpolated * (np.float32(1.0) - kept) + np.float32(1.0) / powers * kept
    return blended


def _correction_dim(rotations: float, head_dim: int, theta: float, original: float) -> float:
    """Dimension that turns `rotations` times over the original context (YaRN, arXiv 2309.00071, section 3.2)."""
    with localcontext(_CONTEXT):
        turns = (Decimal(original) / (Decimal(rotations) * 2 * Decimal(math.pi))).ln()
        return float(head_dim * turns / (2 * Decimal(theta).ln()))


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """0.1 m ln(factor) + 1 (YaRN, section 3.4), or the ratio of two such terms as DeepSeek's configs ask for."""

    def term(m: float) -> Decimal:
        return Decimal(1) if factor <= 1 else Decimal("0.1") * Decimal(m) * Decimal(factor).ln() + 1

    with localcontext(_CONTEXT):
        return float(term(mscale) / term(mscale_all_dim)) if mscale and mscale_all_dim else float(term(1.0))


# pi/2 in three parts of 30 bits: k * part is exact for |k| < 2^23 (Cody and Waite, 1980).
_HALF_PI = Decimal("1.5707963267948966192313216916397514420985846996875529")


def _split_half_pi() -> tuple[float, float, float]:
    with localcontext(_CONTEXT):
        first = math.floor(_HALF_PI * 2**29) / 2**29
        second = math.floor((_HALF_PI - Decimal(first)) * 2**59) / 2**59
        return first, second, float(_HALF_PI - Decimal(first) - Decimal(second))


_PARTS = _split_half_pi()
_SIN_TERMS = [(-1) ** k / math.factorial(2 * k + 1) for k in range(8, -1, -1)]
_COS_TERMS = [(-1) ** k / math.factorial(2 * k) for k in range(8, -1, -1)]


def cos_sin(angles: F32) -> tuple[F32, F32]:
    """cos and sin of float32 angles from 0 to 2^23, any shape, each within one float32 rounding of exact.

    Taylor sums on [-pi/4, pi/4] in float64; the truncation error is below 1e-17.
    """
    x = angles.astype(np.float64)
    quarter = np.rint(x * (1 / _PARTS[0]))
    x -= quarter * _PARTS[0]
    x -= quarter * _PARTS[1]
    x -= quarter * _PARTS[2]
    square = x * x
    sin, cos = np.full_like(x, _SIN_TERMS[0]), np.full_like(x, _COS_TERMS[0])
    for s, c in zip(_SIN_TERMS[1:], _COS_TERMS[1:], strict=True):
        sin *= square
        sin += s
        cos *= square
        cos += c
    sin *= x
    turn = quarter.astype(np.int64) & 3
    swapped, flip_cos, flip_sin = (turn & 1) == 1, (turn == 1) | (turn == 2), turn >= 2
    cosine, sine = np.where(swapped, sin, cos), np.where(swapped, cos, sin)
    np.negative(cosine, out=cosine, where=flip_cos)
    np.negative(sine, out=sine, where=flip_sin)
    return cosine.astype(np.float32), sine.astype(np.float32)


def rotation_rows(inverse: F32, attention_factor: float, start: int, stop: int) -> F32:
    """Rows [start, stop) of the table: float32 [stop - start, head_dim/2, 2], cos and sin times the attention factor."""
    angles = np.arange(start, stop, dtype=np.float32)[:, None] * inverse
    rows = np.empty((*angles.shape, 2), np.float32)
    rows[..., 0], rows[..., 1] = cos_sin(angles)
    rows *= np.float32(attention_factor)
    return rows


def table_offset(head_dim: int) -> int:
    """Byte offset of the table within the section: after inv_freq, rounded up to 256."""
    return -(-head_dim // 2 * 4 // _INV_FREQ_ALIGNMENT) * _INV_FREQ_ALIGNMENT


def section_bytes(head_dim: int, positions: int) -> int:
    """Size of the RoPE section."""
    return table_offset(head_dim) + positions * (head_dim // 2) * 8


def section_pieces(rope: RopeParameters, head_dim: int, positions: int) -> Iterator[bytes]:
    """The RoPE section, a piece at a time."""
    inverse = inverse_frequencies(rope, head_dim)
    yield inverse.astype("<f4").tobytes().ljust(table_offset(head_dim), b"\0")
    rows = max(1, _BLOCK_ANGLES // (head_dim // 2))
    for start in range(0, positions, rows):
        block = rotation_rows(inverse, rope.attention_factor, start, min(start + rows, positions))
        yield block.astype("<f4").tobytes()
