"""The NumPy backend behind the executor's interface: a pool of pages, block tables, sampling on the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megalith.format.model import ModelConfig
from megalith.format.rope import F32

from .executor import PAGE_SIZE, Sampled, Score, SequenceStep, Ticket, unpack_mask
from .numpy_backend import NumpyBackend, Span
from .sampler import SamplingParameters, TokenCounts, log_probabilities, sample


class PagePool:
    """float32 [num_layers, num_key_value_heads, num_pages, PAGE_SIZE, head_dim], for keys and for values."""

    def __init__(self, config: ModelConfig, num_pages: int) -> None:
        shape = (config.num_hidden_layers, config.num_key_value_heads, num_pages, PAGE_SIZE, config.head_dim)
        self.keys: F32 = np.zeros(shape, np.float32)
        self.values: F32 = np.zeros(shape, np.float32)


def page_bytes(config: ModelConfig) -> int:
    """Memory of one page, keys and values of all layers."""
    return 2 * 4 * config.num_hidden_layers * config.kv_rows * PAGE_SIZE


class PagedCache:
    """One sequence's keys and values in the pages of its block table."""

    def __init__(self, pool: PagePool, block_table: tuple[int, ...], length: int) -> None:
        self.length = length
        self._pool = pool
        self._table = block_table
        first, count = block_table[0], len(block_table)
        # pages that follow one another need no copy
        self._pages: slice | list[int] = list(block_table)
        if block_table == tuple(range(first, first + count)):
            self._pages = slice(first, first + count)

    def append(self, layer: int, k: F32, v: F32) -> None:
        positions = np.arange(self.length, self.length + len(k))
        pages, offsets = np.asarray(self._table)[positions // PAGE_SIZE], positions % PAGE_SIZE
        self._pool.keys[layer][:, pages, offsets] = k.swapaxes(0, 1)
        self._pool.values[layer][:, pages, offsets] = v.swapaxes(0, 1)

    def view(self, layer: int, stop: int) -> tuple[F32, F32]:
        keys, values = self._pool.keys[layer][:, self._pages], self._pool.values[layer][:, self._pages]
        shape = (len(keys), -1, keys.shape[-1])
        return keys.reshape(shape)[:, :stop], values.reshape(shape)[:, :stop]


@dataclass
class _Slot:
    """Sampling state of one sequence."""

    parameters: SamplingParameters
    counts: TokenCounts | None
    last_token: int = -1


class NumpyExecutor:
    """Runs a pass when it is collected: there is no device to keep busy, so nothing is submitted ahead."""

    page_size = PAGE_SIZE

    def __init__(
        self, backend: NumpyBackend, *, num_pages: int, max_sequences: int, max_seq_len: int, steps_ahead: int = 0
    ) -> None:
        config = backend.config
        self.num_pages, self.max_sequences = num_pages, max_sequences
        self.max_seq_len, self.vocab_size = max_seq_len, config.vocab_size
        self.steps_ahead = steps_ahead
        self.reuses_pages = backend.rotations.fixed
        self._backend = backend
        self._pool = PagePool(config, num_pages)
        self._slots: list[_Slot | None] = [None] * max_sequences
        self._queue: dict[int, Sequence[SequenceStep]] = {}
        self._submitted = 0

    def start(
        self, slot: int, parameters: SamplingParameters, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()
    ) -> None:
        counts = TokenCounts(self.vocab_size, prompt_ids, output_ids) if parameters.counts_tokens else None
        self._slots[slot] = _Slot(parameters, counts)

    def submit(self, steps: Sequence[SequenceStep]) -> Ticket:
        self._submitted += 1
        self._queue[self._submitted] = steps
        return Ticket(self._submitted)

    def collect(self, ticket: Ticket) -> list[Sampled]:
        return list(self._run(self._queue.pop(ticket.number)))

    def close(self) -> None:
        self._queue.clear()

    def _run(self, steps: Sequence[SequenceStep]) -> Iterator[Sampled]:
        logits = self._backend.forward_batch([self._span(step) for step in steps])
        first = 0
        for step in steps:
            count = step.num_tokens if step.targets is not None else int(step.sample)
            rows = logits[first : first + count]
            first += count
            if count:
                yield self._result(step, rows)

    def _span(self, step: SequenceStep) -> Span:
        ids = step.token_ids if step.token_ids is not None else np.array([self._slot(step).last_token])
        rows = slice(None) if step.targets is not None else slice(-1, None) if step.sample else slice(0, 0)
        return Span(ids, PagedCache(self._pool, step.block_table, step.start), step.seq_len, rows)

    def _slot(self, step: SequenceStep) -> _Slot:
        slot = self._slots[step.slot]
        assert slot is not None
        return slot

    def _result(self, step: SequenceStep, rows: F32) -> Sampled:
        """Of logits float32 [num_tokens or 1, vocab_size]."""
        if not np.isfinite(rows).all():
            return Sampled(step.slot, -1, finite=False)
        slot, position = self._slot(step), step.start + step.num_tokens
        wanted = slot.parameters.top_logprobs
        scores: tuple[Score, ...] = ()
        if step.targets is not None:
            pairs = zip(rows, step.targets.tolist(), strict=True)
            scores = tuple(Score(*log_probabilities(row, target, wanted or 0)) for row, target in pairs if target >= 0)
        if not step.sample:
            return Sampled(step.slot, -1, scores=scores)
        allowed = unpack_mask(step.allowed, self.vocab_size) if step.allowed is not None else None
        token = sample(rows[-1], slot.parameters, position, slot.counts, allowed)
        slot.last_token = token
        if slot.counts is not None:
            slot.counts.add(token)
        if wanted is None:
            return Sampled(step.slot, token, scores=scores)
        return Sampled(step.slot, token, *log_probabilities(rows[-1], token, wanted), scores=scores)
