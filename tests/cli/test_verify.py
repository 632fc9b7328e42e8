"""`verify`: every broken byte is found and named; the checkpoint is compared bit by bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from golden_models import GoldenModel
from safetensors.numpy import load_file, save_file

import megalith
from megalith.cli import run
from megalith.converter.plan import Options
from megalith.format.errors import FileError
from megalith.format.verify import verify_checksums


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_after_the_index_is_found(packed_llama: Path) -> None:
    whole = packed_llama.read_bytes()
    with megalith.open(packed_llama) as packed:
        extents, first = packed.extents, packed.header.section("image").offset
        last = packed.header.section("records").end
        assert not verify_checksums(packed, jobs=2)
    for offset in np.random.default_rng(0).integers(first, last, 60).tolist():
        holder = [extent for extent in extents if extent.offset <= offset < extent.offset + extent.nbytes]
        flip(packed_llama, offset, offset % 8)
        with megalith.open(packed_llama) as packed:
            broken = verify_checksums(packed, jobs=1)
        packed_llama.write_bytes(whole)
        assert [chunk.extent for chunk in broken] == [extent.name for extent in holder]


def test_tensor_and_page_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = GoldenModel("llama2").pack(tmp_path)
    with megalith.open(path) as packed:
        tensor = packed.tensors["model.layers.1.mlp.up_proj.weight"]
        offset = packed.header.section("image").offset + tensor.blob.offset
    flip(path, offset)
    assert run(["verify", str(path)]) == 1
    line = capsys.readouterr().out
    assert "'layers.1.gate_up_proj', pages 0 to " in line
    assert "model.layers.1.mlp.gate_proj.weight, model.layers.1.mlp.up_proj.weight" in line
    assert f"offset {offset}" in line
    assert run(["verify", str(path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert report["broken_chunks"][0]["offset"] == offset


def test_a_changed_checkpoint_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GoldenModel("qwen2")
    path = model.pack(tmp_path)
    source = tmp_path / "source"
    shutil.copytree(model.folder, source)
    assert run(["verify", str(path), "--against", str(source)]) == 0
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    bits = tensors[name].view(np.uint16).copy()
    bits[3, 5] ^= 1
    tensors[name] = bits.view(tensors[name].dtype)
    save_file(tensors, source / "model.safetensors")
    capsys.readouterr()
    assert run(["verify", str(path), "--against", str(source)]) == 1
    assert f"{name}: row 3, column 5 holds" in capsys.readouterr().out
    config = model.config
    (source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert run(["verify", str(path), "--against", str(source)]) == 1
    assert "config.json: contents differ" in capsys.readouterr().out


def test_what_a_conversion_rounded_is_not_called_equal_bit_by_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = GoldenModel("llama3_rope")
    for options, words in ((Options(), "bit by bit"), (Options(linear="mxfp4"), "as it was converted, which rounded ")):
        path = model.pack(tmp_path, options)
        assert run(["verify", str(path), "--against", str(model.folder)]) == 0
        assert f", equal to {model.folder} {words}" in capsys.readouterr().out
    with megalith.open(path) as packed:
        rounded = sum(record.loss.rounded for record in packed.records)
    assert run(["verify", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rounded"] == rounded > 0


def test_a_file_truncated_meanwhile_is_an_error_and_no_sigbus(packed_llama: Path) -> None:
    with megalith.open(packed_llama) as packed:
        assert packed.checksums.size
        with packed_llama.open("r+b") as file:
            file.truncate(8192)
        with pytest.raises(FileError, match="cannot be verified"):
            verify_checksums(packed, jobs=2)
