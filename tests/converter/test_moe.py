"""Mixture of experts and MXFP4 in the converter: every form of experts, quantisation by rule, hostile checkpoints."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import INVALID, UNSUPPORTED, USAGE, refused
from golden_models import MOE_CASES, GoldenModel
from safetensors.numpy import load_file, save_file

import megalith
from megalith.cli import run
from megalith.converter.convert import convert, manifest, sha256_of
from megalith.converter.plan import Options
from megalith.converter.safetensors_header import SourceTensor
from megalith.converter.source import Checkpoint
from megalith.converter.unpack import unpack
from megalith.format.constants import BLOB_ALIGNMENT
from megalith.format.dtypes import Bits
from megalith.format.errors import CheckpointError
from megalith.format.mxfp4 import decode_blocks

Tensors = dict[str, np.ndarray]
LAYER = "model.layers.0."
UNCHANGED: Callable[[Tensors], object] = lambda tensors: None  # noqa: E731
GPT_OSS_BLOCKS = LAYER + "mlp.experts.gate_up_proj_blocks"
GPT_OSS_SCALES = LAYER + "mlp.experts.gate_up_proj_scales"


def altered(case: str, folder: Path, change: Callable[[Tensors], object], **config: Any) -> Path:
    """A copy of a golden model with its tensors changed in place and config keys replaced."""
    model = GoldenModel(case)
    tensors = load_file(model.folder / "model.safetensors")
    change(tensors)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**model.config, **config}))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", MOE_CASES)
def test_experts_are_contiguous_and_aligned(case: str, tmp_path: Path) -> None:
    with megalith.open(GoldenModel(case).pack(tmp_path)) as packed:
        index, config = packed.index.experts, packed.index.config
        assert index is not None
        assert index.layers.tolist() == [i for i, sparse in enumerate(config.sparse_layers) if sparse]
        assert index.table.shape == (len(index.layers), config.num_experts, len(index.matrices), 2)
        for layer, experts in zip(index.layers.tolist(), index.table.astype(np.int64), strict=True):
            for e, matrices in enumerate(experts.tolist()):
                assert matrices[0][0] % BLOB_ALIGNMENT == 0
                for (offset, nbytes), (following, _) in itertools.pairwise(matrices):
                    assert following == -(-(offset + nbytes) // BLOB_ALIGNMENT) * BLOB_ALIGNMENT
                names = [f"layers.{layer}.experts.{e}.{name}" for name in index.matrices]
                blobs = [packed.index.blob(packed.index.blobs.names.index(name)) for name in names]
                assert [[blob.offset, blob.nbytes] for blob in blobs] == matrices


def test_pieces_of_a_fused_tensor_are_its_experts(tmp_path: Path) -> None:
    source = load_file(GoldenModel("gpt_oss_bf16").folder / "model.safetensors")
    with megalith.open(GoldenModel("gpt_oss_bf16").pack(tmp_path)) as packed:
        fused = source[LAYER + "mlp.experts.gate_up_proj"]  # [experts, hidden, 2 * intermediate], gate and up alternate
        for expert in range(len(fused)):
            for slot, role in enumerate(("gate_proj", "up_proj")):
                piece = packed.tensors[f"{LAYER}mlp.experts.{expert}.{role}.weight"].to_numpy()
                assert piece.tobytes() == np.ascontiguousarray(fused[expert, :, slot::2].T).tobytes()
        whole = packed.tensors.source(LAYER + "mlp.experts.gate_up_proj")
        assert whole.to_numpy().tobytes() == fused.tobytes()
        assert whole.shape == fused.shape


def test_native_mxfp4_is_kept(tmp_path: Path) -> None:
    source = load_file(GoldenModel("gpt_oss_mxfp4").folder / "model.safetensors")
    blocks, scales = source[GPT_OSS_BLOCKS], source[GPT_OSS_SCALES]
    with megalith.open(GoldenModel("gpt_oss_mxfp4").pack(tmp_path)) as packed:
        tensor = packed.tensors[LAYER + "mlp.experts.1.up_proj.weight"]
        assert tensor.blob.dtype == tensor.entry.source_dtype == "MXFP4"
        expected = decode_blocks(blocks[1, 1::2], scales[1, 1::2])
        np.testing.assert_array_equal(tensor.to_float32(), expected)
        assert not any(record.loss.rounded for record in packed.records)


QUANTISED = [
    ("mixtral", Options(experts="mxfp4")),
    ("qwen3_moe", Options(experts="mxfp4", linear="mxfp4", scale="search")),
    ("gpt_oss_bf16", Options(experts="mxfp4")),
    ("qwen3", Options(linear="mxfp4")),
    ("llama_fp16", Options(linear="mxfp4", scale="search")),
    ("mistral_window", Options(dtype="fp16", linear="mxfp4")),
]


@pytest.mark.parametrize(("case", "options"), QUANTISED, ids=[case for case, _ in QUANTISED])
def test_what_is_quantised_is_decided_by_rule(case: str, options: Options, tmp_path: Path) -> None:
    with megalith.open(GoldenModel(case).pack(tmp_path, options)) as packed:
        index = packed.index
        for i, name in enumerate(index.blobs.names):
            is_linear = name.endswith("_proj")
            wanted = options.experts if ".experts." in name else options.linear
            assert (index.blob(i).dtype == "MXFP4") == (is_linear and wanted == "mxfp4"), name
        assert index.provenance["options"] == options.to_dict()
        for tensor, record in zip(packed.tensors.values(), packed.records, strict=True):
            if tensor.blob.dtype == "MXFP4" and case != "gpt_oss_bf16":  # whose experts MXFP4 holds exactly
                assert record.loss.sqnr_db is not None
                assert 14.0 < record.loss.sqnr_db < 30.0


def test_experts_that_were_mxfp4_once_are_quantised_without_loss(tmp_path: Path) -> None:
    wide = GoldenModel("gpt_oss_bf16").pack(tmp_path, Options(experts="mxfp4"))
    with megalith.open(GoldenModel("gpt_oss_mxfp4").pack(tmp_path)) as native, megalith.open(wide) as quantised:
        assert not any(record.loss.rounded for record in quantised.records)
        for name, tensor in native.tensors.items():
            np.testing.assert_array_equal(tensor.to_float32(), quantised.tensors[name].to_float32())


@pytest.mark.parametrize(("case", "options"), QUANTISED, ids=[case for case, _ in QUANTISED])
def test_quantising_what_was_unpacked_gives_the_same_codes(case: str, options: Options, tmp_path: Path) -> None:
    first = GoldenModel(case).pack(tmp_path, options)
    with megalith.open(first) as packed:
        assert unpack(packed, tmp_path / "back").converted
    convert(tmp_path / "back", tmp_path / "again.lith", options)
    with megalith.open(first) as a, megalith.open(tmp_path / "again.lith") as b:
        for name, tensor in a.tensors.items():
            if tensor.blob.dtype == "MXFP4":
                one, two = (t.quantised_rows(0, t.entry.rows) for t in (tensor, b.tensors[name]))
                np.testing.assert_array_equal(one.codes, two.codes)
                np.testing.assert_array_equal(one.scales, two.scales)
                assert b.records[tensor.number].loss.rounded == 0


def test_the_manifest_gives_the_signal_to_noise_ratio(tmp_path: Path) -> None:
    source = load_file(GoldenModel("mixtral").folder / "model.safetensors")
    result = convert(GoldenModel("mixtral").folder, tmp_path / "model.lith", Options(experts="mxfp4"))
    name = LAYER + "block_sparse_moe.experts.2.w2.weight"
    entry = manifest(result, tmp_path / "model.lith")["lossy_tensors"][name]
    with megalith.open(tmp_path / "model.lith") as packed:
        decoded = packed.tensors[name].to_float32().astype(np.float64)
    exact = source[name].astype(np.float64)
    assert entry["sqnr_db"] == pytest.approx(10 * np.log10((exact**2).sum() / ((exact - decoded) ** 2).sum()))
    assert entry["rounded"] == np.count_nonzero(exact != decoded)
    assert entry["flushed"] == np.count_nonzero((decoded == 0) & (exact != 0))
    assert entry["max_abs_error"] == np.abs(exact - decoded).max()


def test_same_bytes_for_any_threads(tmp_path: Path) -> None:
    digests = set()
    for jobs in (1, 2, 5):
        convert(GoldenModel("qwen3_moe").folder, tmp_path / "m.lith", Options(experts="mxfp4"), jobs=jobs, force=True)
        digests.add(sha256_of(tmp_path / "m.lith"))
    assert len(digests) == 1


@pytest.mark.parametrize("case", MOE_CASES)
def test_every_byte_of_the_checkpoint_is_read_once(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up share rows, or a transposed matrix: read for both, and held once."""
    read, read_elements = [], Checkpoint.read_elements

    def counted(checkpoint: Checkpoint, tensor: SourceTensor, start: int, target: Bits) -> None:
        read.append((tensor.name, target.nbytes))
        read_elements(checkpoint, tensor, start, target)

    monkeypatch.setattr(Checkpoint, "read_elements", counted)
    GoldenModel(case).pack(tmp_path)
    with Checkpoint(GoldenModel(case).folder) as checkpoint:
        for name, tensor in checkpoint.tensors.items():
            assert sum(nbytes for found, nbytes in read if found == name) == tensor.nbytes


