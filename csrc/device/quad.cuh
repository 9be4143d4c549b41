// Reductions over the four lanes that share the rows of an accumulator fragment (mma.cuh).
#pragma once

#include "device/element.cuh"

namespace flash {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

/// 0 for -inf, the maximum of a row without visible keys.
__device__ __forceinline__ float finite_or_zero(float x) {
  return x == -kInfinity ? 0.f : x;
}

}  // namespace flash
