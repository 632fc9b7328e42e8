// Weight codecs: how a step of a page becomes A fragments of mma.m16n8k16 (specs/format.md, "Tile layout 2" and "3").
// A step is 16 rows; lane 4g + t owns a piece of row g and one of row g + 8.
#pragma once
#include "element.cuh"

#if CODEC_MXFP4
#if !ELEMENT_BF16
#error "MXFP4 weights go with BF16 activations: FP16 does not hold every scale"
#endif
constexpr int LANE_COLUMNS = 32;   // columns of a lane's piece
constexpr int STEP_BYTES = 1088;   // codes [16][4][16 bytes], then scales [16][4]
#else
constexpr int LANE_COLUMNS = 8;
constexpr int STEP_BYTES = 1024;   // elements [16][32]
#endif
constexpr int STEP_COLUMNS = 4 * LANE_COLUMNS;
constexpr int STEP_PRODUCTS = LANE_COLUMNS / 4;  // m16n8k16 instructions a step feeds
constexpr int PIECES = LANE_COLUMNS / 8;         // 16-byte pieces of activations a lane needs for a step and token

// A lane's part of one step, as loaded from shared memory.
struct StepFragment {
    uint4 low, high;  // row g and row g + 8
#if CODEC_MXFP4
    u32 low_scale, high_scale;  // 2^(s - 127) twice, as BF16 pairs
#endif
};

#if CODEC_MXFP4
// 2^(s - 127) in both halves; exact in BF16, subnormal for s = 0. s = 255 is NaN.
DEVICE u32 scale_pair(u32 s) {
    const u32 half = s == 0 ? 0x0040u : s << 7;
    const u32 value = s == 255 ? 0x7fc0u : half;
    return value | value << 16;
}

// Two codes of one byte (low nibble first) times a scale: BF16 pair, exact. The code's exponent and mantissa bits, put
// into BF16's lowest exponent bits, are the value times 2^-126.
DEVICE u32 decode_byte(u32 byte, u32 scale) {
    const u32 bits = (byte & 0x07u) << 6 | (byte & 0x08u) << 12 | (byte & 0x70u) << 18 | (byte & 0x80u) << 24;
    return multiply_bf16x2(multiply_bf16x2(bits, 0x7e807e80u), scale);  // 0x7e80 is 2^126
}
#endif

DEVICE StepFragment load_step(const u8* step, int lane) {
    StepFragment f;
    f.low = *reinterpret_cast<const uint4*>(step + lane * 16);
    f.high = *reinterpret_cast<const uint4*>(step + 512 + lane * 16);
#if CODEC_MXFP4
    f.low_scale = scale_pair(step[1024 + lane]);
    f.high_scale = scale_pair(step[1056 + lane]);
#endif
    return f;
}

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// A registers of instruction q (a compile-time constant in unrolled loops): rows g, g + 8, g, g + 8.
DEVICE void a_fragment(u32 (&a)[4], const StepFragment& f, int q) {
#if CODEC_MXFP4
    const int shift = q % 2 * 16;  // bytes 2q and 2q + 1 of 16
    const u32 low = word(f.low, q / 2) >> shift, high = word(f.high, q / 2) >> shift;
    a[0] = decode_byte(low & 0xff, f.low_scale);
    a[1] = decode_byte(high & 0xff, f.high_scale);
    a[2] = decode_byte(low >> 8 & 0xff, f.low_scale);
    a[3] = decode_byte(high >> 8 & 0xff, f.high_scale);
#else
    a[0] = word(f.low, 2 * q);
    a[1] = word(f.high, 2 * q);
    a[2] = word(f.low, 2 * q + 1);
    a[3] = word(f.high, 2 * q + 1);
#endif
}
