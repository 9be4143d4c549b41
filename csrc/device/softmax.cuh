// Online softmax over the key tiles of a query tile, and the element mask of one score tile.
#pragma once

#include "arith/mask_rule.h"
#include "device/element.cuh"
#include "device/fresh_idx.cuh"

namespace flash {

/// Maximum and sum over the four lanes that share the rows of an accumulator piece.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/// Where the pieces of a warp's accumulator lie in the score matrix: piece (m, n) begins at row
/// first_row + m * row_step and column first_col + (n / 2) * col_step + (n % 2) * 8.
struct PiecePlacement {
  int first_row, row_step;
  int first_col, col_step;
};

/// Sets the scores of invisible pairs to -inf.
template <int kM, int kN>
__device__ __forceinline__ void apply_mask(float (&scores)[kM][kN][4], PiecePlacement const& place,
                                           Mask mask, int seqlen_q, int seqlen_k) {
  int const lane_idx = fresh_thread_idx() % 32;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = place.first_row + m * place.row_step + half * 8 + lane_idx / 4;
      KeyRange const keys = visible_keys(mask, row, seqlen_q, seqlen_k);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        int const col = place.first_col + n / 2 * place.col_step + n % 2 * 8 + lane_idx % 4 * 2;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (col + e < keys.begin || col + e >= keys.end) {
            scores[m][n][2 * half + e] = -kInfinity;
          }
        }
      }
    }
  }
}

/// Running maximum and sum of the rows of kM accumulator pieces. The sum is kept per lane and
/// reduced over the quad once, at the end.
template <int kM>
struct OnlineSoftmax {
  float row_max[kM][2];  // of the unscaled scores
  float row_sum[kM][2];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        row_max[m][half] = -kInfinity;
        row_sum[m][half] = 0.f;
      }
    }
  }

  /// Replaces scores by exp(softmax_scale * (score - row maximum)) and brings sum and output to the
  /// new maximum. A row that has seen no visible key keeps maximum -inf, sum 0 and output 0.
  template <int kN, int kD>
  __device__ __forceinline__ void update(float (&scores)[kM][kN][4], float (&out)[kM][kD][4],
                                         float softmax_scale_log2) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float new_max = row_max[m][half];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          new_max = fmaxf(new_max, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        }
        new_max = quad_max(new_max);
        float const shift = new_max == -kInfinity ? 0.f : new_max * softmax_scale_log2;
        float const rescale = exp2_approx(row_max[m][half] * softmax_scale_log2 - shift);
        row_max[m][half] = new_max;
        float sum = row_sum[m][half] * rescale;
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores[m][n][e] = exp2_approx(fmaf(scores[m][n][e], softmax_scale_log2, -shift));
            sum += scores[m][n][e];
          }
        }
        row_sum[m][half] = sum;
#pragma unroll
        for (int d = 0; d < kD; ++d) {
          out[m][d][2 * half] *= rescale;
          out[m][d][2 * half + 1] *= rescale;
        }
      }
    }
  }
};

}  // namespace flash
