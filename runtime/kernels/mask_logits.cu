// mask_logits: logits of tokens that a grammar does not allow become the least finite float, whose weight is zero.
//
// grid: (any, rows); block: 256.
//
// logits  float [rows][pitch]
// masks   u32 [rows][ceil32(vocab_size) / 32], bit i % 32 of word i / 32 is token i, the lowest bit first
#include "element.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
mask_logits(float* logits, int pitch, int vocab_size, const u32* masks) {
    launch_dependents();
    wait_for_previous();
    float* row = logits + static_cast<u64>(blockIdx.y) * pitch;
    const u32* mask = masks + static_cast<u64>(blockIdx.y) * ((vocab_size + 31) / 32);
    for (int id = blockIdx.x * THREADS + threadIdx.x; id < vocab_size; id += gridDim.x * THREADS)
        if (!(mask[id / 32] >> id % 32 & 1)) row[id] = -3.402823466e38f;
}
