// Dropout and the softcap's derivative on a tile of dP.
#pragma once

#include "device/bias.cuh"
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

/// The derivative of a score by the scaled product, from tanh. Hidden pairs, whose score is -inf,
/// have P = 0: any finite derivative does.
__device__ __forceinline__ float softcap_derivative(float tanh) {
  float const bounded = fmaxf(tanh, -1.f);
  return fmaf(-bounded, bounded, 1.f);
}

/// Multiplies by the derivative of the scores, which is 1 without a softcap. The slope is read
/// anew: a register less is held.
template <int kM, int kN>
__device__ __forceinline__ void multiply_by_derivative(float (&dp)[kM][kN][4],
                                                       float const (&scores)[kM][kN][4],
                                                       PiecePlacement const& place,
                                                       BackwardParams const& params, float slope,
                                                       Sequence const& sequence) {
  if (params.scores.softcap == 0.f) {
    return;
  }
  AlibiLane const alibi(place, slope, params.scores.softcap, sequence.seqlen_k - sequence.seqlen_q);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dp[m][n][e] *= softcap_derivative(scores[m][n][e] + alibi.of(place, m, n, e));
      }
    }
  }
}

/// The same of scores with a bias. The slope is read anew: a register less is held.
template <DType kDType, int kM, int kN>
__device__ __forceinline__ void multiply_by_biased_derivative(float (&dp)[kM][kN][4],
                                                              float const (&scores)[kM][kN][4],
                                                              PiecePlacement const& place,
                                                              BackwardParams const& params,
                                                              ScoreHead const& of) {
  if (params.scores.softcap == 0.f) {
    return;
  }
  float const slope = alibi_slope(params.scores, fresh(of.batch), fresh(of.head));
  AlibiLane const alibi(place, slope, params.scores.softcap,
                        of.sequence.seqlen_k - of.sequence.seqlen_q);
  float const factor = reciprocal_approx(fresh_float(params.scores.softcap));
  for_each_bias<kDType, kM, kN>(
      params.scores.bias, place, of, [&](int m, int n, int e, float bias) {
        dp[m][n][e] *=
            softcap_derivative(scores[m][n][e] + alibi.of(place, m, n, e) - bias * factor);
      });
}

/// dbias = P (dP - softmax_d), of `dp` before the softcap's derivative; `scale_log2` is that of the
/// scores. P is computed here and again for the products: kept between, it spilled.
template <int kM, int kN>
__device__ __forceinline__ void store_bias_gradient(float const (&dp)[kM][kN][4],
                                                    float const (&scores)[kM][kN][4],
                                                    float const (&lse_log2)[kM][2],
                                                    float scale_log2, PiecePlacement const& place,
                                                    Bias const& dbias, ScoreHead const& of) {
  if (dbias.ptr == nullptr) {
    return;
  }
  add_bias_gradient<kM, kN>(dbias, place, of, [&](int m, int n, int e) {
    float const exponent = fmaf(fresh_float(scores[m][n][e]), scale_log2, -lse_log2[m][e / 2]);
    return exp2_approx(exponent) * dp[m][n][e];
  });
}

}  // namespace flash::sm80
