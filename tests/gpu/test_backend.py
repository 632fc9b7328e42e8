"""Whole models on the GPU against transformers' FP32 and 16-bit runs (the golden files of the NumPy backend's tests)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import CASES, GoldenModel, relative_error

import megalith
from megalith.converter.plan import Options
from megalith.format.errors import RequestError, UnsupportedError
from megalith.runtime.cupy_backend import CupyBackend
from megalith.runtime.cupy_executor import CupyExecutor
from megalith.runtime.engine import Engine
from megalith.runtime.executor import Sampled, SequenceStep
from megalith.runtime.sampler import SamplingParameters

pytestmark = pytest.mark.gpu
DENSE = [case for case in CASES if GoldenModel(case).folder.parent.name == "models" and case != "llama_dynamic"]
MARGIN = 1.05  # errors of two roundings of one model are close where the model adds little to them
QUANTISED_MARGIN = 1.5  # the yardstick is of the model before it was quantised


def load(model: GoldenModel, folder: Path, most_tokens: int) -> Engine:
    declared = model.config["max_position_embeddings"]
    assert isinstance(declared, int)
    return megalith.load(model.pack(folder, Options(max_seq_len=max(most_tokens, declared))), backend="cupy")


@pytest.mark.parametrize("golden", DENSE, indirect=True)
def test_logits_match_transformers(gpu: Any, golden: GoldenModel, tmp_path: Path) -> None:
    sets = golden.id_sets()
    engine = load(golden, tmp_path, max(len(ids["ids"]) for ids in sets))
    for ids in sets:
        found = engine.logits(ids["ids"])[ids["positions"]]
        error, bound = relative_error(found, ids["logits_fp32"]), relative_error(ids["logits_bf16"], ids["logits_fp32"])
        print(golden.name, len(ids["ids"]), f"{error:.3e} against {bound:.3e}")
        assert error <= MARGIN * bound
        np.testing.assert_array_equal(engine.logits(ids["ids"])[ids["positions"]], found)


@pytest.mark.parametrize("golden", ["llama2", "mistral_window", "qwen3", "qwen2", "llama_mqa", "qwen3_tied_mqa"], indirect=True)
def test_decoding_token_by_token_matches_too(gpu: Any, golden: GoldenModel, tmp_path: Path) -> None:
    ids = golden.id_sets()[0]
    engine = load(golden, tmp_path, len(ids["ids"]))
    cache = engine.backend.new_cache()
    rows = [engine.backend.forward(ids["ids"][i : i + 1], cache, i + 1, True)[0] for i in range(len(ids["ids"]))]
    error = relative_error(np.array(rows)[ids["positions"]], ids["logits_fp32"])
    bound = relative_error(ids["logits_bf16"], ids["logits_fp32"])
    print(golden.name, f"{error:.3e} against {bound:.3e}")
    assert error <= MARGIN * bound


@pytest.mark.parametrize("golden", ["llama2", "qwen3", "qwen2", "llama_mqa", "llama_bias"], indirect=True)
def test_mxfp4_matches_the_numpy_backend(gpu: Any, golden: GoldenModel, tmp_path: Path) -> None:
    """In prefill and token by token; NumPy computes with the decoded weights in float32."""
    ids = golden.id_sets()[0]
    tokens, declared = ids["ids"][:64], golden.config["max_position_embeddings"]
    assert isinstance(declared, int)
    packed = golden.pack(tmp_path, Options(linear="mxfp4", max_seq_len=max(declared, len(tokens))))
    engine, reference = megalith.load(packed, backend="cupy"), megalith.load(packed, backend="numpy").logits(tokens)
    found, cache = engine.logits(tokens), engine.backend.new_cache()
    decoded = np.array([engine.backend.forward(tokens[i : i + 1], cache, i + 1, True)[0] for i in range(len(tokens))])
    bound = QUANTISED_MARGIN * relative_error(ids["logits_bf16"], ids["logits_fp32"])
    errors = relative_error(found, reference), relative_error(decoded, reference)
    print(golden.name, "prefill {:.3e}, decode {:.3e}".format(*errors), f"against {bound:.3e}")
    assert max(errors) <= bound


@pytest.mark.parametrize("golden", ["llama_fp16"], indirect=True)
def test_mxfp4_beside_fp16_is_refused(gpu: Any, golden: GoldenModel, tmp_path: Path) -> None:
    packed = golden.pack(tmp_path, Options(linear="mxfp4"))
    with pytest.raises(UnsupportedError, match="MXFP4 matrices beside BF16 ones, not beside FP16"):
        megalith.load(packed, backend="cupy")


@pytest.mark.parametrize("golden", ["llama2", "qwen3"], indirect=True)
def test_generation_follows_the_logits(gpu: Any, golden: GoldenModel, tmp_path: Path) -> None:
    engine = load(golden, tmp_path, 256)
    prompt = golden.id_sets()[0]["ids"][:21].tolist()
    found = [token.id for token in engine.generate_tokens(prompt, max_tokens=80, ignore_eos=True)]
    cache = engine.backend.new_cache()
    logits = engine.backend.forward(np.array(prompt), cache, len(prompt), True)
    for token in found:
        assert token == int(np.argmax(logits[-1]))
        logits = engine.backend.forward(np.array([token]), cache, cache.length + 1, True)
    engine.backend.close_cache(cache)
    parameters = SamplingParameters(0.9, 40, 0.95, 0.01, seed=7, repetition_penalty=1.2, frequency_penalty=0.1)
    runs = [[t.id for t in engine.generate_tokens(prompt, parameters, max_tokens=60, ignore_eos=True)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0] != found[:60]


@pytest.mark.parametrize("golden", ["llama_dynamic"], indirect=True)
def test_dynamic_rope_ends_with_its_table(gpu: Any, golden: GoldenModel, tmp_path: Path) -> None:
    packed = golden.pack(tmp_path)
    engine, reference = megalith.load(packed, backend="cupy"), megalith.load(packed, backend="numpy")
    assert engine.max_seq_len < reference.max_seq_len
    ids = list(range(1, engine.max_seq_len + 1))
    assert relative_error(engine.logits(ids), reference.logits(ids)) < 2e-2
    with pytest.raises(RequestError, match=f"at most {engine.max_seq_len} fit"):
        engine.logits([*ids, 1])
    assert len(list(engine.generate_tokens(ids[:-3], max_tokens=10, ignore_eos=True))) == 3


@pytest.mark.parametrize("golden", ["llama2", "qwen3"], indirect=True)
@pytest.mark.parametrize("invariant", [False, True])
def test_many_sequences_get_what_each_gets_alone(gpu: Any, golden: GoldenModel, invariant: bool, tmp_path: Path) -> None:
    """Up to eight whose products take the same kernel; with batch invariance any number."""
    count = 40 if invariant else 8
    options: dict[str, Any] = {"batch_invariant": True} if invariant else {}
    rng = np.random.default_rng(1)
    declared = golden.config["vocab_size"]
    assert isinstance(declared, int)
    prompts = [rng.integers(0, declared, int(rng.integers(3, 150))) for _ in range(count)]
    parameters = [SamplingParameters(0.8 * (i % 2), seed=i, top_logprobs=i % 4 - 1 if i % 4 else None) for i in range(count)]
    with megalith.open(golden.pack(tmp_path, Options(max_seq_len=512))) as packed:
        together = CupyExecutor(CupyBackend(packed, max_sequences=count, max_seq_len=512, **options))
        alone = CupyExecutor(CupyBackend(packed, max_sequences=1, max_seq_len=512, **options))
    batch = run_all(together, prompts, parameters, 40)
    for i, prompt in list(enumerate(prompts))[:11]:
        [single] = run_all(alone, [prompt], parameters[i : i + 1], 40)
        assert [sampled.token for sampled in single] == [sampled.token for sampled in batch[i]]
        assert [sampled.logprob for sampled in single] == [sampled.logprob for sampled in batch[i]]
        assert [sampled.top for sampled in single] == [sampled.top for sampled in batch[i]]


@pytest.mark.parametrize("golden", ["llama2", "qwen3"], indirect=True)
def test_decoding_beside_prompts_in_one_pass(gpu: Any, golden: GoldenModel, tmp_path: Path) -> None:
    """What sequences get where their steps share passes with the chunks of other prompts, and where they do not."""
    rng = np.random.default_rng(2)
    vocab_size = golden.config["vocab_size"]
    assert isinstance(vocab_size, int)
    prompts = [rng.integers(0, vocab_size, count) for count in (5, 100, 64)]
    late = rng.integers(0, vocab_size, 150)
    found = []
    with megalith.open(golden.pack(tmp_path, Options(max_seq_len=512))) as packed:
        for together, warm in ((False, False), (True, False), (True, True)):
            backend = CupyBackend(packed, max_sequences=4, max_seq_len=512, max_prefill_tokens=512, warm=warm)
            executor = CupyExecutor(backend)
            tables = [tuple(range(8 * slot, 8 * slot + 8)) for slot in range(4)]
            for slot, prompt in enumerate([*prompts, late]):
                executor.start(slot, SamplingParameters(top_logprobs=2), prompt.tolist())
            steps = [SequenceStep(slot, ids, 0, tables[slot], True, len(ids)) for slot, ids in enumerate(prompts)]
            results = executor.collect(executor.submit(steps))
            for turn, (start, stop) in enumerate(((0, 70), (70, 150))):
                places = [len(prompt) + turn for prompt in prompts]
                decode = [SequenceStep(slot, None, at, tables[slot], True, at + 1) for slot, at in enumerate(places)]
                chunk = SequenceStep(3, late[start:stop], start, tables[3], stop == len(late), stop)
                passes = [[chunk, *decode]] if together else [[chunk], decode]
                assert executor._go_together([chunk], decode) is (gpu.arch == "sm_90a" and golden.name == "qwen3")
                results += [sampled for steps in passes for sampled in executor.collect(executor.submit(steps))]
            found.append({(sampled.slot, i): sampled for i, sampled in enumerate(sorted(results, key=lambda one: one.slot))})
    apart, *others = found
    for mixed in others:
        assert apart.keys() == mixed.keys()
        for key, one in sorted(apart.items()):
            assert mixed[key].top[0][1] == pytest.approx(one.top[0][1], abs=0.05)
            is_clear = one.top[0][1] - one.top[1][1] > 0.1
            assert mixed[key].token == one.token or not is_clear


@pytest.mark.parametrize("golden", ["llama2", "qwen3", "mistral_window", "llama_mqa"], indirect=True)
@pytest.mark.parametrize("linear", ["bf16", "mxfp4"])
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_chosen_rows_alone_get_what_they_get_among_all(
    gpu: Any, golden: GoldenModel, linear: str, invariant: bool, warm: bool, tmp_path: Path
) -> None:
    """The last layer for some tokens against the whole one: of one sequence, of the ends of some, of many; `warm`: as a graph
    of more tokens than there are.
    """
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 60, 20).tolist()
    firsts = np.concatenate([[0], np.cumsum(counts)[:-1]]).tolist()
    vocab_size = golden.config["vocab_size"]
    assert isinstance(vocab_size, int)
    ids = rng.integers(0, vocab_size, sum(counts))
    options = Options(max_seq_len=512) if linear == "bf16" else Options(linear=linear, max_seq_len=512)
    with megalith.open(golden.pack(tmp_path, options)) as packed:
        sizes = {"max_sequences": 24, "max_seq_len": 64, "max_prefill_tokens": 1280}
        backend = CupyBackend(packed, **sizes, batch_invariant=invariant, warm=warm)  # type: ignore[arg-type]
    assert sum(counts) % 32
    assert sum(counts) < 1024
    caches = [backend.new_cache() for _ in counts]
    for cache, count in zip(caches, counts, strict=True):
        backend.reserve(cache, count)
    sequences = [(cache.slot, first, count, 0) for cache, first, count in zip(caches, firsts, counts, strict=True)]
    ends = [first + count - 1 for first, count in zip(firsts, counts, strict=True)]
    for rows in ([ends[7]], ends[3:8], ends, [5, 2, *ends[:9]]):
        backend.prefill(ids, sequences, [], whole=True)
        whole = backend.logits_of(rows)
        backend.prefill(ids, sequences, rows)
        chosen = backend.read_logits(len(rows))
        assert np.abs(whole).max() > 0.1
        assert relative_error(chosen, whole) < 2e-2
        if invariant and backend.limits.has_wgmma:
            np.testing.assert_array_equal(chosen, whole)
    backend.prefill(ids, sequences, [])  # leaves keys and values of all layers
    for cache, count in zip(caches, counts, strict=True):
        cache.length = count
    backend.prefill(ids, sequences, ends)
    first = backend.read_logits(len(ends))
    slots, places = np.array([cache.slot for cache in caches], np.int32), np.array(counts, np.int32) - 1
    for slot, end in zip(slots, ends, strict=True):
        backend.set_last_token(int(slot), int(ids[end]))
    backend.decode_step(places, slots)
    assert relative_error(backend.read_logits(len(ends)), first) < 2e-2


def run_all(
    executor: CupyExecutor, prompts: list[np.ndarray], parameters: list[SamplingParameters], count: int
) -> list[list[Sampled]]:
    """`count` tokens for every prompt, all sequences in every pass; a run's sequence i takes slot i."""
    tables = [tuple(range(8 * i, 8 * i + 8)) for i in range(len(prompts))]
    for slot, (prompt, chosen) in enumerate(zip(prompts, parameters, strict=True)):
        executor.start(slot, chosen, prompt.tolist())
    steps = [SequenceStep(i, prompt, 0, tables[i], True, len(prompt)) for i, prompt in enumerate(prompts)]
    found = []
    for first in range(0, len(steps), 8):  # a pass each at most, whose results wait for `collect`
        found += [[sampled] for sampled in executor.collect(executor.submit(steps[first : first + 8]))]
    pending = []
    for step in range(count - 1):
        places = [len(prompt) + step for prompt in prompts]
        pending.append(executor.submit([SequenceStep(i, None, at, tables[i], True, at + 1) for i, at in enumerate(places)]))
        if len(pending) == 2:
            for i, sampled in enumerate(executor.collect(pending.pop(0))):
                found[i].append(sampled)
    for ticket in pending:
        for i, sampled in enumerate(executor.collect(ticket)):
            found[i].append(sampled)
    return found
