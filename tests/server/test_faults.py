"""Hostile requests, clients that go away, engines that die: the server stays up and gives everything back."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import ServerProcess, num_descriptors, resident_bytes, until
from serving_models import serving_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}


def status_of(connection: socket.socket) -> int:
    with connection:
        return int(connection.makefile("rb").readline().split()[1])


# bodies


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "x" * 5000}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 10**9}),
        (COMPLETIONS, {"prompt": "x", "n": 10**9}),
        (COMPLETIONS, {"prompt": "x", "n": 0}),
        (COMPLETIONS, {"prompt": "x", "logprobs": 10**6}),
        (CHAT, {"messages": HI, "logprobs": True, "top_logprobs": 10**6}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": -1}),
        (COMPLETIONS, {"prompt": [-1]}),
        (COMPLETIONS, {"prompt": [272]}),
        (COMPLETIONS, {"prompt": [2**70]}),
        (COMPLETIONS, {"prompt": []}),
        (COMPLETIONS, {"prompt": ""}),
        (COMPLETIONS, {"prompt": [[]]}),
        (COMPLETIONS, {"prompt": ["a", 1]}),
        (COMPLETIONS, {"prompt": ["a"] * 2000}),
        (COMPLETIONS, {"prompt": "x", "top_k": -5}),
        (COMPLETIONS, {"prompt": "x", "seed": 2**64}),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"272": 1}}),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"-1": 1}}),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"abc": 1}}),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"1": 1e9}}),
        (COMPLETIONS, {"prompt": "x", "stop": ["s"] * 10**5}),
        (COMPLETIONS, {"prompt": "x", "stop": "s" * 10**5}),
        (COMPLETIONS, {"prompt": "x", "stop": ""}),
        (COMPLETIONS, {"prompt": "x", "temperature": -1}),
        (COMPLETIONS, {"prompt": "x", "unheard_of": 1}),
        (COMPLETIONS, {"prompt": "x", "best_of": 5}),
        (COMPLETIONS, {}),
        (COMPLETIONS, []),
        (CHAT, {"messages": []}),
        (CHAT, {"messages": [{"role": "robot", "content": "x"}]}),
        (CHAT, {"messages": [{"role": "user"}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}),
        (CHAT, {"messages": HI, "response_format": {"type": "json_schema"}}),
        (CHAT, {"messages": HI, "response_format": schema_format({"type": "no"})}),
        (CHAT, {"messages": HI, "response_format": schema_format({"type": "string", "pattern": "("})}),
        (CHAT, {"messages": HI, "tools": [{"type": "function", "function": {"name": "bad name"}}]}),
        (CHAT, {"messages": HI, "tool_choice": "required"}),
        ("/tokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [999]}),
    ],
)  # fmt: skip
def test_bad_bodies_are_400(server: ServerProcess, path: str, body: Any) -> None:
    error = server.json("POST", path, body, status=400)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "x", "metadata": ' + b'{"a":' * 50_000,
    ],
    ids=["empty", "cut", "nan", "huge", "surrogate", "utf8", "surrogate-bytes", "deep", "deep-prompt", "deep-object"],
)
def test_bytes_that_are_no_json_are_400(server: ServerProcess, data: bytes) -> None:
    error = server.json("POST", COMPLETIONS, data, status=400)["error"]
    assert error["type"] == "invalid_request_error"


def test_the_server_is_up_after_all_that(server: ServerProcess) -> None:
    assert len(server.complete(prompt="x", ignore_eos=True)["choices"]) == 1
    until(server.is_idle)
    assert server.event("internal_error") is None


# sizes and times


@pytest.fixture(scope="module")
def strict(model: Path) -> Any:
    with ServerProcess(model, "--header-timeout", "1", "--body-timeout", "1", "--max-body-mib", "1") as running:
        yield running


def test_trickled_headers_are_408(strict: ServerProcess) -> None:
    connection = strict.raw(b"POST /v1/completions HTTP/1.1\r\n")
    for _ in range(12):
        time.sleep(0.1)
        try:
            connection.sendall(b"x: y\r\n")
        except OSError:
            break
    assert status_of(connection) == 408


def test_silence_is_408(strict: ServerProcess) -> None:
    assert status_of(strict.raw(b"")) == 408


def test_a_trickled_body_is_408(strict: ServerProcess) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n"
    begun = time.monotonic()
    assert status_of(strict.raw(head + b"{")) == 408
    assert time.monotonic() - begun < 5
    until(strict.is_idle)


def test_large_bodies_are_413(strict: ServerProcess) -> None:
    before = resident_bytes(strict.process.pid)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    assert status_of(strict.raw(head + b"content-length: 1073741824\r\n\r\n")) == 413
    connection = strict.raw(head + b"transfer-encoding: chunked\r\n\r\n")
    try:
        for _ in range(64):
            connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
    except OSError:
        pass
    assert status_of(connection) == 413
    assert resident_bytes(strict.process.pid) - before < 32 << 20


@pytest.mark.parametrize(
    "start", [b"GET /health HTTP/1.1\r\nx: ", b"GET /health HTTP/1.1\r\n", b"GET /"], ids=["one", "many", "path"]
)
def test_large_headers_are_431(strict: ServerProcess, start: bytes) -> None:
    before = resident_bytes(strict.process.pid)
    connection = strict.raw(start)
    piece = b"a: b\r\n" * 10_000 if start.endswith(b"\r\n") else b"x" * 60_000
    sent = 0
    try:
        while sent < 20 << 20:
            connection.sendall(piece)
            sent += len(piece)
    except OSError:
        pass
    with contextlib.suppress(ConnectionResetError):  # the rest of what was sent met a closed connection
        assert status_of(connection) == 431
    assert sent < 20 << 20
    assert resident_bytes(strict.process.pid) - before < 32 << 20


def test_headers_above_the_limit_in_one_piece_are_431(strict: ServerProcess) -> None:
    assert status_of(strict.raw(b"GET /health HTTP/1.1\r\nx: " + b"y" * 40_000 + b"\r\n\r\n")) == 431


def test_nonsense_is_400(strict: ServerProcess) -> None:
    assert status_of(strict.raw(b"\x16\x03\x01 hello\r\n\r\n")) == 400
    assert strict.json("GET", "/health")["status"] == "ok"


def test_wrong_methods_paths_and_types(strict: ServerProcess) -> None:
    strict.json("GET", COMPLETIONS, status=405)
    strict.json("POST", "/v1/models", {}, status=405)
    strict.json("GET", "/../etc/passwd", status=404)
    strict.json("POST", COMPLETIONS, b"prompt=x", status=415, **{"content-type": "application/x-www-form-urlencoded"})


# chat templates


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 3000000000 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{% for %}",
    ],
    ids=["memory", "time", "attributes", "raises", "syntax"],
)
def test_hostile_chat_templates_are_400(tmp_path: Path, template: str) -> None:
    hostile = serving_model(tmp_path, template=template)
    with ServerProcess(hostile, "--backend", "echo") as server:
        begun = time.monotonic()
        error = server.json("POST", CHAT, {"messages": HI}, status=400)["error"]
        assert error["code"] == "chat_template"
        assert time.monotonic() - begun < 12
        assert server.complete(prompt="x")["choices"]


def test_without_a_template_chat_is_400(tmp_path: Path) -> None:
    with ServerProcess(serving_model(tmp_path, template=None), "--backend", "echo") as server:
        assert server.json("POST", CHAT, {"messages": HI}, status=400)["error"]["code"] == "no_chat_template"


# load


def test_ten_times_the_queue_is_429(slow: ServerProcess) -> None:
    before = resident_bytes(slow.process.pid)

    def ask(_: int) -> tuple[int, str | None]:
        status, headers, _ = slow.request("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 20})
        return status, headers.get("retry-after")

    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(ask, range(60)))
    assert {status for status, _ in answers} == {200, 429}
    assert all(retry for status, retry in answers if status == 429)
    assert sum(status == 200 for status, _ in answers) >= 6
    assert resident_bytes(slow.process.pid) - before < 32 << 20
    slow.json("POST", COMPLETIONS, {"prompt": "x", "n": 7}, status=429)
    until(slow.is_idle)


def queued(slow: ServerProcess) -> list[socket.socket]:
    return [slow.open_stream({"prompt": "x", "max_tokens": 1500}) for _ in range(4)]


def in_prefill(slow: ServerProcess) -> list[socket.socket]:
    return [slow.open_stream({"prompt": "y" * 1500, "max_tokens": 100})]


def in_decode(slow: ServerProcess) -> list[socket.socket]:
    connections = [slow.open_stream({"prompt": "z", "max_tokens": 1500}) for _ in range(2)]
    for connection in connections:
        assert b"200 OK" in connection.recv(4096)
    return connections


def not_streaming(slow: ServerProcess) -> list[socket.socket]:
    return [slow.open_stream({"prompt": "z", "max_tokens": 1500, "stream": False})]


@pytest.mark.parametrize("begin", [queued, in_prefill, in_decode, not_streaming])
def test_a_client_that_goes_away_gives_all_back(
    slow: ServerProcess, begin: Callable[[ServerProcess], list[socket.socket]]
) -> None:
    connections = begin(slow)
    until(lambda: slow.facts()["running"] > 0)
    if begin is queued:
        until(lambda: slow.facts()["waiting"] == 2)
    for connection in connections:
        connection.close()
    until(slow.is_idle, 1.0)  # uncancelled they would run for half a minute


def test_a_request_beyond_its_time_is_504(model: Path) -> None:
    with ServerProcess(model, "--backend", "echo", "--echo-step-ms", "20", "--request-timeout", "0.3") as server:
        assert server.json("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1000}, status=504)["error"]["code"] == "deadline"
        _, _, data = server.request("POST", COMPLETIONS, {"prompt": "x", "max_tokens": 1000, "stream": True})
        assert json.loads(data.strip().split(b"\n\n")[-1][6:])["error"]["code"] == "deadline"
        until(server.is_idle)


# the engine


def test_a_killed_engine_fails_its_requests_alone_and_comes_back(model: Path) -> None:
    with ServerProcess(model, "--backend", "echo", "--echo-step-ms", "5") as server:
        stream = server.open_stream({"prompt": "x", "max_tokens": 1500})
        assert b"200 OK" in stream.recv(4096)
        ready = server.event("engine_ready")
        assert ready is not None
        os.kill(ready["pid"], signal.SIGKILL)
        rest = stream.makefile("rb").read()
        assert b'"code":"engine_failed"' in rest
        stream.close()
        until(lambda: server.event("engine_ended") is not None)
        until(lambda: server.event("engine_ready") is not ready, 15)
        server.json("GET", "/ready")
        assert server.complete(prompt="x")["choices"][0]["text"] == "x" * 8
        assert server.is_idle()


def test_an_engine_that_hangs_is_504(model: Path) -> None:
    with ServerProcess(model, "--backend", "echo", "--request-timeout", "0.5") as server:
        ready = server.event("engine_ready")
        assert ready is not None
        os.kill(ready["pid"], signal.SIGSTOP)
        assert server.json("POST", COMPLETIONS, {"prompt": "x"}, status=504)["error"]["code"] == "engine_timeout"
        os.kill(ready["pid"], signal.SIGCONT)
        assert server.complete(prompt="x")["choices"]
        until(server.is_idle)


FAULTY = """
import os, time
from pathlib import Path
from megalith.runtime import echo_executor, launch

