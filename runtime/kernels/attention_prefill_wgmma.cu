// attention_prefill_wgmma: causal attention of new tokens over the paged KV cache by wgmma (sm_90a), HEAD_DIM 64 or 128.
// Inputs, output and numerics: attention_prefill.cuh.
//
// grid: min(number of SMs, most items * num_kv_heads) persistent blocks; work i of the list goes to the blocks in turn, back
// and forth. block: 128 * (1 + CONSUMERS) = a producer warpgroup, then CONSUMERS warpgroups of 64 rows (ROWS 128 for
// HEAD_DIM 128, 192 for 64); tiles of two pages (KEYS 128). Dynamic shared memory: SHARED_BYTES.
//
// Producer: warp 0 brings K and V panels by bulk copies into two rings, warps 1 to 3 the queries, swizzled, two sets of them.
// Consumers: the scores of a tile are computed while the softmax of the one before is finished and its weights meet V:
//   issue S' = Q K'^T; issue O += P V; wait for S'; softmax(S'); wait for O; correct O; P = S'
// and take turns in issuing, so that the tensor cores work for one while another is in its softmax. Where a work has too few
// rows for all of them, such as the one token of a sequence that decodes, the rest let its tiles and their turns pass.
//
// Shared memory, every operand of wgmma at a multiple of 1024 bytes (ptx.cuh, swizzled_descriptor):
//   q  [2][PANELS][ROWS][64]  A of S, K-major: 8 rows 1024 bytes apart, 16 columns 32 bytes, 64 columns QUERY_PANEL_BYTES
//   k  [STAGES][PANELS][KEYS][64]  B of S, K-major: n = key: the same with PANEL_BYTES
//   v  [STAGES][PANELS][KEYS][64]  B of O, MN-major: n = column, k = key: 8 keys 1024 bytes apart, 16 keys 2048, the second 64
//      columns PANEL_BYTES (the leading offset)
// A page's panel is 8 KiB as it lies in the cache: key 64 i + slot of the tile is row 64 i + slot of its panel.
#include "attention_prefill.cuh"

static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "whole panels, and registers for S, P and O");
constexpr int CONSUMERS = HEAD_DIM == 128 ? 2 : 3;
constexpr int STAGES = HEAD_DIM == 128 ? 2 : 4;
constexpr int CONSUMER_REGISTERS = HEAD_DIM == 128 ? 232 : 160;
constexpr int PRODUCER_REGISTERS = HEAD_DIM == 128 ? 40 : 32;
constexpr int GROUP_THREADS = 128;  // a warpgroup
constexpr int THREADS = GROUP_THREADS * (1 + CONSUMERS);
constexpr int QUERY_THREADS = 96;
constexpr int ROWS = 64 * CONSUMERS;
constexpr int KEYS = 2 * PAGE;
constexpr int HEAD_ELEMENTS = PANELS * PANEL_ELEMENTS;  // of one page, K or V
constexpr int PAGE_PANEL_BYTES = PANEL_ELEMENTS * 2;
constexpr int PANEL_BYTES = KEYS * 128;
constexpr int TILE_BYTES = PANELS * PANEL_BYTES;
constexpr int QUERY_PANEL_BYTES = ROWS * 128;
constexpr int QUERY_BYTES = PANELS * QUERY_PANEL_BYTES;
constexpr int DATA_BYTES = 2 * QUERY_BYTES + 2 * STAGES * TILE_BYTES;
constexpr int BARRIERS = 4 + 4 * STAGES;
constexpr int SHARED_BYTES = 1024 + DATA_BYTES + 8 * BARRIERS + 2 * static_cast<int>(sizeof(Tile));  // 1024 to align
#ifdef PLAN_ROWS
static_assert(ROWS == PLAN_ROWS && THREADS == PLAN_THREADS && SHARED_BYTES == PLAN_SHARED_BYTES, "the host's launch numbers");
#endif
static_assert((STAGES & (STAGES - 1)) == 0, "ring positions wrap");
static_assert(QUERY_THREADS % (PANELS * 8) == 0, "each of them has its own chunk of every row");
static_assert(QUERY_PANEL_BYTES % 1024 == 0 && PANEL_BYTES % 1024 == 0, "the swizzle repeats every 1024 bytes");
static_assert(CONSUMERS * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= 512, "65536 registers in groups of 128 threads");
static_assert(SHARED_BYTES <= 227 * 1024, "what sm_90 has");
static_assert(sizeof(Tile) % 8 == 0, "two of them beside the barriers");

