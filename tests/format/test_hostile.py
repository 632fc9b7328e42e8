"""Whatever a file says, the reader raises a MegalithError that names file and place, in little memory and time."""

import os
import random
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import zstandard
from fuzz_reader import check_message, mutate_bytes, mutate_index, outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_parts import (
    FEATURES_OFFSET,
    Parts,
    assemble,
    compress,
    edited,
    field,
    patch,
    read_everything,
    reseal,
    section_entry,
    start_of,
    take_apart,
    with_cells,
    with_index,
)

from megalith.format import canonical
from megalith.format.constants import HEADER_BYTES
from megalith.format.errors import EXIT_UNSUPPORTED, FormatError, MegalithError, UnsupportedError
from megalith.format.reader import PackedFile

FUZZ = settings(max_examples=400, deadline=None)
VALID = ["minimal", "dense", "half", "metadata", "mxfp4", "moe", "fused", "fused-transposed", "fused-mxfp4"]


@pytest.fixture(scope="session")
def parts(minimal: bytes) -> Parts:
    return take_apart(minimal)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "hostile.lith"


def refusal(path: Path, read: Callable[[Path], object] = read_everything) -> MegalithError:
    """The error of reading a file, which must be one."""
    try:
        read(path)
    except MegalithError as error:
        check_message(str(error), path)
        return error
    raise AssertionError(f"{path} opens")


def refused(data: bytes, path: Path) -> MegalithError:
    path.write_bytes(data)
    return refusal(path)


def names_place(error: MegalithError) -> bool:
    return any(place in str(error) for place in ("header", "section '", "chunk "))


def index_end(file: bytes) -> int:
    return start_of(file, "index") + int.from_bytes(file[section_entry("index") + 16 :][:8], "little")


def test_every_truncation_is_refused(minimal: bytes, scratch: Path):
    """Byte by byte up to the end of the index, then at and around every section boundary and at samples."""
    boundaries = {start_of(minimal, kind) for kind in ("image", "rope", "files", "records", "checksums")}
    lengths = set(range(index_end(minimal) + 1)) | set(range(0, len(minimal), 997)) | {len(minimal) - 1}
    lengths |= {boundary + step for boundary in boundaries for step in (-1, 0, 1)}
    scratch.write_bytes(minimal)
    for length in sorted(lengths, reverse=True):
        os.truncate(scratch, length)
        error = refusal(scratch, PackedFile)
        assert names_place(error), error
        assert error.rule == ("H1" if length < 8 else "H2" if length < HEADER_BYTES else "H7")


def test_every_bit_flip_of_header_and_index_is_refused(minimal: bytes, scratch: Path):
    scratch.write_bytes(minimal)
    descriptor = os.open(scratch, os.O_WRONLY)
    try:
        for at in range(index_end(minimal)):
            for bit in range(8):
                os.pwrite(descriptor, bytes([minimal[at] ^ 1 << bit]), at)
                error = refusal(scratch, PackedFile)
                assert names_place(error), (at, bit, error)
            os.pwrite(descriptor, minimal[at : at + 1], at)
    finally:
        os.close(descriptor)


def test_every_later_byte_is_checked(minimal: bytes, scratch: Path):
    """Image, rope, records, checksums and the zeros between sections: a flip is found once everything is read."""
    for at in [*range(index_end(minimal), len(minimal), 509), *range(len(minimal) - 4096, len(minimal), 61)]:
        error = refused(patch(minimal, at, bytes([minimal[at] ^ 0x10])), scratch)
        assert error.rule in {"C2", "S4", "S5"}
        assert names_place(error)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (8, "<H", 1, "format 1.2 needs version >= 1.2 of the reader, this is 0.2"),
        (10, "<H", 9, "format 0.9 needs version >= 0.9 of the reader, this is 0.2"),
        (10, "<H", 0, "format 0.0 predates 0.2: convert the checkpoint again"),
        (FEATURES_OFFSET, "<Q", 1 | 1 << 63, "needs unknown feature bit 63"),
        (FEATURES_OFFSET, "<Q", 1 | 8, "needs unknown feature bit 3"),
    ],
)
def test_other_versions_and_features_are_named(minimal: bytes, scratch: Path, offset, layout, value, message):
    error = refused(field(minimal, offset, layout, value), scratch)
    assert isinstance(error, UnsupportedError)
    assert error.exit_code == EXIT_UNSUPPORTED
    assert message in str(error)


