// attention_decode: one new token per sequence. Does what qkv_post does for that token (clamp, q/k norm, RoPE, K and V into
// the cache), then softmax(q k^T / sqrt(HEAD_DIM)) v over the paged cache, split along the context.
//
// grid: (any number of split workers, num_kv_heads * ROW_BLOCKS, batch bucket). block: 32 * WARPS.
// Dynamic shared memory: RING_BYTES of this build.
// A sequence's visible positions, from the page of the first on, are cut into at most MAX_SPLITS splits whose length
// depends on their number and min_split_tokens; worker x takes splits x, x + gridDim.x, ... A block has the (at most 16) query heads of a
// kv head as the rows of mma.m16n8k16; more than 16 take ROW_BLOCKS blocks. A warp takes every WARPS-th slice of 16 tokens of
// a split, through a ring of its own, with a softmax of its own; the warps' sums are merged in warp order, the splits' by
// the last block to arrive, in split order.
//
// qkv          float [batch][qkv_rows]                     qkv.cuh; 8-byte aligned, qkv_rows even
// q_norm       [HEAD_DIM] or, "full", [Q]; k_norm [HEAD_DIM] or [K]; unused with QK_NORM 0
// clip         largest magnitude, infinity for none
// rope         float2 [positions][HALF]
// positions    int [batch], of the new token; -1 is an empty row: its output is zero and nothing else is touched
// slots        int [batch], rows of the block table; block_table int [max_sequences][max_pages]
// cache        E, one layer's                              qkv.cuh; 16-byte aligned. Reads only what is visible
// window       positions seen, the new one included; 0 for all
// sinks        [num_heads], E, or float with SINKS_F32     with HAS_SINKS
// out          E, the activation layout (ACTIVATION_TILED, ACTIVATION_LANE_COLUMNS) of a product with Q inputs; row = batch
//              index, column = head * HEAD_DIM + i; columns from Q on are zeroed. out_pitch: see activation_offset
// partials     float [batch][gridDim.y][max_splits][ROWS][COLUMNS], partial_stats float2 [batch][gridDim.y][max_splits][ROWS]
// max_splits   splits of the longest sequence that may come, at most MAX_SPLITS; min_split_tokens: whole pages
// arrived      u32 [batch][gridDim.y], zero before and after
//
// Numerics: q, k, v are rounded to E, scores and sums are FP32, probabilities are rounded to E for the product with V and
// summed as rounded. The order of all sums depends on the sequence, min_split_tokens and the build.
//
// With EARLY_READS, positions, slots, the block table and the cache are read before the previous kernel is complete. That
// is right if whatever wrote them was complete before this step's first kernel called launch_dependents (that kernel waits
// first, then launches).
constexpr int QUERY_GROUP = GROUP;  // query heads of a kv head; the included files use the name GROUP for something else
#undef GROUP
#include "activation.cuh"
#include "qkv.cuh"

#ifndef WARPS
#define WARPS 4
#endif
#ifndef RING_SLOTS
#define RING_SLOTS 3
#endif
#ifndef MAX_SPLITS
#define MAX_SPLITS 32
#endif
#ifndef ACTIVATION_LANE_COLUMNS
#define ACTIVATION_LANE_COLUMNS 8
#endif

constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = QUERY_GROUP < 16 ? QUERY_GROUP : 16;  // query heads of a block
constexpr int ROW_BLOCKS = (QUERY_GROUP + 15) / 16;
constexpr int ROW_HALVES = ROWS > 8 ? 2 : 1;       // of the 16 rows, those in use
constexpr int SLICE = 16;                          // tokens of a ring slot
constexpr int STEPS = (HEAD_DIM + 15) / 16;        // 16-column steps of a head
constexpr int COLUMNS = 16 * STEPS;
constexpr bool QUERY_IN_REGISTERS = STEPS <= 8;    // else read again for every slice
constexpr int PANEL_BYTES = SLICE * 128;
constexpr int SLOT_BYTES = 2 * PANELS * PANEL_BYTES;  // K panels, V panels
constexpr int WARP_RING_BYTES = RING_SLOTS * SLOT_BYTES;
constexpr int RING_BYTES = WARPS * WARP_RING_BYTES;
constexpr int SUM_PITCH = PADDED_DIM + 8;          // floats; rows g = 0..3 of a warp's stores are in different banks
constexpr float LOG2_E = 1.4426950408889634f;
static_assert(PAGE % SLICE == 0, "splits are whole pages, pages whole slices");
static_assert(MAX_SPLITS >= 1 && MAX_SPLITS <= 32, "a warp combines with one split a lane");
static_assert(ROWS * SUM_PITCH * 4 <= WARP_RING_BYTES, "a warp's sums fit its ring");
static_assert(RING_BYTES <= 227 << 10, "what a block can have");
static_assert(2 * PANELS <= 32 && 2 * CHUNKS <= 64 && THREADS >= 64, "one lane a copy, one thread a chunk of the new token");

// Two: with a product no second attention fits a multiprocessor, with two products one does (see runtime/linear_plan.py).
constexpr int RESIDENT_BLOCKS = HEAD_DIM <= 128 ? 2 : 1;

#if SINKS_F32
typedef float Sink;
#else
typedef Element Sink;
#endif

DEVICE float minus_infinity() { return __int_as_float(0xff800000); }

// What the new token at `position` sees, [first, position], and how it is split.
struct Sequence {
    int position, first, split_tokens, num_splits;

    MEMBER Sequence(int position, int window, int min_split_tokens)
        : position(position), first(window > 0 ? max(0, position - window + 1) : 0) {
        const int tokens = position + 1 - origin(), pages = (tokens + PAGE * MAX_SPLITS - 1) / (PAGE * MAX_SPLITS);
        split_tokens = max(min_split_tokens, pages * PAGE);
        num_splits = (tokens + split_tokens - 1) / split_tokens;
    }
    MEMBER int origin() const { return first / PAGE * PAGE; }
    MEMBER int begin(int split) const { return max(origin() + split * split_tokens, first / SLICE * SLICE); }
    MEMBER int end(int split) const { return min(origin() + (split + 1) * split_tokens, position + 1); }
    MEMBER bool is_visible(int token) const { return token >= first && token <= position; }
    // Whether a slice has a token that is not visible, or the new one, which is not in the cache yet.
    MEMBER bool is_edge(int slice) const { return slice < first || slice + SLICE > position; }
};

// Bytes from a tile of 128-byte rows, panel by panel, to a 16-byte chunk of a row.
DEVICE int tile_offset(int row, int chunk) { return chunk / 8 * PANEL_BYTES + row * 128 + ((chunk % 8) ^ (row % 8)) * 16; }

// A warp's ring of slices, filled from one kv head of a sequence's pages.
struct Ring {
    u8* slots;          // of this warp, [RING_SLOTS][SLOT_BYTES]
    u32 barriers;       // of this warp, one a slot
    const Element* cache;
    const int* pages;   // the sequence's row of the block table
    int last_page, num_kv_heads, head, lane;
    int slot, known_page, page_id;  // page_id: block table entry of known_page + lane
    u32 parity;

