"""The layout of a packed file as proportional bars of SVG: its sections, its device image, and the blobs of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from megalith.format.constants import BLOB_ALIGNMENT, HEADER_BYTES
from megalith.format.entries import BlobEntry
from megalith.format.errors import printable
from megalith.format.experts import ExpertIndex
from megalith.format.reader import PackedFile
from megalith.output import human_bytes

WIDTH = 1000.0  # of every bar, in units of the drawing
_NARROWEST = 3.0
_BAR, _ROW, _LABEL = 30.0, 13.0, 74.0
_MAX_LAYERS = 64
_MAX_OUTLINED = 200
_MAX_RUNS = 16  # of a layer's experts, that are drawn as one piece each

_KINDS = {
    "embed_tokens": "embedding", "lm_head": "embedding", "qkv_proj": "qkv", "o_proj": "attention", "gate_up_proj": "mlp-in",
    "down_proj": "mlp-out", "router": "router",
}  # fmt: skip
LEGEND = {
    "embedding": "embedding, head", "qkv": "q, k, v", "attention": "attention output", "mlp-in": "gate, up", "mlp-out": "down",
    "router": "router", "experts": "experts", "vector": "norms, biases", "other": "other", "padding": "padding",
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A range of the file to draw; `kind` chooses its colour. Of its bytes `padding` are none of a blob's."""

    name: str
    kind: str
    offset: int
    nbytes: int
    note: str = ""
    padding: int = 0
    blobs: int = 1

    @property
    def tip(self) -> str:
        size = f"{self.nbytes:,} bytes ({human_bytes(self.nbytes)})" if self.nbytes >= 1024 else f"{self.nbytes} bytes"
        lines = [printable(self.name), size, f"offset {self.offset:,} to {self.offset + self.nbytes:,}", self.note]
        return "\n".join(line for line in lines if line)


def section_pieces(packed: PackedFile) -> list[Piece]:
    """Header, sections and the padding between them."""
    pieces = [Piece("header", "other", 0, HEADER_BYTES)]
    for section in packed.header.sections:
        pieces += _gap(pieces[-1], section.offset)
        pieces.append(Piece(section.kind, f"section-{section.kind}", section.offset, section.nbytes))
    return pieces + _gap(pieces[-1], packed.file_bytes)


def _gap(before: Piece, offset: int) -> list[Piece]:
    end = before.offset + before.nbytes
    return [Piece(f"padding after {before.name}", "padding", end, offset - end)] if offset > end else []


def blob_pieces(packed: PackedFile) -> dict[str, list[Piece]]:
    """Blobs and the padding after each, in file order, by group: "layers.0", "embed_tokens", ...

    The experts of a layer are its last blobs: they are a few pieces with several experts each.
    """
    index, image = packed.index, packed.header.section("image").offset
    members: dict[int, list[str]] = {}
    for name, blob in zip(index.tensors.names, index.tensors.columns["blob"].tolist(), strict=True):
        members.setdefault(blob, []).append(name)
    runs = _expert_runs(index.experts, image) if index.experts else {}
    groups: dict[str, list[Piece]] = {}
    for number, name in enumerate(index.blobs.names):
        parent, _, leaf = name.rpartition(".")
        group, of_expert, _ = parent.partition(".experts.")
        if of_expert:
            groups[group].extend(runs.pop(group, []))
            continue
        blob = index.blob(number)
        kind = "vector" if blob.layout == "vector" else _KINDS.get(leaf, "other")
        piece = Piece(name, kind, image + blob.offset, blob.nbytes, _note(blob, members.get(number, [])))
        groups.setdefault(parent or name, []).extend([piece, *_gap(piece, piece.offset + blob.extent_bytes)])
    return groups


