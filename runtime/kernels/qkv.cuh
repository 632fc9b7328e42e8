// What lies between the fused projection and attention: clamp, q/k norm, RoPE and the paged cache's addresses. One warp
// works on one head of one token; prefill (qkv_post.cu) and decode (attention_decode.cu) share it.
//
// qkv row of a token: float [ceil16(Q) q | ceil16(K) k | ceil16(K) v], Q = num_heads * HEAD_DIM, K = num_kv_heads *
// HEAD_DIM. Heads of q and k are in rope order when HEAD_DIM is a multiple of 16, else sequential; v is sequential.
// cache of a layer: E [num_pages][2 (K, V)][num_kv_heads][PANELS][PAGE tokens][64], the eight 16-byte chunks of a
// 128-byte row at chunk ^ (token & 7), columns from HEAD_DIM on zero.
//
// QK_NORM: 0 none; 1 "head": clamp, then each head over its own root mean square; 2 "full": all of q and all of k over
// theirs, then clamp. Then RoPE. Weights are in logical order: E, or float with NORM_F32. Everything is FP32.
#pragma once
#include "element.cuh"

constexpr int HALF = HEAD_DIM / 2;
constexpr int PANELS = (HEAD_DIM + 63) / 64;
constexpr int PADDED_DIM = 64 * PANELS;
constexpr int CHUNKS = PADDED_DIM / 8;    // 16-byte pieces of a head
constexpr int PAIRS = (HALF + 31) / 32;   // pairs of columns (i, i + HALF) of a lane: i = lane + 32 j
constexpr int PAGE = 64;                  // tokens
constexpr bool ROPE_ORDER = HEAD_DIM % 16 == 0;
static_assert(HEAD_DIM % 2 == 0 && HEAD_DIM >= 2 && HEAD_DIM <= 256, "RoPE pairs columns; a warp stores a head at once");
static_assert(QK_NORM >= 0 && QK_NORM <= 2, "none, head, full");

#if NORM_F32
typedef float NormWeight;
#else
typedef Element NormWeight;
#endif

DEVICE float to_float(float value) { return value; }

DEVICE int round_up_16(int n) { return (n + 15) / 16 * 16; }

// Element index of a 16-byte chunk of a head's row in the cache; part 0 is K, 1 is V; slot is the token's place in its page.
DEVICE u64 cache_offset(int page, int part, int num_kv_heads, int head, int slot, int chunk) {
    const u64 tile = ((static_cast<u64>(page) * 2 + part) * num_kv_heads + head) * PANELS + chunk / 8;
    return (tile * PAGE + slot) * 64 + ((chunk % 8) ^ (slot % 8)) * 8;
}

// Columns i and i + HALF of a head for i = lane + 32 j; zero where i is not below HALF.
struct HeadPairs {
    float low[PAIRS], high[PAIRS];
};

template <bool IN_ROPE_ORDER>
DEVICE HeadPairs load_pairs(const float* source, int lane) {
    HeadPairs x;
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
        const int i = lane + 32 * j, place = IN_ROPE_ORDER ? i / 8 * 16 + i % 8 : i;
        x.low[j] = i < HALF ? source[place] : 0.0f;
        x.high[j] = i < HALF ? source[place + (IN_ROPE_ORDER ? 8 : HALF)] : 0.0f;
    }
    return x;
}

// To [-limit, limit]; NaN stays NaN.
DEVICE float clamp(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }

DEVICE void clamp_pairs(HeadPairs& x, float limit) {
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) x.low[j] = clamp(x.low[j], limit), x.high[j] = clamp(x.high[j], limit);
}

// The same bits in every lane.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

DEVICE float mean_square(const HeadPairs& x) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) sum += x.low[j] * x.low[j] + x.high[j] * x.high[j];
    return warp_sum(sum) * (1.0f / HEAD_DIM);
}

// A head's norm weights, as HeadPairs has its columns.
DEVICE HeadPairs load_weights(const NormWeight* weight, int lane) {
    HeadPairs w;
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
        const int i = lane + 32 * j;
        w.low[j] = QK_NORM != 0 && i < HALF ? to_float(weight[i]) : 0.0f;
        w.high[j] = QK_NORM != 0 && i < HALF ? to_float(weight[i + HALF]) : 0.0f;
    }
    return w;
}

DEVICE void normalise_pairs(HeadPairs& x, float inverse_rms, const HeadPairs& weights) {
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) x.low[j] *= inverse_rms * weights.low[j], x.high[j] *= inverse_rms * weights.high[j];
}

// Cosines and sines of a position, for the columns that HeadPairs has.
struct Rotation {
    float2 of[PAIRS];

    // row: float2 [HALF], cos and sin.
    MEMBER Rotation(const float2* row, int lane) {
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) of[j] = lane + 32 * j < HALF ? row[lane + 32 * j] : make_float2(0.0f, 0.0f);
    }
};

// (a cos - b sin, b cos + a sin).
DEVICE void rotate_pairs(HeadPairs& x, const Rotation& rotation) {
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
        const float2 r = rotation.of[j];
        const float a = x.low[j], b = x.high[j];
        x.low[j] = a * r.x - b * r.y;
        x.high[j] = b * r.x + a * r.y;
    }
}

// Clamp, norm and RoPE of a head of q or k; inverse_rms is used by the "full" norm.
DEVICE void rotate_head(HeadPairs& x, const HeadPairs& weights, float inverse_rms, float eps, float clip, const Rotation& rotation) {
#if QK_NORM == 2
    normalise_pairs(x, inverse_rms, weights);
#endif
    clamp_pairs(x, clip);
#if QK_NORM == 1
    normalise_pairs(x, rsqrtf(mean_square(x) + eps), weights);
#endif
    rotate_pairs(x, rotation);
}

// put(column, element) for every column of the padded head.
template <typename Put>
DEVICE void put_head(const HeadPairs& x, int lane, Put put) {
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
        const int i = lane + 32 * j;
        if (i >= HALF) continue;
        put(i, from_float(x.low[j]));
        put(i + HALF, from_float(x.high[j]));
    }
    for (int i = HEAD_DIM + lane; i < PADDED_DIM; i += 32) put(i, 0);
}

#if QK_NORM == 2
// 1 / rms of all of q (x) and all of k (y) of a token, by the whole block; scratch: shared [NUM_WARPS]. The order of the
// sums depends on the block's size alone, so blocks of one size agree to the bit.
template <int NUM_WARPS>
DEVICE float2 full_inverse_rms(const float* row, int q_columns, int k_columns, float eps, float2* scratch) {
    float2 sum = make_float2(0.0f, 0.0f);
    const float2* q = reinterpret_cast<const float2*>(row);
    const float2* k = reinterpret_cast<const float2*>(row + round_up_16(q_columns));
    for (int i = threadIdx.x; i < q_columns / 2; i += 32 * NUM_WARPS) sum.x += q[i].x * q[i].x + q[i].y * q[i].y;
    for (int i = threadIdx.x; i < k_columns / 2; i += 32 * NUM_WARPS) sum.y += k[i].x * k[i].x + k[i].y * k[i].y;
    sum = make_float2(warp_sum(sum.x), warp_sum(sum.y));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = scratch[0];
#pragma unroll
    for (int w = 1; w < NUM_WARPS; ++w) sum.x += scratch[w].x, sum.y += scratch[w].y;
    return make_float2(rsqrtf(sum.x / q_columns + eps), rsqrtf(sum.y / k_columns + eps));
}
#endif
