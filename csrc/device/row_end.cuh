// From a row's maximum and sum to its softmax_lse.
#pragma once

#include "device/quad.cuh"

namespace flash {

struct RowEnd {
  float scale;  // of the output so far
  float lse;
};

/// From the row's maximum score, the sum of exp(score - maximum), and the head's sink or null.
__device__ __forceinline__ RowEnd row_end(float max_score, float sum, float const* sink) {
  float shift = max_score, factor = 1.f, total = sum;
  if (sink != nullptr) {
    shift = finite_or_zero(fmaxf(max_score, *sink));
    factor = exp2_approx((max_score - shift) * kLog2E);
    total = fmaf(sum, factor, exp2_approx((*sink - shift) * kLog2E));
  }
  // Without a branch: two of these in a row are computed side by side.
  float const scale = __fdividef(factor, total), lse = fmaf(log2_approx(total), kLn2, shift);
  bool const is_empty = total == 0.f;
  return {is_empty ? 0.f : scale, is_empty ? kInfinity : lse};
}

}  // namespace flash