def _expert_runs(experts: ExpertIndex, image: int) -> dict[str, list[Piece]]:
    """By layer, its experts as pieces that follow each other."""
    count, num_matrices = experts.num_experts, len(experts.matrices)
    per_run = -(-count // _MAX_RUNS)
    runs: dict[str, list[Piece]] = {}
    for layer, table in zip(experts.layers.tolist(), experts.table.astype(np.int64), strict=True):
        extents = -(-table[..., 1] // BLOB_ALIGNMENT) * BLOB_ALIGNMENT
        for first in range(0, count, per_run):
            last = min(first + per_run, count) - 1
            held, nbytes = int(table[first : last + 1, :, 1].sum()), int(extents[first : last + 1].sum())
            title = f"expert {first}" if first == last else f"experts {first} to {last}"
            blobs = (last + 1 - first) * num_matrices
            note = f"{blobs} blobs, {nbytes - held:,} bytes of padding"
            offset = image + int(table[first, 0, 0])
            piece = Piece(f"layers.{layer}: {title}", "experts", offset, nbytes, note, nbytes - held, blobs)
            runs.setdefault(f"layers.{layer}", []).append(piece)
    return runs


def _note(blob: BlobEntry, members: list[str]) -> str:
    shape = f"{blob.rows} x {blob.columns}" if blob.layout != "vector" else f"{blob.rows}"
    return "\n".join([f"{blob.dtype} {blob.layout}, {shape} stored", *map(printable, members[:8])])


def section_bar(pieces: Sequence[Piece]) -> str:
    """One bar of the whole file."""
    return _svg(_bar(pieces, 0.0, WIDTH, 0.0, _BAR, labels=True), _BAR)


def image_bar(groups: dict[str, list[Piece]]) -> str:
    """One bar of the device image; layers in turn light and dark."""
    pieces = []
    for i, (name, members) in enumerate(groups.items()):
        start, end = members[0].offset, members[-1].offset + members[-1].nbytes
        blobs = sum(piece.blobs for piece in members if piece.kind != "padding")
        kind = f"layer-{i % 2}" if blobs > 1 else members[0].kind
        pieces.append(Piece(name, kind, start, end - start, f"{blobs:,} blob{'s' if blobs > 1 else ''}"))
    return _svg(_bar(pieces, 0.0, WIDTH, 0.0, _BAR, labels=True), _BAR, dense=len(pieces) > _MAX_OUTLINED)


def layer_rows(groups: dict[str, list[Piece]]) -> str:
    """A row per layer on one scale; of very many layers the first and the last."""
    layers = [(name, pieces) for name, pieces in groups.items() if sum(piece.kind != "padding" for piece in pieces) > 1]
    omitted = max(0, len(layers) - _MAX_LAYERS)
    half = _MAX_LAYERS // 2
    chosen = layers if not omitted else layers[:half] + layers[-half:]
    largest = max((sum(piece.nbytes for piece in pieces) for _, pieces in layers), default=1)
    parts, y = [], 0.0
    for i, (name, pieces) in enumerate(chosen):
        if omitted and i == half:
            parts.append(f'<text x="0" y="{y + _ROW - 3:g}">... {omitted} layers not drawn</text>')
            y += _ROW + 2
        width = (WIDTH - _LABEL) * sum(piece.nbytes for piece in pieces) / largest
        parts.append(f'<text x="0" y="{y + _ROW - 3:g}">{escape(printable(name))}</text>')
        parts.append(_bar(pieces, _LABEL, width, y, _ROW, labels=False))
        y += _ROW + 2
    return _svg("".join(parts), y)


def _svg(content: str, height: float, dense: bool = False) -> str:
    kind = "bars dense" if dense else "bars"
    return f'<svg viewBox="0 0 {WIDTH:g} {height:g}" class="{kind}" role="img">{content}</svg>'


def _bar(pieces: Sequence[Piece], left: float, width: float, top: float, height: float, labels: bool) -> str:
    parts, x = [], left
    for piece, span in zip(pieces, spread([piece.nbytes for piece in pieces], width), strict=True):
        parts.append(
            f'<rect class="k-{escape(piece.kind)}" x="{x:.2f}" y="{top:g}" width="{span:.2f}" height="{height:g}" '
            f'data-tip="{escape(piece.tip, quote=True)}"/>'
        )
        name = printable(piece.name)
        if labels and span > 8 * len(name):
            parts.append(f'<text class="inside" x="{x + 6:.2f}" y="{top + height / 2 + 4:g}">{escape(name)}</text>')
        x += span
    return "".join(parts)


def spread(sizes: Sequence[int], width: float) -> list[float]:
    """Widths in proportion to `sizes`, none below a least width that can be seen and pointed at; their sum is `width`."""
    least = min(_NARROWEST, width / max(1, len(sizes)) / 2)
    total = max(1, sum(sizes))
    small = [size * width / total < least for size in sizes]
    rest = width - least * sum(small)
    large_bytes = max(1, sum(size for size, is_small in zip(sizes, small, strict=True) if not is_small))
    return [least if is_small else size * rest / large_bytes for size, is_small in zip(sizes, small, strict=True)]
