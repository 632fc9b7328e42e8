// gemm_wgmma: Y[N tokens][M rows] = X[N][K] W[M][K]^T for many tokens, by wgmma with the weights in registers (sm_90a).
//
// A block has ROW_GROUPS consumer warpgroups of 64 rows, all over the same TILE_TOKENS tokens, and one producer warp that
// fills a ring of STAGES slots of STAGE_PANELS * 64 columns by 1-D bulk copies: weights as they lie in their pages,
// activations as the "tiled" layout has them. CLUSTER blocks take neighbouring row tiles of the same tokens and columns, each
// fetching its part of the activations for all of them. Blocks stay and go from tile to tile.
//
// SPLIT 0: a tile is one cluster's, over all of K. Tiles go in bands of `token_band` token tiles, rows outermost within one.
// SPLIT 1: at most TILE_TOKENS tokens. All stages of the matrix, row tile by row tile, are one sequence that is cut into equal
// ranges, one per cluster; the cluster with a tile's first stage owns it. The others have its stages at the start of their
// ranges, so their sums are in `partials` before the owner asks for them. Every block must be resident at once.
// SPLIT 2: first the tiles that are left when every cluster has the same number of whole ones, divided likewise; then the whole
// ones. A build of its own: its code in the other one made decode steps 1 to 3 % slower (docs/performance.md).
//
// grid: (blocks, a multiple of CLUSTER, at most the number of SMs). block: THREADS. Dynamic shared memory: SHARED_BYTES.
//
// weights      u8 [row_blocks][steps][STEP_BYTES]           16-byte aligned
// activations  E [Kp/64][tokens_padded][64]                 "tiled" layout, 16-byte aligned; anything beyond the tokens
// bias         BIAS_F32 ? float : E [16 * row_blocks]       or null
// EPILOGUE 0   y: float [num_tokens][y_pitch] = acc + bias, rows below y_columns; 16-byte aligned, pitch and columns multiples
//              of 4 unless Y_SCALAR
// EPILOGUE 1   y: float [num_tokens][y_pitch] += acc + bias, likewise
// EPILOGUE 2   rows in pair8 order; y: E, "tiled" layout of the product that follows (Y_LANE_COLUMNS, y_pitch tokens, y_columns
//              its Kp), column 8b + g = activation(gate row g, up row g + 8) of row block b; zeros beyond 8 * row_blocks
// partials     SPLIT: float4 [gridDim.x][ROW_GROUPS][TILE_TOKENS / 8][128]
// flags        SPLIT: u32 [gridDim.x][ROW_GROUPS], zero before and after
//
// Numerics: FP32 accumulation in column order; with SPLIT the ranges of a tile are added in order. The order depends on the
// matrix alone, with SPLIT 1 on gridDim.x too, with SPLIT 2 on gridDim.x and N.
#define WGMMA_N TILE_TOKENS
#include "activation.cuh"
#include "codec.cuh"
#include "epilogue.cuh"

constexpr int GROUP_THREADS = 128;
constexpr int CONSUMER_WARPS = 4 * ROW_GROUPS;  // one row block each
constexpr int THREADS = GROUP_THREADS * (ROW_GROUPS + 1);  // the producer's warpgroup has one warp at work
// Registers of a thread: together what the launch allots, 168 for each of 3 warpgroups, 128 for each of 4.
constexpr int PRODUCER_REGISTERS = ROW_GROUPS == 3 ? 56 : 48;
constexpr int CONSUMER_REGISTERS = ROW_GROUPS == 3 ? 152 : 224;
constexpr int TILE_ROW_BLOCKS = CLUSTER * CONSUMER_WARPS;

