"""The CuPy backend against the NumPy one on a packed file: the residual stream after all that adds to it, and logits.

Both run one sequence: a prefill, then decode steps whose tokens are the likeliest by the reference. They go side by side, an
operation at a time, so that one residual stream of each is held, however large the model. Errors are of the worst token:
an error over all tokens would be that of the few whose activations are many times as large as others'.

Tolerance: the GPU rounds normalised activations, those within attention and MLP, queries, keys and values to the 16-bit type
of the matrices, with unit roundoff 2^-8 (BF16) or 2^-11 (F16). That rounding alone, put into the NumPy backend, gave relative
errors of the worst token of at most 7.2 units in the dense models of tests/golden and 6.7 in SmolLM2-135M, of 30 layers. What
is above TOLERANCE_UNITS is a fault, or a model that amplifies errors; a fault shows as a jump at one operation, with the later
ones above as well. Mixtures of experts, which this version does not run on the GPU, go above wherever rounding changes which
experts are chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megalith.format.model import ModelConfig
from megalith.format.rope import F32

from .numpy_backend import Activations, NumpyBackend, Span
from .program import Kind, Operation, operation_name

COMPARED = (Kind.EMBED, Kind.PROJECT, Kind.EXPERTS, Kind.HEAD)  # write the residual stream, or logits
DECODE_STEPS = 3
MAX_PROMPT_TOKENS = 512
TOLERANCE_UNITS = 16
UNIT_ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11}

Step = tuple[Operation, F32]  # the residual stream [num_tokens, hidden_size] after an operation, or logits [1, vocab_size]


class Passes(Protocol):
    """One sequence in a backend."""

    def run(self, ids: NDArray[np.int64]) -> Iterator[Step]:
        """Append tokens: all of a prompt, then one at a time. What every operation of COMPARED leaves, in their order."""


@dataclass(frozen=True)
class Difference:
    """Of one operation in one pass. `relative_error` is by the L2 norm over a token's row, of the worst token."""

    step: int  # 0: prefill, then decode steps
    operation: str
    layer: int
    relative_error: float  # infinite where an element is not finite
    largest_difference: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has neither infinity nor NaN: those are null."""
        numbers = {"relative_error": self.relative_error, "largest_difference": self.largest_difference}
        finite = {name: value if np.isfinite(value) else None for name, value in numbers.items()}
        return {"step": self.step, "operation": self.operation, "layer": self.layer if self.layer >= 0 else None, **finite}


def tolerance(element: str) -> float:
    """Largest relative error that rounding to the type of the matrices explains."""
    return TOLERANCE_UNITS * UNIT_ROUNDOFF[element]


def first_above(differences: Iterable[Difference], limit: float) -> Difference | None:
    """In the order in which they were computed."""
    return next((one for one in differences if one.relative_error > limit), None)


def compare(
    reference: Passes, found: Passes, prompt_ids: NDArray[np.int64], decode_steps: int, blob_names: Sequence[str]
) -> Iterator[Difference]:
    """Every operation of every pass, as it is computed."""
    ids = prompt_ids
    for step in range(decode_steps + 1):
        expected = np.zeros((1, 1), np.float32)
        # strict: both passes run to their ends
        for (op, expected), (other, array) in zip(reference.run(ids), found.run(ids), strict=True):
            assert op == other
            yield Difference(step, operation_name(op, blob_names), op.layer, *difference(expected, array))
        ids = np.array([int(expected[-1].argmax())])


def difference(reference: F32, found: F32) -> tuple[float, float]:
    """Largest relative error of a row by its L2 norm, and largest absolute difference; infinite where one is not finite."""
    assert reference.shape == found.shape
    expected = reference.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf
        error = np.abs(found - expected)
    if not np.isfinite(error).all():
        return np.inf, np.inf
    norms, errors = np.linalg.norm(expected, axis=1), np.linalg.norm(error, axis=1)
    relative = np.divide(errors, norms, out=np.where(errors > 0, np.inf, 0.0), where=norms > 0)
    return float(relative.max()), float(error.max())


class NumpyPasses:
    """A sequence in the NumPy backend."""

    def __init__(self, backend: NumpyBackend) -> None:
        self._backend, self._cache = backend, backend.new_cache()

    def run(self, ids: NDArray[np.int64]) -> Iterator[Step]:
        state = Activations.empty()
        span = Span(ids, self._cache, self._cache.length + len(ids), slice(-1, None))
        for op in self._backend.steps([span], state):
            if op.kind in COMPARED:
                yield op, state.a if op.kind is Kind.HEAD else state.x


def num_comparisons(program: Sequence[Operation], decode_steps: int) -> int:
    """How many differences there will be."""
    return (decode_steps + 1) * sum(op.kind in COMPARED for op in program)


def random_prompt(config: ModelConfig) -> list[int]:
    """The same ids every time, for a file without a tokenizer."""
    ids: list[int] = np.random.default_rng(0).integers(0, config.vocab_size, 64).tolist()
    return ids


def bounded_prompt(ids: Sequence[int], max_seq_len: int, decode_steps: int = DECODE_STEPS) -> Sequence[int]:
    """The start of a prompt that is checked: what one prefill takes, with room for the decode steps."""
    return ids[: max(1, min(MAX_PROMPT_TOKENS, max_seq_len - decode_steps))]
