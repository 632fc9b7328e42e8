// linear: Y[N tokens][M rows] = X[N][K] W[M][K]^T for a few tokens, by mma.sync (sm_80 up).
//
// The weights are read once, as they lie: all steps of the matrix, row block by row block, are one sequence that is cut
// into gridDim.x equal ranges, one per block. A block goes through its range segment by segment (a segment is what it has
// of one row block); its 8 warps take an eighth of the segment's steps each, every warp through a ring of its own.
//
// grid: (number of SMs, ceil(N / (8 * TOKEN_TILES))); every block must be resident at once: see "Row blocks that two
// blocks share". block: 256. Dynamic shared memory: SHARED_BYTES of this build (RING_BYTES + REDUCE_BYTES + barriers).
//
// weights      u8 [row_blocks][steps][STEP_BYTES]      4096-byte aligned
// activations  E [num_tokens][activation_pitch]        "rows" layout, 16-byte aligned, pitch a multiple of 8
// bias         BIAS_F32 ? float : E [16 * row_blocks]  or null
// EPILOGUE 0   y: float [num_tokens][y_pitch] = acc + bias, rows below y_columns
// EPILOGUE 1   y: float [num_tokens][y_pitch] += acc + bias, rows below y_columns
// EPILOGUE 2   rows in pair8 order; y: E, activation layout of the product that follows (Y_TILED, Y_LANE_COLUMNS, pitch
//              y_pitch), column 8b + g = activation(gate row g, up row g + 8) of row block b, for columns below y_columns
// partials     float4 [gridDim.y][gridDim.x][TOKEN_TILES][32]; flags u32 [gridDim.y][gridDim.x], zero before and after
//
// Numerics: FP32 accumulation; eight partial sums per segment added in warp order, segments of a row block in block
// order. The order depends on the matrix and gridDim.x alone, not on N.
//
// Row blocks that two blocks share: the block that has a row block's first steps owns it. The others have its steps at the
// start of their ranges, so their sums are in `partials` long before the owner reaches its end and asks for them.
#include "activation.cuh"
#include "codec.cuh"
#include "epilogue.cuh"

#ifndef TOKEN_TILES
#define TOKEN_TILES 1
#endif
#ifndef RING_CHUNKS
#define RING_CHUNKS 3
#endif

constexpr int WARPS = 8;
constexpr int CHUNK_STEPS = 4;
constexpr int LOADED_STEPS = LANE_COLUMNS == 8 ? CHUNK_STEPS : 1;  // steps whose activations are in registers at once
constexpr int CHUNK_BYTES = CHUNK_STEPS * STEP_BYTES;
constexpr int RING_BYTES = WARPS * RING_CHUNKS * CHUNK_BYTES;
constexpr int REDUCE_BYTES = 2 * WARPS * TOKEN_TILES * 32 * 16;
static_assert(CHUNK_BYTES % 128 == 0, "ring slots stay aligned");

struct Range {
    u64 begin, end;  // steps of the whole matrix
};

DEVICE u64 range_begin(u64 total, u32 block) { return total * block / gridDim.x; }

// What one warp reads: chunks of at most CHUNK_STEPS steps of its eighth of each segment.
struct Cursor {
    u32 row_block;
    int step, stop;  // within the row block

    MEMBER void enter(const Range& range, int steps, int warp) {
        const u64 first = static_cast<u64>(row_block) * steps;
        const int a = range.begin > first ? static_cast<int>(range.begin - first) : 0;
        const int b = range.end < first + steps ? static_cast<int>(range.end - first) : steps;
        step = a + (b - a) * warp / WARPS;
        stop = a + (b - a) * (warp + 1) / WARPS;
    }
    MEMBER int count() const { return min(CHUNK_STEPS, stop - step); }
};

struct Ring {
    u32 shared;    // of this warp's slots
    u32 barriers;  // of this warp's slots
    const u8* pointer;
    int lane;

    MEMBER void fetch(int slot, const u8* source, int num_steps) const {
        const u32 target = shared + slot * CHUNK_BYTES, bytes = num_steps * STEP_BYTES;
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
            mbarrier_arrive_expect(barriers + 8 * slot, bytes);
            copy_bulk(target, source, bytes, barriers + 8 * slot);
        }
#else
        for (u32 i = lane * 16; i < bytes; i += 32 * 16) copy_async_16(target + i, source + i);
        copy_async_commit();
#endif
    }
    MEMBER void wait(int slot, u32 parity) const {
#if __CUDA_ARCH__ >= 900
        mbarrier_wait(barriers + 8 * slot, parity);
#else
        copy_async_wait<RING_CHUNKS - 1>();
        __syncwarp();
#endif
    }
};