constexpr int STAGE_COLUMNS = 64 * STAGE_PANELS;
constexpr int STAGE_STEPS = STAGE_COLUMNS / STEP_COLUMNS;
constexpr int PANEL_PRODUCTS = 4;  // wgmma of 16 columns each
constexpr int PANEL_BYTES = TILE_TOKENS * 128;
constexpr int WEIGHT_BYTES = STAGE_STEPS * STEP_BYTES;  // of a row block and stage
constexpr int WEIGHTS_OFFSET = STAGE_PANELS * PANEL_BYTES;
constexpr int SLOT_BYTES = (WEIGHTS_OFFSET + CONSUMER_WARPS * WEIGHT_BYTES + 1023) / 1024 * 1024;
static_assert(STAGE_STEPS * STEP_COLUMNS == STAGE_COLUMNS, "a stage is whole steps");
static_assert(STAGE_PANELS == 1 || STAGE_PANELS == 2, "see accumulate");
static_assert(PANEL_BYTES % 1024 == 0 && WEIGHT_BYTES % 16 == 0, "swizzle groups and bulk copies stay aligned");
static_assert(TILE_TOKENS % (8 * CLUSTER) == 0, "each block of a cluster fetches whole groups of 8 tokens");
static_assert(STAGES >= 2, "a slot is free once the next stage's products are on their way");

// Results leave a warpgroup in chunks of tokens through two buffers of shared memory.
constexpr int CHUNK = TILE_TOKENS < 32 ? TILE_TOKENS : 32;
constexpr int CHUNKS = TILE_TOKENS / CHUNK;
#if EPILOGUE == 2
constexpr int CHUNK_PITCH = 20;  // words of a token: 32 columns, and 16 bytes so that banks differ
#else
constexpr int CHUNK_PITCH = 68;  // 64 rows, and 4 so that a warp's stores meet no bank twice
#endif
constexpr int STAGING_WORDS = 2 * CHUNK * CHUNK_PITCH;  // of a warpgroup
constexpr int STAGING_OFFSET = STAGES * SLOT_BYTES;
constexpr int BARRIERS_OFFSET = STAGING_OFFSET + ROW_GROUPS * STAGING_WORDS * 4;
constexpr int SHARED_BYTES = BARRIERS_OFFSET + 2 * STAGES * 8;
static_assert(SHARED_BYTES <= 227 * 1024, "what a block can have");
#ifdef PLAN_SHARED_BYTES
static_assert(SHARED_BYTES == PLAN_SHARED_BYTES && THREADS == PLAN_THREADS, "runtime/gemm_plan.py says the same");
#endif
static_assert(CHUNKS * CHUNK == TILE_TOKENS && BARRIERS_OFFSET % 16 == 0);

// One tile, or a range of its stages.
struct Segment {
    int row_tile;  // of the cluster
    int token;     // the first
    int begin, end;
#if SPLIT
    u32 tile_end;  // stages of all divided tiles up to the end of this one
#endif
};

struct Matrix {
    const u8* weights;
    const u8* activations;
    int row_blocks, steps, stages, tokens_padded, num_tokens;

    MEMBER int stage_steps(int stage) const { return min(STAGE_STEPS, steps - stage * STAGE_STEPS); }
    MEMBER int stage_panels(int stage) const { return (stage_steps(stage) * STEP_COLUMNS + 63) / 64; }
    // Whole groups of 8 tokens, which tokens_padded has too.
    MEMBER int tile_tokens(const Segment& s) const { return min(TILE_TOKENS, (num_tokens + 7) / 8 * 8 - s.token); }
};

#if SPLIT
// First of a cluster's stages among all of the divided tiles: ranges differ by at most one stage.
DEVICE u32 range_begin(u32 total, u32 cluster) {
    const u32 clusters = gridDim.x / CLUSTER;
    return cluster * (total / clusters) + min(cluster, total % clusters);
}
#endif

struct Schedule {
    int row_tiles, token_tiles, token_band, stages;
#if SPLIT
    u32 total, position, stop;  // stages: of all divided tiles, and the rest of this cluster's
#endif
#if SPLIT != 1
    u32 tile, last;  // whole tiles: the next, and the end of all clusters'
#endif

