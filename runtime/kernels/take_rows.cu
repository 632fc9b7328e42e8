// take_rows: chosen rows of the residual stream and of the attention's output, one after the other, for what follows in a last
// layer that only they go through.
//
// grid: number of chosen rows; block: 256. Build: one of ELEMENT_BF16 / ELEMENT_F16, LANE_COLUMNS (8, or 32 where an MXFP4
// product follows), SOURCE_TILED and TARGET_TILED (0, 1) of the activation layout.
//
// rows     i32 [gridDim.x], rows of x and a
// x        float [..][hidden_size]        taken_x  float [gridDim.x][hidden_size]
// a        E, activation layout (activation.cuh), `columns` of which are copied, an even number; a_pitch as SOURCE_TILED says
// taken_a  E, likewise, taken_pitch as TARGET_TILED says
#include "activation.cuh"
#include "element.cuh"

constexpr int THREADS = 256;
static_assert(LANE_COLUMNS == 8 || LANE_COLUMNS == 32, "a lane's columns of 16-bit and of MXFP4 weights");

extern "C" __global__ void __launch_bounds__(THREADS)
take_rows(const int* rows, const float* x, int hidden_size, float* taken_x, const Element* a, int columns, int a_pitch,
          Element* taken_a, int taken_pitch) {
    launch_dependents();
    wait_for_previous();
    const int target = blockIdx.x, source = rows[target];
    const float* from = x + static_cast<u64>(source) * hidden_size;
    float* to = taken_x + static_cast<u64>(target) * hidden_size;
#pragma unroll 4
    for (int column = threadIdx.x; column < hidden_size; column += THREADS) to[column] = from[column];
#pragma unroll 4
    for (int column = 2 * threadIdx.x; column < columns; column += 2 * THREADS) {
        const u64 place = activation_offset<LANE_COLUMNS, TARGET_TILED>(target, column, taken_pitch);
        *reinterpret_cast<u32*>(taken_a + place) =
            *reinterpret_cast<const u32*>(a + activation_offset<LANE_COLUMNS, SOURCE_TILED>(source, column, a_pitch));
    }
}
