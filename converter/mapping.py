"""From the parts of a model to the checkpoint tensors that hold them; an error names what is missing or left over."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megalith.format.entries import NO_SOURCE, Placement, SourceEntry, TensorEntry
from megalith.format.errors import CheckpointError, UnsupportedError, printable
from megalith.format.model import BlobSpec, PartSpec

from .architectures.architecture import FusedExperts
from .config import ModelDescription
from .safetensors_header import SourceTensor
from .source import Checkpoint

TIED_HEAD = "lm_head.weight"
_IGNORED = re.compile(r"model\.(layers\.[0-9]{1,5}\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class PartSource:
    """Where one part comes from: a whole checkpoint tensor, or elements of one at `start` with the given strides.

    `name` is the part's own; MXFP4 codes have their `scales` in a second tensor, at a 16th of the codes' positions.
    """

    name: str
    tensor: SourceTensor
    is_whole: bool = True
    start: int = 0
    row_stride: int = 1
    column_stride: int = 1
    scales: SourceTensor | None = None

    @property
    def dtype(self) -> str:
        return "MXFP4" if self.scales else self.tensor.dtype


@dataclass(frozen=True)
class Mapping:
    """`parts[role]` for every part of the model, and the names of checkpoint tensors that are not stored."""

    parts: dict[str, PartSource]
    ignored: list[str]

    def entries(self, specs: Sequence[BlobSpec]) -> tuple[list[TensorEntry], list[SourceEntry]]:
        """Rows of the tensor table and of the source table."""
        numbers: dict[str, int] = {}
        shared: list[SourceEntry] = []

        def number_of(tensor: SourceTensor) -> int:
            if tensor.name not in numbers:
                numbers[tensor.name] = len(shared)
                shared.append(SourceEntry(tensor.name, tensor.dtype, tensor.shape))
            return numbers[tensor.name]

        tensors = []
        for blob, spec in enumerate(specs):
            for part in spec.parts:
                source = self.parts[part.role]
                placement = None
                if not source.is_whole:
                    scales = number_of(source.scales) if source.scales else NO_SOURCE
                    strides = (source.row_stride, source.column_stride)
                    placement = Placement(number_of(source.tensor), source.start, *strides, scales)
                shape = (part.rows, part.columns) if spec.is_matrix else (part.rows,)
                tensors.append(TensorEntry(source.name, shape, source.dtype, blob, part.row_map, placement))
        return tensors, shared


def map_tensors(checkpoint: Checkpoint, description: ModelDescription, specs: Sequence[BlobSpec]) -> Mapping:
    """Every part's source."""
    place = printable(checkpoint.folder)
    parts: dict[str, PartSource] = {}
    mapped: set[str] = set()
    for spec in specs:
        for part in spec.parts:
            source = _find(checkpoint, description, part, spec)
            parts[part.role] = source
            mapped.update(tensor.name for tensor in (source.tensor, source.scales) if tensor)
    ignored = sorted(name for name in checkpoint.tensors if name not in mapped)
    for name in ignored:
        tied_head = name == TIED_HEAD and description.config.tie_word_embeddings
        if not tied_head and not _IGNORED.fullmatch(name):
            raise CheckpointError(f"{place}: no rule of {description.architecture.name} maps tensor '{printable(name)}'")
    return Mapping(parts, ignored)


def _find(checkpoint: Checkpoint, description: ModelDescription, part: PartSpec, spec: BlobSpec) -> PartSource:
    names = description.architecture.tensor_names(part.role)
    for name in names:
        if name in checkpoint.tensors:
            tensor = checkpoint.tensors[name]
            _check(tensor, (part.rows, part.columns) if spec.is_matrix else (part.rows,))
            if tensor.dtype not in ("BF16", "F16", "F32"):
                raise UnsupportedError(f"{_place(tensor)}: dtype {tensor.dtype}: weights must be BF16, F16 or F32")
            return PartSource(name, tensor, row_stride=part.columns)
    if ".experts." in part.role:
        prefix, _, role = _split(part.role)
        for fused in description.architecture.fused_experts:
            if role in fused.roles and prefix + fused.name in checkpoint.tensors:
                return _from_fused(checkpoint, description, fused, part, names[0])
    raise CheckpointError(f"{printable(checkpoint.folder)}: tensor '{printable(names[0])}' is missing")


def _split(role: str) -> tuple[str, int, str]:
    """Layer prefix in the checkpoint, expert and inner role of a role such as "layers.3.experts.7.up_proj.weight"."""
    _, layer, _, expert, inner = role.split(".", 4)
    return f"model.layers.{layer}.", int(expert), inner


def _from_fused(
    checkpoint: Checkpoint, description: ModelDescription, fused: FusedExperts, part: PartSpec, name: str
) -> PartSource:
    prefix, expert, role = _split(part.role)
    tensor, scales = checkpoint.tensors[prefix + fused.name], None
    shape = fused.shape(description.config.num_experts, part.rows, part.columns)
    if fused.scales:
        if part.columns % 32:
            raise CheckpointError(f"{_place(tensor)}: MXFP4 needs a multiple of 32 columns, the config makes it {part.columns}")
        scales = checkpoint.tensors.get(prefix + fused.scales)
        if scales is None:
            raise CheckpointError(f"{printable(checkpoint.folder)}: tensor '{prefix}{fused.scales}' is missing")
        _check(scales, shape[:-1])
    _check(tensor, shape)
    wanted = ("U8",) if fused.scales else ("BF16", "F16", "F32")
    for found in (tensor, scales):
        if found and found.dtype not in wanted:
            raise UnsupportedError(f"{_place(found)}: dtype {found.dtype}: must be {' or '.join(wanted)}")
    return PartSource(name, tensor, False, *fused.place(expert, role, part.rows, part.columns), scales)


def _check(tensor: SourceTensor, wanted: tuple[int, ...]) -> None:
    if tensor.shape != wanted:
        raise CheckpointError(f"{_place(tensor)}: shape {list(tensor.shape)}, the config makes it {list(wanted)}")


def _place(tensor: SourceTensor) -> str:
    return f"{printable(tensor.path)}: tensor '{printable(tensor.name)}'"