// Shared addresses. A ring's position n is slot n % STAGES, lap n / STAGES.
struct Shared {
    u32 base, barriers;
    Tile* tiles;  // [2], of the query sets

    MEMBER u32 query(int set) const { return base + set * QUERY_BYTES; }
    MEMBER u32 key(u32 n) const { return base + 2 * QUERY_BYTES + n % STAGES * TILE_BYTES; }
    MEMBER u32 value(u32 n) const { return key(n) + STAGES * TILE_BYTES; }
    MEMBER u32 query_full(int set) const { return barriers + 8 * set; }
    MEMBER u32 query_empty(int set) const { return barriers + 16 + 8 * set; }
    MEMBER u32 key_full(u32 n) const { return barriers + 32 + 8 * (n % STAGES); }
    MEMBER u32 key_empty(u32 n) const { return key_full(n) + 8 * STAGES; }
    MEMBER u32 value_full(u32 n) const { return key_full(n) + 16 * STAGES; }
    MEMBER u32 value_empty(u32 n) const { return key_full(n) + 24 * STAGES; }
};

DEVICE u32 parity_of(u32 n) { return n / STAGES & 1; }

struct Work {
    const int2* items;
    const int4* sequences;
    int total, num_kv_heads, group, window;

    // Number in the list of this block's work of a round; total or more: none, in later rounds neither.
    MEMBER int number(int round) const {
        return static_cast<int>(round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x));
    }
    MEMBER Tile tile(int number) const { return tile_of(number, items, sequences, num_kv_heads, group, window, ROWS); }
};

// Warpgroups that have rows of a tile.
DEVICE int active_consumers(const Tile& tile) { return (tile.last_row - tile.first_row) / 64 + 1; }

// ---- producers --------------------------------------------------------------------------------------------------------

DEVICE void load_queries(const Shared& shared, const Work& work, const Element* q, int thread) {
    for (int round = 0; work.number(round) < work.total; ++round) {
        const int set = round % 2;
        const Tile tile = work.tile(work.number(round));
        mbarrier_wait(shared.query_empty(set), (round / 2 & 1) ^ 1);
        if (thread == 0) shared.tiles[set] = tile;
        const int chunk = thread % (PANELS * 8), last = tile.last_row - tile.first_row;
        const Element* first = queries_of(q, tile, work.num_kv_heads, work.group) + 8 * chunk;
#pragma unroll 1
        for (int row = thread / (PANELS * 8); row <= (last | 63); row += QUERY_THREADS / (PANELS * 8)) {
            const u32 target = shared.query(set) + chunk / 8 * QUERY_PANEL_BYTES + row * 128 + ((chunk % 8) ^ (row & 7)) * 16;
            const int existing = tile.first_row + min(row, last);  // others become zero, and their scores
            copy_async_16_or_zero(target, first + query_offset(existing, work.num_kv_heads, work.group), row <= last);
        }
        copy_async_commit();
        copy_async_wait<0>();
        fence_proxy_async();
        mbarrier_arrive(shared.query_full(set));
    }
}

// One layer's cache as a query tile sees it.
struct Cache {
    const Element* head;        // K of the tile's key-value head in page 0
    const int* block_row;       // of the tile's sequence
    u32 part_elements;          // K to V
    int begin, end;             // positions that some row sees

    // Pages of the key tile from position `key` on; -1 where nothing is seen (block_row may hold anything there).
    MEMBER int page(int key) const { return key + PAGE > begin && key < end ? block_row[key / PAGE] : -1; }
    MEMBER int2 pages(int key) const { return make_int2(page(key), page(key + PAGE)); }

