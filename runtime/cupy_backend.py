"""The CuPy backend: a packed file in one device allocation, run by our kernels. Nothing allocates after construction."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.format.errors import DeviceError, RequestError, UnsupportedError
from megalith.format.reader import PackedFile
from megalith.format.rope import F32, table_offset

from .compile import Build, compiled
from .gpu_buffers import PAGE_TOKENS, Limits, device_buffers, page_bytes, place
from .gpu_program import DecodePass, GpuProgram, Places, PrefillPass, split_workers
from .gpu_staging import PinnedRows, Staging
from .launch import Kernel, Launch, Module

DEFAULT_PREFILL_TOKENS = 2048
_KEPT_BYTES = 1 << 30  # of free device memory, for the driver and for others


@dataclass
class GpuSequence:
    """One sequence's place: a slot, its pages, how many positions it holds."""

    slot: int
    pages: list[int] = field(default_factory=list)
    length: int = 0


@dataclass(frozen=True)
class DeviceFacts:
    """What planning and compiling need to know of a GPU."""

    name: str
    arch: str
    num_sms: int
    shared_limit: int

    @property
    def has_wgmma(self) -> bool:
        return self.arch == "sm_90"  # TODO


def import_cupy() -> Any:
    """The cupy module; UnsupportedError where it or a device is missing."""
    try:
        import cupy
    except ImportError as error:
        raise UnsupportedError(f"the cupy backend needs CuPy: pip install 'megalith[cuda13]' ({error})") from None
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise UnsupportedError(f"the cupy backend needs a CUDA device: {error}") from None
    return cupy


def has_device() -> bool:
    """Whether CuPy is installed and sees a GPU."""
    try:
        import_cupy()
    except UnsupportedError:
        return False
    return True


def device_facts(cupy: Any) -> DeviceFacts:
    """Of the current device; UnsupportedError below sm_80."""
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    name, capability = properties["name"].decode(), 10 * properties["major"] + properties["minor"]
    if capability < 80:
        raise UnsupportedError(f"{name} is sm_{capability}: the cupy backend needs sm_80 or newer")
    arch = f"sm_{capability}" + ("a" if capability == 90 else "")
    return DeviceFacts(name, arch, properties["multiProcessorCount"], properties["sharedMemPerMultiprocessor"])