    MEMBER void rewind() {
        const u32 cluster = blockIdx.x / CLUSTER;
        u32 divided = row_tiles * token_tiles;
#if SPLIT != 1
        tile = cluster, last = divided;
#endif
#if SPLIT == 2
        divided %= gridDim.x / CLUSTER, last -= divided;
#endif
#if SPLIT
        total = divided * stages, position = range_begin(total, cluster), stop = range_begin(total, cluster + 1);
#endif
    }
    MEMBER void locate(Segment& s, u32 number) const {
        const int band = number / (token_band * row_tiles), place = number % (token_band * row_tiles);
        const int width = min(token_band, token_tiles - band * token_band);
        s.row_tile = place / width, s.token = (band * token_band + place % width) * TILE_TOKENS;
    }
    MEMBER bool next(Segment& s) {
#if SPLIT
        if (position < stop) {
            const u32 divided = position / stages;
            s.begin = position % stages, s.end = min(stages, s.begin + static_cast<int>(stop - position));
            s.tile_end = (divided + 1) * stages;
            position += s.end - s.begin;
#if SPLIT == 1
            s.row_tile = divided, s.token = 0;
#else
            locate(s, last + divided);
#endif
            return true;
        }
#endif
#if SPLIT != 1
        if (tile < last) {
            locate(s, tile);
            s.begin = 0, s.end = stages;
            tile += gridDim.x / CLUSTER;
            return true;
        }
#endif
        return false;
    }
};

struct Ring {
    u32 slots, barriers;  // barriers: STAGES full, STAGES empty
    int slot;
    u32 parity;

    MEMBER u32 full(int i) const { return barriers + 8 * i; }
    MEMBER u32 empty(int i) const { return barriers + 8 * (STAGES + i); }
    MEMBER void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
    MEMBER void initialize() const {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(full(i), 1);
            mbarrier_init(empty(i), CLUSTER * CONSUMER_WARPS);
        }
        mbarrier_init_fence();
    }
    MEMBER void release(int i, int lane) const {
#if CLUSTER > 1
        if (lane < CLUSTER) mbarrier_arrive_cluster(empty(i), lane);
#else
        if (lane == 0) mbarrier_arrive(empty(i));
#endif
    }
    MEMBER void wait_empty() const {
#if CLUSTER > 1
        mbarrier_wait_cluster(empty(slot), parity ^ 1);
#else
        mbarrier_wait(empty(slot), parity ^ 1);
#endif
    }
};

// ---- producer -------------------------------------------------------------------------------------------------------

// Announces all of a stage's bytes and fetches its weights; a lane copies the steps of one row block.
DEVICE void fetch_weights(const Matrix& m, const Ring& ring, int slot, const Segment& s, int stage, u32 rank, int lane) {
    const int first = s.row_tile * TILE_ROW_BLOCKS + rank * CONSUMER_WARPS;
    const int count = min(CONSUMER_WARPS, max(0, m.row_blocks - first)), bytes = m.stage_steps(stage) * STEP_BYTES;
    if (lane == 0) mbarrier_arrive_expect(ring.full(slot), count * bytes + m.stage_panels(stage) * m.tile_tokens(s) * 128);
    __syncwarp();
    if (lane < count) {
        const u64 step = static_cast<u64>(first + lane) * m.steps + stage * STAGE_STEPS;
        const u32 target = ring.slots + slot * SLOT_BYTES + WEIGHTS_OFFSET + lane * WEIGHT_BYTES;
        copy_bulk(target, m.weights + step * STEP_BYTES, bytes, ring.full(slot));
    }
}

// Fetches this block's part of a stage's activations for the whole cluster; a lane copies one panel.
DEVICE void fetch_activations(const Matrix& m, const Ring& ring, const Segment& s, int stage, u32 rank, int lane) {
    constexpr int PART = TILE_TOKENS / CLUSTER;
    const int tokens = m.tile_tokens(s), begin = min(tokens, static_cast<int>(rank) * PART), end = min(tokens, begin + PART);
    if (lane >= m.stage_panels(stage) || begin == end) return;
    const u64 row = static_cast<u64>(stage * STAGE_PANELS + lane) * m.tokens_padded + s.token + begin;
    const u32 target = ring.slots + ring.slot * SLOT_BYTES + lane * PANEL_BYTES + begin * 128, bytes = (end - begin) * 128;
#if CLUSTER > 1
    copy_bulk_multicast(target, m.activations + row * 128, bytes, ring.full(ring.slot), (1 << CLUSTER) - 1);
#else
    copy_bulk(target, m.activations + row * 128, bytes, ring.full(ring.slot));
#endif
}

