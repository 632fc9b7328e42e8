"""Checkpoint tensors that several tensors share: given back as they were, and hostile places refused (rules O1 to O5)."""

import itertools
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_tensors import GPT_OSS_BF16, GPT_OSS_MXFP4, RESAVED, Fused, native_rows, values
from hypothesis import given, settings
from hypothesis import strategies as st
from make_format_golden import FUSED, GPT_OSS, build
from packed_parts import COLUMN_TYPES, Parts, assemble, read_everything, take_apart, with_cells

from megalith.format.dtypes import narrow
from megalith.format.entries import NO_SOURCE, SOURCE_COLUMNS, TENSOR_COLUMNS
from megalith.format.errors import FormatError
from megalith.format.index_checks import check_sources
from megalith.format.model import ModelConfig, PartSpec, blob_specs
from megalith.format.reader import PackedFile
from megalith.format.table import Table, build_table

EXPERTS = "model.layers.0.mlp.experts."
LARGER = replace(GPT_OSS, hidden_size=96, moe_intermediate_size=64, num_experts=3)
SIDE_BY_SIDE = (Fused(f"{EXPERTS}gate_up_proj", ("gate_proj.weight", "up_proj.weight"), transposed=True),)


def part_values(config: ModelConfig) -> dict[str, tuple[int, PartSpec]]:
    """Number in the tensor table and spec of every part by its role within layer 0's experts."""
    parts = [part for spec in blob_specs(config) for part in spec.parts]
    prefix = "layers.0.experts."
    return {p.role.removeprefix(prefix): (i, p) for i, p in enumerate(parts) if p.role.startswith(prefix)}


def stacked(config: ModelConfig, *roles: str, interleaved: bool = False) -> np.ndarray:
    """float32 [experts, rows of all roles, columns]: what a checkpoint that fuses them holds, not transposed."""
    numbers = part_values(config)
    experts = []
    for e in range(config.num_experts):
        found = [values(*numbers[f"{e}.{role}"]) for role in roles]
        experts.append(np.stack(found, axis=1).reshape(-1, found[0].shape[1]) if interleaved else np.concatenate(found))
    return np.stack(experts)


def written(tmp_path: Path, parts: Parts) -> Path:
    path = tmp_path / "fused.lith"
    path.write_bytes(assemble(parts))
    read_everything(path)
    return path


