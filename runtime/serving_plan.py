"""How much a server will hold, worked out from a packed file's index before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from megalith.format.errors import RequestError
from megalith.format.reader import PackedFile

from .executor import PAGE_SIZE
from .messages import EngineSettings
from .numpy_executor import page_bytes
from .weights import default_cache_bytes

DEFAULT_SEQUENCES = 64
DEFAULT_BATCH_TOKENS = 512
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
        }


def serving_plan(
    packed: PackedFile,
    backend: str,
    *,
    max_seq_len: int | None = None,
    max_sequences: int = DEFAULT_SEQUENCES,
    kv_bytes: int | None = None,
    max_batch_tokens: int = DEFAULT_BATCH_TOKENS,
    step_seconds: float = 0.0,
) -> ServingPlan:
    """The plan for a file; RequestError where the limits contradict each other or the memory does not suffice."""
    index = packed.index
    limit = index.config.max_seq_len
    if max_seq_len is not None and not 1 <= max_seq_len <= limit:
        raise RequestError(f"max_seq_len {max_seq_len}: the file is for 1 to {limit} positions")
    if max_batch_tokens <= max_sequences:
        raise RequestError(f"max_batch_tokens {max_batch_tokens}: must be more than the {max_sequences} sequences")
    backend = "numpy" if backend == "auto" else backend
    each = 0 if backend == "echo" else page_bytes(index.config)
    elements = sum(blob.rows * blob.columns for blob in map(index.blob, range(len(index.blobs))))
    weights = 0 if backend == "echo" else 4 * elements
    full = max_sequences * -(-(max_seq_len or limit) // PAGE_SIZE)
    pages = min(full, _MOST_PAGES)
    if each:
        free = 2 * default_cache_bytes()
        room = kv_bytes if kv_bytes is not None else int(_CACHE_SHARE * max(0, free - weights))
        pages = min(pages, room // each)
    if pages < 1:
        raise RequestError(f"the KV cache has no room for one page of {each} bytes")
    seq_len = min(max_seq_len or limit, pages * PAGE_SIZE)
    if max_seq_len is not None and seq_len < max_seq_len:
        raise RequestError(f"max_seq_len {max_seq_len}: the KV cache of {pages} pages holds {seq_len} positions")
    settings = EngineSettings(str(packed.path), backend, seq_len, max_sequences, pages, max_batch_tokens, step_seconds)
    return ServingPlan(settings, weights, each)
