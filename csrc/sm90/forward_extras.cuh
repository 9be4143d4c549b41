// Softcap, ALiBi and dropout on the scores of a warp: fragment n holds the columns first_col + 8 n
// + lane % 4 * 2 + e of the rows first_row + lane / 4 + 8 half.
#pragma once

#include "arith/dropout.h"
#include "device/softcap.cuh"
#include "params.h"

namespace flash::sm90 {

/// Products q k^T to scores. `diagonal` is the column on which row 0 lies.
template <int kN>
__device__ __forceinline__ void apply_options(float (&scores)[kN][4], ScoreOptions const& options,
                                              float softmax_scale, int batch, int head,
                                              int first_row, int first_col, int diagonal) {
  float scale = softmax_scale;
  if (options.softcap != 0.f) {
    auto const for_each = [&](auto const& visit) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          visit(scores[n][i]);
        }
      }
    };
    apply_softcap(for_each, softmax_scale, options.softcap);
    scale = options.softcap;
  }
  float slope = 0.f;
  if (options.alibi_slopes != nullptr) {
    slope = options.alibi_slopes[int64_t(batch) * options.alibi_batch_stride + head];
  }
  int const lane_idx = threadIdx.x % 32;
  float const distance =
      float(first_row + lane_idx / 4 + diagonal - (first_col + lane_idx % 4 * 2));
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float const to_key = distance + float(i / 2 * 8 - 8 * n - i % 2);
      scores[n][i] = fmaf(-slope, fabsf(to_key), scores[n][i] * scale);
    }
  }
}

/// What one lane of a pair knows of two neighbouring 16 x 16 blocks: the bits of its own rows.
struct DropoutPair {
  uint32_t low[2], high[2];  // of the first and the second block: rows g (low) and g + 8
};

/// The lanes of the rows 2a and 2a + 1 need the same two generator calls, of which each makes one.
/// The 16 bits for a row, columns 2b, 2b + 1 of either half of the block: bytes 2 (row % 2), + 1 of
/// two words.
__device__ __forceinline__ DropoutPair exchange_bits(Philox4 const& own, bool is_odd_row) {
  // Bytes 0, 1 are the even row's, bytes 2, 3 the odd one's.
  uint32_t const low_even = __byte_perm(own.x, own.y, 0x5410);
  uint32_t const low_odd = __byte_perm(own.x, own.y, 0x7632);
  uint32_t const high_even = __byte_perm(own.z, own.w, 0x5410);
  uint32_t const high_odd = __byte_perm(own.z, own.w, 0x7632);
  uint32_t const low = __shfl_xor_sync(0xffffffffu, is_odd_row ? low_even : low_odd, 4);
  uint32_t const high = __shfl_xor_sync(0xffffffffu, is_odd_row ? high_even : high_odd, 4);
  return is_odd_row ? DropoutPair{{low, low_odd}, {high, high_odd}}
                    : DropoutPair{{low_even, low}, {high_even, high}};
}

/// Clears the probabilities that dropout drops. first_row and first_col are multiples of 16.
template <int kN>
__device__ __forceinline__ void drop(float (&probabilities)[kN][4], Dropout const& dropout,
                                     int batch_head, int first_row, int first_col) {
  int const lane_idx = threadIdx.x % 32;
  int const row = first_row + lane_idx / 4;
  bool const is_odd_row = row % 2 != 0;
  int64_t const seed = dropout.rng_state[0], offset = dropout.rng_state[1];
#pragma unroll
  for (int n = 0; n < kN; n += 4) {
    // Of an odd number of blocks the last pair reaches past the tile: those bits are not used.
    int const col = first_col + 8 * n + (is_odd_row ? 16 : 0) + lane_idx % 4 * 2;
    DropoutPair const bits =
        exchange_bits(dropout_bits(seed, offset, batch_head, row, col), is_odd_row);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        int const fragment = n + 2 * block + i / 4;
        uint32_t const word = i % 4 < 2 ? bits.low[block] : bits.high[block];
        int const byte = int(word >> (i / 4 * 16 + i % 2 * 8) & 255);
        if (fragment < kN && byte > dropout.last_kept_byte) {
          probabilities[fragment][i % 4] = 0.f;
        }
      }
    }
  }
}

}  // namespace flash::sm90
