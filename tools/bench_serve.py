#!/usr/bin/env python3
"""What the server costs without a model: streamed tokens a second, and the latency that it adds.

Starts `megalith serve --backend echo` and reads streams over many connections, in a process of its own. Every stream is
checked before its time counts: as many events as tokens, the prompt's text again, the mark at the end. The added latency
of a token is how long after its forward pass was over it came, relative to the earliest token of its stream.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))
OPENING_SECONDS = 0.5  # of a stream, while others are being opened: not counted as latency between tokens
PROMPT = "The quick brown fox jumps over the lazy dog. "


class StreamError(Exception):
    """A stream that is not what was asked for."""


class Client(asyncio.Protocol):
    """One connection that asks for one stream after the other, and notes when each event came."""

    def __init__(self, num_tokens: int, num_streams: int) -> None:
        body = {"prompt": PROMPT, "max_tokens": num_tokens, "stream": True, "temperature": 0}
        data = json.dumps(body).encode()
        fields = f"host: bench\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        self._request = f"POST /v1/completions HTTP/1.1\r\n{fields}".encode() + data
        self._num_tokens, self._left = num_tokens, num_streams
        self._data = bytearray()
        self._times: list[tuple[float, int]] = []
        self.streams: list[list[tuple[float, int]]] = []
        self.checked = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._left -= 1
        self._data.clear()
        self._times = []
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        events = data.count(b"data: {")
        if events:
            self._times.append((time.monotonic(), events))
        self._data += data
        if data.endswith(b"0\r\n\r\n"):
            self._finish()

    def _finish(self) -> None:
        text = b"".join(self._chunks()).decode()
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        pieces = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
        expected = (PROMPT * (self._num_tokens // len(PROMPT) + 1))[: self._num_tokens]
        if events[-1] != "[DONE]" or "".join(pieces) != expected or len(pieces) != self._num_tokens:
            self.done.set_exception(StreamError(f"{len(pieces)} events, {text[:200]!r}"))
            return
        self.checked += len(pieces)
        self.streams.append(self._times)
        if self._left:
            self._ask()
        else:
            self._transport.close()
            self.done.set_result(None)

    def _chunks(self) -> list[bytes]:
        """The body, out of its chunked coding."""
        rest = bytes(self._data).partition(b"\r\n\r\n")[2]
        chunks, at = [], 0
        while True:
            end = rest.index(b"\r\n", at)
            size = int(rest[at:end], 16)
            if not size:
                return chunks
            chunks.append(rest[end + 2 : end + 2 + size])
            at = end + 4 + size


class Server:
    """A server process on a free port."""

    def __init__(self, model: Path, *options: str) -> None:
        command = [sys.executable, "-P", "-m", "megalith", "serve", str(model), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)
        assert self.process.stderr is not None
        self.port = 0
        for line in self.process.stderr:
            event = json.loads(line)
            self.port = event.get("port", self.port)
            if event["event"] == "engine_ready":
                # a pipe that nobody reads would stop the server at its next log line
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                return
        raise SystemExit("the server did not start")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)


async def _run(port: int, connections: int, num_tokens: int, num_streams: int) -> tuple[float, list[Client]]:
    loop = asyncio.get_running_loop()
    clients = [Client(num_tokens, num_streams) for _ in range(connections)]
    begun = time.monotonic()
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
    await asyncio.gather(*(client.done for client in clients))
    return time.monotonic() - begun, clients


def run(port: int, connections: int, num_tokens: int, num_streams: int) -> tuple[float, list[Client]]:
    """Seconds and the clients, all streams checked."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(port, connections, num_tokens, num_streams))


def added_latency(clients: list[Client], step_seconds: float) -> np.ndarray:
    """Seconds, of every token of every stream."""
    added = []
    for client in clients:
        for stream in client.streams:
            times = np.array([when for when, events in stream for _ in range(events)])
            late = times - step_seconds * np.arange(len(times))
            late = late[times > times[0] + OPENING_SECONDS]
            added.append(late - late.min())
    return np.concatenate(added)


def measure(model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Throughput, and latency at given loads."""
    connections, num_tokens = arguments.connections, arguments.tokens
    options = ("--backend", "echo", "--max-sequences", str(connections), "--log-level", "info")
    with Server(model, *options) as server:
        run(server.port, connections, num_tokens, 1)
        rates = []
        for _ in range(arguments.repeat):
            seconds, clients = run(server.port, connections, num_tokens, arguments.streams)
            rates.append(sum(client.checked for client in clients) / seconds)
    result: dict[str, Any] = {"connections": connections, "tokens_per_second": [round(rate) for rate in rates], "latency": []}
    for load in arguments.loads:
        step = connections / load
        with Server(model, *options, "--echo-step-ms", str(step * 1e3)) as server:
            run(server.port, connections, 50, 1)
            seconds, clients = run(server.port, connections, int(load / connections * arguments.seconds), 1)
        added = added_latency(clients, step) * 1e3
        percentiles = {f"p{p}_ms": round(float(np.percentile(added, p)), 2) for p in (50, 90, 99, 99.9)}
        reached = sum(client.checked for client in clients) / seconds
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
    from serving_models import serving_model

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
