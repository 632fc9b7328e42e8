// gemm_wgmma: Y[N tokens][M rows] = X[N][K] W[M][K]^T for many tokens, by wgmma with the weights in registers (sm_90a).
//
// A block has ROW_GROUPS consumer warpgroups of 64 rows, all over the same TILE_TOKENS tokens, and four producer warps that
// fill a ring of STAGES slots of STAGE_PANELS * 64 columns by 1-D bulk copies: weights as they lie in their pages,
// activations as the "tiled" layout has them. Blocks stay and go from tile to tile.
//
// SPLIT 0: a tile is one block's, over all of K. Tiles go in bands of `token_band` token tiles, rows outermost within one.
// With PARTS above 1 (EPILOGUE 1, 8 stages a part or more) as many blocks share a tile's columns and add to y in turn, so that
// few large tiles do for all multiprocessors. Every block must be resident at once.
// SPLIT 1: at most TILE_TOKENS tokens, of a matrix with too few tiles to read it by all multiprocessors. All stages of the
// matrix, row tile by row tile, are one sequence that is cut into equal ranges, one per block; the block with a tile's first
// stage owns it. The others have its stages at the start of their ranges, so their sums are in `partials` before the owner asks
// for them. Every block must be resident at once.
//
// grid: (at most the number of SMs). block: THREADS. Dynamic shared memory: SHARED_BYTES.
//
// weights      u8 [row_blocks][steps][STEP_BYTES]           16-byte aligned
// activations  E [Kp/64][tokens_padded][64]                 "tiled" layout, 16-byte aligned; anything beyond the tokens
// bias         BIAS_F32 ? float : E [16 * row_blocks]       or null
// EPILOGUE 0   y: float [num_tokens][y_pitch] = acc + bias, rows below y_columns; 16-byte aligned, pitch and columns multiples
//              of 4 unless Y_SCALAR
// EPILOGUE 1   y: float [num_tokens][y_pitch] += acc + bias, likewise
// EPILOGUE 2   rows in pair8 order; y: E, "tiled" layout of the product that follows (Y_LANE_COLUMNS, y_pitch tokens, y_columns
//              its Kp), column 8b + g = activation(gate row g, up row g + 8) of row block b; zeros beyond 8 * row_blocks
// EPILOGUE 3   y: queries, q of qkv_post.cu, for a fused projection of y_columns = ceil16(q) + 2 ceil16(k) rows; gemm_qkv.cuh
// partials     SPLIT: float4 [gridDim.x][ROW_GROUPS][TILE_TOKENS / 8][128]
// flags        SPLIT: u32 [gridDim.x][ROW_GROUPS], PARTS above 1: [tiles][ROW_GROUPS]; zero before and after
//
// Numerics: FP32 accumulation in column order, whatever the tile: what a token gets depends on no other. With SPLIT the ranges
// of a tile are added in order, which depends on gridDim.x too; with PARTS each part is added to y, in order.
#define WGMMA_N TILE_TOKENS
#include "activation.cuh"
#include "codec.cuh"
#include "epilogue.cuh"

constexpr int GROUP_THREADS = 128;
constexpr int CONSUMER_WARPS = 4 * ROW_GROUPS;  // one row block each
constexpr int PRODUCER_WARPS = 4;
constexpr int THREADS = 32 * (CONSUMER_WARPS + PRODUCER_WARPS);
// Registers of a thread: together what the launch allots, 168 for each of 3 warpgroups, 128 for each of 4.
constexpr int PRODUCER_REGISTERS = ROW_GROUPS == 3 ? 56 : 40;
constexpr int CONSUMER_REGISTERS = ROW_GROUPS == 3 ? 152 : 232;

