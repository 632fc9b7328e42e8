"""The plan of the one device allocation: where the file's image and RoPE section and every buffer lie, before there is a GPU.

The file's bytes from the start of the image to the end of the RoPE section come first, as they lie in the file, so that one
copy brings them; the buffers of `gpu_buffers` follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megalith.format.constants import SECTION_ALIGNMENT
from megalith.format.errors import RequestError
from megalith.format.header import Header
from megalith.format.model import ModelConfig
from megalith.format.tiles import padded

from .gpu_buffers import ALIGNMENT, Buffer, Limits, device_buffers, page_bytes


@dataclass(frozen=True)
class FileSpan:
    """What of the file goes to the device: image and RoPE section with what lies between."""

    offset: int  # of the image, in the file
    image_bytes: int
    rope_offset: int  # from `offset`
    rope_bytes: int

    @property
    def nbytes(self) -> int:
        return self.rope_offset + self.rope_bytes

    @classmethod
    def of(cls, header: Header) -> FileSpan:
        image, rope = header.section("image"), header.section("rope")
        return cls(image.offset, image.nbytes, rope.offset - image.offset, rope.nbytes)


@dataclass(frozen=True)
class Region:
    """A named range of the arena, and the formula that gives its bytes."""

    name: str
    offset: int
    nbytes: int
    alignment: int
    formula: str

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class ArenaPlan:
    """Regions in order of their offsets; `limits` has the number of KV pages that the plan came to."""

    regions: tuple[Region, ...]
    limits: Limits
    nbytes: int

    def offset(self, name: str) -> int:
        """Of a region, from the start of the arena."""
        return next(region.offset for region in self.regions if region.name == name)

    def addresses(self, base: int) -> dict[str, int]:
        """Device address of every region for an arena at `base`."""
        return {region.name: base + region.offset for region in self.regions}


def plan_arena(
    config: ModelConfig, span: FileSpan, limits: Limits, memory_bytes: int | None, num_pages: int | None = None
) -> ArenaPlan:
    """The plan for `num_pages` KV pages, or for all that `memory_bytes` of device memory leave room for.

    `limits.num_pages` is not looked at. With neither number every sequence gets the pages of its whole context. Raises
    RequestError when it does not fit, or when not even one sequence of `max_seq_len` positions has room.
    """
    wanted = limits.pages_per_sequence * limits.max_sequences if num_pages is None and memory_bytes is None else num_pages
    empty = _place(span, device_buffers(config, replace(limits, num_pages=0)), limits)
    if memory_bytes is None:
        assert wanted is not None
        return _with_pages(config, span, limits, wanted)
    each = page_bytes(config)
    fitting = (memory_bytes - empty.nbytes) // each
    least = limits.pages_per_sequence if wanted is None else wanted
    if fitting < least:
        raise RequestError(
            f"{memory_bytes} bytes of device memory: weights and buffers need {empty.nbytes}, {least} pages of KV cache "
            f"{least * each} more ({limits.max_sequences} sequences, context {limits.max_seq_len})"
        )
    return _with_pages(config, span, limits, fitting if wanted is None else wanted)


def _with_pages(config: ModelConfig, span: FileSpan, limits: Limits, num_pages: int) -> ArenaPlan:
    final = replace(limits, num_pages=num_pages)
    return _place(span, device_buffers(config, final), final)


def _place(span: FileSpan, buffers: Sequence[Buffer], limits: Limits) -> ArenaPlan:
    regions = [
        Region("weights", 0, span.image_bytes, SECTION_ALIGNMENT, "device image, as in the file"),
        Region("rope", span.rope_offset, span.rope_bytes, SECTION_ALIGNMENT, "RoPE section, as in the file"),
    ]
    for buffer in buffers:
        regions.append(Region(buffer.name, padded(regions[-1].end, ALIGNMENT), buffer.nbytes, ALIGNMENT, buffer.formula))
    return ArenaPlan(tuple(regions), limits, padded(regions[-1].end, ALIGNMENT))
