// Softcap, ALiBi and dropout on the transposed scores of a warp: its rows are 16 keys.
#pragma once

#include <type_traits>

#include "sm90/forward_extras.cuh"

namespace flash::sm90 {

/// With dropout alone its bits are made between the steps of products: there a warp is held up, for
/// it can't issue them much faster than they run. No branch may lie there, so the key is read once.
template <Extras kExtras>
inline constexpr bool kDropsBesideProducts = kExtras == Extras::kDropout;

struct NoKey {
  __device__ __forceinline__ explicit NoKey(Dropout const&) {}
};
template <Extras kExtras>
using KeptKey = std::conditional_t<kDropsBesideProducts<kExtras>, DropoutKey, NoKey>;

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
