// linear: Y[N tokens][M rows] = X[N][K] W[M][K]^T for a few tokens, by mma.sync (sm_80 up).
//
// The weights are read once, as they lie: all steps of the matrix, row block by row block, are one sequence that is cut
// into gridDim.x equal ranges, one per block. A block goes through its range segment by segment (a segment is what it has
// of one row block). Seven warps stream: each takes a seventh of a segment's steps, through a ring of its own, leaves its
// sums in shared memory and goes on. The eighth warp adds them up and stores, so that nothing stops the stream.
//
// grid: (number of SMs, ceil(N / (8 * TOKEN_TILES))); every block must be resident at once: see "Row blocks that two
// blocks share". block: THREADS. Dynamic shared memory: SHARED_BYTES of this build, or more: see runtime/linear_plan.py.
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
// Numerics: FP32 accumulation; seven partial sums per segment added in warp order; then what y held (EPILOGUE 1) and the
// other segments of the row block, in block order. The order depends on the matrix and gridDim.x alone, not on N.
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
#define RING_CHUNKS 2
#endif

constexpr int WARPS = 7;  // that stream
constexpr int THREADS = 32 * (WARPS + 1);
constexpr int CHUNK_STEPS = 4;
constexpr int LOADED_STEPS = LANE_COLUMNS == 32 ? 1 : TOKEN_TILES > 1 ? 2 : CHUNK_STEPS;  // whose activations are loaded at once
constexpr int CHUNK_BYTES = CHUNK_STEPS * STEP_BYTES;
constexpr int RING_BYTES = WARPS * RING_CHUNKS * CHUNK_BYTES;
constexpr int SUMS_BYTES = WARPS * TOKEN_TILES * 32 * 16;
constexpr int SHARED_BYTES = RING_BYTES + SUMS_BYTES + 8 * (WARPS * RING_CHUNKS + 2);
static_assert(CHUNK_BYTES % 128 == 0, "ring slots stay aligned");
static_assert(SHARED_BYTES <= 227 << 10, "what a block can have");

struct Range {
    u64 begin, end;  // steps of the whole matrix
};

DEVICE u64 range_begin(u64 total, u32 block) { return total * block / gridDim.x; }

// What one warp reads: chunks of at most CHUNK_STEPS steps of its seventh of each segment.
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

// The matrix, and what this block has of it.
struct Work {
    const u8* weights;
    int steps;  // of a row block
    u64 total;  // steps of the matrix
    Range range;
    u32 first_row_block, last_row_block;
};

// A warp's slots, and where in the matrix the next chunk for them lies.
struct Ring {
    u32 shared;    // of this warp's slots
    u32 barriers;  // of this warp's slots
    const u8* pointer;
    Cursor ahead;
    int warp, lane;

    MEMBER void initialize(const Work& work) {
#if __CUDA_ARCH__ >= 900
        if (lane == 0) {
            for (int i = 0; i < RING_CHUNKS; ++i) mbarrier_init(barriers + 8 * i, 1);
            mbarrier_init_fence();
        }
        __syncwarp();
#endif
        ahead.row_block = work.first_row_block;
        ahead.enter(work.range, work.steps, warp);
        for (int i = 0; i < RING_CHUNKS; ++i) fetch_next(i, work);
    }
    // The warp's next chunk of the range, if there is one.
    MEMBER void fetch_next(int slot, const Work& work) {
        while (ahead.step == ahead.stop) {
            if (ahead.row_block == work.last_row_block) {
#if __CUDA_ARCH__ < 900
                copy_async_commit();  // waits count groups
#endif
                return;
            }
            ++ahead.row_block;
            ahead.enter(work.range, work.steps, warp);
        }
        const int count = ahead.count();
        fetch(slot, work.weights + (static_cast<u64>(ahead.row_block) * work.steps + ahead.step) * STEP_BYTES, count);
        ahead.step += count;
    }
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

// Where the streaming warps leave their sums of a segment: one place, free again once the eighth warp has read it.
struct Exchange {
    float4* sums;     // [WARPS][TOKEN_TILES][32]
    u32 full, empty;  // barriers

    MEMBER void put(const float (&acc)[TOKEN_TILES][4], u32 segment, int warp, int lane) const {
        if (segment > 0) mbarrier_wait(empty, (segment - 1) & 1);
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; ++i)
            sums[(warp * TOKEN_TILES + i) * 32 + lane] = make_float4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
        mbarrier_arrive(full);
    }
    MEMBER void take(float4 (&sum)[TOKEN_TILES], u32 segment, int lane) const {
        mbarrier_wait(full, segment & 1);
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; ++i) {
            sum[i] = sums[i * 32 + lane];
#pragma unroll
            for (int w = 1; w < WARPS; ++w) {
                const float4 part = sums[(w * TOKEN_TILES + i) * 32 + lane];
                sum[i].x += part.x, sum[i].y += part.y, sum[i].z += part.z, sum[i].w += part.w;
            }
        }
        mbarrier_arrive(empty);
    }
};

