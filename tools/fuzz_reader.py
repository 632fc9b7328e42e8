"""Fuzz the reader of packed files: whatever header and index say, only a MegalithError may come out.

    python tools/fuzz_reader.py FILE [--seconds 60] [--seed 0]

FILE is a small valid file, such as specs/golden/valid/fused-mxfp4.lith. Iteration i of seed S is the same on every machine. A
file that makes the reader fail is kept as fuzz-S-i.lith in the working folder.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash
from packed_parts import Parts, assemble, patch, read_everything, reseal, section_entry, take_apart

from megalith.format.errors import MegalithError
from megalith.format.header import decode_header

MAX_MEMORY_BYTES = 4 << 30
MAX_SECONDS_EACH = 20
INTEGERS = (0, 1, 7, 8, 15, 16, 17, 31, 32, 255, 4095, 4096, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)
TABLES = ("blobs", "config", "experts", "sources", "tensors")
VALUES: tuple[Any, ...] = (
    None, True, False, *INTEGERS, -1, -(2**63), 0.0, -0.0, 0.5, 1.0, 1e308, -1.0, float("inf"), float("nan"), "", "a",
    "\n", "\n" * 1000, "\x1b[2J", "../x", "x" * 300, "\u202e", b"", b"\0", b"\xff" * 64, [], {}, [[]], {"a": 1}, [0] * 1000,
    {"": {}}, [None, "", b""],
)  # fmt: skip


def mutate_bytes(file: bytes, rng: random.Random) -> bytes:
    """Change a few bytes of header or index; most often the checksums of both are made to match."""
    index = decode_header(file[:4096], len(file), "file").section("index")
    for _ in range(rng.randint(1, 4)):
        end = rng.choice((256, 1024, index.end))
        at = rng.randrange(8, end)
        replacement = rng.choice(
            (
                bytes([file[at] ^ 1 << rng.randrange(8)]),
                bytes([rng.randrange(256)]),
                struct.pack("<Q", rng.choice(INTEGERS)),
                struct.pack("<I", rng.choice(INTEGERS) & 0xFFFF_FFFF),
            )
        )
        file = patch(file, at, replacement[: index.end - at])
    if rng.random() < 0.8:
        digest = xxhash.xxh3_64_intdigest(file[index.offset : index.end])
        file = reseal(patch(file, section_entry("index") + 24, struct.pack("<Q", digest)))
    if rng.random() < 0.1:
        file = file[: rng.randrange(len(file))]
    return file


def mutate_index(parts: Parts, rng: random.Random) -> bytes:
    """Replace, remove or add values anywhere in the decoded index, or edit a cell of a column, and put the file together."""
    value = parts.index
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(TABLES)
        if rng.random() < 0.5 and isinstance(value, dict) and value.get(key):
            value = {**value, key: _mutated(value[key], rng)}
        else:
            value = _mutated(value, rng)
    stored = parts.features if rng.random() < 0.7 else rng.randrange(8)
    return assemble(replace(parts, index=value, features=stored))


def _mutated(value: Any, rng: random.Random) -> Any:
    """A copy of a nested value with one place changed."""
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key = rng.choice(sorted(value))
        if rng.random() < 0.05:
            return {k: v for k, v in value.items() if k != key}
        if rng.random() < 0.05:
            return {**value, rng.choice(("", "zz", "\x1b")): rng.choice(VALUES)}
        return {**value, key: _mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], _mutated(value[at], rng), *value[at + 1 :]]
    if isinstance(value, bytes) and value and rng.random() < 0.9:
        return _mutated_column(value, rng)
    if isinstance(value, str) and value and rng.random() < 0.7:
        return _mutated_text(value, rng)
    if type(value) in (int, float) and rng.random() < 0.5:
        near = type(value)(value + rng.choice((-1, 1, 16, value)))
        return near if isinstance(near, float) else min(max(near, -(2**63)), 2**64 - 1)
    return rng.choice(VALUES)


def _mutated_column(data: bytes, rng: random.Random) -> bytes:
    width = rng.choice((1, 4, 8))
    if rng.random() < 0.1 or len(data) < width:
        return data[: rng.randrange(len(data))] if rng.random() < 0.5 else data + bytes(width)
    at = rng.randrange(len(data) // width) * width
    if rng.random() < 0.3:  # two cells change places, or become equal
        other = rng.randrange(len(data) // width) * width
        first, second = data[at : at + width], data[other : other + width]
        return patch(patch(data, at, second), other, rng.choice((first, second)))
    old = int.from_bytes(data[at : at + width], "little")
    new = rng.choice((*INTEGERS, old + 1, old - 1, old * 2, old ^ 1 << rng.randrange(8 * width)))
    return patch(data, at, (new % (1 << 8 * width)).to_bytes(width, "little"))


def _mutated_text(text: str, rng: random.Random) -> str:
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    kind = rng.randrange(4)
    if kind == 0:
        lines[at] = rng.choice(lines)
    elif kind == 1:
        lines[at] = rng.choice(("", "\x1b[2J", "x" * 257, "\x00", "é", lines[at] + " "))
    elif kind == 2:
        del lines[at]
    else:
        rng.shuffle(lines)
    return "\n".join(lines)


def mutations(file: bytes, seed: int) -> Iterator[bytes]:
    """Endless mutations of a valid file; number i depends on `seed` and i alone."""
    parts = take_apart(file)
    for i in itertools.count():
        rng = random.Random(f"{seed}:{i}")
        yield mutate_index(parts, rng) if rng.random() < 0.7 else mutate_bytes(file, rng)


def outcome(data: bytes, path: Path, read: Callable[[Path], None] = read_everything) -> str:
    """The rule that a file breaks, "opens", or "I/O"; anything but a MegalithError is raised on."""
    path.write_bytes(data)
    try:
        read(path)
    except MegalithError as error:
        check_message(str(error), path)
        return error.rule or "I/O"
    return "opens"


def check_message(message: str, path: Path) -> None:
    """An error's message names the file and is safe to print."""
    assert path.name in message, f"the message does not name the file: {message}"
    assert message.isascii(), f"the message is not ASCII: {message!r}"
    assert message.isprintable(), f"the message is not printable: {message!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the reader of packed files.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    counts: collections.Counter[str] = collections.Counter()
    stop = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        for i, data in enumerate(mutations(options.file.read_bytes(), options.seed)):
            if time.monotonic() > stop:
                break
            signal.alarm(MAX_SECONDS_EACH)  # a hang ends the process with SIGALRM
            try:
                counts[outcome(data, Path(folder) / "fuzzed.lith")] += 1
            except Exception:
                kept = Path(f"fuzz-{options.seed}-{i}.lith")
                kept.write_bytes(data)
                traceback.print_exc()
                print(f"{kept}: the reader failed", file=sys.stderr)
                return 1
    signal.alarm(0)
    print(f"{counts.total()} files: " + ", ".join(f"{rule} {count}" for rule, count in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
