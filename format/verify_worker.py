"""Hashes chunks of an open file in a process of its own: one that is truncated meanwhile kills this process (SIGBUS),
not the one that asked.

Mapping saves the copy that `pread` makes, which costs as much as XXH3 itself. Argument: the inherited descriptor.
Standard input: uint64 triples of offset, length and expected digest, in file order. Standard output, as the work goes
on: uint64, the number of bytes checked since the last one, or BROKEN | the number of a triple that does not match.
"""

from __future__ import annotations

import mmap
import sys
from array import array

import xxhash

BROKEN = 1 << 63
_WINDOW_BYTES = 8 << 20
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)


def main() -> None:
    """Check all triples; exits with 1 when the file is too short for one."""
    descriptor = int(sys.argv[1])
    triples = array("Q", sys.stdin.buffer.read())
    answer = sys.stdout.buffer
    for first, last in _windows(triples):
        start = triples[3 * first]
        nbytes = triples[3 * last] + triples[3 * last + 1] - start
        try:
            mapped = mmap.mmap(descriptor, nbytes, mmap.MAP_SHARED | _POPULATE, mmap.PROT_READ, offset=start)
        except (OSError, ValueError) as error:
            sys.exit(f"{error}")
        with mapped, memoryview(mapped) as view:
            for i in range(first, last + 1):
                at = triples[3 * i] - start
                if xxhash.xxh3_64_intdigest(view[at : at + triples[3 * i + 1]]) != triples[3 * i + 2]:
                    answer.write((BROKEN | i).to_bytes(8, "little"))
        answer.write(nbytes.to_bytes(8, "little"))
        answer.flush()


def _windows(triples: array[int]) -> list[tuple[int, int]]:
    """First and last triple of each run that lies within one window."""
    windows, count = [], len(triples) // 3
    first = 0
    for i in range(count):
        following = triples[3 * i + 3] if i + 1 < count else None
        if following is None or following - triples[3 * first] >= _WINDOW_BYTES or following < triples[3 * i]:
            windows.append((first, i))
            first = i + 1
    return windows


if __name__ == "__main__":
    main()