constexpr int STAGE_COLUMNS = 64 * STAGE_PANELS;
constexpr int STAGE_STEPS = STAGE_COLUMNS / STEP_COLUMNS;
constexpr int PANEL_PRODUCTS = 4;  // wgmma of 16 columns each
constexpr int GROUP_PANELS = CODEC_MXFP4 ? 1 : STAGE_PANELS;  // whose products are started together; decoding takes registers
constexpr int GROUPS = STAGE_PANELS / GROUP_PANELS;           // of a stage
constexpr int SETS = ROW_GROUPS == 3 && TILE_TOKENS > (EPILOGUE == 3 ? 144 : 176) ? 1 : 2;  // of A fragments, as registers allow
constexpr int PANEL_BYTES = TILE_TOKENS * 128;
constexpr int WEIGHT_BYTES = STAGE_STEPS * STEP_BYTES;  // of a row block and stage
constexpr int WEIGHTS_OFFSET = STAGE_PANELS * PANEL_BYTES;
constexpr int SLOT_BYTES = (WEIGHTS_OFFSET + CONSUMER_WARPS * WEIGHT_BYTES + 1023) / 1024 * 1024;
static_assert(STAGE_STEPS * STEP_COLUMNS == STAGE_COLUMNS, "a stage is whole steps");
static_assert(STAGE_PANELS == 1 || (STAGE_PANELS == 2 && WHOLE_STAGES), "the last stage may have half a panel, but not one of two");
static_assert(PANEL_BYTES % 1024 == 0 && WEIGHT_BYTES % 16 == 0, "swizzle groups and bulk copies stay aligned");
static_assert(PARTS == 1 || (!SPLIT && EPILOGUE == 1), "parts are added to y");
static_assert(STAGES >= 2, "a slot is free once the next stage's products are on their way");

// Results go in slices of 8 tokens, and pass through shared memory: with EPILOGUE 2 a warpgroup's 32 columns of all tokens at
// once, else a warp's 16 rows of a slice, in two buffers. EPILOGUE 3: gemm_qkv.cuh.
constexpr int SLICES = TILE_TOKENS / 8;
#if EPILOGUE == 2
constexpr int STAGING_WORDS = TILE_TOKENS * 16;  // of a warpgroup
#elif EPILOGUE == 3
constexpr int STAGING_WORDS = STAGED_BYTES / 4 / ROW_GROUPS;
#else
constexpr int SLICE_PITCH = 20;  // words of a token: 16 rows, and 4 so that a warp's stores meet no bank twice
constexpr int STAGING_WORDS = 4 * 2 * 8 * SLICE_PITCH;
#endif
constexpr int STAGING_OFFSET = STAGES * SLOT_BYTES;
constexpr int BARRIERS_OFFSET = STAGING_OFFSET + ROW_GROUPS * STAGING_WORDS * 4;
constexpr int SHARED_BYTES = BARRIERS_OFFSET + 2 * STAGES * 8;
static_assert(SHARED_BYTES <= 227 * 1024, "what a block can have");
#ifdef PLAN_SHARED_BYTES
static_assert(SHARED_BYTES == PLAN_SHARED_BYTES && THREADS == PLAN_THREADS, "runtime/gemm_plan.py says the same");
#endif
static_assert(TILE_TOKENS % 8 == 0 && BARRIERS_OFFSET % 16 == 0);

// One tile, or a range of its stages.
struct Tile {
    int row_tile;
    int token;  // the first
    int begin, end;
    int part, number;  // with PARTS; number: among the tiles
};

struct Matrix {
    const u8* weights;
    const u8* activations;
    int row_blocks, steps, stages, tokens_padded, num_tokens;

    MEMBER int stage_steps(int stage) const { return WHOLE_STAGES ? STAGE_STEPS : min(STAGE_STEPS, steps - stage * STAGE_STEPS); }
    // Groups of 8 tokens, which tokens_padded has whole.
    MEMBER int tile_slices(const Tile& tile) const { return min(SLICES, (num_tokens + 7) / 8 - tile.token / 8); }
};

#if SPLIT
// First of a block's stages among all: ranges differ by at most one stage.
DEVICE u32 range_begin(u32 total, u32 block) { return block * (total / gridDim.x) + min(block, total % gridDim.x); }

struct Schedule {
    int row_tiles, token_tiles, token_band, stages;
    u32 position = range_begin(total(), blockIdx.x);

    MEMBER u32 total() const { return row_tiles * stages; }
    MEMBER bool pop(Tile& tile) {
        const u32 stop = range_begin(total(), blockIdx.x + 1);
        if (position >= stop) return false;
        tile.row_tile = position / stages, tile.token = 0;
        tile.begin = position % stages, tile.end = min(stages, tile.begin + static_cast<int>(stop - position));
        position += tile.end - tile.begin;
        return true;
    }
};
#else
constexpr int PART_LAG = 4 / STAGE_PANELS;  // stages that a part has more than the one before: what adding to y takes

struct Schedule {
    int row_tiles, token_tiles, token_band, stages;
    int next = blockIdx.x;

