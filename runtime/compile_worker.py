"""Compiles builds in a process of its own: builds as JSON on standard input, results in order on standard output.

A result is a frame: u8, 1 for a compiled kernel and 0 for the words of an error, u64 length, content.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence

from .compile import Build, Compiled, CompileError, compiled


def encode_builds(builds: Sequence[Build]) -> bytes:
    """What the worker reads."""
    return json.dumps([[build.source, build.defines, build.arch] for build in builds]).encode()


def decode_results(data: bytes) -> Iterator[Compiled | str]:
    """What the worker wrote, one result per build."""
    at = 0
    while at < len(data):
        stop = at + 9 + int.from_bytes(data[at + 1 : at + 9], "little")
        content = data[at + 9 : stop]
        yield Compiled.from_bytes(content) if data[at] else content.decode()
        at = stop


def main() -> None:
    """Compile all; an error of one build does not keep the others from the cache."""
    for source, defines, arch in json.load(sys.stdin):
        try:
            good, content = 1, compiled(Build(source, tuple((name, value) for name, value in defines), arch)).to_bytes()
        except CompileError as error:
            good, content = 0, str(error).encode()
        sys.stdout.buffer.write(bytes([good]) + len(content).to_bytes(8, "little") + content)


if __name__ == "__main__":
    main()
