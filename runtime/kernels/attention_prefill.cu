// attention_prefill: causal attention of new tokens over the paged KV cache by mma.sync (sm_80 up), any even HEAD_DIM to 256.
// Inputs, output and numerics: attention_prefill.cuh.
//
// grid: at least *num_items * num_kv_heads; block: 128 = 4 warps of 16 rows each (ROWS 64), tiles of one page (KEYS 64).
// Dynamic shared memory: SHARED_BYTES = [q | k | v][PANELS][64 rows][64], swizzled as in the cache. The next K comes while V
// is used, the next V while K is.
#include "attention_prefill.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = 16 * WARPS;
constexpr int KEYS = PAGE;
constexpr int STEPS = (HEAD_DIM + 15) / 16;  // of 16 columns
constexpr int BUFFER_BYTES = PANELS * PANEL_ELEMENTS * 2;
constexpr int SHARED_BYTES = 3 * BUFFER_BYTES;
#ifdef PLAN_ROWS
static_assert(ROWS == PLAN_ROWS && THREADS == PLAN_THREADS && SHARED_BYTES == PLAN_SHARED_BYTES, "the host's launch numbers");
#endif
static_assert(ROWS == PAGE, "q has a buffer of the same shape as a page");
static_assert(SHARED_BYTES <= 99 * 1024, "what every architecture has");

// Shared address of chunk c (16 bytes, 8 columns) of a row.
DEVICE u32 chunk_address(u32 buffer, int row, int chunk) {
    return buffer + (chunk / 8) * (PANEL_ELEMENTS * 2) + row * 128 + ((chunk % 8) ^ (row & 7)) * 16;
}

DEVICE void load_queries(u32 buffer, const Element* q, const Tile& tile, int num_kv_heads, int group) {
    const Element* first = queries_of(q, tile, num_kv_heads, group);
    for (int i = threadIdx.x; i < ROWS * PANELS * 8; i += THREADS) {
        const int row = i / (PANELS * 8), chunk = i % (PANELS * 8);
        copy_async_16(chunk_address(buffer, row, chunk), first + query_offset(tile.row(row), num_kv_heads, group) + 8 * chunk);
    }
}

// One page of one head as it lies; rows outside the tile's positions become zero.
DEVICE void load_page(u32 buffer, const Element* page, const Tile& tile, int first_position) {
    for (int i = threadIdx.x; i < KEYS * PANELS * 8; i += THREADS) {
        const int position = first_position + i / 8 % KEYS;
        copy_async_16_or_zero(buffer + 16 * i, page + 8 * i, position >= tile.begin && position < tile.end);
    }
}

// s = q k^T of the warp's 16 rows and the page's 64 keys.
DEVICE void score(float (&s)[32], u32 q, u32 k, int warp, int lane) {
    const int matrix = lane / 8, r = lane % 8;
#pragma unroll
    for (int i = 0; i < 32; ++i) s[i] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        u32 a[4];
        ldmatrix_x4(a, chunk_address(q, 16 * warp + 8 * (matrix % 2) + r, 2 * step + matrix / 2));
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            u32 b[4];
            ldmatrix_x4(b, chunk_address(k, 8 * (j + matrix / 2) + r, 2 * step + matrix % 2));
            mma_m16n8k16(s + 4 * j, a[0], a[1], a[2], a[3], b[0], b[1]);
            mma_m16n8k16(s + 4 * j + 4, a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

// o += p v, p the weights of the warp's 16 rows.
DEVICE void add_values(float (&o)[8 * STEPS], const float (&p)[32], u32 v, int lane) {
    const int matrix = lane / 8, r = lane % 8;
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
        u32 a[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = from_float2(p[8 * step + 2 * i], p[8 * step + 2 * i + 1]);
#pragma unroll
        for (int c = 0; c < STEPS; ++c) {
            u32 b[4];
            ldmatrix_x4_transposed(b, chunk_address(v, 16 * step + 8 * (matrix % 2) + r, 2 * c + matrix / 2));
            mma_m16n8k16(o + 8 * c, a[0], a[1], a[2], a[3], b[0], b[1]);
            mma_m16n8k16(o + 8 * c + 4, a[0], a[1], a[2], a[3], b[2], b[3]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention_prefill(const Element* q, const Element* kv, const int* block_table, int max_pages, const int4* sequences,
                  const int2* items, const int* num_items, int num_kv_heads, int group, int window, float scale,
                  const Sink* sinks, Element* y, int y_pitch) {
    extern __shared__ __align__(128) u8 shared[];
    launch_dependents();
    wait_for_previous();
    if (blockIdx.x >= *num_items * num_kv_heads) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row_in_block = 16 * warp + lane / 4;
    const u32 queries = shared_address(shared), keys = queries + BUFFER_BYTES, values = keys + BUFFER_BYTES;
    const Tile tile = tile_of(blockIdx.x, items, sequences, num_kv_heads, group, window, ROWS);
    const int* pages = block_table + static_cast<u64>(tile.slot) * max_pages;
    const u64 head_elements = PANELS * PANEL_ELEMENTS, part_elements = num_kv_heads * head_elements;
    auto head_of_page = [&](int i) { return kv + pages[i] * 2 * part_elements + tile.kv_head * head_elements; };
    const int first_page = tile.begin / KEYS, last_page = (tile.end - 1) / KEYS;

    load_queries(queries, q, tile, num_kv_heads, group);
    load_page(keys, head_of_page(first_page), tile, first_page * KEYS);
    copy_async_commit();
    load_page(values, head_of_page(first_page) + part_elements, tile, first_page * KEYS);
    copy_async_commit();

    Rows rows;
    rows.enter(tile, row_in_block, group, window);
    const float scale_log2 = scale * LOG2_E;
    const int first_row_end = tile.context + tile.first_row / group;                            // the least position of a row
    const int last_row_begin = window > 0 ? tile.context + tile.last_row / group - window + 1 : 0;
    float s[32], o[8 * STEPS];
#pragma unroll
    for (int i = 0; i < 8 * STEPS; ++i) o[i] = 0.0f;
    for (int i = first_page; i <= last_page; ++i) {
        const int next = min(i + 1, last_page);  // the last page is fetched again in the end, and waited for
        const Element* next_head = head_of_page(next);
        copy_async_wait<1>();
        __syncthreads();
        score(s, queries, keys, warp, lane);
        __syncthreads();  // every warp has read K
        load_page(keys, next_head, tile, next * KEYS);
        copy_async_commit();
        if (i * KEYS < last_row_begin || (i + 1) * KEYS - 1 > first_row_end) rows.mask(s, i * KEYS + 2 * (lane % 4));
        rows.softmax(s, scale_log2);
        rows.correct(o);
        copy_async_wait<1>();
        __syncthreads();
        add_values(o, s, values, lane);
        __syncthreads();  // every warp has read V
        load_page(values, next_head + part_elements, tile, next * KEYS);
        copy_async_commit();
    }
    copy_async_wait<0>();
    store_rows(o, rows, tile, row_in_block, group, sinks, scale_log2, y, y_pitch, lane % 4);
}
