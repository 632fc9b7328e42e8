"""Keys, TLS, CORS, draining, configuration: what an operator relies on."""

from __future__ import annotations

import base64
import json
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from serving import ServerProcess, until

from megalith.cli import run
from megalith.format.errors import RequestError
from megalith.runtime.server.app import ROUTES
from megalith.runtime.server.auth import Keys

KEY, FILE_KEY, ENVIRONMENT_KEY = "flag-key-1234", "file-key-1234", "environment-key-1234"


@pytest.fixture(scope="module")
def locked(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# who may\n{FILE_KEY}\n\n")
    options = ("--backend", "echo", "--api-key", KEY, "--api-key-file", str(keys))
    with ServerProcess(model, *options, environment={"MEGALITH_API_KEYS": f"{ENVIRONMENT_KEY}, another-key-1"}) as running:
        yield running


@pytest.mark.parametrize("path", [*ROUTES, "/v1/models/tiny", "/nowhere"])
@pytest.mark.parametrize(
    "given", [None, "Bearer wrong-key-1234", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer", f"Token {KEY}"]
)
def test_every_route_but_health_asks_for_a_key(locked: ServerProcess, path: str, given: str | None) -> None:
    method = ROUTES[path].method if path in ROUTES else "GET"
    headers = {"authorization": given} if given else {}
    status, answer, data = locked.request(method, path, {} if method == "POST" else None, headers)
    if path.startswith("/health"):
        assert status == 200
        return
    assert status == 401
    assert "www-authenticate" in answer
    assert json.loads(data)["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", [KEY, FILE_KEY, ENVIRONMENT_KEY, "another-key-1"])
def test_keys_from_flag_file_and_environment(locked: ServerProcess, key: str) -> None:
    assert locked.json("GET", "/v1/models", authorization=f"Bearer {key}")["data"]
    basic = base64.b64encode(f"anyone:{key}".encode()).decode()
    assert locked.request("GET", "/", headers={"authorization": f"Basic {basic}"})[0] == 200


def test_keys_are_compared_by_digest_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[tuple[bytes, bytes]] = []
    original = hmac.compare_digest

    def compare(left: Any, right: Any) -> bool:
        compared.append((left, right))
        return original(left, right)

    keys = Keys(["first-key-1", "second-key-1", "third-key-1"])
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for given in (b"Bearer first-key-1", b"Bearer x", b"", b"Basic !!"):
        compared.clear()
        assert (keys.identity(given) is not None) == (given == b"Bearer first-key-1")
        assert [(len(left), len(right)) for left, right in compared] == [(32, 32)] * 3


@pytest.mark.parametrize("key", ["short", "with a space", "ünicode-key"])
def test_weak_or_unusable_keys_are_refused(key: str) -> None:
    with pytest.raises(RequestError, match="API key"):
        Keys([key])


def test_cors_is_off_unless_asked_for(model: Path, server: ServerProcess) -> None:
    ask = {"origin": "https://app.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in server.request("OPTIONS", "/v1/completions", headers=ask)[1]
    with ServerProcess(model, "--backend", "echo", "--cors-origin", "https://app.example", "--api-key", KEY) as open_to_one:
        assert open_to_one.request("OPTIONS", "/v1/completions", headers=ask)[1]["access-control-allow-origin"] == ask["origin"]
        _, headers, _ = open_to_one.request("OPTIONS", "/v1/completions", headers=ask | {"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in headers


def test_tls(model: Path, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2"]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command, *subject], check=True, capture_output=True)
    with ServerProcess(model, "--backend", "echo", "--tls-cert", str(cert), "--tls-key", str(key)) as secure:
        context = ssl.create_default_context(cafile=str(cert))
        with urllib.request.urlopen(f"https://localhost:{secure.port}/version", context=context, timeout=10) as answer:
            assert answer.status == 200


def begin_stream(server: ServerProcess, num_tokens: int) -> Any:
    stream = server.open_stream({"prompt": "x", "max_tokens": num_tokens})
    assert b"200 OK" in stream.recv(4096)
    return stream


def test_sigterm_lets_requests_finish_and_refuses_new_ones(model: Path) -> None:
    with ServerProcess(model, "--backend", "echo", "--echo-step-ms", "10") as server:
        stream = begin_stream(server, 100)
        keep = server.raw(b"")
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.event("draining") is not None)
        data = stream.makefile("rb").read()
        assert data.count(b'"text":') >= 90
        assert b"[DONE]" in data
        assert server.process.wait(10) == 0
        stream.close()
        keep.close()
    assert server.event("stopped")


def test_draining_has_a_deadline(model: Path) -> None:
    with ServerProcess(model, "--backend", "echo", "--echo-step-ms", "50", "--drain-timeout", "1") as server:
        stream = begin_stream(server, 1500)
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(10)
        assert 0.5 < time.monotonic() - begun < 6
        stream.close()


def test_a_second_sigterm_stops_at_once(model: Path) -> None:
    with ServerProcess(model, "--backend", "echo", "--echo-step-ms", "50") as server:
        stream = begin_stream(server, 1500)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.event("draining") is not None)
        time.sleep(0.2)
        assert server.process.poll() is None
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(10)
        assert time.monotonic() - begun < 3
        stream.close()


def test_a_log_that_nobody_reads_any_more_stops_nothing(model: Path) -> None:
    command = [sys.executable, "-P", "-m", "megalith", "serve", str(model), "--port", "0", "--backend", "echo"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    port = json.loads(process.stderr.readline())["port"]
    process.stderr.close()
    for _ in range(3):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            assert answer.status == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) in (0, 120)  # 120: Python could not flush its standard error


def test_the_engine_ends_with_a_killed_server(model: Path) -> None:
    server = ServerProcess(model, "--backend", "echo")
    ready = server.event("engine_ready")
    assert ready is not None
    server.process.kill()
    server.process.wait()
    engine = Path(f"/proc/{ready['pid']}/cmdline")
    until(lambda: not engine.exists() or not engine.read_bytes(), 5)
    server.__exit__()


def test_logs_are_json_with_request_ids(server: ServerProcess) -> None:
    _, headers, _ = server.request(
        "POST", "/v1/completions", {"prompt": "x", "max_tokens": 2, "ignore_eos": True}, {"x-request-id": "abc-1"}
    )
    assert headers["x-request-id"] == "abc-1"
    until(lambda: any(event.get("request_id") == "abc-1" for event in server.events))
    event = next(event for event in server.events if event.get("request_id") == "abc-1")
    assert (event["event"], event["status"], event["completion_tokens"]) == ("request", 200, 2)
    _, headers, _ = server.request("GET", "/health", headers={"x-request-id": "not fine; x"})
    assert headers["x-request-id"] != "not fine; x"
    assert not [event for event in server.events if event["event"] == "text"]


def test_dry_run_and_config_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "serve.toml"
    config.write_text('max-sequences = 3\nkv-cache-mib = 2\nmax_queue = 7\nbackend = "numpy"\napi-key-file = "/nowhere"\n')
    assert run(["serve", str(model), "--config", str(config), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["max_sequences"], plan["max_queue"], plan["backend"]) == (3, 7, "numpy")
    assert plan["kv_cache_bytes"] == plan["kv_pages"] * plan["kv_page_bytes"] <= 2 << 20
    assert run(["serve", str(model), "--config", str(config), "--max-sequences", "5", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["max_sequences"] == 5
    assert run(["serve", str(model), "--dry-run"]) == 0
    assert "kv_cache_bytes" in capsys.readouterr().out
    config.write_text("max_sequence = 3\n")
    assert run(["serve", str(model), "--config", str(config), "--dry-run"]) == 2
    assert "max_sequence" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--max-seq-len", "4096"], 2),
        (["--max-batch-tokens", "10"], 2),
        (["--tls-cert", "/etc/hostname"], 2),
        (["--host", "999.1.1.1"], 2),
        (["--api-key", "x"], 2),
        (["--api-key-file", "/nowhere"], 5),
        (["--backend", "cupy"], 4),
    ],
)
def test_what_cannot_be_served_ends_the_command(model: Path, options: list[str], code: int) -> None:
    server = ServerProcess(model, *options, wait=False)
    assert server.process.wait(20) == code
    server.__exit__()


def test_verify_full_refuses_a_flipped_bit(model: Path, tmp_path: Path) -> None:
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    broken = tmp_path / "broken.lith"
    broken.write_bytes(data)
    server = ServerProcess(broken, "--verify", "full", wait=False)
    assert server.process.wait(20) == 1
    server.__exit__()
    assert any("broken.lith" in event.get("text", "") for event in server.events)
    with ServerProcess(model, "--verify", "full", "--backend", "echo") as running:
        assert running.complete(prompt="x")["choices"]
