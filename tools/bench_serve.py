#!/usr/bin/env python3
"""What the server costs without a model: streamed tokens a second, and the latency that it adds.

Starts `megalith serve --backend echo` and reads streams over many connections, in a process of its own. Every stream is
checked once the clock has stopped: as many events as tokens, the prompt's text again, the mark at the end. The added latency
of a token is how long after its forward pass was over it came, relative to the earliest token of its stream.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from stream_client import Stream, StreamError, completion_request, read_streams

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from serving import ServerProcess
from serving_models import serving_model

ROOT = Path(__file__).resolve().parent.parent
OPENING_SECONDS = 0.5  # of a stream, while others are being opened: not counted as latency between tokens
PROMPT = "The quick brown fox jumps over the lazy dog. "


def run(port: int, connections: int, num_tokens: int, num_streams: int) -> tuple[float, list[Stream]]:
    """Seconds and the streams, all checked."""
    request = completion_request(prompt=PROMPT, max_tokens=num_tokens, temperature=0)
    seconds, clients = read_streams(port, [[request] * num_streams] * connections)
    streams = [stream for client in clients for stream in client]
    expected = (PROMPT * (num_tokens // len(PROMPT) + 1))[:num_tokens]
    for stream in streams:
        pieces = [event["choices"][0]["text"] for event in stream.events()]
        if "".join(pieces) != expected or len(pieces) != num_tokens:
            raise StreamError(f"{len(pieces)} events of {num_tokens}, {''.join(pieces)[:200]!r}")
    return seconds, streams


def added_latency(streams: list[Stream], step_seconds: float) -> np.ndarray:
    """Seconds, of every token of every stream."""
    added = []
    for stream in streams:
        times = stream.event_times()
        late = times - step_seconds * np.arange(len(times))
        late = late[times > times[0] + OPENING_SECONDS]
        added.append(late - late.min())
    return np.concatenate(added)


def measure(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Throughput, and latency at given loads."""
    connections, num_tokens = arguments.connections, arguments.tokens
    options = ("--backend", "echo", "--max-sequences", str(connections), "--log-level", "info")
    with ServerProcess(model, *options) as server:
        run(server.port, connections, num_tokens, 1)
        rates = []
        for _ in range(arguments.repeat):
            seconds, streams = run(server.port, connections, num_tokens, arguments.streams)
            rates.append(len(streams) * num_tokens / seconds)
    result: dict[str, Any] = {"connections": connections, "tokens_per_second": [round(rate) for rate in rates], "latency": []}
    for load in arguments.loads:
        step = connections / load
        with ServerProcess(model, *options, "--echo-step-ms", str(step * 1e3)) as server:
            run(server.port, connections, 50, 1)
            count = int(load / connections * arguments.seconds)
            seconds, streams = run(server.port, connections, count, 1)
        added = added_latency(streams, step) * 1e3
        percentiles = {f"p{p}_ms": round(float(np.percentile(added, p)), 2) for p in (50, 90, 99, 99.9)}
        reached = len(streams) * count / seconds
        result["latency"].append({"tokens_per_second": load, "reached": round(reached), **percentiles})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000, help="of one stream")
    parser.add_argument("--streams", type=int, default=5, help="of one connection")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--loads", type=int, nargs="*", default=[7500, 20000], help="tokens/s at which latency is measured")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each latency run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(serving_model(Path(folder), 16384), arguments)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    document = {"version": 1, "commit": commit.stdout.strip(), "processors": os.cpu_count(), **result}
    text = json.dumps(document, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
