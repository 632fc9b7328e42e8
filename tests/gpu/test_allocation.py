"""After the start nothing allocates: neither CuPy, nor we through the driver, nor the driver for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver, runtime
from golden_models import GoldenModel

import megalith
from megalith.converter.plan import Options
from megalith.runtime.cupy_backend import CupyBackend
from megalith.runtime.cupy_executor import CupyExecutor
from megalith.runtime.executor import PAGE_SIZE, Sampled, SequenceStep
from megalith.runtime.sampler import SamplingParameters

pytestmark = pytest.mark.gpu

MAX_SEQUENCES, MAX_SEQ_LEN, MAX_PREFILL_TOKENS = 19, 1024, 300
ALLOCATING = ("MemAlloc", "MemHostAlloc", "MemHostRegister", "MemCreate", "MemPoolCreate", "MallocAsync", "MallocHost")
LOADING = ("ModuleLoad", "LibraryLoad", "GraphInstantiate", "EventCreate", "StreamCreate")


class AllocatedError(Exception):
    """Raised in place of an allocation."""


def refuse(*arguments: Any, **named: Any) -> Any:
    raise AllocatedError(f"allocated after the start: {arguments} {named}")


@contextmanager
def no_allocation(cupy: Any) -> Iterator[None]:
    """CuPy's allocators and every entry point of the driver and the runtime that makes memory or what needs memory."""
    with pytest.MonkeyPatch.context() as patch:
        for module, prefix in ((driver, "cu"), (runtime, "cuda")):
            starts = tuple(prefix + name for name in ("Malloc", *ALLOCATING, *LOADING))
            names = [name for name in dir(module) if name.startswith(starts) and not isinstance(getattr(module, name), type)]
            assert names
            for name in names:
                patch.setattr(module, name, refuse)
        for name in ("malloc", "mallocAsync", "mallocManaged", "hostAlloc", "hostRegister", "graphInstantiate"):
            patch.setattr(cupy.cuda.runtime, name, refuse)
        cupy.cuda.set_allocator(refuse)
        cupy.cuda.set_pinned_memory_allocator(refuse)
        try:
            yield
        finally:
            cupy.cuda.set_allocator(cupy.get_default_memory_pool().malloc)
            cupy.cuda.set_pinned_memory_allocator(cupy.get_default_pinned_memory_pool().malloc)


@pytest.fixture(scope="module")
def backend(gpu: Any, tmp_path_factory: pytest.TempPathFactory) -> CupyBackend:
    """Warm, as a server has it, for sequences that take split attention too."""
    path = GoldenModel("qwen3").pack(tmp_path_factory.mktemp("allocation"), Options(max_seq_len=MAX_SEQ_LEN))
    with megalith.open(path) as packed:
        made = CupyBackend(
            packed, max_sequences=MAX_SEQUENCES, max_seq_len=MAX_SEQ_LEN, max_prefill_tokens=MAX_PREFILL_TOKENS, warm=True
        )
    print(made.warm_up_report)
    return made


def test_what_is_refused_is_what_allocates(backend: CupyBackend) -> None:
    attempts: list[Callable[[], object]] = [
        lambda: backend.cupy.zeros(4), lambda: backend.cupy.cuda.alloc_pinned_memory(64), lambda: driver.cuMemAlloc(64),
        lambda: runtime.cudaMalloc(64), lambda: backend.cupy.cuda.runtime.malloc(64),
    ]  # fmt: skip
    with no_allocation(backend.cupy):
        for attempt in attempts:
            with pytest.raises(AllocatedError):
                attempt()
    assert not backend.cupy.zeros(4).get().any()


