// gemm_qkv: what gemm_wgmma does with a tile of the fused projection of a prefill (EPILOGUE 3): norm, RoPE, queries and cache.
//
// HEAD_DIM 64 or 128, QK_NORM 0 or 1; inputs, output and numerics as qkv_post.cu has them, but for the order of the sum of
// squares, which is the same in every tile. The 64 rows of each of HEAD_DIM / 64 warpgroups are a head, and these warpgroups a team.
// A lane has both columns of a pair that RoPE turns, as rows g and g + 8 of its warp's row block. A team's results pass through
// shared memory, BATCH tokens at a time in two buffers.
#include "qkv.cuh"

constexpr int TEAM_GROUPS = HEAD_DIM / 64;
constexpr int TEAMS = ROW_GROUPS / TEAM_GROUPS;
constexpr int TEAM_WARPS = 4 * TEAM_GROUPS;
constexpr int TEAM_THREADS = 128 * TEAM_GROUPS;
constexpr int BATCH = TILE_TOKENS % 32 == 0 ? 32 : 16;
constexpr int BATCH_SLICES = BATCH / 8;
constexpr int HEAD_PITCH = HEAD_DIM + 8;  // elements of a token in a buffer, so that a warp's stores meet no bank twice
constexpr int TEAM_TOKENS = (TILE_TOKENS + TEAM_THREADS - 1) / TEAM_THREADS;  // of a thread, when each token has one
constexpr int BUFFER_WORDS = BATCH * HEAD_PITCH / 2;
constexpr int TEAM_WORDS = 2 * BUFFER_WORDS + (TEAM_WARPS + 2) * TILE_TOKENS;
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "a head's rows are whole warpgroups");
static_assert(ROW_GROUPS % TEAM_GROUPS == 0, "a block has whole heads");
static_assert(QK_NORM != 2 && !SPLIT, "a head is normed by itself, and a tile is one block's");
static_assert(TILE_TOKENS % BATCH == 0);

// What the kernel is given for it.
struct Heads {
    const NormWeight *q_norm, *k_norm;
    float eps, clip;
    const float2* rope;
    const int *positions, *slots, *block_table;
    int max_pages, num_heads, num_kv_heads;
    Element *q, *cache;
};

// v[i] summed over the eight lanes of a column of the warp's accumulators, for i = lane / 4. The same bits whatever else is
// summed.
DEVICE float sum_of_lanes(float (&v)[8], int lane) {
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
        const bool upper = lane / 4 & half;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float given = upper ? v[i] : v[i + half];
            v[i] = (upper ? v[i + half] : v[i]) + __shfl_xor_sync(~0u, given, 4 * half);
        }
    }
    return v[0];
}

struct Team {
    const Heads& heads;
    u32* buffers;     // [2][BATCH][HEAD_PITCH]
    float* sums;      // [TEAM_WARPS][TILE_TOKENS] of squares; then in the first row 1 / rms
    int* places;      // [TILE_TOKENS]: position of a token
    int* rows;        // [TILE_TOKENS]: row of 64 elements of y or the cache where its head begins, -1 where it is not in use
    int team, thread;  // thread of the team
    int position[TEAM_TOKENS], slot[TEAM_TOKENS];  // of this thread's tokens, for the next tile

    MEMBER Team(const Heads& heads, u32* staging, int team, int thread) : heads(heads), team(team), thread(thread) {
        buffers = staging + team * TEAM_WORDS;
        sums = reinterpret_cast<float*>(buffers + 2 * BUFFER_WORDS);
        places = reinterpret_cast<int*>(sums + TEAM_WARPS * TILE_TOKENS);
        rows = places + TILE_TOKENS;
    }

    MEMBER void barrier() const { named_barrier(1 + team, TEAM_THREADS); }

    // Before a tile's products, so that nobody waits for it.
    MEMBER void look_ahead(const Matrix& m, const Tile& tile) {
#pragma unroll
        for (int i = 0; i < TEAM_TOKENS; ++i) {
            const int local = thread + i * TEAM_THREADS, token = tile.token + local;
            const bool exists = local < TILE_TOKENS && token < m.num_tokens;
            position[i] = exists ? heads.positions[token] : 0, slot[i] = exists ? heads.slots[token] : -1;
        }
    }

