// Exact selection in a row of logits that several blocks share: histograms, ranges, short sorted lists.
//
// A token's rank is ~key << ID_BITS | id, where key orders floats as integers do: ranks order tokens by falling logit, lower
// ids first among equals, and no two tokens of a row share one. A token's mass is exp((logit - largest) / temperature) as a
// fixed-point number. Masses are added as integers, so that no sum depends on an order, a split or the batch.
#pragma once
#include "sampling_state.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int UNROLL = 4;         // 16-byte loads in flight per thread
constexpr int ID_BITS = 20;
constexpr int FRACTION_BITS = 44;  // of a mass; a row of 2^19 tokens stays below 2^64
constexpr double MASS_BASE = 256.0;  // 2^(52 - FRACTION_BITS): one unit in the last place is one unit of mass
constexpr u32 LAST_KEY_INVERTED = 0xff7fffffu;  // ~key of the lowest finite float
static_assert(SAMPLING_BINS == 2 * THREADS, "a thread scans two bins");
static_assert(SAMPLING_LIST == 4 * THREADS, "a thread sums four list entries");

DEVICE u32 key_of(float x) {  // -0 counts as +0
    const u32 bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float value_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }
DEVICE u64 rank_of(float x, int id) { return static_cast<u64>(~key_of(x)) << ID_BITS | static_cast<u32>(id); }
DEVICE float rank_value(u64 rank) { return value_of(~static_cast<u32>(rank >> ID_BITS)); }
DEVICE int rank_id(u64 rank) { return static_cast<int>(rank & ((1u << ID_BITS) - 1)); }

DEVICE float component(const float4& v, int e) { return e == 0 ? v.x : e == 1 ? v.y : e == 2 ? v.z : v.w; }

// This block's part of a row, in units of four tokens.
struct Chunk {
    int begin, end, vocab_size;
};

template <typename Visit>
DEVICE void for_each(const float* row, const Chunk& chunk, Visit visit) {  // a thread sees its ids in rising order
    const float4* quads = reinterpret_cast<const float4*>(row);
    for (int first = chunk.begin + threadIdx.x; first < chunk.end; first += UNROLL * THREADS) {
        float4 v[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
            if (first + u * THREADS < chunk.end) v[u] = quads[first + u * THREADS];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const int quad = first + u * THREADS;
            if (quad >= chunk.end) break;
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (4 * quad + e < chunk.vocab_size) visit(4 * quad + e, component(v[u], e));
        }
    }
}

// How logits of a row become bins and masses.
struct Order {
    float largest, scale;  // bin = (largest - x) * scale, the last one for everything beyond
    double inverse_temperature;

    MEMBER u32 bin(float x) const {
        return min(static_cast<u32>(max(__float2int_rz(__fmul_rn(__fsub_rn(largest, x), scale)), 0)), SAMPLING_BINS - 1u);
    }
    MEMBER double weight(float x) const {
        return exp((static_cast<double>(x) - static_cast<double>(largest)) * inverse_temperature);
    }
    MEMBER u64 mass(double weight) const {  // rounded to nearest
        return __double_as_longlong(weight + MASS_BASE) - __double_as_longlong(MASS_BASE);
    }
    // Smallest ~key whose bin is `wanted` or a later one; bins grow with ~key.
    MEMBER u32 bin_begin(u32 wanted) const {
        u32 low = ~key_of(largest), high = LAST_KEY_INVERTED + 1u;
        while (low < high) {
            const u32 middle = low + (high - low) / 2;
            if (bin(value_of(~middle)) >= wanted) high = middle;
            else low = middle + 1;
        }
        return low;
    }
};

// Bins spread over what holds mass, exp(-32) of the largest and more, or over the whole row if that is less.
DEVICE Order order_of(u64 best, u64 lowest, double temperature) {
    const float largest = value_of(static_cast<u32>(best >> 32)), least = value_of(~static_cast<u32>(lowest));
    const float range = fminf(static_cast<float>(32.0 * temperature), largest - least);
    return {largest, fminf(SAMPLING_BINS / range, 1e30f), 1.0 / temperature};
}

struct Range {
    u64 low, high;  // ranks, both included
};

// Running sums over a histogram's bins.
struct Sums {
    u64 mass[SAMPLING_BINS];
    u32 count[SAMPLING_BINS];

    MEMBER u64 upto(u32 bin, bool by_count) const { return by_count ? count[bin] : mass[bin]; }
    MEMBER u32 find(u64 target, bool by_count) const {  // first bin whose sum exceeds target, which the last one's does
        u32 low = 0, high = SAMPLING_BINS - 1;
        while (low < high) {
            const u32 middle = (low + high) / 2;
            if (upto(middle, by_count) > target) high = middle;
            else low = middle + 1;
        }
        return low;
    }
};

// A block's own histogram; 64-bit masses as two words, because shared memory adds 32 bits natively.
struct LocalHistogram {
    u32 low[SAMPLING_BINS], high[SAMPLING_BINS], count[SAMPLING_BINS];

