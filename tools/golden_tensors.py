"""Tensors of the golden files: their values, where a checkpoint of them keeps them, and how they lie in a blob."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from megalith.format import mxfp4
from megalith.format.constants import STEP_COLUMNS, TILE_ROWS
from megalith.format.dtypes import BIT_TYPES, Bits, ConversionLoss, narrow
from megalith.format.entries import NO_SOURCE, Placement, SourceEntry, TensorEntry
from megalith.format.model import BlobSpec, PartSpec
from megalith.format.mxfp4 import QuantisedRows
from megalith.format.records import TensorRecord


@dataclass(frozen=True)
class Fused:
    """A checkpoint tensor of layer 0 that holds the parts `roles` of all experts: shape [experts, ...].

    The rows of the roles follow each other, or alternate. Transposed, columns come before rows. With `scales` it holds
    MXFP4 codes and the tensor of that name their scales.
    """

    name: str
    roles: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False
    scales: str = ""

    def shape(self, num_experts: int, part: PartSpec) -> tuple[int, ...]:
        rows = len(self.roles) * part.rows
        if self.scales:
            return num_experts, rows, part.columns // 32, 16
        if part.columns == 1:
            return num_experts, rows
        return (num_experts, part.columns, rows) if self.transposed else (num_experts, rows, part.columns)

    def place(self, expert: int, part: PartSpec, codes: int, scales: int) -> Placement:
        """Where one part lies; `codes` and `scales` are numbers of sources."""
        count, number = len(self.roles), self.roles.index(part.role.split(".", 4)[-1])
        row = expert * count * part.rows
        if self.transposed:
            start = row * part.columns + (number if self.interleaved else number * part.rows)
            return Placement(codes, start, count if self.interleaved else 1, count * part.rows)
        width = part.columns // 2 if self.scales else part.columns
        start = (row + (number if self.interleaved else number * part.rows)) * width
        return Placement(codes, start, count * width if self.interleaved else width, 1, scales)


_EXPERTS = "model.layers.0.mlp.experts."
_GATE_UP, _DOWN = ("gate_proj.weight", "up_proj.weight"), ("down_proj.weight",)
_BIASES = (
    Fused(f"{_EXPERTS}gate_up_proj_bias", ("gate_proj.bias", "up_proj.bias"), interleaved=True),
    Fused(f"{_EXPERTS}down_proj_bias", ("down_proj.bias",)),
)
RESAVED = (Fused(f"{_EXPERTS}gate_up_proj", _GATE_UP), Fused(f"{_EXPERTS}down_proj", _DOWN))
GPT_OSS_BF16 = (
    Fused(f"{_EXPERTS}gate_up_proj", _GATE_UP, interleaved=True, transposed=True),
    Fused(f"{_EXPERTS}down_proj", _DOWN, transposed=True),
    *_BIASES,
)
GPT_OSS_MXFP4 = (
    Fused(f"{_EXPERTS}gate_up_proj_blocks", _GATE_UP, interleaved=True, scales=f"{_EXPERTS}gate_up_proj_scales"),
    Fused(f"{_EXPERTS}down_proj_blocks", _DOWN, scales=f"{_EXPERTS}down_proj_scales"),
    *_BIASES,
)


def values(number: int, part: PartSpec) -> NDArray[np.float32]:
    """float32 [rows, columns] of tensor `number`: multiples of 1/16 below 2, exact in every 16-bit element type."""
    element = np.arange(part.rows * part.columns, dtype=np.int64).reshape(part.rows, part.columns)
    return ((element * 37 + number * 11) % 61 - 30).astype(np.float32) / np.float32(16)


def native_rows(number: int, part: PartSpec) -> QuantisedRows:
    """Codes and scales of tensor `number` of a checkpoint in MXFP4."""
    blocks = part.columns // mxfp4.BLOCK_ELEMENTS
    byte = np.arange(part.rows * blocks * mxfp4.BLOCK_BYTES, dtype=np.int64).reshape(part.rows, blocks, mxfp4.BLOCK_BYTES)
    block = np.arange(part.rows * blocks, dtype=np.int64).reshape(part.rows, blocks)
    codes, scales = (byte * 37 + number * 11) % 256, 118 + (block * 5 + number * 3) % 16
    return QuantisedRows(codes.astype(np.uint8), scales.astype(np.uint8))


def checkpoint_name(role: str) -> str:
    """Hugging Face's name of a part."""
    if role.startswith("lm_head"):
        return role
    if ".experts." in role or ".router." in role:
        return "model." + role.replace(".experts.", ".mlp.experts.").replace(".router.", ".mlp.router.")
    block = "mlp" if re.search("(gate|up|down)_proj", role) else "self_attn"
    return "model." + re.sub(r"\.(\w+_proj\.|[qk]_norm\.|sinks$)", rf".{block}.\1", role)


