"""`megalith diff`: what differs is found, where and by how much, and the exit code says whether anything does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import GoldenModel
from safetensors.numpy import load_file, save_file

from megalith import diffing
from megalith.cli import run
from megalith.converter.convert import convert
from megalith.converter.plan import Options
from megalith.format.reader import PackedFile

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from packed_parts import assemble, canonical, replace, take_apart

MODELS = Path(__file__).parent / "golden" / "models"
UP_PROJ = "model.layers.0.mlp.up_proj.weight"


def pack(folder: Path, name: str, change: Any = None, config: dict[str, Any] | None = None, **options: Any) -> Path:
    """Convert a golden model after `change` to its tensors and config."""
    source = folder / f"source-{len(list(folder.iterdir()))}"
    source.mkdir()
    tensors = dict(load_file(MODELS / name / "model.safetensors"))
    if change:
        change(tensors)
    save_file(tensors, source / "model.safetensors")
    settings = {**json.loads((MODELS / name / "config.json").read_text()), **(config or {})}
    (source / "config.json").write_text(json.dumps(settings))
    convert(source, source / "packed.lith", Options(**options))
    return source / "packed.lith"


def diff_json(capsys: pytest.CaptureFixture[str], a: Path, b: Path) -> tuple[int, dict[str, Any]]:
    code = run(["diff", str(a), str(b), "--json"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["version"] == 1
    assert code == (0 if result["identical"] else 1)
    return code, result


def diff_text(capsys: pytest.CaptureFixture[str], a: Path, b: Path) -> str:
    run(["diff", str(a), str(b)])
    return capsys.readouterr().out


def test_equal_files_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pack(tmp_path, "llama2"), pack(tmp_path, "llama2")
    monkeypatch.setattr(PackedFile, "read_image", None)
    code, result = diff_json(capsys, a, b)
    assert code == 0
    assert result["tensors"] == []
    assert result["counts"]["equal"] == result["equal_by_checksum"] > 0
    assert "without reading their values" in diff_text(capsys, a, b)


def test_values(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffing, "_SLICE_BYTES", 4096)  # several slices even here
    errors = {(19, 2): 0.5, (19, 7): -1.0, (40, 0): 0.25}
    expected = {}

    def change(tensors: dict[str, Any]) -> None:
        changed = tensors[UP_PROJ].copy()
        for place, error in errors.items():
            before = float(changed[place])
            changed[place] += error
            expected[place] = (before, float(changed[place]))
        tensors[UP_PROJ] = changed

    code, result = diff_json(capsys, pack(tmp_path, "llama2"), pack(tmp_path, "llama2", change))
    assert code == 1
    assert len(result["tensors"]) == 1
    entry = result["tensors"][0]
    assert (entry["name"], entry["verdict"]) == (UP_PROJ, "values")
    deltas = np.array([after - before for before, after in expected.values()])
    found = entry["values"]
    assert found["differing"] == 3
    assert found["max_abs_error"] == np.abs(deltas).max()
    assert found["rms_error"] == pytest.approx(np.sqrt(np.square(deltas).sum() / found["count"]))
    assert (found["first_at"], found["first_values"]) == ([19, 2], list(expected[19, 2]))
    # gate_proj shares the blob: its checksum differs, its values do not
    assert result["counts"]["values"] == 1
    assert result["equal_by_checksum"] == sum(result["counts"].values()) - 2


def test_nonfinite_and_negative_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def zero(tensors: dict[str, Any]) -> None:
        tensors[UP_PROJ] = np.zeros_like(tensors[UP_PROJ])

    def odd(tensors: dict[str, Any]) -> None:
        zero(tensors)
        tensors[UP_PROJ][0, :3] = np.array([-0.0, np.nan, np.inf], tensors[UP_PROJ].dtype)

    a = pack(tmp_path, "llama2", zero, allow_nonfinite=True)
    b = pack(tmp_path, "llama2", odd, allow_nonfinite=True)
    _, result = diff_json(capsys, a, b)
    found = result["tensors"][0]["values"]
    assert (found["differing"], found["nonfinite"], found["max_abs_error"]) == (3, 2, 0.0)
    assert found["first_at"] == [0, 0]
    assert "2 of them not finite" in diff_text(capsys, a, b)


def test_dtypes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pack(tmp_path, "llama_fp16"), pack(tmp_path, "llama_fp16", dtype="bf16")
    _, result = diff_json(capsys, a, b)
    by_name = {entry["name"]: entry for entry in result["tensors"]}
    with PackedFile(a) as file_a, PackedFile(b) as file_b:
        assert list(by_name) == list(file_a.tensors)
        for name, entry in by_name.items():
            assert entry["dtype"] == ["F16", "BF16"]
            exact, rounded = (file.tensors[name].to_float32().astype(np.float64) for file in (file_a, file_b))
            changed = exact != rounded
            assert entry["verdict"] == ("values" if changed.any() else "dtype")
            if changed.any():
                assert entry["values"]["differing"] == np.count_nonzero(changed)
                assert entry["values"]["max_abs_error"] == np.abs(exact - rounded).max()
    assert [entry["name"] for entry in result["provenance"]] == ["options"]
    assert "dtype F16 -> BF16" in diff_text(capsys, a, b)


def test_shapes_and_missing_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fewer_layers(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            del tensors[name]
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[name][:50]

    a = pack(tmp_path, "llama2")
    b = pack(tmp_path, "llama2", fewer_layers, {"num_hidden_layers": 1, "vocab_size": 50})
    _, result = diff_json(capsys, a, b)
    assert result["counts"]["shape"] == 2
    assert result["counts"]["only_a"] == 9
    assert {"num_hidden_layers", "vocab_size", "layer_windows", "sparse_layers"} == {
        entry["name"] for entry in result["config"]
    }
    assert [entry["name"] for entry in result["files"]] == ["config.json"]
    layout = next(entry for entry in result["tensors"] if entry["verdict"] == "layout")
    assert list(layout["layout"]) == ["image_offset"]
    text = diff_text(capsys, a, b)
    assert "only in A" in text
    assert "nothing but their offset" in text
    _, reverse = diff_json(capsys, b, a)
    assert reverse["counts"]["only_b"] == 9


def test_rope(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pack(tmp_path, "llama2"), pack(tmp_path, "llama2", None, {"rope_theta": 20000.0})
    _, result = diff_json(capsys, a, b)
    assert [entry["name"] for entry in result["rope"]] == ["theta", "table"]
    assert result["tensors"] == []


def test_layout_row_order_and_source_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same tensors under another head count lie in another order: equal in value, laid out differently."""
    a = pack(tmp_path, "llama3_rope")
    with PackedFile(a) as file:
        config = file.index.config
    heads = {"num_attention_heads": config.num_attention_heads // 2, "num_key_value_heads": config.num_key_value_heads // 2,
             "head_dim": config.head_dim * 2}  # fmt: skip
    b = pack(tmp_path, "llama3_rope", None, heads)
    _, result = diff_json(capsys, a, b)
    assert {entry["verdict"] for entry in result["tensors"]} == {"layout"}
    assert {entry["name"].split(".")[-2] for entry in result["tensors"]} == {"q_proj", "k_proj"}
    assert {tuple(entry["layout"]) for entry in result["tensors"]} == {("row_order",)}
    assert "row_order ['rope', 0, 64] -> ['rope', 0, 128]" in diff_text(capsys, a, b)

    parts = take_apart(a.read_bytes())
    column = bytearray(parts.index["tensors"]["source_dtype"])
    column[0] = 3
    parts.index["tensors"]["source_dtype"] = bytes(column)
    c = tmp_path / "source.lith"
    c.write_bytes(assemble(parts))
    _, result = diff_json(capsys, a, c)
    assert [entry["layout"] for entry in result["tensors"]] == [{"source_dtype": ["BF16", "F32"]}]


