"""The benchmark of a served model, on NumPy and a tiny model: its checks pass, its rows have the schema's form."""

from __future__ import annotations

import json
from pathlib import Path

import bench_serve_gpu
import pytest
from random_checkpoint import SHAPES, word_tokenizer, write_checkpoint
from stream_client import Stream, StreamError

from megalith.converter.convert import convert

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "vocab_size": 40000, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KEYS = {
    "system", "model", "dtype", "work", "path", "batch", "context", "ms", "tokens_per_s", "gbytes_per_s", "percent_nominal",
}  # fmt: skip


def test_the_benchmark_of_a_served_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "random", SHAPES["qwen3-4b"] | TINY)
    convert(tmp_path / "random", tmp_path / "random.lith", None)
    sizes = [
        "--clients",
        "2",
        "6",
        "--rounds",
        "2",
        "--prompt",
        "70",
        "--output",
        "9",
        "--single-output",
        "12",
        "--others",
        "7",
        "--max-seq-len",
        "256",
    ]
    out = tmp_path / "rows.json"
    words = [str(tmp_path / "random.lith"), "--out", str(out), "--backend", "numpy", "--commit", "none", *sizes]
    assert bench_serve_gpu.main(words) == 0
    report = json.loads(out.read_text())
    assert [(row["work"], row["batch"], row["context"]) for row in report["results"]] == [
        ("serve", 1, 70),
        ("serve", 2, 70),
        ("serve", 6, 70),
    ]
    for row in report["results"]:
        assert set(row) == KEYS
        assert row["ms"] >= 0  # tokens that are read together are 0 apart; one stream that comes in one read has no rate
        assert (row["batch"] == 1 and row["tokens_per_s"] is None) or row["tokens_per_s"] > 0
    serve = report["serve"]
    assert serve["greedy_stream_equals_whole"]
    assert serve["seeded"]["among_others"]["same_tokens"]
    assert serve["seeded"]["among_others"]["largest_logprob_difference"] < 1e-5
    assert serve["seeded"]["among_others"]["tokens_until_they_differ"] == 9
    assert all(0 <= one["itl"]["median_ms"] <= one["itl"]["p99_ms"] for one in serve["many"])
    assert all(0 < one["ttft"]["median_ms"] <= one["ttft"]["p99_ms"] for one in serve["many"])


def answer(*events: str) -> bytes:
    """A chunked response of one chunk an event."""
    lines = [f"data: {event}\n\n".encode() for event in (*events, "[DONE]")]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def choice(text: str, finish: str | None = None) -> str:
    return json.dumps({"choices": [{"text": text, "finish_reason": finish}]})


def usage(count: int) -> str:
    return json.dumps({"choices": [], "usage": {"completion_tokens": count}})


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_events_are_counted_however_they_are_cut(size: int) -> None:
    data = answer(choice("a"), choice("b", "length"), usage(2))
    stream = Stream(0.0)
    ends = [stream.feed(data[at : at + size]) for at in range(0, len(data), size)]
    assert ends == [False] * (len(ends) - 1) + [True]
    assert sum(events for _, events in stream.arrivals) == 3
    assert len(bench_serve_gpu.token_times(stream, 2)) == 2


@pytest.mark.parametrize(
    "data",
    [
        answer(choice("a"), choice("b", "length"), usage(3)),
        answer(choice("a"), usage(2)),
        answer(*[choice("a")] * 2, choice("b", "length"), usage(2)),
        answer(choice("a"), choice("b", "stop"), usage(2)),
        answer(choice("a"), choice("b", "length"), usage(2)).replace(b"[DONE]", b"{DONE}"),
        b"HTTP/1.1 503 Service Unavailable\r\n\r\n",
    ],
)
def test_a_stream_that_lacks_something_is_no_figure(data: bytes) -> None:
    def read() -> None:
        stream = Stream(0.0)
        stream.feed(data)
        bench_serve_gpu.token_times(stream, 2)

    with pytest.raises(StreamError):
        read()


def test_one_stream_of_many_may_settle_no_text() -> None:
    whole, silent = Stream(0.0), Stream(0.0)
    whole.feed(answer(*[choice("a")] * 39, choice("b", "length"), usage(40)))
    silent.feed(answer(choice("b", "length"), usage(40)))
    assert [len(times) for times in bench_serve_gpu.checked_times([silent] + [whole] * 19, 40)] == [1] + [40] * 19
    with pytest.raises(StreamError, match="722 events of 800 tokens"):
        bench_serve_gpu.checked_times([silent] + [whole] * 18 + [silent], 40)


def test_random_checkpoints_have_a_text_for_every_id() -> None:
    tokenizer = word_tokenizer(1200)
    texts = [tokenizer.decode([token]) for token in range(1200)]
    assert len(set(texts[256:])) == 944
    assert all(texts[256:])
    assert tokenizer.decode(tokenizer.encode("Größe, 2 words\n").ids) == "Größe, 2 words\n"
    with pytest.raises(ValueError, match="256"):
        word_tokenizer(200)
