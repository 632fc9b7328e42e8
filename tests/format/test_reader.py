"""Reading an open file: tensors, slices, files, and what happens when the file changes underneath."""

import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from golden_tensors import values

from megalith.format.entries import BlobEntry, blob_nbytes
from megalith.format.errors import CorruptionError, FileError, RequestError
from megalith.format.model import blob_specs
from megalith.format.reader import PackedFile
from megalith.format.tensors import rows_per_unit
from megalith.format.verify import page_of

Copied = Callable[[str], Path]


@pytest.mark.parametrize("name", ["minimal", "dense", "half", "metadata", "moe", "fused", "fused-transposed"])
def test_every_tensor_has_its_values(golden: Path, name: str):
    with PackedFile(golden / "valid" / f"{name}.lith") as packed:
        parts = [part for spec in blob_specs(packed.index.config) for part in spec.parts]
        assert len(parts) == len(packed.tensors)
        for number, (part, tensor) in enumerate(zip(parts, packed.tensors.values(), strict=True)):
            expected = values(number, part).reshape(tensor.shape)
            assert np.array_equal(tensor.to_float32(), expected), tensor.name
            assert np.array_equal(tensor.to_numpy().astype(np.float32), expected)


@pytest.mark.parametrize(("name", "dtype"), [("minimal", ml_dtypes.bfloat16), ("half", np.float16)])
def test_dtypes(golden: Path, name: str, dtype: type):
    with PackedFile(golden / "valid" / f"{name}.lith") as packed:
        tensor = packed.tensors["model.embed_tokens.weight"]
        assert tensor.to_numpy().dtype == dtype
        assert tensor.bits().dtype == np.uint16
        assert tensor.shape == (19, 24)


