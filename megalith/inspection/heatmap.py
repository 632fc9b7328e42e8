"""A self-contained HTML page: the magnitudes of one tensor as a picture, and the layout of the file."""

from __future__ import annotations

import base64
import math
import os
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.format.entries import LAYOUT_CODES
from megalith.format.errors import FileError, printable
from megalith.format.reader import PackedFile
from megalith.format.tensors import PackedTensor
from megalith.output import human_bytes

from .layout_map import LEGEND, Piece, blob_pieces, image_bar, layer_rows, section_bar, section_pieces
from .picture import COLOUR_PERCENTILE, FIRST_LEVEL, Magnitudes, Scale, magnitudes, palette, png, scale_of
from .statistics import Statistics, statistics
from .tensor import find_tensor

_TEMPLATE = Path(__file__).with_name("heatmap.html")
_HOVER_LEVELS = 1 << 16
_SIDE, _LEAST_SIDE = 560, 140  # pixels of the picture's longer and shorter side
_PROFILE = 90
_EXPONENT_BARS = 16


def write_heatmap(packed: PackedFile, name: str | None, path: Path) -> dict[str, Any]:
    """Write the page for tensor `name`, or the largest matrix, under a temporary name and then rename it; replaces `path`."""
    tensor = find_tensor(packed, name) if name is not None else largest_matrix(packed)
    page = heatmap_page(packed, tensor).encode()
    temporary = path.with_name(f".heatmap-{os.getpid()}.html")
    try:
        with open(temporary, "xb") as file:
            try:
                file.write(page)
                file.flush()
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink()
                raise
    except OSError as error:
        raise FileError.wrap(path, error) from None
    return {"path": str(path), "tensor": tensor.name, "bytes": len(page)}


def largest_matrix(packed: PackedFile) -> PackedTensor:
    """The first of the tensors with the most elements, vectors aside; every model has an embedding."""
    columns, blobs = packed.index.tensors.columns, packed.index.blobs.columns
    elements = columns["rows"].astype(np.int64) * columns["columns"].astype(np.int64)
    is_matrix = blobs["layout"][columns["blob"]] != LAYOUT_CODES["vector"]
    return PackedTensor(packed, int(np.where(is_matrix, elements, -1).argmax()))


def heatmap_page(packed: PackedFile, tensor: PackedTensor) -> str:
    """The page's HTML; every name in it is escaped."""
    found, counted = magnitudes(tensor), statistics(tensor)
    scale, hover = scale_of(found.means, COLOUR_PERCENTILE), scale_of(found.means)
    height, width = _picture_size(found)
    groups, sections = blob_pieces(packed), section_pieces(packed)
    values = {
        "file": printable(packed.path),
        "tensor": printable(tensor.name),
        "architecture": printable(packed.index.config.architecture),
        "subtitle": f"{packed.file_bytes:,} bytes ({human_bytes(packed.file_bytes)}), {len(packed.index.tensors):,} tensors "
        f"in {len(packed.index.blobs):,} blobs",
        "last_row": f"{(1 if len(tensor.shape) == 1 else tensor.entry.rows) - 1:,}",
        "last_column": f"{tensor.shape[-1] - 1:,}",
        "bins": f"{found.means.shape[0]} x {found.means.shape[1]}",
        "width": str(width),
        "height": str(height),
        "profile": str(_PROFILE),
        "row_profile_width": str(_PROFILE if len(tensor.shape) > 1 else 0),
        "scale_low": f"{scale.low:.3g}",
        "scale_high": f"{scale.high:.3g}",
    }
    fragments = {
        "png": _base64(png(scale.levels(found.means, 256))),
        "ramp": _base64(png(np.arange(FIRST_LEVEL, 256)[None])),
        "ticks": _ticks(scale),
        "row_profile": _profile(found.means.mean(axis=1), scale),
        "column_profile": _profile(found.means.mean(axis=0), scale),
        "levels": _base64(hover.levels(found.means, _HOVER_LEVELS).astype("<u2").tobytes()),
        "hover": f"{math.log(hover.low)!r},{math.log(hover.high)!r}",
        "row_edges": ",".join(map(str, [*found.row_edges.tolist(), 1 if len(tensor.shape) == 1 else tensor.entry.rows])),
        "column_edges": ",".join(map(str, [*found.column_edges.tolist(), tensor.shape[-1]])),
        "statistics": _statistics_table(tensor, counted),
        "exponents": _exponent_table(counted),
        "section_bar": section_bar(sections),
        "section_table": _section_table(sections, packed.file_bytes),
        "image_bar": image_bar(groups),
        "layers": layer_rows(groups),
        "legend": _legend(groups),
        "zero_colour": _css_colour(palette()[0]),
        "nonfinite_colour": _css_colour(palette()[1]),
    }
    escaped = {name: escape(value, quote=True) for name, value in values.items()}
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(escaped, **fragments)