// Moves a cursor to the next chunk of this warp in the range; false at the end.
DEVICE bool find_chunk(Cursor& cursor, const Range& range, u32 last_row_block, int steps, int warp) {
    while (cursor.step == cursor.stop) {
        if (cursor.row_block == last_row_block) return false;
        ++cursor.row_block;
        cursor.enter(range, steps, warp);
    }
    return true;
}

struct Output {
    void* y;
    int pitch, columns;
    const void* bias;
    float limit;
};

// One row block's results; a lane holds rows g (x, y) and g + 8 (z, w) of tokens 2t, 2t + 1 of each token tile.
DEVICE void store_results(const float4 (&sum)[TOKEN_TILES], u32 row_block, int first_token, int num_tokens, const Output& out, int lane) {
    const u32 g = lane / 4, t = lane % 4, row = 16 * row_block + g;
    const float low_bias = bias_of(out.bias, row), high_bias = bias_of(out.bias, row + 8);
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) {
        const float low[2] = {sum[i].x + low_bias, sum[i].y + low_bias}, high[2] = {sum[i].z + high_bias, sum[i].w + high_bias};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int token = first_token + 8 * i + 2 * t + e;
            if (token >= num_tokens) continue;
#if EPILOGUE == 2
            const int column = 8 * row_block + g;
            if (column < out.columns)
                static_cast<Element*>(out.y)[activation_offset<Y_LANE_COLUMNS, Y_TILED>(token, column, out.pitch)] =
                    from_float(activation(low[e], high[e], out.limit));
#else
            float* y = static_cast<float*>(out.y) + static_cast<u64>(token) * out.pitch;
#if EPILOGUE == 1
            if (row < out.columns) y[row] += low[e];
            if (row + 8 < out.columns) y[row + 8] += high[e];
#else
            if (row < out.columns) y[row] = low[e];
            if (row + 8 < out.columns) y[row + 8] = high[e];
#endif
#endif
        }
    }
}

// Adds what the other blocks have of a row block that this one owns; leaves their flags at zero.
DEVICE void add_partials(float4 (&sum)[TOKEN_TILES], u64 total, u64 row_block_end, float4* partials, u32* flags, int lane) {
    for (u32 other = blockIdx.x + 1; range_begin(total, other) < row_block_end; ++other) {
        const u64 place = blockIdx.y * gridDim.x + other;
        if (range_begin(total, other) == range_begin(total, other + 1)) continue;  // it has no steps
        while (load_acquire(flags + place) == 0) {}
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; ++i) {
            const float4 part = __ldcg(partials + (place * TOKEN_TILES + i) * 32 + lane);
            sum[i].x += part.x, sum[i].y += part.y, sum[i].z += part.z, sum[i].w += part.w;
        }
        __syncwarp();
        if (lane == 0) store_release(flags + place, 0);
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, TOKEN_TILES <= 2 ? 2 : 1)
linear(const u8* weights, u32 row_blocks, int steps, const Element* activations, int activation_pitch, int num_tokens,
       void* y, int y_pitch, int y_columns, const void* bias, float limit, float4* partials, u32* flags) {
    extern __shared__ __align__(128) u8 shared[];
    float4* reduce = reinterpret_cast<float4*>(shared + RING_BYTES);  // [2][WARPS][TOKEN_TILES][32]
#if !DEPENDENTS_LATE
    launch_dependents();
#endif
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u64 total = static_cast<u64>(row_blocks) * steps;
    const Range range = {range_begin(total, blockIdx.x), range_begin(total, blockIdx.x + 1)};
    const Ring ring = {shared_address(shared) + warp * RING_CHUNKS * CHUNK_BYTES,
                       shared_address(shared) + RING_BYTES + REDUCE_BYTES + warp * RING_CHUNKS * 8,
                       shared + warp * RING_CHUNKS * CHUNK_BYTES, lane};
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        for (int i = 0; i < RING_CHUNKS; ++i) mbarrier_init(ring.barriers + 8 * i, 1);
        mbarrier_init_fence();
    }
    __syncwarp();
#endif
    if (range.begin == range.end) {
        wait_for_previous();
        return;
    }
    const u32 first_row_block = range.begin / steps, last_row_block = (range.end - 1) / steps;
    Cursor ahead = {first_row_block, 0, 0};
    ahead.enter(range, steps, warp);
    auto fetch_next = [&](int slot) {
        int count = 0;
        if (find_chunk(ahead, range, last_row_block, steps, warp)) {
            count = ahead.count();
            ring.fetch(slot, weights + (static_cast<u64>(ahead.row_block) * steps + ahead.step) * STEP_BYTES, count);
            ahead.step += count;
        }
#if __CUDA_ARCH__ < 900
        if (count == 0) copy_async_commit();  // waits count groups
#endif
    };
    for (int i = 0; i < RING_CHUNKS; ++i) fetch_next(i);
    wait_for_previous();