    MEMBER int part_begin(int part) const { return stages * part / PARTS - PART_LAG * part * (PARTS - part) / 2; }
    MEMBER bool pop(Tile& tile) {
        const int tiles = row_tiles * token_tiles;
        if (next >= PARTS * tiles) return false;
        tile.part = PARTS > 1 ? next / tiles : 0, tile.number = PARTS > 1 ? next % tiles : next;
        const int band = tile.number / (token_band * row_tiles), place = tile.number % (token_band * row_tiles);
        const int width = min(token_band, token_tiles - band * token_band);
        tile.row_tile = place / width, tile.token = (band * token_band + place % width) * TILE_TOKENS;
        tile.begin = part_begin(tile.part), tile.end = part_begin(tile.part + 1);
        next += gridDim.x;
        return true;
    }
};
#endif

struct Ring {
    u32 slots, barriers;  // barriers: STAGES full, STAGES empty
    int slot;
    u32 parity;

    MEMBER u32 full(int i) const { return barriers + 8 * i; }
    MEMBER u32 empty(int i) const { return barriers + 8 * (STAGES + i); }
    MEMBER void advance(int by = 1) {
        if ((slot += by) >= STAGES) slot -= STAGES, parity ^= 1;
    }
    MEMBER void initialize() const {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(full(i), 1);
            mbarrier_init(empty(i), CONSUMER_WARPS);
        }
        mbarrier_init_fence();
    }
    MEMBER void release(int i, int lane) const {
        if (lane == 0) mbarrier_arrive(empty(i));
    }
};

// ---- producers ------------------------------------------------------------------------------------------------------

// A warp issues one copy in about 100 cycles, so several take turns with the stages. As none has more stages to go than there
// are slots, none is a lap behind the others.
constexpr int PRODUCERS = PRODUCER_WARPS < STAGES ? PRODUCER_WARPS : STAGES;

struct Producer {
    int warp, lane;

    MEMBER void run(const Matrix& m, Ring ring, Schedule schedule) const {
        Tile tile;
        ring.slot = warp;
        int early = 0;  // of this warp's stages, fetched but for the activations, which do not exist yet
        Schedule first = schedule;
        for (int skipped = warp; warp + early * PRODUCERS < STAGES && first.pop(tile);) {
            int stage = tile.begin + skipped;
            for (; stage < tile.end && warp + early * PRODUCERS < STAGES; stage += PRODUCERS, ++early)
                fetch<true, false>(m, ring, warp + early * PRODUCERS, tile, stage);
            skipped = stage - tile.end;
        }
        wait_for_previous();
        for (int skipped = warp; schedule.pop(tile);) {
            int stage = tile.begin + skipped;
            for (; stage < tile.end; stage += PRODUCERS, ring.advance(PRODUCERS)) {
                if (early > 0) {
                    --early;
                    fetch<false, true>(m, ring, ring.slot, tile, stage);
                } else {
                    mbarrier_wait(ring.empty(ring.slot), ring.parity ^ 1);
                    fetch<true, true>(m, ring, ring.slot, tile, stage);
                }
            }
            skipped = stage - tile.end;
        }
    }

    // A lane copies a stage's steps of one row block, or one panel of the activations. With the weights both are announced.
    template <bool WEIGHTS, bool ACTIVATIONS>
    MEMBER void fetch(const Matrix& m, const Ring& ring, int slot, const Tile& tile, int stage) const {
        const bool is_weights = lane < CONSUMER_WARPS;
        const int row_block = tile.row_tile * CONSUMER_WARPS + lane, panel = lane - CONSUMER_WARPS;
        const bool exists = is_weights ? row_block < m.row_blocks : panel < STAGE_PANELS;
        const int bytes = !exists ? 0 : is_weights ? m.stage_steps(stage) * STEP_BYTES : m.tile_slices(tile) * 1024;
        const u32 barrier = ring.full(slot);
        if (WEIGHTS) {
            const u32 announced = __reduce_add_sync(~0u, bytes);
            if (lane == 0) mbarrier_arrive_expect(barrier, announced);
            __syncwarp();
        }
        if (bytes == 0 || !(is_weights ? WEIGHTS : ACTIVATIONS)) return;
        const u64 step = static_cast<u64>(row_block) * m.steps + stage * STAGE_STEPS;
        const u64 row = static_cast<u64>(stage * STAGE_PANELS + panel) * m.tokens_padded + tile.token;
        const u8* source = is_weights ? m.weights + step * STEP_BYTES : m.activations + row * 128;
        const u32 target = is_weights ? WEIGHTS_OFFSET + lane * WEIGHT_BYTES : panel * PANEL_BYTES;
        copy_bulk(ring.slots + slot * SLOT_BYTES + target, source, bytes, barrier);
    }
};

