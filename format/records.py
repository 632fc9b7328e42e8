"""Per-tensor records: digest of the source bytes and conversion losses (specs/format.md, "Records section")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .constants import RECORD_BYTES
from .dtypes import ConversionLoss
from .errors import FormatError

RECORD_TYPE = np.dtype(
    [
        ("source_digest", "V16"),
        ("rounded", "<u8"),
        ("flushed", "<u8"),
        ("nonfinite", "<u8"),
        ("max_abs_error", "<f8"),
        ("signal_power", "<f8"),
        ("noise_power", "<f8"),
    ]
)
_SIZES = ("max_abs_error", "signal_power", "noise_power")
_LOSS_FIELDS = ("rounded", "flushed", "nonfinite", *_SIZES)
assert RECORD_TYPE.itemsize == RECORD_BYTES


@dataclass(frozen=True)
class TensorRecord:
    """`source_digest` is XXH3-128 (big-endian) of the tensor's rows in the checkpoint; for MXFP4 of its codes, then of the
    XXH3-128 of its scales.
    """

    source_digest: bytes
    loss: ConversionLoss


def encode_records(records: list[TensorRecord]) -> bytes:
    """The records section, one record per tensor in table order."""
    array = np.zeros(len(records), RECORD_TYPE)
    for i, record in enumerate(records):
        array[i] = (record.source_digest, *(getattr(record.loss, name) for name in _LOSS_FIELDS))
    return array.tobytes()


def decode_records(data: bytes, num_tensors: int, place: str) -> list[TensorRecord]:
    """Inverse of `encode_records`; rules D1 and D2."""
    if len(data) != num_tensors * RECORD_BYTES:
        raise FormatError(f"{place}: {len(data)} bytes of records for {num_tensors} tensors", "D1")
    rows = np.frombuffer(data, RECORD_TYPE)
    for name in _SIZES:
        if not (np.isfinite(rows[name]) & (rows[name] >= 0.0)).all():
            raise FormatError(f"{place}: a {name} is no finite size", "D2")
    return [
        TensorRecord(bytes(row["source_digest"]), ConversionLoss(*(row[name].item() for name in _LOSS_FIELDS))) for row in rows
    ]
