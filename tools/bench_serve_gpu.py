#!/usr/bin/env python3
"""What a client of `megalith serve` gets from a model: one stream, many streams, and the same tokens in all of them.

Starts the server on a packed file and reads streams in this process, prompts as random token ids: one stream against
`megalith bench` of the same context, measured before the server starts; then closed loops of many clients, each of which asks
again as soon as it is answered, often enough that filling and draining the batch is a small part. Rates count output tokens
and all time, prefill included. Inter-token latency is between events, those read together 0 apart. Then a server of its own,
on a GPU with --batch-invariant: a greedy stream equals the answer that is not streamed; a seeded request gives the same
tokens alone, again, and among others of different lengths (written down: whether its log probabilities are the same to the
last bit, and what the first server gives).

Writes rows in the form of tools/gpu_check.py, and all else under "serve". Ends with 1 where tokens differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gpu_check import served_the_same, versions
from stream_client import Stream, StreamError, completion_request, read_streams

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from serving import ServerProcess

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 180.0  # of loading, and of compiling kernels that are not cached
INVARIANT = {"cupy": ["--batch-invariant"]}  # for the requests that must be the same; NumPy has one order of sums
SEED = {"temperature": 1, "top_p": 0.9, "seed": 7, "logprobs": 2}
SILENT_SHARE, SILENT_TOKENS = 0.05, 2  # of all streams, that may settle no text: parts of characters, special tokens


class Prompts:
    """Random token ids, every prompt another."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._rng = np.random.default_rng(0)

    def ids(self, count: int) -> list[int]:
        return [int(token) for token in self._rng.integers(0, self._vocab_size, count)]

    def between(self, low: int, high: int) -> int:
        return int(self._rng.integers(low, high + 1))


def token_times(stream: Stream, num_tokens: int) -> np.ndarray:
    """When each event of a token came; StreamError unless the stream has all tokens and its end."""
    events = stream.events()
    shown = [event["choices"][0] for event in events if event["choices"]]
    completed = events[-1]["usage"]["completion_tokens"]
    if completed != num_tokens or not 1 <= len(shown) <= num_tokens:
        raise StreamError(f"{len(shown)} events and {completed} tokens, {num_tokens} were asked for")
    if [choice["finish_reason"] for choice in shown if choice["finish_reason"]] != ["length"]:
        raise StreamError(f"the stream ended with {shown[-1]}")
    return stream.event_times()[: len(shown)]


def checked_times(streams: Sequence[Stream], num_tokens: int) -> list[np.ndarray]:
    """`token_times` of each; StreamError where latencies between events would not be those between tokens.

    One stream of many may have few events: a model of random weights can repeat a part of a character for ever.
    """
    times = [token_times(stream, num_tokens) for stream in streams]
    shown, wanted = sum(map(len, times)), num_tokens * len(streams)
    if shown < wanted - max(SILENT_TOKENS, SILENT_SHARE * wanted):
        raise StreamError(f"{shown} events of {wanted} tokens in {len(streams)} streams")
    return times


def plain_request(ids: list[int], num_tokens: int) -> bytes:
    """As benches of other servers ask: greedy, up to the last token, with the counts at the end."""
    options = {"stream_options": {"include_usage": True}, "ignore_eos": True, "temperature": 0}
    return completion_request(prompt=ids, max_tokens=num_tokens, **options)


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    median, high = np.percentile(np.fromiter(seconds, float) * 1e3, [50, 99])
    return {"median_ms": round(float(median), 3), "p99_ms": round(float(high), 3)}


def single_stream(port: int, prompts: Prompts, num_prompt: int, num_tokens: int) -> dict[str, Any]:
    """Tokens a second between the first token and the last, None where all came in one read; a first stream warms up."""
    for _ in range(2):
        _, [[stream]] = read_streams(port, [[plain_request(prompts.ids(num_prompt), num_tokens)]])
        [times] = checked_times([stream], num_tokens)
    seconds = float(times[-1] - times[0])
    latency = percentiles(np.diff(times))
    rate = round((num_tokens - 1) / seconds, 1) if seconds else None
    return {"decode_tokens_per_s": rate, "ttft_ms": round((times[0] - stream.sent) * 1e3, 3), "itl": latency}


