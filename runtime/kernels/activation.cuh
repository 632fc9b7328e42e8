// Where an activation element lies: what one kernel writes and a matrix product reads (Kp columns, zero beyond K).
//   rows:  [num_tokens][Kp], natural order.
//   tiled: [Kp/64][tokens_padded][64], each 128-byte row in eight 16-byte chunks at chunk ^ (row & 7), columns in the
//          order of the weights' A fragments: within 4 LANE columns, c = LANE t + 4q + 2u + e
//          (t 0..3, u, e 0..1) is at 16q + 8u + 2t + e. Pairs of columns (2i, 2i + 1) stay together.
#pragma once
#include "ptx.cuh"

// Columns that one lane holds of a row and step: 8 for 16-bit weights, 32 for MXFP4.
template <int LANE>
DEVICE int fragment_order(int column) {
    constexpr int STEP = 4 * LANE;
    const int c = column % STEP, t = c / LANE, r = c % LANE;
    return column - c + 16 * (r / 4) + 8 * (r / 2 % 2) + 2 * t + r % 2;
}

// Element index of (token, column) in the tiled layout.
template <int LANE>
DEVICE u64 tiled_offset(int token, int column, int tokens_padded) {
    const int position = fragment_order<LANE>(column), p = position % 64;
    const u64 row = static_cast<u64>(position / 64) * tokens_padded + token;
    return row * 64 + (((p / 8) ^ (token & 7)) * 8) + p % 8;
}

// Element index of (token, column) in the layout of this build; pitch is Kp for rows, tokens_padded for tiled.
template <int LANE, bool TILED>
DEVICE u64 activation_offset(int token, int column, int pitch) {
    if constexpr (TILED) return tiled_offset<LANE>(token, column, pitch);
    return static_cast<u64>(token) * pitch + column;
}
