"""The memory that running a packed file takes, computed without a GPU."""

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

Plan = list[dict[str, Any]]


def memory_plan(config: ModelConfig, image_bytes: int, rope_bytes: int, context: int, batch: int) -> Plan:
    """Entries of name, bytes and the formula that gives them; KV cache and activations hold 16-bit elements.

    Every layer keeps `context` positions, one with a sliding window too. Activations are those of one decode step.
    """
    sequences = _sequences(batch)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    qkv_rows = config.q_rows + 2 * config.kv_rows
    inner, inner_text = _widest_mlp(config)
    widest = 2 * hidden + qkv_rows + config.q_rows + 2 * inner + config.num_experts
    router = f" + router {config.num_experts}" if config.num_experts else ""
    return [
        {"name": "weights", "bytes": image_bytes, "formula": "device image, as in the file"},
        {"name": "rope", "bytes": rope_bytes, "formula": "RoPE section, as in the file"},
        {
            "name": "kv_cache",
            "bytes": 2 * layers * config.kv_rows * 2 * context * batch,
            "formula": f"2 (K, V) x {layers} layers x {config.num_key_value_heads} heads x {config.head_dim} x 2 bytes "
            f"x {context} positions x {sequences}",
        },
        {
            "name": "activations",
            "bytes": widest * 2 * batch,
            "formula": f"(2 x hidden {hidden} + qkv {qkv_rows} + attention {config.q_rows} + 2 x {inner_text}{router}) "
            f"x 2 bytes x {sequences}",
        },
        {
            "name": "logits",
            "bytes": config.vocab_size * 4 * batch,
            "formula": f"{config.vocab_size} x 4 bytes x {sequences}",
        },
    ]


def _sequences(batch: int) -> str:
    return f"{batch} sequence{'s' if batch > 1 else ''}"


def _widest_mlp(config: ModelConfig) -> tuple[int, str]:
    """Intermediate elements of one token in the layer that has most, and the words for them."""
    dense = 0 if all(config.sparse_layers) else config.intermediate_size
    chosen = config.num_experts_per_tok * config.moe_intermediate_size
    if chosen > dense:
        return chosen, f"{config.num_experts_per_tok} experts x intermediate {config.moe_intermediate_size}"
    return dense, f"intermediate {dense}"


def alternatives(config: ModelConfig, index: ExpertIndex | None, image_bytes: int, context: int, batch: int) -> Plan:
    """Entries that could stand for those of the same names: windowed layers that keep no more than their window, and of the
    experts only as many as one decode step uses at most in every layer, the largest.
    """
    found: Plan = []
    kept = [min(window or context, context) for window in config.layer_windows]
    if min(kept) < context:
        full = sum(positions == context for positions in kept)
        found.append(
            {
                "name": "kv_cache",
                "bytes": 2 * config.kv_rows * 2 * sum(kept) * batch,
                "formula": f"if windowed layers kept their window only: 2 (K, V) x {config.num_key_value_heads} heads x "
                f"{config.head_dim} x 2 bytes x {sum(kept)} positions in all layers, {full} of them whole, "
                f"x {_sequences(batch)}",
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


def memory(packed: PackedFile, context: int | None, batch: int) -> dict[str, Any]:
    """JSON-ready plan; `context` defaults to the longest that the file is for."""
    config, experts = packed.index.config, packed.index.experts
    positions = config.max_seq_len if context is None else context
    if positions > config.max_seq_len:
        raise RequestError(f"--context {positions}: the file is for at most {config.max_seq_len} positions")
    sections = {section.kind: section.nbytes for section in packed.header.sections}
    plan = memory_plan(config, sections["image"], sections["rope"], positions, batch)
    return {
        "context": positions,
        "batch": batch,
        "plan": plan,
        "total_bytes": sum(entry["bytes"] for entry in plan),
        "experts": None if experts is None else _experts(experts, config),
        "alternatives": alternatives(config, experts, sections["image"], positions, batch),
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
    """One line per entry, the total, the experts' part of it, and what other choices would take."""
    lines = [f"device memory for {data['batch']} x {data['context']} positions, every expert and every position kept"]
    lines += [_entry_text(entry) for entry in data["plan"]]
    total, experts = data["total_bytes"], data["experts"]
    lines.append(f"  {'total':<12} {total:>18,}  bytes ({human_bytes(total)})")
    if experts:
        small, large = experts["smallest_expert_bytes"], experts["largest_expert_bytes"]
        each = f"{small:,}" if small == large else f"{small:,} to {large:,}"
        lines.append(
            f"experts, within the weights: {experts['bytes']:,} bytes in {experts['num_layers']} layers x "
            f"{experts['num_experts']} experts x {each} bytes; a token uses {experts['num_experts_per_tok']} per layer"
        )
    if data["alternatives"]:
        lines += ["less is needed, in place of the above", *map(_entry_text, data["alternatives"])]
    return lines


def _entry_text(entry: dict[str, Any]) -> str:
    return f"  {entry['name']:<12} {entry['bytes']:>18,}  {entry['formula']}"
