"""The rules of the index's tables (B, T, O), checked on whole columns: no size or offset is believed before."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from . import mxfp4
from .constants import BLOB_ALIGNMENT, DTYPES, LAYOUTS, MAX_DIMENSION, MAX_FILE_BYTES, ROW_ORDERS, TILE_ROWS
from .dtypes import DTYPE_CODES
from .entries import LAYOUT_CODES, MAX_SOURCE_DIMENSIONS, NO_SOURCE, STORED_COLUMNS
from .errors import FormatError, printable
from .model import BlobSpec, ModelConfig, layer_specs, num_blobs, outer_specs
from .rows import ROW_ORDER_CODES
from .table import Column, Table

_VECTOR, _MXFP4_LAYOUT = LAYOUT_CODES["vector"], LAYOUT_CODES["mxfp4"]
_F32, _MXFP4, _U8 = DTYPE_CODES["F32"], DTYPE_CODES["MXFP4"], DTYPE_CODES["U8"]
_BLOCK_BYTES = mxfp4.BLOCK_BYTES


def check_blobs(blobs: Table, place: str) -> None:
    """Rules B2 to B4."""
    place = f"{place}: blob"
    c = blobs.columns
    known_dtypes = [code for code in DTYPES if code != _U8]
    for name, known in (("dtype", known_dtypes), ("layout", list(LAYOUTS))):
        blobs.reject(~np.isin(c[name], known), place, f"{name} code {{{name}}} is not known", "B2")
    tiled, is_mxfp4 = c["layout"] != _VECTOR, c["dtype"] == _MXFP4
    too_large = (c["rows"] - np.uint64(1) >= MAX_DIMENSION) | (c["columns"] - np.uint64(1) >= MAX_DIMENSION)
    blobs.reject(too_large, place, "{rows} x {columns} stored elements are out of range", "B3")
    unit = np.array([STORED_COLUMNS[LAYOUTS[code]] for code in c["layout"].tolist()], np.uint64)
    misshapen = (c["rows"] % TILE_ROWS != 0) | np.where(tiled, c["columns"] % unit != 0, c["columns"] != 1)
    blobs.reject(misshapen, place, "{rows} x {columns} stored elements do not fill whole tiles", "B3")
    mismatched = (is_mxfp4 != (c["layout"] == _MXFP4_LAYOUT)) | (tiled & (c["dtype"] == _F32))
    blobs.reject(mismatched, place, "layout code {layout} does not hold dtype code {dtype}", "B2")
    # rows and columns are below 2^31: the product fits 63 bits; MXFP4 takes 17 bytes for 32 elements
    elements = c["rows"] * c["columns"]
    item_bytes = np.where(c["dtype"] == _F32, 4, 2).astype(np.uint64)
    nbytes = np.where(is_mxfp4, elements // 32 * 17, elements * item_bytes)
    wrong_size = (elements > MAX_FILE_BYTES) | (c["nbytes"] != nbytes)
    blobs.reject(wrong_size, place, "nbytes {nbytes} is not that of {rows} x {columns} elements", "B3")
    extents = -(-c["nbytes"].astype(np.int64) // BLOB_ALIGNMENT) * BLOB_ALIGNMENT
    expected = np.concatenate(([0], np.cumsum(extents)[:-1])).astype(np.uint64)
    wrong = (c["offset"] != expected) | (np.cumsum(extents.astype(np.float64)) > MAX_FILE_BYTES)
    blobs.reject(wrong, place, "offset {offset} leaves a hole or an overlap in the device image", "B4")


def check_tensors(tensors: Table, blobs: Table, place: str) -> None:
    """Rules T2 to T4."""
    place = f"{place}: tensor"
    c = tensors.columns
    tensors.reject(c["blob"] >= len(blobs), place, f"blob {{blob}} of {len(blobs)}", "T2")
    known = np.isin(c["source_dtype"], [code for code in DTYPES if code != _U8])
    tensors.reject(~known, place, "dtype code {source_dtype} is not known", "T3")
    tensors.reject(~np.isin(c["ndim"], (1, 2)), place, "{ndim} dimensions", "T3")
    tensors.reject(~np.isin(c["row_order"], list(ROW_ORDERS)), place, "row order code {row_order} is not known", "T4")
    packed_again = (c["source_dtype"] == _MXFP4) & (blobs.columns["dtype"][c["blob"]] != _MXFP4)
    tensors.reject(packed_again, place, "comes in MXFP4 and is stored in another dtype", "T3")


class _Expected:
    """Columns of the blob and tensor tables of a list of specs."""

    def __init__(self, specs: list[BlobSpec]) -> None:
        self.num_blobs = len(specs)
        self.names = [spec.name for spec in specs]
        self.blobs = {
            "columns": np.array([spec.columns for spec in specs], np.uint64),
            "rows": np.array([spec.rows for spec in specs], np.uint64),
            "is_matrix": np.array([spec.is_matrix for spec in specs]),
            "may_be_mxfp4": np.array([spec.may_be_mxfp4 for spec in specs]),
        }
        parts = [(number, part) for number, spec in enumerate(specs) for part in spec.parts]
        self.tensors: dict[str, NDArray[np.uint64]] = {
            "blob": np.array([number for number, _ in parts], np.uint64),
            "rows": np.array([part.rows for _, part in parts], np.uint64),
            "columns": np.array([part.columns for _, part in parts], np.uint64),
            "row_order": np.array([ROW_ORDER_CODES[part.row_map.order] for _, part in parts], np.uint64),
            "row_base": np.array([part.row_map.base for _, part in parts], np.uint64),
            "row_param": np.array([part.row_map.param for _, part in parts], np.uint64),
        }


def _expected_pieces(config: ModelConfig) -> Iterator[tuple[str, _Expected]]:
    """Name prefix and expectation of each run of blobs; a kind of layer is worked out once."""
    first, last = outer_specs(config)
    kinds = {is_sparse: _Expected(layer_specs(config, is_sparse)) for is_sparse in set(config.sparse_layers)}
    yield "", _Expected(first)
    for i, is_sparse in enumerate(config.sparse_layers):
        yield f"layers.{i}.", kinds[is_sparse]
    yield "", _Expected(last)


def check_against_model(blobs: Table, tensors: Table, config: ModelConfig, place: str) -> None:
    """Rules B5 and T5: names, layouts, shapes and row maps are exactly those of the model."""
    if len(blobs) != (count := num_blobs(config)):  # before as many are listed as the config claims
        raise FormatError(f"{place}: {len(blobs)} blobs for a model of {count}", "B5")
    pieces = list(_expected_pieces(config))
    names = (prefix + name for prefix, piece in pieces for name in piece.names)
    for i, (found, wanted) in enumerate(zip(blobs.names, names, strict=True)):
        if found != wanted:
            raise FormatError(f"{place}: blob {i} is {printable(found)}, the model's is {wanted}", "B5")
    wanted_blobs = {name: np.concatenate([piece.blobs[name] for _, piece in pieces]) for name in pieces[0][1].blobs}
    _check_blob_shapes(blobs, wanted_blobs, f"{place}: blob")
    starts = np.concatenate(([0], np.cumsum([piece.num_blobs for _, piece in pieces])[:-1])).astype(np.uint64)
    wanted_tensors = {name: np.concatenate([piece.tensors[name] for _, piece in pieces]) for name in pieces[0][1].tensors}
    sizes = [len(piece.tensors["blob"]) for _, piece in pieces]
    wanted_tensors["blob"] = wanted_tensors["blob"] + np.repeat(starts, sizes)
    if len(tensors) != sum(sizes):
        raise FormatError(f"{place}: {len(tensors)} tensors for a model of {sum(sizes)}", "T5")
    for name, column in wanted_tensors.items():
        tensors.reject(tensors.columns[name] != column, f"{place}: tensor", f"{name} {{{name}}} is not the model's", "T5")
    ndim = np.where(wanted_blobs["is_matrix"][tensors.columns["blob"]], 2, 1)
    tensors.reject(tensors.columns["ndim"] != ndim, f"{place}: tensor", "{ndim} dimensions", "T5")


def _check_blob_shapes(blobs: Table, wanted: dict[str, NDArray[np.uint64]], place: str) -> None:
    c = blobs.columns
    wrong_layout = (c["layout"] != _VECTOR) != wanted["is_matrix"]
    wrong_layout |= (c["layout"] == _MXFP4_LAYOUT) & ~wanted["may_be_mxfp4"].astype(bool)
    blobs.reject(wrong_layout, place, "layout code {layout} is not one the model allows", "B5")
    blobs.reject(c["rows"] != wanted["rows"], place, "rows {rows} is not the model's", "B5")
    unit = np.array([STORED_COLUMNS[LAYOUTS[code]] for code in c["layout"].tolist()], np.uint64)
    stored = (wanted["columns"] + unit - np.uint64(1)) // unit * unit
    blobs.reject(c["columns"] != stored, place, "columns {columns} is not the model's", "B5")


def check_sources(tensors: Table, sources: Table, blobs: Table, place: str) -> None:
    """Rules O2 to O5: every shared checkpoint tensor is covered exactly by the tensors that lie in it."""
    counts = _source_sizes(sources, f"{place}: source")
    known = set(tensors.names)
    clash = next((name for name in sources.names if name in known), None)
    if clash is not None:
        raise FormatError(f"{place}: source {printable(clash)} is also a tensor", "O2")
    t = tensors.columns
    section, place = place, f"{place}: tensor"
    alone = t["source"] == NO_SOURCE
    unused = (t["start"] | t["row_stride"] | t["column_stride"]) != 0
    tensors.reject(alone & (unused | (t["scales"] != NO_SOURCE)), place, "has a place in no source", "O3")
    tensors.reject(~alone & (t["source"] >= len(sources)), place, f"source {{source}} of {len(sources)}", "O3")
    native = t["source_dtype"] == _MXFP4
    tensors.reject(native & alone, place, "MXFP4 comes from two sources", "O3")
    in_scales = np.where(native, t["scales"] >= len(sources), t["scales"] != NO_SOURCE)
    tensors.reject(in_scales & ~alone, place, f"scales {{scales}} of {len(sources)}", "O3")
    if not len(sources):
        return
    shared = np.flatnonzero(~alone)
    pick = Table([tensors.names[i] for i in shared.tolist()], {name: column[shared] for name, column in t.items()})
    _check_placements(pick, sources, counts, blobs.columns["dtype"][pick.columns["blob"]], place)
    _check_scales(pick, place)
    _check_coverage(pick, sources, counts, section)


def _source_sizes(sources: Table, place: str) -> Column:
    """Number of elements of each source."""
    c = sources.columns
    sources.reject(
        ~np.isin(c["dtype"], [code for code in DTYPES if code != _MXFP4]), place, "dtype code {dtype} is not known", "O2"
    )
    sources.reject((c["ndim"] < 1) | (c["ndim"] > MAX_SOURCE_DIMENSIONS), place, "{ndim} dimensions", "O2")
    counts, size = np.ones(len(sources), np.uint64), np.ones(len(sources))
    for d in range(MAX_SOURCE_DIMENSIONS):
        dim, used = c[f"dim{d}"], c["ndim"] > d
        wrong = np.where(used, dim - np.uint64(1) >= MAX_DIMENSION, dim != 0)
        sources.reject(wrong, place, f"dimension {d} is {{dim{d}}}", "O2")
        counts, size = counts * np.where(used, dim, 1).astype(np.uint64), size * np.where(used, dim, 1)
        sources.reject(size > MAX_FILE_BYTES, place, "has too many elements", "O2")
    return counts


def _check_placements(tensors: Table, sources: Table, counts: Column, stored: Column, place: str) -> None:
    """Rule O4: dtypes agree and the last element lies inside; `stored` is the dtype code of each tensor's blob."""
    t = tensors.columns
    native, count = t["source_dtype"] == _MXFP4, counts[t["source"]]
    wanted = np.where(native, _U8, t["source_dtype"])
    tensors.reject(sources.columns["dtype"][t["source"]] != wanted, place, "its source has another dtype", "O4")
    _, first, group = np.unique(t["source"], return_index=True, return_inverse=True)
    tensors.reject(stored != stored[first][group], place, "is stored in another dtype than the rest of its source", "O4")
    # nothing may wrap around: every term is cut at the source's size, which is at most 2^53
    step = np.minimum(t["column_stride"], MAX_DIMENSION)
    reach = np.where(native, t["columns"] // 2, (t["columns"] - np.uint64(1)) * step + np.uint64(1))
    first_row_end = np.minimum(t["start"], count) + np.minimum(reach, count)
    outside = (t["column_stride"] > MAX_DIMENSION) | (t["row_stride"] > MAX_FILE_BYTES) | (t["start"] > count)
    outside |= (reach > count) | (first_row_end > count)
    room = count - np.minimum(count, first_row_end)
    outside |= (t["rows"] - np.uint64(1)) > room // np.maximum(t["row_stride"], np.uint64(1))
    tensors.reject(outside | (t["row_stride"] == 0) | (t["column_stride"] == 0), place, "does not lie inside its source", "O4")
    unaligned = (t["start"] % _BLOCK_BYTES != 0) | (t["row_stride"] % _BLOCK_BYTES != 0) | (t["columns"] % 32 != 0)
    tensors.reject(native & (unaligned | (t["column_stride"] != 1)), place, "does not consist of whole MXFP4 blocks", "O4")
    if native.any():
        scales = np.where(native, t["scales"], t["source"])
        wrong = (counts[scales] * np.uint64(_BLOCK_BYTES) != count) | (sources.columns["dtype"][scales] != _U8)
        tensors.reject(native & wrong, place, "its scales are not one byte for 16 of its codes", "O4")


def _check_scales(tensors: Table, place: str) -> None:
    """Rule O5: codes and scales go in pairs of sources; with O4, scales are then covered as their codes are."""
    t = tensors.columns
    native = t["source_dtype"] == _MXFP4
    if not native.any():
        return
    pairs = np.unique(np.stack([t["source"][native], t["scales"][native]]), axis=1)
    wrong = np.isin(t["scales"], t["source"])
    for column, name in zip(pairs, ("source", "scales"), strict=True):
        numbers, counts = np.unique(column, return_counts=True)
        wrong |= np.isin(t[name], numbers[counts > 1])
    tensors.reject(native & wrong, place, "its codes and scales are not a pair of sources of their own", "O5")


def _check_coverage(tensors: Table, sources: Table, counts: Column, place: str) -> None:
    """Rule O5: no element of a source is missing, none belongs to two tensors.

    Sorted by start, tensors of equal shape and strides form groups that interleave; groups follow each other.
    """
    t = tensors.columns
    native = t["source_dtype"] == _MXFP4
    columns = np.where(native, t["columns"] // 2, t["columns"])
    elements = t["rows"] * columns
    covered = np.zeros(len(sources), np.uint64)
    np.add.at(covered, t["source"].astype(np.int64), elements)
    np.add.at(covered, t["scales"][native].astype(np.int64), elements[native] // _BLOCK_BYTES)
    sources.reject(covered != counts, f"{place}: source", "its tensors hold another number of elements", "O5")
    sizes, steps, regular = _groups(t["rows"], columns, t["row_stride"], t["column_stride"])
    order = np.lexsort((t["start"], t["source"]))
    heads = _heads(sizes[order], len(order))
    before = np.cumsum(elements[order]) - elements[order]  # may wrap around, differences do not
    source = t["source"][order]
    before -= before[np.searchsorted(source, source)]
    inside = np.arange(len(order)) - heads
    wrong = t["start"][order] != before[heads] + inside.astype(np.uint64) * steps[order][heads]
    for name in ("source", "rows", "columns", "row_stride", "column_stride"):
        wrong |= t[name][order] != t[name][order][heads]
    wrong |= ~regular[order] | (heads + sizes[order].astype(np.int64) > len(order))
    by_row = np.zeros(len(order), np.bool_)
    by_row[order] = wrong
    tensors.reject(by_row, f"{place}: tensor", "leaves a gap or an overlap in its source", "O5")


def _groups(rows: Column, columns: Column, row_stride: Column, column_stride: Column) -> tuple[Column, Column, Column]:
    """How many tensors interleave with each, how far apart they start, and whether rows, columns and tensors then make up
    consecutive elements: each stride is the next smaller one times its count.
    """
    one, far = np.uint64(1), np.uint64(1 << 62)
    strides = np.where(rows == 1, far, row_stride), np.where(columns == 1, far, column_stride)
    swap = strides[1] < strides[0]
    count, stride = np.where(swap, columns, rows), np.minimum(*strides)
    outer = np.where(swap, rows, columns)
    below = np.where(count == 1, one, stride)
    run = count * below
    between = np.where(outer == 1, one, np.maximum(*strides) // run)
    regular = (outer == 1) | (np.maximum(*strides) == run * between)
    regular &= ((below == 1) | (between == 1)) & (between > 0)
    return below * between, np.where(below > 1, one, count), regular


def _heads(sizes: Column, num_tensors: int) -> NDArray[np.int64]:
    """For each tensor, the number of the first of its group."""
    heads, head, counts = np.zeros(num_tensors, np.int64), 0, sizes.tolist()
    while head < num_tensors:
        size = min(max(1, counts[head]), num_tensors - head)
        heads[head : head + size] = head
        head += size
    return heads
