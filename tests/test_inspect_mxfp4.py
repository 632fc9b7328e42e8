"""`megalith inspect` of files with MXFP4: sizes, quantisation losses, checkpoint tensors in pieces, pages of tiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from golden_models import GoldenModel
from safetensors.numpy import load_file, save_file
from stopwatch import fastest_seconds

from megalith.cli import run
from megalith.converter.convert import convert
from megalith.converter.plan import Options
from megalith.format.reader import PackedFile
from megalith.format.records import RECORD_TYPE
from megalith.inspection.statistics import statistics
from megalith.inspection.table import sqnr_db, tensor_columns
from megalith.inspection.tile_mxfp4 import scale_text
from megalith.output import json_text

MXFP4 = Options(experts="mxfp4", linear="mxfp4")
W1 = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"
BLOCKS = "model.layers.1.mlp.experts.gate_up_proj_blocks"
DOWN_PROJ = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Golden models: quantised, in native MXFP4, and with experts fused in BF16."""
    folder = tmp_path_factory.mktemp("packed")
    paths = {"mixtral": GoldenModel("mixtral").pack(folder, MXFP4)}
    for name in ("gpt_oss_mxfp4", "mixtral_fused"):
        paths[name] = GoldenModel(name).pack(folder)
    return {**paths, "wide": wide_model(folder)}


def wide_model(folder: Path) -> Path:
    """llama2 with 2,120 intermediate features: pages of down_proj have 2048 and 128 columns, the last 56 of padding."""
    source, rng = GoldenModel("llama2").folder, np.random.default_rng(0)
    tensors = load_file(source / "model.safetensors")
    hidden = tensors["model.norm.weight"].size
    for name in [name for name in tensors if ".mlp." in name]:
        shape = (hidden, 2120) if "down_proj" in name else (2120, hidden)
        tensors[name] = rng.standard_normal(shape).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 2120}))
    convert(folder, folder / "wide.lith", Options(linear="mxfp4"))
    return folder / "wide.lith"