DEVICE void produce(const Matrix& m, Ring ring, Schedule schedule, u32 rank, int lane) {
    Segment s;
    int early = 0;  // stages whose weights are fetched before the activations exist
    while (early < STAGES && schedule.next(s))
        for (int stage = s.begin; stage < s.end && early < STAGES; ++stage)
            fetch_weights(m, ring, early++, s, stage, rank, lane);
    wait_for_previous();
    schedule.rewind();
    while (schedule.next(s)) {
        for (int stage = s.begin; stage < s.end; ++stage, ring.advance()) {
            if (early > 0) {
                --early;
            } else {
                ring.wait_empty();
                fetch_weights(m, ring, ring.slot, s, stage, rank, lane);
            }
            fetch_activations(m, ring, s, stage, rank, lane);
        }
    }
}

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

// Starts acc += a b for one panel.
DEVICE void multiply(Sums& acc, const u32 (&a)[PANEL_PRODUCTS][4], u32 panel) {
    const u64 b = swizzled_descriptor(panel, 16, 1024);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < PANEL_PRODUCTS; ++i) wgmma(acc, a[i], b + 2 * i);  // 16 columns are 32 bytes of a row
    wgmma_commit();
}

// The sums of a segment. One panel's products run while the next one's A fragments are loaded; panels alternate between two
// sets of registers, and with two panels a stage each set has its place in the slot.
DEVICE void accumulate(Sums& acc, const Matrix& m, Ring& ring, const u8* weights, const Segment& s, int lane) {
    u32 even[PANEL_PRODUCTS][4], odd[PANEL_PRODUCTS][4];
#pragma unroll
    for (int i = 0; i < TILE_TOKENS / 2; ++i) acc[i] = 0.0f;
    pin_registers(acc);
    constexpr int SECOND = STAGE_PANELS - 1;  // place of the odd panels
    int stage = s.begin;
    auto load = [&](u32 (&a)[PANEL_PRODUCTS][4], int panel) {
        if (panel == 0) mbarrier_wait(ring.full(ring.slot), ring.parity);
        load_panel(a, weights + ring.slot * SLOT_BYTES, panel, m.stage_steps(stage), lane);
    };
    auto start = [&](const u32 (&a)[PANEL_PRODUCTS][4], int panel) {
        multiply(acc, a, ring.slots + ring.slot * SLOT_BYTES + panel * PANEL_BYTES);
        wgmma_wait<1>();  // the panel before
        if (panel == 0 && stage > s.begin) ring.release(ring.slot == 0 ? STAGES - 1 : ring.slot - 1, lane);
    };
    auto next_stage = [&] {
        if (++stage == s.end) return false;
        ring.advance();
        return true;
    };
    load(even, 0);
    for (;;) {
        start(even, 0);
        if (SECOND == 0 ? !next_stage() : m.stage_panels(stage) == 1) break;
        load(odd, SECOND);
        start(odd, SECOND);
        if (!next_stage()) break;
        load(even, 0);
    }
    wgmma_wait<0>();
    pin_registers(acc);
    ring.release(ring.slot, lane);
    ring.advance();
}

#if SPLIT
struct Exchange {
    float4* partials;
    u32* flags;
    int group, thread;  // warpgroup of the block, thread of the warpgroup

    MEMBER u64 place(u32 block) const { return block * ROW_GROUPS + group; }
    MEMBER float4* part(u64 place, int i) const { return partials + (place * (TILE_TOKENS / 8) + i) * GROUP_THREADS + thread; }

