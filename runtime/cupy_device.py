"""CuPy and the GPU: whether they are there, what planning needs to know of them, and what a backend is planned for there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megalith.format.errors import RequestError, UnsupportedError
from megalith.format.index import Index
from megalith.format.reader import PackedFile

from .arena import FileSpan, plan_arena
from .gpu_buffers import Limits
from .gpu_program import can_use_wgmma

DEFAULT_PREFILL_TOKENS = 2048
KEPT_BYTES = 1 << 30  # of free device memory, for the driver and for others


@dataclass(frozen=True)
class DeviceFacts:
    """What planning and compiling need to know of a GPU."""

    name: str
    arch: str
    num_sms: int
    shared_limit: int


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


def longest_context(index: Index, wanted: int | None) -> int:
    """Positions that a sequence can have: the RoPE table's at most. RequestError where more are asked for."""
    limit = min(index.config.max_seq_len, index.rope_positions)
    if wanted is not None and wanted > limit:
        why = "of dynamic RoPE it has the table up to the original length alone, --backend numpy goes further"
        raise RequestError(
            f"max_seq_len {wanted}: the cupy backend runs up to {limit} positions of this file"
            + (f": {why}" if index.rope.type == "dynamic" else "")
        )
    return wanted or limit


def planned_limits(
    packed: PackedFile,
    facts: DeviceFacts,
    max_seq_len: int,
    max_sequences: int,
    max_prefill_tokens: int,
    batch_invariant: bool = False,
) -> Limits:
    """What a backend of these sizes is planned for, its number of pages still open."""
    seq_len = min(max_seq_len, packed.index.rope_positions)
    uses_wgmma = can_use_wgmma(facts.arch, packed.index.config)
    prefill_tokens = min(max_prefill_tokens, max_sequences * seq_len)  # chunks of several prompts go into one pass
    return Limits(max_sequences, seq_len, prefill_tokens, 0, facts.num_sms, facts.shared_limit, uses_wgmma, batch_invariant)


def kv_room(
    packed: PackedFile, max_seq_len: int, max_sequences: int, max_prefill_tokens: int, batch_invariant: bool = False
) -> int:
    """Bytes of device memory that weights and buffers leave for a KV cache."""
    cupy = import_cupy()
    limits = planned_limits(packed, device_facts(cupy), max_seq_len, max_sequences, max_prefill_tokens, batch_invariant)
    free, _ = cupy.cuda.runtime.memGetInfo()
    others = plan_arena(packed.index.config, FileSpan.of(packed.header), limits, None, 0).nbytes
    return max(0, int(free) - KEPT_BYTES - others)


def longest_prefill(limits: Limits) -> list[tuple[int, int, int, int]]:
    """(slot, first row, tokens, 0) of sequences that fill the largest prefill; one alone may be too short for it."""
    count, most = limits.max_prefill_tokens, limits.max_seq_len
    return [(slot, first, min(most, count - first), 0) for slot, first in enumerate(range(0, count, most))]
