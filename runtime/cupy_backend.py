"""The CuPy backend: a packed file in one device allocation, run by our kernels. Nothing allocates after construction."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megalith.format.reader import PackedFile
from megalith.format.rope import F32, table_offset

from .arena import ArenaPlan, FileSpan, plan_arena
from .copying import CudaCopier
from .cupy_device import (
    DEFAULT_PREFILL_TOKENS,
    KEPT_BYTES,
    device_facts,
    import_cupy,
    longest_context,
    longest_prefill,
    planned_limits,
)
from .cupy_sequences import GpuSequence, SequencePlaces, generate
from .gpu_buffers import Limits, items_of_row
from .gpu_program import DecodePass, GpuProgram, Places, PrefillPass
from .gpu_staging import PinnedCopies, Staging
from .kernel_spans import KernelSpans
from .launch import Launch
from .loaded_kernels import LoadedKernels, Wanted
from .loading import LoadOptions, LoadReport, load, terminal_progress
from .needed_kernels import KernelNeeds, batch_bucket, batch_buckets, prefill_bucket, prefill_buckets
from .sampler import SamplingParameters
from .trace import Trace, host_span

if TYPE_CHECKING:
    from .cupy_executor import CupyExecutor

_KEPT_PREFILLS = 32  # sizes of prefill whose launches are kept


@dataclass(frozen=True)
class Rows:
    """Rows of logits: int32 positions of the tokens that they follow, and slots."""

    positions: NDArray[np.int32]
    slots: NDArray[np.int32]


DecodeKey = tuple[int, int, bool]  # sequences of the bucket, blocks that share a context, whether tokens are sampled


@dataclass(frozen=True)
class DecodeBatch:
    """A whole bucket: int32 [batch] each, -1 where there is no sequence; `workers` blocks share a context."""

    positions: NDArray[np.int32]
    slots: NDArray[np.int32]
    workers: int

    def key(self, sampled: bool) -> DecodeKey:
        """What the launches of its step depend on."""
        return len(self.positions), self.workers, sampled


@dataclass(frozen=True)
class WarmUp:
    """What `CupyBackend.warm_up` made, and what the driver took for it beside the arena and kernels that were loaded before."""

    graphs: int
    seconds: float
    device_bytes: int


class CupyBackend:
    """Executes a program over sequences whose keys and values lie in pages of the arena.

    `batch_invariant`: what a sequence gets is the same to the bit whatever runs beside it.
    `warm`: what is otherwise made when it is first needed - kernels, graphs, their memory - is made now, for a server.
    """

    def __init__(
        self,
        packed: PackedFile,
        *,
        max_seq_len: int | None = None,
        max_sequences: int = 1,
        max_prefill_tokens: int = DEFAULT_PREFILL_TOKENS,
        num_pages: int | None = None,
        use_graphs: bool = True,
        batch_invariant: bool = False,
        verify: bool = False,
        warm: bool = False,
        trace: Trace | None = None,
    ) -> None:
        self.trace = trace
        with host_span(trace, "find device"):
            self.cupy = import_cupy()
            self.facts = device_facts(self.cupy)
        self.config = packed.index.config
        self.max_seq_len = longest_context(packed.index, max_seq_len)
        self._use_graphs = use_graphs
        self._kernels = LoadedKernels(trace)
        self._graphs: dict[DecodeKey, Any] = {}
        self._prefill_graphs: dict[int, Any] = {}  # by the number of tokens, for all but the chosen rows
        self._prefill_launches: dict[PrefillPass, list[Launch]] = {}
        self._chosen_rows: dict[PrefillPass, list[Launch]] = {}
        self.stream = self.cupy.cuda.Stream(non_blocking=True)
        wanted = planned_limits(packed, self.facts, self.max_seq_len, max_sequences, max_prefill_tokens, batch_invariant)
        with host_span(trace, "plan arena"):
            self.plan = self._plan(packed, wanted, num_pages)
        self.limits = self.plan.limits
        self._needs = KernelNeeds(packed.index, self.limits, self.facts.arch)
        kernels = self._needs.everything() if warm else self._needs.decode([1])
        with ThreadPoolExecutor(1, thread_name_prefix="kernels") as pool:
            loading = pool.submit(self._load_kernels, kernels, self.cupy.cuda.Device())
            self._load(packed, verify)
            loading.result()
        self._has_all_kernels = warm
        self.program = GpuProgram(packed.index, self.limits, self._places, self.facts.arch, self._kernels.get)
        self._staging = Staging(self.cupy, self.address("staging"), self._nbytes("staging"))
        self._copies = PinnedCopies(self.cupy, max(4 * self.limits.pages_per_sequence, 256))
        self._logits = self.pinned(np.dtype(np.float32), self._nbytes("logits") // 4)
        self.kernel_spans: KernelSpans | None = None
        if trace is not None:
            self.kernel_spans = KernelSpans(trace, self.cupy.cuda, self.stream, self.facts.name, packed.index.blobs.names)
        self._sequence_places = SequencePlaces(self.limits)
        self.warm_up_report = self.warm_up() if warm else None

    # ---- memory ----------------------------------------------------------------------------------------------------

    def _plan(self, packed: PackedFile, wanted: Limits, num_pages: int | None) -> ArenaPlan:
        """With pages for every sequence's whole context, or for as much as fits the device."""
        span = FileSpan.of(packed.header)
        free, _ = self.cupy.cuda.runtime.memGetInfo()
        whole = plan_arena(self.config, span, wanted, None, num_pages)
        if whole.nbytes + KEPT_BYTES <= free:
            return whole
        return plan_arena(self.config, span, wanted, free - KEPT_BYTES, num_pages)

    def _load(self, packed: PackedFile, verify: bool) -> None:
        span = FileSpan.of(packed.header)
        with host_span(self.trace, "allocate arena", bytes=self.plan.nbytes):
            self._arena = self.cupy.cuda.alloc(self.plan.nbytes)
        base = self._arena.ptr
        self.cupy.cuda.runtime.memsetAsync(base + span.nbytes, 0, self.plan.nbytes - span.nbytes, self.stream.ptr)
        with host_span(self.trace, "copy file to device", bytes=span.nbytes):
            self.copy_file(packed, verify)
        table = base + span.rope_offset + table_offset(self.config.head_dim)
        self._places = Places(base, table, self.plan.addresses(base))
        eos = np.array(self.config.eos_token_ids or [0], np.int32)
        copy = self.cupy.cuda.runtime.memcpy
        copy(self.address("eos_tokens"), eos.ctypes.data, eos.nbytes, self.cupy.cuda.runtime.memcpyHostToDevice)
        self.stream.synchronize()

    def copy_file(self, packed: PackedFile, verify: bool = False) -> LoadReport:
        """From the file to its place in the arena; once more is harmless where nothing runs."""
        with terminal_progress(FileSpan.of(packed.header).nbytes) as progress:
            return load(packed, self._arena.ptr, CudaCopier(self.stream.ptr), LoadOptions(verify=verify), progress)

    def address(self, name: str) -> int:
        """Of a region of the arena."""
        return self._places[name]

    def _nbytes(self, name: str) -> int:
        return next(region.nbytes for region in self.plan.regions if region.name == name)

    def pinned(self, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
        """Pinned host memory."""
        return np.frombuffer(self.cupy.cuda.alloc_pinned_memory(dtype.itemsize * count), dtype, count)

    def fetch(self, target: NDArray[Any], source: int, nbytes: int) -> None:
        """Enqueue a copy from the device to pinned memory."""
        runtime = self.cupy.cuda.runtime
        runtime.memcpyAsync(target.ctypes.data, source, nbytes, runtime.memcpyDeviceToHost, self.stream.ptr)

    def read(self, name: str, rows: int, columns: int) -> F32:
        """float32 [rows, columns] from the start of a region, once all that was enqueued is done."""
        found = np.empty((rows, columns), np.float32)
        self.stream.synchronize()
        runtime = self.cupy.cuda.runtime
        runtime.memcpy(found.ctypes.data, self.address(name), found.nbytes, runtime.memcpyDeviceToHost)
        return found

    def _load_kernels(self, wanted: Sequence[Wanted], device: Any) -> None:
        device.use()  # a new thread has no context
        self._kernels.load(wanted)

    # ---- made ahead ------------------------------------------------------------------------------------------------

    def load_kernels(self, batches: Sequence[int], token_counts: Sequence[int]) -> None:
        """Those of decode steps of so many sequences and of prefills of so many tokens to the logits of one row, all at once:
        what is not cached compiles in parallel.
        """
        if self._has_all_kernels:
            return
        buckets = [batch_bucket(batch, self.limits.max_sequences) for batch in batches]
        self._kernels.load([*self._needs.decode(buckets), *self._needs.prefill(token_counts, [1])])

    @cached_property
    def executor(self) -> CupyExecutor:
        """The one that runs steps over this backend."""
        from .cupy_executor import CupyExecutor

        return CupyExecutor(self)

    def warm_up(self) -> WarmUp:
        """Load every kernel and run every pass once, graphs over no sequence and a prefill into a page that is free (a
        new block table names page 0 throughout), so that neither this process nor the driver allocates anything later. Before
        the first sequence.
        """
        begun, (free, _) = time.perf_counter(), self.cupy.cuda.runtime.memGetInfo()
        self._kernels.load(self._needs.everything())
        self._has_all_kernels = True
        attention = self.program.decode_attention
        for batch in batch_buckets(self.limits.max_sequences):
            nobody = np.full(batch, -1, np.int32)
            for workers in attention.reachable_workers(self.limits.max_seq_len, batch):
                for sampled in (False, True):
                    self._enqueue_decode(DecodeBatch(nobody, nobody, workers), sampled, self._use_graphs)
        if self._use_graphs:
            for count in prefill_buckets(self.limits.max_prefill_tokens):
                self._prefill_graphs[count] = self._captured(
                    self.program.all_rows(self._send_prefill([], [], [], False, count))
                )
                self._prefill_graphs[count].launch(self.stream)
        count = self.limits.max_prefill_tokens
        self.prefill(np.zeros(count, np.int64), longest_prefill(self.limits), [count - 1])
        nobody = np.array([-1], np.int32)
        self.sample(Rows(nobody, nobody), [None])
        self.count_tokens(0, [0], [])
        self.read_logits(1)
        self.executor.close()
        left, _ = self.cupy.cuda.runtime.memGetInfo()
        return WarmUp(len(self._graphs) + len(self._prefill_graphs), time.perf_counter() - begun, free - left)

    # ---- passes over many sequences -----------------------------------------------------------------------------------

    def send_table(self, slot: int, pages: Sequence[int]) -> None:
        """The pages of a slot's sequence, first to last."""
        row = self.address("block_table") + 4 * slot * self.limits.pages_per_sequence
        self._copies.send(np.array(pages, np.int32), row, self.stream)

    def set_last_token(self, slot: int, token: int) -> None:
        """What a slot's next decode step starts from, where it was not sampled here."""
        self._copies.send(np.array([token], np.int32), self.address("last_token") + 4 * slot, self.stream)

    def count_tokens(self, slot: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """What came before, for penalties."""
        row = 2 * self.program.logits_pitch
        place = self.address("token_counts") + slot * row
        self.cupy.cuda.runtime.memsetAsync(place, 0, row, self.stream.ptr)
        for ids, generated in ((prompt_ids, False), (output_ids, True)):
            for start in range(0, len(ids), self.limits.max_tokens):
                some = np.asarray(ids[start : start + self.limits.max_tokens], np.int32)
                [address] = self._staging.send([some], self.stream)
                self._enqueue([self.program.count_tokens(slot, address, len(some), generated)])

    def decode_step(self, positions: NDArray[np.int32], slots: NDArray[np.int32], sampled: bool = False) -> None:
        """Logits of the next token of every sequence from its slot's last token, and the token if `sampled`.

        `positions` int32 [batch], where the last token goes; `slots` int32 [batch].
        """
        spans = self.kernel_spans
        is_traced = spans is not None and spans.begin("decode step", sequences=len(positions), longest=int(positions.max()) + 1)
        self._enqueue_decode(self._decode_batch(positions, slots), sampled, self._use_graphs and not is_traced)

    def decode_launches(self, positions: NDArray[np.int32], slots: NDArray[np.int32]) -> list[Launch]:
        """Of a decode step to logits, for one who enqueues them; what they read from the host is sent."""
        batch = self._decode_batch(positions, slots)
        return self._decode_launches(batch.key(sampled=False), self._send_batch(batch))

    def _decode_batch(self, positions: NDArray[np.int32], slots: NDArray[np.int32]) -> DecodeBatch:
        count = batch_bucket(len(positions), self.limits.max_sequences)
        workers = self.program.decode_attention.workers(int(positions.max()) + 1, count)
        return DecodeBatch(_padded(positions, count, -1), _padded(slots, count, -1), workers)

    def _send_batch(self, batch: DecodeBatch) -> DecodePass:
        return DecodePass(*self._staging.send([batch.positions, batch.slots], self.stream))

    def _enqueue_decode(self, batch: DecodeBatch, sampled: bool, as_graph: bool) -> None:
        step, key = self._send_batch(batch), batch.key(sampled)
        if not as_graph:
            self._enqueue(self._decode_launches(key, step))
            return
        if key not in self._graphs:
            self._graphs[key] = self._captured(self._decode_launches(key, step))
        self._graphs[key].launch(self.stream)

    def _captured(self, launches: Sequence[Launch]) -> Any:
        with host_span(self.trace, "capture graph"):
            self.stream.begin_capture()
            try:
                self._enqueue(launches)
            finally:
                graph = self.stream.end_capture()
        return graph

    def _decode_launches(self, key: DecodeKey, step: DecodePass) -> list[Launch]:
        batch, workers, sampled = key
        if not self._has_all_kernels:
            self._kernels.load(self._needs.decode([batch]))
        with host_span(self.trace, "plan launches"):
            launches = self.program.decode(batch, workers, step)
        return [*launches, self.program.sample(batch, step.positions, step.slots)] if sampled else launches

    def prefill(
        self,
        ids: NDArray[np.int64],
        sequences: Sequence[tuple[int, int, int, int]],
        rows: Sequence[int],
        whole: bool = False,
    ) -> None:
        """Logits of at most `max_sequences` chosen rows. `sequences`: (slot, first row, tokens, positions before) of each.

        An id of -1 is what the slot was given last, for sequences of one token that decode. In the last layer all tokens get
        keys and values, but only the chosen rows go on from there, unless `whole`, so that `logits_of` can ask for any other.
        """
        spans = self.kernel_spans
        is_traced = spans is not None and spans.begin("prefill", sequences=len(sequences), tokens=len(ids))
        bucket = prefill_bucket(len(ids))
        if whole or is_traced or bucket not in self._prefill_graphs:
            self._enqueue(self.prefill_launches(ids, sequences, rows, whole))
            return
        step = self._send_prefill(ids, sequences, rows, whole, bucket)
        self._prefill_graphs[bucket].launch(self.stream)
        if step not in self._chosen_rows:
            self._chosen_rows[step] = self.program.chosen_rows(step)
        self._enqueue(self._chosen_rows[step])

    def prefill_launches(
        self,
        ids: NDArray[np.int64],
        sequences: Sequence[tuple[int, int, int, int]],
        rows: Sequence[int],
        whole: bool = False,
    ) -> list[Launch]:
        """Of a prefill, for one who enqueues them; what they read from the host is sent."""
        step = self._send_prefill(ids, sequences, rows, whole, len(ids))
        if step not in self._prefill_launches:
            if len(self._prefill_launches) == _KEPT_PREFILLS:
                self._prefill_launches.pop(next(iter(self._prefill_launches)))
            if not self._has_all_kernels:
                self._kernels.load(self._needs.prefill([step.num_tokens], [step.num_rows] if rows else []))
            with host_span(self.trace, "plan launches"):
                self._prefill_launches[step] = self.program.prefill(step)
        return self._prefill_launches[step]

    def _send_prefill(
        self,
        ids: NDArray[np.int64] | Sequence[int],
        sequences: Sequence[tuple[int, int, int, int]],
        rows: Sequence[int],
        whole: bool,
        num_tokens: int,
    ) -> PrefillPass:
        """Padded, so that what has the same size lies in the same places."""
        table = np.array(sequences, np.int32).reshape(-1, 4)
        attention, group, most_sequences = self.program.prefill_attention, self.program.group, self.limits.max_sequences
        items = attention.items(table, group, 0)
        last_items = items[:0] if whole else attention.items_of_rows(items, table, group, rows)
        num_rows = batch_bucket(len(rows), most_sequences) if rows else 0
        most_items = attention.most_items(num_tokens, most_sequences, group)
        most_last_items = num_rows * items_of_row(group, attention.rows)
        slots, firsts, counts, before = table.T
        positions = np.arange(len(ids)) + np.repeat(before - firsts, counts)
        fields = [
            np.array([len(items), len(last_items)]),
            _padded(ids, num_tokens), _padded(positions, num_tokens), _padded(np.repeat(slots, counts), num_tokens, -1),
            _padded(table, most_sequences), _padded(items, most_items), _padded(last_items, most_last_items),
            _padded(rows, num_rows),
        ]  # fmt: skip
        return PrefillPass(num_tokens, num_rows, most_items, *self._staging.send(fields, self.stream), whole=whole)

    def sample(self, rows: Rows, masks: Sequence[NDArray[np.int32] | None]) -> None:
        """A token for each row of logits, within its mask where it has one."""
        fields: list[NDArray[Any]] = [rows.positions, rows.slots]
        if any(mask is not None for mask in masks):
            everything = np.full(-(-self.config.vocab_size // 32), -1, np.int32)
            fields.append(np.stack([everything if mask is None else mask for mask in masks]))
        positions, slots, *mask_at = self._staging.send(fields, self.stream)
        self._enqueue([self.program.sample(len(masks), positions, slots, *mask_at)])

    def logits_of(self, rows: Sequence[int]) -> F32:
        """Logits float32 [len(rows), vocab_size] of rows of the prefill that came last, a whole one."""
        found = []
        for start in range(0, len(rows), self.limits.max_sequences):
            some = np.array(rows[start : start + self.limits.max_sequences], np.int32)
            [address] = self._staging.send([some], self.stream)
            self._enqueue(self.program.head(len(some), address))
            found.append(self.read_logits(len(some)))
        return np.concatenate(found) if found else np.empty((0, self.config.vocab_size), np.float32)

    def _enqueue(self, launches: Sequence[Launch]) -> None:
        if self.kernel_spans is not None and self.kernel_spans.is_on:
            self.kernel_spans.enqueue(launches)
            return
        for launch in launches:
            launch(self.stream.ptr)

    def read_logits(self, count: int) -> F32:
        """float32 [count, vocab_size] of the pass that was enqueued last, once it is done."""
        pitch = self.program.logits_pitch
        self.fetch(self._logits, self.address("logits"), 4 * count * pitch)
        self.stream.synchronize()
        return self._logits[: count * pitch].reshape(count, pitch)[:, : self.config.vocab_size].copy()

    # ---- one sequence at a time, as the NumPy backend -----------------------------------------------------------------

    def new_cache(self) -> GpuSequence:
        """An empty sequence; RequestError where all slots are taken."""
        return self._sequence_places.open()

    def close_cache(self, cache: GpuSequence) -> None:
        """Give a sequence's slot and pages back."""
        self._sequence_places.close(cache)

    def reserve(self, cache: GpuSequence, length: int) -> None:
        """Pages for `length` positions; RequestError when there are not so many, or no positions."""
        if self._sequence_places.reserve(cache, length):
            self.send_table(cache.slot, cache.pages)

    def forward(self, ids: NDArray[np.int64], cache: GpuSequence, seq_len: int, last_only: bool) -> F32:
        """Logits float32 [num_tokens or 1, vocab_size] of tokens appended to the sequence in `cache`."""
        pieces = []
        for start in range(0, len(ids), self.limits.max_prefill_tokens):
            chunk = ids[start : start + self.limits.max_prefill_tokens]
            count, before = len(chunk), cache.length
            self.reserve(cache, before + count)
            if count == 1 and before:
                self.set_last_token(cache.slot, int(chunk[0]))
                self.decode_step(np.array([before], np.int32), np.array([cache.slot], np.int32))
                pieces.append(self.read_logits(1))
            else:
                last_row = [count - 1] * (start + count == len(ids))
                self.prefill(chunk, [(cache.slot, 0, count, before)], last_row if last_only else [], whole=not last_only)
                if not last_only:
                    pieces.append(self.logits_of(range(count)))
                elif last_row:
                    pieces.append(self.read_logits(1))
            cache.length += count
        return np.concatenate(pieces)

    def generate(self, tokens: NDArray[np.int64], parameters: SamplingParameters, count: int) -> Generator[int, None, None]:
        """At most `count` tokens after `tokens`, as they come; the device is one step ahead of what was yielded."""
        return generate(self, tokens, parameters, count)


def _padded(values: NDArray[Any] | Sequence[int], count: int, filler: int = 0) -> NDArray[np.int32]:
    """int32 [count, ...]."""
    array = np.asarray(values, np.int32)
    padding = np.full((count - len(array), *array.shape[1:]), filler, np.int32)
    return np.concatenate([array, padding])