    MEMBER void give(const Sums& acc) const {
        const u64 mine = place(blockIdx.x);
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 8; ++i)
            *part(mine, i) = make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
        __threadfence();
        named_barrier(1 + group, GROUP_THREADS);
        if (thread == 0) store_release(flags + mine, 1);
    }

    // Adds what the following clusters have of the tile that ends before stage `end` of `total`; leaves their flags at zero.
    MEMBER void take(Sums& acc, u32 total, u32 end) const {
        const u32 cluster = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
        for (u32 other = cluster + 1; range_begin(total, other) < end; ++other) {
            if (range_begin(total, other) == range_begin(total, other + 1)) continue;  // it has no stages
            const u64 its = place(other * CLUSTER + rank);
            if (thread % 32 == 0) {
                while (load_acquire(flags + its) == 0) {}
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < TILE_TOKENS / 8; ++i) {
                const float4 p = __ldcg(part(its, i));
                acc[4 * i] += p.x, acc[4 * i + 1] += p.y, acc[4 * i + 2] += p.z, acc[4 * i + 3] += p.w;
            }
        }
        named_barrier(1 + group, GROUP_THREADS);
        if (thread != 0) return;
        for (u32 other = cluster + 1; range_begin(total, other) < end; ++other)
            store_release(flags + place(other * CLUSTER + rank), 0);
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

#if EPILOGUE == 2
// Word of a pair of columns (of the warpgroup's 32) in the staging buffer: for LANE_COLUMNS 8 as they lie in the output.
DEVICE int staging_word(int column) { return (Y_LANE_COLUMNS == 8 ? fragment_order<8>(column) : column) / 2; }

// One chunk from the staging buffer to y; `first` is the warpgroup's first column, a multiple of 32.
DEVICE void store_chunk(const Output& out, const u32* buffer, int first, int first_token) {
    constexpr int WORDS = Y_LANE_COLUMNS == 8 ? 4 : 1;  // columns of a token that lie together
    if (first >= out.columns) return;
#pragma unroll
    for (int piece = out.thread; piece < CHUNK * 16 / WORDS; piece += GROUP_THREADS) {
        const int token = piece / (16 / WORDS), word = piece % (16 / WORDS) * WORDS;
        if (first_token + token >= out.num_tokens) continue;
        const u32* source = buffer + token * CHUNK_PITCH + word;
        if constexpr (WORDS == 4) {
            const int n = first_token + token, chunk = first % 64 / 8 + word / 4;
            const u64 row = static_cast<u64>(first / 64) * out.pitch + n;
            *(static_cast<uint4*>(out.y) + row * 8 + (chunk ^ (n & 7))) = *reinterpret_cast<const uint4*>(source);
        } else {
            const u64 offset = tiled_offset<Y_LANE_COLUMNS>(first_token + token, first + 2 * word, out.pitch);
            *reinterpret_cast<u32*>(static_cast<Element*>(out.y) + offset) = *source;
        }
    }
}

// acc: a lane holds gate rows g (registers 4j, 4j + 1) and up rows g + 8 (4j + 2, 4j + 3) of tokens 8j + 2t, 8j + 2t + 1.
DEVICE void store_tile(const Sums& acc, const Matrix& m, const Output& out, int row_block, int first_token) {
    const int lane = out.thread % 32, g = lane / 4, t = lane % 4, warp = out.thread / 32;
    const bool exists = row_block < m.row_blocks, odd = g % 2;
    const float gate_bias = exists ? bias_of(out.bias, 16 * row_block + g) : 0.0f;
    const float up_bias = exists ? bias_of(out.bias, 16 * row_block + g + 8) : 0.0f;
    named_barrier(1 + out.group, GROUP_THREADS);  // the buffers are free
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        u32* buffer = out.staging + c % 2 * CHUNK * CHUNK_PITCH;
#pragma unroll
        for (int j = 0; j < CHUNK / 8; ++j) {
            const float* d = acc + 4 * (c * CHUNK / 8 + j);
            const float first = exists ? activation(d[0] + gate_bias, d[2] + up_bias, out.limit) : 0.0f;
            const float second = exists ? activation(d[1] + gate_bias, d[3] + up_bias, out.limit) : 0.0f;
            // Lanes g and g ^ 1 swap, so that the even one has both columns of the first token, the odd one of the second.
            const float other = __shfl_xor_sync(~0u, odd ? first : second, 4);
            const u32 pair = odd ? from_float2(other, second) : from_float2(first, other);
            buffer[(8 * j + 2 * t + odd) * CHUNK_PITCH + staging_word(8 * warp + g - odd)] = pair;
        }
        named_barrier(1 + out.group, GROUP_THREADS);
        store_chunk(out, buffer, 8 * (row_block - warp), first_token + c * CHUNK);
    }
}
#else
#if Y_SCALAR
typedef float Piece;  // for y_pitch or y_columns that are no multiples of 4
#else
typedef float4 Piece;
#endif
constexpr int PIECE_ROWS = sizeof(Piece) / 4, TOKEN_PIECES = 64 / PIECE_ROWS;
constexpr int THREAD_PIECES = CHUNK * TOKEN_PIECES / GROUP_THREADS, TOKENS_APART = GROUP_THREADS / TOKEN_PIECES;

