"""The tree of tensors by module path, and the blobs that several tensors share."""

from __future__ import annotations

from typing import Any

from megalith.format.constants import TILE_ROWS
from megalith.format.entries import STORED_COLUMNS
from megalith.format.reader import PackedFile
from megalith.format.rows import HALF

from .table import Columns, tensor_columns, tensor_rows

Node = dict[str, Any]

ORDERS = {
    "sequential": "stored row = base + row",
    "pair8": f"two tensors share each block of {TILE_ROWS} stored rows: {HALF} rows of slot 0, then {HALF} rows of slot 1",
    "rope": f"a block holds {HALF} rows i of a head, then the {HALF} rows i + head_dim/2 that RoPE pairs with them",
}
STEPS = {"tile16x512": "row by row", "mxfp4": "the codes row by row, then the scales row by row"}


def tree(packed: PackedFile) -> dict[str, Any]:
    """JSON-ready: `modules` is a list of nodes, each with `children` or a `tensor`; `fused_blobs` those of several tensors."""
    columns = tensor_columns(packed)
    return {"modules": _nodes(tensor_rows(columns)), "fused_blobs": _fused_blobs(packed, columns)}


def _nodes(tensors: list[dict[str, Any]]) -> list[Node]:
    """Tensors grouped by the dots of their names; a module and a tensor may have one name."""
    root: Node = {"children": []}
    modules: dict[tuple[str, ...], Node] = {(): root}
    for tensor in tensors:
        *path, leaf = tensor["name"].split(".")
        parent = root
        for depth in range(len(path)):
            key = tuple(path[: depth + 1])
            if key not in modules:
                modules[key] = {"name": path[depth], "children": []}
                parent["children"].append(modules[key])
            parent = modules[key]
        parent["children"].append({"name": leaf, "tensor": tensor})
    children: list[Node] = root["children"]
    return children


def _fused_blobs(packed: PackedFile, columns: Columns) -> list[dict[str, Any]]:
    members: dict[str, list[int]] = {}
    for i, blob in enumerate(columns["blob"]):
        members.setdefault(blob, []).append(i)
    image = packed.header.section("image").offset
    result = []
    for number, name in enumerate(packed.index.blobs.names):
        if len(members.get(name, [])) < 2:
            continue
        blob = packed.index.blob(number)
        parts = [
            {"tensor": columns["name"][i], **dict(zip(("first_row", "end_row"), _span(columns, i), strict=True)),
             "row_order": columns["row_order"][i], "row_param": columns["row_param"][i]}
            for i in members[name]
        ]  # fmt: skip
        result.append(
            {"name": name, "dtype": blob.dtype, "layout": blob.layout, "stored_shape": [blob.rows, blob.columns],
             "offset": image + blob.offset, "bytes": blob.nbytes, "padding_after": blob.extent_bytes - blob.nbytes,
             "parts": parts}
        )  # fmt: skip
    return result


def _span(columns: Columns, i: int) -> tuple[int, int]:
    """Stored rows [first, end) that tensor i reaches over; two "pair8" tensors reach over the same."""
    base, rows = columns["row_base"][i], columns["stored_shape"][i][0]
    return base, base + rows * (TILE_ROWS // HALF if columns["row_order"][i] == "pair8" else 1)


def tree_text(data: dict[str, Any]) -> list[str]:
    """Indented lines, then one paragraph per fused blob."""
    lines: list[str] = []
    _node_text(data["modules"], 0, lines)
    if data["fused_blobs"]:
        lines += ["", "blobs that several tensors share"]
    for blob in data["fused_blobs"]:
        rows, width = blob["stored_shape"]
        lines.append(
            f"  {blob['name']}: {blob['dtype']} {blob['layout']} {rows}x{width} at {blob['offset']}, {blob['bytes']:,} bytes, "
            f"{blob['padding_after']:,} bytes of padding follow"
        )
        for part in blob["parts"]:
            lines.append(f"    rows {part['first_row']:>7} to {part['end_row'] - 1:>7}  {_order(part):<13} {part['tensor']}")
    used = {part["row_order"] for blob in data["fused_blobs"] for part in blob["parts"]}
    if used:
        lines += ["row orders", *(f"  {name:<10}  {text}" for name, text in ORDERS.items() if name in used)]
    for layout in sorted({blob["layout"] for blob in data["fused_blobs"]} & set(STEPS)):
        steps = f"steps of {STORED_COLUMNS[layout]} columns, in a step {STEPS[layout]}"
        lines.append(f"  {layout}: a block of {TILE_ROWS} rows is stored in {steps}")
    return lines


def _node_text(nodes: list[Node], depth: int, lines: list[str]) -> None:
    for top in nodes:
        node, name = top, top["name"]
        while len(node.get("children", ())) == 1:  # a chain of only children takes one line
            node = node["children"][0]
            name = f"{name}.{node['name']}"
        head = "  " * depth + name
        if "tensor" not in node:
            lines.append(head)
            _node_text(node["children"], depth + 1, lines)
            continue
        tensor = node["tensor"]
        shape = "x".join(map(str, tensor["shape"]))
        stored = "x".join(map(str, tensor["stored_shape"]))
        lines.append(
            f"{head:<40} {tensor['dtype']:<5} {shape:<13} {tensor['layout']:<10} {_order(tensor):<13} "
            f"at {tensor['offset']:<12} stored {stored}, {tensor['padding']} bytes of padding, blob {tensor['blob']}"
        )


def _order(fields: dict[str, Any]) -> str:
    order = fields["row_order"]
    return order if order == "sequential" else f"{order}({fields['row_param']})"