@pytest.mark.parametrize("name", ["dense", "mxfp4", "moe", "fused-mxfp4"])
def test_slices_cover_the_tensor_in_order(golden: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr("megalith.format.tensors._SLICE_BYTES", 1)
    with PackedFile(golden / "valid" / f"{name}.lith") as packed:
        for tensor in packed.tensors.values():
            slices = list(tensor.slices())
            assert np.array_equal(np.concatenate(slices).reshape(tensor.shape), tensor.bits())
            if tensor.blob.layout != "vector":
                assert len(slices) == -(-tensor.shape[0] // rows_per_unit(tensor.entry))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 32), (32, 64), (32, 33), (0, 64), (32, 50)])
def test_rows_of_a_rope_tensor(golden: Path, start: int, stop: int):
    with PackedFile(golden / "valid" / "dense.lith") as packed:
        tensor = packed.tensors["model.layers.0.self_attn.q_proj.weight"]
        assert np.array_equal(tensor.rows(start, stop), tensor.bits()[start:stop])


@pytest.mark.parametrize(
    "projection", ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.v_proj", "self_attn.o_proj"]
)
def test_rows_of_other_tensors(golden: Path, projection: str):
    with PackedFile(golden / "valid" / "dense.lith") as packed:
        tensor = packed.tensors[f"model.layers.0.{projection}.weight"]
        for start in range(0, tensor.shape[0], 16):
            for stop in range(start + 1, tensor.shape[0] + 1, 5):
                assert np.array_equal(tensor.rows(start, stop), tensor.bits()[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(1, 2), (-16, 4), (0, 20), (16, 16), (0, 0)])
def test_rows_out_of_range(golden: Path, start: int, stop: int):
    with PackedFile(golden / "valid" / "minimal.lith") as packed, pytest.raises(RequestError, match="rows"):
        packed.tensors["model.embed_tokens.weight"].rows(start, stop)


def test_quantised_tensor(golden: Path):
    """Decoded values in BF16, and within half a step of the largest magnitude's scale of what was quantised."""
    with PackedFile(golden / "valid" / "mxfp4.lith") as packed:
        parts = [part for spec in blob_specs(packed.index.config) for part in spec.parts]
        for number, (part, tensor) in enumerate(zip(parts, packed.tensors.values(), strict=True)):
            expected = values(number, part).reshape(tensor.shape)
            assert tensor.dtype == "BF16"
            assert tensor.to_numpy().dtype == ml_dtypes.bfloat16
            error = np.abs(tensor.to_float32() - expected)
            assert float(error.max()) == packed.records[number].loss.max_abs_error <= 0.5
            assert (tensor.blob.dtype == "MXFP4") == ("proj" in tensor.name)


def test_codes_of_some_rows(golden: Path):
    with PackedFile(golden / "valid" / "mxfp4.lith") as packed:
        q = packed.tensors["model.layers.0.self_attn.q_proj.weight"]
        whole, some = q.quantised_rows(0, 16), q.quantised_rows(0, 5)
        assert (whole.codes.shape, whole.scales.shape) == ((16, 5, 16), (16, 5))
        assert np.array_equal(some.codes, whole.codes[:5])
        assert np.array_equal(some.scales, whole.scales[:5])
        with pytest.raises(RequestError, match="rows"):
            q.quantised_rows(0, 17)


@pytest.mark.parametrize(
    ("dtype", "columns", "position", "page"),
    [
        ("BF16", 512, 16383, 0),
        ("BF16", 512, 16384, 1),
        ("BF16", 576, 18431, 1),
        ("BF16", 576, 18432, 2),
        ("MXFP4", 2048, 17407, 0),
        ("MXFP4", 2048, 17408, 1),
        ("MXFP4", 2176, 17408, 1),
        ("MXFP4", 2176, 18495, 1),
        ("MXFP4", 2176, 18496, 2),
    ],
)
def test_pages(dtype: str, columns: int, position: int, page: int):
    layout = "mxfp4" if dtype == "MXFP4" else "tile16x512"
    blob = BlobEntry("a", dtype, layout, 32, columns, 0, blob_nbytes(32, columns, dtype))
    assert page_of(blob, position) == page


def test_tensors_are_a_mapping(golden: Path):
    with PackedFile(golden / "valid" / "minimal.lith") as packed:
        assert len(packed.tensors) == 11 == len(list(packed.tensors))
        assert "model.norm.weight" in packed.tensors
        assert 3 not in packed.tensors
        assert packed.tensors["model.norm.weight"].shape == (24,)
        with pytest.raises(KeyError):
            packed.tensors["model.nothing"]


def test_records(golden: Path):
    with PackedFile(golden / "valid" / "dense.lith") as packed:
        assert len(packed.records) == len(packed.tensors)
        assert {len(record.source_digest) for record in packed.records} == {16}
        assert packed.records[0].loss.rounded == 0


def test_missing_file_is_named(golden: Path):
    with PackedFile(golden / "valid" / "dense.lith") as packed:
        with pytest.raises(RequestError, match=r"dense\.lith: holds no vocab\.json"):
            packed.file("vocab.json")
        assert packed.file("tokenizer.json") == b'{"version": "1.0"}\n'


def test_truncated_while_open(copied: Copied):
    """An error of the operating system's kind, and no SIGBUS."""
    path = copied("minimal")
    with PackedFile(path) as packed:
        os.truncate(path, 8192)
        with pytest.raises(FileError, match=r"minimal\.lith: ends at 8192, wanted up to .*truncated") as caught:
            packed.tensors["model.embed_tokens.weight"].to_numpy()
        assert caught.value.exit_code == 5


def test_replaced_while_open(copied: Copied, tmp_path: Path):
    """The open file stays the one that was opened."""
    path = copied("minimal")
    with PackedFile(path) as packed:
        other = tmp_path / "other"
        other.write_bytes(b"something else")
        os.replace(other, path)
        assert packed.tensors["model.embed_tokens.weight"].to_float32()[0, 0] == -1.875
        assert packed.rope[1].shape == (8, 8, 2)


def test_overwritten_while_open(copied: Copied):
    path = copied("minimal")
    with PackedFile(path) as packed:
        with path.open("r+b") as file:
            file.seek(packed.header.section("rope").offset)
            file.write(b"\xff")
        with pytest.raises(CorruptionError, match=r"minimal\.lith: 'rope': chunk 0 at offset 40960") as caught:
            _ = packed.rope
        assert caught.value.exit_code == 1


def test_close_twice(copied: Copied):
    packed = PackedFile(copied("minimal"))
    packed.close()
    packed.close()


def test_nothing_leaks_when_opening_fails(golden: Path):
    before = len(os.listdir("/proc/self/fd"))
    for path in (golden / "invalid").glob("[HIB]*.lith"):
        with pytest.raises(Exception, match=r"\[[HIB]\d+\]"):
            PackedFile(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_missing_and_unreadable(tmp_path: Path):
    with pytest.raises(FileError, match="No such file"):
        PackedFile(tmp_path / "missing.lith")


def test_repr(golden: Path):
    with PackedFile(golden / "valid" / "minimal.lith") as packed:
        assert repr(packed).endswith("minimal.lith', 11 tensors)")
