// sampling: one token per row of logits, and the decode state that follows from it. Two entry points:
//
// sampling: grid (blocks per row, rows), block 512; a row's blocks wait for each other, so all must be resident at once
//   (runtime/sampling_state.py plans it). Argument: SamplingArguments (sampling_state.cuh), by value. Per row, in this order:
//   1. the adjusted logits, in FP32, every step rounded: + logit_bias; where the token came before, / or * repetition_penalty;
//      - frequency_penalty * times generated; - presence_penalty if generated; the least finite float, whose weight is zero,
//      where the row's mask does not allow the token;
//   2. greedy: the largest, the lowest id among equals; or temperature, top-k, top-p, min-p and a draw as in
//      runtime/sampler.py, with Philox4x64-10 of (seed; position + 1), the position of the token that is drawn;
//   3. log probabilities, of the model's own logits before 1: log softmax of the chosen token and of the likeliest.
//   Then: result into the ring, last_token, counts, positions += 1, finished. A row whose adjusted logits hold an infinity or
//   a NaN (of a token that is not allowed too) is flagged instead, and its slot marked finished: nothing else of it changes.
//
// count_tokens: grid any, block 256. Marks tokens of a prompt (generated 0) or counts generated ones (1) in a slot's counts,
//   which the host has cleared; for slots with penalties, once, before their first step. Ids outside the vocabulary are skipped.
//
// Numerics: a token's weight is exp of a float64, as in the reference, then a fixed-point number of 2^-44; sums are integers and
// exact. So the result does not depend on the batch or the grid. It differs from the reference only where u or a top-p limit is
// within rounding (below 2^-45 per token passed) of a boundary between two tokens; weights below 2^-45 of the largest are never drawn.
#include "sampling_select.cuh"

constexpr u32 IN_PROMPT = 0x8000u;
constexpr u32 MAX_COUNT = 0x7fffu;
constexpr int COUNT_THREADS = 256;
constexpr float FLOAT_MAX = 3.402823466e38f;

// First word of NumPy's Philox(key = seed, counter = position): it increments the counter before it draws.
DEVICE u64 philox(u64 seed, u64 position) {
    u64 c0 = position + 1, c1 = 0, c2 = 0, c3 = 0, k0 = seed, k1 = 0;
#pragma unroll 1
    for (int round = 0; round < 10; ++round) {
        const u64 low0 = 0xD2E7470EE14C6C93ull * c0, high0 = __umul64hi(0xD2E7470EE14C6C93ull, c0);
        const u64 low1 = 0xCA5A826395121157ull * c2, high1 = __umul64hi(0xCA5A826395121157ull, c2);
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B97F4A7C15ull, k1 += 0xBB67AE8584CAA73Bull;
    }
    return c0;
}