@pytest.mark.parametrize("kind", ["index", "image", "rope", "files", "records", "checksums"])
@pytest.mark.parametrize("value", [0, 1, 2**53 + 1, 2**63, 2**64 - 4096, 2**64 - 1])
@pytest.mark.parametrize("column", ["offset", "nbytes"])
def test_section_table_overflows(minimal: bytes, scratch: Path, kind: str, value: int, column: str):
    at = section_entry(kind) + (8 if column == "offset" else 16)
    if int.from_bytes(minimal[at : at + 8], "little") != value:
        assert refused(field(minimal, at, "<Q", value), scratch).rule in {"S2", "S3", "S4", "H7", "R3", "D1", "C1"}


@pytest.mark.parametrize("change", [-4096, -8, 8, 4096])
def test_section_holes_overlaps_and_misalignment(minimal: bytes, scratch: Path, change: int):
    for kind in ("index", "image", "rope", "records"):
        assert refused(field(minimal, section_entry(kind) + 8, "<Q", start_of(minimal, kind) + change), scratch).rule == "S2"


@pytest.mark.parametrize(
    ("table", "column", "value", "rule"),
    [
        ("blobs", "offset", 2**64 - 4096, "B4"),
        ("blobs", "offset", 8192 + 4096, "B4"),
        ("blobs", "offset", 8192 + 16, "B4"),
        ("blobs", "nbytes", 0, "B3"),
        ("blobs", "nbytes", 2**64 - 1, "B3"),
        ("blobs", "rows", 0, "B3"),
        ("blobs", "rows", 2**31 - 16, "B3"),
        ("blobs", "rows", 2**64 - 16, "B3"),
        ("blobs", "rows", 47, "B3"),
        ("blobs", "columns", 0, "B3"),
        ("blobs", "columns", 2**40, "B3"),
        ("blobs", "dtype", 3, "B2"),
        ("blobs", "layout", 0, "B2"),
        ("blobs", "layout", 1, "B3"),
        ("tensors", "blob", 2**32 - 1, "T2"),
        ("tensors", "ndim", 3, "T3"),
        ("tensors", "ndim", 1, "T5"),
        ("tensors", "rows", 2**64 - 1, "T5"),
        ("tensors", "row_base", 2**64 - 16, "T5"),
        ("tensors", "row_param", 0, "T5"),
        ("tensors", "row_order", 255, "T4"),
    ],
)
def test_hostile_cells(parts: Parts, scratch: Path, table: str, column: str, value: int, rule: str):
    assert refused(with_cells(parts, table, 2, **{column: value}), scratch).rule == rule


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 2**31 - 1, "num_key_value_heads": 2**31 - 1, "head_dim": 2**31 - 2},
        {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1},
        {"num_hidden_layers": 16384, "layer_windows": [0] * 16384, "sparse_layers": [False] * 16384},
        {"num_hidden_layers": 2, "layer_windows": [0, 0], "sparse_layers": [False] * 2},
        {"sparse_layers": [True], "num_experts": 4096, "num_experts_per_tok": 1, "moe_intermediate_size": 2**31 - 1},
        {
            "num_hidden_layers": 16384,
            "layer_windows": [0] * 16384,
            "sparse_layers": [True] * 16384,
            "num_experts": 4096,
            "num_experts_per_tok": 4096,
            "moe_intermediate_size": 1,
            "expert_bias": True,
        },
    ],
)
def test_config_of_another_model_is_refused_cheaply(parts: Parts, scratch: Path, changes: dict[str, Any]):
    config = {**parts.index["config"], **changes}
    data = with_index(parts, "config", to=config)
    assert small_memory(data, scratch).rule == "B5"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", "\x1b[31m"),
        ("architecture", ""),
        ("num_hidden_layers", 16385),
        ("num_hidden_layers", True),
        ("num_key_value_heads", 0),
        ("head_dim", 15),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 1),
        ("layer_windows", [-1]),
        ("layer_windows", [0, 0]),
        ("bos_token_id", 19),
        ("eos_token_ids", [0] * 65),
        ("qkv_bias", 1),
        ("sparse_layers", [0]),
        ("sparse_layers", [False, False]),
        ("num_experts", 1),
        ("moe_intermediate_size", 1),
        ("num_experts_per_tok", False),
        ("qk_norm", True),
        ("qk_norm", []),
        ("router", "softmax"),
        ("clip_qkv", 0.0),
        ("clip_qkv", 8),
        ("swiglu_limit", float("nan")),
        ("swiglu_limit", float("inf")),
    ],
)
def test_config_out_of_range(parts: Parts, scratch: Path, key: str, value: Any):
    error = refused(with_index(parts, "config", key, to=value), scratch)
    assert error.rule == "I4"
    assert f"config.{key}" in str(error)