    MEMBER void run(const Matrix& m, const Tile& tile, const void* bias, Sums& acc) const {
        const int number = tile.row_tile * TEAMS + team;  // among the heads of q, k and v
        if (number >= heads.num_heads + 2 * heads.num_kv_heads) return;
        const bool is_value = number >= heads.num_heads + heads.num_kv_heads;
        const int lane = thread % 32, warp = thread / 32, g = lane / 4;
        int page[TEAM_TOKENS];
#pragma unroll
        for (int i = 0; i < TEAM_TOKENS; ++i)
            page[i] = slot[i] < 0 ? -1 : heads.block_table[static_cast<u64>(slot[i]) * heads.max_pages + position[i] / PAGE];
        const int row = number * HEAD_DIM + 16 * warp + g;
        if (bias != nullptr) add_bias(acc, bias_of(bias, row), bias_of(bias, row + 8));
        if (heads.clip != __int_as_float(0x7f800000)) clamp_all(acc);
        const bool is_normed = QK_NORM == 1 && !is_value;
        if (is_normed) sum_squares(acc, warp, lane);
        barrier();  // also: nobody is at the tile before
#pragma unroll
        for (int i = 0; i < TEAM_TOKENS; ++i) {
            const int local = thread + i * TEAM_THREADS;
            if (local >= TILE_TOKENS) continue;
            places[local] = position[i];
            rows[local] = page[i] < 0 ? -1 : row_of(number, tile.token + local, page[i], position[i]);
            if (is_normed) {
                float sum = sums[local];
#pragma unroll
                for (int w = 1; w < TEAM_WARPS; ++w) sum += sums[w * TILE_TOKENS + local];
                sums[local] = rsqrtf(sum * (1.0f / HEAD_DIM) + heads.eps);
            }
        }
        barrier();
        if (is_value)
            put_all<false>(m, tile, acc, number, 16 * warp + g, 16 * warp + g + 8);
        else
            put_all<true>(m, tile, acc, number, 8 * warp + g, HALF + 8 * warp + g);
    }

