"""Weights that are not finite or not exact, and heads that contradict: refused unless asked for, counted and recorded."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    EMBEDDING,
    HEAD,
    INVALID,
    NORM,
    USAGE,
    Tensor,
    refused,
    replaced,
    spoiled,
    tiny_config,
    tiny_tensors,
    values,
    write_checkpoint,
)

import megalith
from megalith.cli import run
from megalith.converter import convert as conversion
from megalith.converter.convert import convert
from megalith.converter.plan import Options
from megalith.format.errors import CheckpointError

NONFINITE = [
    *[("BF16", bits) for bits in (0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF)],
    *[("F16", bits) for bits in (0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF)],
    *[("F32", bits) for bits in (0x7F80_0000, 0xFF80_0000, 0x7FC0_0000, 0x7F80_0001, 0xFFFF_FFFF)],
]


@pytest.mark.parametrize(("dtype", "bits"), NONFINITE)
@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.0.mlp.up_proj.weight", NORM])
def test_nonfinite_weights(dtype: str, bits: int, name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=spoiled(name, bits, dtype))
    place = f"model.safetensors: tensor '{name}': 1 values in rows 0 to "
    for options in ((), ("--dtype", "bf16"), ("--dtype", "fp16")):
        refused(folder, INVALID, place, "--allow-nonfinite keeps them", options=options)
    result = convert(folder, tmp_path / "model.lith", Options(allow_nonfinite=True))
    assert result.losses[name].nonfinite == result.total_loss.nonfinite == 1
    with megalith.open(tmp_path / "model.lith") as packed:
        found = packed.tensors[name].bits().reshape(-1)[3]
        narrowed = dtype == "F32" and name != NORM
        if not narrowed:
            assert found == bits
        assert not np.isfinite(packed.tensors[name].to_float32().reshape(-1)[3])


def test_nonfinite_weights_that_are_kept_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=spoiled(EMBEDDING, 0x7F80))
    assert run(["convert", str(folder), str(tmp_path / "model.lith"), "--allow-nonfinite"]) == 0
    assert capsys.readouterr().err == "1 values are NaN or infinite\n"


def test_fp32_that_bf16_cannot_hold_needs_a_choice(tmp_path: Path) -> None:
    one_and_a_bit = struct.unpack("<I", struct.pack("<f", 1 + 2**-20))[0]
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=spoiled(EMBEDDING, one_and_a_bit, "F32"))
    words = f"tensor '{EMBEDDING}': F32 values are not exact in BF16: choose --dtype bf16 or --dtype fp16 to round them"
    refused(folder, USAGE, words)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_rounding_is_counted_and_recorded(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_and_a_bit = struct.unpack("<I", struct.pack("<f", 1 + 2**-20))[0]
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=spoiled(EMBEDDING, one_and_a_bit, "F32"))
    assert run(["convert", str(folder), str(tmp_path / "model.lith"), "--dtype", dtype, "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["options"]["dtype"] == dtype
    loss = {"rounded": 1, "flushed": 0, "nonfinite": 0, "max_abs_error": 2**-20}
    assert manifest["lossy_tensors"] == {EMBEDDING: loss}
    with megalith.open(tmp_path / "model.lith") as packed:
        number = packed.tensors[EMBEDDING].number
        assert packed.records[number].loss.rounded == 1
        assert packed.index.provenance["options"]["dtype"] == dtype


def test_fp32_vectors_stay_exact(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=spoiled(NORM, 0x3F80_0001, "F32"))
    assert convert(folder, tmp_path / "model.lith").total_loss.rounded == 0
    with megalith.open(tmp_path / "model.lith") as packed:
        assert packed.tensors[NORM].dtype == "F32"
        assert packed.tensors[NORM].bits()[3] == 0x3F80_0001


@pytest.mark.parametrize(("bits", "shown"), [(0x4780, "65536"), (0xC780, "65536"), (0x7F7F, "3.38953e+38")])
def test_fp16_overflow_is_refused(bits: int, shown: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=spoiled(EMBEDDING, bits))
    words = f"tensor '{EMBEDDING}': 1 finite values up to {shown} overflow F16"
    refused(folder, INVALID, words, options=("--dtype", "fp16"))
    refused(folder, INVALID, words, options=("--dtype", "fp16", "--allow-nonfinite"))


def test_overflow_beside_kept_infinities_is_still_refused(tmp_path: Path) -> None:
    tensors = spoiled(EMBEDDING, 0x7F80)
    data = bytearray(tensors[EMBEDDING].data)
    data[20:22] = b"\x7f\x7f"
    folder = write_checkpoint(tmp_path / "c", tensors={**tensors, EMBEDDING: tensors[EMBEDDING]._replace(data=bytes(data))})
    with pytest.raises(CheckpointError, match="1 finite values up to"):
        convert(folder, tmp_path / "model.lith", Options("fp16", allow_nonfinite=True))


def test_flush_to_zero_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """BF16 2^-26 has no FP16; 2^-24 is its smallest; 2^-25 lies in the middle and rounds to even, which is zero."""
    patterns = [(127 - 26) << 7, (127 - 24) << 7, (127 - 25) << 7, 0x8000 | (127 - 30) << 7, 0x0001, 0, 0x8000]
    tensors = tiny_tensors(tiny_config())
    data = np.array(patterns, np.uint16).tobytes() + tensors[EMBEDDING].data[14:]
    tensors[EMBEDDING] = tensors[EMBEDDING]._replace(data=data)
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=tensors)
    loss = convert(folder, tmp_path / "a.lith", Options("fp16")).losses[EMBEDDING]
    assert (loss.rounded, loss.flushed, loss.max_abs_error) == (4, 4, 2.0**-25)
    assert run(["convert", str(folder), str(tmp_path / "b.lith"), "--dtype", "fp16"]) == 0
    assert capsys.readouterr().err == "4 values were rounded to fp16, 4 of them to zero; largest error 2.98e-08\n"


def test_mixed_dtypes_in_one_matrix_need_a_choice(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors = replaced(name, Tensor("F16", (8, 16), values((8, 16), "F16", 3)))
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=tensors)
    refused(folder, USAGE, name, "dtypes BF16, F16 cannot share one matrix: choose --dtype bf16 or fp16")
    convert(folder, tmp_path / "model.lith", Options("bf16"))


def tied(head: Tensor | None, dtype: str = "BF16") -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = tiny_config(tie_word_embeddings=True)
    tensors = tiny_tensors(config, dtype)
    return config, tensors if head is None else {**tensors, HEAD: head}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("compare_bytes", [1, 100, 4 << 20])
def test_tied_head(dtype: str, compare_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that repeats the embeddings is left out, another one is a contradiction; compared in slices of any size."""
    monkeypatch.setattr(conversion, "_COMPARE_BYTES", compare_bytes)
    convert(write_checkpoint(tmp_path / "absent", *tied(None, dtype)), tmp_path / "a.lith")
    embedding = tied(None, dtype)[1][EMBEDDING]
    same = convert(write_checkpoint(tmp_path / "same", *tied(embedding, dtype)), tmp_path / "b.lith")
    assert same.plan.mapping.ignored == [HEAD]
    for position in (0, len(embedding.data) // 2, len(embedding.data) - 1):
        data = bytearray(embedding.data)
        data[position] ^= 1
        folder = write_checkpoint(tmp_path / "other", *tied(embedding._replace(data=bytes(data)), dtype))
        refused(folder, INVALID, f"tensor '{HEAD}' differs from '{EMBEDDING}'", "tie_word_embeddings")


@pytest.mark.parametrize(
    "head",
    [
        Tensor("BF16", (12, 15), bytes(360)),
        Tensor("BF16", (192,), bytes(384)),
        Tensor("BF16", (0,), b""),
        Tensor("BF16", (), bytes(2)),
        Tensor("F16", (12, 16), bytes(384)),
        Tensor("U8", (12, 16), bytes(192)),
        Tensor("F64", (12, 16), bytes(1536)),
    ],
)
def test_tied_head_of_another_form(head: Tensor, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", *tied(head))
    refused(folder, INVALID, f"tensor '{HEAD}' differs from '{EMBEDDING}'")
