"""`megalith inspect --heatmap`: the picture shows the tensor, the page needs nothing else, and no name breaks out of it."""

from __future__ import annotations

import json
import re
import struct
import sys
import zlib
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from golden_models import GoldenModel
from safetensors.numpy import load_file, save_file

from megalith.cli import run
from megalith.converter.convert import convert
from megalith.converter.plan import Options
from megalith.format.reader import PackedFile
from megalith.inspection.heatmap import largest_matrix
from megalith.inspection.layout_map import blob_pieces, section_pieces, spread
from megalith.inspection.picture import MAX_BINS, NONFINITE, ZERO, Scale, magnitudes, png, scale_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from packed_parts import assemble, take_apart

MODELS = Path(__file__).parent / "golden" / "models"
LARGEST = "model.layers.0.mlp.gate_proj.weight"
DOWN_PROJ = "model.layers.0.mlp.down_proj.weight"
EVIL = '</script><img src=x onerror="alert(1)">'


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "llama2.lith"
    convert(MODELS / "llama2", path, Options())
    return path


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_page_is_self_contained(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "map.html"
    assert run(["inspect", str(packed), "--heatmap", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["heatmap"]
    assert report == {"path": str(out), "tensor": LARGEST, "bytes": out.stat().st_size}
    assert list(tmp_path.iterdir()) == [out]
    text = out.read_text()
    assert "$" not in text
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base"), tag
        for name in ("src", "href", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in text
    assert "http" not in re.sub(r"http-equiv|http://www\.w3\.org/2000/svg", "", text)
    tips = [attributes["data-tip"] or "" for _, attributes in page.tags if "data-tip" in attributes]
    assert any(tip.startswith("layers.1.qkv_proj\n") and "k_proj" in tip for tip in tips)
    assert any(tip.startswith("image\n") for tip in tips)


def test_picture_decodes_to_its_levels(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "map.html"
    assert run(["inspect", str(packed), "--tensor", DOWN_PROJ, "--heatmap", str(out)]) == 0
    source = next(a["src"] for tag, a in Page(out.read_text()).tags if tag == "img" and a.get("id") == "picture")
    assert source is not None
    with PackedFile(packed) as file:
        found = magnitudes(file.tensors[DOWN_PROJ])
    image = b64decode(source.partition(",")[2])
    width, height = struct.unpack_from(">II", image, 16)
    assert (height, width) == found.means.shape
    start = image.index(b"IDAT")
    (length,) = struct.unpack_from(">I", image, start - 4)
    rows = np.frombuffer(zlib.decompress(image[start + 4 : start + 4 + length]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    np.testing.assert_array_equal(rows[:, 1:], scale_of(found.means, 0.5).levels(found.means, 256))


@pytest.mark.parametrize("limit", [MAX_BINS, 7])
def test_bins_are_means_of_their_rows_and_columns(packed: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr("megalith.inspection.picture.MAX_BINS", limit)
    monkeypatch.setattr("megalith.format.tensors._SLICE_BYTES", 4096)  # several slices even here
    with PackedFile(packed) as file:
        for name in (DOWN_PROJ, "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
            tensor = file.tensors[name]
            values = np.abs(np.atleast_2d(tensor.to_float32())).astype(np.float64)
            found = magnitudes(tensor)
            assert found.means.shape == tuple(min(limit, side) for side in values.shape)
            rows, columns = ([*edges, side] for edges, side in
                             zip((found.row_edges, found.column_edges), values.shape, strict=True))  # fmt: skip
            for i in range(len(rows) - 1):
                for j in range(0, len(columns) - 1, 5):
                    expected = values[rows[i] : rows[i + 1], columns[j] : columns[j + 1]].mean()
                    assert found.means[i, j] == pytest.approx(expected, rel=1e-9)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    tensors = load_file(MODELS / "llama2" / "model.safetensors")
    tensors[DOWN_PROJ][3, 4], tensors[DOWN_PROJ][5, 6] = np.nan, np.inf
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((MODELS / "llama2" / "config.json").read_text())
    path, out = tmp_path / "odd.lith", tmp_path / "map.html"
    convert(tmp_path, path, Options(allow_nonfinite=True))
    with PackedFile(path) as file:
        found = magnitudes(file.tensors[DOWN_PROJ]).means
    assert np.argwhere(np.isnan(found)).tolist() == [[3, 4], [5, 6]]
    for name in (DOWN_PROJ, "model.norm.weight"):
        assert run(["inspect", str(path), "--tensor", name, "--heatmap", str(out)]) == 0
        assert "nan" not in out.read_text().split("<script>")[1].split(";")[1]


def test_levels() -> None:
    means = np.array([[0.0, np.nan, 1e-3, 1.0, 1e-9, 10.0**-1.5]])
    levels = Scale(1e-3, 1.0).levels(means, 256)[0]
    assert levels.tolist() == [ZERO, NONFINITE, 2, 255, 2, 128]
    assert scale_of(np.zeros((2, 2))) == Scale(1.0, 1.0)
    assert Scale(2.0, 2.0).levels(np.full((1, 1), 2.0), 256).tolist() == [[2]]
    assert png(np.zeros((1, 1), np.int64)).startswith(b"\x89PNG")


def test_pieces_cover_the_file(packed: Path) -> None:
    with PackedFile(packed) as file:
        sections, groups = section_pieces(file), blob_pieces(file)
        image = file.header.section("image")
        assert largest_matrix(file).name == LARGEST
    blobs = [piece for pieces in groups.values() for piece in pieces]
    for pieces, start, end in ((sections, 0, packed.stat().st_size), (blobs, image.offset, image.end)):
        assert pieces[0].offset == start
        assert [a.offset + a.nbytes for a in pieces] == [*(b.offset for b in pieces[1:]), end]


def test_mixture_of_experts_in_mxfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six experts of a layer are pieces of their own, or of two each; the picture shows decoded values."""
    path, out = GoldenModel("gpt_oss_mxfp4").pack(tmp_path), tmp_path / "map.html"
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    for limit, num_pieces in ((16, 6), (4, 3)):
        monkeypatch.setattr("megalith.inspection.layout_map._MAX_RUNS", limit)
        with PackedFile(path) as file:
            groups, image = blob_pieces(file), file.header.section("image")
            num_blobs, blob_bytes = len(file.index.blobs), int(file.index.blobs.columns["nbytes"].sum())
            values = np.abs(file.tensors[name].to_float32())
            np.testing.assert_allclose(magnitudes(file.tensors[name]).means, values)
        pieces = [piece for group in groups.values() for piece in group]
        assert (pieces[0].offset, pieces[-1].offset + pieces[-1].nbytes) == (image.offset, image.end)
        assert [a.offset + a.nbytes for a in pieces[:-1]] == [b.offset for b in pieces[1:]]
        assert sum(piece.blobs for piece in pieces if piece.kind != "padding") == num_blobs
        assert sum(piece.nbytes - piece.padding for piece in pieces if piece.kind != "padding") == blob_bytes
        assert sum(piece.kind == "experts" for piece in groups["layers.1"]) == num_pieces
    assert run(["inspect", str(path), "--tensor", name, "--heatmap", str(out)]) == 0
    text = out.read_text()
    assert "<td>MXFP4 96 x 96</td>" in text
    assert "layers.2: experts 4 to 5" in text
    assert "router" in text


def test_largest_matrix_may_be_in_mxfp4(tmp_path: Path) -> None:
    path = tmp_path / "quantised.lith"
    convert(MODELS / "llama2", path, Options(linear="mxfp4"))
    with PackedFile(path) as file:
        assert largest_matrix(file).name == LARGEST
        assert largest_matrix(file).blob.dtype == "MXFP4"


def test_spread() -> None:
    widths = spread([1, 10**9, 1, 10**9], 1000.0)
    assert sum(widths) == pytest.approx(1000.0)
    assert widths[0] == 3.0
    assert widths[1] == widths[3]
    assert sum(spread([1] * 5000, 1000.0)) == pytest.approx(1000.0)


def test_hostile_names_are_escaped(packed: Path, tmp_path: Path) -> None:
    parts = take_apart(packed.read_bytes())
    names = parts.index["tensors"]["names"].split("\n")
    parts.index["tensors"]["names"] = "\n".join([EVIL, *names[1:]])
    parts.index["config"]["architecture"] = EVIL
    path, out = tmp_path / "$evil<b>.lith", tmp_path / "map.html"
    path.write_bytes(assemble(parts))
    assert run(["inspect", str(path), "--tensor", EVIL, "--heatmap", str(out)]) == 0
    text = out.read_text()
    assert "<img src=x" not in text
    assert "<b>.lith" not in text
    assert text.count("<script>") == text.count("</script>") == 1
    assert [a for tag, a in Page(text).tags if "onerror" in a] == []


def test_output_that_cannot_be_written(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(packed), "--heatmap", str(tmp_path / "absent" / "map.html")]) == 5
    folder = tmp_path / "folder.html"
    folder.mkdir()
    assert run(["inspect", str(packed), "--heatmap", str(folder)]) == 5
    assert list(tmp_path.iterdir()) == [folder]
    before = packed.read_bytes()
    assert run(["inspect", str(packed), "--heatmap", str(packed)]) == 2
    assert packed.read_bytes() == before
    assert "must end with .html" in capsys.readouterr().err
