"""Hashes chunks of an open file in a process of its own, so that several run without one interpreter's lock.

Reads go into one buffer that stays in the core's cache. Arguments: the inherited descriptor, and the folder that xxhash
is installed in: the interpreter starts without `site`, which takes as long as hashing a gigabyte.
Standard input: uint64 triples of offset, length and expected digest, in file order. Standard output, as the work goes
on: uint64, the number of bytes checked since the last one, or BROKEN | the number of a triple that does not match.
"""

from __future__ import annotations

import os
import sys
from array import array
from collections.abc import Callable

BROKEN = 1 << 63
_WINDOW_BYTES = 512 << 10
_REPORT_BYTES = 8 << 20


def main() -> None:
    """Check all triples; exits with 1 when the file is too short for one."""
    descriptor = int(sys.argv[1])
    sys.path.append(sys.argv[2])
    import xxhash

    digest: Callable[[memoryview], int] = xxhash.xxh3_64_intdigest
    triples = array("Q", sys.stdin.buffer.read())
    offsets, sizes, expected = (triples[i::3].tolist() for i in range(3))
    answer, whole = sys.stdout.buffer, memoryview(bytearray(_WINDOW_BYTES))
    slices: dict[tuple[int, int], memoryview] = {}  # making one takes as long as hashing 3 KB
    unreported = first = 0
    while first < len(offsets):
        start = offsets[first]
        last = first
        while last + 1 < len(offsets) and start < offsets[last + 1] <= start + _WINDOW_BYTES - sizes[last + 1]:
            last += 1
        nbytes = offsets[last] + sizes[last] - start
        _read(descriptor, start, whole[:nbytes])
        for i in range(first, last + 1):
            key = (offsets[i] - start, sizes[i])
            data = slices.get(key)
            if data is None:
                data = slices[key] = whole[key[0] : key[0] + key[1]]
            if digest(data) != expected[i]:
                answer.write((BROKEN | i).to_bytes(8, "little"))
        first = last + 1
        unreported += nbytes
        if unreported >= _REPORT_BYTES or first == len(offsets):
            answer.write(unreported.to_bytes(8, "little"))
            answer.flush()
            unreported = 0


def _read(descriptor: int, offset: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            sys.exit(f"{error}")
        if count == 0:
            sys.exit(f"the file ends at {offset + done}")
        done += count


if __name__ == "__main__":
    main()
