// Softcap and ALiBi on the accumulators of a score tile.
#pragma once

#include "device/fresh.cuh"
#include "device/softcap.cuh"
#include "device/softmax.cuh"

namespace flash {

/// What ALiBi takes from a lane's scores.
struct AlibiLane {
  float slope;  // in units of score_unit()
  float first;  // slope * (i + seqlen_k - seqlen_q - j) of the lane's first element

  AlibiLane() = default;
  /// `natural_slope` is alibi_slope(), `shift` seqlen_k - seqlen_q.
  __device__ __forceinline__ AlibiLane(PiecePlacement const& place, float natural_slope, float unit,
                                       int shift)
      : slope(natural_slope * reciprocal_approx(unit)) {
    int const lane_idx = fresh_thread_idx() % 32;
    int const row = place.first_row + lane_idx / 4, col = place.first_col + lane_idx % 4 * 2;
    first = slope * float(row + shift - col);
  }

  /// slope * |distance| of element e of fragment (m, n): one FMA, for the absolute value is a
  /// modifier of the addition that follows.
  __device__ __forceinline__ float of(PiecePlacement const& place, int m, int n, int e) const {
    int const row = m * place.row_step + e / 2 * 8;
    int const col = n / 2 * place.col_step + n % 2 * 8 + e % 2;
    return fabsf(fmaf(slope, float(row - col), first));
  }
};

template <int kM, int kN>
__device__ __forceinline__ void subtract_alibi(float (&scores)[kM][kN][4],
                                               PiecePlacement const& place,
                                               AlibiLane const& alibi) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        scores[m][n][e] -= alibi.of(place, m, n, e);
      }
    }
  }
}

/// Products q k^T to scores in units of score_unit(). Has to be called by whole warps.
template <int kM, int kN>
__device__ __forceinline__ void apply_options(float (&scores)[kM][kN][4],
                                              PiecePlacement const& place,
                                              ScoreOptions const& options, float softmax_scale,
                                              float slope, Sequence const& sequence) {
  if (options.softcap != 0.f) {
    cap_scores(scores, options, softmax_scale);
  }
  if (options.alibi_slopes != nullptr) {
    subtract_alibi(scores, place,
                   AlibiLane(place, slope, score_unit(options, softmax_scale),
                             sequence.seqlen_k - sequence.seqlen_q));
  }
}

}  // namespace flash