    MEMBER int find_page(int page) {
        if (static_cast<u32>(page - known_page) >= 32) {
            known_page = page;
            page_id = page + lane <= last_page ? __ldcg(pages + page + lane) : 0;
        }
        return __shfl_sync(0xffffffffu, page_id, page - known_page);
    }
    // The first num_rows tokens of the slice that begins at `token`.
    MEMBER void fetch(int target_slot, int token, int num_rows) {
        const int page = find_page(token / PAGE);
        const u32 target = shared_address(slots) + target_slot * SLOT_BYTES;
#if __CUDA_ARCH__ >= 900
        const u32 barrier = barriers + 8 * target_slot;
        if (lane == 0) mbarrier_arrive_expect(barrier, 2 * PANELS * num_rows * 128);
        __syncwarp();
        if (lane < 2 * PANELS && num_rows > 0)
            copy_bulk(target + lane * PANEL_BYTES, cache + panel_offset(page, lane, token), num_rows * 128, barrier);
#else
#pragma unroll
        for (int panel = 0; panel < 2 * PANELS; ++panel)
            for (int i = lane; i < num_rows * 8; i += 32)
                copy_async_16(target + panel * PANEL_BYTES + i * 16, cache + panel_offset(page, panel, token) + i * 8);
        copy_async_commit();
#endif
    }
    // Element index of a token's row, before the swizzle, in a panel: 0 .. PANELS - 1 of K, then those of V.
    MEMBER u64 panel_offset(int page, int panel, int token) const {
        const u64 tile = ((static_cast<u64>(page) * 2 + panel / PANELS) * num_kv_heads + head) * PANELS + panel % PANELS;
        return (tile * PAGE + token % PAGE) * 64;
    }
    MEMBER void skip() const {
#if __CUDA_ARCH__ < 900
        copy_async_commit();  // waits count groups
#endif
    }
    MEMBER void wait() const {
#if __CUDA_ARCH__ >= 900
        mbarrier_wait(barriers + 8 * slot, parity);
#else
        copy_async_wait<RING_SLOTS - 1>();
        __syncwarp();
#endif
    }
    MEMBER void advance() {
        if (++slot == RING_SLOTS) slot = 0, parity ^= 1;
    }
};

// Ordinary accesses to ring memory are over before copies write it again: every thread, then a barrier.
DEVICE void before_copies() {
#if __CUDA_ARCH__ >= 900
    fence_proxy_async();
#endif
}

DEVICE void fetch_slice(Ring& ring, const Sequence& sequence, int target_slot, int token, int end) {
    if (token < end)
        ring.fetch(target_slot, token, min(SLICE, sequence.position - token));
    else
        ring.skip();
}

// Starts a split: all slots of an empty ring.
DEVICE void fill_ring(Ring& ring, const Sequence& sequence, int split, int warp) {
    for (int i = 0; i < RING_SLOTS; ++i) {
        const int slot = ring.slot + i < RING_SLOTS ? ring.slot + i : ring.slot + i - RING_SLOTS;
        fetch_slice(ring, sequence, slot, sequence.begin(split) + SLICE * (warp + i * WARPS), sequence.end(split));
    }
}

// A warp's share of a split. Lane 4g + t has rows g (index 0) and g + 8 (1).
struct Sums {
    float o[2 * STEPS][4];  // per 8 columns: columns 2t, 2t + 1 of row g, then of row g + 8
    float top[2];           // largest score so far, in units of ln 2
    float sum[2];           // of the probabilities over 2^top; this lane's columns of them
};

// Puts the new token into its slice and zeroes V where it is not visible: those rows hold anything, even NaN.
DEVICE void patch_slice(u8* slot, const Element* new_token, int token, const Sequence& sequence, int lane) {
    for (int i = lane; i < SLICE * CHUNKS; i += 32) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        uint4* k = reinterpret_cast<uint4*>(slot + tile_offset(row, chunk));
        uint4* v = reinterpret_cast<uint4*>(slot + PANELS * PANEL_BYTES + tile_offset(row, chunk));
        if (token + row == sequence.position) {
            *k = *reinterpret_cast<const uint4*>(new_token + 8 * chunk);
            *v = *reinterpret_cast<const uint4*>(new_token + PADDED_DIM + 8 * chunk);
        } else if (!sequence.is_visible(token + row)) {
            *v = make_uint4(0, 0, 0, 0);
        }
    }
}

