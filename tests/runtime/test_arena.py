"""The arena's plan: regions in order and apart, as many KV pages as asked for or as fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megalith.format.errors import RequestError
from megalith.format.reader import PackedFile
from megalith.runtime.arena import FileSpan, plan_arena
from megalith.runtime.cupy_device import DeviceFacts, longest_prefill, planned_limits
from megalith.runtime.gpu_buffers import Limits, device_buffers, page_bytes

LIMITS = Limits(
    max_sequences=3, max_seq_len=100, max_prefill_tokens=48, num_pages=0, num_sms=132, shared_limit=228 << 10, has_wgmma=True,
)  # fmt: skip


def test_a_prefill_may_hold_chunks_of_several_prompts(packed_llama: Path) -> None:
    facts = DeviceFacts("a GPU", "sm_90a", 132, 228 << 10)
    with PackedFile(packed_llama) as packed:
        assert planned_limits(packed, facts, 100, 8, 512).max_prefill_tokens == 512
        assert planned_limits(packed, facts, 100, 1, 512).max_prefill_tokens == 100
        assert longest_prefill(planned_limits(packed, facts, 100, 8, 250)) == [
            (0, 0, 100, 0),
            (1, 100, 100, 0),
            (2, 200, 50, 0),
        ]
        assert longest_prefill(planned_limits(packed, facts, 100, 1, 512)) == [(0, 0, 100, 0)]


def test_regions_follow_each_other_and_hold_what_the_backend_asks_for(packed_llama: Path) -> None:
    with PackedFile(packed_llama) as packed:
        config, span = packed.index.config, FileSpan.of(packed.header)
        image = packed.header.section("image")
    plan = plan_arena(config, span, LIMITS, None)
    assert plan.limits == replace(LIMITS, num_pages=2 * 3)
    wanted = {buffer.name: buffer.nbytes for buffer in device_buffers(config, plan.limits)}
    assert {region.name: region.nbytes for region in plan.regions[2:]} == wanted
    assert (plan.regions[0].offset, plan.regions[0].nbytes) == (0, image.nbytes)
    assert span.nbytes == plan.regions[1].end
    end = 0
    for region in plan.regions:
        assert region.offset >= end
        assert region.offset % region.alignment == 0
        end = region.end
    assert plan.nbytes >= end
    assert plan.addresses(1 << 40)["x"] == (1 << 40) + plan.offset("x")


def test_pages_by_number_and_by_memory(packed_llama: Path) -> None:
    with PackedFile(packed_llama) as packed:
        config, span = packed.index.config, FileSpan.of(packed.header)
    each = page_bytes(config)
    exact = plan_arena(config, span, LIMITS, None, num_pages=17)
    assert exact.limits.num_pages == 17
    assert plan_arena(config, span, LIMITS, exact.nbytes) == exact
    assert plan_arena(config, span, LIMITS, exact.nbytes - 1).limits.num_pages == 16
    assert plan_arena(config, span, LIMITS, exact.nbytes + each, num_pages=17) == exact
    with pytest.raises(RequestError, match=f"17 pages of KV cache {17 * each} more"):
        plan_arena(config, span, LIMITS, exact.nbytes - 1, num_pages=17)
    least = plan_arena(config, span, LIMITS, None, num_pages=2)  # one sequence of 100 positions
    assert plan_arena(config, span, LIMITS, least.nbytes) == least
    with pytest.raises(RequestError, match="context 100"):
        plan_arena(config, span, LIMITS, least.nbytes - 1)
