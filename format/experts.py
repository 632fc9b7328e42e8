"""The expert index: one dense integer table that kernels read unchanged (specs/format.md, "Expert index")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .constants import BLOB_ALIGNMENT, MAX_NAME_BYTES
from .errors import FormatError, is_name
from .model import MAX_EXPERTS, ModelConfig, expert_specs, layer_specs, outer_specs
from .table import Table

MAX_MATRICES = 8
_KEYS = {"layers", "matrices", "num_experts", "table"}


@dataclass(frozen=True)
class ExpertIndex:
    """`table` is uint64 [num_sparse_layers, num_experts, num_matrices, 2]: offset in the device image, and bytes.

    `layers[i]` is the layer number of the i-th sparse layer; `matrices` names the matrices of one expert.
    """

    layers: NDArray[np.uint32]
    matrices: tuple[str, ...]
    table: NDArray[np.uint64]

    @property
    def num_experts(self) -> int:
        return int(self.table.shape[1])

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": self.layers.astype("<u4").tobytes(),
            "matrices": list(self.matrices),
            "num_experts": self.num_experts,
            "table": self.table.astype("<u8").tobytes(),
        }

    @classmethod
    def from_dict(cls, raw: Any, num_hidden_layers: int, image_bytes: int, place: str) -> ExpertIndex:
        """Checked against rules X1 to X3."""
        place = f"{place}: expert index"
        if not isinstance(raw, dict) or set(raw) != _KEYS:
            raise FormatError(f"{place}: keys must be {sorted(_KEYS)}", "X1")
        layers, matrices, count, table = raw["layers"], raw["matrices"], raw["num_experts"], raw["table"]
        if type(count) is not int or not 1 <= count <= MAX_EXPERTS:
            raise FormatError(f"{place}: num_experts is not 1 to {MAX_EXPERTS}", "X1")
        named = isinstance(matrices, list) and 1 <= len(matrices) <= MAX_MATRICES
        named = named and all(is_name(m, MAX_NAME_BYTES) for m in matrices) and len(set(matrices)) == len(matrices)
        if not named or not isinstance(layers, bytes) or not isinstance(table, bytes) or not layers or len(layers) % 4:
            raise FormatError(f"{place}: layers, matrices or table are not unique names, bytes and bytes", "X1")
        numbers = np.frombuffer(layers, "<u4")
        if (np.diff(numbers.astype(np.int64)) <= 0).any() or numbers[-1] >= num_hidden_layers:
            raise FormatError(f"{place}: layers must rise and stay below {num_hidden_layers}", "X1")
        if len(table) != numbers.size * count * len(matrices) * 16:
            raise FormatError(f"{place}: table of {len(table)} bytes for {numbers.size} layers of {count} experts", "X1")
        result = cls(numbers, tuple(matrices), np.frombuffer(table, "<u8").reshape(numbers.size, count, len(matrices), 2))
        result._check_ranges(image_bytes, place)
        return result

    def _check_ranges(self, image_bytes: int, place: str) -> None:
        offset, nbytes = self.table[..., 0], self.table[..., 1]
        limit = np.uint64(image_bytes)
        bad = (offset > limit) | (nbytes > limit) | (nbytes == 0) | (offset + nbytes > limit)
        bad[..., 0] |= offset[..., 0] % BLOB_ALIGNMENT != 0  # where an expert begins
        if bad.any():
            layer, expert = (int(i) for i in np.argwhere(bad)[0][:2])
            raise FormatError(f"{place}: layer {self.layers[layer]} expert {expert} lies outside the image or unaligned", "X2")
        order = np.argsort(offset, axis=None)
        begin, end = offset.ravel()[order], (offset + nbytes).ravel()[order]
        if (begin[1:] < end[:-1]).any():
            place_of = int(order[int((begin[1:] < end[:-1]).argmax())]) // len(self.matrices)
            layer, expert = divmod(place_of, self.num_experts)
            raise FormatError(f"{place}: layer {self.layers[layer]} expert {expert} overlaps another", "X3")


def expert_index(config: ModelConfig, blobs: Table) -> ExpertIndex | None:
    """The index that a blob table implies: an expert's blobs follow each other; None for a dense model."""
    layers = [i for i, is_sparse in enumerate(config.sparse_layers) if is_sparse]
    if not layers:
        return None
    matrices = tuple(spec.name for spec in expert_specs(config))
    sizes = {is_sparse: len(layer_specs(config, is_sparse)) for is_sparse in set(config.sparse_layers)}
    ends = len(outer_specs(config)[0]) + np.cumsum([sizes[is_sparse] for is_sparse in config.sparse_layers])
    count = config.num_experts * len(matrices)  # the experts are the last blobs of a layer
    numbers = (ends[layers] - count)[:, None] + np.arange(count)
    table = np.stack([blobs.columns["offset"][numbers], blobs.columns["nbytes"][numbers]], axis=-1)
    shape = (len(layers), config.num_experts, len(matrices), 2)
    return ExpertIndex(np.array(layers, np.uint32), matrices, table.reshape(shape).astype(np.uint64))