DEVICE bool is_adjusted(const SamplingSlot& p) {
    return p.num_biases > 0 || p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

DEVICE float penalised(float x, u32 count, const SamplingSlot& p) {
    if (count) x = x > 0.0f ? __fdiv_rn(x, p.repetition_penalty) : __fmul_rn(x, p.repetition_penalty);
    const u32 generated = count & MAX_COUNT;
    x = __fsub_rn(x, __fmul_rn(p.frequency_penalty, static_cast<float>(generated)));
    return __fsub_rn(x, generated ? p.presence_penalty : 0.0f);
}

struct Row {
    const float* raw;
    const float* logits;  // adjusted, or raw where nothing adjusts them
    int index, slot;
};

// Writes the block's chunk of adjusted logits.
DEVICE void adjust(const SamplingArguments& a, const SamplingSlot& p, const Chunk& chunk, const Row& row, float* adjusted) {
    const u16* counts = a.counts == nullptr ? nullptr : a.counts + static_cast<u64>(row.slot) * a.counts_pitch;
    const u32* mask = a.masks == nullptr ? nullptr : a.masks + static_cast<u64>(row.index) * ((a.vocab_size + 31) / 32);
    const auto value = [&](int id, float x) {
        const bool is_allowed = mask == nullptr || mask[id / 32] >> id % 32 & 1;
        if (!is_allowed && fabsf(x) <= FLOAT_MAX) return -FLOAT_MAX;  // what is not finite stays: the row is flagged
        return penalised(x, counts == nullptr ? 0 : counts[id], p);
    };
    for_each(row.raw, chunk, [&](int id, float x) { adjusted[id] = value(id, x); });
    __syncthreads();
    const BiasEntry* biases = a.biases + static_cast<u64>(row.slot) * MAX_BIASED_TOKENS;
    const int begin = 4 * chunk.begin, end = min(4 * chunk.end, a.vocab_size);
    for (int i = threadIdx.x; i < min(p.num_biases, MAX_BIASED_TOKENS); i += THREADS) {
        const int id = biases[i].token;
        if (id < begin || id >= end) continue;
        adjusted[id] = value(id, __fadd_rn(row.raw[id], biases[i].bias));
    }
    __syncthreads();
}

// Largest and least logit of the row, and whether all are finite, into the row's workspace.
DEVICE void find_extremes(Selection& selection, const float* values, int which) {
    float best = __uint_as_float(0xff800000u), lowest = __uint_as_float(0x7f800000u);
    int best_id = -1;
    u32 magnitude = 0;
    for_each(values, selection.chunk, [&](int id, float x) {
        magnitude = max(magnitude, __float_as_uint(x) & 0x7fffffffu);
        if (x > best) best = x, best_id = id;
        lowest = fminf(lowest, x);
    });
    SamplingRow* work = selection.work;
    if (magnitude >= 0x7f800000u) atomicOr(&work->not_finite, 1u);
    const u64 packed = best_id < 0 ? 0 : static_cast<u64>(key_of(best)) << 32 | ~static_cast<u32>(best_id);
    const u64 largest = block_max(selection.s, packed);
    const u64 least = block_max(selection.s, best_id < 0 ? 0 : static_cast<u64>(~key_of(lowest)));
    if (threadIdx.x == 0 && largest) {
        atomicMax(&work->best[which], largest);
        atomicMax(&work->lowest[which], least);
    }
}

enum Stage { TOP_K, TOP_P, DRAW };

// The drawn token; all blocks of the row get the same.
DEVICE int draw(Selection& selection, const SamplingSlot& p, const float* logits, u64 position, int vocab_size) {
    SamplingRow* work = selection.work;
    Shared& s = selection.s;
    const Order order = selection.set_order(0, p.temperature);
    const bool limits_count = p.top_k > 0 && p.top_k < vocab_size;
    const double min_p = p.min_p;
    u64 min_p_mass = 0, rank = 0;
    selection.clear_local();
    for_each(logits, selection.chunk, [&](int, float x) {
        const double weight = order.weight(x);
        const u64 mass = order.mass(weight);
        const u32 bin = order.bin(x);
        if (mass) s.histogram.add_mass(bin, mass);
        if (limits_count) atomicAdd(&s.histogram.count[bin], 1u);
        if (weight >= min_p) min_p_mass += mass;
    });
    add_total(min_p_mass, &work->min_p_mass);
    selection.merge(s.sums);
    u64 kept = s.sums.mass[SAMPLING_BINS - 1];  // mass of the tokens that stay: always a beginning of the sorted row
    // One search per limit, then the draw's; in a loop, so that the code of a search is there once.
#pragma unroll 1
    for (int stage = limits_count ? TOP_K : TOP_P; stage <= DRAW; ++stage) {
        u64 target = p.top_k - 1;
        if (stage == TOP_K) {
            const u32 bin = s.sums.find(target, true);
            if (bin && s.sums.mass[bin - 1] == kept) continue;  // what the limit cuts off has no mass
        } else if (stage == TOP_P) {
            if (p.top_p >= 1.0) continue;
            target = min(max(static_cast<u64>(ceil(p.top_p * static_cast<double>(kept))), 1ull), kept) - 1;
        } else {
            if (p.min_p > 0.0) kept = min(kept, __ldcg(&work->min_p_mass));
            target = __umul64hi(philox(p.seed, position) & ~0x7ffull, kept);  // floor(u * kept), u of 53 bits
        }
        selection.find(logits, target, stage == TOP_K, rank, kept);
    }
    return rank_id(rank);
}

// Mass of the raw logits, and the likeliest tokens into the shared list; returns how many.
DEVICE int find_top(Selection& selection, const float* raw, int which, int num_top, int vocab_size) {
    SamplingRow* work = selection.work;
    Shared& s = selection.s;
    const Order order = selection.set_order(which, 1.0);
    u64 total = 0;
    num_top = min(min(num_top, MAX_TOP_LOGPROBS), vocab_size);
    if (num_top <= 0) {
        for_each(raw, selection.chunk, [&](int, float x) { total += order.mass(order.weight(x)); });
        add_total(total, &work->raw_mass);
        return 0;
    }
    selection.clear_row();
    selection.clear_local();
    for_each(raw, selection.chunk, [&](int, float x) {
        total += order.mass(order.weight(x));
        atomicAdd(&s.histogram.count[order.bin(x)], 1u);
    });
    add_total(total, &work->raw_mass);
    selection.merge(s.sums);
    u64 rank, mass;
    selection.find(raw, num_top - 1, true, rank, mass);
    sort_list(s.list, selection.gather(raw, {0, rank}));
    return num_top;
}

// Leaves the row's workspace zero.
DEVICE void reset(SamplingRow* work, bool used_histogram) {
    if (threadIdx.x == 0) {
        work->arrivals = work->exits = work->not_finite = 0;
        work->best[0] = work->best[1] = work->lowest[0] = work->lowest[1] = work->raw_mass = work->min_p_mass = 0;
    }
    if (threadIdx.x < SAMPLING_GATHERS) work->list_count[threadIdx.x] = 0;
    if (used_histogram)
        for (int i = threadIdx.x; i < SAMPLING_BINS; i += THREADS) work->mass[i] = 0, work->count[i] = 0;
}

// The row is done; the last one moves the ring on.
DEVICE void count_row(u32* step) {
    __threadfence();
    if (atomicAdd(step + 1, 1u) != gridDim.y - 1) return;
    step[1] = 0;
    step[0] += 1;
}

DEVICE SamplingResult* ring_place(const SamplingArguments& a, int row) {
    return a.ring + static_cast<u64>(*a.step % a.ring_steps) * a.ring_rows + row;
}

// One thread: what the chosen token means for its slot.
DEVICE void advance(const SamplingArguments& a, const SamplingSlot& p, const Row& row, int token) {
    const int position = a.positions[row.index] + 1;
    bool finished = position >= p.last_position;
    for (int i = 0; i < a.num_eos_tokens; ++i) finished |= a.eos_tokens[i] == token && !p.ignore_eos;
    if (finished) a.finished[row.slot] = 1;
    a.last_token[row.slot] = token;
    a.positions[row.index] = position;
    if (a.counts == nullptr) return;
    u16* count = a.counts + static_cast<u64>(row.slot) * a.counts_pitch + token;
    if ((*count & MAX_COUNT) < MAX_COUNT) *count += 1;
}

// The row's last block: result, state, workspace.
DEVICE void finish(const SamplingArguments& a, const SamplingSlot& p, Selection& selection, const Row& row, int token, int num_top) {
    SamplingRow* work = selection.work;
    const int which = row.logits == row.raw ? 0 : 1;
    const bool not_finite = __ldcg(&work->not_finite) != 0;
    if (token < 0) token = static_cast<int>(~static_cast<u32>(__ldcg(&work->best[0])));
    const float largest = value_of(static_cast<u32>(__ldcg(&work->best[which]) >> 32));
    SamplingResult* result = ring_place(a, row.index);
    double offset = 0.0;  // log of the sum of exp(logit)
    if (p.top_logprobs >= 0 && !not_finite)
        offset = largest + log(static_cast<double>(__ldcg(&work->raw_mass)) / (1ull << FRACTION_BITS));
    if (threadIdx.x < MAX_TOP_LOGPROBS) {
        const bool present = !not_finite && static_cast<int>(threadIdx.x) < num_top;
        const u64 rank = present ? selection.s.list[threadIdx.x] : 0;
        result->top_tokens[threadIdx.x] = present ? rank_id(rank) : -1;
        result->top_logprobs[threadIdx.x] = present ? static_cast<float>(rank_value(rank) - offset) : 0.0f;
    }
    if (threadIdx.x == 0) {
        result->token = not_finite ? -1 : token;
        result->not_finite = not_finite;
        result->logprob = p.top_logprobs >= 0 && !not_finite ? static_cast<float>(row.raw[token] - offset) : 0.0f;
        result->num_top = not_finite ? 0 : num_top;
        if (not_finite) a.finished[row.slot] = 1;
        else advance(a, p, row, token);
    }
    __syncthreads();
    reset(work, selection.used_histogram);
    __syncthreads();
    if (threadIdx.x == 0) count_row(a.step);
}

DEVICE void skip(const SamplingArguments& a) {
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    SamplingResult* result = ring_place(a, blockIdx.y);
    result->token = -1, result->not_finite = 0, result->logprob = 0.0f, result->num_top = 0;
    count_row(a.step);
}

// Whether this block is the row's last; what the others wrote is visible to it.
DEVICE bool leaves_last(Selection& selection) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(&selection.work->exits, 1u) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    return last;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sampling(const SamplingArguments a) {
    __shared__ Shared s;
    launch_dependents();
    wait_for_previous();
    const int index = blockIdx.y, slot = a.slots[index], position = a.positions[index];
    if (slot < 0 || position < 0) {
        skip(a);
        return;
    }
    __shared__ SamplingSlot p;
    if (threadIdx.x == 0) p = a.parameters[slot];
    __syncthreads();
    const int quads = (a.vocab_size + 3) / 4;
    const Chunk chunk = {static_cast<int>(static_cast<u64>(quads) * blockIdx.x / gridDim.x),
                         static_cast<int>(static_cast<u64>(quads) * (blockIdx.x + 1) / gridDim.x), a.vocab_size};
    Selection selection = {s, a.work + index, chunk, 0, 0, false};
    Row row = {a.logits + static_cast<u64>(index) * a.logits_pitch, nullptr, index, slot};
    row.logits = row.raw;
    const bool wants_logprobs = p.top_logprobs >= 0;
    if (a.masks != nullptr || is_adjusted(p)) {
        float* adjusted = a.adjusted + static_cast<u64>(index) * a.logits_pitch;
        adjust(a, p, chunk, row, adjusted);
        row.logits = adjusted;
        if (wants_logprobs) find_extremes(selection, row.raw, 1);
    }
    find_extremes(selection, row.logits, 0);
    int token = -1, num_top = 0;
    if (p.temperature > 0.0 || wants_logprobs) {
        selection.barrier();
        if (!__ldcg(&selection.work->not_finite)) {
            if (p.temperature > 0.0) token = draw(selection, p, row.logits, static_cast<u64>(position) + 1, a.vocab_size);
            if (wants_logprobs) num_top = find_top(selection, row.raw, row.logits == row.raw ? 0 : 1, p.top_logprobs, a.vocab_size);
        }
    }
    if (leaves_last(selection)) finish(a, p, selection, row, token, num_top);
}

extern "C" __global__ void __launch_bounds__(COUNT_THREADS)
count_tokens(u16* counts, int vocab_size, const int* tokens, int num_tokens, int generated) {
    launch_dependents();
    wait_for_previous();
    for (int i = blockIdx.x * COUNT_THREADS + threadIdx.x; i < num_tokens; i += gridDim.x * COUNT_THREADS) {
        const int token = tokens[i];
        if (token < 0 || token >= vocab_size) continue;
        u32* word = reinterpret_cast<u32*>(counts) + token / 2;
        const int shift = token % 2 * 16;
        if (!generated) {
            atomicOr(word, IN_PROMPT << shift);
            continue;
        }
        u32 seen = *word, assumed;
        do {
            assumed = seen;
            if ((assumed >> shift & MAX_COUNT) == MAX_COUNT) break;
            seen = atomicCAS(word, assumed, assumed + (1u << shift));
        } while (seen != assumed);
    }
}