    MEMBER void add_bias(Sums& acc, float low, float high) const {
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 2; ++i) acc[i] += i % 4 < 2 ? low : high;
    }
    MEMBER void clamp_all(Sums& acc) const {
#pragma unroll
        for (int i = 0; i < TILE_TOKENS / 2; ++i) acc[i] = clamp(acc[i], heads.clip);
    }

    MEMBER void sum_squares(const Sums& acc, int warp, int lane) const {
        const int g = lane / 4, token = 8 * (g / 2) + 2 * (lane % 4) + g % 2;  // whose sum this lane gets
#pragma unroll
        for (int batch = 0; batch < TILE_TOKENS / BATCH; ++batch) {
            float v[8] = {};
#pragma unroll
            for (int s = 0; s < BATCH_SLICES; ++s) {
                const float* d = acc + 4 * (BATCH_SLICES * batch + s);
                v[2 * s] = d[0] * d[0] + d[2] * d[2], v[2 * s + 1] = d[1] * d[1] + d[3] * d[3];
            }
            const float sum = sum_of_lanes(v, lane);
            if (token < BATCH) sums[warp * TILE_TOKENS + BATCH * batch + token] = sum;
        }
    }

    // Cosines and sines of a batch's tokens for this lane's pair of columns.
    MEMBER void load_rotations(float2 (&r)[BATCH_SLICES][2], int batch, int column) const {
#pragma unroll
        for (int s = 0; s < BATCH_SLICES; ++s) {
            const int2 at = *reinterpret_cast<const int2*>(places + BATCH * batch + 8 * s + 2 * (thread % 4));
            r[s][0] = heads.rope[static_cast<u64>(at.x) * HALF + column];
            r[s][1] = heads.rope[static_cast<u64>(at.y) * HALF + column];
        }
    }

    // `low`, `high`: columns of the head that this lane has.
    template <bool IS_ROTATED>
    MEMBER void put_all(const Matrix& m, const Tile& tile, const Sums& acc, int number, int low, int high) const {
        const int lane = thread % 32, odd = lane / 4 % 2, t = lane % 4;
        const bool is_query = number < heads.num_heads;
        const NormWeight* norm = is_query ? heads.q_norm : heads.k_norm;
        const float low_weight = QK_NORM && IS_ROTATED ? to_float(norm[low]) : 1.0f;
        const float high_weight = QK_NORM && IS_ROTATED ? to_float(norm[high]) : 1.0f;
        u32* mine = buffers + (2 * t + odd) * (HEAD_PITCH / 2);
        float2 r[BATCH_SLICES][2];
        if (IS_ROTATED) load_rotations(r, 0, low);
        const int batches = (m.tile_slices(tile) + BATCH_SLICES - 1) / BATCH_SLICES;
#pragma unroll
        for (int batch = 0; batch < TILE_TOKENS / BATCH; ++batch) {
            if (batch >= batches) break;
            u32* buffer = mine + batch % 2 * BUFFER_WORDS;
#pragma unroll
            for (int s = 0; s < BATCH_SLICES; ++s) {
                const float* d = acc + 4 * (BATCH_SLICES * batch + s);
                float2 first = make_float2(d[0], d[2]), second = make_float2(d[1], d[3]);  // of a token each
                if (IS_ROTATED) {
                    if (QK_NORM) {
                        const float2 by = *reinterpret_cast<const float2*>(sums + BATCH * batch + 8 * s + 2 * t);
                        first.x *= by.x * low_weight, first.y *= by.x * high_weight;
                        second.x *= by.y * low_weight, second.y *= by.y * high_weight;
                    }
                    first = turned(first, r[s][0]), second = turned(second, r[s][1]);
                }
                // Lanes g and g ^ 1 swap, so that the even one has both columns of the first token, the odd one of the second.
                const u32 one = from_float2(first.x, first.y), two = from_float2(second.x, second.y);
                const u32 own = odd ? two : one, other = __shfl_xor_sync(~0u, odd ? one : two, 4);
                u32* token = buffer + 8 * s * (HEAD_PITCH / 2);
                token[low / 2] = __byte_perm(own, other, odd ? 0x1054 : 0x5410);
                token[high / 2] = __byte_perm(own, other, odd ? 0x3276 : 0x7632);
            }
            if (IS_ROTATED && batch + 1 < TILE_TOKENS / BATCH) load_rotations(r, batch + 1, low);
            barrier();
            copy_out(batch, is_query);
        }
    }

    static MEMBER float2 turned(float2 x, float2 r) { return make_float2(x.x * r.x - x.y * r.y, x.y * r.x + x.x * r.y); }

    MEMBER int row_of(int number, int token, int page, int position) const {
        if (number < heads.num_heads) return (token * heads.num_heads + number) * PANELS;
        const int head = number - heads.num_heads, is_value = head >= heads.num_kv_heads;
        return cache_offset(page, is_value, heads.num_kv_heads, head - is_value * heads.num_kv_heads, position % PAGE, 0) / 64;
    }

    // A thread has one 16-byte chunk of several tokens. The cache's panels have a page's rows each, its chunks are swizzled.
    MEMBER void copy_out(int batch, bool is_query) const {
        static_assert(TEAM_THREADS % CHUNKS == 0);
        const int chunk = thread % CHUNKS, swizzle = is_query ? 0 : 7;
        Element* first = (is_query ? heads.q : heads.cache) + chunk / 8 * (is_query ? 64 : PAGE * 64);
        const u32* buffer = buffers + batch % 2 * BUFFER_WORDS + 4 * chunk;
#pragma unroll
        for (int i = thread / CHUNKS; i < BATCH; i += TEAM_THREADS / CHUNKS) {
            const int row = rows[BATCH * batch + i];
            if (row < 0) continue;
            Element* target = first + static_cast<u64>(row) * 64 + ((chunk % 8) ^ (row & swizzle)) * 8;
            *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(buffer + i * (HEAD_PITCH / 2));
        }
    }
};
