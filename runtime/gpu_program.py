"""The launches of one forward pass on a GPU: a program's operations as kernels with their grids and arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Protocol

import numpy as np

from megalith.format.entries import BlobEntry
from megalith.format.errors import UnsupportedError
from megalith.format.index import Index
from megalith.format.model import ModelConfig
from megalith.format.tiles import padded

from .attention_plan import WGMMA_HEAD_DIMS, PrefillAttention, decode_attention
from .compile import Build
from .gemm_plan import GemmShape, gemm_shape, qkv_shape
from .gpu_buffers import COLUMN_UNIT, RING_STEPS, ROWS_TOKENS, Limits, page_bytes, qkv_rows
from .launch import Argument, Dim3, Launch
from .linear_plan import THREADS, linear_shape
from .program import Kind, Operation, build_program
from .sampling_state import ARGUMENTS, row_pitch, sampling_grid
from .sampling_state import THREADS as SAMPLING_THREADS

i32, u32, f32 = np.int32, np.uint32, np.float32


_PRODUCTS = ("linear", "gemm_wgmma")


class Bindable(Protocol):
    """A kernel that takes its grid and arguments: `launch.Kernel`."""

    def bind(self, grid: Dim3, block: Dim3, args: Sequence[Argument], shared_bytes: int = 0, pdl: bool = True) -> Launch: ...


GetKernel = Callable[[Build, str], Bindable]


@dataclass(frozen=True)
class Places:
    """Device addresses: of the file's image and RoPE table, and of the buffers."""

    image: int
    rope: int
    buffers: Mapping[str, int]

    def __getitem__(self, name: str) -> int:
        return self.buffers[name]


@dataclass(frozen=True)
class DecodePass:
    """Addresses of what the host sends for a decode step, int32 [batch] each."""

    positions: int
    slots: int


@dataclass(frozen=True)
class PrefillPass:
    """A prefill's sizes, which may be more than there is, and addresses of what the host sends for it."""

    num_tokens: int  # slots of those beyond the last are -1
    num_rows: int  # rows whose logits are wanted
    most_items: int  # of the attention
    num_items: int  # of a layer, and of a last one that is for `rows` alone
    ids: int  # -1: what its slot was given last
    positions: int
    slots: int
    sequences: int
    items: int
    last_items: int
    rows: int
    whole: bool = field(default=False, kw_only=True)  # the last layer is for all tokens, not for `rows` alone


def element_of(index: Index) -> str:
    """BF16 or F16, the one type of all 16-bit matrices."""
    blobs = [index.blob(i) for i in range(len(index.blobs))]
    found = {blob.dtype for blob in blobs if blob.layout == "tile16x512"}
    if len(found) != 1:
        raise UnsupportedError(f"the cupy backend runs matrices of one 16-bit type, this file has {', '.join(sorted(found))}")
    element = found.pop()
    if element == "F16" and any(blob.layout == "mxfp4" for blob in blobs):
        raise UnsupportedError(
            "the cupy backend runs MXFP4 matrices beside BF16 ones, not beside FP16, which does not hold every scale: "
            "convert with --dtype bf16"
        )
    return element