@pytest.mark.parametrize(
    "rope",
    [
        {"type": ["default"]},
        {"type": "ntk"},
        {"theta": 1.0},
        {"theta": float("nan")},
        {"theta": 10000},
        {"type": "linear", "parameters": {"factor": 0.5}},
        {"type": "linear", "parameters": {"factor": float("inf")}},
        {"type": "dynamic", "parameters": {"factor": 2.0, "original_max_position_embeddings": 4.5}},
        {"type": "llama3", "parameters": {"factor": 8.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0,
                                          "original_max_position_embeddings": 8.0}},
    ],
)  # fmt: skip
def test_hostile_rope(parts: Parts, scratch: Path, rope: dict[str, Any]):
    assert refused(with_index(parts, "rope", to={**parts.index["rope"], **rope}), scratch).rule == "R1"


def test_too_many_positions(parts: Parts, scratch: Path):
    index = edited(parts.index, "config", "max_seq_len", to=2**23 + 1)
    assert refused(with_index(replace(parts, index=index), "rope", "positions", to=2**23 + 1), scratch).rule == "R2"


def small_memory(data: bytes, path: Path, limit: int = 32 << 20) -> MegalithError:
    """The refusal of a file, which must not take more memory than `limit`."""
    path.write_bytes(data)
    del data
    tracemalloc.start()
    try:
        error = refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak} bytes"
    return error


def with_msgpack(parts: Parts, data: bytes) -> bytes:
    return assemble(replace(parts, stored_index=compress(data)))


def zstd_of_zeros(nbytes: int) -> bytes:
    compressor, block = zstandard.ZstdCompressor(level=1).compressobj(size=nbytes), bytes(1 << 20)
    return b"".join([*(compressor.compress(block) for _ in range(nbytes >> 20)), compressor.flush()])


def test_zstd_bomb(parts: Parts, scratch: Path):
    error = small_memory(assemble(replace(parts, stored_index=zstd_of_zeros(1 << 30))), scratch, 1 << 20)
    assert error.rule == "I1"
    assert "zstd frame of 1073741824 bytes, at most 67108864 are allowed" in str(error)


def test_zstd_bomb_of_undeclared_size(parts: Parts, scratch: Path):
    frame = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(bytes(64 << 20))
    assert small_memory(assemble(replace(parts, stored_index=frame)), scratch, 1 << 20).rule == "I1"


