// Integer arithmetic shared by host and device code. No torch, no CUDA headers.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FLASH_HD __host__ __device__ __forceinline__
#else
#define FLASH_HD inline
#endif

namespace flash {

FLASH_HD constexpr int imin(int a, int b) {
  return a < b ? a : b;
}
FLASH_HD constexpr int imax(int a, int b) {
  return a > b ? a : b;
}

/// Smallest integer >= a / b, for a >= 0 and b > 0.
FLASH_HD constexpr int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}

/// Smallest multiple of b that is >= a, for a >= 0 and b > 0.
FLASH_HD constexpr int round_up(int a, int b) {
  return ceil_div(a, b) * b;
}

}  // namespace flash
