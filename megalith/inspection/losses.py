"""What the conversion did to the values: losses by a change of dtype, and quantisation to MXFP4."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.format.dtypes import DTYPE_CODES
from megalith.format.entries import LAYOUT_CODES
from megalith.format.reader import PackedFile

from .plain import jsonable
from .table import records_of, sqnr_db

_COUNTS = ("rounded", "flushed", "nonfinite")
_MAX_LOSSY_LINES = 8
_MAX_KINDS = 12
_NUM_WORST = 5
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")  # a part of a name, such as a layer's or an expert's number


def conversion(packed: PackedFile) -> dict[str, Any]:
    """JSON-ready: losses of the tensors that are not quantised, summed, and each of those that lost something."""
    records, names = records_of(packed), packed.index.tensors.names
    changed = ~_is_mxfp4(packed) & ((records["rounded"] > 0) | (records["nonfinite"] > 0))
    fields = (*_COUNTS, "max_abs_error")
    tensors = [{"name": names[i], **{n: records[n][i].item() for n in fields}} for i in np.flatnonzero(changed).tolist()]
    result = {**{name: int(records[name][changed].sum()) for name in _COUNTS},
              "max_abs_error": float(records["max_abs_error"][changed].max(initial=0.0)), "tensors": tensors}  # fmt: skip
    return jsonable(result)  # type: ignore[no-any-return]


def quantised(packed: PackedFile) -> dict[str, Any] | None:
    """JSON-ready: how many tensors are in MXFP4 and at what cost, and which matrices are not; None without MXFP4.

    `native` of the tensors came in MXFP4. `worst` are those of the lowest SQNR.
    """
    index, chosen = packed.index, _is_mxfp4(packed)
    if not chosen.any():
        return None
    tensors, records = index.tensors.columns, records_of(packed)
    ratios = {name: ratio for name, ratio in zip(index.tensors.names, sqnr_db(records), strict=True) if ratio is not None}
    worst = sorted(ratios.items(), key=lambda item: item[1])[:_NUM_WORST]
    is_matrix = index.blobs.columns["layout"][tensors["blob"]] == LAYOUT_CODES["tile16x512"]
    kept = Counter(_NUMBER.sub("*", index.tensors.names[i]) for i in np.flatnonzero(is_matrix).tolist())
    return {
        "tensors": int(chosen.sum()),
        "native": int((tensors["source_dtype"][chosen] == DTYPE_CODES["MXFP4"]).sum()),
        **{name: int(records[name][chosen].sum()) for name in ("rounded", "flushed")},
        "lowest_sqnr_db": worst[0][1] if worst else None,
        "median_sqnr_db": float(np.median(list(ratios.values())).round(2)) if ratios else None,
        "worst": [{"name": name, "sqnr_db": ratio} for name, ratio in worst],
        "matrices_in_16_bits": [{"name": name, "tensors": count} for name, count in kept.items()],
    }


def _is_mxfp4(packed: PackedFile) -> NDArray[np.bool_]:
    """For each tensor whether it is stored in MXFP4."""
    index = packed.index
    found: NDArray[np.bool_] = index.blobs.columns["dtype"][index.tensors.columns["blob"]] == DTYPE_CODES["MXFP4"]
    return found


def conversion_text(loss: dict[str, Any], has_quantised: bool) -> list[str]:
    """Lines for `conversion`."""
    if not loss["tensors"]:
        return [f"conversion: lossless{' but for the quantised tensors' * has_quantised}, every value is finite"]
    lines = [
        f"conversion: {loss['rounded']:,} values rounded, {loss['flushed']:,} of them to zero, largest error "
        f"{_number(loss['max_abs_error'])}; {loss['nonfinite']:,} values not finite; in {len(loss['tensors']):,} tensors"
    ]
    for tensor in loss["tensors"][:_MAX_LOSSY_LINES]:
        lines.append(
            f"  {tensor['name']}: rounded {tensor['rounded']:,}, flushed {tensor['flushed']:,}, "
            f"not finite {tensor['nonfinite']:,}, largest error {_number(tensor['max_abs_error'])}"
        )
    if len(loss["tensors"]) > _MAX_LOSSY_LINES:
        lines.append(f"  and {len(loss['tensors']) - _MAX_LOSSY_LINES:,} more tensors: --json lists them all")
    return lines


def quantised_text(data: dict[str, Any] | None) -> list[str]:
    """Lines for `quantised`; none without MXFP4."""
    if data is None:
        return []
    lines = [f"quantised: {data['tensors']:,} tensors are in MXFP4, {data['native']:,} of them came in it"]
    if data["worst"]:
        lines[0] += f"; {data['rounded']:,} values rounded, {data['flushed']:,} of them to zero"
        lines.append(f"  SQNR lowest {data['lowest_sqnr_db']:.2f} dB, median {data['median_sqnr_db']:.2f} dB; the lowest are")
        lines += [f"    {tensor['sqnr_db']:6.2f} dB  {tensor['name']}" for tensor in data["worst"]]
    kept = data["matrices_in_16_bits"]
    lines.append(f"  matrices in 16 bits{'' if kept else ': none'}")
    lines += [f"    {kind['tensors']:>6,} x {kind['name']}" for kind in kept[:_MAX_KINDS]]
    if len(kept) > _MAX_KINDS:
        lines.append(f"    and {sum(kind['tensors'] for kind in kept[_MAX_KINDS:]):,} more tensors: --json lists their names")
    return lines


def _number(value: float | str) -> str:
    return f"{value:.7g}" if isinstance(value, float) else value
