"""Safetensors headers that lie, and tensors that are missing, unknown, misshapen or of no use."""

from __future__ import annotations

import json
import math
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    EMBEDDING,
    INVALID,
    NORM,
    UNSUPPORTED,
    Tensor,
    header_entries,
    refused,
    replaced,
    safetensors_bytes,
    tiny_config,
    tiny_tensors,
    write_checkpoint,
)

from megalith.cli import run
from megalith.converter.convert import convert


@pytest.mark.parametrize("content", [b"", b"\x02", b"\0" * 7, b"\0" * 8, b"\x02\0\0\0\0\0\0\0", b"\x02\0\0\0\0\0\0\0{"])
def test_files_too_short_for_a_header(content: bytes, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, INVALID, "model.safetensors: header")


@pytest.mark.parametrize("length", [3, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
def test_header_lengths_that_lie(length: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    tracemalloc.start()
    refused(folder, INVALID, "model.safetensors: header")
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_header_of_a_sparse_giant(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint")
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", (64 << 20) + 1))
        file.truncate(1 << 40)
    refused(folder, INVALID, "header of 67108865 bytes in a file of 1099511627776: not safetensors")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"[]", "header is not a JSON object"),
        (b"null", "header is not a JSON object"),
        (b"\xff{}", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a": ' * 40 + b"1" + b"}" * 40, "nested deeper than 32"),
        (b'{"\\u001b[31m": 1, "\\u001b[31m": 1}', "duplicate key '\\x1b[31m'"),
        (b"{" + b'"a":{},' * 1_500_000 + b'"b":{}}', "more than 2621440 JSON values"),
    ],
)  # fmt: skip
def test_headers_that_are_not_one(header: bytes, words: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", header=header)
    tracemalloc.start()
    refused(folder, INVALID, "model.safetensors: header", words)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_duplicate_tensor_name(tmp_path: Path) -> None:
    text = json.dumps(header_entries(tiny_tensors(tiny_config())))
    entry = json.dumps({NORM: {"dtype": "BF16", "shape": [16], "data_offsets": [0, 32]}})
    folder = write_checkpoint(tmp_path / "checkpoint", header=(text[:-1] + ", " + entry[1:]).encode())
    refused(folder, INVALID, f"model.safetensors: header: duplicate key '{NORM}'")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (None, "lacks dtype, shape or data_offsets"),
        ([], "lacks dtype, shape or data_offsets"),
        ({"dtype": "BF16", "shape": [16]}, "lacks dtype, shape or data_offsets"),
        ({"dtype": "Q4"}, "dtype Q4 is not known"),
        ({"dtype": None}, "dtype None is not known"),
        ({"dtype": ["BF16"]}, "dtype ['BF16'] is not known"),
        ({"dtype": {}}, "dtype {} is not known"),
        ({"dtype": "\x1b[2J"}, "dtype \\x1b[2J is not known"),
        ({"shape": 16}, "shape 16: dimensions must be 0 to 2147483647"),
        ({"shape": "16"}, "shape 16: dimensions"),
        ({"shape": [0, 2**40]}, "shape [0, 1099511627776]: dimensions"),
        ({"shape": [2**31]}, "shape [2147483648]: dimensions"),
        ({"shape": [-16]}, "shape [-16]: dimensions"),
        ({"shape": [16.0]}, "shape [16.0]: dimensions"),
        ({"shape": [True]}, "shape [True]: dimensions"),
        ({"shape": [math.nan]}, "shape [nan]: dimensions"),
        ({"shape": [10**400]}, "dimensions"),
        ({"shape": [1] * 9}, "dimensions"),
        ({"shape": [2**31 - 1] * 8}, "do not span"),
        ({"shape": [0, 2**31 - 1]}, "do not span the 0 bytes"),
        ({"shape": []}, "do not span the 2 bytes"),
        ({"data_offsets": [384]}, "are not two byte offsets"),
        ({"data_offsets": None}, "are not two byte offsets"),
        ({"data_offsets": [416, 384]}, "do not span"),
        ({"data_offsets": [-32, 0]}, "are not two byte offsets"),
        ({"data_offsets": [384.0, 416.0]}, "are not two byte offsets"),
        ({"data_offsets": [2**63, 2**63 + 32]}, "are not two byte offsets"),
        ({"data_offsets": [2**61, 2**61 + 32]}, "overlap or hole"),
        ({"data_offsets": [0, 32]}, "overlap or hole"),
        ({"data_offsets": [382, 414]}, "overlap or hole"),
        ({"data_offsets": [384, 418]}, "do not span the 32 bytes of BF16 [16]"),
    ],
)  # fmt: skip
def test_header_entries(entry: Any, words: str, tmp_path: Path) -> None:
    tensors = tiny_tensors(tiny_config())
    name = list(tensors)[1]
    header = header_entries(tensors)
    assert header[name] == {"dtype": "BF16", "shape": [16], "data_offsets": [384, 416]}
    whole = isinstance(entry, dict) and len(entry) == 1
    header[name] = {**header[name], **entry} if whole else entry
    refused(write_checkpoint(tmp_path / "checkpoint", header=header), INVALID, "model.safetensors: tensor '", words)