def many_streams(port: int, prompts: Prompts, count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """A closed loop of `count` clients, after one round that warms up."""
    for rounds in (1, arguments.rounds):
        clients = [
            [plain_request(prompts.ids(arguments.prompt), arguments.output) for _ in range(rounds)] for _ in range(count)
        ]
        seconds, answered = read_streams(port, clients)
    streams = [stream for client in answered for stream in client]
    times = checked_times(streams, arguments.output)
    return {
        "clients": count,
        "rounds": arguments.rounds,
        "output_tokens_per_s": round(len(streams) * arguments.output / seconds, 1),
        "total_tokens_per_s": round(len(streams) * (arguments.output + arguments.prompt) / seconds, 1),
        "ttft": percentiles(each[0] - stream.sent for stream, each in zip(streams, times, strict=True)),
        "itl": percentiles(np.concatenate([np.diff(each) for each in times])),
    }


def chosen(stream: Stream) -> tuple[list[int], list[float]]:
    """Token ids and log probabilities of a stream that asked for both."""
    shown = [event["choices"][0] for event in stream.events() if event["choices"]]
    ids = [token for choice in shown for token in choice["token_ids"]]
    logprobs = [value for choice in shown for value in choice["logprobs"]["token_logprobs"]]
    return ids, logprobs


def seeded(port: int, prompts: Prompts, arguments: argparse.Namespace) -> dict[str, Any]:
    """One request alone, again (its prefix is cached then), and among others that run before, with and after it."""
    room = arguments.max_seq_len

    def request(num_prompt: int, num_tokens: int, **options: Any) -> bytes:
        return completion_request(
            prompt=prompts.ids(num_prompt), max_tokens=num_tokens, ignore_eos=True, return_token_ids=True, **options
        )

    mine = request(arguments.prompt, arguments.output, **SEED)
    others = []
    for number in range(arguments.others):
        length = prompts.between(1, room // 2)
        others.append(request(length, prompts.between(1, min(room - length, 2 * arguments.output)), **SEED | {"seed": number}))
    alone, again = (chosen(read_streams(port, [[mine]])[1][0][0]) for _ in range(2))
    place = len(others) // 2
    _, answered = read_streams(port, [[other] for other in others[:place]] + [[mine]] + [[other] for other in others[place:]])
    found: dict[str, Any] = {"others": len(others)}
    for name, (ids, logprobs) in (("again", again), ("among_others", chosen(answered[place][0]))):
        same = [one == other for one, other in zip(ids, alone[0], strict=True)]
        count = same.index(False) if False in same else len(same)
        apart = np.abs(np.array(logprobs[:count]) - np.array(alone[1][:count]))
        found[name] = {
            "same_tokens": ids == alone[0],
            "same_logprobs": (ids, logprobs) == alone,
            "tokens_until_they_differ": count,
            "largest_logprob_difference": float(apart.max(initial=0.0)),
        }
    return found


def greedy_agrees(server: ServerProcess, prompts: Prompts, arguments: argparse.Namespace) -> bool:
    """Whether a greedy stream and the same request without streaming give the same tokens and text."""
    body: dict[str, Any] = {"prompt": prompts.ids(arguments.prompt), "max_tokens": arguments.output, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, "logprobs": 0}
    whole = server.json("POST", "/v1/completions", body)["choices"][0]
    _, [[stream]] = read_streams(server.port, [[completion_request(**body)]])
    text = "".join(event["choices"][0]["text"] for event in stream.events() if event["choices"])
    return bool(
        chosen(stream)[0] == whole["token_ids"] and text == whole["text"] and len(whole["token_ids"]) == arguments.output
    )


def bench_rate(file: Path, context: int) -> tuple[str, float]:
    """The GPU's name and tokens a second of `megalith bench` at this context."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "megalith",
        "bench",
        str(file),
        "--decode",
        f"1:{context}",
        "--prefill",
        "512",
        "--json",
    ]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    [row] = [row for row in found["results"] if row["work"] == "decode"]
    return found["gpu"], row["tokens_per_s"]


def measure(arguments: argparse.Namespace) -> tuple[str | None, dict[str, Any]]:
    """The GPU's name, None for another backend, and what is written under "serve"."""
    gpu, expected = None, None
    if arguments.backend == "cupy":
        gpu, expected = bench_rate(arguments.file, arguments.prompt + arguments.single_output // 2)
    options = [
        f"--backend={arguments.backend}", f"--max-sequences={max(*arguments.clients, arguments.others + 1)}",
        f"--max-seq-len={arguments.max_seq_len}", "--log-level=info", *arguments.option,
    ]  # fmt: skip
    with ServerProcess(arguments.file, *options, seconds=START_SECONDS) as server:
        server.json("GET", "/ready")
        facts = server.json("GET", "/facts")
        prompts = Prompts(facts["vocab_size"])
        found: dict[str, Any] = {
            "options": options,
            "single": single_stream(server.port, prompts, arguments.prompt, arguments.single_output),
        }
        found["single"] |= {"bench_tokens_per_s": expected}
        rate = found["single"]["decode_tokens_per_s"]
        found["single"] |= {"ratio": round(rate / expected, 4) if rate and expected else None}
        found["many"] = [many_streams(server.port, prompts, count, arguments) for count in arguments.clients]
        found["seeded_by_default"] = seeded(server.port, prompts, arguments)
    with ServerProcess(arguments.file, *options, *INVARIANT.get(arguments.backend, []), seconds=START_SECONDS) as server:
        server.json("GET", "/ready")
        prompts = Prompts(facts["vocab_size"])
        found["greedy_stream_equals_whole"] = greedy_agrees(server, prompts, arguments)
        found["seeded"] = seeded(server.port, prompts, arguments)
        found["invariant"] = single_stream(server.port, prompts, arguments.prompt, arguments.single_output)
    return gpu, found


def rows(found: dict[str, Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """In the schema that all benchmarks share."""
    path = "graph" if arguments.backend == "cupy" else None
    fixed = {"system": "megalith", "model": arguments.model or arguments.file.stem, "dtype": arguments.dtype, "work": "serve"}
    single = found["single"]
    pairs = [(1, single["itl"]["median_ms"], single["decode_tokens_per_s"])]
    pairs += [(one["clients"], one["itl"]["median_ms"], one["output_tokens_per_s"]) for one in found["many"]]
    return [
        {
            **fixed, "path": path, "batch": batch, "context": arguments.prompt, "ms": ms, "tokens_per_s": rate,
            "gbytes_per_s": None, "percent_nominal": None,
        }
        for batch, ms, rate in pairs
    ]  # fmt: skip


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--backend", choices=["cupy", "numpy"], default="cupy")
    parser.add_argument("--model", help="its name in the rows; default: the file's")
    parser.add_argument("--dtype", default="bf16", help="of the weights, in the rows")
    parser.add_argument("--commit", help="of the tree that runs; default: git's")
    parser.add_argument("--clients", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--rounds", type=int, default=12, help="requests of each client")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--single-output", type=int, default=256, help="tokens of the single stream")
    parser.add_argument("--others", type=int, default=63, help="requests beside the seeded one")
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument(
        "--option", action="append", default=[], help="of `megalith serve`, as --option=--max-batch-tokens=1024"
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """The command."""
    arguments = parse(words)
    gpu, found = measure(arguments)
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = arguments.commit or subprocess.run(git, check=True, text=True, stdout=subprocess.PIPE).stdout.strip()
    command = "python tools/bench_serve_gpu.py " + " ".join(word for word in words or sys.argv[1:] if not word.startswith("/"))
    report = {"commit": commit, "command": command, "gpu": gpu, "versions": versions()}
    report |= {"results": rows(found, arguments), "serve": found}
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return 0 if served_the_same(found) else 1


if __name__ == "__main__":
    sys.exit(main())
