// qkv_post: from the fused projection's output to rotated queries and the paged KV cache, for the tokens of a prefill.
//
// grid: (num_tokens, any): a block takes the heads 8 y to 8 y + 7, then those 8 gridDim.y further, a warp one head at a
// time; with QK_NORM 2, where every block sums the squares of a whole token, gridDim.y = 1 reads least. block: 256.
//
// qkv          float [num_tokens][qkv_rows]              qkv.cuh; 8-byte aligned, qkv_rows even
// q_norm       [HEAD_DIM] or, "full", [Q]; k_norm [HEAD_DIM] or [K]; unused with QK_NORM 0
// clip         largest magnitude, infinity for none
// rope         float2 [positions][HALF]                  cos, sin
// positions    int [num_tokens]
// slots        int [num_tokens], rows of the block table; negative for tokens that are not in use: nothing is done for them
// block_table  int [max_sequences][max_pages]
// q            E [num_tokens][num_heads][PADDED_DIM]     natural order, zero beyond HEAD_DIM, not scaled; 16-byte aligned
// cache        E, one layer's                            qkv.cuh; 16-byte aligned
//
// Numerics: FP32 throughout, one rounding to E. A token's result depends on that token alone.
#include "qkv.cuh"

constexpr int WARPS = 8;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
qkv_post(const float* qkv, int qkv_rows, int num_heads, int num_kv_heads, const NormWeight* q_norm, const NormWeight* k_norm,
         float eps, float clip, const float2* rope, const int* positions, const int* slots, const int* block_table,
         int max_pages, Element* q, Element* cache) {
    __shared__ __align__(16) Element staged[WARPS][PADDED_DIM];
    launch_dependents();
    wait_for_previous();
    const int token = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int slot = slots[token];
    if (slot < 0) return;
    const float* row = qkv + static_cast<u64>(token) * qkv_rows;
    const int k_base = round_up_16(num_heads * HEAD_DIM), v_base = k_base + round_up_16(num_kv_heads * HEAD_DIM);
    const int position = positions[token];
    const int page = block_table[static_cast<u64>(slot) * max_pages + position / PAGE];
    const Rotation rotation(rope + static_cast<u64>(position) * HALF, lane);
    const HeadPairs q_weights = load_weights(q_norm, lane), k_weights = load_weights(k_norm, lane);
    float2 inverse_rms = make_float2(0.0f, 0.0f);
#if QK_NORM == 2
    __shared__ float2 scratch[WARPS];
    inverse_rms = full_inverse_rms<WARPS>(row, num_heads * HEAD_DIM, num_kv_heads * HEAD_DIM, eps, scratch);
#endif
    const int num_heads_in_row = num_heads + 2 * num_kv_heads, stride = gridDim.y * WARPS;
    auto load = [&](int i) {
        if (i < num_heads) return load_pairs<ROPE_ORDER>(row + i * HEAD_DIM, lane);
        if (i < num_heads + num_kv_heads) return load_pairs<ROPE_ORDER>(row + k_base + (i - num_heads) * HEAD_DIM, lane);
        if (i < num_heads_in_row) return load_pairs<false>(row + v_base + (i - num_heads - num_kv_heads) * HEAD_DIM, lane);
        return HeadPairs();
    };
    int i = blockIdx.y * WARPS + warp;
    for (HeadPairs next = load(i); i < num_heads_in_row; i += stride) {
        HeadPairs x = next;
        next = load(i + stride);  // while this one is worked on
        const bool is_query = i < num_heads, is_value = i >= num_heads + num_kv_heads;
        const int head = is_query ? i : is_value ? i - num_heads - num_kv_heads : i - num_heads;
        if (is_value) {
            clamp_pairs(x, clip);
        } else {
            HeadPairs weights = is_query ? q_weights : k_weights;
            if (QK_NORM == 2) weights = load_weights((is_query ? q_norm : k_norm) + head * HEAD_DIM, lane);
            rotate_head(x, weights, is_query ? inverse_rms.x : inverse_rms.y, eps, clip, rotation);
        }
        put_head(x, lane, [&](int column, Element value) { staged[warp][column] = value; });
        __syncwarp();
        if (lane < CHUNKS) {
            Element* target = is_query ? q + (static_cast<u64>(token) * num_heads + head) * PADDED_DIM + 8 * lane
                                       : cache + cache_offset(page, is_value, num_kv_heads, head, position % PAGE, lane);
            *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(staged[warp] + 8 * lane);
        }
        __syncwarp();
    }
}