def inspect_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run(["inspect", *map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def inspect_text(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_summary_of_a_quantised_model(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    summary = inspect_json(capsys, packed["mixtral"])["summary"]
    with PackedFile(packed["mixtral"]) as file:
        tensors, records = list(file.tensors.values()), file.records
        image_bytes = file.header.section("image").nbytes
    sizes = [
        t.entry.rows * -(-t.entry.columns // 32) * 17 if t.blob.dtype == "MXFP4" else 2 * t.entry.rows * t.entry.columns
        for t in tensors
    ]
    assert summary["weights_bytes"] == sum(sizes)
    assert summary["padding_bytes"] == image_bytes - sum(sizes)
    ratios = {t.name: r.loss.sqnr_db for t, r in zip(tensors, records, strict=True) if r.loss.sqnr_db is not None}
    quantised = summary["quantised"]
    assert (quantised["tensors"], quantised["native"]) == (len(ratios), 0)
    assert quantised["rounded"] == sum(r.loss.rounded for r in records)
    assert quantised["lowest_sqnr_db"] == pytest.approx(min(ratios.values()), abs=0.006)
    assert quantised["median_sqnr_db"] == pytest.approx(float(np.median(list(ratios.values()))), abs=0.011)
    assert [entry["name"] for entry in quantised["worst"]] == sorted(ratios, key=lambda name: ratios[name])[:5]
    kept = {entry["name"]: entry["tensors"] for entry in quantised["matrices_in_16_bits"]}
    assert kept == {"model.embed_tokens.weight": 1, "model.layers.*.block_sparse_moe.gate.weight": 2, "lm_head.weight": 1}
    assert summary["conversion"]["tensors"] == []
    text = inspect_text(capsys, packed["mixtral"])
    assert "lossless but for the quantised tensors" in text
    assert f"SQNR lowest {quantised['lowest_sqnr_db']:.2f} dB" in text
    assert "2 x model.layers.*.block_sparse_moe.gate.weight" in text


def test_native_mxfp4_is_lossless(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    result = inspect_json(capsys, packed["gpt_oss_mxfp4"])
    quantised = result["summary"]["quantised"]
    assert quantised["tensors"] == quantised["native"] == 54
    assert (quantised["worst"], quantised["lowest_sqnr_db"]) == ([], None)
    assert {row["sqnr_db"] for row in result["tensors"]} == {None}
    assert "SQNR lowest" not in inspect_text(capsys, packed["gpt_oss_mxfp4"])


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss_mxfp4", "wide"])
def test_table_agrees_with_the_stored_bytes(packed: dict[str, Path], name: str) -> None:
    with PackedFile(packed[name]) as file:
        columns, records, sources = tensor_columns(file), file.records, file.index.sources.names
        for i, tensor in enumerate(file.tensors.values()):
            entry, (rows, width) = tensor.entry, columns["stored_shape"][i]
            place = entry.placement
            assert columns["source"][i] == (sources[place.source] if place else None)
            ratio = records[i].loss.sqnr_db
            assert columns["sqnr_db"][i] == (None if ratio is None else round(ratio, 2))
            assert (columns["dtype"][i], width) == (tensor.blob.dtype, tensor.blob.columns)
            if tensor.blob.dtype != "MXFP4":
                continue
            codes = tensor.quantised_rows(0, entry.row_map.param or min(16, entry.rows)).codes
            assert file.read(columns["offset"][i], 16) == codes[0, 0].tobytes(), tensor.name
            assert columns["bytes"][i] == rows * width // 32 * 17
            assert columns["bytes"][i] - columns["padding"][i] == entry.rows * -(-entry.columns // 32) * 17


def test_text_table(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    lines = inspect_text(capsys, packed["mixtral"]).splitlines()
    ratio = next(row for row in inspect_json(capsys, packed["mixtral"])["tensors"] if row["name"] == W1)["sqnr_db"]
    cells = next(line for line in lines if line.startswith(W1 + " ")).split()
    assert cells[1:5] == ["MXFP4<BF16", "104x72", "mxfp4", "pair8(0)"]
    assert cells[6:] == ["104x128", str(104 * 17), f"{ratio:.2f}", "layers.0.experts.1.gate_up_proj"]


def test_ratios_of_hostile_records() -> None:
    records = np.zeros(5, RECORD_TYPE)
    records["signal_power"] = [1.0, np.nan, -1.0, 1e308, np.inf]
    records["noise_power"] = [0.0, 1.0, 1.0, 5e-324, 1.0]
    assert sqnr_db(records) == [None, None, None, 6313.06, None]


def test_sources(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in inspect_json(capsys, packed["gpt_oss_mxfp4"])["sources"]}
    stored = load_file(GoldenModel("gpt_oss_mxfp4").folder / "model.safetensors")
    assert set(rows) == {name for name in stored if ".experts." in name}
    for name, row in rows.items():
        assert tuple(row["shape"]) == stored[name].shape
        assert row["dtype"] == ("U8" if stored[name].dtype == np.uint8 else "BF16")
        assert row["tensors"] == (12 if "gate_up" in name else 6)
    lines = inspect_text(capsys, packed["gpt_oss_mxfp4"]).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("checkpoint tensors held in pieces"))
    assert lines[start + 1].split() == [next(iter(rows)), "U8", "6x192x3", "12"]
    assert inspect_json(capsys, packed["wide"])["sources"] == []
    assert "in pieces" not in inspect_text(capsys, packed["wide"])


@pytest.mark.parametrize("name", [BLOCKS, BLOCKS.replace("blocks", "scales")])
def test_a_source_of_mxfp4(packed: dict[str, Path], capsys: pytest.CaptureFixture[str], name: str) -> None:
    entry = inspect_json(capsys, packed["gpt_oss_mxfp4"], "--tensor", name)["source"]
    assert (entry["dtype"], entry["stored_dtype"], len(entry["tensors"])) == ("U8", "MXFP4", 12)
    with PackedFile(packed["gpt_oss_mxfp4"]) as file:
        values = [file.tensors[piece].to_float32().astype(np.float64) for piece in entry["tensors"]]
    assert entry["tensors"][4] == GATE
    found, whole = entry["statistics"], np.stack(values)
    assert (found["count"], found["minimum"], found["maximum"]) == (whole.size, whole.min(), whole.max())
    assert found["mean"] == pytest.approx(whole.mean(), abs=1e-12)
    assert found["std"] == pytest.approx(whole.std())
    place = np.unravel_index(np.abs(whole).argmax(), whole.shape)
    assert (found["abs_max_in"], *found["abs_max_at"]) == (entry["tensors"][place[0]], *place[1:])
    assert f"of {found['abs_max_in']}" in inspect_text(capsys, packed["gpt_oss_mxfp4"], "--tensor", name)


def test_a_source_of_bf16(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.mlp.experts.gate_up_proj"
    entry = inspect_json(capsys, packed["mixtral_fused"], "--tensor", name)["source"]
    stored = load_file(GoldenModel("mixtral_fused").folder / "model.safetensors")[name].astype(np.float64)
    assert entry["statistics"]["count"] == stored.size
    assert entry["statistics"]["std"] == pytest.approx(stored.std())
    assert entry["stored_dtype"] == "BF16"


def test_a_piece_shows_its_place(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    entry = inspect_json(capsys, packed["gpt_oss_mxfp4"], "--tensor", GATE)["tensor"]
    assert (entry["source"], entry["scales"]) == (BLOCKS, BLOCKS.replace("blocks", "scales"))
    assert (entry["start"], entry["row_stride"]) == (2 * 192 * 48, 2 * 48)
    assert "values, decoded" in inspect_text(capsys, packed["gpt_oss_mxfp4"], "--tensor", GATE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor", BLOCKS, "--tile", "0,0"], "held in pieces: ask for one of them, such as"),
        (["--tensor", BLOCKS, "--heatmap", "/tmp/never.html"], "held in pieces"),
        (["--tensor", BLOCKS[:-1]], f"did you mean {BLOCKS}"),
        (["--tensor", GATE, "--tile", "0,1"], "page columns 0 to 0"),
    ],
)
def test_wrong_usage(packed: dict[str, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run(["inspect", str(packed["gpt_oss_mxfp4"]), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("name", "tensor", "position"),
    [
        ("mixtral", W1, (3, 0)),
        ("mixtral", "model.layers.1.self_attn.k_proj.weight", (0, 0)),
        ("gpt_oss_mxfp4", GATE, (11, 0)),
        ("wide", DOWN_PROJ, (2, 0)),
        ("wide", DOWN_PROJ, (4, 1)),
    ],
)
def test_tile_agrees_with_the_tensors(
    packed: dict[str, Path], capsys: pytest.CaptureFixture[str], name: str, tensor: str, position: tuple[int, int]
) -> None:
    page = inspect_json(capsys, packed[name], "--tensor", tensor, "--tile", "{},{}".format(*position))["tile"]
    raw = packed[name].read_bytes()
    with PackedFile(packed[name]) as file:
        values = {key: file.tensors[key].to_float32() for key in file.tensors}
        blob, image = file.tensors[tensor].blob, file.header.section("image").offset
    assert (page["dtype"], len(page["pieces"])) == ("MXFP4", page["columns"] // 128 * 16)
    assert page["bytes"] == page["columns"] * 16 // 32 * 17
    start = image + blob.offset + page["blob_row_block"] * 16 * blob.columns // 32 * 17
    owners = set()
    for number, piece in enumerate(page["pieces"]):
        step, row = divmod(number, 16)
        step_start = start + (position[1] * 16 + step) * 1088
        assert (piece["step"], piece["offset"]) == (step, step_start + row * 64)
        assert piece["scales_offset"] == step_start + 1024 + row * 4
        assert piece["hex"] == raw[piece["offset"] : piece["offset"] + 64].hex()
        assert bytes(piece["scales"]) == raw[piece["scales_offset"] : piece["scales_offset"] + 4]
        assert piece["lanes"] == [row % 8 * 4, row % 8 * 4 + 4]
        first, end = piece["columns"]
        assert (first, end - first) == (position[1] * 2048 + step * 128, 128)
        expected = np.zeros(128, np.float32)
        if piece["tensor"]:
            found = values[piece["tensor"]][piece["row"], first:end]
            expected[: len(found)] = found
            owners.add(piece["tensor"])
        np.testing.assert_array_equal(np.float32(piece["values"]), expected)
    assert tensor in owners


def test_tile_text(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (packed["mixtral"], "--tensor", W1, "--tile", "0,0")
    page = inspect_json(capsys, *arguments)["tile"]
    short, full = inspect_text(capsys, *arguments), inspect_text(capsys, *arguments, "--hex")
    assert "w1[0]" in short
    assert "w3[7]" in short
    assert "steps of 128 columns, 1088 bytes each: 1024 bytes of codes" in short
    for piece in page["pieces"]:
        assert f"{piece['offset']}  " in short
        for lane, scale in enumerate(piece["scales"]):
            assert f"{piece['hex'][32 * lane : 32 * lane + 32]}  {scale:02x} = 2^{scale - 127}" in full
    wide = inspect_text(capsys, packed["wide"], "--tensor", DOWN_PROJ, "--tile", "0,0")
    assert "13 more steps" in wide
    assert "1920-2047" in wide
    assert len(wide.splitlines()) < 100
    assert (scale_text(255), scale_text(127)) == ("NaN", "2^0")


def test_statistics_and_stats_view(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with PackedFile(packed["mixtral"]) as file:
        found, values = statistics(file.tensors[W1]), file.tensors[W1].to_float32()
    assert (found.count, found.abs_max, found.zeros) == (values.size, np.abs(values).max(), np.count_nonzero(values == 0))
    row = next(row for row in inspect_json(capsys, packed["mixtral"], "--stats")["stats"] if row["name"] == W1)
    assert (row["dtype"], row["abs_max"]) == ("MXFP4", found.abs_max)


def test_tree(packed: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    blobs = {blob["name"]: blob for blob in inspect_json(capsys, packed["mixtral"], "--tree")["tree"]["fused_blobs"]}
    blob = blobs["layers.1.experts.3.gate_up_proj"]
    assert (blob["dtype"], blob["layout"], blob["stored_shape"], blob["bytes"]) == ("MXFP4", "mxfp4", [208, 128], 208 * 68)
    assert "mxfp4: a block of 16 rows is stored in steps of 128 columns" in inspect_text(capsys, packed["mixtral"], "--tree")


def test_json_text_has_a_line_per_entry() -> None:
    value = {"a": [], "b": {}, "c": {"d": [{"e": [1, 2]}, {}], "f": [1, 2], "g": {"h": {"i": {"j": 'a"\n'}}}}, "k": [[1], [2]]}
    text = json_text(value)
    assert json.loads(text) == value
    assert '\n      {"e": [1, 2]},\n' in text
    assert '"f": [1, 2]' in text
    assert text.count("\n") == 17


@pytest.fixture(scope="module")
def many_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 18,867 tensors: 48 layers of 128 tiny experts in MXFP4."""
    folder = tmp_path_factory.mktemp("many")
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 16, "hidden_size": 32,
        "intermediate_size": 32, "moe_intermediate_size": 32, "num_experts": 128, "num_experts_per_tok": 4,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "num_hidden_layers": 48,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 16, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "attention_bias": False,
    }  # fmt: skip
    matrix = np.random.default_rng(0).standard_normal((128, 32)).astype(ml_dtypes.bfloat16)
    square, vector = matrix[:32], matrix[0]
    tensors = {"model.embed_tokens.weight": matrix[:16], "lm_head.weight": matrix[:16], "model.norm.weight": vector}
    for layer in range(48):
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}self_attn.{name}_proj.weight": square for name in "qkvo"}
        tensors |= {f"{prefix}self_attn.{name}_norm.weight": vector for name in "qk"}
        tensors |= {f"{prefix}{name}_layernorm.weight": vector for name in ("input", "post_attention")}
        tensors[f"{prefix}mlp.gate.weight"] = matrix
        for expert in range(128):
            tensors |= {f"{prefix}mlp.experts.{expert}.{name}_proj.weight": square for name in ("gate", "up", "down")}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    convert(folder, folder / "many.lith", Options(experts="mxfp4"))
    return folder / "many.lith"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_twenty_thousand_tensors_print_at_once(many_experts: Path, options: list[str]) -> None:
    """0.35 s and 0.45 s on an idle core; the bound leaves room for a busy one."""
    seconds, output = fastest_seconds(2.0, "-m", "megalith", "inspect", str(many_experts), *options)
    assert seconds <= 2.0
    assert output.count("127.down_proj.weight") == 48


def test_heatmap_of_many_experts_stays_light(many_experts: Path, tmp_path: Path) -> None:
    out, tensor = tmp_path / "map.html", "model.layers.7.mlp.experts.9.down_proj.weight"
    assert run(["inspect", str(many_experts), "--tensor", tensor, "--heatmap", str(out)]) == 0
    text = out.read_text()
    assert len(text) < 512 << 10
    assert text.count('class="k-experts"') == 48 * 16 + 1
    assert "layers.3: experts 120 to 127" in text
