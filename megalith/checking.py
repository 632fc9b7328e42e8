"""`generate --check`: what the backends' comparison found, for people and as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from megalith.format.reader import PackedFile
from megalith.runtime.check import (
    DECODE_STEPS,
    Difference,
    NumpyPasses,
    bounded_prompt,
    compare,
    first_above,
    num_comparisons,
    random_prompt,
    tolerance,
)
from megalith.runtime.engine import checked_ids
from megalith.runtime.numpy_backend import NumpyBackend

from .output import show_progress

_HEADINGS = ("relative error", "largest difference")


@dataclass(frozen=True)
class Report:
    """All differences of one check, in the order in which they were computed."""

    gpu: str
    element: str
    prompt_ids: list[int]
    differences: list[Difference]

    @property
    def tolerance(self) -> float:
        return tolerance(self.element)

    @property
    def first_above(self) -> Difference | None:
        return first_above(self.differences, self.tolerance)

    def to_dict(self) -> dict[str, Any]:
        first = self.first_above
        return {
            "ok": first is None,
            "gpu": self.gpu,
            "element": self.element,
            "tolerance": self.tolerance,
            "prompt_ids": self.prompt_ids,
            "decode_steps": DECODE_STEPS,
            "first_above": first.to_dict() if first else None,
            "results": [one.to_dict() for one in self.differences],
        }

    def lines(self) -> Iterator[str]:
        """A row per operation: its prefill, and the worst of its decode steps."""
        yield f"{self.gpu} against NumPy, {self.element}, {len(self.prompt_ids)} prompt tokens, {DECODE_STEPS} decode steps"
        yield f"{'':22}{'prefill':>36}{'decode, worst step':>36}"
        yield f"{'layer':>5}  {'operation':15}" + "".join(f"  {heading:>{len(heading)}}" for heading in _HEADINGS * 2)
        per_pass = len(self.differences) // (DECODE_STEPS + 1)
        for i, prefill in enumerate(self.differences[:per_pass]):
            decode = self.differences[per_pass + i :: per_pass]
            worst = max(decode, key=lambda one: one.relative_error)
            numbers = (
                prefill.relative_error, prefill.largest_difference, worst.relative_error,
                max(one.largest_difference for one in decode),
            )  # fmt: skip
            cells = [f"  {value:>{len(heading)}.2e}" for value, heading in zip(numbers, _HEADINGS * 2, strict=True)]
            mark = "  above" if max(prefill.relative_error, worst.relative_error) > self.tolerance else ""
            yield f"{_layer(prefill):>5}  {prefill.operation:15}{''.join(cells)}{mark}"
        yield self._verdict()

    def _verdict(self) -> str:
        first = self.first_above
        if first is None:
            return f"all relative errors are within {self.tolerance:.2e}"
        work = f"decode step {first.step}" if first.step else "prefill"
        layer = f"layer {first.layer}, " if first.layer >= 0 else ""
        return f"first above {self.tolerance:.2e}: {work}, {layer}{first.operation}: {first.relative_error:.2e}"


def _layer(one: Difference) -> str:
    return str(one.layer) if one.layer >= 0 else ""


def check(path: str | os.PathLike[str], prompt_ids: Sequence[int] | None = None) -> Report:
    """Compare on the start of a prompt, by default of 64 random ids. UnsupportedError without a GPU."""
    from megalith.runtime.cupy_backend import CupyBackend
    from megalith.runtime.cupy_device import longest_context
    from megalith.runtime.cupy_passes import CupyPasses

    with PackedFile(path) as packed:
        config, names = packed.index.config, packed.index.blobs.names
        limit = longest_context(packed.index, None)  # of both
        whole = random_prompt(config) if prompt_ids is None else prompt_ids
        ids = checked_ids(bounded_prompt(whole, limit), config.vocab_size, limit)
        gpu = CupyBackend(packed, max_seq_len=len(ids) + DECODE_STEPS, max_prefill_tokens=len(ids))
        reference = NumpyBackend(packed)
    steps = compare(NumpyPasses(reference), CupyPasses(gpu), ids, DECODE_STEPS, names)
    total = num_comparisons(reference.program, DECODE_STEPS)
    found = list(tqdm(steps, "comparing", total, disable=not show_progress(True)))
    return Report(gpu.facts.name, gpu.program.element, ids.tolist(), found)
