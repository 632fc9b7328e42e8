"""RoPE of a config.json in either spelling: transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.format.constants import MAX_DIMENSION
from megalith.format.errors import CheckpointError, UnsupportedError, printable
from megalith.format.rope import PARAMETERS, RopeParameters, yarn_attention_factor

DEFAULT_THETA = 10_000.0


def rope_parameters(config: Mapping[str, Any], place: str, defaults: Mapping[str, Any] | None = None) -> RopeParameters:
    """The RoPE a config asks for; CheckpointError when its two spellings contradict each other.

    `defaults` are the architecture's own: `rope_theta`, and more where the config says nothing of scaling.
    """
    settings = _merged(config, place)
    is_scaled = bool(settings.keys() - {"rope_theta", "partial_rotary_factor"})
    for name, value in (defaults or {}).items():
        if name == "rope_theta" or not is_scaled:
            settings.setdefault(name, value)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if not isinstance(kind, str) or kind not in PARAMETERS:
        raise UnsupportedError(f"{place}: rope type {printable(kind)} is none of {', '.join(PARAMETERS)}")
    if number(settings, "partial_rotary_factor", place, 1.0) != 1.0:
        raise UnsupportedError(
            f"{place}: partial_rotary_factor {printable(settings['partial_rotary_factor'])} is not supported"
        )
    theta = number(settings, "rope_theta", place, DEFAULT_THETA)
    return RopeParameters(kind, theta, _parameters(kind, settings, config, place))


def _merged(config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """One map of both spellings and the top-level keys."""
    merged: dict[str, Any] = {}
    top = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}
    for key, spelling in (("", top), *((k, config.get(k)) for k in ("rope_scaling", "rope_parameters"))):
        if spelling is None:
            continue
        if not isinstance(spelling, Mapping):
            raise CheckpointError(f"{place}: {key} is {printable(spelling)}: must be a map")
        if any(isinstance(value, Mapping) for value in spelling.values()):
            raise UnsupportedError(f"{place}: {key} must be one flat map; RoPE per layer type is not supported")
        given = dict(spelling)
        if "type" in given:
            old = given.pop("type")
            if given.setdefault("rope_type", old) != old:
                raise CheckpointError(f"{place}: {key} has type {printable(old)} and rope_type {printable(given['rope_type'])}")
        for name, value in given.items():
            if name in merged and merged[name] != value:
                raise CheckpointError(
                    f"{place}: {name} is {printable(merged[name])} in one place and {printable(value)} in {key}"
                )
            merged[name] = value
    return merged


def _parameters(kind: str, settings: Mapping[str, Any], config: Mapping[str, Any], place: str) -> dict[str, float | bool]:
    names = PARAMETERS[kind]
    result: dict[str, float | bool] = {}
    if "factor" in names:
        result["factor"] = number(settings, "factor", place)
    if "original_max_position_embeddings" in names:
        result["original_max_position_embeddings"] = _original_length(kind, settings, config, place)
    if kind == "llama3":
        result |= {name: number(settings, name, place) for name in ("high_freq_factor", "low_freq_factor")}
    if kind == "yarn":
        result |= _yarn_parameters(settings, float(result["factor"]), place)
    return result


def _original_length(kind: str, settings: Mapping[str, Any], config: Mapping[str, Any], place: str) -> float:
    key = "original_max_position_embeddings"
    current = number(config, "max_position_embeddings", place)
    given = [number(where, key, place) for where in (settings, config) if where.get(key) is not None]
    if len(set(given)) > 1:
        raise CheckpointError(f"{place}: {key} is {given[0]:g} in one place and {given[1]:g} in another")
    if kind == "dynamic" and given and given[0] != current:  # transformers scales from max_position_embeddings
        raise CheckpointError(
            f"{place}: dynamic RoPE scales from max_position_embeddings = {current:g}, {key} says {given[0]:g}"
        )
    return given[0] if given else current


def _yarn_parameters(settings: Mapping[str, Any], factor: float, place: str) -> dict[str, float | bool]:
    mscale, mscale_all_dim = (number(settings, name, place, 0.0) for name in ("mscale", "mscale_all_dim"))
    computed = yarn_attention_factor(factor, mscale or None, mscale_all_dim or None)
    truncate = settings.get("truncate", True)
    if not isinstance(truncate, bool):
        raise CheckpointError(f"{place}: truncate is {printable(truncate)}: must be a boolean")
    return {
        "attention_factor": number(settings, "attention_factor", place, computed),
        "beta_fast": number(settings, "beta_fast", place, 32.0) or 32.0,
        "beta_slow": number(settings, "beta_slow", place, 1.0) or 1.0,
        "truncate": truncate,
    }


def number(settings: Mapping[str, Any], name: str, place: str, default: float | None = None) -> float:
    """A key's value as a float that is neither negative nor beyond MAX_DIMENSION; `default` when it is absent or null."""
    value = settings.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= MAX_DIMENSION:
        raise CheckpointError(f"{place}: {name} is {printable(value)}: must be a number from 0 to {MAX_DIMENSION}")
    return float(value)