// ---- consumers ------------------------------------------------------------------------------------------------------

typedef float Sums[TILE_TOKENS / 2];  // of one thread: registers 4j + (0, 1, 2, 3) as mma.m16n8k16 has tokens 8j to 8j + 7

// A fragments of a warp's row block for one panel of a stage; zero beyond the stage's last step, where the panel is zero too.
DEVICE void load_panel(u32 (&a)[PANEL_PRODUCTS][4], const u8* weights, int panel, int num_steps, int lane) {
    constexpr int STEPS = STEP_PRODUCTS < PANEL_PRODUCTS ? PANEL_PRODUCTS / STEP_PRODUCTS : 1;
    constexpr int PRODUCTS = PANEL_PRODUCTS / STEPS;  // of one step; MXFP4: half of its
    const int first = panel * PANEL_PRODUCTS;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const int step = first / STEP_PRODUCTS + i;
        StepFragment fragment = {};
        if (step < num_steps) fragment = load_step(weights + step * STEP_BYTES, lane);
#pragma unroll
        for (int q = 0; q < PRODUCTS; ++q) a_fragment(a[i * PRODUCTS + q], fragment, first % STEP_PRODUCTS + q);
    }
}

typedef u32 GroupFragments[GROUP_PANELS][PANEL_PRODUCTS][4];

// Starts acc += a b for a group of panels.
DEVICE void multiply(Sums& acc, const GroupFragments& a, u32 panels) {
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < GROUP_PANELS; ++panel) {
        const u64 b = swizzled_descriptor(panels + panel * PANEL_BYTES, 16, 1024);
#pragma unroll
        for (int i = 0; i < PANEL_PRODUCTS; ++i) wgmma(acc, a[panel][i], b + 2 * i);  // 16 columns are 32 bytes of a row
    }
    wgmma_commit();
}

// The sums of a tile's stages. One group's products run while the next one's A fragments are loaded, into two sets of registers
// in turn; with one set those of other warpgroups do.
DEVICE void accumulate(Sums& acc, const Matrix& m, Ring& ring, const u8* weights, const Tile& tile, int lane) {
    GroupFragments a[SETS];
#pragma unroll
    for (int i = 0; i < TILE_TOKENS / 2; ++i) acc[i] = 0.0f;
    pin_registers(acc);
    int stage = tile.begin, group = 0, before = -1;  // group of the stage; slot of the stage before
    auto load = [&](GroupFragments& set) {
        if (group == 0) mbarrier_wait(ring.full(ring.slot), ring.parity);
#pragma unroll
        for (int i = 0; i < GROUP_PANELS; ++i)
            load_panel(set[i], weights + ring.slot * SLOT_BYTES, group * GROUP_PANELS + i, m.stage_steps(stage), lane);
    };
    load(a[0]);
    while (stage < tile.end) {
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
            multiply(acc, a[set], ring.slots + ring.slot * SLOT_BYTES + group * GROUP_PANELS * PANEL_BYTES);
            wgmma_wait<SETS - 1>();  // the group before, with one set this one
            if (SETS > 1 && group == 0 && before >= 0) ring.release(before, lane);
            if (++group == GROUPS) {
                group = 0, before = ring.slot;
                if (SETS == 1) ring.release(before, lane);
                ring.advance();
                if (++stage == tile.end) break;
            }
            load(a[(set + 1) % SETS]);
        }
    }
    wgmma_wait<0>();
    pin_registers(acc);
    if (SETS > 1) ring.release(before, lane);
}

#if SPLIT
struct Exchange {
    float4* partials;
    u32* flags;
    int group, thread;  // warpgroup of the block, thread of the warpgroup

    MEMBER u64 place(u32 block) const { return block * ROW_GROUPS + group; }
    MEMBER float4* part(u64 place, int slice) const { return partials + (place * SLICES + slice) * GROUP_THREADS + thread; }