def test_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = pack(tmp_path, "llama2"), tmp_path / "noted.lith"
    b.write_bytes(
        assemble(replace(take_apart(a.read_bytes()), metadata=canonical.encode({"note": "\x1b[31mred", "same": True})))
    )
    code, result = diff_json(capsys, a, b)
    assert code == 1
    assert [entry["name"] for entry in result["metadata"]] == ["note", "same"]
    text = diff_text(capsys, a, b)
    assert "\x1b" not in text
    assert "absent -> true" in text


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["diff", str(tmp_path / "a.lith"), str(tmp_path / "b.lith")]) == 5
    assert "a.lith" in capsys.readouterr().err


W1 = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


def test_mxfp4_and_bf16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path, experts in zip(paths, ("keep", "mxfp4", "mxfp4"), strict=True):
        convert(GoldenModel("mixtral").folder, path, Options(experts=experts))
    a, b, c = paths
    _, result = diff_json(capsys, a, b)
    by_name = {entry["name"]: entry for entry in result["tensors"] if "dtype" in entry}
    assert set(by_name) == {entry["name"] for entry in result["tensors"] if ".experts." in entry["name"]}
    with PackedFile(a) as file_a, PackedFile(b) as file_b:
        exact, decoded = (file.tensors[W1].to_float32().astype(np.float64) for file in (file_a, file_b))
    entry, changed = by_name[W1], exact != decoded
    assert (entry["verdict"], entry["dtype"]) == ("values", ["BF16", "MXFP4"])
    assert entry["values"]["differing"] == np.count_nonzero(changed)
    assert entry["values"]["max_abs_error"] == np.abs(exact - decoded).max()
    assert entry["values"]["rms_error"] == pytest.approx(np.sqrt(np.square(exact - decoded).mean()))
    text = diff_text(capsys, a, b)
    assert "; dtype BF16 -> MXFP4\n" in text
    assert "largest error" in text
    assert "differ in nothing but their offset in the device image" in text
    assert diff_json(capsys, b, c)[1]["identical"]