// A fragments of the queries: all of them, or read step by step.
struct Query {
    u32 tile;  // shared address
    u32 fragments[QUERY_IN_REGISTERS ? STEPS : 1][4];

    MEMBER void read(u32 (&a)[4], int step, int lane) const { ldmatrix_x4(a, tile + tile_offset(lane % 16, 2 * step + lane / 16)); }
    MEMBER void read_all(int lane) {
        if constexpr (QUERY_IN_REGISTERS) {
#pragma unroll
            for (int step = 0; step < STEPS; ++step) read(fragments[step], step, lane);
        }
    }
    MEMBER void fragment(u32 (&a)[4], int step, int lane) const {
        if constexpr (QUERY_IN_REGISTERS) {
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = fragments[step][i];
        } else {
            read(a, step, lane);
        }
    }
};

// s: scores of tokens 2t, 2t + 1 (s[0]) and 8 more (s[1]), rows g and g + 8; keys: shared address of a slice.
DEVICE void score_slice(float (&s)[2][4], const Query& q, u32 keys, int lane) {
    float odd[2][4] = {};  // two chains of products
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        u32 b[4];  // tokens 0-7 with columns 0-7, 8-15, then tokens 8-15
        ldmatrix_x4(b, keys + tile_offset(lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
        u32 a[4];
        q.fragment(a, step, lane);
        float (&d)[2][4] = step % 2 ? odd : s;
        mma_m16n8k16(d[0], a[0], a[1], a[2], a[3], b[0], b[1]);
        mma_m16n8k16(d[1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i / 4][i % 4] += odd[i / 4][i % 4];
}

// Scores to probabilities over 2^top, as the A fragment of the product with V.
DEVICE void softmax_slice(Sums& sums, const float (&s)[2][4], u32 (&p)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if (h >= ROW_HALVES) {
            p[h] = p[2 + h] = 0;
            continue;
        }
        float top = fmaxf(fmaxf(s[0][2 * h], s[0][2 * h + 1]), fmaxf(s[1][2 * h], s[1][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        top = fmaxf(top, sums.top[h]);
        const float rescale = exp2_approximate(sums.top[h] - top);
        sums.top[h] = top;
        p[h] = from_float2(exp2_approximate(s[0][2 * h] - top), exp2_approximate(s[0][2 * h + 1] - top));
        p[2 + h] = from_float2(exp2_approximate(s[1][2 * h] - top), exp2_approximate(s[1][2 * h + 1] - top));
        const float2 a = to_float2(p[h]), b = to_float2(p[2 + h]);
        sums.sum[h] = sums.sum[h] * rescale + ((a.x + a.y) + (b.x + b.y));
#pragma unroll
        for (int n = 0; n < 2 * STEPS; ++n) sums.o[n][2 * h] *= rescale, sums.o[n][2 * h + 1] *= rescale;
    }
}

DEVICE void add_values(Sums& sums, const u32 (&p)[4], u32 values, int lane) {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        u32 b[4];  // columns 0-7 with tokens 0-7, 8-15, then columns 8-15
        ldmatrix_x4_transposed(b, values + tile_offset(lane % 16, 2 * step + lane / 16));
        mma_m16n8k16(sums.o[2 * step], p[0], p[1], p[2], p[3], b[0], b[1]);
        mma_m16n8k16(sums.o[2 * step + 1], p[0], p[1], p[2], p[3], b[2], b[3]);
    }
}

// This warp's slices of a split, whose first ones are in the ring or on their way; the ring is empty afterwards.
DEVICE void attend(Sums& sums, Ring& ring, const Sequence& sequence, int split, const Query& q,
                   const Element* new_token, int warp, int lane) {
    const float scale = LOG2_E * rsqrtf(static_cast<float>(HEAD_DIM));
    const int end = sequence.end(split);
    for (int token = sequence.begin(split) + SLICE * warp; token < end; token += SLICE * WARPS) {
        ring.wait();
        u8* slot = ring.slots + ring.slot * SLOT_BYTES;
        const bool is_edge = sequence.is_edge(token);
        if (is_edge) {
            patch_slice(slot, new_token, token, sequence, lane);
            __syncwarp();
        }
        float s[2][4] = {};
        score_slice(s, q, shared_address(slot), lane);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const bool is_seen = !is_edge || sequence.is_visible(token + i / 4 * 8 + lane % 4 * 2 + i % 2);
            s[i / 4][i % 4] = is_seen ? s[i / 4][i % 4] * scale : minus_infinity();
        }
        u32 p[4];
        softmax_slice(sums, s, p);
        add_values(sums, p, shared_address(slot) + PANELS * PANEL_BYTES, lane);
        if (is_edge) before_copies();
        __syncwarp();
        fetch_slice(ring, sequence, ring.slot, token + RING_SLOTS * SLICE * WARPS, end);
        ring.advance();
    }
}

// A warp's sums to shared memory: o [ROWS][SUM_PITCH], stats [16] = (top, sum).
DEVICE void store_sums(const Sums& sums, float* o, float2* stats, int lane) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int h = 0; h < ROW_HALVES; ++h) {
        float sum = sums.sum[h];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int row = g + 8 * h;
        if (row >= ROWS) continue;
        if (t == 0) stats[row] = make_float2(sums.top[h], sum);
#pragma unroll
        for (int n = 0; n < 2 * STEPS; ++n)
            *reinterpret_cast<float2*>(o + row * SUM_PITCH + 8 * n + 2 * t) = make_float2(sums.o[n][2 * h], sums.o[n][2 * h + 1]);
    }
}

DEVICE void add_weighted(float4& sum, float weight, const float4& x) {
    sum.x += weight * x.x, sum.y += weight * x.y, sum.z += weight * x.z, sum.w += weight * x.w;
}

// Where this block's results go.
struct Output {
    Element* out;
    const Sink* sinks;
    int row, first_head, num_heads, pitch;

    MEMBER void store_pair(int column, float low, float high) const {
        const u64 offset = activation_offset<ACTIVATION_LANE_COLUMNS, ACTIVATION_TILED>(row, column, pitch);
        *reinterpret_cast<u32*>(out + offset) = from_float2(low, high);
    }
    // Columns 4 quad to 4 quad + 3 of a head; o and sum are over 2^top.
    MEMBER void store_quad(int head_row, int quad, float4 o, float top, float sum) const {
        const int head = first_head + head_row, column = 4 * quad;
        float scale = 1.0f;
#if HAS_SINKS
        const float sink = to_float(sinks[head]) * LOG2_E, highest = fmaxf(top, sink);
        scale = exp2_approximate(top - highest);
        sum = sum * scale + exp2_approximate(sink - highest);
#endif
        scale /= sum;
        if (column < HEAD_DIM) store_pair(head * HEAD_DIM + column, o.x * scale, o.y * scale);
        if (column + 2 < HEAD_DIM) store_pair(head * HEAD_DIM + column + 2, o.z * scale, o.w * scale);
    }
    MEMBER void store_zeros(int begin, int end) const {
        for (int i = begin + 2 * threadIdx.x; i < end; i += 2 * THREADS) store_pair(i, 0.0f, 0.0f);
    }
    // The columns that pad the rows.
    MEMBER void store_padding() const {
        constexpr int UNIT = ACTIVATION_LANE_COLUMNS == 8 ? 64 : 128;
        const int columns = num_heads * HEAD_DIM;
        store_zeros(columns, ACTIVATION_TILED ? (columns + UNIT - 1) / UNIT * UNIT : pitch);
    }
};

// One (sequence, kv head, row block)'s sums of its splits, before they are combined.
struct Partials {
    float* o;       // [num_splits][ROWS][COLUMNS]
    float2* stats;  // [num_splits][ROWS], (top, sum)
};

// Merges the warps' sums of one split: to the output if it is the only one, else to `partials`.
DEVICE void finish_split(const u8* rings, const float2 (&stats)[WARPS][16], const Partials& partials, const Output& output,
                         int split, int num_splits, int num_rows) {
    for (int i = threadIdx.x; i < num_rows * (COLUMNS / 4); i += THREADS) {
        const int row = i / (COLUMNS / 4), quad = i % (COLUMNS / 4);
        float top = stats[0][row].x;
#pragma unroll
        for (int w = 1; w < WARPS; ++w) top = fmaxf(top, stats[w][row].x);
        float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float weight = exp2_approximate(stats[w][row].x - top);
            const float* sums = reinterpret_cast<const float*>(rings + w * WARP_RING_BYTES);
            add_weighted(o, weight, *reinterpret_cast<const float4*>(sums + row * SUM_PITCH + 4 * quad));
            sum += weight * stats[w][row].y;
        }
        if (num_splits == 1) {
            output.store_quad(row, quad, o, top, sum);
            continue;
        }
        const int place = split * ROWS + row;
        *reinterpret_cast<float4*>(partials.o + static_cast<u64>(place) * COLUMNS + 4 * quad) = o;
        if (quad == 0) partials.stats[place] = make_float2(top, sum);
    }
}