    MEMBER void give(const Sums& acc) const {
        const u64 mine = place(blockIdx.x);
#pragma unroll
        for (int i = 0; i < SLICES; ++i) *part(mine, i) = make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
        __threadfence();
        named_barrier(1 + group, GROUP_THREADS);
        if (thread == 0) store_release(flags + mine, 1);
    }

    // Adds what the following blocks have of the tile that ends before stage `end` of `total`; leaves their flags at zero.
    MEMBER void take(Sums& acc, u32 total, u32 end) const {
        for (u32 other = blockIdx.x + 1; range_begin(total, other) < end; ++other) {
            if (range_begin(total, other) == range_begin(total, other + 1)) continue;  // it has no stages
            const u64 its = place(other);
            if (thread % 32 == 0) {
                while (load_acquire(flags + its) == 0) {}
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < SLICES; ++i) {
                const float4 p = __ldcg(part(its, i));
                acc[4 * i] += p.x, acc[4 * i + 1] += p.y, acc[4 * i + 2] += p.z, acc[4 * i + 3] += p.w;
            }
        }
        named_barrier(1 + group, GROUP_THREADS);
        if (thread != 0) return;
        for (u32 other = blockIdx.x + 1; range_begin(total, other) < end; ++other) store_release(flags + place(other), 0);
    }
};
#endif

#if PARTS > 1
// Whose turn it is to add to a warpgroup's part of a tile.
struct Turns {
    u32* flag;
    int group, thread;  // warpgroup of the block, thread of the warpgroup

    MEMBER void wait(u32 part) const {
        if (part == 0) return;
        if (thread == 0) {
            while (load_acquire(flag) != part) {}
        }
        named_barrier(1 + group, GROUP_THREADS);
    }
    MEMBER void pass(u32 part) const {
        __threadfence();
        named_barrier(1 + group, GROUP_THREADS);
        if (thread == 0) store_release(flag, part + 1 < PARTS ? part + 1 : 0);
    }
};
#endif

// ---- epilogues ------------------------------------------------------------------------------------------------------

struct Output {
    void* y;
    int pitch, columns, num_tokens;
    const void* bias;
    float limit;
    u32* staging;       // of this warpgroup
    int group, thread;  // warpgroup of the block, thread of the warpgroup
};

// Stores a tile. A lane's part d of a slice: rows g (registers 0, 1) and g + 8 (2, 3) of tokens 2t, 2t + 1.
#if EPILOGUE == 2
// Row g is a gate, g + 8 its up value. The staging buffer has 16 words a token: with LANE_COLUMNS 8 four chunks as they lie in
// the output, chunk g / 2 with a word of each warp; with 32 a chunk of each warp, its columns in order. A token's words, or
// chunks, are rotated by half its number, so that a warp's stores meet no bank twice.
struct Store {
    const Output& out;
    int first_column, first_token;  // of the warpgroup and the tile
    float gate_bias, up_bias;
    bool exists, odd;  // odd: g
    u32* mine;

