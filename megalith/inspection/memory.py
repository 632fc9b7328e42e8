"""The device memory that running a packed file takes: the plan of the runtime's arena, without a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalith.format.constants import BLOB_ALIGNMENT
from megalith.format.errors import RequestError
from megalith.format.experts import ExpertIndex
from megalith.format.model import ModelConfig
from megalith.format.reader import PackedFile
from megalith.output import human_bytes
from megalith.runtime.arena import ArenaPlan, FileSpan, plan_arena
from megalith.runtime.cupy_device import DEFAULT_PREFILL_TOKENS
from megalith.runtime.gpu_buffers import PAGE_TOKENS, Limits, page_bytes

Entries = list[dict[str, Any]]

# where there is no GPU to ask: one H100 or H200
DEVICE = {"num_sms": 132, "shared_memory_bytes": 228 << 10, "has_wgmma": True}


def arena_plan(packed: PackedFile, context: int, batch: int, memory_bytes: int | None) -> ArenaPlan:
    """The runtime's own plan for `DEVICE`: pages for `batch` whole contexts, or all that `memory_bytes` leave room for."""
    limits = Limits(
        max_sequences=batch, max_seq_len=context, max_prefill_tokens=min(DEFAULT_PREFILL_TOKENS, batch * context), num_pages=0,
        num_sms=int(DEVICE["num_sms"]), shared_limit=int(DEVICE["shared_memory_bytes"]), has_wgmma=bool(DEVICE["has_wgmma"]),
    )  # fmt: skip
    return plan_arena(packed.index.config, FileSpan.of(packed.header), limits, memory_bytes)


def _sequences(batch: int) -> str:
    return f"{batch} sequence{'s' if batch > 1 else ''}"


def _pages_of_window(window: int) -> int:
    """Most pages that a window touches, wherever it begins."""
    return -(-(window - 1) // PAGE_TOKENS) + 1


def alternatives(config: ModelConfig, index: ExpertIndex | None, image_bytes: int, context: int, batch: int) -> Entries:
    """Entries that could stand for those of the same names: windowed layers that keep no more than their window, and of the
    experts only as many as one decode step uses at most in every layer, the largest.
    """
    found: Entries = []
    most = -(-context // PAGE_TOKENS)
    kept = [min(_pages_of_window(window), most) if window else most for window in config.layer_windows]
    if min(kept) < most:
        each = page_bytes(config) // config.num_hidden_layers
        found.append(
            {
                "name": "kv_cache",
                "bytes": each * sum(kept) * batch,
                "formula": f"if windowed layers kept their window only: {sum(kept)} pages of one layer x {each}, "
                f"{kept.count(most)} of {len(kept)} layers whole, x {_sequences(batch)}",
            }
        )
    count = config.num_experts_per_tok * batch  # of a layer's experts at most, in one decode step
    if index is not None and count < index.num_experts:
        sizes = _expert_bytes(index)
        chosen = int(np.sort(sizes, axis=1)[:, -count:].sum())
        rest = image_bytes - int(sizes.sum())
        found.append(
            {
                "name": "weights",
                "bytes": rest + chosen,
                "formula": f"if of each layer's {index.num_experts} experts only {count} were resident, what one step of "
                f"{_sequences(batch)} uses: {chosen:,} of {len(sizes) * count:,} experts + {rest:,} of all else",
            }
        )
    return found


def _expert_bytes(index: ExpertIndex) -> NDArray[np.int64]:
    """[num_sparse_layers, num_experts] bytes of the device image, padding included."""
    nbytes = index.table[..., 1].astype(np.int64)
    sizes: NDArray[np.int64] = (-(-nbytes // BLOB_ALIGNMENT) * BLOB_ALIGNMENT).sum(axis=2)
    return sizes


def memory(packed: PackedFile, context: int | None, batch: int, memory_bytes: int | None = None) -> dict[str, Any]:
    """JSON-ready plan; `context` defaults to the longest that the file is for."""
    config, experts = packed.index.config, packed.index.experts
    positions = config.max_seq_len if context is None else context
    if positions > config.max_seq_len:
        raise RequestError(f"--context {positions}: the file is for at most {config.max_seq_len} positions")
    plan = arena_plan(packed, positions, batch, memory_bytes)
    return {
        "context": positions,
        "batch": batch,
        "prefill_tokens": plan.limits.max_prefill_tokens,
        "gpu_memory_bytes": memory_bytes,
        "device": DEVICE,
        "num_pages": plan.limits.num_pages,
        "page_tokens": PAGE_TOKENS,
        "plan": [
            {"name": r.name, "offset": r.offset, "bytes": r.nbytes, "alignment": r.alignment, "formula": r.formula}
            for r in plan.regions
        ],
        "total_bytes": plan.nbytes,
        "experts": None if experts is None else _experts(experts, config),
        "alternatives": alternatives(config, experts, packed.header.section("image").nbytes, positions, batch),
    }


def _experts(index: ExpertIndex, config: ModelConfig) -> dict[str, int]:
    sizes = _expert_bytes(index)
    return {
        "num_layers": len(sizes),
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "smallest_expert_bytes": int(sizes.min()),
        "largest_expert_bytes": int(sizes.max()),
        "bytes": int(sizes.sum()),
    }


def memory_text(data: dict[str, Any]) -> list[str]:
    """One line per region, the total, the experts' part of it, and what other choices would take."""
    device, pages = data["device"], data["num_pages"]
    lines = [
        f"device memory for {data['batch']} x {data['context']} positions, every expert and every position kept, prefill of "
        f"{data['prefill_tokens']} tokens at a time, on a GPU of {device['num_sms']} multiprocessors",
        f"  {'region':<18} {'offset':>18} {'bytes':>18}",
    ]
    lines += [_entry_text(entry) for entry in data["plan"]]
    total, experts = data["total_bytes"], data["experts"]
    lines.append(f"  {'total':<18} {'':>18} {total:>18,}  one allocation ({human_bytes(total)})")
    lines.append(f"the KV cache holds {pages * data['page_tokens']:,} positions in {pages:,} pages")
    if experts:
        small, large = experts["smallest_expert_bytes"], experts["largest_expert_bytes"]
        each = f"{small:,}" if small == large else f"{small:,} to {large:,}"
        lines.append(
            f"experts, within the weights: {experts['bytes']:,} bytes in {experts['num_layers']} layers x "
            f"{experts['num_experts']} experts x {each} bytes; a token uses {experts['num_experts_per_tok']} per layer; "
            "their activations are not in the plan yet"
        )
    if data["alternatives"]:
        lines += ["less is needed, in place of the above", *map(_entry_text, data["alternatives"])]
    return lines


def _entry_text(entry: dict[str, Any]) -> str:
    offset = f"{entry['offset']:,}" if "offset" in entry else ""
    return f"  {entry['name']:<18} {offset:>18} {entry['bytes']:>18,}  {entry['formula']}"
