// What the sampling kernels share with the host: runtime/sampling_state.py has the same structures as NumPy dtypes, and a
// test compares field by field. No padding anywhere: each field is aligned by its place.
#pragma once
#include "ptx.cuh"

constexpr int MAX_TOP_LOGPROBS = 20;
constexpr int MAX_BIASED_TOKENS = 300;
constexpr int SAMPLING_BINS = 1024;   // of a histogram over a row
constexpr int SAMPLING_LIST = 2048;   // tokens that are sorted at once
constexpr int SAMPLING_GATHERS = 16;  // lists of one row and launch

// Parameters of one slot. temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1 and penalties 0 are off.
struct SamplingSlot {
    double temperature, top_p, min_p;
    u64 seed;
    int top_k;
    float repetition_penalty, presence_penalty, frequency_penalty;
    int num_biases;
    int top_logprobs;   // -1: no log probabilities; 0: the chosen token's; n: those of the n likeliest too
    int last_position;  // a token at this position or later finishes the sequence
    u32 ignore_eos;
};
static_assert(sizeof(SamplingSlot) == 64, "as in sampling_state.py");

struct BiasEntry {
    int token;  // each at most once in a slot
    float bias;
};
static_assert(sizeof(BiasEntry) == 8, "as in sampling_state.py");

// What the host reads of one row and step. token -1: the row was not in use, or its logits were not finite.
struct SamplingResult {
    int token;
    u32 not_finite;
    float logprob;
    int num_top;
    int top_tokens[MAX_TOP_LOGPROBS];
    float top_logprobs[MAX_TOP_LOGPROBS];
};
static_assert(sizeof(SamplingResult) == 176, "as in sampling_state.py");

// Workspace of one row: zero before the first launch, and again after every launch (lists excepted).
struct SamplingRow {
    u32 arrivals, exits, not_finite, unused;
    u64 best[2];      // largest key << 32 | ~id: of the adjusted logits, of the raw ones
    u64 lowest[2];    // largest ~key
    u64 raw_mass, min_p_mass;
    u32 list_count[SAMPLING_GATHERS];
    u64 mass[SAMPLING_BINS];
    u32 count[SAMPLING_BINS];
    u64 list[2 * SAMPLING_LIST];
};
static_assert(sizeof(SamplingRow) == 128 + 12 * SAMPLING_BINS + 16 * SAMPLING_LIST, "as in sampling_state.py");

// The one argument of `sampling`. slots, positions and results are indexed by row; the rest by slot or as said.
struct SamplingArguments {
    const float* logits;        // [rows][logits_pitch], 16-byte aligned
    float* adjusted;            // [rows][logits_pitch], 16-byte aligned, workspace
    SamplingRow* work;          // [rows]
    const int* slots;           // [rows], -1: not in use
    int* positions;             // [rows], of the token whose logits these are, -1: not in use; the drawn one is at + 1
    const SamplingSlot* parameters;  // [slots]
    const BiasEntry* biases;    // [slots][MAX_BIASED_TOKENS]
    u16* counts;                // [slots][counts_pitch] or null: bit 15 in the prompt, bits 0 to 14 how often generated
    int* last_token;            // [slots]
    u32* finished;              // [slots]
    const int* eos_tokens;      // [num_eos_tokens]
    SamplingResult* ring;       // [ring_steps][ring_rows]
    const u32* masks;           // [rows][ceil32(vocab_size) / 32] or null: bit id % 32 of word id / 32, 1 where allowed
    u32* step;                  // [2]: steps done (the ring's place is step % ring_steps), rows done of this one
    int vocab_size, logits_pitch, counts_pitch, num_eos_tokens, ring_steps, ring_rows;
};
static_assert(sizeof(SamplingArguments) == 136, "as in sampling_state.py");