    MEMBER Store(const Matrix& m, const Output& out, const Tile& tile) : out(out), first_token(tile.token) {
        const int lane = out.thread % 32, warp = out.thread / 32, g = lane / 4, t = lane % 4;
        const int first = tile.row_tile * CONSUMER_WARPS + 4 * out.group, row_block = first + warp;
        first_column = 8 * first, exists = row_block < m.row_blocks, odd = g % 2;
        gate_bias = exists ? bias_of(out.bias, 16 * row_block + g) : 0.0f;
        up_bias = exists ? bias_of(out.bias, 16 * row_block + g + 8) : 0.0f;
        mine = out.staging + (Y_LANE_COLUMNS == 8 ? 4 * (g / 2) + (warp + t) % 4 : 4 * ((warp + t) % 4) + g / 2) + 16 * (2 * t + odd);
        named_barrier(1 + out.group, GROUP_THREADS);  // the buffer is free
    }
    // Lanes g and g ^ 1 swap, so that the even one has both columns of the first token, the odd one of the second.
    template <bool IS_LIMITED>
    MEMBER void stage(int slice, const float* d) const {
        const float first = activation<IS_LIMITED>(d[0] + gate_bias, d[2] + up_bias, out.limit);
        const float second = activation<IS_LIMITED>(d[1] + gate_bias, d[3] + up_bias, out.limit);
        const float other = __shfl_xor_sync(~0u, odd ? first : second, 4);
        const u32 pair = odd ? from_float2(other, second) : from_float2(first, other);
        mine[8 * 16 * slice] = exists ? pair : 0;
    }
    template <bool IS_LIMITED>
    MEMBER void stage_all(const Sums& acc) const {
#pragma unroll
        for (int i = 0; i < SLICES; ++i) stage<IS_LIMITED>(i, acc + 4 * i);
    }
    MEMBER void run(const Sums& acc) const {
        if (out.limit > 0.0f)
            stage_all<true>(acc);
        else
            stage_all<false>(acc);
        named_barrier(1 + out.group, GROUP_THREADS);
        if (first_column >= out.columns) return;
        const int by = out.thread / 8 % 4;  // half of a token's number, for all of this thread's
#pragma unroll 4
        for (int piece = out.thread; piece < 32 * SLICES; piece += GROUP_THREADS) {
            const int n = first_token + piece / 4;
            if (n >= out.num_tokens) break;
            put(n, piece % 4, by, *reinterpret_cast<const uint4*>(out.staging + 4 * piece));
        }
    }
    MEMBER void put(int n, int chunk, int by, const uint4& v) const {
        if constexpr (Y_LANE_COLUMNS == 8) {
            const uint4 w = by & 2 ? make_uint4(v.z, v.w, v.x, v.y) : v;
            const u64 row = static_cast<u64>(first_column / 64) * out.pitch + n;
            *(static_cast<uint4*>(out.y) + row * 8 + ((first_column % 64 / 8 + chunk) ^ (n & 7))) =
                by & 1 ? make_uint4(w.y, w.z, w.w, w.x) : w;
        } else {
            const u32 words[4] = {v.x, v.y, v.z, v.w};
            const int column = first_column + 8 * ((chunk - by) & 3);
#pragma unroll
            for (int pair = 0; pair < 4; ++pair) {
                const u64 offset = tiled_offset<Y_LANE_COLUMNS>(n, column + 2 * pair, out.pitch);
                *reinterpret_cast<u32*>(static_cast<Element*>(out.y) + offset) = words[pair];
            }
        }
    }
};
#elif EPILOGUE == 3
#include "gemm_qkv.cuh"
static_assert(TEAMS * TEAM_WORDS == ROW_GROUPS * STAGING_WORDS, "runtime/gemm_plan.py says the same");
#else
// Each warp for itself; a lane stores four rows of a token of each slice.
struct Store {
    const Output& out;
    float* y;
    int num_rows, num_tokens;  // from this lane's on
    float low_bias, high_bias;
    float *target, *source;  // in the first buffer