#if EPILOGUE == 1
DEVICE void add(Piece& sum, const Piece& other) {
#if Y_SCALAR
    sum += other;
#else
    sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
#endif
}
#endif

// acc: a lane holds rows g (registers 4j, 4j + 1) and g + 8 (4j + 2, 4j + 3) of tokens 8j + 2t, 8j + 2t + 1. A thread stores
// the same rows of every TOKENS_APARTth token.
DEVICE void store_tile(const Sums& acc, const Matrix& m, const Output& out, int row_block, int first_token) {
    const int lane = out.thread % 32, g = lane / 4, t = lane % 4, warp = out.thread / 32;
    const bool exists = row_block < m.row_blocks;
    const float low_bias = exists ? bias_of(out.bias, 16 * row_block + g) : 0.0f;
    const float high_bias = exists ? bias_of(out.bias, 16 * row_block + g + 8) : 0.0f;
    const int piece_row = out.thread % TOKEN_PIECES * PIECE_ROWS, row = 16 * (row_block - warp) + piece_row;
    const int token = out.thread / TOKEN_PIECES, tokens = row < out.columns ? out.num_tokens - first_token : 0;
    float* y = static_cast<float*>(out.y) + static_cast<u64>(first_token + token) * out.pitch + row;
    const int step = TOKENS_APART * out.pitch;
#if EPILOGUE == 1
    constexpr int AHEAD = Y_SCALAR || ROW_GROUPS == 3 || SPLIT == 2 ? 1 : 2;  // chunks, as registers allow
    Piece before[AHEAD][THREAD_PIECES];                         // what y holds
    auto fetch = [&](int c) {
#pragma unroll
        for (int i = 0; i < THREAD_PIECES; ++i)
            if (c * CHUNK + i * TOKENS_APART + token < tokens)
                before[c % AHEAD][i] = *reinterpret_cast<const Piece*>(y + static_cast<u64>((c * THREAD_PIECES + i) * step));
    };
#pragma unroll
    for (int c = 0; c < AHEAD && c < CHUNKS; ++c) fetch(c);
#endif
    named_barrier(1 + out.group, GROUP_THREADS);  // the buffers are free
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
        float* buffer = reinterpret_cast<float*>(out.staging) + c % 2 * CHUNK * CHUNK_PITCH;
#pragma unroll
        for (int j = 0; j < CHUNK / 8; ++j) {
            const float* d = acc + 4 * (c * CHUNK / 8 + j);
            float* p = buffer + (8 * j + 2 * t) * CHUNK_PITCH + 16 * warp + g;
            p[0] = d[0] + low_bias, p[CHUNK_PITCH] = d[1] + low_bias;
            p[8] = d[2] + high_bias, p[CHUNK_PITCH + 8] = d[3] + high_bias;
        }
        named_barrier(1 + out.group, GROUP_THREADS);
#pragma unroll
        for (int i = 0; i < THREAD_PIECES; ++i) {
            if (c * CHUNK + i * TOKENS_APART + token >= tokens) continue;
            Piece v = *reinterpret_cast<const Piece*>(buffer + (i * TOKENS_APART + token) * CHUNK_PITCH + piece_row);
#if EPILOGUE == 1
            add(v, before[c % AHEAD][i]);
#endif
            *reinterpret_cast<Piece*>(y + static_cast<u64>((c * THREAD_PIECES + i) * step)) = v;
        }
#if EPILOGUE == 1
        if (c + AHEAD < CHUNKS) fetch(c + AHEAD);
#endif
    }
}
#endif

