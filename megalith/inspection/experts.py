"""The expert index: where the matrices of each expert lie, and with a usage log which experts were chosen how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megalith.format.errors import RequestError, printable
from megalith.format.experts import ExpertIndex
from megalith.format.reader import PackedFile

from .usage import Counts, read_usage


def experts_view(packed: PackedFile, log: Path | None) -> dict[str, Any] | None:
    """`experts` of an open file, marked with the usage that `log` tells of."""
    index = packed.index.experts
    data = experts(index, packed.header.section("image").offset)
    if log is None:
        return data
    if index is None or data is None:
        raise RequestError(f"{printable(packed.path)}: --usage: the model has no experts")
    return mark_usage(data, read_usage(log, index))


def experts(index: ExpertIndex | None, image_offset: int) -> dict[str, Any] | None:
    """JSON-ready: per sparse layer the file range, and per expert its ranges; None for a dense model."""
    if index is None:
        return None
    layers = []
    for number, table in zip(index.layers.tolist(), index.table.astype(np.int64), strict=True):
        sizes = table[..., 1].sum(axis=1)
        layers.append(
            {
                "layer": number,
                "offset": image_offset + int(table[..., 0].min()),
                "end": image_offset + int(table.sum(axis=2).max()),
                "bytes": int(sizes.sum()),
                "smallest_expert_bytes": int(sizes.min()),
                "largest_expert_bytes": int(sizes.max()),
                "experts": [[[image_offset + offset, nbytes] for offset, nbytes in expert] for expert in table.tolist()],
            }
        )
    return {"num_experts": index.num_experts, "matrices": list(index.matrices), "layers": layers}


def mark_usage(data: dict[str, Any], counts: Counts) -> dict[str, Any]:
    """The view with `usage` for each layer and in all: counts, experts never chosen, bytes of those chosen and not."""
    layers = []
    for layer, row in zip(data["layers"], counts, strict=True):
        sizes = [sum(nbytes for _, nbytes in matrices) for matrices in layer["experts"]]
        unused = [expert for expert, count in enumerate(row) if not count]
        unused_bytes = sum(sizes[expert] for expert in unused)
        usage = {"count": sum(row), "counts": row, "unused_experts": unused, "used_bytes": layer["bytes"] - unused_bytes,
                 "unused_bytes": unused_bytes}  # fmt: skip
        layers.append({**layer, "usage": usage})
    total = {name: sum(layer["usage"][name] for layer in layers) for name in ("count", "used_bytes", "unused_bytes")}
    num_unused = sum(len(layer["usage"]["unused_experts"]) for layer in layers)
    return {**data, "layers": layers, "usage": {**total, "num_unused": num_unused}}


def experts_text(data: dict[str, Any] | None) -> list[str]:
    """A line per layer and per expert."""
    if data is None:
        return ["no expert index: the model is dense"]
    lines = [f"{data['num_experts']} experts of {', '.join(map(printable, data['matrices']))} in {len(data['layers'])} layers"]
    if "usage" in data:
        num_experts = data["num_experts"] * len(data["layers"])
        lines.append(_usage_text(data["usage"], data["usage"]["num_unused"], num_experts) + "; shares are those of the layer")
    for layer in data["layers"]:
        sizes = f"{layer['smallest_expert_bytes']:,} to {layer['largest_expert_bytes']:,}"
        place = f"{layer['bytes']:,} bytes at {layer['offset']} to {layer['end']}"
        lines.append(f"layer {layer['layer']}: {place}, {sizes} per expert")
        usage = layer.get("usage")
        if usage:
            lines.append(f"  {_usage_text(usage, len(usage['unused_experts']), data['num_experts'])}")
        for number, matrices in enumerate(layer["experts"]):
            ranges = "  ".join(f"{offset}+{nbytes}" for offset, nbytes in matrices)
            chosen = _chosen_text(usage["counts"][number], usage["count"]) if usage else ""
            lines.append(f"  expert {number:>4}{chosen}  {sum(nbytes for _, nbytes in matrices):>14,} bytes  {ranges}")
    return lines


def _usage_text(usage: dict[str, Any], num_unused: int, num_experts: int) -> str:
    return (
        f"usage: {usage['count']:,} choices; {num_experts - num_unused:,} experts used, {usage['used_bytes']:,} bytes; "
        f"{num_unused:,} never, {usage['unused_bytes']:,} bytes"
    )


def _chosen_text(count: int, total: int) -> str:
    return f"  {count:>14,}  {100 * count / total:6.2f} %" if count else f"  {'never':>14}  {'':>8}"
