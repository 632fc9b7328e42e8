"""Canonical MessagePack: literal encodings, and one encoding per value."""

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.format import canonical
from megalith.format.errors import FormatError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


def decode(data: bytes, max_objects: int = 1000, max_depth: int = 50) -> Any:
    return canonical.decode(data, "place", "I2", max_objects, max_depth)


@pytest.mark.parametrize(
    ("value", "encoding"),
    [
        (None, "c0"),
        (True, "c3"),
        (127, "7f"),
        (128, "cc 80"),
        (-1, "ff"),
        (-33, "d0 df"),
        (2**64 - 1, "cf ff ff ff ff ff ff ff ff"),
        (1.5, "cb 3f f8 00 00 00 00 00 00"),
        ("é", "a2 c3 a9"),
        (b"\x01", "c4 01 01"),
        ([1, [2]], "92 01 91 02"),
        ({"b": 1, "a": {"d": 2, "c": 3}}, "82 a1 61 82 a1 63 03 a1 64 02 a1 62 01"),
        ({"Z": 1, "a": 2, "é": 3}, "83 a1 5a 01 a1 61 02 a2 c3 a9 03"),
    ],
)
def test_literal_encodings(value: Any, encoding: str):
    assert canonical.encode(value).hex(" ") == encoding
    assert decode(bytes.fromhex(encoding)) == value


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_round_trip(value: Any):
    data = canonical.encode(value)
    assert decode(data) == value
    assert canonical.encode(decode(data)) == data


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_decode_to_one_value_or_fail(data: bytes):
    try:
        value = decode(data)
    except FormatError:
        return
    assert canonical.encode(value) == data


@settings(max_examples=100, deadline=None)
@given(VALUES, st.integers(0, 50))
def test_any_truncation_fails(value: Any, cut: int):
    data = canonical.encode(value)
    if cut < len(data):
        with pytest.raises(FormatError, match=r"ends early|not MessagePack"):
            decode(data[:cut])


def test_key_order_of_the_input_does_not_matter():
    assert canonical.encode({"b": [{"y": 1, "x": 2}], "a": 0}) == canonical.encode({"a": 0, "b": [{"x": 2, "y": 1}]})


def test_budgets():
    assert decode(msgpack.packb([1] * 9), max_objects=10) == [1] * 9
    with pytest.raises(FormatError, match="more than 10 MessagePack objects"):
        decode(msgpack.packb([1] * 10), max_objects=10)
    assert decode(b"\x91\x91\x91\x01", max_depth=3) == [[[1]]]
    with pytest.raises(FormatError, match="nested deeper than 2"):
        decode(b"\x91\x91\x91\x01", max_depth=2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x82\xa1a\x01\xa1a\x01", "not in its canonical form"),
        (b"\x82\xa1b\x01\xa1a\x01", "not in its canonical form"),
        (b"\xcc\x01", "not in its canonical form"),
        (b"\x81\x01\x01", "a map key is not text"),
        (b"\x81\xc4\x01a\x01", "a map key is not text"),
        (b"\xc7\x01\x05\x00", "type 0xc7 at byte 0 is not used here"),
        (b"\xa2a", "ends early at byte 2"),
        (b"\x01\x02", "1 bytes after the MessagePack value"),
    ],
)
def test_messages(data: bytes, message: str):
    with pytest.raises(FormatError, match=message):
        decode(data)
