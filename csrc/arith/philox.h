// Philox4x32-7: a counter-based random generator (Salmon et al., "Parallel random numbers: as easy
// as 1, 2, 3", SC 2011, where seven rounds are the fewest that pass every test of BigCrush). A pure
// function of (counter, key): the same bits on every backend.
#pragma once

#include <type_traits>

#include "arith/integer.h"

namespace flash {

struct Philox4 {
  uint32_t x, y, z, w;
};

/// a * b. From the product in C nvcc 13.0 made 64-bit arithmetic of all that follows, which added
/// zero to each upper half: 20 instructions a call.
FLASH_HD constexpr uint64_t wide_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  if (!std::is_constant_evaluated()) {
    uint64_t product;
    asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
    return product;
  }
#endif
  return uint64_t(a) * b;
}

FLASH_HD constexpr Philox4 philox4x32_7(Philox4 counter, uint32_t key_x, uint32_t key_y) {
  constexpr uint32_t kMultiplierX = 0xD2511F53u, kMultiplierZ = 0xCD9E8D57u;
  constexpr uint32_t kWeylX = 0x9E3779B9u, kWeylY = 0xBB67AE85u;
  for (int round = 0; round < 7; ++round) {
    uint64_t const product_x = wide_product(kMultiplierX, counter.x);
    uint64_t const product_z = wide_product(kMultiplierZ, counter.z);
    counter = {uint32_t(product_z >> 32) ^ counter.y ^ key_x, uint32_t(product_z),
               uint32_t(product_x >> 32) ^ counter.w ^ key_y, uint32_t(product_x)};
    key_x += kWeylX;
    key_y += kWeylY;
  }
  return counter;
}

}  // namespace flash
