"""Random damage to config.json and to safetensors headers: a whole file or a MegalithError, never anything else."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

from checkpoints import MODEL_TYPES, header_entries, packs_or_refuses, tiny_config, tiny_tensors, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalith.converter.plan import Options

FUZZ = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SHORT = Options(max_seq_len=8)  # a valid longer context is only a larger table
MAX_MEMORY_BYTES = 32 << 20

ROPE_KEYS = ["rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor",
             "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
             "truncate"]  # fmt: skip
CONFIG_KEYS = [*tiny_config(), "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers",
               "layer_types", "attention_bias", "mlp_bias", "dtype", "quantization_config",
               "partial_rotary_factor"]  # fmt: skip

numbers = st.one_of(
    st.integers(-2, 64),
    st.sampled_from([2**31 - 1, 2**31, 2**53, 2**63, 10**300, -(2**63)]),
    st.floats(1e-3, 1e6),
    st.sampled_from([float("nan"), float("inf"), -0.0, 1e308]),
)
words = st.one_of(
    st.sampled_from([*MODEL_TYPES, *MODEL_TYPES.values(), "silu", "default", "linear", "dynamic", "yarn", "llama3",
                     "full_attention", "sliding_attention", "BF16", "F16", "F32", "I8", "model.norm.weight"]),
    st.text(max_size=12),
)  # fmt: skip
leaves = st.one_of(st.none(), st.booleans(), numbers, words)
rope_maps = st.dictionaries(st.sampled_from(ROPE_KEYS), st.one_of(numbers, words), max_size=6)
json_values = st.one_of(
    leaves,
    rope_maps,
    st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4), max_leaves=12),
)
config_changes = st.dictionaries(st.one_of(st.sampled_from(CONFIG_KEYS), words), json_values, min_size=1, max_size=4)


def packs_within_memory(folder: Path, target: Path) -> None:
    tracemalloc.reset_peak()
    packs_or_refuses(folder, target, SHORT)
    assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY_BYTES


@FUZZ
@given(architecture=st.sampled_from(list(MODEL_TYPES)), changes=config_changes)
def test_config_values(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    config = tiny_config(architecture)
    text = json.dumps({**config, **changes}).encode()
    tracemalloc.start()
    packs_within_memory(write_checkpoint(tmp_path / "checkpoint", text, tiny_tensors(config)), tmp_path / "model.lith")
    tracemalloc.stop()


@FUZZ
@given(rope=rope_maps, kind=st.sampled_from(["linear", "dynamic", "yarn", "llama3"]))
def test_rope_values(tmp_path: Path, rope: dict[str, Any], kind: str) -> None:
    given_values = {"rope_type": kind, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **rope}
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(rope_theta=..., rope_parameters=given_values))
    packs_or_refuses(folder, tmp_path / "model.lith", SHORT)


@FUZZ
@given(data=st.data())
def test_header_structure(tmp_path: Path, data: st.DataObject) -> None:
    tensors = tiny_tensors(tiny_config())
    header: dict[str, Any] = header_entries(tensors)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(list(header)))
        action = data.draw(st.sampled_from(["field", "shift", "entry", "rename", "delete", "swap", "add"]))
        if action == "field" and isinstance(header[name], dict):
            header[name] = {
                **header[name],
                data.draw(st.sampled_from(["dtype", "shape", "data_offsets"])): data.draw(json_values),
            }
        elif action == "shift" and isinstance(header[name], dict):
            shift = data.draw(st.lists(st.integers(-64, 64), min_size=2, max_size=2))
            header[name] = {**header[name], "data_offsets": shift}
        elif action == "entry":
            header[name] = data.draw(json_values)
        elif action == "rename":
            header[data.draw(words)] = header.pop(name)
        elif action == "delete" and len(header) > 1:
            del header[name]
        elif action == "swap":
            other = data.draw(st.sampled_from(list(header)))
            header[name], header[other] = header[other], header[name]
        else:
            header[data.draw(words)] = data.draw(json_values)
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=tensors, header=header)
    packs_or_refuses(folder, tmp_path / "model.lith", SHORT)


@FUZZ
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=8), which=st.booleans())
def test_bytes(tmp_path: Path, edits: list[tuple[int, int]], which: bool) -> None:
    """Single bytes of config.json, or of a safetensors file's length and header, replaced."""
    folder = write_checkpoint(tmp_path / "checkpoint")
    path = folder / ("config.json" if which else "model.safetensors")
    content = bytearray(path.read_bytes())
    end = len(content) if which else 8 + int.from_bytes(content[:8], "little")
    for position, byte in edits:
        content[position % end] = byte
    path.write_bytes(content)
    packs_or_refuses(folder, tmp_path / "model.lith", SHORT)