    // Positions from `end` on are not fetched.
    MEMBER void load(u32 target, u32 barrier, int2 pages, int key, int part) const {
        const int first = pages.x < 0 ? 0 : bytes(end - key), second = pages.y < 0 ? 0 : bytes(end - key - PAGE);
        mbarrier_arrive_expect(barrier, PANELS * (first + second));
        if (first > 0) load_page(target, barrier, pages.x, first, part);
        if (second > 0) load_page(target + PAGE_PANEL_BYTES, barrier, pages.y, second, part);
    }
    static MEMBER int bytes(int rows) { return min(rows, PAGE) * 128; }  // of a panel
    MEMBER void load_page(u32 target, u32 barrier, int page, int bytes, int part) const {
        const Element* source = head + static_cast<u64>(2 * page + part) * part_elements;
#pragma unroll
        for (int p = 0; p < PANELS; ++p) copy_bulk(target + p * PANEL_BYTES, source + p * PANEL_ELEMENTS, bytes, barrier);
    }
};

// One thread. K of a tile goes before V of the tile before it: the order in which they are used.
DEVICE void load_cache(const Shared& shared, const Work& work, const Element* kv, const int* block_table, int max_pages) {
    u32 n = 0;
    for (int round = 0; work.number(round) < work.total; ++round) {
        const Tile tile = work.tile(work.number(round));
        const Cache cache = {kv + tile.kv_head * HEAD_ELEMENTS, block_table + static_cast<u64>(tile.slot) * max_pages,
                             static_cast<u32>(work.num_kv_heads * HEAD_ELEMENTS), tile.begin, tile.end};
        int key = tile.begin / KEYS * KEYS;
        int2 pages = cache.pages(key);
        mbarrier_wait(shared.key_empty(n), parity_of(n) ^ 1);
        cache.load(shared.key(n), shared.key_full(n), pages, key, 0);
        int2 next_pages = cache.pages(key + KEYS);
#pragma unroll 1
        for (; key < tile.end; key += KEYS, ++n) {
            if (key + KEYS < tile.end) {
                mbarrier_wait(shared.key_empty(n + 1), parity_of(n + 1) ^ 1);
                cache.load(shared.key(n + 1), shared.key_full(n + 1), next_pages, key + KEYS, 0);
            }
            mbarrier_wait(shared.value_empty(n), parity_of(n) ^ 1);
            cache.load(shared.value(n), shared.value_full(n), pages, key, 1);
            pages = next_pages;
            next_pages = cache.pages(key + 2 * KEYS);  // arrives while the next slots are waited for
        }
    }
}

// ---- consumers --------------------------------------------------------------------------------------------------------

struct Consumer {
    int index;   // of the warpgroup
    int thread;  // in the warpgroup

    MEMBER int lane() const { return thread % 32; }
    MEMBER int row_in_block() const { return 64 * index + 16 * (thread / 32) + lane() / 4; }
    MEMBER void wait_turn() const { named_barrier(1 + index, 2 * GROUP_THREADS); }
    MEMBER void pass_turn() const { named_barrier_arrive(1 + (index + 1) % CONSUMERS, 2 * GROUP_THREADS); }
    MEMBER void release(u32 barrier) const {  // once a warp, whose products are complete
        if (lane() == 0) mbarrier_arrive(barrier);
    }
};

// Issues s = q k^T: 64 rows, KEYS keys.
DEVICE void issue_scores(float (&s)[KEYS / 2], u64 q, u64 k) {
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
        const int panel = step / 4, column_bytes = step % 4 * 32;
        wgmma_m64n128k16(s, q + (panel * QUERY_PANEL_BYTES + column_bytes) / 16, k + (panel * PANEL_BYTES + column_bytes) / 16,
                         step > 0);
    }
    wgmma_commit();
}

// Issues o += p v: p[4i + ...] is the A fragment of keys 16 i to 16 i + 15.
DEVICE void issue_values(float (&o)[HEAD_DIM / 2], const u32 (&p)[KEYS / 4], u64 v) {
#pragma unroll
    for (int i = 0; i < KEYS / 16; ++i) {
        const u64 keys = v + i * 2048 / 16;
#if HEAD_DIM == 128
        wgmma_m64n128k16_transposed(o, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], keys);
#else
        wgmma_m64n64k16_transposed(o, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], keys);