def test_holes_and_ends(tmp_path: Path) -> None:
    tensors = tiny_tensors(tiny_config())
    data = safetensors_bytes(tensors)
    folder = write_checkpoint(tmp_path / "checkpoint")
    for content, words in ((data + b"\0", "tensors end at byte"), (data[:-1], "tensors end at byte")):
        (folder / "model.safetensors").write_bytes(content)
        refused(folder, INVALID, "model.safetensors", words)
    hole = header_entries({"hole": Tensor("U8", (2,), b"\0\0"), **tensors})
    del hole["hole"]
    refused(write_checkpoint(folder, header=hole), INVALID, "starts at byte", "overlap or hole")


def test_too_many_tensors(tmp_path: Path) -> None:
    header = b"{" + b",".join(b'"%x":0' % i for i in range(262_145)) + b"}"
    refused(write_checkpoint(tmp_path / "checkpoint", header=header), INVALID, "262145 tensors, at most 262144 are allowed")


def test_pickled_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
        refused(folder, INVALID, f"neither model.safetensors nor model.safetensors.index.json is there: {name} is a pickle")
        (folder / name).unlink()
    refused(folder, INVALID, "neither model.safetensors nor model.safetensors.index.json is there\n")
    os.rename(folder / "config.json", folder / "config.txt")
    (folder / "config.json").write_bytes(pickle.dumps(Bomb()))
    refused(folder, INVALID, "config.json: not JSON")
    assert not (tmp_path / "executed").exists()


def test_pickle_beside_safetensors_is_passed_over(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "c", files={"pytorch_model.bin": b"\x80"}), tmp_path / "model.lith")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "auto_map asks to run code of the checkpoint"),
        ({"auto_map": None}, "auto_map asks to run code"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config gptq is not supported"),
        ({"quantization_config": "\x1b[31m"}, "quantization_config \\x1b[31m is not supported"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is none of LlamaForCausalLM"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope type longrope is none of default"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope type ['yarn'] is none of default"),
        ({"hidden_act": "gelu"}, "hidden_act gelu is not supported"),
    ],
)  # fmt: skip
def test_what_is_not_supported(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    code = "import os; os.mkdir('executed')"
    folder = write_checkpoint(tmp_path / "checkpoint", tiny_config(**changes), tiny_tensors(tiny_config()))
    (folder / "modeling.py").write_text(code)
    refused(folder, UNSUPPORTED, "checkpoint/config.json: ", words)


@pytest.mark.parametrize("name", sorted(tiny_tensors(tiny_config())))
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=replaced(name, None))
    refused(folder, INVALID, f"checkpoint: tensor '{name}' is missing")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj.bias"),
        ("model.layers.1.input_layernorm.weight", "model.layers.1.input_layernorm.weight"),
        ("", ""),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("two\nlines\r", "two\\nlines\\r"),
        ("\u202e\u2028\x9b31m\ud800", "\\u202e\\u2028\\x9b31m\\ud800"),
        ("'; rm -rf /", "'; rm -rf /"),
        ("x" * 5000, "..."),
        ("\x1b[31m.rotary_emb.inv_freq", "\\x1b[31m.rotary_emb.inv_freq"),
        ("model.rotary_emb.inv_freq\n", "model.rotary_emb.inv_freq\\n"),
        ("model.layers.\u0663.self_attn.rotary_emb.inv_freq", "model.layers.\\u0663.self_attn.rotary_emb.inv_freq"),
        ("vision_tower.rotary_emb.inv_freq", "vision_tower.rotary_emb.inv_freq"),
    ],
)
def test_a_tensor_without_a_rule_is_named(name: str, shown: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=replaced(name, Tensor("F32", (2,), bytes(8))))
    line = refused(folder, INVALID, "checkpoint: no rule of LlamaForCausalLM maps tensor '", shown)
    assert len(line) < 400


@pytest.mark.parametrize("shape", [(), (0,), (192,), (16, 12), (12, 15), (13, 16), (1, 12, 16), (12, 16, 1)])
def test_wrong_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = Tensor("BF16", shape, bytes(2 * math.prod(shape)))
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=replaced(EMBEDDING, tensor))
    words = f"tensor '{EMBEDDING}': shape {list(shape)}, the config makes it [12, 16]"
    refused(folder, INVALID, "model.safetensors: ", words)


@pytest.mark.parametrize(("dtype", "item_bytes"), [("F64", 8), ("I8", 1), ("U8", 1), ("F8_E4M3", 1), ("I64", 8), ("BOOL", 1)])
def test_unsupported_dtypes(dtype: str, item_bytes: int, tmp_path: Path) -> None:
    tensor = Tensor(dtype, (12, 16), bytes(192 * item_bytes))
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=replaced(EMBEDDING, tensor))
    refused(folder, UNSUPPORTED, f"tensor '{EMBEDDING}': dtype {dtype}: weights must be BF16, F16 or F32")


def test_ignored_buffers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    tensors = {**tiny_tensors(tiny_config()), **{name: Tensor("F32", (4,), bytes(16)) for name in names}}
    folder = write_checkpoint(tmp_path / "checkpoint", tensors=tensors)
    assert convert(folder, tmp_path / "model.lith").plan.mapping.ignored == names
    assert run(["convert", str(folder), str(tmp_path / "x.lith"), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("not stored: ") == 2


def test_more_ignored_buffers_than_an_index_may_list(tmp_path: Path) -> None:
    """What no reader would accept is not written."""
    header = header_entries(tiny_tensors(tiny_config()))
    end = max(entry["data_offsets"][1] for entry in header.values())
    for i in range(70_000):
        name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
        header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    folder = write_checkpoint(tmp_path / "checkpoint", header=header)
    refused(folder, INVALID, "config.json: more than 65536 MessagePack objects")
