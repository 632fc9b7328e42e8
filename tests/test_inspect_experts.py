"""`megalith inspect --experts` with usage logs, and `--memory` of mixtures of experts and of windowed layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import GoldenModel

from megalith.cli import run
from megalith.format.experts import ExpertIndex
from megalith.format.reader import PackedFile
from megalith.inspection.experts import experts, experts_text, mark_usage
from megalith.inspection.usage import MAX_COUNT, MAX_LINE_BYTES


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of six experts in MXFP4, two of which a token uses; two layers have a window of 16."""
    return GoldenModel("gpt_oss_mxfp4").pack(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "usage.jsonl"


def inspect_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert run(["inspect", *map(str, arguments), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_experts_are_found_in_the_file(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect_json(capsys, packed, "--experts")["experts"]
    assert found["matrices"] == ["gate_up_proj", "gate_up_bias", "down_proj", "down_bias"]
    with PackedFile(packed) as file:
        image, blobs = file.header.section("image").offset, file.index.blobs
        ranges = {
            name: [image + offset, nbytes]
            for name, offset, nbytes in zip(
                blobs.names, blobs.columns["offset"].tolist(), blobs.columns["nbytes"].tolist(), strict=True
            )
        }
    for layer in found["layers"]:
        for number, expert in enumerate(layer["experts"]):
            names = [f"layers.{layer['layer']}.experts.{number}.{matrix}" for matrix in found["matrices"]]
            assert expert == [ranges[name] for name in names]


def test_usage(packed: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log.write_text(
        '{"layer": 0, "expert": 3, "count": 30}\n\n{"expert": 5, "layer": 0, "count": 9}\r\n'
        '{"layer": 0, "expert": 5}\n{"layer": 2, "expert": 0, "count": 0}\n{"layer": 2, "expert": 1, "count": 7}'
    )
    found = inspect_json(capsys, packed, "--experts", "--usage", log)["experts"]
    first, second, third = (layer["usage"] for layer in found["layers"])
    assert first["counts"] == [0, 0, 0, 30, 0, 10]
    assert (first["count"], first["unused_experts"]) == (40, [0, 1, 2, 4])
    size = found["layers"][0]["smallest_expert_bytes"]
    assert (first["used_bytes"], first["unused_bytes"]) == (2 * size, 4 * size)
    assert (second["count"], second["used_bytes"], len(second["unused_experts"])) == (0, 0, 6)
    assert third["counts"] == [0, 7, 0, 0, 0, 0]
    assert found["usage"] == {"count": 47, "used_bytes": 3 * size, "unused_bytes": 15 * size, "num_unused": 15}
    assert run(["inspect", str(packed), "--experts", "--usage", str(log)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith(f"usage: 47 choices; 3 experts used, {3 * size:,} bytes; 15 never, {15 * size:,} bytes")
    layer = lines[2:10]
    assert layer[5].split()[:5] == ["expert", "3", "30", "75.00", "%"]
    assert layer[2].split()[:3] == ["expert", "0", "never"]


def test_usage_of_numbered_layers() -> None:
    """Layers of the log are the model's, of which only some have experts; sizes of experts may differ."""
    table = np.array([[[[0, 4096], [4096, 512]], [[8192, 4096], [12288, 1024]]]], np.uint64)
    found = experts(ExpertIndex(np.array([3], np.uint32), ("gate_up_proj", "down_proj"), table), 100)
    assert found is not None
    marked = mark_usage(found, [[0, 5]])
    assert (marked["usage"]["used_bytes"], marked["usage"]["unused_bytes"]) == (5120, 4608)
    assert "100.00 %" in experts_text(marked)[-1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: is not JSON"),
        (b"\xff\xfe", "line 2: is not JSON"),
        (b"[" * (MAX_LINE_BYTES - 1), "line 2: is not JSON"),
        (b"[3, 17]", "line 2: must be an object such as"),
        (b'{"layer": 0}', "line 2: must be an object such as"),
        (b'{"layer": 0, "expert": 1, "tokens": 2}', "line 2: must be an object such as"),
        (b'{"layer": 3, "expert": 1}', "line 2: layer 3: the file's layers with experts are 0 to 2"),
        (b'{"layer": "\x1b[31m", "expert": 1}', "line 2: is not JSON"),
        (b'{"layer": "\\u001b[31m", "expert": 1}', r"line 2: layer \x1b[31m: the file's"),
        (b'{"layer": [], "expert": 1}', "line 2: layer []"),
        (b'{"layer": true, "expert": 1}', "line 2: layer True"),
        (b'{"layer": 1, "expert": 6}', "line 2: expert 6: a layer has experts 0 to 5"),
        (b'{"layer": 1, "expert": -1}', "line 2: expert -1"),
        (b'{"layer": 1, "expert": 1.0}', "line 2: expert 1.0"),
        (b'{"layer": 1, "expert": 1, "count": -1}', "line 2: count -1"),
        (b'{"layer": 1, "expert": 1, "count": NaN}', "line 2: count nan"),
        (b'{"layer": 1, "expert": 1, "count": 1' + b"0" * 900 + b"}", "line 2: count 1000"),
        (b'{"layer": 0, "expert": 1, "count": %d}' % MAX_COUNT, "add up to at most 2^53"),
        (b" " * MAX_LINE_BYTES + b"{}", f"line 2: is longer than {MAX_LINE_BYTES} bytes"),
    ],
)
def test_hostile_logs(packed: Path, log: Path, capsys: pytest.CaptureFixture[str], line: bytes, message: str) -> None:
    log.write_bytes(b'{"layer": 0, "expert": 1}\n' + line + b"\n")
    assert run(["inspect", str(packed), "--experts", "--usage", str(log)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert str(log) in captured.err
    assert captured.err.count("\n") == 1
    assert "\x1b" not in captured.err
    assert captured.out == ""


def test_a_log_without_line_ends_is_not_read_to_its_end(packed: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(log, "wb") as file:
        file.truncate(100 << 20)
    assert run(["inspect", str(packed), "--experts", "--usage", str(log)]) == 2
    assert "line 1: is longer than" in capsys.readouterr().err


def test_wrong_usage(packed: Path, packed_llama: Path, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(packed), "--experts", "--usage", str(log)]) == 5
    assert run(["inspect", str(packed), "--usage", str(log)]) == 2
    assert "--usage goes with --experts" in capsys.readouterr().err
    log.write_text("")
    assert run(["inspect", str(packed_llama), "--experts", "--usage", str(log)]) == 2
    assert "has no experts" in capsys.readouterr().err


def test_memory_of_experts_and_windows(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = inspect_json(capsys, packed, "--memory", "--context", "200")["memory"]
    with PackedFile(packed) as file:
        config, image_bytes = file.index.config, file.header.section("image").nbytes
        blobs = [file.index.blob(i) for i in range(len(file.index.blobs))]
    expert = sum(blob.extent_bytes for blob in blobs if blob.name.startswith("layers.0.experts.4."))
    assert memory["experts"] == {
        "num_layers": 3, "num_experts": 6, "num_experts_per_tok": 2, "smallest_expert_bytes": expert,
        "largest_expert_bytes": expert, "bytes": 18 * expert,
    }  # fmt: skip
    plan = {entry["name"]: entry for entry in memory["plan"]}
    assert plan["weights"]["bytes"] == image_bytes
    less = {entry["name"]: entry["bytes"] for entry in memory["alternatives"]}
    assert sorted(config.layer_windows) == [0, 16, 16]
    assert less == {
        # a window of 16 positions may lie across two pages of 64, 200 positions take four
        "kv_cache": 2 * config.num_key_value_heads * 64 * 64 * 2 * (2 + 2 + 4),
        "weights": image_bytes - 18 * expert + 6 * expert,
    }
    assert run(["inspect", str(packed), "--memory", "--context", "200"]) == 0
    text = capsys.readouterr().out
    assert "every expert and every position kept" in text
    assert f"{less['weights']:,}" in text


def test_memory_that_cannot_be_less(packed: Path, packed_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A context within the window, a batch that may use every expert, a dense model."""
    assert inspect_json(capsys, packed, "--memory", "--context", "16", "--batch", "3")["memory"]["alternatives"] == []
    memory = inspect_json(capsys, packed_llama, "--memory")["memory"]
    assert (memory["experts"], memory["alternatives"]) == (None, [])