class GpuProgram:
    """Builds launches; compiled kernels come from `get_kernel`. `operations`: all of the index's, or whole layers of them."""

    def __init__(
        self, index: Index, limits: Limits, places: Places, arch: str, get_kernel: GetKernel,
        operations: Sequence[Operation] | None = None,
    ) -> None:  # fmt: skip
        self._index, self._limits, self._places, self._arch, self._get = index, limits, places, arch, get_kernel
        self.config = index.config
        self.element = element_of(index)
        self._program = build_program(index) if operations is None else operations
        self._places_in_program = {op: i for i, op in enumerate(self._program)}
        self._blobs = [index.blob(i) for i in range(len(index.blobs))]
        self._names = index.blobs.names
        for op in self._program:
            if op.kind in (Kind.ROUTE, Kind.EXPERTS):
                raise UnsupportedError("the cupy backend of this version runs dense models only: use --backend numpy")
        self._qkv_rows = qkv_rows(self.config)
        self.group = self.config.num_attention_heads // self.config.num_key_value_heads
        has_wgmma = arch == "sm_90a" and self.config.head_dim in WGMMA_HEAD_DIMS
        self.prefill_attention = PrefillAttention(self.config.head_dim, has_wgmma)
        num_kv_heads = self.config.num_key_value_heads
        few = limits.max_sequences if limits.batch_invariant else ROWS_TOKENS
        self.decode_attention = decode_attention(
            self.config.head_dim, self.group, num_kv_heads, limits.shared_limit, limits.num_sms, few
        )
        self.logits_pitch = row_pitch(self.config.vocab_size)
        layers = groupby((op for op in self._program if op.layer >= 0), key=lambda op: op.layer)
        self._layers = [tuple(ops) for _, ops in layers]
        self._likenesses = [tuple(map(self._likeness, ops)) for ops in self._layers]

    # ---- passes ----------------------------------------------------------------------------------------------------

    def decode(self, batch: int, workers: int, step: DecodePass) -> list[Launch]:
        """One token of each of `batch` sequences, to logits; `workers` blocks share a sequence's context."""
        tiled = self._is_tiled(batch)

        def layer(ops: Sequence[Operation]) -> Iterator[Launch]:
            for op in ops:
                if op.kind is Kind.NORM:
                    yield self._norm(op, batch, 0, self._reader_layout(op), tiled)
                elif op.kind is Kind.QKV:
                    qkv = op
                    yield self._product(op, batch, 0, "h", "qkv", self._qkv_rows, tiled)
                elif op.kind is Kind.ATTENTION:
                    yield self._attention_decode(op, qkv, batch, workers, step, tiled)
                else:
                    yield self._dense(op, batch, tiled)

        norm, head = self._program[-2:]
        return [
            self._embed(self._program[0], batch, 0, step.slots),
            *self._of_layers(layer),
            self._norm(norm, batch, 0, self._reader_layout(norm), tiled),
            self._dense(head, batch, tiled),
        ]

    def prefill(self, step: PrefillPass) -> list[Launch]:
        """Tokens of some sequences, to the logits of `num_rows` of them."""
        return [*self.all_rows(step), *(self.head(step.num_rows, step.rows) if step.whole else self.chosen_rows(step))]

    def all_rows(self, step: PrefillPass) -> list[Launch]:
        """The part of a prefill that all tokens go through: to the last layer's keys and values, or to its end."""
        tiled, count = self._limits.has_wgmma, step.num_tokens

        def layer(ops: Sequence[Operation]) -> Iterator[Launch]:
            for op in ops:
                if op.kind is Kind.NORM:
                    yield self._norm(op, count, 0, self._reader_layout(op), tiled)
                elif op.kind is Kind.QKV:
                    yield from self._qkv(op, step, tiled)
                elif op.kind is Kind.ATTENTION:
                    yield self._attention_prefill(op, step, tiled)
                else:
                    yield self._dense(op, count, tiled)

        embed = self._embed(self._program[0], count, step.ids, step.slots)
        if step.whole:
            return [embed, *self._of_layers(layer)]
        norm, qkv, *_ = self._layers[-1]
        return [embed, *self._of_layers(layer, len(self._layers) - 1), *layer((norm, qkv))]

    def chosen_rows(self, step: PrefillPass) -> list[Launch]:
        """From the last layer's attention to logits, of chosen rows alone; the residual stream of all stays as it was."""
        count = step.num_rows
        if not count:
            return []
        _, _, attention, *following = self._layers[-1]
        among = replace(step, num_items=step.num_items + 4, items=step.last_items)
        launches = [self._attention_prefill(attention, among, self._limits.has_wgmma), self._take_rows(attention, step)]
        chosen = copy(self)
        addresses = {"x": self._places["chosen_x"], "a_rows": self._places["chosen_a"], "a_tiled": self._places["chosen_a"]}
        chosen._places = replace(self._places, buffers={**self._places.buffers, **addresses})
        tiled = self._is_tiled(count)
        for op in following:
            if op.kind is Kind.NORM:
                launches.append(chosen._norm(op, count, 0, self._reader_layout(op), tiled))
            else:
                launches.append(chosen._dense(op, count, tiled))
        return [*launches, *chosen.head(count, 0)]

    def _of_layers(
        self, launches_of: Callable[[Sequence[Operation]], Iterator[Launch]], count: int | None = None
    ) -> Iterator[Launch]:
        """Launches of the first `count` layers, of all by default. One that is like an earlier one takes those with its own
        addresses: a fourth of the time.
        """
        first: dict[object, tuple[Sequence[Operation], list[Launch]]] = {}
        for ops, likeness in list(zip(self._layers, self._likenesses, strict=True))[:count]:
            if likeness not in first:
                first[likeness] = ops, list(launches_of(ops))
                yield from first[likeness][1]
            else:
                yield from self._moved(*first[likeness], ops)

    def _moved(self, ops: Sequence[Operation], launches: Sequence[Launch], others: Sequence[Operation]) -> Iterator[Launch]:
        addresses = {self._cache(ops[0].layer): self._cache(others[0].layer)}
        for op, other in zip(ops, others, strict=True):
            blobs = [(a, b) for a, b in zip(_blobs_of(op), _blobs_of(other), strict=True) if a >= 0]
            addresses |= {self._blob(a): self._blob(b) for a, b in blobs}
        meant = dict(zip(ops, others, strict=True))
        for launch in launches:
            moved = launch.moved(addresses)
            moved.operation = meant[launch.operation] if launch.operation else None
            yield moved

    def _likeness(self, op: Operation) -> tuple[object, ...]:
        """All that an operation's launches depend on but addresses."""
        blobs = [self._blobs[number] if number >= 0 else None for number in _blobs_of(op)]
        return op.kind, op.window, *((b.dtype, b.layout, b.rows, b.columns) if b else None for b in blobs)

    def head(self, num_rows: int, rows: int) -> list[Launch]:
        """Logits of chosen rows of x; `rows` int32 [num_rows] on the device."""
        if not num_rows:
            return []
        norm, head = self._program[-2:]
        tiled = self._is_tiled(num_rows)
        return [self._norm(norm, num_rows, rows, self._reader_layout(norm), tiled), self._dense(head, num_rows, tiled)]

    def sample(self, num_rows: int, positions: int, slots: int, masks: int = 0) -> Launch:
        """A token for each row of logits, into the ring; addresses of int32 [num_rows] as for a decode step.

        `masks`: u32 [num_rows][ceil32(vocab_size) / 32], one bit for each token that a grammar allows; 0 for none.
        """
        places, config = self._places, self.config
        addresses = (
            places["logits"], places["adjusted_logits"], places["sampling_work"], slots, positions, places["sampling_slots"],
            places["sampling_biases"], places["token_counts"], places["last_token"], places["finished"], places["eos_tokens"],
            places["sampling_ring"], masks, places["step"],
        )  # fmt: skip
        numbers = (
            config.vocab_size, self.logits_pitch, self.logits_pitch, len(config.eos_token_ids), RING_STEPS,
            self._limits.max_sequences,
        )  # fmt: skip
        arguments: np.void = np.array([(*addresses, *numbers)], ARGUMENTS)[0]
        grid = sampling_grid(self._limits.num_sms, num_rows, config.vocab_size)
        return self._launch("sampling", "sampling", {}, grid, (SAMPLING_THREADS, 1, 1), (arguments,))

    def count_tokens(self, slot: int, ids: int, count: int, generated: bool) -> Launch:
        """Mark tokens of a prompt, or count generated ones; `ids` int32 [count] on the device."""
        counts = self._places["token_counts"] + 2 * slot * self.logits_pitch
        args = (counts, i32(self.config.vocab_size), ids, i32(count), i32(generated))
        return self._launch("sampling", "count_tokens", {}, (min(64, -(-count // 256)), 1, 1), (256, 1, 1), args)

    # ---- operations ------------------------------------------------------------------------------------------------

    def _dense(self, op: Operation, count: int, tiled: bool) -> Launch:
        config = self.config
        if op.kind is Kind.PROJECT:
            source = "a" if self._names[op.weight].endswith(".o_proj") else "inner"
            return self._product(op, count, 1, source, "x", config.hidden_size, tiled, config.hidden_size)
        if op.kind is Kind.GATE_UP:
            return self._product(op, count, 2, "h", "inner", 0, tiled, config.intermediate_size)
        assert op.kind is Kind.HEAD
        return self._product(op, count, 0, "h", "logits", self.logits_pitch, tiled, config.vocab_size)

    def _embed(self, op: Operation, count: int, ids: int, slots: int) -> Launch:
        config, places = self.config, self._places
        args = (
            self._blob(op.weight), i32(config.vocab_size), i32(config.hidden_size), ids, slots, places["last_token"],
            places["x"],
        )  # fmt: skip
        # the first launch of a pass waits for all that came before it: later ones may then read early
        return self._launch("embedding", "embedding", {}, (count, 1, 1), (256, 1, 1), args, early_start=False, operation=op)

    def _norm(self, op: Operation, count: int, rows: int, reader: str, tiled: bool) -> Launch:
        config = self.config
        defines = {
            "HIDDEN_SIZE": config.hidden_size, "WEIGHT_F32": self._is_f32(op.weight), "ACTIVATION_TILED": int(tiled),
            "LANE_COLUMNS": _lane_columns(reader),
        }  # fmt: skip
        h, pitch = self._activation("h", config.hidden_size, count, tiled)
        args = (self._places["x"], rows, self._blob(op.weight), f32(config.rms_norm_eps), h, i32(pitch))
        return self._launch("rmsnorm", "rmsnorm", defines, (count, 1, 1), (256, 1, 1), args, operation=op)

    def _take_rows(self, op: Operation, step: PrefillPass) -> Launch:
        config, source_tiled, target_tiled = self.config, self._limits.has_wgmma, self._is_tiled(step.num_rows)
        reader = self._blobs[self._following(op).weight].layout
        defines = {
            "LANE_COLUMNS": _lane_columns(reader), "SOURCE_TILED": int(source_tiled), "TARGET_TILED": int(target_tiled),
        }  # fmt: skip
        a, pitch = self._activation("a", config.q_rows, step.num_tokens, source_tiled)
        _, chosen_pitch = self._activation("a", config.q_rows, step.num_rows, target_tiled)
        columns = padded(config.q_rows, 128 if reader == "mxfp4" else 32)
        args = (
            step.rows, self._places["x"], i32(config.hidden_size), self._places["chosen_x"], a, i32(columns), i32(pitch),
            self._places["chosen_a"], i32(chosen_pitch),
        )  # fmt: skip
        return self._launch("take_rows", "take_rows", defines, (step.num_rows, 1, 1), (256, 1, 1), args)

    def _following(self, op: Operation) -> Operation:
        return self._program[self._places_in_program[op] + 1]

    def _reader_layout(self, norm: Operation) -> str:
        """Layout of the matrix that reads what a norm writes."""
        following = self._following(norm)
        return self._blobs[following.weight].layout

    def _product(
        self, op: Operation, count: int, epilogue: int, source: str, target: str, pitch: int, tiled: bool, columns: int = 0
    ) -> Launch:
        blob = self._blobs[op.weight]
        x_columns = {"h": self.config.hidden_size, "a": self.config.q_rows, "inner": self.config.intermediate_size}[source]
        x, x_pitch = self._activation(source, x_columns, count, tiled)
        y, next_layout = self._places.buffers.get(target, 0), "tile16x512"
        if epilogue == 2:
            next_layout = self._blobs[self._following(op).weight].layout
            y, pitch = self._activation("inner", columns, count, tiled)
        y_columns = columns or blob.rows
        if tiled:
            return self._wgmma_product(op, blob, count, epilogue, (x, x_pitch), (y, pitch, y_columns), next_layout)
        shape = linear_shape(blob.layout, count, self._limits.shared_limit)
        defines = {
            "EPILOGUE": epilogue, "TOKEN_TILES": shape.token_tiles, "RING_CHUNKS": shape.ring_chunks, "Y_TILED": 0,
            "Y_LANE_COLUMNS": _lane_columns(next_layout), "CODEC_MXFP4": int(blob.layout == "mxfp4"),
            "BIAS_F32": self._is_f32(op.bias) if op.bias >= 0 else 0,
        }  # fmt: skip
        step_columns = 128 if blob.layout == "mxfp4" else 32
        args = (
            self._blob(op.weight), u32(blob.rows // 16), i32(blob.columns // step_columns), x, i32(x_pitch), i32(count),
            y, i32(pitch), i32(y_columns), self._blob(op.bias) if op.bias >= 0 else 0, f32(self.config.swiglu_limit or 0.0),
            self._places["linear_partials"], self._places["linear_flags"],
        )  # fmt: skip
        grid = shape.grid(self._limits.num_sms, count)
        return self._launch("linear", "linear", defines, grid, (THREADS, 1, 1), args, shape.shared_bytes, operation=op)

    def _wgmma_product(
        self,
        op: Operation,
        blob: BlobEntry,
        count: int,
        epilogue: int,
        x: tuple[int, int],
        y: tuple[int, int, int],
        reader: str,
    ) -> Launch:
        (address, pitch, columns), limits = y, self._limits
        shape = gemm_shape(blob.layout, epilogue, blob.rows, blob.columns, count, limits.num_sms, limits.batch_invariant)
        if epilogue == 2:
            columns = padded(columns, 128 if reader == "mxfp4" else 64)
        defines: dict[str, int | str] = {
            "Y_LANE_COLUMNS": _lane_columns(reader), "Y_SCALAR": int(epilogue != 2 and bool(columns % 4 or pitch % 4)),
        }  # fmt: skip
        return self._wgmma_launch(op, blob, count, shape, x, (address, pitch, columns), defines)

    def _wgmma_launch(
        self, op: Operation, blob: BlobEntry, count: int, shape: GemmShape, x: tuple[int, int], y: tuple[int, int, int],
        others: Mapping[str, int | str], more: tuple[Argument, ...] = (),
    ) -> Launch:  # fmt: skip
        num_sms, (address, pitch, columns) = self._limits.num_sms, y
        defines = {**shape.defines(), "BIAS_F32": self._is_f32(op.bias) if op.bias >= 0 else 0, **others}
        step_columns = 128 if blob.layout == "mxfp4" else 32
        args = (
            self._blob(op.weight), i32(blob.rows // 16), i32(blob.columns // step_columns), x[0], i32(x[1]), i32(count),
            address,
            i32(pitch), i32(columns), self._blob(op.bias) if op.bias >= 0 else 0, f32(self.config.swiglu_limit or 0.0),
            i32(shape.token_band(blob.columns, count)), self._places["gemm_partials"], self._places["gemm_flags"], *more,
        )  # fmt: skip
        grid = (num_sms, 1, 1)
        threads = (shape.threads, 1, 1)
        return self._launch("gemm_wgmma", "gemm_wgmma", defines, grid, threads, args, shape.shared_bytes, operation=op)

    def _qkv_defines(self, qkv: Operation) -> dict[str, int | str]:
        config = self.config
        return {
            "HEAD_DIM": config.head_dim, "QK_NORM": ("none", "head", "full").index(config.qk_norm),
            "NORM_F32": self._is_f32(qkv.q_norm) if qkv.q_norm >= 0 else 0,
        }  # fmt: skip

    def _qkv(self, op: Operation, step: PrefillPass, tiled: bool) -> Iterator[Launch]:
        """Queries, and keys and values in the cache, of a prefill: by one kernel where that is faster."""
        config, blob, count = self.config, self._blobs[op.weight], step.num_tokens
        heads = i32(config.num_attention_heads), i32(config.num_key_value_heads)
        norms = self._blob(op.q_norm) if op.q_norm >= 0 else 0, self._blob(op.k_norm) if op.k_norm >= 0 else 0
        numbers = f32(config.rms_norm_eps), self._clip()
        where = (
            self._places.rope, step.positions, step.slots, self._places["block_table"], i32(self._limits.pages_per_sequence),
        )  # fmt: skip
        shape = None
        if tiled and config.qk_norm != "full":
            shape = qkv_shape(
                blob.layout, blob.rows, blob.columns, count, self._limits.num_sms, config.head_dim, self._limits.batch_invariant
            )
        if shape is not None:
            x = self._activation("h", config.hidden_size, count, tiled)
            more = (*norms, *numbers, *where, *heads, self._cache(op.layer))
            defines = {"Y_LANE_COLUMNS": 8, "Y_SCALAR": 0, **self._qkv_defines(op)}
            yield self._wgmma_launch(op, blob, count, shape, x, (self._places["q"], 0, blob.rows), defines, more)
            return
        yield self._product(op, count, 0, "h", "qkv", self._qkv_rows, tiled)
        args = (
            self._places["qkv"], i32(self._qkv_rows), *heads, *norms, *numbers, *where, self._places["q"],
            self._cache(op.layer),
        )  # fmt: skip
        yield self._launch("qkv_post", "qkv_post", self._qkv_defines(op), (count, 1, 1), (256, 1, 1), args, operation=op)

    def _attention_prefill(self, op: Operation, step: PrefillPass, tiled: bool) -> Launch:
        config, build = self.config, self.prefill_attention
        a, pitch = self._activation("a", config.q_rows, step.num_tokens, tiled)
        reader = self._blobs[self._following(op).weight].layout
        sinks_f32 = op.sinks >= 0 and bool(self._is_f32(op.sinks))
        defines = build.defines(self.element, tiled, _lane_columns(reader), sinks_f32)
        args = (
            self._places["q"], self._cache(op.layer), self._places["block_table"], i32(self._limits.pages_per_sequence),
            step.sequences, step.items, step.num_items, i32(config.num_key_value_heads), i32(self.group), i32(op.window),
            f32(config.head_dim**-0.5), self._blob(op.sinks) if op.sinks >= 0 else 0, a, i32(pitch),
        )  # fmt: skip
        grid = build.grid(step.most_items, config.num_key_value_heads, self._limits.num_sms)
        threads = (build.threads, 1, 1)
        return self._launch(build.name, build.name, defines, grid, threads, args, build.shared_bytes, operation=op)

    def _attention_decode(
        self, op: Operation, qkv: Operation, batch: int, workers: int, step: DecodePass, tiled: bool
    ) -> Launch:
        config, build = self.config, self.decode_attention
        a, pitch = self._activation("a", config.q_rows, batch, tiled)
        reader = self._blobs[self._following(op).weight].layout
        defines = {
            **self._qkv_defines(qkv), **build.defines(), "HAS_SINKS": int(op.sinks >= 0), "ACTIVATION_TILED": int(tiled),
            "ACTIVATION_LANE_COLUMNS": _lane_columns(reader), "EARLY_READS": 1,
            "SINKS_F32": self._is_f32(op.sinks) if op.sinks >= 0 else 0,
        }  # fmt: skip
        args = (
            self._places["qkv"], i32(self._qkv_rows), self._blob(qkv.q_norm) if qkv.q_norm >= 0 else 0,
            self._blob(qkv.k_norm) if qkv.k_norm >= 0 else 0, f32(config.rms_norm_eps), self._clip(), self._places.rope,
            step.positions, step.slots, self._places["block_table"], i32(self._limits.pages_per_sequence),
            self._cache(op.layer), i32(op.window), self._blob(op.sinks) if op.sinks >= 0 else 0, a, i32(pitch),
            self._places["attention_sums"], self._places["attention_stats"], i32(build.max_splits),
            i32(build.min_split_tokens(batch)), self._places["attention_arrived"],
        )  # fmt: skip
        grid, threads = (workers, build.blocks, batch), (build.threads, 1, 1)
        return self._launch(
            "attention_decode", "attention_decode", defines, grid, threads, args, build.shared_bytes, operation=op
        )

    # ---- places ----------------------------------------------------------------------------------------------------

    def _launch(
        self, source: str, entry: str, defines: Mapping[str, int | str], grid: Dim3, block: Dim3, args: tuple[Argument, ...],
        shared_bytes: int = 0, early_start: bool = True, operation: Operation | None = None,
    ) -> Launch:  # fmt: skip
        options = {f"ELEMENT_{self.element}": 1, **defines}
        kernel = self._get(Build.of(source, self._arch, **options), entry)
        launch = kernel.bind(grid, block, args, shared_bytes, early_start)
        launch.operation = operation
        if operation is not None and source in _PRODUCTS:
            launch.weight_bytes = self._blobs[operation.weight].nbytes
        return launch

    def _blob(self, number: int) -> int:
        return self._places.image + self._blobs[number].offset

    def _is_f32(self, number: int) -> int:
        return int(self._blobs[number].dtype == "F32")

    def _clip(self) -> np.float32:
        return f32(np.inf if self.config.clip_qkv is None else self.config.clip_qkv)

    def _cache(self, layer: int) -> int:
        per_layer = page_bytes(self.config) // self.config.num_hidden_layers * self._limits.num_pages
        return self._places["kv_cache"] + layer * per_layer

    def _is_tiled(self, count: int) -> bool:
        """Whether products of so many tokens that are not a prefill's go through wgmma."""
        return self._limits.has_wgmma and count > self._limits.rows_tokens

    def _activation(self, name: str, columns: int, count: int, tiled: bool) -> tuple[int, int]:
        """Address and pitch: columns of a row, or tokens of a panel."""
        if tiled:
            return self._places[f"{name}_tiled"], padded(count, 8)
        return self._places[f"{name}_rows"], padded(columns, COLUMN_UNIT)


def _blobs_of(op: Operation) -> tuple[int, ...]:
    return op.weight, op.bias, op.q_norm, op.k_norm, op.sinks


def _lane_columns(layout: str) -> int:
    return 32 if layout == "mxfp4" else 8


def can_use_wgmma(arch: str, config: ModelConfig) -> bool:
    """Whether products of many tokens go through wgmma: attention fills whole panels of its output there."""
    return arch == "sm_90a" and config.q_rows % 64 == 0
