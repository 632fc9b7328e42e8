"""`megalith inspect`: what it shows agrees with the file's bytes, and nothing hostile reaches the terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from stopwatch import fastest_seconds

from megalith.cli import run
from megalith.converter.convert import convert
from megalith.converter.plan import Options
from megalith.format.experts import ExpertIndex
from megalith.format.reader import PackedFile
from megalith.format.tiles import element_position
from megalith.inspection.experts import experts, experts_text
from megalith.inspection.statistics import statistics
from megalith.inspection.table import tensor_columns

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from packed_parts import assemble, canonical, take_apart

MODELS = Path(__file__).parent / "golden" / "models"
UP_PROJ = "model.layers.0.mlp.up_proj.weight"
DOWN_PROJ = "model.layers.0.mlp.down_proj.weight"
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Some golden models as packed files."""
    folder = tmp_path_factory.mktemp("packed")
    paths = {name: folder / f"{name}.lith" for name in ("llama2", "llama_fp32", "llama_fp16", "llama_yarn", "qwen2")}
    for name, path in paths.items():
        convert(MODELS / name, path, Options())
    return {**paths, "wide": wide_model(folder)}


def wide_model(folder: Path) -> Path:
    """llama2 with 544 intermediate features: pages of down_proj have 512 and 32 columns."""
    tensors, rng = load_file(MODELS / "llama2" / "model.safetensors"), np.random.default_rng(0)
    hidden = tensors["model.norm.weight"].size
    for name in [name for name in tensors if ".mlp." in name]:
        shape = (hidden, 544) if "down_proj" in name else (544, hidden)
        tensors[name] = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((MODELS / "llama2" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 544}))
    convert(folder, folder / "wide.lith", Options())
    return folder / "wide.lith"


