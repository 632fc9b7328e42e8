// What both builds of attention for prefill share: the work list, masks, the online softmax, where the output lies.
//
// A sequence's rows are its (token, query head of one key-value head) pairs: row r is token r / group, head
// kv_head * group + r % group. A block takes up to ROWS consecutive rows of one key-value head, and reads its keys and
// values in tiles of KEYS positions that start at multiples of KEYS, first to last; tiles that no row sees are skipped. A
// row's result depends on its own keys alone: a tile that it does not see changes neither its sums nor its maximum.
//
// q          E [num_tokens][num_heads][ceil64(HEAD_DIM)]   natural order, zero beyond HEAD_DIM, not scaled; 16-byte aligned
// kv         E, one layer's cache: [num_pages][2 (K, V)][num_kv_heads][PANELS][PAGE tokens][64], the eight 16-byte chunks of
//            a 128-byte row at chunk ^ (token & 7), columns beyond HEAD_DIM zero; 128-byte aligned. The new tokens are in
//            it. Slots that no row of a block may see are never used: they may hold anything, NaN included.
// block_table int [max_sequences][max_pages]                page of positions 64 i to 64 i + 63
// sequences  int4 [num_sequences]                           {row of block_table, first token in q, new tokens, tokens before}
// items      int2 [*num_items]                              {sequence, tile of ROWS rows}, the most to do first
// window     positions seen, self included; 0 for all
// scale      of q k^T, positive: HEAD_DIM ** -0.5
// sinks      [num_heads] E, or float with SINKS_F32; or null
// y          E, activation.cuh (Y_TILED, Y_LANE_COLUMNS, y_pitch), head h's column i at h * HEAD_DIM + i; nothing else is
//            written, columns from num_heads * HEAD_DIM on included. 16-byte aligned
//
// Numerics: scores, softmax and sums in FP32, exp as 2^x with scale * log2(e) folded into one multiply-add; weights are
// rounded to E for the product with V, their sum is not; one rounding of the result.
#pragma once
#include "activation.cuh"
#include "element.cuh"

constexpr int PAGE = 64;  // tokens
constexpr int PANELS = (HEAD_DIM + 63) / 64;
constexpr int PANEL_ELEMENTS = PAGE * 64;
constexpr float LOG2_E = 1.4426950408889634f;
static_assert(HEAD_DIM % 2 == 0 && HEAD_DIM >= 2 && HEAD_DIM <= 256, "columns are stored in pairs; registers hold 256");

#if SINKS_F32
typedef float Sink;
DEVICE float sink_of(Sink value) { return value; }
#else
typedef Element Sink;
DEVICE float sink_of(Sink value) { return to_float(value); }
#endif

struct Tile {
    int slot;         // row of block_table
    int first_token;  // of the sequence, in q
    int context;      // tokens of the sequence before first_token
    int first_row, last_row;
    int kv_head;
    int begin, end;  // positions that some row sees

    MEMBER int row(int i) const { return min(first_row + i, last_row); }  // rows beyond the last repeat it
};

DEVICE Tile tile_of(int work, const int2* items, const int4* sequences, int num_kv_heads, int group, int window, int rows) {
    const int2 item = items[work / num_kv_heads];
    const int4 sequence = sequences[item.x];
    Tile tile;
    tile.slot = sequence.x, tile.first_token = sequence.y, tile.context = sequence.w;
    tile.first_row = item.y * rows;
    tile.last_row = min(tile.first_row + rows, sequence.z * group) - 1;
    tile.kv_head = work % num_kv_heads;
    tile.begin = window > 0 ? max(0, tile.context + tile.first_row / group - window + 1) : 0;
    tile.end = tile.context + tile.last_row / group + 1;
    return tile;
}

// The sequence's first query of the tile's heads, and how far from it a row is.
DEVICE const Element* queries_of(const Element* q, const Tile& tile, int num_kv_heads, int group) {
    return q + (static_cast<u64>(tile.first_token) * num_kv_heads + tile.kv_head) * group * (PANELS * 64);
}

DEVICE u32 query_offset(int row, int num_kv_heads, int group) {  // elements; q of one launch is far below 8 GiB
    return (row / group * (num_kv_heads - 1) * group + row) * (PANELS * 64);
}

// What a lane knows of its rows g and g + 8 of a warp's 16: a fragment s[4j + 2h + e] is row g + 8h, column 8j + 2t + e.
struct Rows {
    int first[2], last[2];  // positions seen
    float largest[2];       // raw scores; -infinity until one is seen
    float total[2];         // of this lane's columns
    float correction[2];    // of what was summed before the last tile
    int used;               // 2, or fewer of g and g + 8 where the warp's 16 rows go beyond the tile's last

