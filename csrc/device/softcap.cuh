// The softcap, and what scores are measured in.
#pragma once

#include "device/element.cuh"

namespace flash {

/// Scores enter the softmax in units of this: one multiplication an element less than in natural
/// units. Products q k^T already are, without a softcap; with one, tanh is.
__device__ __forceinline__ float score_unit(ScoreOptions const& options, float softmax_scale) {
  return options.softcap == 0.f ? softmax_scale : options.softcap;
}

/// ALiBi's slope of a head; 0: none.
__device__ __forceinline__ float alibi_slope(ScoreOptions const& options, int batch, int head) {
  return options.alibi_slopes == nullptr
             ? 0.f
             : options.alibi_slopes[int64_t(batch) * options.alibi_batch_stride + head];
}

/// 1 / x to the last bit or two.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// tanh(x) of the exponent 2 log2(e) x, to fp32's rounding next to 1: tanh.approx would be off by
/// 2^-11 of its value, and softmax_lse by 2e-5 of a softcap of 5.
__device__ __forceinline__ float tanh_by_exp(float exponent) {
  return fmaf(-2.f, reciprocal_approx(exp2_approx(exponent) + 1.f), 1.f);
}

/// The same for |exponent| < 2, that is |x| < 0.69: a minimax polynomial, off by 2.4e-7. Seven FMA
/// instructions take less time than two of the special function unit's.
__device__ __forceinline__ float tanh_by_polynomial(float exponent) {
  float const square = exponent * exponent;
  float sum = fmaf(square, 0x1.0cf89ep-20f, -0x1.009ceep-15f);
  sum = fmaf(square, sum, 0x1.5c3af4p-11f);
  sum = fmaf(square, sum, -0x1.c6a664p-7f);
  return exponent * fmaf(square, sum, 0x1.62e42ap-2f);
}

/// The derivative of tanh where tanh is `value`; 0 at -inf, which is no value of it.
__device__ __forceinline__ float slope_of_tanh(float value) {
  return __saturatef(fmaf(-value, value, 1.f));
}

/// From products q k^T to the exponents of tanh(softmax_scale * product / softcap).
__device__ __forceinline__ float tanh_exponent_scale(ScoreOptions const& options,
                                                     float softmax_scale) {
  return 2.f * kLog2E * softmax_scale * reciprocal_approx(options.softcap);
}

/// Products q k^T to tanh(softmax_scale * product / softcap). Has to be called by whole warps. The
/// polynomial is for kernels that have registers for it.
template <bool kByPolynomial = true, int kM, int kN>
__device__ __forceinline__ void cap_scores(float (&scores)[kM][kN][4], ScoreOptions const& options,
                                           float softmax_scale) {
  auto const for_each = [&](auto const& visit) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          visit(scores[m][n][e]);
        }
      }
    }
  };
  float const exponent_scale = tanh_exponent_scale(options, softmax_scale);
  uint32_t bits = 0;
  for_each([&](float& score) {
    score *= exponent_scale;
    bits |= __float_as_uint(score);
  });
  // Bit 30 of a float is set from 2 on.
  if (!kByPolynomial || __any_sync(0xffffffffu, (bits & 0x40000000u) != 0)) {
    for_each([](float& score) { score = tanh_by_exp(score); });
  } else {
    for_each([](float& score) { score = tanh_by_polynomial(score); });
  }
}

}  // namespace flash