#endif
    }
    wgmma_commit();
}

// Accumulator registers 8i + 0..7 of S are the A fragment of keys 16i + 0..15: both give a lane columns 2t, 2t + 1 of each
// eight in rows g, g + 8.
DEVICE void round_weights(u32 (&p)[KEYS / 4], const float (&s)[KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; ++i) p[i] = from_float2(s[2 * i], s[2 * i + 1]);
}

// Zeroes the rows of a V tile that no row of the block sees: a weight of zero does not hide a NaN. Each warpgroup does so for
// itself, before its product.
DEVICE void clear_unseen(u32 value, const Tile& tile, int i, const Consumer& consumer) {
    const int first = tile.begin - i * KEYS, end = tile.end - i * KEYS;
    if (first <= 0 && end >= KEYS) return;
#pragma unroll 1
    for (int chunk = consumer.thread; chunk < TILE_BYTES / 16; chunk += GROUP_THREADS) {
        const int row = chunk / 8 % KEYS;
        if (row < first || row >= end) store_shared_zero_16(value + 16 * chunk);
    }
    fence_proxy_async();
    named_barrier(1 + CONSUMERS + consumer.index, GROUP_THREADS);
}

struct Masking {
    int first_end, last_begin;  // the least last position and the greatest first position of this warpgroup's rows

    MEMBER bool needed(int i) const { return i * KEYS < last_begin || (i + 1) * KEYS - 1 > first_end; }
};

DEVICE Masking masking_of(const Tile& tile, const Consumer& consumer, int group, int window) {
    const int first = tile.row(64 * consumer.index) / group, last = tile.row(64 * consumer.index + 63) / group;
    return {tile.context + first, window > 0 ? tile.context + last - window + 1 : 0};
}

// Consumes the key tiles from ring position n on; returns the position after them.
DEVICE u32 attend(float (&o)[HEAD_DIM / 2], Rows& rows, const Shared& shared, int set, const Tile& tile, u32 n,
                  const Consumer& consumer, const Masking& masking, float scale_log2) {
    float s[KEYS / 2];
    u32 p[KEYS / 4];
    const int first = tile.begin / KEYS, last = (tile.end - 1) / KEYS, first_key = 2 * (consumer.thread % 4);
    const u64 q = swizzled_descriptor(shared.query(set) + consumer.index * 64 * 128, 16, 1024);
    mbarrier_wait(shared.key_full(n), parity_of(n));
    pin_registers(o);
    wgmma_fence();
    issue_scores(s, q, swizzled_descriptor(shared.key(n), 16, 1024));
    wgmma_wait<0>();
    pin_registers(s);
    consumer.release(shared.key_empty(n));
    if (masking.needed(first)) rows.mask(s, first * KEYS + first_key);
    rows.softmax(s, scale_log2);
    round_weights(p, s);
    for (int i = first; i < last; ++i, ++n) {
        mbarrier_wait(shared.key_full(n + 1), parity_of(n + 1));
        consumer.wait_turn();
        pin_registers(o);
        pin_registers(p);
        wgmma_fence();
        issue_scores(s, q, swizzled_descriptor(shared.key(n + 1), 16, 1024));
        mbarrier_wait(shared.value_full(n), parity_of(n));
        clear_unseen(shared.value(n), tile, i, consumer);
        wgmma_fence();
        issue_values(o, p, swizzled_descriptor(shared.value(n), PANEL_BYTES, 1024));
        consumer.pass_turn();
        wgmma_wait<1>();
        pin_registers(s);
        consumer.release(shared.key_empty(n + 1));
        if (masking.needed(i + 1)) rows.mask(s, (i + 1) * KEYS + first_key);
        rows.softmax(s, scale_log2);
        wgmma_wait<0>();
        pin_registers(o);
        pin_registers(s);
        consumer.release(shared.value_empty(n));
        rows.correct(o);
        round_weights(p, s);
    }
    mbarrier_wait(shared.value_full(n), parity_of(n));
    clear_unseen(shared.value(n), tile, last, consumer);
    pin_registers(o);
    pin_registers(p);
    wgmma_fence();
    issue_values(o, p, swizzled_descriptor(shared.value(n), PANEL_BYTES, 1024));
    wgmma_wait<0>();
    pin_registers(o);
    consumer.release(shared.value_empty(n));
    return n + 1;
}

