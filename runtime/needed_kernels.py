"""Which kernels a backend can come to launch, found without a GPU by building its launches with kernels that only take notes.

A build depends on a number of tokens only through its multiple of TOKEN_UNIT, since all tiles are multiples of it, and on a
layer only through the types and shapes of its blobs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import cast

from megalith.format.index import Index

from .compile import Build
from .gpu_buffers import Limits, device_buffers
from .gpu_program import DecodePass, GpuProgram, Places, PrefillPass
from .launch import Argument, Dim3, Launch
from .loaded_kernels import Wanted
from .program import Operation, build_program

TOKEN_UNIT = 16
_PREFILL_UNIT, _MOST_IN_GRAPHS = 32, 1024


class _Note:
    """Stands for a kernel; its launches are never called, and what is said of them is not kept."""

    def bind(
        self, grid: Dim3, block: Dim3, args: Sequence[Argument], shared_bytes: int = 0, pdl: bool = True
    ) -> Launch:  # fmt: skip
        return cast(Launch, SimpleNamespace(moved=lambda addresses: SimpleNamespace()))


class KernelNeeds:
    """Kernels by what asks for them, each once, in the order in which they run."""

    def __init__(self, index: Index, limits: Limits, arch: str) -> None:
        self._limits, self._noted = limits, dict[Wanted, None]()
        places = Places(0, 0, {buffer.name: 0 for buffer in device_buffers(index.config, limits)})
        self._program = GpuProgram(index, limits, places, arch, self._note, distinct_layers(index))

    def _note(self, build: Build, entry: str) -> _Note:
        self._noted[build, entry] = None
        return _Note()

    def decode(self, batches: Iterable[int]) -> list[Wanted]:
        """Of decode steps of so many sequences, and of sampling."""
        self._noted.clear()
        for batch in batches:
            self._program.decode(batch, 1, DecodePass(0, 0))
        self._program.sample(1, 0, 0)
        self._program.count_tokens(0, 0, 1, False)
        return list(self._noted)

    def prefill(self, counts: Iterable[int], row_counts: Iterable[int]) -> list[Wanted]:
        """Of prefills of so many tokens, with logits of so many rows; one may come with any of the other."""
        self._noted.clear()
        for count in counts:
            self._program.all_rows(PrefillPass(count, 0, *[0] * 9))
        for rows in row_counts:
            self._program.chosen_rows(PrefillPass(1, rows, *[0] * 9))
        return list(self._noted)

    def everything(self) -> list[Wanted]:
        """Of all passes within the limits."""
        limits = self._limits
        rows = token_classes(limits.max_sequences)
        wanted = self.decode(batch_buckets(limits.max_sequences)) + self.prefill(token_classes(limits.max_tokens), rows)
        return list(dict.fromkeys(wanted))


def batch_bucket(count: int, max_sequences: int) -> int:
    """Rows of the decode step that takes `count` sequences."""
    return min(1 << (count - 1).bit_length(), max_sequences)


def batch_buckets(max_sequences: int) -> list[int]:
    """All of them, ascending."""
    return sorted({batch_bucket(count, max_sequences) for count in range(1, max_sequences + 1)})


def prefill_bucket(count: int) -> int:
    """Tokens of the graph that takes `count`."""
    return -(-count // _PREFILL_UNIT) * _PREFILL_UNIT


def prefill_buckets(max_prefill_tokens: int) -> list[int]:
    """All of them, ascending. Longer prefills take the device longer than making their launches takes the host."""
    return list(range(_PREFILL_UNIT, min(max_prefill_tokens, _MOST_IN_GRAPHS) + 1, _PREFILL_UNIT))


def token_classes(most: int) -> list[int]:
    """Numbers of tokens that ask for all builds that 1 to `most` tokens ask for; up to half a unit has builds of its own."""
    return sorted({1, *range(TOKEN_UNIT, most, TOKEN_UNIT), most})


def distinct_layers(index: Index) -> list[Operation]:
    """The program without layers that are like an earlier one but for values, and with the last one."""
    program = build_program(index)
    by_layer: dict[int, list[Operation]] = {}
    for op in program:
        by_layer.setdefault(op.layer, []).append(op)
    first = {tuple(_signature(index, op) for op in ops): layer for layer, ops in reversed(by_layer.items())}
    kept = {*first.values(), max(by_layer)}
    return [op for op in program if op.layer in kept]


def _signature(index: Index, op: Operation) -> tuple[object, ...]:
    blobs = [index.blob(number) if number >= 0 else None for number in (op.weight, op.bias, op.q_norm, op.k_norm, op.sinks)]
    return op.kind, *((blob.dtype, blob.layout, blob.rows, blob.columns) if blob else None for blob in blobs)
