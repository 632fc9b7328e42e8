"""Traces as Perfetto reads them: the NumPy backend's from the command, the GPU's from events that a clock of ours stamps."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from golden_models import GoldenModel
from serving_models import serving_model

import megalith
from megalith.cli import run
from megalith.format.errors import FileError
from megalith.runtime.kernel_spans import KernelSpans
from megalith.runtime.numpy_backend import NumpyBackend
from megalith.runtime.program import Kind, Operation, operation_name
from megalith.runtime.trace import Trace, host_span, traced, tracing

Event = dict[str, Any]


def checked(text: str) -> tuple[list[Event], dict[tuple[int, int], str]]:
    """Complete events and the name of each track, of a trace whose form is right."""
    document = json.loads(text)
    assert set(document) == {"traceEvents", "displayTimeUnit", "otherData"}
    tracks, events = {}, []
    for event in document["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["args"], dict)
        assert {type(event["pid"]), type(event["tid"])} == {int}
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            tracks[event["pid"], event["tid"]] = event["args"]["name"]
        else:
            assert set(event) == {"ph", "name", "pid", "tid", "ts", "dur", "args"}
            assert event["ph"] == "X"
            assert event["ts"] >= 0 <= event["dur"]
            events.append(event)
    for event in events:
        assert (event["pid"], event["tid"]) in tracks
        assert (event["pid"], 0) in tracks
    for track in tracks:
        check_nesting([event for event in events if (event["pid"], event["tid"]) == track])
    return events, tracks


def check_nesting(events: list[Event]) -> None:
    """Of two events of a track one ends before the other starts, or lies within it; in nanoseconds, as they are written."""
    open_ends: list[int] = []
    for event in events:
        begun = round(1e3 * event["ts"])
        end = begun + round(1e3 * event["dur"])
        while open_ends and open_ends[-1] <= begun:
            open_ends.pop()
        assert not open_ends or end <= open_ends[-1], event
        open_ends.append(end)


def traced_run(model: Path, out: Path, *words: str) -> tuple[list[Event], dict[tuple[int, int], str]]:
    assert run(["generate", str(model), "--backend", "numpy", "--ignore-eos", "--trace", str(out), *words]) == 0
    return checked(out.read_text())


def test_generate_traces_every_operation_of_every_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = serving_model(tmp_path), tmp_path / "out.json"
    events, tracks = traced_run(model, out, "--chat", "Hello", "--max-tokens", "5")
    assert capsys.readouterr().err == f"trace: {out}\n"
    assert set(tracks.values()) == {"host", "MainThread"}
    counts = Counter(event["name"] for event in events)
    assert counts["load"] == counts["tokenise"] == counts["generate"] == counts["load tokenizer"] == 1
    assert counts["forward pass"] == counts["sample"] == counts["detokenise"] == 5
    with megalith.open(model) as packed:
        backend, names = NumpyBackend(packed), packed.index.blobs.names
    per_pass = Counter((operation_name(op, names), op.layer) for op in backend.program)
    found = Counter((event["name"], event["args"].get("layer", -1)) for event in events)
    assert {key: found[key] for key in per_pass} == {key: 5 * count for key, count in per_pass.items()}
    passes = [event for event in events if event["name"] == "forward pass"]
    assert [event["args"]["tokens"] for event in passes][1:] == [1, 1, 1, 1]
    inner = [event for event in events if passes[1]["ts"] <= event["ts"] < passes[1]["ts"] + passes[1]["dur"]]
    assert [event["name"] for event in inner[1:]] == [operation_name(op, names) for op in backend.program]


def test_json_says_where_the_trace_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = serving_model(tmp_path), tmp_path / "out.json"
    capsys.readouterr()
    traced_run(model, out, "--prompt", "x", "--max-tokens", "2", "--json")
    output = capsys.readouterr()
    assert json.loads(output.out)["trace"] == str(out)
    assert output.err == ""


def test_tracing_changes_no_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = serving_model(tmp_path)
    found = []
    for words in ([], ["--trace", str(tmp_path / "out.json")]):
        capsys.readouterr()
        assert run(["generate", str(model), "--prompt", "abc", "--max-tokens", "20", "--ignore-eos", "--json", *words]) == 0
        found.append(json.loads(capsys.readouterr().out)["ids"])
    assert found[0] == found[1]


def test_a_path_that_cannot_be_written_is_said_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nowhere" / "out.json"
    assert run(["generate", str(tmp_path / "absent.lith"), "--prompt", "x", "--trace", str(out)]) == 5
    assert capsys.readouterr().err == f"megalith: {out}: No such file or directory\n"


def test_what_failed_is_traced_too(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with pytest.raises(FileError), tracing(out) as trace, host_span(trace, "load"):
        megalith.load(tmp_path / "absent.lith", trace=trace)
    events, _ = checked(out.read_text())
    assert [event["name"] for event in events] == ["load"]


def test_without_a_trace_nothing_is_wrapped() -> None:
    function = len
    assert traced(None, "len", function) is function
    with tracing(None) as trace, host_span(trace, "x"):
        assert trace is None


# ---- kernels, on a device whose clock is ours ------------------------------------------------------------------------------


class FakeStream:
    """Runs what is enqueued at once; `now` is the device's time in milliseconds."""

    ptr = 77

    def __init__(self) -> None:
        self.now = 1000.0

    def synchronize(self) -> None:
        pass


