"""`megalith diff`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from megalith.output import print_json, show_progress

_PLACES = {
    "image_offset": "their offset in the device image",
    "source": "the checkpoint's tensor that they were held in",
    "scales": "the checkpoint's tensor of their scales",
}


@click.command()
@click.argument("a", metavar="A", type=click.Path(path_type=Path))
@click.argument("b", metavar="B", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the differences as JSON.")
def diff(a: Path, b: Path, as_json: bool) -> int:
    """Compare the packed files A and B tensor by tensor: by value, bit for bit, and by layout.

    Exits with 0 when nothing differs, with 1 when anything does: a tensor's value or place, config, RoPE, the checkpoint's
    tensors that are held in pieces, stored files, provenance or metadata. Matrices whose stored
    checksums agree are not read: `megalith verify` checks these.
    """
    from tqdm import tqdm

    from megalith.diffing import diff as compare
    from megalith.format.errors import EXIT_DIFFERENT
    from megalith.format.reader import PackedFile

    with PackedFile(a) as file_a, PackedFile(b) as file_b:
        total = len(set(file_a.index.tensors.names) | set(file_b.index.tensors.names))
        with tqdm(total=total, unit="tensor", desc="comparing", disable=not show_progress(True)) as bar:
            result = compare(file_a, file_b, bar.update)
    if as_json:
        print_json({"a": str(a), "b": str(b), **result})
    else:
        click.echo("\n".join(_text(a, b, result)))
    return 0 if result["identical"] else EXIT_DIFFERENT


def _text(a: Path, b: Path, result: dict[str, Any]) -> list[str]:
    from megalith.diffing import OTHERS, VERDICTS
    from megalith.format.errors import printable
    from megalith.inspection.plain import shown

    lines = [f"A: {printable(a)}", f"B: {printable(b)}"]
    for section in OTHERS:
        found = result[section]
        lines.append(f"{section}: {'different' if found else 'equal'}")
        for entry in found:
            sides = [shown(entry[side]) if side in entry else "absent" for side in ("a", "b")]
            lines.append(f"  {printable(entry['name'])}: {sides[0]} -> {sides[1]}")
    counts = ", ".join(f"{count:,} {VERDICTS[name]}" for name, count in result["counts"].items() if count)
    lines.append(f"tensors: {counts}")
    if result["equal_by_checksum"]:
        lines.append(f"  {result['equal_by_checksum']:,} were compared by the files' checksums, without reading their values")
    wrong = [(entry["values"]["max_abs_error"], entry["name"]) for entry in result["tensors"] if "values" in entry]
    if len(wrong) > 1:
        largest, name = max(wrong, key=lambda pair: pair[0])
        lines.append(f"  largest error {largest:.6g} in {printable(name)}")
    moved = Counter(_place(entry) for entry in result["tensors"])
    lines += [f"  {_tensor_line(entry)}" for entry in result["tensors"] if not _place(entry)]
    lines += [f"  {count:,} tensors differ in nothing but {place}" for place, count in moved.items() if place]
    return lines


def _place(entry: dict[str, Any]) -> str:
    """What tells two tensors apart that only their place does; nothing when there is more."""
    if entry["verdict"] != "layout" or not set(entry["layout"]) <= set(_PLACES):
        return ""
    return " and ".join(text for name, text in _PLACES.items() if name in entry["layout"])


def _tensor_line(entry: dict[str, Any]) -> str:
    from megalith.diffing import VERDICTS
    from megalith.format.errors import printable

    parts = []
    if entry["verdict"] == "shape":
        parts.append(f"{'x'.join(map(str, entry['a']))} -> {'x'.join(map(str, entry['b']))}")
    if "values" in entry:
        found = entry["values"]
        place, values = ", ".join(map(str, found["first_at"])), " -> ".join(map(str, found["first_values"]))
        parts.append(
            f"{found['differing']:,} of {found['count']:,} elements, max abs {found['max_abs_error']:.6g}, "
            f"RMS {found['rms_error']:.6g}, first at ({place}): {values}"
        )
        if found["nonfinite"]:
            parts.append(f"{found['nonfinite']:,} of them not finite")
    if "codes" in entry:
        parts.append("{differing:,} of {count:,} blocks are written otherwise".format(**entry["codes"]))
    if "dtype" in entry:
        parts.append("dtype {} -> {}".format(*entry["dtype"]))
    implied = {*(_PLACES if parts else ()), *(("layout", "stored_shape") if "dtype" in entry else ())}
    changed = {name: sides for name, sides in entry.get("layout", {}).items() if name not in implied}
    parts += [f"{name} {sides[0]} -> {sides[1]}" for name, sides in changed.items()]
    return f"{printable(entry['name'])}: {VERDICTS[entry['verdict']]}" + (f": {'; '.join(parts)}" if parts else "")
