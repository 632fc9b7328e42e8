"""Golden files: valid ones open and hold these literal values, invalid ones break the rule of their name."""

import hashlib
import re
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zstandard
from golden_tensors import native_rows, values
from make_format_golden import GOLDEN, KEPT, golden_files
from packed_parts import assemble, read_everything, take_apart
from spec_tables import table

from megalith.format.errors import MegalithError, UnsupportedError
from megalith.format.model import blob_specs
from megalith.format.reader import PackedFile

VALID = sorted((GOLDEN / "valid").glob("*.lith"))
INVALID = sorted((GOLDEN / "invalid").glob("*.lith"))
PLACES = r"header|section '\w+'|'[\w.]+': chunk \d+ at offset \d+"


def name_of(path: Path) -> str:
    return path.stem


def test_tool_reproduces_the_files():
    made = golden_files()
    assert sorted([*made, *KEPT]) == sorted(str(path.relative_to(GOLDEN)) for path in GOLDEN.rglob("*.lith"))
    for name, data in made.items():
        assert (GOLDEN / name).read_bytes() == data, name


@pytest.mark.parametrize("path", VALID, ids=name_of)
def test_valid_file_reads(path: Path):
    read_everything(path)
    assert assemble(take_apart(path.read_bytes())) == path.read_bytes()


@pytest.mark.parametrize("path", INVALID, ids=name_of)
def test_invalid_file_is_refused(path: Path):
    with pytest.raises(MegalithError) as caught:
        read_everything(path)
    rule = path.stem.split("-")[0]
    exit_codes = {row["Rule"]: int(row["Exit"]) for row in table("Rules")}
    assert caught.value.rule == rule
    assert caught.value.exit_code == exit_codes[rule]
    assert re.search(rf"{re.escape(path.name)}: .*({PLACES}).*\[{rule}\]$", str(caught.value))


def test_kept_files_never_change():
    digests = {name: hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest()[:16] for name in KEPT}
    assert digests == {"invalid/H3-version-0.1.lith": "27b10e57c20de261"}
    with pytest.raises(UnsupportedError, match=r"format 0\.1 predates 0\.2: convert the checkpoint again \[H3\]"):
        PackedFile(GOLDEN / "invalid" / "H3-version-0.1.lith")


def test_every_rule_has_a_file():
    assert {path.stem.split("-")[0] for path in INVALID} == {row["Rule"] for row in table("Rules")}


def test_minimal_bytes(golden: Path):
    data = (golden / "valid" / "minimal.lith").read_bytes()
    assert data[:40].hex(" ") == (
        "89 4c 49 54 48 0d 0a 1a 00 00 02 00 00 10 00 00 01 00 00 00 00 00 00 00 00 d0 00 00 00 00 00 00 "
        "06 00 00 00 00 00 00 00"
    )
    # embed_tokens: row 0 has 24 columns and 8 of padding, row 1 follows
    assert data[8192:8208].hex(" ") == "f0 bf e0 3e 88 bf a0 3f 80 be e0 bf 10 3f 70 bf"
    assert data[8192 + 40 : 8192 + 72].hex(" ") == "b0 bf 70 3f 10 bf e0 3f" + " 00" * 16 + " 80 3e a0 bf 88 3f e0 be"


def test_minimal_values(golden: Path):
    with PackedFile(golden / "valid" / "minimal.lith") as packed:
        assert list(packed.tensors)[:3] == [
            "model.embed_tokens.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.self_attn.q_proj.weight",
        ]
        assert packed.tensors["model.embed_tokens.weight"].shape == (19, 24)
        embedding = packed.tensors["model.embed_tokens.weight"].to_float32()
        assert embedding[0, :4].tolist() == [-1.875, 0.4375, -1.0625, 1.25]
        assert embedding[18, 22:].tolist() == [-0.4375, 1.875]
        assert packed.rope[0].tolist() == pytest.approx([10000 ** (-i / 8) for i in range(8)], rel=1e-7)
        assert packed.rope[1][0].tolist() == [[1.0, 0.0]] * 8
        assert packed.header.metadata == {}
        assert packed.index.experts is None