// Lets the key tiles from ring position n on pass; returns the position after them.
DEVICE u32 skip(const Shared& shared, const Tile& tile, u32 n, const Consumer& consumer) {
    for (int left = (tile.end - 1) / KEYS - tile.begin / KEYS; left >= 0; --left, ++n) {
        mbarrier_wait(shared.key_full(n), parity_of(n));
        consumer.release(shared.key_empty(n));
        if (left > 0) {
            consumer.wait_turn();
            consumer.pass_turn();
        }
        mbarrier_wait(shared.value_full(n), parity_of(n));
        consumer.release(shared.value_empty(n));
    }
    return n;
}

DEVICE void consume(const Shared& shared, const Work& work, const Consumer& consumer, float scale, const Sink* sinks,
                    Element* y, int y_pitch) {
    const float scale_log2 = scale * LOG2_E;
    u32 n = 0;
    if (consumer.index == CONSUMERS - 1) consumer.pass_turn();  // the first begins
    for (int round = 0; work.number(round) < work.total; ++round) {
        const int set = round % 2;
        mbarrier_wait(shared.query_full(set), round / 2 & 1);
        const Tile tile = shared.tiles[set];
        if (consumer.index >= active_consumers(tile)) {
            n = skip(shared, tile, n, consumer);
            consumer.release(shared.query_empty(set));
            continue;
        }
        Rows rows;
        rows.enter(tile, consumer.row_in_block(), work.group, work.window);
        float o[HEAD_DIM / 2];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0.0f;
        n = attend(o, rows, shared, set, tile, n, consumer, masking_of(tile, consumer, work.group, work.window), scale_log2);
        store_rows(o, rows, shared.tiles[set], consumer.row_in_block(), work.group, sinks, scale_log2, y, y_pitch,
                   consumer.lane() % 4);
        __syncwarp();
        consumer.release(shared.query_empty(set));
    }
    if (consumer.index == 0) consumer.wait_turn();  // what the last one passed
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_prefill_wgmma(const Element* q, const Element* kv, const int* block_table, int max_pages, const int4* sequences,
                        const int2* items, const int* num_items, int num_kv_heads, int group, int window, float scale,
                        const Sink* sinks, Element* y, int y_pitch) {
    extern __shared__ __align__(1024) u8 dynamic[];
    launch_dependents();
    u8* aligned = dynamic + (-shared_address(dynamic) & 1023);
    const u32 base = shared_address(aligned);
    const Shared shared = {base, base + DATA_BYTES, reinterpret_cast<Tile*>(aligned + DATA_BYTES + 8 * BARRIERS)};
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(shared.query_full(i), QUERY_THREADS);
            mbarrier_init(shared.query_empty(i), 4 * CONSUMERS);
        }
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(shared.key_full(i), 1), mbarrier_init(shared.value_full(i), 1);
            mbarrier_init(shared.key_empty(i), 4 * CONSUMERS), mbarrier_init(shared.value_empty(i), 4 * CONSUMERS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    wait_for_previous();
    const Work work = {items, sequences, *num_items * num_kv_heads, num_kv_heads, group, window};
    const int warpgroup = threadIdx.x / GROUP_THREADS, thread = threadIdx.x % GROUP_THREADS;
    if (warpgroup == 0) {
        lower_registers<PRODUCER_REGISTERS>();
        if (thread == 0)
            load_cache(shared, work, kv, block_table, max_pages);
        else if (thread >= 32)
            load_queries(shared, work, q, thread - 32);
    } else {
        raise_registers<CONSUMER_REGISTERS>();
        consume(shared, work, {warpgroup - 1, thread}, scale, sinks, y, y_pitch);
    }
}