def test_verify_against_sees_a_changed_code_and_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = GoldenModel("gpt_oss_mxfp4").pack(tmp_path)

    def change(name: str, at: tuple[int, ...]) -> Callable[[Tensors], None]:
        def apply(tensors: Tensors) -> None:
            tensors[name] = tensors[name].copy()
            tensors[name][at] ^= 1

        return apply

    for i, (name, at) in enumerate([(GPT_OSS_BLOCKS, (3, 9, 1, 5)), (GPT_OSS_SCALES, (2, 8, 0))]):
        folder = altered("gpt_oss_mxfp4", tmp_path / str(i), change(name, at))
        assert run(["verify", str(path), "--against", str(folder)]) == 1
        role = ("gate_proj", "up_proj")[at[1] % 2]
        assert f"experts.{at[0]}.{role}.weight: row {at[1] // 2}" in capsys.readouterr().out


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, shape: tuple[int, ...], dtype: str = "uint8") -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: np.zeros(shape, dtype)})


W1 = "block_sparse_moe.experts.{}.w1.weight"


@pytest.mark.parametrize(
    ("case", "change", "config", "code", "words"),
    [
        ("mixtral", drop(LAYER + W1.format(3)), {}, INVALID, ["experts.3.w1.weight' is missing"]),
        ("mixtral", put(LAYER + W1.format(4), (104, 72), "float16"), {}, INVALID, ["no rule", "experts.4.w1.weight"]),
        ("mixtral", put(LAYER + W1.format(0), (104, 73), "float16"), {}, INVALID, ["shape [104, 73]", "[104, 72]"]),
        ("mixtral", put(LAYER + "block_sparse_moe.gate.weight", (5, 72), "float16"), {}, INVALID, ["gate.weight", "[5, 72]"]),
        ("mixtral", put(LAYER + "mlp.gate.weight", (4, 72), "float16"), {}, INVALID, ["no rule", "mlp.gate.weight"]),
        ("mixtral", UNCHANGED, {"num_experts_per_tok": 5}, INVALID, ["num_experts_per_tok is 5"]),
        ("mixtral", UNCHANGED, {"num_local_experts": 0}, INVALID, ["num_experts is 0"]),
        ("mixtral", UNCHANGED, {"num_local_experts": 10**6}, INVALID, ["num_experts is 1000000"]),
        ("mixtral", UNCHANGED, {"num_experts": 3}, INVALID, ["num_local_experts is 4, num_experts is 3"]),
        ("mixtral_fused", put(LAYER + "mlp.experts.down_proj", (3, 72, 104), "float16"), {}, INVALID, ["[3, 72, 104]"]),
        ("mixtral_fused", drop(LAYER + "mlp.experts.gate_up_proj"), {}, INVALID, ["is missing"]),
        ("mixtral_fused", put(LAYER + "mlp.experts.down_proj", (5, 72, 104), "float16"), {}, INVALID, ["[5, 72, 104]"]),
        ("mixtral_fused", put(LAYER + "mlp.gate.weight", (4, 71), "float16"), {}, INVALID, ["gate.weight", "[4, 71]"]),
        ("olmoe", drop(LAYER + "mlp.experts.7.up_proj.weight"), {}, INVALID, ["experts.7.up_proj.weight' is missing"]),
        ("qwen3_moe", put("model.layers.0.mlp.gate.weight", (8, 72), "float16"), {}, INVALID, ["no rule", "mlp.gate.weight"]),
        ("qwen3_moe", UNCHANGED, {"mlp_only_layers": "none"}, INVALID, ["mlp_only_layers"]),
        ("qwen3_moe", UNCHANGED, {"decoder_sparse_step": 0}, INVALID, ["decoder_sparse_step is 0"]),
        ("qwen3_moe", UNCHANGED, {"norm_topk_prob": "yes"}, INVALID, ["norm_topk_prob"]),
        ("olmoe_clip", UNCHANGED, {"clip_qkv": -1}, INVALID, ["clip_qkv"]),
        ("gpt_oss_mxfp4", put(GPT_OSS_SCALES, (6, 192, 4)), {}, INVALID, ["gate_up_proj_scales", "[6, 192, 4]", "[6, 192, 3]"]),
        ("gpt_oss_mxfp4", put(GPT_OSS_BLOCKS, (6, 192, 3, 15)), {}, INVALID, ["gate_up_proj_blocks", "[6, 192, 3, 15]"]),
        ("gpt_oss_mxfp4", put(GPT_OSS_BLOCKS, (6, 192, 3, 16), "int8"), {}, UNSUPPORTED, ["gate_up_proj_blocks", "I8", "U8"]),
        ("gpt_oss_mxfp4", put(GPT_OSS_BLOCKS, (7, 192, 3, 16)), {}, INVALID, ["gate_up_proj_blocks", "[7, 192, 3, 16]"]),
        ("gpt_oss_mxfp4", put(LAYER + "mlp.router.weight", (7, 96), "float16"), {}, INVALID, ["router.weight", "[7, 96]"]),
        ("gpt_oss_mxfp4", put(LAYER + "mlp.router.bias", (5,), "float16"), {}, INVALID, ["router.bias", "[5]"]),
        ("gpt_oss_mxfp4", put(LAYER + "mlp.experts.gate_up_proj", (6, 96, 192), "float16"), {}, INVALID, ["gate_up_proj"]),
        ("gpt_oss_bf16", put(LAYER + "mlp.experts.gate_up_proj", (6, 192, 96), "float16"), {}, INVALID, ["[6, 192, 96]"]),
        ("gpt_oss_mxfp4", drop(GPT_OSS_SCALES), {}, INVALID, ["gate_up_proj_scales' is missing"]),
        ("gpt_oss_mxfp4", drop(LAYER + "self_attn.sinks"), {}, INVALID, ["sinks' is missing"]),
        ("gpt_oss_mxfp4", UNCHANGED, {"swiglu_limit": 0}, INVALID, ["swiglu_limit"]),
        ("gpt_oss_mxfp4", UNCHANGED, {"quantization_config": {"quant_method": "fp8"}}, UNSUPPORTED, ["fp8"]),
        ("mixtral", UNCHANGED, {"quantization_config": {"quant_method": "mxfp4"}}, UNSUPPORTED, ["mxfp4"]),
    ],
)  # fmt: skip
def test_broken_checkpoints_are_refused(
    case: str, change: Callable[[Tensors], object], config: dict[str, Any], code: int, words: list[str], tmp_path: Path
) -> None:
    refused(altered(case, tmp_path / "source", change, **config), code, *words)