def _picture_size(found: Magnitudes) -> tuple[int, int]:
    """Height and width in CSS pixels: the tensor's proportions, within limits."""
    rows, columns = found.means.shape
    if rows == 1:
        return _LEAST_SIDE // 2, _SIDE
    longer = max(rows, columns)
    height, width = (max(_LEAST_SIDE, round(_SIDE * side / longer)) for side in (rows, columns))
    return height, width


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _css_colour(colour: NDArray[np.uint8]) -> str:
    return "#" + bytes(colour).hex()


def _ticks(scale: Scale) -> str:
    """The ends of the colour scale and round values between: 1, 2, 5 times powers of ten, or these alone on long scales."""
    low, span = math.log10(scale.low), math.log10(scale.high / scale.low)
    factors = (1, 2, 5) if span < 2.5 else (1,)
    values = [m * 10.0**n for n in range(math.floor(low), math.ceil(low + span) + 1) for m in factors]
    places = [((math.log10(value) - low) / span, f"{value:g}") for value in values] if span > 0 else []
    shown = [(place, text) for place, text in places if 0.1 < place < 0.9]
    ends = [(0.0, f"{scale.low:.3g}"), (1.0, f"{scale.high:.3g}")]
    return "".join(f'<span style="left:{100 * place:.1f}%">{text}</span>' for place, text in [*ends, *shown])


def _profile(means: NDArray[np.float64], scale: Scale) -> str:
    """Points "place,level" of a polyline in a box of 1 x 1, level 1 the scale's high end, 0 where a value is not finite."""
    levels = scale.levels(means, _HOVER_LEVELS)
    heights = np.where(levels < FIRST_LEVEL, 0.0, (levels - FIRST_LEVEL) / (_HOVER_LEVELS - 1 - FIRST_LEVEL))
    return ";".join(f"{(i + 0.5) / len(means):.4f},{height:.3f}" for i, height in enumerate(heights.tolist()))


def _statistics_table(tensor: PackedTensor, found: Statistics) -> str:
    place = ", ".join(str(i) for i in found.abs_max_at[: len(tensor.shape)])
    rows = {
        "dtype, shape": f"{tensor.blob.dtype} {' x '.join(map(str, tensor.shape))}",
        "blob": printable(tensor.blob.name),
        "row order": tensor.entry.row_map.order,
        "minimum": f"{found.minimum:.6g}",
        "maximum": f"{found.maximum:.6g}",
        "mean": f"{found.mean:.6g}",
        "std": f"{found.std:.6g}",
        "largest |w|": f"{found.abs_max:.6g} at ({place})",
        "zeros": f"{found.zeros:,}",
        "subnormal": f"{found.subnormals:,}",
        "NaN": f"{found.nans:,}",
        "infinite": f"{found.infinities:,}",
    }
    return "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())


def _exponent_table(found: Statistics) -> str:
    """A bar for each power of two, from the largest magnitudes down."""
    exponents = sorted(found.exponents.items(), reverse=True)[:_EXPONENT_BARS]
    most = max((count for _, count in exponents), default=1)
    return "".join(
        f'<tr><th>2<sup>{exponent}</sup></th><td><div class="bar" style="width:{100 * count / most:.1f}%"></div></td>'
        f"<td>{100 * count / found.count:.3f} %</td></tr>"
        for exponent, count in exponents
    )


def _section_table(pieces: list[Piece], file_bytes: int) -> str:
    padding = sum(piece.nbytes for piece in pieces if piece.kind == "padding")
    rows = [
        (f'<i class="k-{piece.kind}"></i>{escape(piece.name)}', f"{piece.offset:,}", piece.nbytes)
        for piece in pieces
        if piece.kind != "padding"
    ]
    rows.append(('<i class="k-padding"></i>padding between sections', "", padding))
    return "".join(
        f"<tr><td>{name}</td><td>{offset}</td><td>{nbytes:,}</td><td>{100 * nbytes / file_bytes:.3f} %</td></tr>"
        for name, offset, nbytes in rows
    )


def _legend(groups: dict[str, list[Piece]]) -> str:
    totals: dict[str, int] = {}
    for pieces in groups.values():
        for piece in pieces:
            totals[piece.kind] = totals.get(piece.kind, 0) + piece.nbytes - piece.padding
            totals["padding"] = totals.get("padding", 0) + piece.padding
    shown = [(kind, text) for kind, text in LEGEND.items() if totals.get(kind)]
    return "".join(f'<span><i class="k-{kind}"></i>{text} <b>{human_bytes(totals[kind])}</b></span>' for kind, text in shown)