def test_dense_pairs_and_biases(golden: Path):
    """q, k and v of two heads of 32, rows i and i + 16 of a head paired 8 rows apart; gate and up interleaved."""
    with PackedFile(golden / "valid" / "dense.lith") as packed:
        q = packed.tensors["model.layers.0.self_attn.q_proj.weight"]
        assert (q.shape, q.entry.row_map.order, q.entry.row_map.param) == ((64, 40), "rope", 32)
        start = packed.header.section("image").offset + q.blob.offset
        logical = q.to_float32()
        for stored, row in ((0, 0), (7, 7), (8, 16), (15, 23), (16, 8), (24, 24), (32, 32), (40, 48)):
            at = start + ((stored // 16 * 2) * 16 + stored % 16) * 64  # 40 columns take 2 steps
            raw = np.frombuffer(packed.read(at, 8), "<u2")
            assert raw.tolist() == q.bits()[row, :4].tolist()
            assert logical[row, 0] == ((row * 40 * 37 + 22) % 61 - 30) / 16
        bias = packed.tensors["model.layers.0.self_attn.q_proj.bias"]
        stored_bias = np.frombuffer(packed.read_image(bias.blob.offset, 256), "<u2")
        assert stored_bias[8:16].tolist() == bias.bits()[16:24].tolist()
        up = packed.tensors["model.layers.0.mlp.up_proj.weight"]
        assert (up.entry.row_map.order, up.entry.row_map.param, up.blob.rows) == ("pair8", 1, 32)
        assert packed.file("config.json") == b'{"model_type": "llama"}\n'
        assert packed.file_names() == ["config.json", "tokenizer.json"]


def test_half_has_float32_vectors(golden: Path):
    with PackedFile(golden / "valid" / "half.lith") as packed:
        norm = packed.tensors["model.norm.weight"]
        assert (norm.dtype, norm.shape, norm.to_numpy().dtype) == ("F32", (24,), np.dtype(np.float32))
        head = packed.tensors["lm_head.weight"]
        assert (head.dtype, head.shape, head.to_numpy().dtype) == ("F16", (19, 24), np.dtype(np.float16))
        assert head.to_numpy()[0, :3].tolist() == [1.875, 0.375, -1.125]
        assert packed.index.config.layer_windows == [4]
        assert packed.index.rope.attention_factor == 1.25
        assert packed.rope[1][0].tolist() == [[1.25, 0.0]] * 5


def test_metadata(golden: Path):
    with PackedFile(golden / "valid" / "metadata.lith") as packed:
        assert packed.header.metadata == {
            "author": "golden", "licence": "Apache-2.0", "rating": 4.5, "reviewed": True, "revision": 7,
        }  # fmt: skip
        assert (packed.index.rope.type, packed.index.rope_positions) == ("dynamic", 4)


def test_experts(golden: Path):
    with PackedFile(golden / "valid" / "moe.lith") as packed:
        index = packed.index.experts
        assert index is not None
        assert index.layers.tolist() == [0, 2]
        assert index.matrices == ("gate_up_proj", "gate_up_bias", "down_proj", "down_bias")
        assert index.table.shape == (2, 4, 4, 2)
        names = packed.index.blobs.names
        down = packed.index.blob(names.index("layers.2.experts.3.down_proj"))
        assert index.table[1, 3, 2].tolist() == [down.offset, down.nbytes]
        starts, ends = index.table[..., 0, 0], index.table[..., -1, :].sum(axis=-1)
        assert (starts % 4096 == 0).all()
        assert ((ends + 4095) // 4096 * 4096)[:, :-1].tolist() == starts[:, 1:].tolist()  # one copy fetches an expert
        assert packed.header.features == {"tiles", "experts"}
        assert packed.tensors["model.layers.0.self_attn.q_norm.weight"].shape == (32,)
        assert packed.tensors["model.layers.1.mlp.up_proj.weight"].shape == (20, 24)
        assert packed.tensors["model.layers.2.mlp.experts.3.up_proj.bias"].shape == (9,)


def test_mxfp4_bytes(golden: Path):
    """Row 0 of q_proj begins -0.5, 1.8125; its largest magnitude, below 2, makes a scale of 2^(0 - 2)."""
    with PackedFile(golden / "valid" / "mxfp4.lith") as packed:
        q = packed.tensors["model.layers.0.self_attn.q_proj.weight"]
        assert (q.blob.layout, q.blob.rows, q.blob.columns, q.blob.nbytes) == ("mxfp4", 48, 256, 3 * 2 * 1088)
        expected = values(2, blob_specs(packed.index.config)[2].parts[0])
        assert expected[0, :4].tolist() == [-0.5, 1.8125, 0.3125, -1.1875]
        step = packed.read_image(q.blob.offset, 1088)
        # divided by 0.25: -2, 7.25, 1.25, -4.75: codes c, 7, 2 (of two equally near the even one), e
        assert (step[:2].hex(" "), step[1024]) == ("7c e2", 125)
        assert packed.records[2].loss.max_abs_error == 0.375  # -1.875 and 1.875 become -1.5 and 1.5
        assert packed.header.features == {"tiles", "mxfp4"}


def test_fused_sources(golden: Path):
    with PackedFile(golden / "valid" / "fused-transposed.lith") as packed:
        names = [tensor.name for tensor in packed.tensors.checkpoint()]
        assert names[-4:] == [f"model.layers.0.mlp.experts.{name}" for name in (
            "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")]  # fmt: skip
        fused = packed.tensors.source("model.layers.0.mlp.experts.gate_up_proj")
        assert (fused.shape, fused.dtype) == ((2, 64, 64), "BF16")
        for e in range(2):
            for p, projection in enumerate(("gate", "up")):
                alone = packed.tensors[f"model.layers.0.mlp.experts.{e}.{projection}_proj.weight"].to_numpy()
                assert np.array_equal(fused.to_numpy()[e, :, p::2].T, alone)


def test_native_mxfp4(golden: Path):
    with PackedFile(golden / "valid" / "fused-mxfp4.lith") as packed:
        blocks = packed.tensors.source("model.layers.0.mlp.experts.gate_up_proj_blocks")
        scales = packed.tensors.source("model.layers.0.mlp.experts.gate_up_proj_scales")
        assert (blocks.shape, scales.shape, blocks.dtype) == ((2, 64, 2, 16), (2, 64, 2), "U8")
        up = packed.tensors["model.layers.0.mlp.experts.1.up_proj.weight"]
        rows = native_rows(up.number, blob_specs(packed.index.config)[up.entry.blob].parts[1])
        assert np.array_equal(blocks.to_numpy()[1, 1::2], rows.codes)
        assert np.array_equal(scales.to_numpy()[1, 1::2], rows.scales)
        assert packed.header.features == {"tiles", "experts", "mxfp4"}


class SecondReader:
    """Elements of a file from the text of the specification, without this library."""

    def __init__(self, data: bytes) -> None:
        sections = [struct.unpack_from("<IIQQQ", data, 40 + 32 * i) for i in range(6)]
        (_, _, index_at, index_bytes, _), (_, _, self.image_at, _, _) = sections[:2]
        self.index = msgpack.unpackb(zstandard.decompress(data[index_at : index_at + index_bytes]))
        self.data = data
        self.names = self.index["tensors"]["names"].split("\n")
        self.tensors = [table_row(self.index["tensors"], i) for i in range(len(self.names))]

    def element(self, tensor: dict[str, int], r: int, c: int) -> int | tuple[int, int]:
        """A bit pattern, or an MXFP4 code and its scale."""
        blob = table_row(self.index["blobs"], tensor["blob"])
        stored, d = tensor["row_base"] + r, tensor["row_param"]
        if tensor["row_order"] == 1:
            stored = tensor["row_base"] + 16 * (r // 8) + 8 * d + r % 8
        elif tensor["row_order"] == 2:
            i = r % d
            stored = tensor["row_base"] + d * (r // d) + 16 * (i % (d // 2) // 8) + 8 * (i // (d // 2)) + i % 8
        start = self.image_at + blob["offset"]
        if blob["layout"] == 3:
            step = start + ((stored // 16) * (blob["columns"] // 128) + c // 128) * 1088
            byte = self.data[step + stored % 16 * 64 + c % 128 // 2]
            return byte >> 4 * (c % 2) & 15, self.data[step + 1024 + stored % 16 * 4 + c % 128 // 32]
        at = stored
        if blob["layout"] == 2:
            at = (((stored // 16) * (blob["columns"] // 32) + c // 32) * 16 + stored % 16) * 32 + c % 32
        width = {1: 2, 2: 2, 3: 4}[blob["dtype"]]
        return int.from_bytes(self.data[start + width * at :][:width], "little")

    def rows(self, name: str) -> list[list[int | tuple[int, int]]]:
        tensor = self.tensors[self.names.index(name)]
        return [[self.element(tensor, r, c) for c in range(tensor["columns"])] for r in range(tensor["rows"])]

    def sources(self) -> dict[str, tuple[list[int], list[int]]]:
        """Dimensions and elements of every source, each of which must be there once."""
        names = self.index["sources"]["names"].split("\n") if self.index["sources"]["names"] else []
        entries = [table_row(self.index["sources"], i) for i in range(len(names))]
        shapes = [[entry[f"dim{d}"] for d in range(entry["ndim"])] for entry in entries]
        found: list[dict[int, int]] = [{} for _ in names]
        for tensor, name in zip(self.tensors, self.names, strict=True):
            if tensor["source"] == 0xFFFF_FFFF:
                continue
            for r, row in enumerate(self.rows(name)):
                for c, value in enumerate(row):
                    at = tensor["start"] + r * tensor["row_stride"]
                    if isinstance(value, tuple) and tensor["source_dtype"] == 4:
                        byte = at + c // 2
                        found[tensor["source"]][byte] = found[tensor["source"]].get(byte, 0) | value[0] << 4 * (c % 2)
                        found[tensor["scales"]][byte // 16] = value[1]
                    else:
                        assert not isinstance(value, tuple)
                        at += c * tensor["column_stride"]
                        assert at not in found[tensor["source"]]
                        found[tensor["source"]][at] = value
        for elements, shape in zip(found, shapes, strict=True):
            assert sorted(elements) == list(range(int(np.prod(shape))))
        flat = [[elements[i] for i in range(len(elements))] for elements in found]
        return dict(zip(names, zip(shapes, flat, strict=True), strict=True))


def decoded(value: int | tuple[int, int]) -> float:
    """An element in MXFP4."""
    assert isinstance(value, tuple)
    code, scale = value
    return (-1.0) ** (code >> 3) * (0, 0.5, 1, 1.5, 2, 3, 4, 6)[code & 7] * 2.0 ** (scale - 127)


def table_row(table: dict[str, Any], number: int) -> dict[str, int]:
    count = table["names"].count("\n") + 1
    columns = {name: (column, len(column) // count) for name, column in table.items() if name != "names"}
    return {name: int.from_bytes(c[number * w : number * w + w], "little") for name, (c, w) in columns.items()}


@pytest.mark.parametrize("path", VALID, ids=name_of)
def test_second_reader_agrees(path: Path):
    reader = SecondReader(path.read_bytes())
    with PackedFile(path) as packed:
        for tensor in packed.tensors.values():
            found = reader.rows(tensor.name)
            if tensor.blob.dtype == "MXFP4":
                assert [[decoded(x) for x in row] for row in found] == tensor.to_float32().tolist()
            else:
                assert found == tensor.bits().reshape(tensor.entry.rows, -1).tolist()
        sources = reader.sources()
        assert list(sources) == packed.index.sources.names
        for name, (shape, elements) in sources.items():
            source = packed.tensors.source(name)
            assert list(source.shape) == shape
            assert np.concatenate(list(source.pieces())).tolist() == elements
