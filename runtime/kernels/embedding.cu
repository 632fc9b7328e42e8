// embedding: x[token] = the row of the packed embedding matrix (specs/format.md, "Tile layout 2") for the token's id.
//
// grid: number of tokens; block: 256, one thread per 16-byte piece (8 columns). Build: one of ELEMENT_BF16 / ELEMENT_F16.
//
// blob   E [ceil16(vocab_size) / 16][steps][16 rows][32 columns]   4096-byte aligned, steps = ceil32(hidden_size) / 32
// ids          i32 [gridDim.x] or null: token i has id ids[i]; where that is negative, or there are none, what its slot was
//              given last
// slots        i32 [gridDim.x]; negative for rows that are not in use: they take id 0
// last_tokens  i32, of each slot
// x      float [gridDim.x][hidden_size]                            16-byte aligned
//
// Ids outside the vocabulary are clamped: nothing is read out of bounds.
#include "element.cuh"

constexpr int THREADS = 256;
constexpr int STEP_COLUMNS = 32;
constexpr int STEP_ELEMENTS = 16 * STEP_COLUMNS;
constexpr int PIECE = 8;
static_assert(STEP_COLUMNS % PIECE == 0, "a piece lies in one step");

extern "C" __global__ void __launch_bounds__(THREADS)
embedding(const Element* blob, int vocab_size, int hidden_size, const int* ids, const int* slots,
          const int* last_tokens, float* x) {
    launch_dependents();
    wait_for_previous();
    const int token = blockIdx.x;
    int id = ids == nullptr ? -1 : ids[token];
    if (id < 0) id = slots[token] < 0 ? 0 : last_tokens[slots[token]];
    id = min(max(id, 0), vocab_size - 1);
    const int steps = (hidden_size + STEP_COLUMNS - 1) / STEP_COLUMNS;
    const Element* row = blob + static_cast<u64>(id / 16) * steps * STEP_ELEMENTS + id % 16 * STEP_COLUMNS;
    float* out = x + static_cast<u64>(token) * hidden_size;
    for (int column = PIECE * threadIdx.x; column < hidden_size; column += PIECE * THREADS) {
        const uint4 piece =
            load_streaming(row + static_cast<u64>(column / STEP_COLUMNS) * STEP_ELEMENTS + column % STEP_COLUMNS);
        const float2 a = to_float2(piece.x), b = to_float2(piece.y), c = to_float2(piece.z), d = to_float2(piece.w);
        const float values[PIECE] = {a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y};
        if (hidden_size % 4 == 0 && column + PIECE <= hidden_size) {
            *reinterpret_cast<float4*>(out + column) = make_float4(values[0], values[1], values[2], values[3]);
            *reinterpret_cast<float4*>(out + column + 4) = make_float4(values[4], values[5], values[6], values[7]);
        } else {
#pragma unroll
            for (int e = 0; e < PIECE; ++e)
                if (column + e < hidden_size) out[column + e] = values[e];
        }
    }
}
