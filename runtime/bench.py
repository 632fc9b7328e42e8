"""Times of loading, prefill and decode on the GPU, as the engine runs them: kernels, copies, sampling, the host's part.

A start is from opening the file to a backend that is ready, while it loads kernels too; a load is of the file alone, once more
into the arena. Kernels that are not in the cache are compiled on first use.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalith.format.reader import PackedFile

from .cupy_backend import CupyBackend
from .cupy_device import longest_context
from .cupy_executor import CupyExecutor
from .kernel_spans import TRACED_DECODE_STEPS
from .sampler import SamplingParameters
from .trace import Trace, host_span

DECODE_STEPS = 32  # timed together: the host enqueues them ahead of the device
DECODE_SAMPLES = 7
PREFILL_SAMPLES = 5
LOAD_SAMPLES = 5
NOMINAL_GBYTES_PER_S = {"H200": 4800.0, "H100 80GB HBM3": 3350.0}


@dataclass(frozen=True)
class Result:
    """One figure; None where it does not apply. `ms` is of one decode step, one prefill, one load."""

    work: str
    path: str | None
    batch: int | None
    context: int | None
    ms: float
    tokens_per_s: float | None
    gbytes_per_s: float | None
    percent_nominal: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """What to measure: (batch, context) pairs for decode, prompt lengths for prefill."""

    decode: Sequence[tuple[int, int]]
    prefill: Sequence[int]
    use_graphs: bool = True


class Bench:
    """One loaded file under the stopwatch. With a trace every figure's work runs once more, for spans of its kernels."""

    def __init__(self, path: Path, plan: Plan, trace: Trace | None = None) -> None:
        self._plan, self._trace = plan, trace
        longest = max([context for _, context in plan.decode] + list(plan.prefill))
        pages = max(
            [batch * -(-(context + 2 * DECODE_STEPS) // 64) for batch, context in plan.decode]
            + [-(-n // 64) for n in plan.prefill]
        )
        begun = time.perf_counter()
        with PackedFile(path) as packed:
            self.config = packed.index.config
            self._backend = CupyBackend(
                packed,
                max_seq_len=min(longest + 4 * DECODE_STEPS, longest_context(packed.index, None)),
                max_sequences=max([batch for batch, _ in plan.decode] + [1]),
                max_prefill_tokens=max([*plan.prefill, 2048]),
                num_pages=pages,
                use_graphs=plan.use_graphs,
                trace=trace,
            )
            self._start_seconds = time.perf_counter() - begun
            self._weight_bytes = self._bytes_of_a_step(packed)
            self._loads = [self._backend.copy_file(packed) for _ in range(LOAD_SAMPLES)]
        self._rng = np.random.default_rng(0)

    @property
    def device(self) -> str:
        """Name of the GPU."""
        return self._backend.facts.name

    def results(self) -> Iterator[Result]:
        """Start and load, then the plan's, in its order."""
        plan, nbytes = self._plan, self._loads[0].nbytes
        seconds = statistics.median(report.seconds for report in self._loads)
        yield Result("start", None, None, None, self._start_seconds * 1e3, None, None, None)
        yield Result("load", None, None, None, seconds * 1e3, None, nbytes / seconds / 1e9, None)
        self._backend.load_kernels([batch for batch, _ in plan.decode], [*plan.prefill, *(held for _, held in plan.decode)])
        for tokens in plan.prefill:
            with host_span(self._trace, f"prefill {tokens}"):
                result = self._prefill(tokens)
            yield result
        for batch, context in plan.decode:
            with host_span(self._trace, f"decode {batch}:{context}"):
                result = self._decode(batch, context)
            yield result

    def _bytes_of_a_step(self, packed: PackedFile) -> int:
        """Weights that one decode step reads: all but the embedding where the head is another matrix."""
        index = packed.index
        names = index.blobs.names
        skipped = 0 if self.config.tie_word_embeddings else index.blob(names.index("embed_tokens")).nbytes
        return sum(index.blob(i).nbytes for i in range(len(names))) - skipped

    def _prefill(self, tokens: int) -> Result:
        ids = self._rng.integers(0, self.config.vocab_size, tokens)

        def once() -> None:
            cache = self._backend.new_cache()
            self._backend.forward(ids, cache, tokens, True)
            self._backend.close_cache(cache)

        seconds = self._median(once, 1, PREFILL_SAMPLES)
        if self._backend.kernel_spans is not None:
            self._backend.kernel_spans.allow(prefills=1)
            once()
        return Result("prefill", None, 1, tokens, seconds * 1e3, tokens / seconds, None, None)

    def _decode(self, batch: int, context: int) -> Result:
        backend = self._backend
        caches = [backend.new_cache() for _ in range(batch)]
        for cache in caches:
            backend.forward(self._rng.integers(0, self.config.vocab_size, context), cache, context, True)
            backend.reserve(cache, context + 2 * DECODE_STEPS)
        slots = np.array([cache.slot for cache in caches], np.int32)
        executor = CupyExecutor(backend)
        for cache in caches:  # greedy
            executor.start(cache.slot, SamplingParameters(), [0])

        def steps(count: int = DECODE_STEPS) -> None:
            for step in range(count):
                backend.decode_step(np.full(batch, context + step, np.int32), slots, sampled=True)

        seconds = self._median(steps, DECODE_STEPS, DECODE_SAMPLES)
        if backend.kernel_spans is not None:
            backend.kernel_spans.allow(decode_steps=TRACED_DECODE_STEPS)
            steps(TRACED_DECODE_STEPS)
        for cache in caches:
            backend.close_cache(cache)
        kv_bytes = batch * context * self._kv_bytes_per_token()
        gigabytes = (self._weight_bytes + kv_bytes) / seconds / 1e9
        nominal = next((rate for name, rate in NOMINAL_GBYTES_PER_S.items() if name in backend.facts.name), None)
        percent = 100 * gigabytes / nominal if nominal else None
        path = "graph" if self._plan.use_graphs else "launches"
        return Result("decode", path, batch, context, seconds * 1e3, batch / seconds, gigabytes, percent)

    def _kv_bytes_per_token(self) -> int:
        return 4 * self.config.num_hidden_layers * self.config.num_key_value_heads * self.config.head_dim

    def _median(self, work: Callable[[], None], count: int, samples: int) -> float:
        """Seconds of one of `count` things that `work` enqueues, from the host's clock around all of them."""
        stream = self._backend.stream
        seconds = []
        for sample in range(samples + 1):
            stream.synchronize()
            begun = time.perf_counter()
            work()
            stream.synchronize()
            if sample:  # the first one warms up
                seconds.append((time.perf_counter() - begun) / count)
        return statistics.median(seconds)