// One streaming warp's part of every segment.
DEVICE void stream(const Work& work, Ring& ring, const Exchange& exchange, const Element* activations, int pitch,
                   int first_token, int num_tokens) {
    const int warp = ring.warp, lane = ring.lane, g = lane / 4, t = lane % 4;
    const Element* lane_activations[TOKEN_TILES];  // row of this lane's token, at the lane's columns; null beyond the last
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) {
        const int token = first_token + 8 * i + g;
        lane_activations[i] = token < num_tokens ? activations + static_cast<u64>(token) * pitch + LANE_COLUMNS * t : nullptr;
    }
    int slot = 0;
    u32 parity = 0;
    for (u32 row_block = work.first_row_block; row_block <= work.last_row_block; ++row_block) {
        float acc[TOKEN_TILES][4] = {};
        Cursor cursor = {row_block, 0, 0};
        cursor.enter(work.range, work.steps, warp);
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
            ring.wait(slot, parity);
            const u8* chunk = ring.pointer + slot * CHUNK_BYTES;
#pragma unroll
            for (int s = 0; s < CHUNK_STEPS; ++s) {
                if (s >= count) break;
                const StepFragment fragment = load_step(chunk + s * STEP_BYTES, lane);
#pragma unroll
                for (int q = 0; q < STEP_PRODUCTS; ++q) {
                    u32 a[4];
                    a_fragment(a, fragment, q);
#pragma unroll
                    for (int i = 0; i < TOKEN_TILES; ++i) {
                        const uint4& piece = x[s % LOADED_STEPS][i][q / 2];
                        mma_m16n8k16(acc[i], a[0], a[1], a[2], a[3], word(piece, q % 2 * 2), word(piece, q % 2 * 2 + 1));
                    }
                }
                if (s + LOADED_STEPS < CHUNK_STEPS) load_activations(s + LOADED_STEPS);
            }
            __syncwarp();  // every lane has read the slot
            ring.fetch_next(slot, work);
            cursor.step += count;
            if (++slot == RING_CHUNKS) slot = 0, parity ^= 1;
        }
        exchange.put(acc, row_block - work.first_row_block, warp, lane);
    }
}

struct Output {
    void* y;
    int pitch, columns, first_token, num_tokens;
    const void* bias;
    float limit;
    float4* partials;  // of this row of blocks
    u32* flags;
};

#if EPILOGUE == 1
// What y holds of a row block; a lane holds rows g (x, y) and g + 8 (z, w) of tokens 2t, 2t + 1 of each token tile.
DEVICE void load_results(float4 (&sum)[TOKEN_TILES], u32 row_block, const Output& out, int lane) {
    const u32 row = 16 * row_block + lane / 4;
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) {
        float low[2] = {}, high[2] = {};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int token = out.first_token + 8 * i + 2 * (lane % 4) + e;
            if (token >= out.num_tokens) continue;
            const float* y = static_cast<const float*>(out.y) + static_cast<u64>(token) * out.pitch;
            if (row < out.columns) low[e] = __ldcg(y + row);
            if (row + 8 < out.columns) high[e] = __ldcg(y + row + 8);
        }
        sum[i] = make_float4(low[0], low[1], high[0], high[1]);
    }
}
#endif

// One row block's results, lanes as above.
DEVICE void store_results(const float4 (&sum)[TOKEN_TILES], u32 row_block, const Output& out, int lane) {
    const u32 g = lane / 4, t = lane % 4, row = 16 * row_block + g;
    const float low_bias = bias_of(out.bias, row), high_bias = bias_of(out.bias, row + 8);
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) {
        const float low[2] = {sum[i].x + low_bias, sum[i].y + low_bias}, high[2] = {sum[i].z + high_bias, sum[i].w + high_bias};
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int token = out.first_token + 8 * i + 2 * t + e;
            if (token >= out.num_tokens) continue;
#if EPILOGUE == 2
            const int column = 8 * row_block + g;
            if (column < out.columns)
                static_cast<Element*>(out.y)[activation_offset<Y_LANE_COLUMNS, Y_TILED>(token, column, out.pitch)] =
                    from_float(activation(low[e], high[e], out.limit));
#else
            float* y = static_cast<float*>(out.y) + static_cast<u64>(token) * out.pitch;
            if (row < out.columns) y[row] = low[e];
            if (row + 8 < out.columns) y[row + 8] = high[e];
#endif
        }
    }
}