    MEMBER void enter(const Tile& tile, int row_in_block, int group, int window) {
        used = min(2, (tile.last_row - tile.first_row - row_in_block / 16 * 16 + 8) / 8);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            last[h] = tile.context + tile.row(row_in_block + 8 * h) / group;
            first[h] = window > 0 ? last[h] - window + 1 : 0;
            largest[h] = -__int_as_float(0x7f800000);
            total[h] = 0.0f;
            correction[h] = 1.0f;
        }
    }

    template <int N>
    MEMBER void mask(float (&s)[N], int key) const {  // key: position of s[0]
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int h = i / 2 % 2, position = key + 8 * (i / 4) + i % 2;
            if (position < first[h] || position > last[h]) s[i] = -__int_as_float(0x7f800000);
        }
    }

    // Scores to weights 2^(scale_log2 (s - largest)); `correction` is what earlier sums must be multiplied with.
    template <int N>
    MEMBER void softmax(float (&s)[N], float scale_log2) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if (h >= used) break;
            float now = largest[h];
#pragma unroll
            for (int j = 2 * h; j < N; j += 4) now = fmaxf(now, fmaxf(s[j], s[j + 1]));
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2));
            const float base = now == -__int_as_float(0x7f800000) ? 0.0f : now * scale_log2;  // nothing seen yet
            // exactly 1 where nothing larger came: a fused multiply-add of base's rounding error would not be
            correction[h] = largest[h] == now ? 1.0f : exp2_approximate(largest[h] * scale_log2 - base);
            largest[h] = now;
            float even = 0.0f, odd = 0.0f;
#pragma unroll
            for (int j = 2 * h; j < N; j += 4) {
                s[j] = exp2_approximate(fmaf(s[j], scale_log2, -base));
                s[j + 1] = exp2_approximate(fmaf(s[j + 1], scale_log2, -base));
                even += s[j], odd += s[j + 1];
            }
            total[h] = fmaf(total[h], correction[h], even + odd);
        }
    }

    template <int N>
    MEMBER void correct(float (&o)[N]) const {
#pragma unroll
        for (int i = 0; i < N; ++i) o[i] *= correction[i / 2 % 2];
    }

    // What the sums of row h are multiplied with at the end.
    MEMBER float normalisation(int h, const Sink* sinks, int head, float scale_log2) const {
        float sum = total[h];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (sinks == nullptr) return 1.0f / sum;
        const float seen = largest[h] * scale_log2, sink = sink_of(sinks[head]) * LOG2_E, top = fmaxf(seen, sink);
        const float factor = exp2_approximate(seen - top);
        return factor / fmaf(sum, factor, exp2_approximate(sink - top));
    }
};

// Row h of the lane, columns 8j + 2t, + 1 of its head, j below N / 4.
template <int N>
DEVICE void store_row(const float (&o)[N], int h, float factor, Element* y, int y_pitch, int token, int head, int t) {
    if constexpr (Y_TILED && Y_LANE_COLUMNS == 8 && HEAD_DIM % 64 == 0) {
        // columns 32q + 8j + 2t + e, j 0..3, are elements 32q + 8t + 2j + e of the row
#pragma unroll
        for (int q = 0; q < HEAD_DIM / 32; ++q) {
            u32 chunk[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int i = 16 * q + 4 * j + 2 * h;
                chunk[j] = from_float2(o[i] * factor, o[i + 1] * factor);
            }
            const u64 row = static_cast<u64>(head * (HEAD_DIM / 64) + q / 2) * y_pitch + token;
            *reinterpret_cast<uint4*>(y + row * 64 + ((4 * (q % 2) + t) ^ (token & 7)) * 8) =
                make_uint4(chunk[0], chunk[1], chunk[2], chunk[3]);
        }
    } else {
#pragma unroll
        for (int j = 0; j < N / 4; ++j) {
            const int column = 8 * j + 2 * t;
            if (column < HEAD_DIM)
                *reinterpret_cast<u32*>(
                    y + activation_offset<Y_LANE_COLUMNS, Y_TILED>(token, head * HEAD_DIM + column, y_pitch)) =
                    from_float2(o[4 * j + 2 * h] * factor, o[4 * j + 2 * h + 1] * factor);
        }
    }
}

template <int N>
DEVICE void store_rows(const float (&o)[N], const Rows& rows, const Tile& tile, int row_in_block, int group, const Sink* sinks,
                       float scale_log2, Element* y, int y_pitch, int t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row = tile.row(row_in_block + 8 * h), head = tile.kv_head * group + row % group;
        const float factor = rows.normalisation(h, sinks, head, scale_log2);
        if (tile.first_row + row_in_block + 8 * h <= tile.last_row)
            store_row(o, h, factor, y, y_pitch, tile.first_token + row / group, head, t);
    }
}
