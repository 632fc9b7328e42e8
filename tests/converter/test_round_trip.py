"""unpack(convert(x)) == x bit for bit, and the same bytes whatever the threads and shards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from golden_models import CASES, GoldenModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import megalith
from megalith.converter.against import compare_with_checkpoint
from megalith.converter.convert import convert, manifest, sha256_of
from megalith.converter.plan import Options, make_plan
from megalith.converter.source import Checkpoint
from megalith.converter.unpack import unpack

NUMPY_DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}


def finite_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Any finite bit patterns: both zeros, subnormals and the largest values included."""
    if dtype == "F32":  # exact in BF16, so that `auto` keeps them
        return finite_bits(rng, shape, "BF16").astype(np.float32)
    bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
    infinity = 0x7F80 if dtype == "BF16" else 0x7C00
    bits[(bits & 0x7FFF) >= infinity] &= np.uint16(0x83FF)
    return bits.view(NUMPY_DTYPES[dtype])


def checkpoint_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2 or Llama checkpoint, written out here a second time on purpose."""
    hidden, inner, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, hidden)
            if c["model_type"] == "qwen2":
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{p}self_attn.o_proj.weight"] = (hidden, q)
        shapes[f"{p}mlp.gate_proj.weight"] = shapes[f"{p}mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{p}mlp.down_proj.weight"] = (hidden, inner)
        shapes[f"{p}input_layernorm.weight"] = shapes[f"{p}post_attention_layernorm.weight"] = (hidden,)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], hidden)
    return shapes


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 3))
    model_type = draw(st.sampled_from(["llama", "qwen2"]))
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[model_type]],
        "model_type": model_type,
        "vocab_size": draw(st.integers(1, 70)),
        "hidden_size": draw(st.integers(1, 80)),
        "intermediate_size": draw(st.integers(1, 90)),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 24)),
        "max_position_embeddings": draw(st.integers(1, 40)),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": draw(st.booleans()),
    }


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for shard in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(config=configs(), dtype=st.sampled_from(["BF16", "F16", "F32"]), seed=st.integers(0, 2**32))
def test_unpack_gives_back_every_bit(
    tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], dtype: str, seed: int
) -> None:
    folder, rng = tmp_path_factory.mktemp("round"), np.random.default_rng(seed)
    tensors = {name: finite_bits(rng, shape, dtype) for name, shape in checkpoint_shapes(config).items()}
    write_checkpoint(folder / "source", config, tensors)
    convert(folder / "source", folder / "model.lith")
    with megalith.open(folder / "model.lith") as packed:
        unpack(packed, folder / "back")
        assert not compare_with_checkpoint(packed, folder / "source", jobs=1)
    back = load_file(folder / "back" / "model.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        expected = tensor if dtype != "F32" or tensor.ndim == 1 else tensor.astype(ml_dtypes.bfloat16)
        assert back[name].dtype == expected.dtype
        assert back[name].tobytes() == expected.tobytes()


@pytest.mark.parametrize("golden", CASES, indirect=True)
def test_golden_models_round_trip(golden: GoldenModel, tmp_path: Path) -> None:
    with megalith.open(golden.pack(tmp_path)) as packed:
        unpack(packed, tmp_path / "back")
        assert not compare_with_checkpoint(packed, golden.folder, jobs=2)
        ignored = packed.index.provenance["ignored_tensors"]
    source: dict[str, np.ndarray] = {}
    for path in golden.folder.glob("*.safetensors"):
        source |= load_file(path)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert set(source) - set(back) == set(ignored)
    for name, tensor in back.items():
        wide = source[name].astype(np.float32)
        np.testing.assert_array_equal(tensor.astype(np.float32), wide)


def test_same_bytes_for_any_threads_and_sharding(tmp_path: Path) -> None:
    config = json.loads((GoldenModel("qwen2").folder / "config.json").read_text())
    tensors = load_file(GoldenModel("qwen2").folder / "model.safetensors")
    digests = set()
    for shards in (1, 2, 5):
        write_checkpoint(tmp_path / f"shards{shards}", config, tensors, shards)
        for jobs in (1, 2, 7):
            target = tmp_path / f"{shards}-{jobs}.lith"
            convert(tmp_path / f"shards{shards}", target, jobs=jobs)
            digests.add(sha256_of(target))
    assert len(digests) == 1


def test_same_image_and_rope_table_as_ever(tmp_path: Path) -> None:
    """A change here is a change of the format, and takes a new version of it."""
    with megalith.open(GoldenModel("qwen3").pack(tmp_path)) as packed:
        sections = [packed.header.section(kind) for kind in ("image", "rope")]
        digests = [hashlib.sha256(packed.read(section.offset, section.nbytes)).hexdigest() for section in sections]
    assert digests == [
        "56efb2fa21b7bdfa677971ab3c2292e1b4bd698596658929ae3582127364d44d",
        "d6183e4b00f776872563a65aeef4d4df0b3d21d76349f8a914402397be69da79",
    ]


@pytest.mark.parametrize("golden", ["llama2", "llama_sharded", "qwen2"], indirect=True)
def test_a_dry_run_tells_the_exact_size(golden: GoldenModel, tmp_path: Path) -> None:
    with Checkpoint(golden.folder) as checkpoint:
        plan = make_plan(checkpoint, Options())
    packed = golden.pack(tmp_path)
    assert packed.stat().st_size == plan.file_bytes
    with megalith.open(packed) as file:
        found = [(s.kind, s.offset, s.nbytes) for s in file.header.sections]
    assert found == [(s.kind, s.offset, s.nbytes) for s in plan.sections]


def test_the_manifest_names_losses_and_sha256(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    config = json.loads((GoldenModel("llama_fp32").folder / "config.json").read_text())
    config |= {"num_key_value_heads": config["num_attention_heads"]} if "num_key_value_heads" not in config else {}
    config |= {"head_dim": config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])}
    shapes = checkpoint_shapes({**config, "tie_word_embeddings": config.get("tie_word_embeddings", False)})
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    tensors["model.norm.weight"][:3] = [1e-30, 1.0, 0.5]
    write_checkpoint(tmp_path / "source", config, tensors)
    result = convert(tmp_path / "source", tmp_path / "model.lith", Options(dtype="fp16"))
    summary = manifest(result, tmp_path / "model.lith")
    assert summary["sha256"] == sha256_of(tmp_path / "model.lith")
    loss = summary["lossy_tensors"]["model.norm.weight"]
    wide = tensors["model.norm.weight"]
    narrow = wide.astype(np.float16).astype(np.float32)
    assert loss["rounded"] == np.count_nonzero(wide != narrow)
    assert loss["flushed"] == 1
    assert loss["max_abs_error"] == pytest.approx(np.abs(wide.astype(np.float64) - narrow).max())
    with megalith.open(tmp_path / "model.lith") as packed:
        assert sum(record.loss.rounded for record in packed.records) == result.total_loss.rounded
        unpack(packed, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float16"