// By the last block to arrive: weights [ROWS][MAX_SPLITS] and totals [ROWS] = (top, sum) are shared scratch.
DEVICE void combine_splits(const Partials& partials, const Output& output, float (&weights)[ROWS][MAX_SPLITS],
                           float2 (&totals)[ROWS], int num_splits, int num_rows) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int row = warp; row < num_rows; row += WARPS) {
        float2 stat = make_float2(minus_infinity(), 0.0f);
        if (lane < num_splits) stat = __ldcg(partials.stats + lane * ROWS + row);
        float top = stat.x;
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, distance));
        const float weight = exp2_approximate(stat.x - top), sum = warp_sum(weight * stat.y);
        if (lane < num_splits) weights[row][lane] = weight;
        if (lane == 0) totals[row] = make_float2(top, sum);
    }
    __syncthreads();
    constexpr int AHEAD = 8;  // loads in flight
    for (int i = threadIdx.x; i < num_rows * (COLUMNS / 4); i += THREADS) {
        const int row = i / (COLUMNS / 4), quad = i % (COLUMNS / 4);
        const float4* source = reinterpret_cast<const float4*>(partials.o) + row * (COLUMNS / 4) + quad;
        float4 o = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int first = 0; first < num_splits; first += AHEAD) {
            float4 part[AHEAD];
#pragma unroll
            for (int j = 0; j < AHEAD; ++j)
                if (first + j < num_splits) part[j] = __ldcg(source + (first + j) * ROWS * (COLUMNS / 4));
#pragma unroll
            for (int j = 0; j < AHEAD; ++j)
                if (first + j < num_splits) add_weighted(o, weights[row][first + j], part[j]);
        }
        output.store_quad(row, quad, o, totals[row].x, totals[row].y);
    }
}

