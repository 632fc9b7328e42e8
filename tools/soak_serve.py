#!/usr/bin/env python3
"""Load with random aborts for a given time; memory, descriptors and pages must end where they began.

python tools/soak_serve.py --minutes 10        # before a release: --minutes 60
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from serving import ServerProcess, num_descriptors, resident_bytes, until

_WARM_SECONDS = 20.0
_MEMORY_SLACK = 32 << 20


def baseline(server: ServerProcess) -> dict[str, int]:
    """What the server and its engine hold once nothing runs."""
    until(server.is_idle, 30)
    ready = server.event("engine_ready")
    assert ready is not None
    pids = [server.process.pid, ready["pid"]]
    time.sleep(0.3)  # connections that were closed are given back
    return {
        "resident_bytes": sum(map(resident_bytes, pids)),
        "descriptors": sum(map(num_descriptors, pids)),
        "kv_pages_used": int(server.facts()["kv_pages_used"]),
    }


def soak(server: ServerProcess, seconds: float, threads: int, source: random.Random) -> dict[str, int]:
    """Requests of all kinds from many threads, of which a third go away before their end."""
    counts = {"completed": 0, "aborted": 0, "refused": 0}
    stop = time.monotonic() + seconds
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        mine = random.Random(seed)
        try:
            while time.monotonic() < stop:
                counts[_one(server, mine)] += 1
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(source.getrandbits(32),)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return counts


def _one(server: ServerProcess, source: random.Random) -> str:
    body: dict[str, Any] = {
        "prompt": source.choice(["shared beginning of many prompts " * 8, ""]) + "x" * source.randrange(1, 600),
        "max_tokens": source.randrange(1, 200),
        "n": source.choice([1, 1, 1, 3]),
        "seed": source.getrandbits(20),
        "stream": source.random() < 0.7,
        "ignore_eos": True,
    }
    if source.random() < 0.2:
        body["logprobs"] = 2
    with server.open_stream(body) as connection:
        if source.random() < 0.35:
            connection.settimeout(source.random() * 0.2)
            with contextlib.suppress(TimeoutError):
                connection.recv(1 << 14)
            return "aborted"
        return _read(connection)


def _read(connection: socket.socket) -> str:
    with connection.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        length, line = 0, b"x"
        is_chunked = False
        while line.strip():
            line = stream.readline().lower()
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
            is_chunked |= line.startswith(b"transfer-encoding:")
        if is_chunked:
            while size := int(stream.readline(), 16):
                stream.read(size + 2)
        else:
            stream.read(length)
    if status not in (200, 429):
        raise AssertionError(f"status {status}")
    return "completed" if status == 200 else "refused"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", type=Path, help="a packed file; default: a tiny one")
    parser.add_argument("--option", action="append", default=[], help="of `megalith serve`, such as --option=--backend=cupy")
    arguments = parser.parse_args()
    from serving_models import serving_model

    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or serving_model(Path(folder))
        with ServerProcess(model, *arguments.option) as server:
            source = random.Random(arguments.seed)
            soak(server, _WARM_SECONDS, arguments.threads, source)
            before = baseline(server)
            counts = soak(server, arguments.minutes * 60, arguments.threads, source)
            after = baseline(server)
    ok = (
        after["kv_pages_used"] == 0
        and after["descriptors"] <= before["descriptors"] + 2
        and after["resident_bytes"] <= before["resident_bytes"] + _MEMORY_SLACK
    )
    print(
        json.dumps({"version": 1, "minutes": arguments.minutes, **counts, "before": before, "after": after, "ok": ok}, indent=2)
    )
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