faults = Path(os.environ["FAULTS"])
while (faults / "hold").exists():  # an engine that is started again waits
    time.sleep(0.01)

def faulty(method, flag):
    def call(self, *arguments):
        if flag.exists():
            what = flag.read_text()
            flag.unlink()
            if what == "hang":
                time.sleep(1000)
            raise launch.CudaError("linear.linear: CUDA_ERROR_ILLEGAL_ADDRESS (an illegal memory access was encountered)")
        return method(self, *arguments)
    return call

for name in ("submit", "collect"):
    method = getattr(echo_executor.EchoExecutor, name)
    setattr(echo_executor.EchoExecutor, name, faulty(method, faults / name))
"""


def faulty_server(model: Path, folder: Path, *options: str) -> ServerProcess:
    """Its executor fails once in the method after which a file in `folder` is named, as the file says."""
    (folder / "sitecustomize.py").write_text(FAULTY)
    environment = {"PYTHONPATH": str(folder), "FAULTS": str(folder)}
    return ServerProcess(model, "--backend", "echo", "--echo-step-ms", "5", *options, environment=environment)


@pytest.mark.parametrize("fault", ["hang", "error"])
@pytest.mark.parametrize("method", ["submit", "collect"])
def test_a_faulty_pass_fails_the_requests_it_has_and_the_engine_starts_again(
    model: Path, tmp_path: Path, fault: str, method: str
) -> None:
    """A pass that never ends, and a CUDA error after which every call fails: the process goes, and all it had."""
    with faulty_server(model, tmp_path, "--pass-timeout", "2") as server:
        assert server.complete(prompt="x")["choices"]
        ready = server.event("engine_ready")
        assert ready is not None
        streams = [server.open_stream({"prompt": "xy" * length, "max_tokens": 1500}) for length in (1, 100)]
        for stream in streams:
            assert b"200 OK" in stream.recv(4096)
        (tmp_path / "hold").touch()
        (tmp_path / "fault").write_text(fault)
        (tmp_path / "fault").rename(tmp_path / method)  # whole when the engine sees it
        for stream in streams:
            rest = b""
            while not rest.endswith(b"0\r\n\r\n"):
                rest += stream.recv(1 << 16)
            assert b'"code":"engine_failed"' in rest
            stream.close()
        assert server.request("GET", "/ready")[0] == 503
        assert server.json("POST", COMPLETIONS, {"prompt": "x"}, status=503)["error"]["code"] == "engine_not_ready"
        assert server.request("GET", "/health")[0] == 200
        assert (server.event("engine_hangs") is not None) == (fault == "hang")
        (tmp_path / "hold").unlink()
        until(lambda: server.event("engine_ready") is not ready, 15)
        assert server.complete(prompt="x")["choices"][0]["text"] == "x" * 8
        assert server.is_idle()


def test_a_slow_engine_that_works_is_not_taken_to_hang(model: Path) -> None:
    """Four passes read the prompt, and give nothing, for longer in all than one may take."""
    options = ("--backend", "echo", "--echo-step-ms", "700", "--max-batch-tokens", "65", "--pass-timeout", "2")
    with ServerProcess(model, *options) as server:
        assert server.complete(prompt="x" * 250, max_tokens=2)["choices"][0]["text"] == "xx"
        assert server.event("engine_hangs") is None


def test_readiness_is_503_while_the_engine_is_down(model: Path) -> None:
    with ServerProcess(model, "--backend", "echo") as server:
        ready = server.event("engine_ready")
        assert ready is not None
        os.kill(ready["pid"], signal.SIGSTOP)
        os.kill(ready["pid"], signal.SIGKILL)
        seen = set()
        deadline = time.monotonic() + 10
        while server.event("engine_ready") is ready and time.monotonic() < deadline:
            seen.add(server.request("GET", "/ready")[0])
            seen.add(server.request("POST", COMPLETIONS, {"prompt": "x"})[0])
            assert server.request("GET", "/health")[0] == 200
        assert 503 in seen
        assert seen <= {200, 503, 500}


def test_weights_that_give_nan_end_the_request_with_an_error(tmp_path: Path) -> None:
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import load_file, save_file
    from serving_models import checkpoint

    from megalith.converter.convert import convert

    folder = checkpoint(tmp_path / "tiny")
    tensors = load_file(folder / "model.safetensors")
    # column 0 is zero for every token but 100, for which the last logit overflows
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        tensors[name][0] = 0
    tensors["model.embed_tokens.weight"][:, 0] = 0
    tensors["model.embed_tokens.weight"][100, 0] = 100
    tensors["lm_head.weight"][271] = np.array([3e38, *[0] * 31]).astype(ml_dtypes.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "tiny.lith", None, force=True)
    with ServerProcess(tmp_path / "tiny.lith") as server:
        kept = {"ignore_eos": True, "logit_bias": {"100": -100}}
        good = server.complete(prompt=[51] * 70, **kept)
        assert server.json("POST", COMPLETIONS, {"prompt": [*[50] * 70, 100]}, status=500)["error"]["code"] == "not_finite"
        again = server.complete(prompt=[50] * 70, **kept)
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert good["choices"]
        until(server.is_idle)


def test_a_small_cache_preempts_and_all_requests_are_answered(model: Path) -> None:
    with ServerProcess(model, "--kv-cache-mib", "1", "--max-seq-len", "1024") as server:  # 128 pages

        def ask(number: int) -> str:
            body = {"prompt": f"{number} " * 200, "max_tokens": 400, "seed": number, "ignore_eos": True}
            return str(server.complete(**body)["choices"][0]["text"])

        with ThreadPoolExecutor(24) as pool:
            texts = list(pool.map(ask, range(24)))
        assert all(texts)
        _, _, data = server.request("GET", "/metrics")
        preempted = next(line for line in data.decode().splitlines() if line.startswith("megalith_preemptions_total"))
        assert float(preempted.split()[1]) > 0
        until(server.is_idle)


@pytest.mark.parametrize("how", ["replace", "truncate"])
def test_the_file_may_change_while_it_is_served(model: Path, tmp_path: Path, how: str) -> None:
    copy = tmp_path / "copy.lith"
    shutil.copy(model, copy)
    with ServerProcess(copy) as server:
        body = {"prompt": "Hello", "temperature": 0, "max_tokens": 20}
        before = server.complete(**body)["choices"][0]["text"]
        if how == "replace":
            (tmp_path / "other").write_bytes(os.urandom(1 << 16))
            (tmp_path / "other").replace(copy)
        else:
            copy.write_bytes(b"")
        assert server.complete(**body)["choices"][0]["text"] == before
        wanted = {"messages": HI, "max_tokens": 20, "response_format": {"type": "json_object"}}
        assert server.json("POST", CHAT, wanted)["choices"][0]["message"]["content"].startswith("{")


# soak


def test_random_aborts_end_at_the_baseline(model: Path) -> None:
    """The ten-minute and the one-hour form are `tools/soak_serve.py`."""
    from soak_serve import baseline, soak

    with ServerProcess(model, "--max-queue", "64") as server:
        soak(server, 2.0, 8, random.Random(1))
        before = baseline(server)
        result = soak(server, 5.0, 8, random.Random(2))
        after = baseline(server)
    assert result["aborted"] > 10
    assert result["completed"] > 10
    assert after["kv_pages_used"] == before["kv_pages_used"] == 0
    assert after["descriptors"] <= before["descriptors"] + 2
    assert after["resident_bytes"] < before["resident_bytes"] + (24 << 20)
    assert num_descriptors(os.getpid()) < 500