// What of the new token's heads does not depend on the projection.
struct HeadConstants {
    HeadPairs q_norm, k_norm;
    Rotation rotation;
};

// The new token's heads: q to a swizzled tile of 16 rows, those from num_rows on zero; with_new_token: k and v, E [2][PADDED_DIM].
DEVICE void prepare_heads(u8* q_tile, Element* new_token, const float* row, const NormWeight* q_norm, const NormWeight* k_norm,
                          const HeadConstants& constants, float eps, float clip, float2 inverse_rms, int first_head, int num_rows,
                          int head, int num_kv_heads, bool with_new_token) {
    constexpr int MOST = (ROWS + 2 + WARPS - 1) / WARPS;  // heads of a warp: all are loaded before the first is used
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int k_base = round_up_16(num_kv_heads * QUERY_GROUP * HEAD_DIM), v_base = k_base + round_up_16(num_kv_heads * HEAD_DIM);
    const int count = num_rows + (with_new_token ? 2 : 0);
    HeadPairs heads[MOST];
#pragma unroll
    for (int j = 0; j < MOST; ++j) {
        const int i = warp + j * WARPS;
        if (i >= count) break;
        heads[j] = i < num_rows    ? load_pairs<ROPE_ORDER>(row + (first_head + i) * HEAD_DIM, lane)
                   : i == num_rows ? load_pairs<ROPE_ORDER>(row + k_base + head * HEAD_DIM, lane)
                                   : load_pairs<false>(row + v_base + head * HEAD_DIM, lane);
    }
#pragma unroll
    for (int j = 0; j < MOST; ++j) {
        const int i = warp + j * WARPS;
        if (i >= count) break;
        HeadPairs& x = heads[j];
        if (i < num_rows) {
            const HeadPairs weights = QK_NORM == 2 ? load_weights(q_norm + (first_head + i) * HEAD_DIM, lane) : constants.q_norm;
            rotate_head(x, weights, inverse_rms.x, eps, clip, constants.rotation);
            put_head(x, lane, [&](int column, Element value) {
                *reinterpret_cast<Element*>(q_tile + tile_offset(i, column / 8) + column % 8 * 2) = value;
            });
        } else {
            const bool is_key = i == num_rows;
            if (is_key) {
                const HeadPairs weights = QK_NORM == 2 ? load_weights(k_norm + head * HEAD_DIM, lane) : constants.k_norm;
                rotate_head(x, weights, inverse_rms.y, eps, clip, constants.rotation);
            } else {
                clamp_pairs(x, clip);
            }
            Element* target = new_token + (is_key ? 0 : PADDED_DIM);
            put_head(x, lane, [&](int column, Element value) { target[column] = value; });
        }
    }
    for (int i = threadIdx.x; i < (16 - num_rows) * CHUNKS; i += THREADS)
        *reinterpret_cast<uint4*>(q_tile + tile_offset(num_rows + i / CHUNKS, i % CHUNKS)) = make_uint4(0, 0, 0, 0);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_BLOCKS)
