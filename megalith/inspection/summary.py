"""The summary of a packed file: what it is, where its sections lie, and what the conversion did."""

from __future__ import annotations

from typing import Any

import numpy as np

from megalith.format.constants import HEADER_BYTES, VERSION_MAJOR, VERSION_MINOR
from megalith.format.errors import printable
from megalith.format.reader import PackedFile
from megalith.format.rope import table_offset
from megalith.output import human_bytes

from .losses import conversion, conversion_text, quantised, quantised_text
from .plain import fields, jsonable, shown
from .table import logical_bytes


def summary(packed: PackedFile) -> dict[str, Any]:
    """JSON-ready; reads the records section and some rows of the RoPE table, no weights."""
    index, header = packed.index, packed.header
    columns = index.tensors.columns
    elements = columns["rows"].astype(np.int64) * columns["columns"].astype(np.int64)
    weights_bytes = int(logical_bytes(packed).sum())
    sections = [{"name": "header", "offset": 0, "bytes": HEADER_BYTES}]
    sections += [{"name": s.kind, "offset": s.offset, "bytes": s.nbytes} for s in header.sections]
    return {
        "architecture": index.config.architecture,
        "format_version": f"{VERSION_MAJOR}.{VERSION_MINOR}",
        "file_bytes": packed.file_bytes,
        "weights_bytes": weights_bytes,
        "padding_bytes": header.section("image").nbytes - weights_bytes,
        "num_parameters": int(elements.sum()),
        "num_tensors": len(index.tensors),
        "num_blobs": len(index.blobs),
        "features": sorted(header.features),
        "sections": sections,
        "config": jsonable(index.config.to_dict()),
        "rope": rope_summary(packed),
        "files": [
            {"name": f.name, "bytes": f.nbytes, "stored_bytes": f.stored_nbytes, "sha256": f.sha256.hex()} for f in index.files
        ],
        "provenance": jsonable(index.provenance),
        "conversion": conversion(packed),
        "quantised": quantised(packed),
        "metadata": jsonable(header.metadata),
    }


def rope_summary(packed: PackedFile) -> dict[str, Any]:
    """Parameters, every inv_freq, and the table's first two and last rows as [cos, sin] pairs; reads only those."""
    rope, positions, half = packed.index.rope, packed.index.rope_positions, packed.index.config.head_dim // 2
    section = packed.header.section("rope")
    table = section.offset + table_offset(2 * half)
    rows = {}
    for position in sorted({0, min(1, positions - 1), positions - 1}):
        data = packed.read(table + position * half * 8, half * 8)
        rows[str(position)] = np.frombuffer(data, "<f4").reshape(half, 2).tolist()
    inv_freq = np.frombuffer(packed.read(section.offset, half * 4), "<f4").tolist()
    return {
        "type": rope.type,
        "theta": rope.theta,
        "parameters": dict(rope.parameters),
        "attention_factor": rope.attention_factor,
        "positions": positions,
        "inv_freq": jsonable(inv_freq),
        "rows": jsonable(rows),
    }


def summary_text(path: object, data: dict[str, Any]) -> list[str]:
    """Lines for people."""
    share = 100 * data["padding_bytes"] / max(1, data["weights_bytes"])
    lines = [
        f"{printable(path)}: {printable(data['architecture'])}, format {data['format_version']}, "
        f"{data['num_tensors']:,} tensors in {data['num_blobs']:,} blobs, {data['num_parameters']:,} parameters",
        f"  file      {data['file_bytes']:>18,} bytes  ({human_bytes(data['file_bytes'])})",
        f"  weights   {data['weights_bytes']:>18,} bytes",
        f"  padding   {data['padding_bytes']:>18,} bytes  ({share:.2f} % of the weights)",
        f"  features  {', '.join(data['features']) or 'none'}",
        "sections",
    ]
    for section in data["sections"]:
        lines.append(f"  {section['name']:<10} offset {section['offset']:>18,}  {section['bytes']:>18,} bytes")
    lines += ["model", *_config_text(data["config"]), "rope", *_rope_text(data["rope"])]
    lines += ["files"] if data["files"] else ["files: none"]
    for file in data["files"]:
        lines.append(f"  {file['name']:<26} {file['bytes']:>12,} bytes  sha256 {file['sha256'][:16]}...")
    lines += ["provenance", *fields(data["provenance"]), *conversion_text(data["conversion"], data["quantised"] is not None)]
    lines += quantised_text(data["quantised"])
    lines += ["metadata", *fields(data["metadata"])] if data["metadata"] else ["metadata: none"]
    return lines


def _config_text(config: dict[str, Any]) -> list[str]:
    values, counts = np.unique(config["layer_windows"], return_counts=True)
    windows = ", ".join(
        f"{count} layers: {f'last {window} positions' if window else 'all positions'}"
        for window, count in zip(values.tolist(), counts.tolist(), strict=True)
    )
    sparse = config["sparse_layers"]
    return fields({**config, "layer_windows": windows, "sparse_layers": f"{sum(sparse)} of {len(sparse)} layers"})


def _rope_text(rope: dict[str, Any]) -> list[str]:
    inv_freq = rope["inv_freq"]
    lines = fields({name: rope[name] for name in ("type", "theta", "parameters", "attention_factor", "positions")})
    lines.append(f"  inv_freq          {_number(inv_freq[0])} ... {_number(inv_freq[-1])}  ({len(inv_freq)} values)")
    for position, pairs in rope["rows"].items():
        chosen = [pairs[0], *pairs[1:2], *([pairs[-1]] if len(pairs) > 2 else [])]
        text = [f"({_number(cos)}, {_number(sin)})" for cos, sin in chosen]
        if len(pairs) > 3:
            text.insert(2, "...")
        lines.append(f"  cos, sin at {position:>9}  {' '.join(text)}")
    return lines


def _number(value: float | str) -> str:
    return f"{value:.7g}" if isinstance(value, float) else shown(value)
