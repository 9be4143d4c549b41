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

/// tanh(x) for scores of q and k of kDType. Of 16 bits the special function unit's, off by 2^-11 of
/// its value: as much as scores in fp16 are, and less than those in bf16. Exact to fp32's rounding
/// it took a third of a forward kernel's time. Forward and backward have to take the same.
template <DType kDType>
__device__ __forceinline__ float fast_tanh(float x) {
  if constexpr (kDType == DType::kFp32) {
    return fmaf(-2.f, reciprocal_approx(exp2_approx(2.f * kLog2E * x) + 1.f), 1.f);
  } else {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
}

/// What makes products q k^T arguments of the softcap's tanh.
__device__ __forceinline__ float tanh_scale(ScoreOptions const& options, float softmax_scale) {
  return softmax_scale * reciprocal_approx(options.softcap);
}

}  // namespace flash