attention_decode(const float* qkv, int qkv_rows, const NormWeight* q_norm, const NormWeight* k_norm, float eps, float clip,
                 const float2* rope, const int* positions, const int* slots, const int* block_table, int max_pages,
                 Element* cache, int window, const Sink* sinks, Element* out, int out_pitch, float* partial_sums,
                 float2* partial_stats, int max_splits, int min_split_tokens, u32* arrived) {
    extern __shared__ __align__(128) u8 rings[];  // [WARPS][RING_SLOTS][SLOT_BYTES]
    __shared__ __align__(128) u8 q_tile[PANELS * PANEL_BYTES];
    __shared__ __align__(16) Element new_token[2 * PADDED_DIM];
    __shared__ float2 stats[WARPS][16];
    __shared__ float weights[ROWS][MAX_SPLITS];
    __shared__ float2 totals[ROWS];
    __shared__ u64 barriers[WARPS][RING_SLOTS];
    __shared__ u32 arrival;
    launch_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int num_kv_heads = gridDim.y / ROW_BLOCKS, head = blockIdx.y / ROW_BLOCKS, row_block = blockIdx.y % ROW_BLOCKS;
    const int first_head = head * QUERY_GROUP + 16 * row_block, num_rows = min(16, QUERY_GROUP - 16 * row_block);
    const Output output = {out, sinks, static_cast<int>(blockIdx.z), first_head, num_kv_heads * QUERY_GROUP, out_pitch};
#if !EARLY_READS
    wait_for_previous();
#endif
    const int position = __ldcg(positions + blockIdx.z);
    const Sequence sequence(position, window, min_split_tokens);
    const bool is_empty = position < 0;
    if (is_empty || static_cast<int>(blockIdx.x) >= sequence.num_splits) {
        wait_for_previous();
        if (!is_empty || blockIdx.x != 0) return;
        output.store_zeros(first_head * HEAD_DIM, (first_head + num_rows) * HEAD_DIM);
        if (blockIdx.y == gridDim.y - 1) output.store_padding();
        return;
    }
    const int* pages = block_table + static_cast<u64>(__ldcg(slots + blockIdx.z)) * max_pages;
    Ring ring = {rings + warp * WARP_RING_BYTES, shared_address(barriers[warp]), cache, pages, position / PAGE,
                 num_kv_heads, head, lane, 0, -32, 0, 0};
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
        for (int i = 0; i < RING_SLOTS; ++i) mbarrier_init(ring.barriers + 8 * i, 1);
        mbarrier_init_fence();
    }
    __syncwarp();
