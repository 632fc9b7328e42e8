"""`sampling.cu` against the reference sampler, with penalties and log probabilities added here in NumPy."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalith.runtime import sampling_state
from megalith.runtime.sampler import SamplingParameters, sample
from megalith.runtime.sampling_state import ARGUMENTS, BIAS, MAX_BIASED_TOKENS, RESULT, ROW, SLOT, row_pitch, sampling_grid

KERNELS = Path(sampling_state.__file__).resolve().parent / "kernels"
RING_STEPS = 3
EOS = (3, 11)
C_TYPES = {"double": "f8", "float": "f4", "int": "i4", "u32": "u4", "u64": "u8"}


@dataclass(frozen=True)
class Request:
    """What one slot asks for, and what it has said so far."""

    parameters: SamplingParameters = field(default_factory=SamplingParameters)
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    biases: tuple[tuple[int, float], ...] = ()
    top_logprobs: int = -1
    prompt: tuple[int, ...] = ()
    generated: tuple[int, ...] = ()
    position: int = 7
    last_position: int = 1 << 30
    ignore_eos: bool = False
    allowed: np.ndarray | None = None  # bool [vocab_size], a grammar's mask


def adjusted(logits: np.ndarray, request: Request) -> np.ndarray:
    """float32, each step rounded: bias, repetition, frequency, presence; the least finite float where a mask says no."""
    x = logits.copy()
    for token, bias in request.biases:
        x[token] += np.float32(bias)
    generated = np.bincount(np.array(request.generated, np.int64), minlength=len(x))
    seen = generated > 0
    seen[list(request.prompt)] = True
    repetition = np.float32(request.repetition)
    x = np.where(seen, np.where(x > 0, x / repetition, x * repetition), x)
    x = x - np.float32(request.frequency) * generated.astype(np.float32)
    x = np.asarray(x - np.where(generated > 0, np.float32(request.presence), np.float32(0)), np.float32)
    return x if request.allowed is None else np.where(request.allowed, x, np.finfo(np.float32).min)


def reference(logits: np.ndarray, request: Request) -> int:
    return sample(adjusted(logits, request), request.parameters, request.position + 1)


def is_tie(logits: np.ndarray, request: Request) -> bool:
    """Whether float64 rounding decides what the reference draws: a limit or the draw within 1e-10 of a token's boundary."""
    p = request.parameters
    scaled = np.sort(adjusted(logits, request))[::-1].astype(np.float64) / p.temperature
    weights = np.exp(scaled - scaled[0])[: p.top_k or None]
    weights /= weights.sum()
    cumulative = np.cumsum(weights)
    if p.top_p < 1 and np.abs(cumulative - p.top_p).min() < 1e-10:
        return True
    kept = max(1, np.count_nonzero(cumulative - weights < p.top_p)) if p.top_p < 1 else len(weights)
    kept = min(kept, max(1, np.count_nonzero(weights >= p.min_p * weights[0])))
    u = np.random.Generator(np.random.Philox(key=p.seed, counter=request.position + 1)).random()
    return bool(np.abs(cumulative[:kept] / cumulative[kept - 1] - u).min() < 1e-10)


def count_ties(logits: np.ndarray, requests: list[Request], tokens: np.ndarray) -> int:
    """Draws that differ from the reference's, each of which must be a tie."""
    ties = 0
    for i, (row, request, token) in enumerate(zip(logits, requests, tokens, strict=True)):
        if token != reference(row, request):
            assert is_tie(row, request), f"row {i}: {token} instead of {reference(row, request)}, {request}"
            ties += 1
    return ties


@dataclass
class Outcome:
    """What the device holds after a launch."""

    results: np.ndarray  # RESULT [rows]
    last_token: np.ndarray
    finished: np.ndarray
    positions: np.ndarray
    counts: np.ndarray
    work: np.ndarray
    step: np.ndarray


