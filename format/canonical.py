"""Canonical MessagePack: one byte string per value, decoded within a budget (specs/format.md, "Canonical MessagePack")."""

from __future__ import annotations

from typing import Any

import msgpack

from .errors import FormatError

# First byte -> (bytes of a big-endian length or payload after it, what it introduces).
_SIZED = {
    0xC4: (1, "bytes"), 0xC5: (2, "bytes"), 0xC6: (4, "bytes"),
    0xD9: (1, "bytes"), 0xDA: (2, "bytes"), 0xDB: (4, "bytes"),
    0xDC: (2, "array"), 0xDD: (4, "array"), 0xDE: (2, "map"), 0xDF: (4, "map"),
}  # fmt: skip
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}


def encode(value: Any) -> bytes:
    """Canonical encoding of None, bool, int, float, str, bytes, lists and string-keyed dicts."""
    return bytes(msgpack.packb(_sorted(value), use_bin_type=True))


def decode(data: bytes, place: str, rule: str, max_objects: int, max_depth: int) -> Any:
    """The value of a canonical encoding; FormatError with `rule` for anything else, before memory is spent on it."""
    _check_budget(data, place, rule, max_objects, max_depth)
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=False, object_pairs_hook=_text_map)
    except (ValueError, UnicodeDecodeError, msgpack.UnpackException) as error:
        raise FormatError(f"{place}: not MessagePack: {error}", rule) from None
    if encode(value) != data:
        raise FormatError(f"{place}: MessagePack is not in its canonical form (sorted, unique keys, shortest ints)", rule)
    return value


def _text_map(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    if not all(isinstance(key, str) for key, _ in pairs):
        raise ValueError("a map key is not text")
    return dict(pairs)  # of duplicates one is lost: the value's encoding then differs


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_sorted(item) for item in value]
    return value


def _check_budget(data: bytes, place: str, rule: str, max_objects: int, max_depth: int) -> None:
    """Walk the headers of `data` without building anything."""
    position, objects = 0, 0
    open_items = [1]  # items still to come at each level
    while open_items:
        if open_items[-1] == 0:
            open_items.pop()
            continue
        open_items[-1] -= 1
        objects += 1
        if objects > max_objects:
            raise FormatError(f"{place}: more than {max_objects} MessagePack objects", rule)
        if position >= len(data):
            raise FormatError(f"{place}: MessagePack ends early at byte {position}", rule)
        position, children = _step(data, position, place, rule)
        if children:
            open_items.append(children)
            if len(open_items) > max_depth + 1:
                raise FormatError(f"{place}: MessagePack nested deeper than {max_depth} at byte {position}", rule)
    if position > len(data):
        raise FormatError(f"{place}: MessagePack ends early at byte {len(data)}", rule)
    if position < len(data):
        raise FormatError(f"{place}: {len(data) - position} bytes after the MessagePack value", rule)


def _step(data: bytes, position: int, place: str, rule: str) -> tuple[int, int]:
    """Position after the header (and payload) at `position`, and the number of items it opens."""
    first = data[position]
    after = position + 1
    if first <= 0x7F or first >= 0xE0:
        return after, 0
    if first <= 0x8F:
        return after, 2 * (first & 0x0F)
    if first <= 0x9F:
        return after, first & 0x0F
    if first <= 0xBF:
        return after + (first & 0x1F), 0
    if first in _FIXED:
        return after + _FIXED[first], 0
    if first not in _SIZED:
        raise FormatError(f"{place}: MessagePack type {first:#04x} at byte {position} is not used here", rule)
    width, kind = _SIZED[first]
    length = int.from_bytes(data[after : after + width], "big")
    after += width
    if kind == "bytes":
        return after + length, 0
    return after, length * (2 if kind == "map" else 1)