def test_values_that_mxfp4_holds_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def exact(tensors: dict[str, Any]) -> None:
        for name in tensors:
            tensors[name] = np.sign(tensors[name].astype(np.float32)).astype(tensors[name].dtype)

    a, b = pack(tmp_path, "llama2", exact), pack(tmp_path, "llama2", exact, linear="mxfp4")
    _, result = diff_json(capsys, a, b)
    verdicts = {entry["name"]: entry["verdict"] for entry in result["tensors"]}
    assert verdicts[UP_PROJ] == "dtype"
    assert "values" not in verdicts.values()


def test_other_codes_and_scales_for_equal_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A block of 1 (code 2) at scale 2^0 is one of 0.5 (code 1) at 2^1; two experts of a native checkpoint are written so."""
    source, name = GoldenModel("gpt_oss_mxfp4").folder, "model.layers.1.mlp.experts.gate_up_proj_"
    paths = []
    for code, scale in ((0x22, 127), (0x11, 128)):
        folder = tmp_path / str(scale)
        folder.mkdir()
        tensors = dict(load_file(source / "model.safetensors"))
        blocks, scales = tensors[name + "blocks"].copy(), tensors[name + "scales"].copy()
        blocks[2, 8, 1], scales[2, 8, 1] = code, scale  # row 4 of expert 2's gate_proj
        blocks[3, 9, 0], scales[3, 9, 0] = 0, scale
        save_file({**tensors, name + "blocks": blocks, name + "scales": scales}, folder / "model.safetensors")
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        convert(folder, folder / "packed.lith", Options())
        paths.append(folder / "packed.lith")
    _, result = diff_json(capsys, *paths)
    codes = {entry["name"]: (entry["verdict"], entry["codes"]) for entry in result["tensors"]}
    prefix, one = "model.layers.1.mlp.experts", {"differing": 1, "count": 288}
    assert codes == {f"{prefix}.2.gate_proj.weight": ("codes", one), f"{prefix}.3.up_proj.weight": ("codes", one)}
    assert "1 of 288 blocks are written otherwise" in diff_text(capsys, *paths)


def test_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same experts, fused in the checkpoint or one by one: equal in value, in other checkpoint tensors."""
    model = GoldenModel("mixtral_fused")
    a, separate = model.pack(tmp_path), tmp_path / "separate"
    tensors = dict(load_file(model.folder / "model.safetensors"))
    with PackedFile(a) as file:
        tensors |= {name: file.tensors[name].to_numpy() for name in file.tensors if ".experts." in name}
        sources = file.index.sources.names
    separate.mkdir()
    for name in sources:
        del tensors[name]
    for name in [name for name in tensors if ".mlp.gate." in name]:
        tensors[name.replace(".mlp.", ".block_sparse_moe.")] = tensors.pop(name)
    save_file(tensors, separate / "model.safetensors")
    (separate / "config.json").write_bytes((model.folder / "config.json").read_bytes())
    convert(separate, separate / "packed.lith", Options())
    _, result = diff_json(capsys, a, separate / "packed.lith")
    assert [entry["name"] for entry in result["sources"]] == sources
    assert all(set(entry) == {"name", "a"} for entry in result["sources"])
    assert {entry["verdict"] for entry in result["tensors"] if ".experts." in entry["name"]} == {"layout"}
    assert result["config"] == []
    text = diff_text(capsys, a, separate / "packed.lith")
    assert "24 tensors differ in nothing but the checkpoint's tensor that they were held in" in text


def test_expert_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = GoldenModel("mixtral").pack(tmp_path), GoldenModel("qwen3_moe").pack(tmp_path)
    _, result = diff_json(capsys, a, b)
    assert {"name": "num_experts", "a": 4, "b": 8} in result["config"]