@pytest.mark.parametrize("what", ["two frames", "trailing", "truncated", "skippable", "empty", "lying"])
def test_odd_zstd_frames(parts: Parts, scratch: Path, what: str):
    frame = compress(canonical.encode(parts.index))
    frames = {
        "two frames": frame + frame,
        "trailing": frame + b"\0",
        "truncated": frame[:-1],
        "skippable": struct.pack("<II", 0x184D2A50, 4) + b"skip",
        "empty": b"",
        "lying": patch(frame, 5, struct.pack("<H", 100)),
    }
    assert refused(assemble(replace(parts, stored_index=frames[what])), scratch).rule == "I1"


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("ten million empty arrays", b"\xdd" + struct.pack(">I", 10_000_000) + b"\x90" * 10_000_000),
        ("count without content", b"\xdd\xff\xff\xff\xff"),
        ("map count without content", b"\xdf\xff\xff\xff\xff"),
        ("text longer than the data", b"\xdb\xff\xff\xff\xff" + b"a"),
        ("bin longer than the data", b"\xc4\x05ab"),
        ("truncated length", b"\xdb\xff"),
        ("deep arrays", b"\x91" * 100_000 + b"\xc0"),
        ("deep maps", b"\x81\xa1a" * 100_000 + b"\xc0"),
        ("nothing", b""),
        ("two values", b"\xc0\xc0"),
        ("extension type", b"\xc7\x01\x05\x00"),
        ("float 32", b"\xca\x00\x00\x00\x00"),
        ("reserved type", b"\xc1"),
        ("duplicate keys", b"\x82\xa1a\x01\xa1a\x01"),
        ("unsorted keys", b"\x82\xa1b\x01\xa1a\x01"),
        ("bin key", b"\x81\xc4\x01a\x01"),
        ("integer key", b"\x81\x01\x01"),
        ("array key", b"\x81\x91\x01\x01"),
        ("long integer", b"\xcd\x00\x01"),
        ("signed positive integer", b"\xd0\x01"),
        ("long text", b"\xd9\x01a"),
        ("not UTF-8", b"\xa1\xff"),
        ("surrogate", b"\xa3\xed\xa0\x80"),
    ],
)
def test_hostile_messagepack(parts: Parts, scratch: Path, what: str, data: bytes):
    error = small_memory(with_msgpack(parts, data), scratch)
    assert error.rule == "I2", what
    assert "section 'index'" in str(error)


@pytest.mark.parametrize("key", ["config", "rope", "files", "experts", "provenance", "blobs", "tensors", "sources"])
@pytest.mark.parametrize("value", [b"\x81\xc4\x01a\x01", b"\x90", b"\xc0", b"\x01", b"\x91\x80", b"\xa0"])
def test_wrong_types_at_the_top(parts: Parts, scratch: Path, key: str, value: bytes):
    whole = {name: canonical.encode(item) for name, item in parts.index.items()} | {key: value}
    data = bytes([0x80 | len(whole)]) + b"".join(canonical.encode(name) + whole[name] for name in sorted(whole))
    if (key, value) not in {("experts", b"\xc0"), ("files", b"\x90")}:
        assert isinstance(refused(with_msgpack(parts, data), scratch), FormatError)


@pytest.mark.parametrize("names", ["\n".join(map(str, range(1_000_000))), "\n" * (32 << 20)], ids=["names", "newlines"])
@pytest.mark.parametrize("table", ["blobs", "tensors", "sources"])
def test_a_million_tensors(parts: Parts, scratch: Path, table: str, names: str):
    error = small_memory(with_index(parts, table, "names", to=names), scratch, 192 << 20)
    assert error.rule == {"blobs": "B1", "tensors": "T1", "sources": "O1"}[table]
    assert "at most 262144" in str(error)


@pytest.mark.parametrize("name", ["\x1b[2J\x1b[31mroot", "a\rb", "x" * 257, "", "é", "\u202eevil", "a\x00b", "a\tb"])
def test_unprintable_names(parts: Parts, scratch: Path, name: str):
    names = [name, *parts.index["tensors"]["names"].split("\n")[1:]]
    assert refused(with_index(parts, "tensors", "names", to="\n".join(names)), scratch).rule == "T1"


def test_newline_in_a_name_is_another_row(parts: Parts, scratch: Path):
    names = parts.index["tensors"]["names"].replace("norm", "no\nrm", 1)
    assert refused(with_index(parts, "tensors", "names", to=names), scratch).rule == "T1"