def inspect_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run(["inspect", *map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["version"] == 1
    return result


def inspect_text(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_summary(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = packed["llama_yarn"]
    summary = inspect_json(capsys, path)["summary"]
    assert summary["architecture"] == "LlamaForCausalLM"
    assert summary["file_bytes"] == path.stat().st_size
    with PackedFile(path) as file:
        tensors = [file.tensors[name].bits() for name in file.tensors]
        inv_freq, table = file.rope
    assert summary["num_tensors"] == len(tensors)
    assert summary["weights_bytes"] == sum(bits.nbytes for bits in tensors)
    assert summary["num_parameters"] == sum(bits.size for bits in tensors)
    sections = {section["name"]: section for section in summary["sections"]}
    assert summary["weights_bytes"] + summary["padding_bytes"] == sections["image"]["bytes"]
    assert summary["rope"]["type"] == "yarn"
    assert summary["rope"]["attention_factor"] > 1
    np.testing.assert_array_equal(np.float32(summary["rope"]["inv_freq"]), inv_freq)
    assert sorted(map(int, summary["rope"]["rows"])) == [0, 1, len(table) - 1]
    for position, row in summary["rope"]["rows"].items():
        np.testing.assert_array_equal(np.float32(row), table[int(position)])
    assert summary["conversion"]["tensors"] == []
    text = inspect_text(capsys, path)
    assert "lossless" in text
    assert "yarn" in text


def test_lossy_conversion_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lossy.lith"
    convert(MODELS / "llama_fp16", path, Options(dtype="bf16"))
    conversion = inspect_json(capsys, path)["summary"]["conversion"]
    with PackedFile(path) as file:
        total = sum((record.loss for record in file.records[1:]), file.records[0].loss)
    assert (conversion["rounded"], conversion["max_abs_error"]) == (total.rounded, total.max_abs_error)
    assert total.rounded > 0
    assert f"{total.rounded:,} values rounded" in inspect_text(capsys, path)


@pytest.mark.parametrize("name", ["llama2", "llama_fp32", "qwen2"])
def test_table_agrees_with_the_stored_bytes(packed: dict[str, Path], name: str) -> None:
    with PackedFile(packed[name]) as file:
        columns = tensor_columns(file)
        image = file.header.section("image")
        for i, tensor in enumerate(file.tensors.values()):
            bits, blob = tensor.bits(), tensor.blob
            first = file.read(columns["offset"][i], bits.itemsize)
            assert first == bits.flat[0].tobytes(), tensor.name
            stored = tensor.entry.row_map.stored_rows(1)[0]
            position = element_position(int(stored), 0, blob.columns) if blob.layout == "tile16x512" else int(stored)
            assert columns["offset"][i] == image.offset + blob.offset + position * bits.itemsize
            rows, width = columns["stored_shape"][i]
            assert columns["bytes"][i] == rows * width * bits.itemsize
            assert columns["padding"][i] == columns["bytes"][i] - bits.nbytes >= 0
            assert tuple(columns["shape"][i]) == tensor.shape
        # tensors fill their blobs: rows of padding belong to one of them
        blob_bytes = sum(file.index.blobs.columns["nbytes"].tolist())
        assert sum(columns["bytes"]) <= blob_bytes


def test_text_table_has_a_line_per_tensor(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    lines = inspect_text(capsys, packed["llama_fp32"]).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("name "))
    with PackedFile(packed["llama_fp32"]) as file:
        assert [line.split()[0] for line in lines[start + 1 :]] == list(file.tensors)
    up_proj = next(line for line in lines if line.startswith(UP_PROJ)).split()
    assert up_proj[1:5] == ["BF16<F32", "104x72", "tile16x512", "pair8(1)"]
    assert up_proj[6] == "104x96"
    assert up_proj[8] == "layers.0.gate_up_proj"


def test_tree(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    tree = inspect_json(capsys, packed["qwen2"], "--tree")["tree"]
    names: list[str] = []

    def collect(nodes: list[dict[str, Any]], path: list[str]) -> None:
        for node in nodes:
            if "tensor" in node:
                assert node["tensor"]["name"] == ".".join([*path, node["name"]])
                names.append(node["tensor"]["name"])
            else:
                collect(node["children"], [*path, node["name"]])

    collect(tree["modules"], [])
    with PackedFile(packed["qwen2"]) as file:
        assert sorted(names) == sorted(file.tensors)
    fused = {blob["name"]: blob for blob in tree["fused_blobs"]}
    assert set(fused) == {f"layers.{i}.{name}" for i in range(2) for name in ("qkv_proj", "qkv_bias", "gate_up_proj")}
    spans = [(part["first_row"], part["end_row"]) for part in fused["layers.0.qkv_proj"]["parts"]]
    assert [first for first, _ in spans[1:]] == [end for _, end in spans[:-1]]
    gate, up = fused["layers.0.gate_up_proj"]["parts"]
    assert (gate["first_row"], gate["end_row"]) == (up["first_row"], up["end_row"]) == (0, 368)
    text = inspect_text(capsys, packed["qwen2"], "--tree")
    assert "pair8(1)" in text
    assert "blobs that several tensors share" in text


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("llama2", UP_PROJ), ("llama_fp16", "model.embed_tokens.weight"), ("llama_fp32", "model.norm.weight")],
)
def test_statistics(packed: dict[str, Path], name: str, tensor: str) -> None:
    with PackedFile(packed[name]) as file:
        found = statistics(file.tensors[tensor])
        values = file.tensors[tensor].to_float32().astype(np.float64)
    assert found.count == values.size
    assert (found.minimum, found.maximum) == (values.min(), values.max())
    assert found.mean == pytest.approx(values.mean(), abs=1e-12)
    assert found.std == pytest.approx(values.std())
    assert found.abs_max == np.abs(values).max()
    assert found.abs_max_at[: values.ndim] == np.unravel_index(np.abs(values).argmax(), values.shape)
    assert found.zeros == np.count_nonzero(values == 0)
    normal = values[np.abs(values) >= (2**-14 if name == "llama_fp16" else 2**-126)]
    expected = np.unique(np.floor(np.log2(np.abs(normal))).astype(int), return_counts=True)
    assert found.subnormals == found.count - found.zeros - normal.size
    assert found.exponents == dict(zip(*(column.tolist() for column in expected), strict=True))


@pytest.fixture(scope="module")
def odd_values(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama2 with NaN, infinity, zeros and a subnormal in known places of up_proj, and a NaN vector."""
    folder = tmp_path_factory.mktemp("odd")
    tensors = load_file(MODELS / "llama2" / "model.safetensors")
    weights = tensors[UP_PROJ].copy()
    weights[0, :4] = np.array([np.nan, np.inf, -np.inf, 0.0], weights.dtype)
    weights[1, 1] = ml_dtypes.bfloat16(1e-39)
    weights[17, 3] = -100.0
    tensors[UP_PROJ] = weights
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text((MODELS / "llama2" / "config.json").read_text())
    convert(folder, folder / "odd.lith", Options(allow_nonfinite=True))
    return folder / "odd.lith"


def test_statistics_of_odd_values(odd_values: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = inspect_json(capsys, odd_values, "--tensor", UP_PROJ)["tensor"]
    found = entry["statistics"]
    assert (found["nans"], found["infinities"], found["subnormals"]) == (1, 2, 1)
    assert (found["abs_max"], found["abs_max_at"], found["minimum"]) == (100.0, [17, 3], -100.0)
    assert found["zeros"] >= 1
    norm = inspect_json(capsys, odd_values, "--tensor", "model.norm.weight")["tensor"]["statistics"]
    assert (norm["mean"], norm["nans"]) == ("nan", norm["count"])
    rows = inspect_json(capsys, odd_values, "--stats")["stats"]
    assert next(row for row in rows if row["name"] == UP_PROJ)["abs_max"] == 100.0
    assert "NaN" in inspect_text(capsys, odd_values, "--stats")


@pytest.mark.parametrize(
    ("name", "tensor", "position"),
    [
        ("llama2", UP_PROJ, (1, 0)),
        ("llama2", K_PROJ, (0, 0)),
        ("llama_fp32", "lm_head.weight", (8, 0)),
        ("qwen2", K_PROJ, (1, 0)),
        ("wide", DOWN_PROJ, (2, 0)),
        ("wide", DOWN_PROJ, (4, 1)),
    ],
)
def test_tile_agrees_with_the_tensors(
    packed: dict[str, Path], capsys: pytest.CaptureFixture[str], name: str, tensor: str, position: tuple[int, int]
) -> None:
    page = inspect_json(capsys, packed[name], "--tensor", tensor, "--tile", "{},{}".format(*position))["tile"]
    with PackedFile(packed[name]) as file:
        values = {key: file.tensors[key].to_float32() for key in file.tensors}
        raw = packed[name].read_bytes()
        blob = file.tensors[tensor].blob
    assert page["offset"] + page["bytes"] <= len(raw)
    assert len(page["pieces"]) == page["bytes"] // 64
    owners = set()
    for number, piece in enumerate(page["pieces"]):
        assert piece["offset"] == page["offset"] + 64 * number
        assert piece["hex"] == raw[piece["offset"] : piece["offset"] + 64].hex()
        assert piece["lanes"][0] == 4 * (piece["stored_row"] % 8)
        start, stop = piece["columns"]
        in_blob = element_position(piece["stored_row"], start, blob.columns) * 2
        assert (
            raw[piece["offset"] : piece["offset"] + 2] == raw[page["offset"] - page_start(page, blob.columns) + in_blob :][:2]
        )
        expected = np.zeros(32, np.float32)
        if piece["tensor"]:
            row = values[piece["tensor"]][piece["row"], start:stop]
            expected[: len(row)] = row
            owners.add(piece["tensor"])
        np.testing.assert_array_equal(np.float32(piece["values"]), expected)
    assert tensor in owners


def page_start(page: dict[str, Any], columns: int) -> int:
    """Offset of a page within its blob."""
    start: int = (page["blob_row_block"] * columns + page["page_column"] * 512) * 32
    return start


def test_tile_text(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (packed["llama2"], "--tensor", UP_PROJ, "--tile", "0,0")
    page = inspect_json(capsys, *arguments)["tile"]
    short, full = inspect_text(capsys, *arguments), inspect_text(capsys, *arguments, "--hex")
    assert "gate_proj[0]" in short
    assert "up_proj[7]" in short
    assert len(short.splitlines()) < 110
    assert all(piece["hex"][:32] in full for piece in page["pieces"])
    assert str(page["offset"]) in short


def test_tile_text_cuts_a_wide_page(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (packed["wide"], "--tensor", DOWN_PROJ, "--tile")
    wide = inspect_text(capsys, *arguments, "0,0")
    assert "13 more steps" in wide
    assert "480-511" in wide
    narrow = inspect_text(capsys, *arguments, "4,1")
    assert "more steps" not in narrow
    assert "512-543" in narrow
    assert "padding" in narrow  # 72 rows end in the middle of the last block
    assert len(inspect_text(capsys, *arguments, "0,0", "--hex").splitlines()) - len(wide.splitlines()) > 900


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor", "model.norm.weight", "--tile", "0,0"], "is a vector"),
        (["--tensor", UP_PROJ, "--tile", "10000,0"], "has row blocks 0 to"),
        (["--tensor", "model.layers.0.mlp.up_proj"], f"did you mean {UP_PROJ}"),
        (["--tensor", "\x1b[31m"], r"\x1b[31m"),
        (["--tile", "0,0"], "--tile goes with --tensor"),
        (["--tensor", UP_PROJ, "--hex"], "--hex goes with --tile"),
        (["--tensor", UP_PROJ, "--tile", "0"], "row block and a page column"),
        (["--tensor", UP_PROJ, "--tile", "-1,0"], "row block and a page column"),
        (["--batch", "2"], "--batch goes with --memory"),
        (["--gpu-memory", "80"], "--gpu-memory goes with --memory"),
        (["--memory", "--context", "1000000"], "at most"),
    ],
)
def test_wrong_usage(packed: dict[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run(["inspect", str(packed["llama2"]), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "\x1b" not in captured.err
    assert captured.out == ""


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tmp_path / "absent.lith")]) == 5
    assert "absent.lith" in capsys.readouterr().err


def test_memory(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    memory = inspect_json(capsys, packed["llama2"], "--memory", "--context", "65", "--batch", "3")["memory"]
    with PackedFile(packed["llama2"]) as file:
        config, sections = file.index.config, {section.kind: section.nbytes for section in file.header.sections}
    plan = {entry["name"]: entry["bytes"] for entry in memory["plan"]}
    assert (plan["weights"], plan["rope"]) == (sections["image"], sections["rope"])
    pitch = -(-config.head_dim // 64) * 64
    assert plan["kv_cache"] == 2 * config.num_hidden_layers * config.num_key_value_heads * pitch * 2 * 64 * 2 * 3
    assert config.vocab_size * 4 * 3 <= plan["logits"] < (config.vocab_size + 128) * 4 * 3
    end = 0
    for entry in memory["plan"]:
        assert end <= entry["offset"] < end + 4096
        assert entry["offset"] % entry["alignment"] == 0
        end = entry["offset"] + entry["bytes"]
    assert end <= memory["total_bytes"] < end + 4096
    assert f"{memory['total_bytes']:,}" in inspect_text(capsys, packed["llama2"], "--memory", "--context", "65", "--batch", "3")


def test_memory_fills_a_gpu(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--memory", "--context", "64", "--gpu-memory"]
    memory = inspect_json(capsys, packed["llama2"], *options, "0.5")["memory"]
    plan = {entry["name"]: entry["bytes"] for entry in memory["plan"]}
    page = plan["kv_cache"] // memory["num_pages"]
    assert memory["total_bytes"] <= 2**29 < memory["total_bytes"] + page
    assert memory["gpu_memory_bytes"] == 2**29
    assert run(["inspect", str(packed["llama2"]), *options, "0.001"]) == 2
    assert "weights and buffers need" in capsys.readouterr().err


def test_experts(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_json(capsys, packed["llama2"], "--experts")["experts"] is None
    assert "dense" in inspect_text(capsys, packed["llama2"], "--experts")
    table = np.array([[[[0, 4096], [4096, 512]], [[8192, 4096], [12288, 1024]]]], np.uint64)
    found = experts(ExpertIndex(np.array([3], np.uint32), ("gate_up_proj", "down_proj"), table), 100)
    assert found is not None
    layer = found["layers"][0]
    assert (layer["layer"], layer["offset"], layer["end"], layer["bytes"]) == (3, 100, 13412, 9728)
    assert (layer["smallest_expert_bytes"], layer["largest_expert_bytes"]) == (4608, 5120)
    assert layer["experts"][1] == [[8292, 4096], [12388, 1024]]
    assert any("12388+1024" in line for line in experts_text(found))


def test_hostile_content_is_escaped(packed: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = take_apart(packed["llama2"].read_bytes())
    parts.index["provenance"] = {"library_version": "\x1b]0;x\x07", "blob": b"\x00\x01", "nan\n": float("nan")}
    metadata = canonical.encode({"note\r": "a\x1b[31m\nb"})
    path = tmp_path / "hostile.lith"
    path.write_bytes(assemble(replace(parts, metadata=metadata)))
    text = inspect_text(capsys, path)
    assert all(character == "\n" or " " <= character <= "~" for character in text)
    summary = inspect_json(capsys, path)["summary"]
    assert summary["provenance"]["nan\n"] == "nan"
    assert summary["provenance"]["blob"] == "0001"


def test_all_views_at_once(packed: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tree", "--tensor", K_PROJ, "--tile", "0,0", "--hex", "--stats", "--experts", "--memory"]
    result = inspect_json(capsys, packed["qwen2"], *options, "--heatmap", tmp_path / "map.html")
    assert list(result) == ["version", "path", "tree", "tensor", "tile", "stats", "experts", "memory", "heatmap"]


@pytest.fixture(scope="module")
def many_tensors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 19,983 tensors in 2,220 tiny layers."""
    folder = tmp_path_factory.mktemp("many")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16, "hidden_size": 16,
        "intermediate_size": 16, "num_hidden_layers": 2220, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 16, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False,
    }  # fmt: skip
    matrices = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    matrices += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    matrix = np.random.default_rng(0).standard_normal((16, 16)).astype(ml_dtypes.bfloat16)
    tensors = {"model.embed_tokens.weight": matrix, "lm_head.weight": matrix, "model.norm.weight": matrix[0]}
    for layer in range(2220):
        tensors |= {f"model.layers.{layer}.{name}.weight": matrix for name in matrices}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = matrix[0]
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, folder / "many.lith", Options())
    return folder / "many.lith"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_twenty_thousand_tensors_print_at_once(many_tensors: Path, options: list[str]) -> None:
    """0.35 s and 0.45 s on an idle core; the bound leaves room for a busy one."""
    seconds, output = fastest_seconds(2.0, "-m", "megalith", "inspect", str(many_tensors), *options)
    assert seconds <= 2.0
    assert output.count("self_attn.k_proj.weight") == 2220