    MEMBER void add_mass(u32 bin, u64 mass) {
        const u32 word = static_cast<u32>(mass), carry = atomicAdd(&low[bin], word) > ~word;
        const u32 upper = static_cast<u32>(mass >> 32) + carry;
        if (upper) atomicAdd(&high[bin], upper);
    }
};
static_assert(sizeof(LocalHistogram) == sizeof(Sums), "one takes the other's place");

struct Shared {
    Sums sums;         // of the order in use
    union {
        LocalHistogram histogram;
        Sums finer;    // of a histogram inside a bin
    };
    u64 list[SAMPLING_LIST];
    u64 warp_mass[WARPS];
    u32 warp_count[WARPS];
    u64 found_rank, found_mass;
    Order order;       // here rather than in registers: searches need those
    u32 list_count, list_place;
};

template <typename T>
DEVICE T warp_scan(T value) {  // inclusive
#pragma unroll
    for (u32 offset = 1; offset < 32; offset *= 2) {
        const T other = __shfl_up_sync(0xffffffffu, value, offset);
        if (threadIdx.x % 32 >= offset) value += other;
    }
    return value;
}

// Inclusive sums over the block's threads. Both barriers are the caller's as well: warp_* are free afterwards.
DEVICE void block_scan(Shared& s, u64& mass, u32& count) {
    mass = warp_scan(mass);
    count = warp_scan(count);
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 31) s.warp_mass[warp] = mass, s.warp_count[warp] = count;
    __syncthreads();
    for (int w = 0; w < warp; ++w) mass += s.warp_mass[w], count += s.warp_count[w];
    __syncthreads();
}

// The largest of a value of each thread, in thread 0.
DEVICE u64 block_max(Shared& s, u64 value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
    if (threadIdx.x % 32 == 0) s.warp_mass[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int w = 1; w < WARPS; ++w) value = max(value, s.warp_mass[w]);
    __syncthreads();
    return value;
}

// Adds a value of each thread to a word of global memory.
DEVICE void add_total(u64 value, u64* total) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    if (threadIdx.x % 32 == 0 && value) atomicAdd(total, value);
}

// Ascending; entries from `count` to the next power of two are filled with the largest rank.
DEVICE void sort_list(u64* list, u32 count) {
    u32 size = 2;
    while (size < count) size *= 2;
    for (u32 i = count + threadIdx.x; i < size; i += THREADS) list[i] = ~0ull;
    __syncthreads();
    for (u32 run = 2; run <= size; run *= 2)
        for (u32 distance = run / 2; distance > 0; distance /= 2) {
            for (u32 i = threadIdx.x; i < size / 2; i += THREADS) {
                const u32 low = 2 * i - (i & (distance - 1)), high = low + distance;
                const u64 a = list[low], b = list[high];
                if ((a > b) == ((low & run) == 0)) list[low] = b, list[high] = a;
            }
            __syncthreads();
        }
}

// The blocks of one row, in step with each other.
struct Selection {
    Shared& s;
    SamplingRow* work;
    Chunk chunk;
    u32 barriers, gathers;
    bool used_histogram;

