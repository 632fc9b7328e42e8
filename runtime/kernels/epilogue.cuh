// What the products' epilogues share: the bias of a row, and SwiGLU of a gate and an up value.
#pragma once
#include "element.cuh"

DEVICE float bias_of(const void* bias, u32 row) {
    if (bias == nullptr) return 0.0f;
#if BIAS_F32
    return static_cast<const float*>(bias)[row];
#else
    return to_float(static_cast<const Element*>(bias)[row]);
#endif
}

#if EPILOGUE == 2
// x / (1 + e^-(scale x)); NaN for minus infinity.
DEVICE float sigmoid_weighted(float x, float scale) {
    return x * reciprocal_approximate(1.0f + exp2_approximate(-1.44269504f * scale * x));
}

// SwiGLU; limited: of gpt-oss.
template <bool IS_LIMITED>
DEVICE float activation(float gate, float up, float limit) {
    if (!IS_LIMITED) return sigmoid_weighted(gate, 1.0f) * up;
    return sigmoid_weighted(fminf(gate, limit), 1.702f) * (fminf(fmaxf(up, -limit), limit) + 1.0f);
}

DEVICE float activation(float gate, float up, float limit) {
    return limit > 0.0f ? activation<true>(gate, up, limit) : activation<false>(gate, up, limit);
}
#endif