class CupyBackend:
    """Executes a program over sequences whose keys and values lie in pages of the arena."""

    def __init__(
        self,
        packed: PackedFile,
        *,
        max_seq_len: int | None = None,
        max_sequences: int = 1,
        max_prefill_tokens: int = DEFAULT_PREFILL_TOKENS,
        num_pages: int | None = None,
        use_graphs: bool = True,
    ) -> None:
        self._cupy = import_cupy()
        self.facts = device_facts(self._cupy)
        self.config = packed.index.config
        self.max_seq_len = min(max_seq_len or self.config.max_seq_len, packed.index.rope_positions)
        self._use_graphs = use_graphs
        self._modules: dict[Build, Module] = {}
        self._kernels: dict[tuple[Build, str], Kernel] = {}
        self._graphs: dict[tuple[int, int], Any] = {}
        self.stream = self._cupy.cuda.Stream(non_blocking=True)
        self.limits = self._plan(packed, max_sequences, max_prefill_tokens, num_pages)
        self._load(packed)
        self.program = GpuProgram(packed.index, self.limits, self._places, self.facts.arch, self._kernel)
        self._make_host_memory()
        self._free_slots = list(range(max_sequences))[::-1]
        self._free_pages = list(range(self.limits.num_pages))[::-1]

    # ---- memory ----------------------------------------------------------------------------------------------------

    def _plan(self, packed: PackedFile, max_sequences: int, max_prefill_tokens: int, num_pages: int | None) -> Limits:
        facts, config = self.facts, self.config
        pages = -(-self.max_seq_len // PAGE_TOKENS) * max_sequences

        def limits(count: int) -> Limits:
            return Limits(
                max_sequences, self.max_seq_len, min(max_prefill_tokens, self.max_seq_len), count, facts.num_sms,
                facts.shared_limit, facts.has_wgmma, False,
            )  # fmt: skip

        sections = packed.header
        file_bytes = sections.section("rope").end - sections.section("image").offset
        fixed = place(device_buffers(config, limits(0)), file_bytes)[1]
        free, _ = self._cupy.cuda.runtime.memGetInfo()
        fitting = (free - _KEPT_BYTES - fixed) // page_bytes(config)
        if fitting < 1:
            raise DeviceError(
                f"{facts.name}: {free} bytes free, weights and buffers need {fixed} and one page of KV cache more"
            )
        return limits(min(num_pages or pages, fitting))

    def _load(self, packed: PackedFile) -> None:
        image, rope = packed.header.section("image"), packed.header.section("rope")
        file_bytes = rope.end - image.offset
        offsets, total = place(device_buffers(self.config, self.limits), file_bytes)
        self._arena = self._cupy.cuda.alloc(total)
        base = self._arena.ptr
        runtime = self._cupy.cuda.runtime
        runtime.memsetAsync(base + file_bytes, 0, total - file_bytes, self.stream.ptr)
        with mmap.mmap(packed.fileno(), image.offset + file_bytes, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            runtime.memcpy(base, view.ctypes.data + image.offset, file_bytes, runtime.memcpyHostToDevice)
            del view
        table = base + rope.offset - image.offset + table_offset(self.config.head_dim)
        self._places = Places(base, table, {name: base + offset for name, offset in offsets.items()})
        self.stream.synchronize()

    def _make_host_memory(self) -> None:
        buffers = {buffer.name: buffer.nbytes for buffer in device_buffers(self.config, self.limits)}
        self._staging = Staging(self._cupy, self._places["staging"], buffers["staging"])
        self._table_rows = PinnedRows(self._cupy, self.limits.pages_per_sequence)
        self._logits = self._cupy.cuda.alloc_pinned_memory(buffers["logits"])

    def _kernel(self, build: Build, entry: str) -> Kernel:
        if (build, entry) not in self._kernels:
            if build not in self._modules:
                self._modules[build] = Module(build, compiled(build))
            self._kernels[build, entry] = self._modules[build].kernel(entry)
        return self._kernels[build, entry]

    # ---- one sequence at a time, as the NumPy backend -----------------------------------------------------------------

    def new_cache(self) -> GpuSequence:
        """An empty sequence."""
        if not self._free_slots:
            raise RequestError(f"{self.limits.max_sequences} sequences are open: close one first")
        return GpuSequence(self._free_slots.pop())

    def close_cache(self, sequence: GpuSequence) -> None:
        """Give a sequence's slot and pages back."""
        self._free_slots.append(sequence.slot)
        self._free_pages += sequence.pages[::-1]
        sequence.pages = []

    def reserve(self, sequence: GpuSequence, length: int) -> None:
        """Pages for `length` positions; RequestError when there are not so many."""
        missing = -(-length // PAGE_TOKENS) - len(sequence.pages)
        if missing <= 0:
            return
        if missing > len(self._free_pages):
            raise RequestError(f"the KV cache has {self.limits.num_pages} pages of {PAGE_TOKENS} positions, all are taken")
        sequence.pages += [self._free_pages.pop() for _ in range(missing)]
        row = self._places["block_table"] + 4 * sequence.slot * self.limits.pages_per_sequence
        self._table_rows.send(sequence.pages, row, self.stream)

    def forward(self, ids: NDArray[np.int64], cache: GpuSequence, seq_len: int, last_only: bool) -> F32:
        """Logits float32 [num_tokens or 1, vocab_size] of tokens appended to the sequence in `cache`."""
        pieces = []
        for start in range(0, len(ids), self.limits.max_prefill_tokens):
            chunk = ids[start : start + self.limits.max_prefill_tokens]
            is_last = start + len(chunk) == len(ids)
            self.reserve(cache, cache.length + len(chunk))
            if len(chunk) == 1 and cache.length:
                pieces.append(self._decode_one(int(chunk[0]), cache))
            else:
                pieces += self._prefill_one(chunk, cache, [len(chunk) - 1] * is_last if last_only else range(len(chunk)))
            cache.length += len(chunk)
        return np.concatenate(pieces)

    def _decode_one(self, token: int, cache: GpuSequence) -> F32:
        self._table_rows.send([token], self._places["last_token"] + 4 * cache.slot, self.stream)
        self.decode_step(np.array([cache.length], np.int32), np.array([cache.slot], np.int32))
        return self._read_logits(1)

    def decode_step(self, positions: NDArray[np.int32], slots: NDArray[np.int32]) -> None:
        """Logits of the next token of every sequence from its slot's last token; arrays are int32 [batch]."""
        batch, workers = len(positions), split_workers(int(positions.max()) + 1)
        at = self._staging.send([positions, slots], self.stream)
        key = (batch, workers)
        if not self._use_graphs:
            self._enqueue(self.program.decode(batch, workers, DecodePass(*at)))
            return
        if key not in self._graphs:
            launches = self.program.decode(batch, workers, DecodePass(*at))
            self.stream.synchronize()
            with self.stream:
                self.stream.begin_capture()
                self._enqueue(launches)
                self._graphs[key] = self.stream.end_capture()
        self._graphs[key].launch(self.stream)

    def _prefill_one(self, ids: NDArray[np.int64], cache: GpuSequence, rows: Sequence[int]) -> list[F32]:
        count = len(ids)
        sequences = np.array([[cache.slot, 0, count, cache.length]], np.int32)
        items = self.program.prefill_attention.items(sequences, self.program.group, 0)
        positions = np.arange(cache.length, cache.length + count, dtype=np.int32)
        batch = self.limits.max_sequences
        first = np.array(rows[:batch], np.int32)
        fields = [ids.astype(np.int32), positions, np.full(count, cache.slot, np.int32), sequences, items, first]
        at = self._staging.send(fields, self.stream)
        self._enqueue(self.program.prefill(PrefillPass(count, len(items), len(first), *at)))
        found = [self._read_logits(len(first))] if len(first) else []
        for start in range(batch, len(rows), batch):
            some = np.array(rows[start : start + batch], np.int32)
            [address] = self._staging.send([some], self.stream)
            self._enqueue(self.program.head(len(some), address))
            found.append(self._read_logits(len(some)))
        return found

    def _enqueue(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            launch(self.stream.ptr)

    def _read_logits(self, count: int) -> F32:
        pitch = self.program.logits_pitch
        runtime = self._cupy.cuda.runtime
        runtime.memcpyAsync(
            self._logits.ptr, self._places["logits"], 4 * count * pitch, runtime.memcpyDeviceToHost, self.stream.ptr
        )
        self.stream.synchronize()
        found = np.frombuffer(self._logits, np.float32, count * pitch).reshape(count, pitch)
        return found[:, : self.config.vocab_size].copy()
