// The largest score of a head, to which every warp brings that of its rows.
#pragma once

#include "device/element.cuh"

namespace flash {

/// Raises *target to the largest `value` of the warp's lanes; other warps may do the same. An
/// integer compares as the float of its bits does if the bits below the sign of negatives are
/// flipped.
__device__ __forceinline__ void raise_by_warp(float* target, float value) {
  int const bits = __float_as_int(value);
  int const largest = __reduce_max_sync(0xffffffffu, bits ^ (bits >> 31 & 0x7fffffff));
  if (threadIdx.x % 32 != 0) {
    return;
  }
  if (largest >= 0) {
    atomicMax(reinterpret_cast<int*>(target), largest);
  } else {
    atomicMin(reinterpret_cast<unsigned*>(target), unsigned(largest ^ 0x7fffffff));
  }
}

}  // namespace flash