class Sampler:
    """Device state for some rows; row i has slot `slots[i]`."""

    def __init__(self, gpu: Any, logits: np.ndarray, requests: list[Request], slots: np.ndarray, num_slots: int) -> None:
        self.gpu, self.rows, self.vocab_size, self.slots = gpu, len(logits), logits.shape[1], slots
        pitch = row_pitch(self.vocab_size)
        padded = np.full((self.rows, pitch), np.nan, np.float32)
        padded[:, : self.vocab_size] = logits
        parameters, biases = np.zeros(num_slots, SLOT), np.zeros((num_slots, MAX_BIASED_TOKENS), BIAS)
        for slot, request in zip(slots, requests, strict=True):
            if slot >= 0:
                parameters[slot] = _slot(request)
                biases[slot, : len(request.biases)] = np.array(list(request.biases), BIAS)
        self.buffers = {
            "logits": gpu.array(padded), "adjusted": gpu.empty_poisoned((self.rows, pitch), np.float32),
            "work": gpu.zeros((self.rows * ROW.itemsize,), np.uint8), "slots": gpu.array(slots.astype(np.int32)),
            "positions": gpu.array(np.array([request.position for request in requests], np.int32)),
            "parameters": gpu.array(parameters.view(np.uint8)), "biases": gpu.array(biases.reshape(-1).view(np.uint8)),
            "counts": gpu.zeros((num_slots, pitch), np.uint16), "last_token": gpu.empty_poisoned((num_slots,), np.int32),
            "finished": gpu.zeros((num_slots,), np.uint32), "eos_tokens": gpu.array(np.array(EOS, np.int32)),
            "ring": gpu.empty_poisoned((RING_STEPS * self.rows * RESULT.itemsize,), np.uint8),
            "step": gpu.zeros((2,), np.uint32),
        }  # fmt: skip
        if any(request.allowed is not None for request in requests):
            self.buffers["masks"] = gpu.array(np.stack([mask_bits(request.allowed, self.vocab_size) for request in requests]))
        self.kernel = gpu.compile("sampling", "sampling")
        for slot, request in zip(slots, requests, strict=True):
            self._count(slot, request.prompt, 0)
            self._count(slot, request.generated, 1)
        self.arguments = np.zeros((), ARGUMENTS)
        for name, buffer in self.buffers.items():
            self.arguments[name] = int(buffer.data.ptr)
        numbers = (self.vocab_size, pitch, pitch, len(EOS), RING_STEPS, self.rows)
        for name, number in zip(ARGUMENTS.names[-6:], numbers, strict=True):  # type: ignore[index]
            self.arguments[name] = number

    def _count(self, slot: int, tokens: tuple[int, ...], generated: int) -> None:
        if not tokens or slot < 0:
            return
        row = int(self.buffers["counts"].data.ptr) + int(slot) * row_pitch(self.vocab_size) * 2
        device_tokens = self.gpu.array(np.array(tokens, np.int32))
        args = (row, np.int32(self.vocab_size), device_tokens, np.int32(len(tokens)), np.int32(generated))
        self.gpu.launch(self.gpu.compile("sampling", "count_tokens"), (2, 1, 1), (256, 1, 1), args)
        self.gpu.get(device_tokens)  # alive until the kernel is done

    def launch(self, num_sms: int | None = None) -> None:
        grid = sampling_grid(self.gpu.num_sms if num_sms is None else num_sms, self.rows, self.vocab_size)
        self.gpu.launch(self.kernel, grid, (sampling_state.THREADS, 1, 1), (self.arguments[()],))

    def step(self, num_sms: int | None = None) -> Outcome:
        """Launch once; checks that the workspace is clean again."""
        place = int(self.gpu.get(self.buffers["step"])[0]) % RING_STEPS
        self.launch(num_sms)
        found = {name: self.gpu.get(buffer) for name, buffer in self.buffers.items()}
        work = found["work"].view(ROW)
        for name in ROW.names or ():
            if name != "list":
                assert not work[name].any(), name
        ring = found["ring"].view(RESULT).reshape(RING_STEPS, self.rows)
        return Outcome(
            ring[place], found["last_token"], found["finished"], found["positions"], found["counts"], work, found["step"]
        )


