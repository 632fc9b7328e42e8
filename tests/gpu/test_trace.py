"""Traces of the CuPy backend: which kernels have spans, and where those lie on the host's clock."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from golden_models import GoldenModel

import megalith
from megalith.converter.plan import Options
from megalith.runtime.bench import Bench, Plan
from megalith.runtime.kernel_spans import TRACED_DECODE_STEPS
from megalith.runtime.trace import HOST, Span, Trace

pytestmark = pytest.mark.gpu
PRODUCTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
CLOCK_MICROSECONDS = 2000  # by which device times may miss the host's on a busy machine


def kernels(trace: Trace) -> dict[str, list[Span]]:
    """Spans of kernels by their pass."""
    found = defaultdict(list)
    for span in trace.spans:
        if span.track[0] != HOST:
            found[span.arguments["pass"]].append(span)
    return dict(found)


def check_pass(spans: list[Span], num_layers: int) -> None:
    """Everything but norms, which may be part of the product that reads them, is there once per layer."""
    counts = Counter((span.arguments.get("operation"), span.arguments.get("layer")) for span in spans)
    for layer in range(num_layers):
        assert counts["attention", layer] == 1
        # a prefill rotates q and k in a kernel of its own, as a part of qkv_proj
        assert [counts[name, layer] for name in PRODUCTS[1:]] == [1, 1, 1]
        assert sum(1 for s in spans if s.arguments.get("layer") == layer and s.arguments.get("weight_bytes")) == len(PRODUCTS)
    assert counts["embed_tokens", None] == counts["lm_head", None] == 1
    assert sum(span.name == "sampling" for span in spans) == 1
    assert all(0 < span.end - span.begun < 1e6 for span in spans)
    assert all(first.end <= second.begun for first, second in pairwise(spans))


@pytest.mark.parametrize("golden", ["llama2", "qwen3"], indirect=True)
def test_a_traced_generate_has_every_kernel_of_a_step_once_per_layer(gpu: Any, golden: GoldenModel, tmp_path: Path) -> None:
    packed, trace = golden.pack(tmp_path, Options(max_seq_len=256)), Trace()
    prompt = golden.id_sets()[0]["ids"][:21].tolist()
    tokens = []
    for engine in (megalith.load(packed, backend="cupy", trace=trace), megalith.load(packed, backend="cupy")):
        tokens.append([token.id for token in engine.generate_tokens(prompt, max_tokens=12, ignore_eos=True)])
    assert tokens[0] == tokens[1]
    passes = kernels(trace)
    assert list(passes) == ["1: prefill", *(f"{i + 2}: decode step" for i in range(TRACED_DECODE_STEPS))]
    submits = [span for span in trace.spans if span.name == "submit"]
    assert len(submits) == 12
    for spans, submit in zip(passes.values(), submits, strict=False):
        check_pass(spans, engine.config.num_hidden_layers)
        assert submit.begun <= spans[0].begun
        assert spans[-1].end <= submit.end + CLOCK_MICROSECONDS
    assert {len(spans) for name, spans in passes.items() if "decode" in name} == {len(passes["2: decode step"])}


@pytest.mark.parametrize("golden", ["qwen3"], indirect=True)
def test_a_traced_bench_measures_every_figure_once_more(gpu: Any, golden: GoldenModel, tmp_path: Path) -> None:
    trace = Trace()
    bench = Bench(golden.pack(tmp_path, Options(max_seq_len=2048)), Plan([(1, 64), (4, 32)], [128]), trace)
    results = list(bench.results())
    assert [result.work for result in results] == ["start", "load", "prefill", "decode", "decode"]
    names = [name.partition(": ")[2] for name in kernels(trace)]
    assert names == ["prefill", *["decode step"] * 2 * TRACED_DECODE_STEPS]
    for spans in list(kernels(trace).values())[1:]:
        check_pass(spans, bench.config.num_hidden_layers)
    tracks = {span.name: span.track for span in trace.spans if span.track[0] == HOST}
    ours = ("find device", "plan arena", "allocate arena", "copy file to device", "plan launches", "capture graph")
    assert len({tracks[name] for name in ours}) == 1
    assert "compile or read kernels" in tracks
    loading = {span.track for span in trace.spans if span.name == "load attention_decode"}
    assert loading - {tracks["copy file to device"]}  # beside it
