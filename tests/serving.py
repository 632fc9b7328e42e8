"""A server process for tests, and a plain HTTP client that can misbehave."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ServerProcess:
    """`megalith serve` on a free port; its log is read all the time."""

    def __init__(
        self, model: Path, *options: str, environment: dict[str, str] | None = None, wait: bool = True, seconds: float = 30
    ) -> None:
        command = [sys.executable, "-P", "-m", "megalith", "serve", str(model), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, **(environment or {})})
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait:
            until(lambda: self.event("engine_ready") is not None or self.process.poll() is not None, seconds)
            assert self.event("engine_ready"), self.events

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.events.append(json.loads(line) if line.startswith(b"{") else {"event": "text", "text": line.decode()})

    def event(self, name: str) -> dict[str, Any] | None:
        return next((event for event in reversed(self.events) if event["event"] == name), None)

    @property
    def port(self) -> int:
        event = self.event("listening")
        assert event is not None
        return int(event["port"])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)
        if self.process.stderr is not None:
            self.process.stderr.close()

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case, body. `body` is sent as JSON unless it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kind = {"content-type": "application/json"} if data is not None else {}
        try:
            connection.request(method, path, data, {**kind, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, status: int = 200, **headers: str) -> Any:
        found, _, data = self.request(method, path, body, headers)
        assert found == status, data
        return json.loads(data)

    def complete(self, **body: Any) -> Any:
        return self.json("POST", "/v1/completions", {"max_tokens": 8, **body})

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json("GET", "/facts")["load"]
        return found

    def is_idle(self) -> bool:
        load = self.facts()
        return not (load["running"] or load["waiting"] or load["kv_pages_used"])

    def raw(self, data: bytes) -> socket.socket:
        """A connection on which something was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(data)
        return connection

    def open_stream(self, body: dict[str, Any]) -> socket.socket:
        """A streaming completion, of which nothing is read yet."""
        data = json.dumps({"stream": True, **body}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        return self.raw(head.encode() + data)


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def resident_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def num_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
