"""Builds of every kernel, with the defines that stand for all it is used with: what the compile test compiles.

A kernel's author adds its lines here; a `.cu` file without any fails the test.
"""

from __future__ import annotations

from collections.abc import Iterator

from .attention_plan import decode_attention
from .compile import Build
from .gemm_plan import GemmShape

Defines = dict[str, int | str]

ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
SHARED_LIMIT_BYTES = dict(zip(ARCHITECTURES, (164 << 10, 100 << 10, 228 << 10, 228 << 10, 100 << 10), strict=True))


def builds(arch: str) -> list[Build]:
    """Representative builds for one architecture.

    Choose the extremes (most registers, most shared memory, each codec, each dtype), not the product of all choices:
    all of them for all architectures compile in about two minutes on two cores.
    """
    return [*_linear(arch), *_gemm(arch), *_vectors(arch), *_attention(arch)]


def _linear(arch: str) -> Iterator[Build]:
    for element, mxfp4, epilogue, tiles, chunks in (
        ("ELEMENT_BF16", 0, 0, 1, 2),
        ("ELEMENT_BF16", 0, 2, 4, 2),
        ("ELEMENT_F16", 0, 1, 2, 2),
        ("ELEMENT_BF16", 1, 0, 1, 2),
        ("ELEMENT_BF16", 1, 2, 2, 2),
        ("ELEMENT_BF16", 1, 2, 4, 2),
    ):
        shape: Defines = {"EPILOGUE": epilogue, "TOKEN_TILES": tiles, "RING_CHUNKS": chunks, "CODEC_MXFP4": mxfp4}
        yield Build.of("linear", arch, **{element: 1}, Y_TILED=0, Y_LANE_COLUMNS=8, BIAS_F32=0, **shape)


def _gemm(arch: str) -> Iterator[Build]:
    if arch != "sm_90a":
        return
    tiles, mxfp4 = "tile16x512", "mxfp4"
    for shape in (
        GemmShape(tiles, 0, 256, 2),
        GemmShape(tiles, 1, 256, 2),
        GemmShape(tiles, 2, 256, 2),
        GemmShape(tiles, 1, 176, 3, aligned=64),
        GemmShape(tiles, 2, 192, 3, aligned=128),
        GemmShape(tiles, 1, 256, 1),
        GemmShape(tiles, 1, 256, 2, aligned=128, parts=2),
        GemmShape(tiles, 1, 192, 3, aligned=128, parts=3),
        GemmShape(tiles, 0, 64, 1),
        GemmShape(tiles, 1, 80, 1, aligned=128),
        GemmShape(mxfp4, 1, 256, 2),
        GemmShape(mxfp4, 2, 192, 3),
        GemmShape(tiles, 1, 16, 1, split=True, aligned=128),
        GemmShape(mxfp4, 1, 64, 1),
        GemmShape(mxfp4, 2, 32, 1, split=True),
    ):
        yield Build.of("gemm_wgmma", arch, **shape.defines(), ELEMENT_BF16=1, Y_LANE_COLUMNS=8, BIAS_F32=0, Y_SCALAR=0)
    small = GemmShape(tiles, 1, 64, 1, split=True)
    yield Build.of("gemm_wgmma", arch, **small.defines(), ELEMENT_F16=1, Y_LANE_COLUMNS=8, BIAS_F32=1, Y_SCALAR=1)
    for shape, norm, element in (
        (GemmShape(tiles, 3, 256, 2, head_dim=128, aligned=128), 1, "ELEMENT_BF16"),
        (GemmShape(tiles, 3, 112, 2, head_dim=128, aligned=128), 1, "ELEMENT_BF16"),
        (GemmShape(tiles, 3, 144, 3, head_dim=64, aligned=128), 1, "ELEMENT_BF16"),
        (GemmShape(tiles, 3, 192, 3, head_dim=64), 0, "ELEMENT_F16"),
        (GemmShape(tiles, 3, 256, 1, head_dim=64), 1, "ELEMENT_BF16"),
        (GemmShape(mxfp4, 3, 224, 2, head_dim=128), 1, "ELEMENT_BF16"),
    ):
        heads: Defines = {"HEAD_DIM": shape.head_dim, "QK_NORM": norm, "NORM_F32": 0, "BIAS_F32": 0}
        yield Build.of("gemm_wgmma", arch, **shape.defines(), **{element: 1}, Y_LANE_COLUMNS=8, Y_SCALAR=0, **heads)
    gates = GemmShape(mxfp4, 2, 96, 2)
    yield Build.of("gemm_wgmma", arch, **gates.defines(), ELEMENT_BF16=1, Y_LANE_COLUMNS=32, BIAS_F32=1, Y_SCALAR=0)


def _vectors(arch: str) -> Iterator[Build]:
    yield Build.of("embedding", arch, ELEMENT_BF16=1)
    yield Build.of("embedding", arch, ELEMENT_F16=1)
    yield Build.of("sampling", arch)
    for element, lane_columns, source, target in (("ELEMENT_BF16", 8, 1, 0), ("ELEMENT_F16", 32, 1, 1)):
        defines: Defines = {element: 1, "LANE_COLUMNS": lane_columns, "SOURCE_TILED": source, "TARGET_TILED": target}
        yield Build.of("take_rows", arch, **defines)
    for hidden_size, tiled, lane_columns in ((2560, 0, 8), (8192, 1, 8), (2880, 0, 32)):
        layout: Defines = {"ACTIVATION_TILED": tiled, "LANE_COLUMNS": lane_columns}
        yield Build.of("rmsnorm", arch, ELEMENT_BF16=1, HIDDEN_SIZE=hidden_size, WEIGHT_F32=0, **layout)


def _attention(arch: str) -> Iterator[Build]:
    for head_dim, norm, group, sinks in (
        (64, 0, 8, 1),
        (80, 0, 1, 0),
        (128, 1, 4, 0),
        (128, 2, 1, 0),
        (192, 0, 2, 0),
        (256, 0, 16, 0),
    ):
        heads: Defines = {"ELEMENT_BF16": 1, "HEAD_DIM": head_dim, "QK_NORM": norm, "NORM_F32": 0}
        yield Build.of("qkv_post", arch, **heads)
        launch = decode_attention(head_dim, group, 1, SHARED_LIMIT_BYTES[arch], 132)
        more: Defines = {"HAS_SINKS": sinks, "ACTIVATION_TILED": 0, "ACTIVATION_LANE_COLUMNS": 8, "EARLY_READS": 1}
        yield Build.of("attention_decode", arch, **{**heads, **launch.defines(), **more}, SINKS_F32=0)
    output: Defines = {"ELEMENT_BF16": 1, "Y_TILED": 1, "Y_LANE_COLUMNS": 8, "SINKS_F32": 0}
    for head_dim in (64, 80, 128, 256):
        yield Build.of("attention_prefill", arch, HEAD_DIM=head_dim, **output)
    if arch == "sm_90a":
        half: Defines = {"ELEMENT_F16": 1, "Y_TILED": 0, "Y_LANE_COLUMNS": 32, "SINKS_F32": 1}
        for head_dim, rows, threads, shared in ((64, 192, 512, 181472), (128, 128, 384, 197792)):
            plan: Defines = {"HEAD_DIM": head_dim, "PLAN_ROWS": rows, "PLAN_THREADS": threads, "PLAN_SHARED_BYTES": shared}
            for variant in (output, half):
                yield Build.of("attention_prefill_wgmma", arch, **plan, **variant)