def mask_bits(allowed: np.ndarray | None, vocab_size: int) -> np.ndarray:
    """uint32 [ceil(vocab_size / 32)], the lowest bit first; bits beyond the vocabulary are set, as they may be."""
    bits = np.ones(-(-vocab_size // 32) * 32, np.bool_)
    if allowed is not None:
        bits[:vocab_size] = allowed
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _slot(request: Request) -> np.ndarray:
    p = request.parameters
    values = (
        p.temperature, p.top_p, p.min_p, p.seed, p.top_k, request.repetition, request.presence, request.frequency,
        len(request.biases), request.top_logprobs, request.last_position, request.ignore_eos,
    )  # fmt: skip
    return np.array(values, SLOT)


def run(gpu: Any, logits: np.ndarray, requests: list[Request], num_sms: int | None = None) -> np.ndarray:
    """Results of one launch with slots in reverse order."""
    slots = np.arange(len(requests))[::-1].copy()
    return Sampler(gpu, logits, requests, slots, len(requests)).step(num_sms).results


def fields(structure: str) -> list[tuple[str, str, int]]:
    """(name, NumPy kind, count) of a structure in the header."""
    text = (KERNELS / "sampling_state.cuh").read_text()
    values = dict(re.findall(r"constexpr int (\w+) = (\d+);", text))
    body = re.search(rf"struct {structure} {{(.*?)\n}};", text, re.DOTALL)
    assert body is not None
    found = []
    for line in re.sub(r"//.*", "", body[1]).split(";"):
        parts = re.match(r"\s*(?:const )?(\w+)(\*?) (.*)", line.strip())
        if parts is None:
            continue
        for name, count in re.findall(r"(\w+)(?:\[([^]]*)\])?", parts[3]):
            number = int(np.prod([int(values.get(factor.strip(), factor)) for factor in (count or "1").split("*")]))
            found.append((name, "u8" if parts[2] else C_TYPES[parts[1]], number))
    return found


@pytest.mark.parametrize("structure", sorted(sampling_state.STRUCTURES))
def test_structures_are_those_of_the_header(structure: str) -> None:
    dtype = sampling_state.STRUCTURES[structure]
    assert dtype.names is not None
    described = []
    for name in dtype.names:
        base, shape = dtype[name].subdtype or (dtype[name], (1,))
        described.append((name, base.str[1:], int(np.prod(shape))))
        assert dtype.fields is not None
        assert dtype.fields[name][1] % base.itemsize == 0  # no padding in C either
    assert described == fields(structure)


def test_constants_are_those_of_the_headers() -> None:
    text = (KERNELS / "sampling_state.cuh").read_text() + (KERNELS / "sampling_select.cuh").read_text()
    values = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", text)}
    assert values["THREADS"] == sampling_state.THREADS
    assert values["MAX_TOP_LOGPROBS"] == sampling_state.MAX_TOP_LOGPROBS
    assert values["MAX_BIASED_TOKENS"] == MAX_BIASED_TOKENS
    assert 1 << 63 - values["FRACTION_BITS"] == sampling_state.MAX_VOCAB_SIZE <= 1 << values["ID_BITS"]


def test_blocks_that_wait_for_each_other_fit_the_device() -> None:
    for rows, vocab_size in itertools.product((1, 3, 64, 128, 132, 256), (1, 17, 49152, 151936)):
        blocks, grid_rows, _ = sampling_grid(132, rows, vocab_size)
        assert grid_rows == rows
        assert blocks == 1 or blocks * rows <= 132


SETTINGS = [
    SamplingParameters(), SamplingParameters(1.0), SamplingParameters(0.7, 50), SamplingParameters(0.7, 1),
    SamplingParameters(1.0, 0, 0.9), SamplingParameters(1.3, 0, 0.5), SamplingParameters(1.0, 0, 0.0),
    SamplingParameters(1.0, 0, 1.0, 0.05),
    SamplingParameters(2.0, 40, 0.95, 0.02), SamplingParameters(100.0, 0, 0.999), SamplingParameters(0.05, 0, 0.9, 0.3),
    SamplingParameters(1.0, 3000, 0.9), SamplingParameters(1.0, 0, 1.0, 1.0), SamplingParameters(1e-3, 7, 0.4),
]  # fmt: skip


def shaped_logits(rng: np.random.Generator, shape: str, rows: int, vocab_size: int) -> np.ndarray:
    if shape == "normal":
        return 2 * rng.standard_normal((rows, vocab_size), np.float32)
    if shape == "peaked":
        return np.asarray(rng.standard_normal((rows, vocab_size)) ** 3 * 4, np.float32)
    if shape == "flat":
        return np.full((rows, vocab_size), -3.25, np.float32)
    if shape == "ties":  # few values, both zeros among them
        return np.asarray(rng.choice(np.array([-2.0, -0.0, 0.0, 1.0, 1.5], np.float32), (rows, vocab_size)), np.float32)
    assert shape == "outliers"  # clusters far closer than a bin, and values far beyond exp's range
    logits = 1 + 1e-6 * rng.standard_normal((rows, vocab_size))
    logits[:, ::7] = -3e38
    logits[:, 5::vocab_size] = 1.01
    return np.asarray(logits, np.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [1, 17, 1000, 4099, 49152, 151936])
@pytest.mark.parametrize("shape", ["normal", "peaked", "flat", "ties", "outliers"])
def test_draws_are_the_references(gpu: Any, shape: str, vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    rows = 2 if vocab_size > 10000 else 5
    logits = shaped_logits(rng, shape, rows, vocab_size)
    requests, drawn_from = [], []
    for settings, row in itertools.product(SETTINGS, range(rows)):
        seed, position = int(rng.integers(0, 1 << 64, dtype=np.uint64)), int(rng.integers(0, 1 << 20))
        requests.append(Request(replace(settings, seed=seed), position=position))
        drawn_from.append(row)
    results = run(gpu, logits[drawn_from], requests)
    ties = count_ties(logits[drawn_from], requests, results["token"])
    assert ties == 0 or (shape in {"flat", "ties"} and ties <= rows)  # equal weights: a limit may fall on a boundary exactly
    assert not results["not_finite"].any()
    assert not results["num_top"].any()


@pytest.mark.gpu
def test_thousands_of_draws(gpu: Any) -> None:
    """Every boundary between two tokens is within reach of some draw; none may fall on the wrong side."""
    rng = np.random.default_rng(1)
    for round_number in range(10):
        logits = rng.standard_normal((256, 1009), np.float32)
        settings = [SamplingParameters(1.5, int(k), float(p), float(m)) for k, p, m in zip(
            rng.integers(0, 1200, 256), rng.random(256), rng.choice([0, 0.01, 0.2], 256), strict=True)]  # fmt: skip
        requests = [Request(replace(s, seed=i + (round_number << 40)), position=i) for i, s in enumerate(settings)]
        assert count_ties(logits, requests, run(gpu, logits, requests)["token"]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [333, 32003])
def test_penalties_and_biases(gpu: Any, vocab_size: int) -> None:
    rng = np.random.default_rng(2)
    logits = 3 * rng.standard_normal((12, vocab_size), np.float32)
    requests = []
    for i in range(len(logits)):
        likely = np.argsort(-logits[i])[:40]
        biased = rng.choice(likely, 5, replace=False)
        requests.append(Request(
            SamplingParameters(float(i % 3) / 2, 30 * (i % 2), 0.95, seed=i), repetition=(1.0, 1.3, 0.7)[i % 3],
            presence=(0.0, 0.5, -1.0)[i // 3 % 3], frequency=(0.0, 0.25)[i % 2],
            biases=tuple((int(t), float(b)) for t, b in zip(biased, rng.normal(0, 5, 5), strict=True)) * (i > 2),
            top_logprobs=4 * (i % 2) - 1,
            prompt=tuple(rng.choice(likely, 9).tolist()), generated=tuple(rng.choice(likely, 30).tolist()),
        ))  # fmt: skip
    results = run(gpu, logits, requests)
    assert results["token"].tolist() == [reference(row, request) for row, request in zip(logits, requests, strict=True)]
    changed = [int(np.argmax(adjusted(row, r))) != int(np.argmax(row)) for row, r in zip(logits, requests, strict=True)]
    assert sum(changed) > 3
    check_logprobs(logits, requests, results)


def check_logprobs(logits: np.ndarray, requests: list[Request], results: np.ndarray) -> None:
    for row, request, result in zip(logits, requests, results, strict=True):
        if request.top_logprobs < 0:
            assert result["logprob"] == 0
            continue
        wide = row.astype(np.float64)
        expected = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
        assert abs(result["logprob"] - expected[result["token"]]) <= 1e-5 + 1e-6 * abs(expected[result["token"]])
        count = min(request.top_logprobs, len(row))
        top = np.argsort(-row, kind="stable")[:count]
        assert result["num_top"] == count
        assert result["top_tokens"].tolist() == top.tolist() + [-1] * (20 - count)
        np.testing.assert_allclose(result["top_logprobs"][:count], expected[top], rtol=1e-6, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab_size", [1, 31, 32, 33, 1000, 32003, 151936])
def test_masks_decide_the_token_and_not_the_log_probabilities(gpu: Any, vocab_size: int) -> None:
    """Rows with few and many allowed tokens beside rows without a mask; with biases and penalties on some."""
    rng = np.random.default_rng(vocab_size)
    logits = 3 * rng.standard_normal((12, vocab_size), np.float32)
    requests = []
    for i in range(len(logits)):
        allowed = rng.random(vocab_size) < (0.5, 2 / vocab_size, 0.01, 1.0)[i % 4]
        allowed[rng.integers(vocab_size)] = True
        put_out = np.flatnonzero(~allowed)[:2].tolist()
        requests.append(Request(
            SamplingParameters(float(i % 3) / 2, 30 * (i % 2), 0.95, seed=i), top_logprobs=6 * (i % 2) - (i % 3 == 0),
            biases=tuple((token, 50.0) for token in put_out) * (i > 5), presence=0.5 * (i % 3), generated=(0,) * (i % 2),
            allowed=None if i in (4, 7) else allowed,
        ))  # fmt: skip
    results = run(gpu, logits, requests)
    assert not results["not_finite"].any()
    assert count_ties(logits, requests, results["token"]) == 0
    for request, token in zip(requests, results["token"], strict=True):
        assert request.allowed is None or request.allowed[token]
    check_logprobs(logits, requests, results)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["normal", "peaked", "flat", "ties", "outliers"])
def test_log_probabilities(gpu: Any, shape: str) -> None:
    for vocab_size in (5, 700, 40001):
        logits = shaped_logits(np.random.default_rng(vocab_size), shape, 8, vocab_size)
        requests = [
            Request(SamplingParameters(float(i % 2), 0, 0.8, seed=i), top_logprobs=count)
            for i, count in enumerate((0, 1, 5, 20, 20, 0, -1, 3))
        ]
        results = run(gpu, logits, requests)
        assert count_ties(logits, requests, results["token"]) <= (shape in {"flat", "ties"})
        check_logprobs(logits, requests, results)


@pytest.mark.gpu
def test_results_do_not_depend_on_the_batch_or_the_grid(gpu: Any) -> None:
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((9, 50021), np.float32)
    requests = [
        Request(
            SamplingParameters(0.3 * i, 100 * (i % 2), 0.9, 0.01 * (i % 3), seed=i), top_logprobs=i,
            repetition=1.0 + 0.1 * (i % 2), prompt=(1, 2, 3),
        )
        for i in range(9)
    ]  # fmt: skip
    whole = run(gpu, logits, requests)
    assert run(gpu, logits, requests).tobytes() == whole.tobytes()
    assert run(gpu, logits, requests, num_sms=1).tobytes() == whole.tobytes()
    assert run(gpu, logits[::-1].copy(), requests[::-1])[::-1].tobytes() == whole.tobytes()
    for i in range(9):
        assert run(gpu, logits[i : i + 1], requests[i : i + 1]).tobytes() == whole[i : i + 1].tobytes()


@pytest.mark.gpu
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_flagged(gpu: Any, value: float) -> None:
    logits = np.random.default_rng(5).standard_normal((4, 3001), np.float32)
    logits[1, 2999] = logits[2, 0] = value
    requests = [Request(SamplingParameters(float(i > 1)), top_logprobs=2) for i in range(4)]
    sampler = Sampler(gpu, logits, requests, np.arange(4), 4)
    outcome = sampler.step()
    assert outcome.results["not_finite"].tolist() == [0, 1, 1, 0]
    assert outcome.results["token"][1:3].tolist() == [-1, -1]
    assert outcome.positions.tolist() == [8, 7, 7, 8]
    assert outcome.finished.tolist() == [0, 1, 1, 0]
    for i in (0, 3):
        assert outcome.results["token"][i] == reference(logits[i], requests[i])


@pytest.mark.gpu
def test_a_mask_does_not_hide_what_is_not_finite(gpu: Any) -> None:
    logits = np.zeros((3, 70), np.float32)
    logits[0, 40], logits[1, 40] = np.nan, np.inf
    allowed = np.arange(70) == 7
    results = run(gpu, logits, [Request(allowed=allowed)] * 3)
    assert results["not_finite"].tolist() == [1, 1, 0]
    assert results["token"].tolist() == [-1, -1, 7]


@pytest.mark.gpu
def test_decode_state_moves_on(gpu: Any) -> None:
    """Three greedy steps on fixed logits: counts grow, rows that are not in use stay, ends are marked."""
    logits = np.zeros((5, 100), np.float32)
    for row, token in enumerate((11, 50, 11, 60, 70)):
        logits[row, token] = 9
    requests = [
        Request(position=20), Request(position=20, last_position=23, frequency=2.0), Request(position=20, ignore_eos=True),
        Request(position=-1), Request(position=20),
    ]  # fmt: skip
    sampler = Sampler(gpu, logits, requests, np.array([6, 2, 0, 4, -1]), 8)
    for step in range(3):
        outcome = sampler.step()
        assert outcome.step.tolist() == [step + 1, 0]
        assert outcome.results["token"].tolist() == [11, 50, 11, -1, -1]
        assert outcome.positions.tolist() == [21 + step, 21 + step, 21 + step, -1, 20]
        assert outcome.last_token.tolist() == [11, -1, 50, -1, -1, -1, 11, -1]
        assert outcome.finished.tolist() == [0, 0, int(step == 2), 0, 0, 0, 1, 0]
        assert outcome.counts[2, 50] == outcome.counts[6, 11] == step + 1
    assert outcome.counts.sum() == 9
