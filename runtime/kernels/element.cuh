// The model's 16-bit element: BF16 or FP16, one per build. Storage is u16; conversions round to nearest even.
#pragma once
#include "ptx.cuh"

#if ELEMENT_BF16 + ELEMENT_F16 != 1
#error "define exactly one of ELEMENT_BF16 and ELEMENT_F16"
#endif

typedef u16 Element;

DEVICE float to_float(Element value) {
#if ELEMENT_BF16
    return __uint_as_float(static_cast<u32>(value) << 16);
#else
    return f16_to_f32(value);
#endif
}

// The two elements of a 32-bit word, the low half first.
DEVICE float2 to_float2(u32 pair) {
#if ELEMENT_BF16
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#else
    return make_float2(f16_to_f32(static_cast<u16>(pair)), f16_to_f32(static_cast<u16>(pair >> 16)));
#endif
}

// Two floats as one word, `low` in the low half.
DEVICE u32 from_float2(float low, float high) {
#if ELEMENT_BF16
    return f32_to_bf16x2(low, high);
#else
    return f32_to_f16x2(low, high);
#endif
}

DEVICE Element from_float(float value) { return static_cast<Element>(from_float2(value, 0.0f)); }
