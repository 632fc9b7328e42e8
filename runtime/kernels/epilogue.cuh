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
DEVICE float activation(float gate, float up, float limit) {
    if (limit > 0.0f) {  // gpt-oss
        gate = fminf(gate, limit);
        up = fminf(fmaxf(up, -limit), limit) + 1.0f;
        return gate / (1.0f + __expf(-1.702f * gate)) * up;
    }
    return gate / (1.0f + __expf(-gate)) * up;
}
#endif