@pytest.mark.parametrize(
    ("number", "offset", "nbytes", "rule"),
    [
        (0, 0, 2**64 - 1, "X2"),
        (0, 2**64 - 4096, 8192, "X2"),
        (1, 2048, 0, "X2"),
        (3, 45056, 1, "X2"),
        (2, 8193, 1, "X2"),
        (2, 24576, 2048, "X3"),
        (3, 32768, 512, "X3"),
        (1, 0, 2**53, "X2"),
        (0, 0, 512, "X4"),
        (3, 36864, 4096, "X4"),
    ],
)
def test_expert_ranges(golden: Path, scratch: Path, number: int, offset: int, nbytes: int, rule: str):
    parts = take_apart((golden / "valid" / "fused.lith").read_bytes())
    table = np.frombuffer(parts.index["experts"]["table"], "<u8").reshape(-1, 2).copy()
    assert table[:, 0].tolist() == [24576, 28672, 32768, 36864]
    table[number] = offset, nbytes
    assert refused(with_index(parts, "experts", "table", to=table.tobytes()), scratch).rule == rule


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers", struct.pack("<I", 2**32 - 1)),
        ("layers", b""),
        ("layers", b"\0\0\0"),
        ("layers", struct.pack("<II", 0, 0)),
        ("matrices", []),
        ("matrices", ["a"] * 2),
        ("matrices", ["a", "\x1b"]),
        ("num_experts", 2**63),
        ("num_experts", True),
        ("table", b""),
    ],
)
def test_expert_index_shapes(golden: Path, scratch: Path, key: str, value: Any):
    parts = take_apart((golden / "valid" / "fused.lith").read_bytes())
    assert refused(with_index(parts, "experts", key, to=value), scratch).rule == "X1"


@pytest.mark.parametrize(
    ("metadata", "what"),
    [
        (msgpack.packb({"a": [1]}), "nested"),
        (msgpack.packb({"b": 1, "a": 1}), "unsorted"),
        (msgpack.packb({}), "empty map"),
        (msgpack.packb({"a": None}), "nil"),
        (msgpack.packb({"a": float("nan")}), "NaN"),
        (msgpack.packb({1: "a"}), "integer key"),
        (b"\x82\xa1a\x01\xa1a\x02", "duplicate"),
        (b"\xdf\xff\xff\xff\xff", "count bomb"),
        (b"\xc1", "reserved type"),
        (canonical.encode({str(i): i for i in range(200)}), "too many"),
        (bytes(3065), "larger than its room"),
    ],
)
def test_hostile_metadata(parts: Parts, scratch: Path, metadata: bytes, what: str):
    assert refused(assemble(replace(parts, metadata=metadata)), scratch).rule == "H9", what


def test_bytes_after_metadata(parts: Parts, minimal: bytes, scratch: Path):
    file = assemble(replace(parts, metadata=canonical.encode({"a": 1})))
    assert refused(reseal(patch(file, 4000, b"x")), scratch).rule == "H8"
    assert refused(reseal(patch(minimal, 1024, b"\x81\xa1a\x01")), scratch).rule == "H8"


@pytest.mark.parametrize("make", ["folder", "fifo", "missing", "nul"])
def test_not_a_file(tmp_path: Path, make: str):
    path = tmp_path / "odd.lith"
    if make == "folder":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "nul":
        path = tmp_path / "odd.lith\0"
    with pytest.raises(MegalithError) as caught:
        PackedFile(path)
    assert caught.value.exit_code == 5
    assert "odd.lith" in str(caught.value)


def test_file_name_is_escaped(tmp_path: Path, minimal: bytes):
    path = tmp_path / "\x1b[2J.lith"
    path.write_bytes(minimal[:100])
    with pytest.raises(FormatError, match=r"\\x1b\[2J\.lith: header: "):
        PackedFile(path)


@FUZZ
@given(st.integers(0, 2**32))
def test_fuzzed_bytes(minimal: bytes, scratch: Path, seed: int):
    outcome(mutate_bytes(minimal, random.Random(seed)), scratch)


@FUZZ
@given(st.integers(0, 2**32), st.sampled_from(VALID))
def test_fuzzed_index(golden: Path, scratch: Path, seed: int, name: str):
    valid = take_apart((golden / "valid" / f"{name}.lith").read_bytes())
    outcome(mutate_index(valid, random.Random(seed)), scratch)


@FUZZ
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    ),
    st.sampled_from(["blobs", "config", "experts", "files", "provenance", "rope", "sources", "tensors", "positions", "names"]),
)
def test_any_value_in_the_index(parts: Parts, scratch: Path, value: Any, key: str):  # fmt: skip
    """Any MessagePack value in place of a part of the index."""
    inner = {"positions": ("rope", "positions"), "names": ("tensors", "names")}.get(key, (key,))
    outcome(with_index(parts, *inner, to=value), scratch)