#endif
    fill_ring(ring, sequence, blockIdx.x, warp);
    const bool has_new_token = (sequence.num_splits - 1) % gridDim.x == blockIdx.x;  // takes the split of the last position
    const int new_page = has_new_token ? __ldcg(pages + position / PAGE) : 0;
    const HeadConstants constants = {load_weights(q_norm, lane), load_weights(k_norm, lane),
                                     Rotation(rope + static_cast<u64>(position) * HALF, lane)};
#if EARLY_READS
    wait_for_previous();
#endif
    const float* row = qkv + static_cast<u64>(blockIdx.z) * qkv_rows;
    float2 inverse_rms = make_float2(0.0f, 0.0f);
#if QK_NORM == 2
    __shared__ float2 scratch[WARPS];
    inverse_rms = full_inverse_rms<WARPS>(row, num_kv_heads * QUERY_GROUP * HEAD_DIM, num_kv_heads * HEAD_DIM, eps, scratch);
#endif
    prepare_heads(q_tile, new_token, row, q_norm, k_norm, constants, eps, clip, inverse_rms, first_head, num_rows, head,
                  num_kv_heads, has_new_token);
    __syncthreads();
    if (has_new_token && row_block == 0 && threadIdx.x < 2 * CHUNKS) {
        const int part = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        const u64 place = cache_offset(new_page, part, num_kv_heads, head, position % PAGE, chunk);
        *reinterpret_cast<uint4*>(cache + place) = *reinterpret_cast<const uint4*>(new_token + part * PADDED_DIM + 8 * chunk);
    }
    if (blockIdx.x == 0 && blockIdx.y == gridDim.y - 1) output.store_padding();
    Query q;
    q.tile = shared_address(q_tile);
    q.read_all(lane);
    const u64 place = static_cast<u64>(blockIdx.z) * gridDim.y + blockIdx.y;
    const Partials partials = {partial_sums + place * max_splits * ROWS * COLUMNS, partial_stats + place * max_splits * ROWS};
    for (int split = blockIdx.x; split < sequence.num_splits; split += gridDim.x) {
        Sums sums = {};
        sums.top[0] = sums.top[1] = minus_infinity();
        attend(sums, ring, sequence, split, q, new_token, warp, lane);
        store_sums(sums, reinterpret_cast<float*>(ring.slots), stats[warp], lane);
        __syncthreads();
        finish_split(rings, stats, partials, output, split, sequence.num_splits, num_rows);
        if (sequence.num_splits == 1) return;
        before_copies();
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            arrival = atomicInc(arrived + place, sequence.num_splits - 1);  // back to zero with the last
            __threadfence();
        }
        if (split + static_cast<int>(gridDim.x) < sequence.num_splits) fill_ring(ring, sequence, split + gridDim.x, warp);
        __syncthreads();
        if (static_cast<int>(arrival) == sequence.num_splits - 1)
            combine_splits(partials, output, weights, totals, sequence.num_splits, num_rows);
    }
}
