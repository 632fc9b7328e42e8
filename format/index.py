"""The index: what the file holds and where, as canonical MessagePack in one zstd frame (specs/format.md, "Index").

Tables are columns of little-endian integers, so that 20,000 tensors are read and checked as a few arrays.
`decode_index` believes nothing: every rule is checked before a size or an offset is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import zstandard

from . import canonical
from .constants import FEATURES, MAX_INDEX_BYTES, MAX_INDEX_DEPTH, MAX_INDEX_OBJECTS
from .entries import (
    BLOB_COLUMNS,
    LAYOUT_CODES,
    SOURCE_COLUMNS,
    TENSOR_COLUMNS,
    BlobEntry,
    SourceEntry,
    TensorEntry,
    blob_entry,
    source_entry,
    tensor_entry,
)
from .errors import FormatError, printable
from .experts import ExpertIndex, expert_index
from .files import FileEntry, decode_file_entries
from .index_checks import check_against_model, check_blobs, check_sources, check_tensors
from .model import ModelConfig
from .rope import MAX_POSITIONS, RopeParameters
from .table import Table, decode_table

ZSTD_LEVEL = 9
_INDEX_KEYS = {"blobs", "config", "experts", "files", "provenance", "rope", "sources", "tensors"}


@dataclass(frozen=True)
class Index:
    """Everything the index section says."""

    config: ModelConfig
    rope: RopeParameters
    rope_positions: int
    blobs: Table
    tensors: Table
    sources: Table
    files: list[FileEntry]
    provenance: dict[str, Any]
    experts: ExpertIndex | None = None

    def blob(self, i: int) -> BlobEntry:
        return blob_entry(self.blobs, i)

    def tensor(self, i: int) -> TensorEntry:
        return tensor_entry(self.tensors, i)

    def source(self, i: int) -> SourceEntry:
        return source_entry(self.sources, i)

    @property
    def image_bytes(self) -> int:
        """Size of the device image section: the last blob's end, padded."""
        last = self.blob(len(self.blobs) - 1)
        return last.offset + last.extent_bytes


def features_of(index: Index) -> frozenset[str]:
    """The features that a reader of the file must know."""
    used = {
        "tiles": bool((index.blobs.columns["layout"] == LAYOUT_CODES["tile16x512"]).any()),
        "experts": index.experts is not None,
        "mxfp4": bool((index.blobs.columns["layout"] == LAYOUT_CODES["mxfp4"]).any()),
    }
    return frozenset(name for name in FEATURES.values() if used[name])


def encode_index(index: Index) -> bytes:
    """The stored bytes of the index section."""
    value = {
        "blobs": index.blobs.to_dict(),
        "config": index.config.to_dict(),
        "experts": index.experts.to_dict() if index.experts else None,
        "files": [entry.to_dict() for entry in index.files],
        "provenance": index.provenance,
        "rope": {**index.rope.to_dict(), "positions": index.rope_positions},
        "sources": index.sources.to_dict(),
        "tensors": index.tensors.to_dict(),
    }
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_content_size=True).compress(canonical.encode(value))


def decompress(stored: bytes, limit: int, place: str, rule: str) -> bytes:
    """One zstd frame that declares its size, of at most `limit` bytes."""
    try:
        declared = zstandard.get_frame_parameters(stored).content_size
        if declared == zstandard.CONTENTSIZE_UNKNOWN:
            raise FormatError(f"{place}: zstd frame does not declare its size", rule)
        if declared > limit:
            raise FormatError(f"{place}: zstd frame of {declared} bytes, at most {limit} are allowed", rule)
        data = zstandard.ZstdDecompressor().decompress(stored, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"{place}: {error}", rule) from None
    if len(data) != declared:
        raise FormatError(f"{place}: zstd frame holds {len(data)} bytes, declares {declared}", rule)
    return bytes(data)


def decode_index(stored: bytes, place: str) -> Index:
    """Parse and check an index section; FormatError names the rule that it breaks."""
    data = decompress(stored, MAX_INDEX_BYTES, place, "I1")
    raw = canonical.decode(data, place, "I2", MAX_INDEX_OBJECTS, MAX_INDEX_DEPTH)
    if not isinstance(raw, dict) or set(raw) != _INDEX_KEYS:
        raise FormatError(f"{place}: index keys must be {sorted(_INDEX_KEYS)}", "I3")
    config = ModelConfig.from_dict(raw["config"], place)
    rope, positions = _decode_rope(raw["rope"], config, place)
    blobs = decode_table(raw["blobs"], BLOB_COLUMNS, f"{place}: blob table", "B1")
    tensors = decode_table(raw["tensors"], TENSOR_COLUMNS, f"{place}: tensor table", "T1")
    sources = decode_table(raw["sources"], SOURCE_COLUMNS, f"{place}: source table", "O1")
    check_blobs(blobs, place)
    check_tensors(tensors, blobs, place)
    check_against_model(blobs, tensors, config, place)
    check_sources(tensors, sources, blobs, place)
    if not isinstance(raw["provenance"], dict):
        raise FormatError(f"{place}: provenance must be a map", "I3")
    files = decode_file_entries(raw["files"], place)
    index = Index(config, rope, positions, blobs, tensors, sources, files, raw["provenance"])
    expected = expert_index(config, blobs)
    if raw["experts"] is None and expected is None:
        return index
    experts = ExpertIndex.from_dict(raw["experts"], config.num_hidden_layers, index.image_bytes, place)
    if expected is None or experts.to_dict() != expected.to_dict():
        raise FormatError(f"{place}: the expert index does not agree with the blob table", "X4")
    return replace(index, experts=experts)


def _decode_rope(raw: Any, config: ModelConfig, place: str) -> tuple[RopeParameters, int]:
    if not isinstance(raw, dict) or "positions" not in raw:
        raise FormatError(f"{place}: rope must be a map of parameters, positions, theta, type", "R1")
    positions = raw.pop("positions")
    rope = RopeParameters.from_dict(raw, place)
    if rope.type == "dynamic" and config.head_dim < 4:
        raise FormatError(f"{place}: rope type dynamic needs a head_dim of at least 4, found {config.head_dim}", "R1")
    if type(positions) is not int or not 1 <= positions <= MAX_POSITIONS:
        raise FormatError(f"{place}: rope positions is {printable(positions)}: must be 1 to {MAX_POSITIONS}", "R2")
    if config.max_seq_len > MAX_POSITIONS:
        raise FormatError(f"{place}: config.max_seq_len is {config.max_seq_len}: at most {MAX_POSITIONS} positions", "R2")
    expected = config.max_seq_len
    if rope.type == "dynamic":
        expected = min(expected, rope.original_max_position_embeddings)
    if positions != expected:
        raise FormatError(f"{place}: rope holds {positions} positions, the model needs {expected}", "R2")
    return rope, positions