#if CLUSTER > 1
#define CLUSTER_SHAPE __cluster_dims__(CLUSTER, 1, 1)
#else
#define CLUSTER_SHAPE
#endif

DEVICE void synchronize() {
#if CLUSTER > 1
    __syncwarp();
    cluster_sync();
#else
    __syncthreads();
#endif
}

extern "C" __global__ void CLUSTER_SHAPE __launch_bounds__(THREADS, 1)
gemm_wgmma(const u8* weights, int row_blocks, int steps, const u8* activations, int tokens_padded, int num_tokens, void* y,
           int y_pitch, int y_columns, const void* bias, float limit, float4* partials, u32* flags, int token_band) {
    extern __shared__ __align__(1024) u8 shared[];
    launch_dependents();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 rank = blockIdx.x % CLUSTER;
    const int stages = (steps + STAGE_STEPS - 1) / STAGE_STEPS;
    const Matrix m = {weights, activations, row_blocks, steps, stages, tokens_padded, num_tokens};
    Ring ring = {shared_address(shared), shared_address(shared) + BARRIERS_OFFSET, 0, 0};
    if (threadIdx.x == 0) ring.initialize();
    synchronize();

    const int rows = EPILOGUE == 2 ? max(16 * row_blocks, 2 * y_columns) : 16 * row_blocks;  // zeros beyond the stored rows
    const int row_tiles = (rows + 16 * TILE_ROW_BLOCKS - 1) / (16 * TILE_ROW_BLOCKS);
    Schedule schedule = {row_tiles, (num_tokens + TILE_TOKENS - 1) / TILE_TOKENS, token_band, stages};
    schedule.rewind();
    if (warp >= CONSUMER_WARPS) {
        if constexpr (ROW_GROUPS > 1) lower_registers<PRODUCER_REGISTERS>();
        if (warp == CONSUMER_WARPS) produce(m, ring, schedule, rank, lane);
    } else {
        if constexpr (ROW_GROUPS > 1) raise_registers<CONSUMER_REGISTERS>();
        wait_for_previous();
        const int group = warp / 4, thread = threadIdx.x % GROUP_THREADS;
        const Output out = {y, y_pitch, EPILOGUE == 2 ? y_columns : min(y_columns, 16 * row_blocks), num_tokens, bias, limit,
                            reinterpret_cast<u32*>(shared + STAGING_OFFSET) + group * STAGING_WORDS, group, thread};
        Sums acc;
        Segment s;
        while (schedule.next(s)) {
            accumulate(acc, m, ring, shared + WEIGHTS_OFFSET + warp * WEIGHT_BYTES, s, lane);
#if SPLIT
            const Exchange exchange = {partials, flags, group, thread};
            if (s.begin > 0) {
                exchange.give(acc);
                continue;
            }
            if (s.end < stages) exchange.take(acc, schedule.total, s.tile_end);
#endif
            store_tile(acc, m, out, s.row_tile * TILE_ROW_BLOCKS + rank * CONSUMER_WARPS + warp, s.token);
        }
    }
    if (CLUSTER > 1) synchronize();  // until here other blocks write into this one's shared memory and arrive on its barriers
}