    MEMBER Store(const Matrix& m, const Output& out, const Tile& tile) : out(out) {
        const int lane = out.thread % 32, warp = out.thread / 32, g = lane / 4, t = lane % 4, piece = lane % 4, token = lane / 4;
        const int row_block = tile.row_tile * CONSUMER_WARPS + 4 * out.group + warp, row = 16 * row_block + 4 * piece;
        const bool has_bias = row_block < m.row_blocks && (PARTS == 1 || tile.part == 0);
        low_bias = has_bias ? bias_of(out.bias, 16 * row_block + g) : 0.0f;
        high_bias = has_bias ? bias_of(out.bias, 16 * row_block + g + 8) : 0.0f;
        num_rows = out.columns - row, num_tokens = num_rows > 0 ? out.num_tokens - tile.token - token : 0;
        y = static_cast<float*>(out.y) + static_cast<u64>(tile.token + token) * out.pitch + row;
        float* buffer = reinterpret_cast<float*>(out.staging) + warp * 2 * 8 * SLICE_PITCH;
        target = buffer + 2 * t * SLICE_PITCH + g, source = buffer + token * SLICE_PITCH + 4 * piece;
    }
    MEMBER void slice(int slice, const float* d) const {
        float* p = target + slice % 2 * 8 * SLICE_PITCH;
        p[0] = d[0] + low_bias, p[SLICE_PITCH] = d[1] + low_bias;
        p[8] = d[2] + high_bias, p[SLICE_PITCH + 8] = d[3] + high_bias;
        __syncwarp();
        if (8 * slice < num_tokens)
            put(y + static_cast<u64>(8 * slice) * out.pitch,
                *reinterpret_cast<const float4*>(source + slice % 2 * 8 * SLICE_PITCH));
    }
    // With EPILOGUE 1 memory adds by itself: one rounding, subnormal sums are zero.
    MEMBER void put(float* place, const float4& v) const {
#if Y_SCALAR  // for y_pitch or y_columns that are no multiples of 4
        const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < num_rows) put_one(place + i, values[i]);
#else
        put_one(place, v);
#endif
    }
    template <typename Value>
    MEMBER void put_one(float* place, const Value& v) const {
#if EPILOGUE == 1
        add_global(place, v);
#else
        *reinterpret_cast<Value*>(place) = v;
#endif
    }
    MEMBER void run(const Sums& acc) const {
#pragma unroll
        for (int i = 0; i < SLICES; ++i) slice(i, acc + 4 * i);
        __syncwarp();  // the buffers are free
    }
};
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1)
gemm_wgmma(const u8* weights, int row_blocks, int steps, const u8* activations, int tokens_padded, int num_tokens, void* y,
           int y_pitch, int y_columns, const void* bias, float limit, int token_band, float4* partials, u32* flags
#if EPILOGUE == 3
           , const NormWeight* q_norm, const NormWeight* k_norm, float eps, float clip, const float2* rope, const int* positions,
           const int* slots, const int* block_table, int max_pages, int num_heads, int num_kv_heads, Element* cache
#endif
) {
    extern __shared__ __align__(1024) u8 shared[];
    launch_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int stages = (steps + STAGE_STEPS - 1) / STAGE_STEPS;
    const Matrix m = {weights, activations, row_blocks, steps, stages, tokens_padded, num_tokens};
    Ring ring = {shared_address(shared), shared_address(shared) + BARRIERS_OFFSET, 0, 0};
    if (threadIdx.x == 0) ring.initialize();
    __syncthreads();

    const int blocks = EPILOGUE == 2 ? max(row_blocks, y_columns / 8) : row_blocks;  // zeros beyond the stored rows
    const int row_tiles = (blocks + CONSUMER_WARPS - 1) / CONSUMER_WARPS;
    Schedule schedule = {row_tiles, (num_tokens + TILE_TOKENS - 1) / TILE_TOKENS, token_band, stages};
    if (warp >= CONSUMER_WARPS) {
        if constexpr (ROW_GROUPS > 1) lower_registers<PRODUCER_REGISTERS>();
        if (warp - CONSUMER_WARPS < PRODUCERS) Producer{warp - CONSUMER_WARPS, lane}.run(m, ring, schedule);
        return;
    }
    if constexpr (ROW_GROUPS > 1) raise_registers<CONSUMER_REGISTERS>();
    wait_for_previous();
    const int group = warp / 4, thread = threadIdx.x % GROUP_THREADS;
    const Output out = {y, y_pitch, EPILOGUE == 2 ? y_columns : min(y_columns, 16 * row_blocks), num_tokens, bias, limit,
                        reinterpret_cast<u32*>(shared + STAGING_OFFSET) + group * STAGING_WORDS, group, thread};
#if EPILOGUE == 3
    const Heads heads = {q_norm, k_norm, eps, clip, rope, positions, slots, block_table, max_pages, num_heads, num_kv_heads,
                         static_cast<Element*>(y), cache};
    Team team(heads, reinterpret_cast<u32*>(shared + STAGING_OFFSET), warp / TEAM_WARPS, threadIdx.x % TEAM_THREADS);
#endif
    Sums acc;
    Tile tile;
    while (schedule.pop(tile)) {
#if EPILOGUE == 3
        team.look_ahead(m, tile);
#endif
        accumulate(acc, m, ring, shared + WEIGHTS_OFFSET + warp * WEIGHT_BYTES, tile, lane);
#if SPLIT
        const Exchange exchange = {partials, flags, group, thread};
        if (tile.begin > 0) {
            exchange.give(acc);
            continue;
        }
        if (tile.end < stages) exchange.take(acc, schedule.total(), (tile.row_tile + 1) * stages);
#endif
#if EPILOGUE == 3
        team.run(m, tile, bias, acc);
#elif PARTS > 1
        const Turns turns = {flags + tile.number * ROW_GROUPS + group, group, thread};
        turns.wait(tile.part);
        Store(m, out, tile).run(acc);
        turns.pass(tile.part);
#else
        Store(m, out, tile).run(acc);
#endif
    }
}