class FakeEvent:
    def record(self, stream: FakeStream) -> None:
        stream.now += 0.001  # recording takes a microsecond
        self.at = stream.now


class FakeLaunch:
    """A kernel that runs for some milliseconds."""

    def __init__(self, stream: FakeStream, name: str, ms: float, op: Operation | None = None, weight_bytes: int = 0) -> None:
        self.name, self.operation, self.weight_bytes = name, op, weight_bytes
        self.grid, self.block, self.shared_bytes = (132, 1, 1), (256, 1, 1), 1024
        self._stream, self._ms = stream, ms

    def __call__(self, stream: int) -> None:
        assert stream == self._stream.ptr
        self._stream.now += self._ms


NAMES = ["embed_tokens", "layers.0.o_proj", "lm_head"]
CUDA = SimpleNamespace(Event=FakeEvent, get_elapsed_time=lambda first, last: last.at - first.at)


def step(stream: FakeStream) -> list[FakeLaunch]:
    return [
        FakeLaunch(stream, "embedding.embedding", 0.002, Operation(Kind.EMBED, weight=0)),
        FakeLaunch(stream, "linear.linear", 0.010, Operation(Kind.PROJECT, 0, 1), 30_000_000),
        FakeLaunch(stream, "attention_decode.attention_decode", 0.004, Operation(Kind.ATTENTION, 0)),
        FakeLaunch(stream, "linear.linear", 0.020, Operation(Kind.HEAD, weight=2), 60_000_000),
        FakeLaunch(stream, "sampling.sampling", 0.003),
    ]


def test_kernels_become_spans_with_names_and_sizes() -> None:
    trace, stream = Trace(), FakeStream()
    spans = KernelSpans(trace, CUDA, stream, "a GPU", NAMES)
    assert not spans.begin("decode step", sequences=1, longest=5)
    spans.allow(decode_steps=2)
    assert not spans.begin("prefill", sequences=1, tokens=4)
    for longest in (5, 6):
        assert spans.begin("decode step", sequences=1, longest=longest)
        spans.enqueue(step(stream))  # type: ignore[arg-type]
    assert not spans.begin("decode step", sequences=1, longest=7)
    events, tracks = checked(json.dumps(trace.to_dict()))
    assert set(tracks.values()) == {"a GPU", "kernels, launched one by one"}
    names = ["embedding embed_tokens", "linear o_proj 0", "attention_decode attention 0", "linear lm_head", "sampling"]
    assert [event["name"] for event in events] == names * 2
    durations = [round(event["dur"], 1) for event in events[:5]]
    assert durations == [3.0, 11.0, 5.0, 21.0, 4.0]  # the kernel's, and the event after it
    assert events[1]["args"] == {
        "pass": "1: decode step", "sequences": 1, "longest": 5, "kernel": "linear.linear", "operation": "o_proj", "layer": 0,
        "grid": [132, 1, 1], "block": [256, 1, 1], "shared_bytes": 1024, "weight_bytes": 30_000_000,
        "GB/s": round(30_000_000 / 11e-6 / 1e9, 1),
    }  # fmt: skip
    assert [event["args"]["pass"] for event in events[4:6]] == ["1: decode step", "2: decode step"]
    assert [event["args"]["longest"] for event in events] == [5] * 5 + [6] * 5


def test_more_launches_than_events_are_measured_in_parts() -> None:
    trace, stream = Trace(), FakeStream()
    spans = KernelSpans(trace, CUDA, stream, "a GPU", NAMES)
    spans.allow(prefills=1)
    assert spans.begin("prefill", sequences=1, tokens=2048)
    launches = [FakeLaunch(stream, f"k.number_{i}", 0.001) for i in range(1200)]
    spans.enqueue(launches)  # type: ignore[arg-type]
    assert [span.name for span in trace.spans] == [f"number_{i}" for i in range(1200)]
    assert all(abs(span.end - span.begun - 2) < 0.01 for span in trace.spans)


@pytest.mark.parametrize("golden", ["qwen3", "mixtral"], indirect=True)
def test_every_operation_has_a_name(golden: GoldenModel, tmp_path: Path) -> None:
    with megalith.open(golden.pack(tmp_path)) as packed:
        backend, names = NumpyBackend(packed), packed.index.blobs.names
    found = [operation_name(op, names) for op in backend.program]
    assert found[0] == "embed_tokens"
    assert found[-2:] == ["norm", "lm_head"]
    tail = ["gate_up_proj", "down_proj"] if golden.name == "qwen3" else ["router", "experts"]
    layer = ["input_layernorm", "qkv_proj", "attention", "o_proj", "post_attention_layernorm", *tail]
    assert found[1:-2] == layer * backend.config.num_hidden_layers