#if DEPENDENTS_LATE
    launch_dependents();
#endif

    const int first_token = blockIdx.y * 8 * TOKEN_TILES;
    const Element* lane_activations[TOKEN_TILES];  // row of this lane's token, at the lane's columns; null beyond the last
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) {
        const int token = first_token + 8 * i + g;
        lane_activations[i] =
            token < num_tokens ? activations + static_cast<u64>(token) * activation_pitch + LANE_COLUMNS * t : nullptr;
    }
    const Output out = {y, y_pitch, y_columns, bias, limit};
    int slot = 0;
    u32 parity = 0;
    for (u32 row_block = first_row_block; row_block <= last_row_block; ++row_block) {
        const u32 segment = row_block - first_row_block;
        const u64 first = static_cast<u64>(row_block) * steps;
        const bool is_reducer = warp == segment % WARPS, is_owner = first >= range.begin;
        float4 others[TOKEN_TILES] = {};
        bool asks_others = is_reducer && is_owner && first + steps > range.end;
        float acc[TOKEN_TILES][4] = {};
        Cursor cursor = {row_block, 0, 0};
        cursor.enter(range, steps, warp);
        while (cursor.step < cursor.stop) {
            const int count = cursor.count();
            uint4 x[LOADED_STEPS][TOKEN_TILES][PIECES];
            auto load_activations = [&](int s) {
#pragma unroll
                for (int i = 0; i < TOKEN_TILES; ++i)
#pragma unroll
                    for (int p = 0; p < PIECES; ++p) {
                        x[s % LOADED_STEPS][i][p] = make_uint4(0, 0, 0, 0);
                        if (s < count && lane_activations[i] != nullptr)
                            x[s % LOADED_STEPS][i][p] =
                                *reinterpret_cast<const uint4*>(lane_activations[i] + (cursor.step + s) * STEP_COLUMNS + 8 * p);
                    }
            };
#pragma unroll
            for (int s = 0; s < LOADED_STEPS; ++s) load_activations(s);
            if (asks_others && cursor.step + count == cursor.stop) {  // while the last weights are on their way
                add_partials(others, total, first + steps, partials, flags, lane);
                asks_others = false;
            }
            ring.wait(slot, parity);
            const u8* chunk = ring.pointer + slot * CHUNK_BYTES;
#pragma unroll
            for (int s = 0; s < CHUNK_STEPS; ++s) {
                if (s >= count) break;
                if (s >= LOADED_STEPS) load_activations(s);
                const StepFragment fragment = load_step(chunk + s * STEP_BYTES, lane);
#pragma unroll
                for (int q = 0; q < STEP_PRODUCTS; ++q) {
                    u32 a[4];
                    a_fragment(a, fragment, q);
#pragma unroll
                    for (int i = 0; i < TOKEN_TILES; ++i)
                        mma_m16n8k16(acc[i], a[0], a[1], a[2], a[3], word(x[s % LOADED_STEPS][i][q / 2], q % 2 * 2), word(x[s % LOADED_STEPS][i][q / 2], q % 2 * 2 + 1));
                }
            }
            __syncwarp();  // every lane has read the slot
            fetch_next(slot);
            cursor.step += count;
            if (++slot == RING_CHUNKS) slot = 0, parity ^= 1;
        }
        if (asks_others) add_partials(others, total, first + steps, partials, flags, lane);
        float4* half = reduce + (segment & 1) * WARPS * TOKEN_TILES * 32;
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; ++i)
            half[(warp * TOKEN_TILES + i) * 32 + lane] = make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
        __syncthreads();
        if (!is_reducer) continue;
        float4 sum[TOKEN_TILES];
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; ++i) {
            sum[i] = half[i * 32 + lane];
#pragma unroll
            for (int w = 1; w < WARPS; ++w) {
                const float4 part = half[(w * TOKEN_TILES + i) * 32 + lane];
                sum[i].x += part.x, sum[i].y += part.y, sum[i].z += part.z, sum[i].w += part.w;
            }
            sum[i].x += others[i].x, sum[i].y += others[i].y, sum[i].z += others[i].z, sum[i].w += others[i].w;
        }
        if (!is_owner) {
            const u64 place = blockIdx.y * gridDim.x + blockIdx.x;
#pragma unroll
            for (int i = 0; i < TOKEN_TILES; ++i) partials[(place * TOKEN_TILES + i) * 32 + lane] = sum[i];
            __threadfence();
            __syncwarp();
            if (lane == 0) store_release(flags + place, 1);
            continue;
        }
        store_results(sum, row_block, first_token, num_tokens, out, lane);
    }
}
