"""How much a server will hold, worked out from a packed file's index before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from megalith.format.errors import RequestError
from megalith.format.reader import PackedFile

from .executor import PAGE_SIZE
from .messages import EngineSettings
from .numpy_executor import page_bytes
from .scheduler import PREFILL_CHUNK
from .weights import default_cache_bytes

DEFAULT_SEQUENCES = 64
DEFAULT_BATCH_TOKENS = 512
DEFAULT_GPU_BATCH_TOKENS = 2048
DEFAULT_PASS_SECONDS = 600.0  # NumPy may take minutes for a large model's prompts
DEFAULT_GPU_PASS_SECONDS = 60.0  # far more than any pass: kernels are made before
_CACHE_SHARE = 0.5  # of the memory that is left beside the weights
_MOST_PAGES = 1 << 20


@dataclass(frozen=True)
class ServingPlan:
    """Memory in bytes and the engine's settings."""

    settings: EngineSettings
    weight_bytes: int
    page_bytes: int

    @property
    def kv_bytes(self) -> int:
        return self.page_bytes * self.settings.num_pages

    def to_dict(self) -> dict[str, object]:
        settings = self.settings
        return {
            "backend": settings.backend,
            "weight_bytes": self.weight_bytes,
            "kv_cache_bytes": self.kv_bytes,
            "kv_pages": settings.num_pages,
            "kv_page_positions": PAGE_SIZE,
            "kv_page_bytes": self.page_bytes,
            "max_seq_len": settings.max_seq_len,
            "max_sequences": settings.max_sequences,
            "max_batch_tokens": settings.max_batch_tokens,
            "prefill_chunk": settings.prefill_chunk,
            "pass_timeout": settings.pass_timeout,
            "batch_invariant": settings.batch_invariant,
        }


@dataclass(frozen=True)
class _Memory:
    """Bytes of the weights, of a page, and of what a KV cache may take."""

    weight_bytes: int
    page_bytes: int
    kv_room: int


def _resolved(backend: str) -> str:
    """ "auto" takes CuPy where CuPy and a device are there."""
    if backend != "auto":
        return backend
    from .cupy_device import has_device

    return "cupy" if has_device() else "numpy"


def _memory(
    packed: PackedFile, backend: str, max_seq_len: int, max_sequences: int, max_batch_tokens: int, batch_invariant: bool
) -> _Memory:
    index = packed.index
    if backend == "echo":
        return _Memory(0, 0, 0)
    if backend == "cupy":
        from .arena import FileSpan
        from .cupy_device import kv_room
        from .gpu_buffers import page_bytes as gpu_page_bytes

        room = kv_room(packed, max_seq_len, max_sequences, max_batch_tokens, batch_invariant)
        return _Memory(FileSpan.of(packed.header).nbytes, gpu_page_bytes(index.config), room)
    weights = 4 * sum(blob.rows * blob.columns for blob in map(index.blob, range(len(index.blobs))))
    room = int(_CACHE_SHARE * max(0, 2 * default_cache_bytes() - weights))
    return _Memory(weights, page_bytes(index.config), room)


def serving_plan(
    packed: PackedFile,
    backend: str,
    *,
    max_seq_len: int | None = None,
    max_sequences: int = DEFAULT_SEQUENCES,
    kv_bytes: int | None = None,
    max_batch_tokens: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    pass_timeout: float | None = None,
    step_seconds: float = 0.0,
    use_graphs: bool = True,
    batch_invariant: bool = False,
) -> ServingPlan:
    """The plan for a file; RequestError where the limits contradict each other or the memory does not suffice."""
    index = packed.index
    limit = index.config.max_seq_len
    if max_seq_len is not None and not 1 <= max_seq_len <= limit:
        raise RequestError(f"max_seq_len {max_seq_len}: the file is for 1 to {limit} positions")
    backend = _resolved(backend)
    if max_batch_tokens is None:
        max_batch_tokens = DEFAULT_GPU_BATCH_TOKENS if backend == "cupy" else DEFAULT_BATCH_TOKENS
    if pass_timeout is None:
        pass_timeout = DEFAULT_GPU_PASS_SECONDS if backend == "cupy" else DEFAULT_PASS_SECONDS
    if max_batch_tokens <= max_sequences:
        raise RequestError(f"max_batch_tokens {max_batch_tokens}: must be more than the {max_sequences} sequences")
    if backend == "cupy":
        from .cupy_device import longest_context

        limit = longest_context(index, max_seq_len)
    memory = _memory(packed, backend, max_seq_len or limit, max_sequences, max_batch_tokens, batch_invariant)
    each, weights = memory.page_bytes, memory.weight_bytes
    full = max_sequences * -(-(max_seq_len or limit) // PAGE_SIZE)
    pages = min(full, _MOST_PAGES)
    if each:
        pages = min(pages, (memory.kv_room if kv_bytes is None else kv_bytes) // each)
    if pages < 1:
        raise RequestError(f"the KV cache has no room for one page of {each} bytes")
    seq_len = min(max_seq_len or limit, pages * PAGE_SIZE)
    if max_seq_len is not None and seq_len < max_seq_len:
        raise RequestError(f"max_seq_len {max_seq_len}: the KV cache of {pages} pages holds {seq_len} positions")
    settings = EngineSettings(
        str(packed.path),
        backend,
        seq_len,
        max_sequences,
        pages,
        max_batch_tokens,
        prefill_chunk,
        pass_timeout,
        step_seconds,
        use_graphs,
        batch_invariant,
    )
    return ServingPlan(settings, weights, each)