    // Every block's writes so far are visible to every block of the row, which all must be resident.
    MEMBER void barrier() {
        ++barriers;
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(&work->arrivals, 1u);
            while (load_acquire(&work->arrivals) < barriers * gridDim.x) {}
            __threadfence();
        }
        __syncthreads();
    }

    MEMBER void clear_local() {
        u32* words = s.histogram.low;
        for (int i = threadIdx.x; i < 3 * SAMPLING_BINS; i += THREADS) words[i] = 0;
        __syncthreads();
    }

    // The order that searches use from now on.
    MEMBER Order set_order(int which, double temperature) {
        const Order order = order_of(__ldcg(&work->best[which]), __ldcg(&work->lowest[which]), temperature);
        __syncthreads();  // nobody uses the old one
        if (threadIdx.x == 0) s.order = order;
        __syncthreads();
        return order;
    }

    // The row's histogram must be zero before blocks add to it a second time.
    MEMBER void clear_row() {
        if (!used_histogram) return;
        barrier();  // all have read it
        for (int i = blockIdx.x * THREADS + threadIdx.x; i < SAMPLING_BINS; i += gridDim.x * THREADS)
            work->mass[i] = 0, work->count[i] = 0;
        barrier();
    }

    // Running sums over all blocks' local histograms.
    MEMBER void merge(Sums& sums) {
        __syncthreads();
        for (int i = threadIdx.x; i < SAMPLING_BINS; i += THREADS) {
            const u64 mass = static_cast<u64>(s.histogram.high[i]) << 32 | s.histogram.low[i];
            if (mass) atomicAdd(&work->mass[i], mass);
            if (s.histogram.count[i]) atomicAdd(&work->count[i], s.histogram.count[i]);
        }
        used_histogram = true;
        barrier();
        const int i = 2 * threadIdx.x;
        const u64 first_mass = __ldcg(&work->mass[i]), second_mass = __ldcg(&work->mass[i + 1]);
        const u32 first_count = __ldcg(&work->count[i]), second_count = __ldcg(&work->count[i + 1]);
        u64 mass = first_mass + second_mass;
        u32 count = first_count + second_count;
        block_scan(s, mass, count);
        sums.mass[i] = mass - second_mass, sums.mass[i + 1] = mass;
        sums.count[i] = count - second_count, sums.count[i + 1] = count;
        __syncthreads();
    }

    // The row's tokens in a range, in every block's list, unordered; returns how many there are. More than fit: no list.
    MEMBER u32 gather(const float* row, const Range& range) {
        const u32 turn = gathers++;
        if (threadIdx.x == 0) s.list_count = 0;
        __syncthreads();
        for_each(row, chunk, [&](int id, float x) {
            const u64 rank = rank_of(x, id);
            if (rank < range.low || rank > range.high) return;
            const u32 place = atomicAdd(&s.list_count, 1u);
            if (place < SAMPLING_LIST) s.list[place] = rank;
        });
        __syncthreads();
        if (threadIdx.x == 0 && s.list_count) s.list_place = atomicAdd(&work->list_count[turn], s.list_count);
        __syncthreads();
        u64* target = work->list + turn % 2 * SAMPLING_LIST;  // blocks may still read the list before this one
        for (u32 i = threadIdx.x; i < min(s.list_count, static_cast<u32>(SAMPLING_LIST)); i += THREADS)
            if (s.list_place + i < SAMPLING_LIST) target[s.list_place + i] = s.list[i];
        barrier();
        const u32 count = __ldcg(&work->list_count[turn]);
        if (count > SAMPLING_LIST) return count;
        for (u32 i = threadIdx.x; i < count; i += THREADS) s.list[i] = __ldcg(target + i);
        __syncthreads();
        return count;
    }

    // What precedes a range, and what is looked for.
    struct Search {
        u64 target;  // the first token is wanted whose sum, itself included, exceeds this
        bool by_count;
        u64 mass_before;
        u32 count_before;
        Range range;

        MEMBER u32 enter(const Sums& sums) {  // moves to the bin that has the target
            const u64 before = by_count ? count_before : mass_before;
            const u32 bin = sums.find(target - before, by_count);
            if (bin) mass_before += sums.mass[bin - 1], count_before += sums.count[bin - 1];
            return bin;
        }
    };

    // Histogram of the range alone, by rank, and the bin of it that has the target; returns how many tokens that holds.
    MEMBER u32 refine(const float* row, Search& search) {
        const Order order = s.order;
        int shift = 0;
        while ((search.range.high - search.range.low) >> shift >= SAMPLING_BINS) ++shift;
        clear_row();
        clear_local();
        for_each(row, chunk, [&](int id, float x) {
            const u64 rank = rank_of(x, id);
            if (rank < search.range.low || rank > search.range.high) return;
            const u32 bin = static_cast<u32>((rank - search.range.low) >> shift);
            const u64 mass = order.mass(order.weight(x));
            if (mass) s.histogram.add_mass(bin, mass);
            atomicAdd(&s.histogram.count[bin], 1u);
        });
        merge(s.finer);
        const u32 bin = search.enter(s.finer);
        search.range.low += static_cast<u64>(bin) << shift;
        search.range.high = min(search.range.high, search.range.low + (1ull << shift) - 1);
        return s.finer.count[bin] - (bin ? s.finer.count[bin - 1] : 0);
    }

    // The token where the running sum first exceeds `target`, and the sum of masses up to and with it. `s.sums` has the
    // histogram of the row by `s.order`; counts only where `by_count` needs them.
    MEMBER void find(const float* row, u64 target, bool by_count, u64& rank, u64& mass) {
        Search search = {target, by_count, 0, 0, {}};
        const u32 first = search.enter(s.sums);
        search.range.low = static_cast<u64>(s.order.bin_begin(first)) << ID_BITS;
        search.range.high = (static_cast<u64>(s.order.bin_begin(first + 1)) << ID_BITS) - 1;
        u32 count = gather(row, search.range);
        if (count > SAMPLING_LIST) {
            while (refine(row, search) > SAMPLING_LIST) {}
            count = gather(row, search.range);
        }
        sort_list(s.list, count);
        pick(search, count);
        rank = s.found_rank, mass = s.found_mass;
        __syncthreads();
    }

    // Searches the sorted list.
    MEMBER void pick(const Search& search, u32 count) {
        const Order order = s.order;
        u64 masses[4], sum = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const u32 i = 4 * threadIdx.x + e;
            masses[e] = i < count ? order.mass(order.weight(rank_value(s.list[i]))) : 0;
            sum += masses[e];
        }
        u64 upto = sum;
        u32 unused = 0;
        block_scan(s, upto, unused);
        upto += search.mass_before - sum;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const u32 i = 4 * threadIdx.x + e;
            const u64 before = upto;
            upto += masses[e];
            const bool here = search.by_count ? search.count_before + i == search.target
                                              : before <= search.target && search.target < upto;
            if (i < count && here) s.found_rank = s.list[i], s.found_mass = upto;
        }
        __syncthreads();
    }
};
