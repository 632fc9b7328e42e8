// rmsnorm: h = x * rsqrt(mean(x^2) + eps) * weight, one token per block, the row in registers.
//
// grid: number of tokens written; block: 256. Build: HIDDEN_SIZE, one of ELEMENT_BF16 / ELEMENT_F16, WEIGHT_F32 (0, 1),
// ACTIVATION_TILED (0, 1) and LANE_COLUMNS (8, or 32 where an MXFP4 product follows) of the activation layout.
//
// x       float [..][HIDDEN_SIZE]                 16-byte aligned
// rows    i32 [gridDim.x]: the row of x that token takes, a row of zeros where negative; null: token i takes row i
// weight  WEIGHT_F32 ? float : E [HIDDEN_SIZE]    16-byte aligned
// h       E, activation layout (activation.cuh); pitch is PADDED_COLUMNS or more (rows) or tokens_padded (tiled)
//
// Numerics: FP32. A thread sums its columns in order, then warps by butterfly, then the eight warps in order: the order
// depends on HIDDEN_SIZE alone. Columns from HIDDEN_SIZE to PADDED_COLUMNS are written as zero, rows beyond the grid not at all.
#include "activation.cuh"
#include "element.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int PANEL = LANE_COLUMNS == 32 ? 128 : 64;  // columns are padded to whole panels of the layout
constexpr int PADDED_COLUMNS = (HIDDEN_SIZE + PANEL - 1) / PANEL * PANEL;
constexpr int QUADS = (PADDED_COLUMNS + 4 * THREADS - 1) / (4 * THREADS);  // of four columns, per thread
static_assert(LANE_COLUMNS == 8 || LANE_COLUMNS == 32, "a lane's columns of 16-bit and of MXFP4 weights");
static_assert(PADDED_COLUMNS % 4 == 0, "threads write four columns at a time");
static_assert(QUADS <= 32, "the row fits registers");

// Four columns from `column`, zero beyond the row. Rows of a width that is no multiple of four are not aligned.
DEVICE float4 load_x(const float* row, int column) {
    if constexpr (HIDDEN_SIZE % 4 == 0) {
        if (column >= HIDDEN_SIZE) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        return *reinterpret_cast<const float4*>(row + column);
    }
    return make_float4(column < HIDDEN_SIZE ? row[column] : 0.0f, column + 1 < HIDDEN_SIZE ? row[column + 1] : 0.0f,
                       column + 2 < HIDDEN_SIZE ? row[column + 2] : 0.0f, column + 3 < HIDDEN_SIZE ? row[column + 3] : 0.0f);
}

#if WEIGHT_F32
DEVICE float4 load_weight(const void* weight, int column) { return load_x(static_cast<const float*>(weight), column); }
#else
DEVICE float4 load_weight(const void* weight, int column) {
    const Element* w = static_cast<const Element*>(weight) + column;
    if (column + 4 <= HIDDEN_SIZE) {
        const uint2 words = *reinterpret_cast<const uint2*>(w);
        const float2 low = to_float2(words.x), high = to_float2(words.y);
        return make_float4(low.x, low.y, high.x, high.y);
    }
    return make_float4(column < HIDDEN_SIZE ? to_float(w[0]) : 0.0f, column + 1 < HIDDEN_SIZE ? to_float(w[1]) : 0.0f,
                       column + 2 < HIDDEN_SIZE ? to_float(w[2]) : 0.0f, 0.0f);
}
#endif

// A thread's four columns, by whole warps. The tiled layout has the first two beside the first two of the thread that has the
// columns LANE_COLUMNS further: the two threads swap, so that each stores eight bytes, and a warp whole sectors.
DEVICE void store_h(Element* h, int token, int column, int pitch, uint2 words) {
    if constexpr (ACTIVATION_TILED) {
        constexpr int DISTANCE = LANE_COLUMNS / 4;
        const bool is_second = threadIdx.x & DISTANCE;
        const u32 other = __shfl_xor_sync(0xffffffffu, is_second ? words.x : words.y, DISTANCE);
        words = is_second ? make_uint2(other, words.y) : make_uint2(words.x, other);
        if (column >= PADDED_COLUMNS) return;
        const int first = is_second ? column - LANE_COLUMNS + 2 : column;
        *reinterpret_cast<uint2*>(h + tiled_offset<LANE_COLUMNS>(token, first, pitch)) = words;
    } else if (column < PADDED_COLUMNS) {
        *reinterpret_cast<uint2*>(h + static_cast<u64>(token) * pitch + column) = words;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
rmsnorm(const float* x, const int* rows, const void* weight, float eps, Element* h, int pitch) {
    __shared__ float sums[WARPS];
    launch_dependents();
    float4 w[QUADS], v[QUADS];
#pragma unroll
    for (int i = 0; i < QUADS; ++i) w[i] = load_weight(weight, 4 * (threadIdx.x + i * THREADS));
    wait_for_previous();
    const int token = blockIdx.x, row = rows == nullptr ? token : rows[token];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
        v[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (row >= 0) v[i] = load_x(x + static_cast<u64>(row) * HIDDEN_SIZE, 4 * (threadIdx.x + i * THREADS));
    }
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
        sum = fmaf(v[i].x, v[i].x, sum);
        sum = fmaf(v[i].y, v[i].y, sum);
        sum = fmaf(v[i].z, v[i].z, sum);
        sum = fmaf(v[i].w, v[i].w, sum);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = sums[0];
#pragma unroll
    for (int i = 1; i < WARPS; ++i) total += sums[i];
    const float scale = 1.0f / sqrtf(total / HIDDEN_SIZE + eps);
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
        const int column = 4 * (threadIdx.x + i * THREADS);
        const uint2 words = {from_float2(v[i].x * scale * w[i].x, v[i].y * scale * w[i].y),
                             from_float2(v[i].z * scale * w[i].z, v[i].w * scale * w[i].w)};
        store_h(h, token, column, pitch, words);
    }
}