// Leaves this block's sums of a row block for its owner.
DEVICE void give_partials(const float4 (&sum)[TOKEN_TILES], const Output& out, int lane) {
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; ++i) out.partials[(blockIdx.x * TOKEN_TILES + i) * 32 + lane] = sum[i];
    __syncwarp();
    if (lane == 0) store_release(out.flags + blockIdx.x, 1);
}

// Adds what the other blocks have of a row block that this one owns; leaves their flags at zero.
DEVICE void add_partials(float4 (&sum)[TOKEN_TILES], u64 total, u64 row_block_end, const Output& out, int lane) {
    for (u32 other = blockIdx.x + 1; range_begin(total, other) < row_block_end; ++other) {
        if (range_begin(total, other) == range_begin(total, other + 1)) continue;  // it has no steps
        while (load_acquire(out.flags + other) == 0) {}
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; ++i) {
            const float4 part = __ldcg(out.partials + (other * TOKEN_TILES + i) * 32 + lane);
            sum[i].x += part.x, sum[i].y += part.y, sum[i].z += part.z, sum[i].w += part.w;
        }
        __syncwarp();
        if (lane == 0) store_release(out.flags + other, 0);
    }
}

// The eighth warp: every segment's sums to y, or to the block that owns the row block.
DEVICE void finish(const Work& work, const Exchange& exchange, const Output& out, int lane) {
    for (u32 row_block = work.first_row_block; row_block <= work.last_row_block; ++row_block) {
        const u64 first = static_cast<u64>(row_block) * work.steps;
        const bool is_owner = first >= work.range.begin;
        float4 others[TOKEN_TILES] = {};
        if (is_owner) {  // while the weights are on their way
#if EPILOGUE == 1
            load_results(others, row_block, out, lane);
#endif
            if (first + work.steps > work.range.end) add_partials(others, work.total, first + work.steps, out, lane);
        }
        float4 sum[TOKEN_TILES];
        exchange.take(sum, row_block - work.first_row_block, lane);
        if (!is_owner) {
            give_partials(sum, out, lane);
            continue;
        }
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; ++i)
            sum[i].x += others[i].x, sum[i].y += others[i].y, sum[i].z += others[i].z, sum[i].w += others[i].w;
        store_results(sum, row_block, out, lane);
    }
}

// On sm_90 a thread of the common builds has 72 registers at most, so that two products and an attention fit a multiprocessor:
// as if blocks of 448 threads were to fit twice.
#if __CUDA_ARCH__ == 900
constexpr int BOUND_THREADS = TOKEN_TILES == 1 || (TOKEN_TILES == 2 && !CODEC_MXFP4) ? 448 : THREADS;
#else
constexpr int BOUND_THREADS = THREADS;
#endif

extern "C" __global__ void __launch_bounds__(BOUND_THREADS, TOKEN_TILES <= 2 ? 2 : 1)
linear(const u8* weights, u32 row_blocks, int steps, const Element* activations, int activation_pitch, int num_tokens,
       void* y, int y_pitch, int y_columns, const void* bias, float limit, float4* partials, u32* flags) {
    extern __shared__ __align__(128) u8 shared[];
    launch_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u64 total = static_cast<u64>(row_blocks) * steps;
    const Range range = {range_begin(total, blockIdx.x), range_begin(total, blockIdx.x + 1)};
    if (range.begin == range.end) {
        wait_for_previous();
        return;
    }
    const Work work = {weights, steps, total, range, static_cast<u32>(range.begin / steps), static_cast<u32>((range.end - 1) / steps)};
    const u32 barriers = shared_address(shared) + RING_BYTES + SUMS_BYTES;
    const Exchange exchange = {reinterpret_cast<float4*>(shared + RING_BYTES), barriers, barriers + 8};
    Ring ring = {shared_address(shared) + warp * RING_CHUNKS * CHUNK_BYTES, barriers + 8 * (2 + warp * RING_CHUNKS),
                 shared + warp * RING_CHUNKS * CHUNK_BYTES, {}, warp, lane};
    if (warp < WARPS) {
        ring.initialize(work);
    } else if (lane == 0) {
        mbarrier_init(exchange.full, 32 * WARPS);  // every lane arrives for what it wrote or read
        mbarrier_init(exchange.empty, 32);
    }
    __syncthreads();
    wait_for_previous();
    const int first_token = blockIdx.y * 8 * TOKEN_TILES;
    if (warp < WARPS) {
        stream(work, ring, exchange, activations, activation_pitch, first_token, num_tokens);
        return;
    }
    const u32 row_of_blocks = blockIdx.y * gridDim.x;
    const Output out = {y, y_pitch, y_columns, first_token, num_tokens, bias, limit,
                        partials + static_cast<u64>(row_of_blocks) * TOKEN_TILES * 32, flags + row_of_blocks};
    finish(work, exchange, out, lane);
}