def place_tensors(
    specs: Sequence[BlobSpec], stored: Sequence[str], num_experts: int, fused: tuple[Fused, ...]
) -> tuple[list[TensorEntry], list[SourceEntry]]:
    """Rows of the tensor table and of the source table; `stored[i]` is the dtype of blob i."""
    numbers: dict[str, int] = {}
    sources: list[SourceEntry] = []

    def number_of(name: str, dtype: str, shape: tuple[int, ...]) -> int:
        if name not in numbers:
            numbers[name] = len(sources)
            sources.append(SourceEntry(name, dtype, shape))
        return numbers[name]

    tensors = []
    for blob, (spec, dtype) in enumerate(zip(specs, stored, strict=True)):
        for part in spec.parts:
            placement, kind = None, "BF16" if dtype == "MXFP4" else dtype
            form = next((f for f in fused if ".experts." in part.role and part.role.split(".", 4)[-1] in f.roles), None)
            if form:
                shape, scales = form.shape(num_experts, part), NO_SOURCE
                kind = "MXFP4" if form.scales else kind
                codes = number_of(form.name, "U8" if form.scales else kind, shape)
                if form.scales:
                    scales = number_of(form.scales, "U8", shape[:-1])
                placement = form.place(int(part.role.split(".")[3]), part, codes, scales)
            shape = (part.rows, part.columns) if spec.is_matrix else (part.rows,)
            tensors.append(TensorEntry(checkpoint_name(part.role), shape, kind, blob, part.row_map, placement))
    return tensors, sources


@dataclass(frozen=True)
class PartContent:
    """One tensor: what a blob stores of it, and its record."""

    stored: Any  # Bits, or QuantisedRows in MXFP4
    record: TensorRecord


def source_content(specs: Sequence[BlobSpec], stored: Sequence[str], entries: Sequence[TensorEntry]) -> list[PartContent]:
    """The content of every tensor, in table order."""
    kinds = [(part, dtype) for spec, dtype in zip(specs, stored, strict=True) for part in spec.parts]
    content = []
    for number, ((part, dtype), entry) in enumerate(zip(kinds, entries, strict=True)):
        if entry.source_dtype == "MXFP4":
            rows = native_rows(number, part)
            scales = xxhash.xxh3_128_digest(rows.scales.tobytes())
            digest = xxhash.xxh3_128_digest(rows.codes.tobytes() + scales)
            content.append(PartContent(rows, TensorRecord(digest, ConversionLoss())))
            continue
        bits, loss = narrow(values(number, part), entry.source_dtype), ConversionLoss()
        kept: Bits | QuantisedRows = bits
        if dtype == "MXFP4":
            kept = mxfp4.quantise_rows(bits, entry.source_dtype)
            loss = mxfp4.quantisation_loss(bits, entry.source_dtype, kept)
        content.append(PartContent(kept, TensorRecord(xxhash.xxh3_128_digest(bits.tobytes()), loss)))
    return content


def pack_blob(spec: BlobSpec, parts: Sequence[Any], dtype: str) -> bytes:
    """A blob's bytes with the zeros up to the next, placed one row and one block at a time, unlike the library's codec."""
    if not spec.is_matrix:
        stored = np.zeros(spec.rows, BIT_TYPES[dtype])
        for part, bits in zip(spec.parts, parts, strict=True):
            stored[part.row_map.stored_rows(part.rows)] = bits[:, 0]
        data = stored.tobytes()
    elif dtype == "MXFP4":
        data = _pack_mxfp4(spec, parts)
    else:
        tiles = np.zeros((spec.rows // TILE_ROWS, -(-spec.columns // STEP_COLUMNS), TILE_ROWS, STEP_COLUMNS), np.uint16)
        for part, bits in zip(spec.parts, parts, strict=True):
            for r, at in enumerate(part.row_map.stored_rows(part.rows).tolist()):
                row = np.zeros(tiles.shape[1] * STEP_COLUMNS, np.uint16)
                row[: part.columns] = bits[r]
                tiles[at // TILE_ROWS, :, at % TILE_ROWS] = row.reshape(-1, STEP_COLUMNS)
        data = tiles.tobytes()
    return data + bytes(-len(data) % 4096)


def _pack_mxfp4(spec: BlobSpec, parts: Sequence[QuantisedRows]) -> bytes:
    num_steps = -(-spec.columns // mxfp4.STEP_COLUMNS)
    data = bytearray(spec.rows // TILE_ROWS * num_steps * mxfp4.STEP_BYTES)
    for part, rows in zip(spec.parts, parts, strict=True):
        for r, at in enumerate(part.row_map.stored_rows(part.rows).tolist()):
            for block, codes in enumerate(rows.codes[r]):
                step = (at // TILE_ROWS * num_steps + block // 4) * mxfp4.STEP_BYTES
                piece = 4 * (at % TILE_ROWS) + block % 4
                data[step + 16 * piece : step + 16 * piece + 16] = codes.tobytes()
                data[step + 1024 + piece] = rows.scales[r, block]
    return bytes(data)