@pytest.fixture(params=[4 << 20, 1], ids=["whole", "sliced"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes read at once: everything, or as little as possible."""
    monkeypatch.setattr("megalith.format.tensors._SLICE_BYTES", request.param)
    return int(request.param)


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("config", [FUSED, replace(FUSED, num_experts=3, hidden_size=7, moe_intermediate_size=33)])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_one_after_the_other(tmp_path: Path, config: ModelConfig, dtype: str):
    path = written(tmp_path, build(config, dtypes=(dtype, dtype), fused=RESAVED))
    with PackedFile(path) as packed:
        gate_up = packed.tensors.source(f"{EXPERTS}gate_up_proj")
        assert gate_up.shape == (config.num_experts, 2 * config.moe_intermediate_size, config.hidden_size)
        assert np.array_equal(gate_up.to_numpy().astype(np.float32), stacked(config, "gate_proj.weight", "up_proj.weight"))
        down = packed.tensors.source(f"{EXPERTS}down_proj")
        assert np.array_equal(down.to_numpy().astype(np.float32), stacked(config, "down_proj.weight"))


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("config", [GPT_OSS, LARGER])
def test_transposed_and_alternating(tmp_path: Path, config: ModelConfig):
    path = written(tmp_path, build(config, fused=GPT_OSS_BF16))
    with PackedFile(path) as packed:
        found = {name: packed.tensors.source(EXPERTS + name).to_numpy().astype(np.float32) for name in (
            "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")}  # fmt: skip
    gate_up = stacked(config, "gate_proj.weight", "up_proj.weight", interleaved=True)
    assert np.array_equal(found["gate_up_proj"], gate_up.transpose(0, 2, 1))
    assert np.array_equal(found["down_proj"], stacked(config, "down_proj.weight").transpose(0, 2, 1))
    biases = stacked(config, "gate_proj.bias", "up_proj.bias", interleaved=True)
    assert np.array_equal(found["gate_up_proj_bias"], biases[..., 0])
    assert np.array_equal(found["down_proj_bias"], stacked(config, "down_proj.bias")[..., 0])


@pytest.mark.usefixtures("slices")
def test_transposed_side_by_side(tmp_path: Path):
    path = written(tmp_path, build(FUSED, fused=SIDE_BY_SIDE))
    with PackedFile(path) as packed:
        found = packed.tensors.source(f"{EXPERTS}gate_up_proj").to_numpy().astype(np.float32)
    assert np.array_equal(found, stacked(FUSED, "gate_proj.weight", "up_proj.weight").transpose(0, 2, 1))


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("config", [GPT_OSS, LARGER])
def test_codes_and_scales(tmp_path: Path, config: ModelConfig):
    path = written(tmp_path, build(config, quantised="experts", fused=GPT_OSS_MXFP4))
    numbers = part_values(config)
    with PackedFile(path) as packed:
        blocks = packed.tensors.source(f"{EXPERTS}gate_up_proj_blocks").to_numpy()
        scales = packed.tensors.source(f"{EXPERTS}gate_up_proj_scales").to_numpy()
        down = packed.tensors.source(f"{EXPERTS}down_proj_blocks").to_numpy()
        for e in range(config.num_experts):
            for p, name in enumerate(("gate_proj.weight", "up_proj.weight")):
                rows = native_rows(*numbers[f"{e}.{name}"])
                assert np.array_equal(blocks[e, p::2], rows.codes)
                assert np.array_equal(scales[e, p::2], rows.scales)
            assert np.array_equal(down[e], native_rows(*numbers[f"{e}.down_proj.weight"]).codes)


def test_quantised_from_a_fused_tensor(tmp_path: Path):
    """Stored in MXFP4 without coming in it: what is given back is the decoded values, in the source's shape."""
    path = written(tmp_path, build(GPT_OSS, quantised="experts", fused=GPT_OSS_BF16))
    with PackedFile(path) as packed:
        found = packed.tensors.source(f"{EXPERTS}gate_up_proj").to_numpy()
        assert found.dtype.name == "bfloat16"
        up = packed.tensors[f"{EXPERTS}1.up_proj.weight"]
        assert np.array_equal(found[1, :, 1::2].T, up.to_numpy())
        assert packed.records[up.number].loss.noise_power > 0


def test_a_checkpoint_lists_every_tensor_once(tmp_path: Path):
    path = written(tmp_path, build(GPT_OSS, quantised="experts", fused=GPT_OSS_MXFP4))
    with PackedFile(path) as packed:
        names = [tensor.name for tensor in packed.tensors.checkpoint()]
        assert len(set(names)) == len(names)
        assert [name for name in names if ".experts." in name] == packed.index.sources.names
        for tensor in packed.tensors.checkpoint():
            assert sum(piece.size for piece in tensor.pieces()) == np.prod(tensor.shape)
        with pytest.raises(KeyError):
            packed.tensors.source("model.norm.weight")


def test_float32_biases_in_a_source(tmp_path: Path):
    path = written(tmp_path, build(GPT_OSS, dtypes=("F32", "BF16"), fused=GPT_OSS_BF16))
    with PackedFile(path) as packed:
        bias = packed.tensors.source(f"{EXPERTS}gate_up_proj_bias")
        assert (bias.dtype, bias.to_numpy().dtype) == ("F32", np.float32)
        expected = stacked(GPT_OSS, "gate_proj.bias", "up_proj.bias", interleaved=True)[..., 0]
        assert np.array_equal(np.concatenate(list(bias.pieces())), narrow(expected, "F32").ravel())


# Rules, on the files' own tables and on small ones of every kind.


@pytest.fixture(scope="module")
def fused(golden: Path) -> Parts:
    return take_apart((golden / "valid" / "fused.lith").read_bytes())


@pytest.fixture(scope="module")
def native(golden: Path) -> Parts:
    return take_apart((golden / "valid" / "fused-mxfp4.lith").read_bytes())


def refused(data: bytes, path: Path) -> str:
    """The rule that a file breaks; no more than the file's size and a little is allocated."""
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"section 'index': .*\[[A-Z]\d\]$") as caught:
            read_everything(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    return caught.value.rule


HOSTILE = (1, 7, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 480, 2**64 - 24, 2**64 - 1, 2**64 // 19 + 1)


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("column", ["start", "row_stride", "column_stride"])
def test_hostile_places(fused: Parts, tmp_path: Path, column: str, value: int):
    """Tensor 9 is up of expert 0: 20 x 24 of the 1920 elements of source 0."""
    if (column, value) != ("column_stride", 1):
        assert refused(with_cells(fused, "tensors", 9, **{column: value}), tmp_path / "hostile.lith") in {"O4", "O5"}


@pytest.mark.parametrize(
    ("cells", "rule"),
    [
        ({"start": 0}, "O5"),
        ({"start": 24}, "O5"),
        ({"start": 481}, "O5"),
        ({"start": 1920 - 480}, "O5"),
        ({"start": 1921 - 480}, "O4"),
        ({"row_stride": 0}, "O4"),
        ({"column_stride": 0}, "O4"),
        ({"row_stride": 1}, "O5"),
        ({"row_stride": 48}, "O5"),
        ({"row_stride": 2**53 + 1}, "O4"),
        ({"start": 960}, "O5"),
        ({"source": 1, "start": 0}, "O5"),
        ({"source": 2}, "O3"),
        ({"source": NO_SOURCE}, "O3"),
        ({"source": NO_SOURCE, "start": 0, "row_stride": 0, "column_stride": 0}, "O5"),
        ({"scales": 0}, "O3"),
        ({"scales": 7}, "O3"),
        ({"source_dtype": 3}, "O4"),
    ],
)
def test_hostile_rows(fused: Parts, tmp_path: Path, cells: dict[str, int], rule: str):
    assert refused(with_cells(fused, "tensors", 9, **cells), tmp_path / "hostile.lith") == rule


@pytest.mark.parametrize(
    ("cells", "rule"),
    [
        ({"start": 8}, "O4"),
        ({"start": 33}, "O4"),
        ({"start": 0}, "O5"),
        ({"row_stride": 72}, "O4"),
        ({"row_stride": 32}, "O5"),
        ({"row_stride": 2**64 - 16}, "O4"),
        ({"start": 2**64 - 16}, "O4"),
        ({"column_stride": 2}, "O4"),
        ({"scales": NO_SOURCE}, "O3"),
        ({"scales": 6}, "O3"),
        ({"scales": 0}, "O4"),
        ({"scales": 2}, "O4"),
        ({"scales": 4}, "O4"),
        ({"source": 2}, "O4"),
        ({"source": 1}, "O4"),
        ({"source_dtype": 1}, "O3"),
        ({"source_dtype": 1, "scales": NO_SOURCE}, "O4"),
    ],
)
def test_hostile_codes(native: Parts, tmp_path: Path, cells: dict[str, int], rule: str):
    """Tensor 11 is up of expert 0: 32 rows of 64 columns, codes in source 0, scales in source 1."""
    assert refused(with_cells(native, "tensors", 11, **cells), tmp_path / "hostile.lith") == rule


@pytest.mark.parametrize(
    ("cells", "rule"),
    [
        ({"dtype": 0}, "O2"),
        ({"dtype": 4}, "O2"),
        ({"dtype": 5}, "O4"),
        ({"ndim": 0}, "O2"),
        ({"ndim": 2}, "O2"),
        ({"ndim": 5}, "O2"),
        ({"dim0": 0}, "O2"),
        ({"dim3": 1}, "O2"),
        ({"dim0": 3}, "O5"),
        ({"dim0": 1}, "O4"),
        ({"dim0": 2**31}, "O2"),
        ({"dim0": 2**64 - 1}, "O2"),
        ({"dim0": 2**31 - 1, "dim1": 2**31 - 1}, "O2"),
        ({"dim0": 2**31 - 1, "dim1": 2**31 - 1, "dim2": 2**31 - 1, "dim3": 2**31 - 1, "ndim": 4}, "O2"),
        ({"dim0": 2**31 - 1, "dim1": 2**22}, "O2"),
    ],
)
def test_hostile_sources(fused: Parts, tmp_path: Path, cells: dict[str, int], rule: str):
    assert refused(with_cells(fused, "sources", 0, **cells), tmp_path / "hostile.lith") == rule


def tables(placed: list[dict[str, int]], sizes: list[int]) -> tuple[Table, Table, Table]:
    """Tensor, source and blob tables of tensors with these places; sources are arrays of U8 for MXFP4, else BF16."""
    alone = {**dict.fromkeys(TENSOR_COLUMNS, 0), "source": NO_SOURCE, "scales": NO_SOURCE, "source_dtype": 1}
    rows = [{**alone, "blob": i, "column_stride": 1} | row for i, row in enumerate(placed)]
    used_by_mxfp4 = {row[key] for row in rows if row["source_dtype"] == 4 for key in ("source", "scales")}
    dims = [{**dict.fromkeys(SOURCE_COLUMNS, 0), "dim0": size, "ndim": 1, "dtype": 5 if i in used_by_mxfp4 else 1}
            for i, size in enumerate(sizes)]  # fmt: skip
    blobs = [{**dict.fromkeys(COLUMN_TYPES["blobs"], 0), "dtype": row["source_dtype"]} for row in rows]
    return (
        build_table([f"t{i}" for i in range(len(rows))], rows, TENSOR_COLUMNS),
        build_table([f"s{i}" for i in range(len(dims))], dims, SOURCE_COLUMNS),
        build_table([f"b{i}" for i in range(len(rows))], blobs, COLUMN_TYPES["blobs"]),
    )


def elements(row: dict[str, int]) -> list[int]:
    reach = itertools.product(range(row["rows"]), range(row["columns"]))
    return [row["start"] + r * row["row_stride"] + c * row["column_stride"] for r, c in reach]


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_what_is_accepted_covers_every_element_once(data: st.DataObject):
    """Small tensors at any places: those the rules let through give each element of the source exactly once."""
    size = st.integers(1, 3)
    shape = {"rows": data.draw(size), "columns": data.draw(size)}
    placed = []
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            shape = {"rows": data.draw(size), "columns": data.draw(size)}
        stride = st.integers(1, 12)
        placed.append({**shape, "source": 0, "start": data.draw(st.integers(0, 24)), "row_stride": data.draw(stride),
                       "column_stride": data.draw(stride)})  # fmt: skip
    total = sum(row["rows"] * row["columns"] for row in placed)
    tensors, sources, blobs = tables(placed, [total])
    try:
        check_sources(tensors, sources, blobs, "place")
    except FormatError as error:
        assert error.rule in {"O4", "O5"}  # noqa: PT017
        return
    assert sorted(at for row in placed for at in elements(row)) == list(range(total))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_way_to_interleave_is_accepted(data: st.DataObject):
    """Groups of n tensors whose rows, columns and number are nested in any order, one group after the other."""
    placed, start = [], 0
    for _ in range(data.draw(st.integers(1, 4))):
        counts = {name: data.draw(st.integers(1, 4)) for name in ("rows", "columns", "tensors")}
        strides, stride = {}, 1
        for name in data.draw(st.permutations(["rows", "columns", "tensors"])):
            strides[name], stride = stride, stride * counts[name]
        for i in range(counts["tensors"]):
            placed.append({"rows": counts["rows"], "columns": counts["columns"], "source": 0,
                           "start": start + i * strides["tensors"], "row_stride": strides["rows"],
                           "column_stride": strides["columns"]})  # fmt: skip
        start += stride
    assert sorted(at for row in placed for at in elements(row)) == list(range(start))
    order = data.draw(st.permutations(range(len(placed))))
    check_sources(*tables([placed[i] for i in order], [start]), "place")
    at = data.draw(st.integers(0, len(placed) - 1))
    column = data.draw(st.sampled_from(["start", "row_stride", "column_stride", "rows", "columns"]))
    placed[at] = {**placed[at], column: max(1, placed[at][column] + data.draw(st.sampled_from([-4, -2, -1, 1, 2, 4])))}
    accepted = True
    try:
        check_sources(*tables(placed, [start]), "place")
    except FormatError:
        accepted = False
    assert not accepted or sorted(at for row in placed for at in elements(row)) == list(range(start))


def native_row(source: int, scales: int, start: int = 0, rows: int = 2) -> dict[str, int]:
    return {
        "rows": rows,
        "columns": 32,
        "source": source,
        "scales": scales,
        "start": start,
        "row_stride": 16,
        "source_dtype": 4,
    }


@pytest.mark.parametrize(
    ("placed", "sizes", "rule"),
    [
        ([native_row(0, 1)], [32, 2], ""),
        ([native_row(0, 1), native_row(2, 3)], [32, 2, 32, 2], ""),
        ([native_row(0, 1), native_row(2, 1)], [32, 2, 32], "O5"),  # one source of scales for two of codes
        ([native_row(0, 1), native_row(0, 2, 32)], [64, 4, 4], "O5"),  # and the other way round
        ([native_row(0, 1), native_row(2, 3, 0), native_row(0, 3, 32), native_row(2, 1, 32)], [64, 4, 64, 4], "O5"),
        ([native_row(0, 0)], [32], "O4"),
        ([native_row(0, 1, 0, 16), native_row(1, 2, 0, 1)], [256, 16, 1], "O5"),  # scales that are codes
        ([native_row(0, 1)], [32, 3], "O4"),
        ([native_row(0, 1)], [48, 3], "O5"),
    ],
)
def test_codes_and_scales_are_pairs(placed: list[dict[str, int]], sizes: list[int], rule: str):
    if not rule:
        check_sources(*tables(placed, sizes), "place")
        return
    with pytest.raises(FormatError) as caught:
        check_sources(*tables(placed, sizes), "place")
    assert caught.value.rule == rule


def test_a_source_without_tensors():
    with pytest.raises(FormatError, match=r"source: s1: its tensors hold another number of elements \[O5\]"):
        check_sources(*tables([{"rows": 2, "columns": 3, "source": 0, "row_stride": 3}], [6, 1]), "place")
    with pytest.raises(FormatError, match=r"\[O5\]"):
        check_sources(*tables([{"rows": 2, "columns": 3, "column_stride": 0}], [6]), "place")


def test_no_sources_at_all():
    check_sources(*tables([{"rows": 2, "columns": 3, "column_stride": 0}] * 2, []), "place")


def test_one_dtype_in_a_source():
    tensors, sources, blobs = tables([{"rows": 1, "columns": 3, "source": 0, "start": s, "row_stride": 3} for s in (0, 3)], [6])
    check_sources(tensors, sources, blobs, "place")
    mixed = {**blobs.columns, "dtype": np.array([1, 2], np.uint8)}
    with pytest.raises(FormatError, match=r"t1: is stored in another dtype than the rest of its source \[O4\]"):
        check_sources(tensors, sources, Table(blobs.names, mixed), "place")


def test_many_tensors_are_checked_quickly():
    """As many as a table may have, all in one source, interleaved and not, and as many sources: nothing is quadratic."""
    count = 262_144
    apart = [{"rows": 2, "columns": 2, "source": 0, "start": 4 * i, "row_stride": 2} for i in range(count)]
    check_sources(*tables(apart, [4 * count]), "place")
    woven = [{"rows": 2, "columns": 2, "source": 0, "start": i, "row_stride": 2 * count, "column_stride": count}
             for i in range(count)]  # fmt: skip
    check_sources(*tables(woven, [4 * count]), "place")
    own = [{"rows": 2, "columns": 2, "source": i, "row_stride": 2} for i in range(count)]
    check_sources(*tables(own, [4] * count), "place")
