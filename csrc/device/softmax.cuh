// Online softmax over the key tiles of a query tile, and the element mask of one score tile.
#pragma once

#include "arith/mask_rule.h"
#include "device/fresh.cuh"
#include "device/mma.cuh"
#include "device/row_end.cuh"

namespace flash {

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
  int const lane_col = place.first_col + lane_idx % 4 * 2;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = place.first_row + m * place.row_step + half * 8 + lane_idx / 4;
      KeyRange const keys = visible_keys(mask, row, seqlen_q, seqlen_k);
      // Relative to the lane's first column every comparison is with a constant.
      int const begin = keys.begin - lane_col, end = keys.end - lane_col;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          int const col = n / 2 * place.col_step + n % 2 * 8 + e;
          if (col < begin || col >= end) {
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

  /// Takes over the maxima of a score tile, and scales sum and output to them, when a row's maximum
  /// has grown by more than max_slack powers of two; that some lane's has is enough to know, so
  /// lanes exchange maxima only then. A row that has seen no visible key keeps maximum -inf, sum 0
  /// and output 0.
  template <int kN, int kD>
  __device__ __forceinline__ void rescale(float const (&scores)[kM][kN][4], float (&out)[kM][kD][4],
                                          float softmax_scale_log2, float max_slack) {
    float tile_max[kM][2];
    bool grown = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float lane_max = scores[m][0][2 * half];
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          lane_max = fmaxf(lane_max, fmaxf(scores[m][n][2 * half], scores[m][n][2 * half + 1]));
        }
        tile_max[m][half] = lane_max;
        grown |= (lane_max - row_max[m][half]) * softmax_scale_log2 > max_slack;
      }
    }
    if (!__any_sync(0xffffffffu, grown)) {
      return;
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float const new_max = fmaxf(row_max[m][half], quad_max(tile_max[m][half]));
        float const shift = finite_or_zero(new_max);
        float const factor = exp2_approx((row_max[m][half] - shift) * softmax_scale_log2);
        row_max[m][half] = new_max;
        row_sum[m][half] *= factor;
#pragma unroll
        for (int d = 0; d < kD; ++d) {
          out[m][d][2 * half] *= factor;
          out[m][d][2 * half + 1] *= factor;
        }
      }
    }
  }

  /// Sets p = exp(softmax_scale * (scores - row maximum)) as operand pieces (an accumulator
  /// fragment is the operand fragment of the next product) and adds it to the sums. In the order in
  /// which that product takes them: row after row spilled 20 bytes at head dim 128 on sm_80.
  template <DType kDType, int kN, int kPieces>
  __device__ __forceinline__ void exponentials(float const (&scores)[kM][kN][4],
                                               Piece (&p)[kM][kPieces], float softmax_scale_log2) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float const shift = finite_or_zero(row_max[m][half]) * softmax_scale_log2;
          float const left = exp2_approx(fmaf(scores[m][n][2 * half], softmax_scale_log2, -shift));
          float const right =
              exp2_approx(fmaf(scores[m][n][2 * half + 1], softmax_scale_log2, -shift));
          row_sum[m][half] += left + right;
          set_pair<kDType>(p[m], n, half, left, right);
        }
      }
    }
  }
};

}  // namespace flash
