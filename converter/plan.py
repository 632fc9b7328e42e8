"""The plan of a conversion: from names and shapes alone to the exact bytes of header and index, nothing read but metadata."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from megalith.format import files, rope
from megalith.format.checksums import Extent, extents_of, num_chunks
from megalith.format.constants import DTYPES, HEADER_BYTES, RECORD_BYTES
from megalith.format.dtypes import ITEM_BYTES
from megalith.format.entries import build_blob_table, build_source_table, build_tensor_table
from megalith.format.errors import CheckpointError, FormatError, RequestError, printable
from megalith.format.experts import expert_index
from megalith.format.header import Header, Section, place_sections
from megalith.format.index import Index, decode_index, encode_index
from megalith.format.model import BlobSpec, blob_specs
from megalith.version import __version__

from .config import ModelDescription, describe_model
from .mapping import Mapping, map_tensors
from .source import Checkpoint

_TARGETS = {"bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True)
class Options:
    """What changes the bytes of the output; recorded in the file."""

    dtype: str = "auto"
    max_seq_len: int | None = None
    allow_nonfinite: bool = False
    experts: str = "keep"
    linear: str = "keep"
    scale: str = "ocp"

    def to_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class Plan:
    """Everything about the output but the weights' bytes."""

    description: ModelDescription
    options: Options
    specs: Sequence[BlobSpec]
    mapping: Mapping
    index: Index
    index_bytes: bytes
    files_bytes: bytes
    sections: tuple[Section, ...]
    extents: list[Extent]

    @property
    def file_bytes(self) -> int:
        return Header(self.sections).file_bytes

    @property
    def logical_bytes(self) -> int:
        """Bytes of the weights' elements in their stored dtypes, MXFP4's scales included, without any padding."""
        total = 0
        for i in range(len(self.index.tensors)):
            entry = self.index.tensor(i)
            dtype = DTYPES[int(self.index.blobs.columns["dtype"][entry.blob])]
            row_bytes = -(-entry.columns // 32) * 17 if dtype == "MXFP4" else entry.columns * ITEM_BYTES[dtype]
            total += entry.rows * row_bytes
        return total

    def fingerprint(self, identity: object) -> str:
        """Stands for the planned bytes and the source files, so that a resumed run goes on with the same work."""
        digest = hashlib.sha256(self.index_bytes + self.files_bytes)
        digest.update(repr((self.file_bytes, identity)).encode())
        return digest.hexdigest()


def make_plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Map every tensor of the checkpoint to its place; an error names a tensor that is missing or that no rule maps."""
    place = printable(checkpoint.folder / "config.json")
    generation = checkpoint.json("generation_config.json")
    description = describe_model(checkpoint.config, generation, options.max_seq_len, place)
    specs = blob_specs(description.config)
    if options.experts != "keep" and not any(description.config.sparse_layers):
        raise RequestError(f"{place}: --experts {options.experts}: the model has no experts")
    mapping = map_tensors(checkpoint, description, specs)
    blobs = build_blob_table(specs, [_stored_dtype(spec, mapping, options) for spec in specs])
    tensors, shared = mapping.entries(specs)
    entries, files_bytes = files.pack_files(checkpoint.files)
    index = Index(
        config=description.config,
        rope=description.rope,
        rope_positions=description.rope_positions,
        blobs=blobs,
        tensors=build_tensor_table(tensors),
        sources=build_source_table(shared),
        files=entries,
        experts=expert_index(description.config, blobs),
        provenance={
            "ignored_tensors": mapping.ignored,
            "library_version": __version__,
            "options": options.to_dict(),
        },
    )
    index_bytes = encode_index(index)
    try:
        decode_index(index_bytes, place)  # what no reader would accept is not written
    except FormatError as error:
        raise CheckpointError(str(error)) from None
    sections = _place(index, index_bytes, files_bytes)
    extents = extents_of(index, sections)
    return Plan(description, options, specs, mapping, index, index_bytes, files_bytes, sections, extents)


def _stored_dtype(spec: BlobSpec, mapping: Mapping, options: Options) -> str:
    """The dtype a blob is stored in: MXFP4 stays MXFP4; matrices that may be quantised are where the options ask."""
    sources = [mapping.parts[part.role] for part in spec.parts]
    found = sorted({source.dtype for source in sources})
    wanted = options.experts if ".experts." in spec.name else options.linear
    if found == ["MXFP4"] or (spec.may_be_mxfp4 and wanted == "mxfp4"):
        return "MXFP4"
    if options.dtype in _TARGETS:
        return _TARGETS[options.dtype]
    if len(found) > 1:
        names = ", ".join(printable(source.tensor.name) for source in sources)
        raise RequestError(f"{names}: dtypes {', '.join(found)} cannot share one matrix: choose --dtype bf16 or fp16")
    if found == ["F32"] and spec.is_matrix:
        return "BF16"  # if every value is exact in it; the packer refuses to round unasked
    return found[0]


def _place(index: Index, index_bytes: bytes, files_bytes: bytes) -> tuple[Section, ...]:
    sizes = {
        "index": len(index_bytes),
        "image": index.image_bytes,
        "rope": rope.section_bytes(index.config.head_dim, index.rope_positions),
        "files": len(files_bytes),
        "records": len(index.tensors) * RECORD_BYTES,
        "checksums": 0,
    }
    sizes["checksums"] = 8 * num_chunks(extents_of(index, place_sections(sizes)))
    return place_sections(sizes)


def plan_summary(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON-ready map: exact sizes of the output before a byte is written."""
    config = plan.description.config
    image = next(section.nbytes for section in plan.sections if section.kind == "image")
    return {
        "architecture": config.architecture,
        "file_bytes": plan.file_bytes,
        "weights_bytes": plan.logical_bytes,
        "padding_bytes": image - plan.logical_bytes,
        "header_bytes": HEADER_BYTES,
        "sections": [{"name": s.kind, "offset": s.offset, "bytes": s.nbytes} for s in plan.sections],
        "tensors": len(plan.index.tensors),
        "blobs": len(plan.index.blobs),
        "max_seq_len": config.max_seq_len,
        "ignored_tensors": plan.mapping.ignored,
        "options": plan.options.to_dict(),
    }
