// Softcap, ALiBi and dropout on the transposed scores of a warp: its rows are 16 keys.
#pragma once

#include "sm90/forward_extras.cuh"

namespace flash::sm90 {

/// Products to scores in units of score_unit(), and the derivative of each by the scaled product,
/// packed; that is left alone without a softcap. `place` and `transposed` have keys for rows.
template <DType kDType, int kSteps>
__device__ __forceinline__ void apply_options(float (&scores)[2 * kSteps][4],
                                              uint32_t (&derivative)[kSteps][4],
                                              PiecePlacement const& place,
                                              ScoreOptions const& options, float softmax_scale,
                                              float slope, Sequence const& transposed) {
  if (options.softcap != 0.f) {
    // By exponentials alone: the polynomial of cap_scores() spills here.
    float const exponent_scale = tanh_exponent_scale(options, softmax_scale);
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& left = scores[n][2 * half];
        float& right = scores[n][2 * half + 1];
        left = tanh_by_exp(left * exponent_scale);
        right = tanh_by_exp(right * exponent_scale);
        derivative[n / 2][n % 2 * 2 + half] =
            pack2<kDType>(fmaf(-left, left, 1.f), fmaf(-right, right, 1.f));
      }
    }
  }
  if (options.alibi_slopes != nullptr) {
    subtract_alibi(reinterpret_cast<float (&)[1][2 * kSteps][4]>(scores), place,
                   AlibiLane(place, slope, score_unit(options, softmax_scale), transposed));
  }
}

/// Clears what dropout drops of packed probabilities.
template <int kSteps>
__device__ __forceinline__ void drop(uint32_t (&p)[kSteps][4], KeptBits<kSteps, true> const& kept) {
#pragma unroll
  for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      p[n / 2][n % 2 * 2 + half] &= kept.pair_mask(n, half);
    }
  }
}

}  // namespace flash::sm90
