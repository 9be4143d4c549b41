// Dropout and the softcap's derivative on a tile of dP.
#pragma once

#include "device/dropout.cuh"
#include "device/score_options.cuh"

namespace flash::sm80 {

/// dP to Z dP - softmax_d. What dropout keeps of P is scaled at the end, in dV.
template <int kM, int kN>
__device__ __forceinline__ void drop_dp(float (&dp)[kM][kN][4],
                                        KeptElements<kM, kN / 2> const& kept, float scale,
                                        float const (&minus_d)[kM][2]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dp[m][n][e] = fmaf(kept.kept(dp[m][n][e], m, n, e), scale, minus_d[m][e / 2]);
      }
    }
  }
}

/// Multiplies by the derivative of the scores by the scaled products, which is 1 without a softcap.
template <int kM, int kN>
__device__ __forceinline__ void multiply_by_derivative(float (&dp)[kM][kN][4],
                                                       float const (&scores)[kM][kN][4],
                                                       PiecePlacement const& place,
                                                       BackwardParams const& params, float slope,
                                                       Sequence const& sequence) {
  if (params.scores.softcap == 0.f) {
    return;
  }
  AlibiLane const alibi(place, slope, params.scores.softcap, sequence);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // Hidden pairs, whose score is -inf, have P = 0: any finite derivative does.
        float const tanh = fmaxf(scores[m][n][e] + alibi.of(place, m, n, e), -1.f);
        dp[m][n][e] *= fmaf(-tanh, tanh, 1.f);
      }
    }
  }
}

}  // namespace flash::sm80