def test_serving_allocates_nothing(backend: CupyBackend) -> None:
    """Batches of every size and length, all ways of choosing, prompts of any length; then the single-sequence interface."""
    free, _ = backend.cupy.cuda.runtime.memGetInfo()
    with no_allocation(backend.cupy):
        for batch in (1, 2, 7, MAX_SEQUENCES):
            found = serve(backend.executor, backend.config.vocab_size, batch)
            assert len(found) == batch
            assert all(0 <= sampled.token < backend.config.vocab_size for results in found for sampled in results)
        sequence = backend.new_cache()
        assert backend.forward(np.arange(65) % 7, sequence, 65, False).shape[0] == 65
        assert np.isfinite(backend.forward(np.array([3]), sequence, 66, True)).all()
        backend.close_cache(sequence)
        assert len(list(backend.generate(np.arange(5), SamplingParameters(), 300))) == 300
    backend.stream.synchronize()
    left, _ = backend.cupy.cuda.runtime.memGetInfo()
    assert left == free


def test_a_prefill_may_be_longer_than_a_context(gpu: Any, tmp_path: Path) -> None:
    """Of several prompts: it is made at the start, and allocates nothing."""
    with megalith.open(GoldenModel("qwen3").pack(tmp_path, Options(max_seq_len=128))) as packed:
        made = CupyBackend(packed, max_sequences=5, max_seq_len=128, max_prefill_tokens=500, warm=True)
    executor, vocab_size = made.executor, made.config.vocab_size
    assert executor.num_pages == 10
    with no_allocation(made.cupy):
        for count in (100, 77):
            prompts = [np.random.default_rng(slot).integers(0, vocab_size, count) for slot in range(5)]
            steps = []
            for slot, prompt in enumerate(prompts):
                executor.start(slot, parameters_of(slot), prompt.tolist())
                steps.append(SequenceStep(slot, prompt, 0, (2 * slot, 2 * slot + 1), True, count))
            found = executor.collect(executor.submit(steps))
            assert [sampled.slot for sampled in found] == list(range(5))
            assert all(sampled.finite and 0 <= sampled.token < vocab_size for sampled in found)


def serve(executor: CupyExecutor, vocab_size: int, batch: int) -> list[list[Sampled]]:
    """Prefill in chunks of odd sizes, prompts scored, then decoding, in every third step with a mask on every other one."""
    rng = np.random.default_rng(batch)
    pages = executor.num_pages // executor.max_sequences
    tables = [tuple(range(pages * i, pages * (i + 1))) for i in range(batch)]
    lengths = rng.integers(2, pages * PAGE_SIZE - 40, batch) if batch < MAX_SEQUENCES else np.arange(2, 2 + batch)
    found: list[list[Sampled]] = [[] for _ in range(batch)]
    for slot in range(batch):
        prompt = rng.integers(0, vocab_size, lengths[slot])
        executor.start(slot, parameters_of(slot), prompt.tolist())
        for start in range(0, len(prompt), MAX_PREFILL_TOKENS):
            chunk = prompt[start : start + MAX_PREFILL_TOKENS]
            end = start + len(chunk)
            targets = np.append(chunk[1:], -1) if slot % 4 == 1 else None
            step = SequenceStep(slot, chunk, start, tables[slot], end == len(prompt), end, targets=targets)
            found[slot] += [one for one in executor.collect(executor.submit([step])) if one.token >= 0]
    even_ids = np.full(-(-vocab_size // 32), 0x55555555, np.int32)
    for count in range(30):
        masks = [even_ids if count % 3 == 2 and slot % 2 == 0 else None for slot in range(batch)]
        steps = [
            SequenceStep(slot, None, int(length) + count, tables[slot], True, int(length) + count + 1, masks[slot])
            for slot, length in enumerate(lengths)
        ]
        for slot, one in enumerate(executor.collect(executor.submit(steps))):
            assert masks[slot] is None or one.token % 2 == 0
            found[slot].append(one)
    return found


def parameters_of(slot: int) -> SamplingParameters:
    """Greedy, drawn, penalised, with log probabilities and biases, in turn."""
    ways = [
        SamplingParameters(), SamplingParameters(0.8, 20, 0.9, 0.01, seed=slot), SamplingParameters(repetition_penalty=1.3),
        SamplingParameters(1.0, seed=slot, top_logprobs=5, logit_bias=((3, 2.0), (5, -100.0))),
    ]  # fmt: skip
    return ways[slot % len(ways)]