def test_a_nan_scale_is_refused_unless_allowed(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[GPT_OSS_SCALES] = tensors[GPT_OSS_SCALES].copy()
        tensors[GPT_OSS_SCALES][4, 7, 2] = 0xFF

    folder = altered("gpt_oss_mxfp4", tmp_path / "source", spoil)
    words = ["gate_up_proj_scales", "1 scales of", "experts.4.up_proj.weight", "0xFF"]
    refused(folder, INVALID, *words)
    result = convert(folder, tmp_path / "m.lith", Options(allow_nonfinite=True))
    assert result.total_loss.nonfinite == 32
    with megalith.open(tmp_path / "m.lith") as packed:
        unpack(packed, tmp_path / "back")
        values = packed.tensors[LAYER + "mlp.experts.4.up_proj.weight"].to_float32()
    assert np.isnan(values[3, 64:96]).all()
    assert np.isfinite(np.delete(values, np.s_[64:96], axis=1)).all()
    back, source = (load_file(path / "model.safetensors") for path in (tmp_path / "back", folder))
    assert back[GPT_OSS_SCALES].tobytes() == source[GPT_OSS_SCALES].tobytes()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_values_that_are_not_finite_cannot_be_quantised(value: float, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        name = LAYER + W1.format(1)
        tensors[name] = tensors[name].copy()
        tensors[name][5, 6] = value

    folder = altered("mixtral", tmp_path / "source", spoil)
    with pytest.raises(CheckpointError, match="MXFP4 cannot hold them"):
        convert(folder, tmp_path / "m.lith", Options(experts="mxfp4", allow_nonfinite=True))


def test_a_dense_model_has_no_experts_to_quantise(tmp_path: Path) -> None:
    folder = altered("llama2", tmp_path / "source", UNCHANGED)
    refused(folder, USAGE, "the model has no experts", options=("--experts", "mxfp4"))
