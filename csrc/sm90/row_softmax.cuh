// Online softmax of the 16 rows of a warp, as one lane sees it: its two rows of an accumulator.
#pragma once

#include "device/row_end.cuh"

namespace flash::sm90 {

/// Bit 2n + e is set if column 8n + e lies before `end`, for the 128 columns from a lane's first
/// on.
__device__ __forceinline__ uint32_t columns_before(int end) {
  int const columns = end < 0 ? 0 : end;
  int const elements = imin(columns / 8 * 2 + imin(columns % 8, 2), 32);
  return __funnelshift_lc(0xffffffffu, 0u, elements);
}

/// Sets the scores of row `half` outside of [begin, end) to -inf; columns count from the lane's
/// first. The compiler turns the bits into predicates, seven an instruction.
template <int kN>
__device__ __forceinline__ void mask_row(float (&scores)[kN][4], int half, int begin, int end) {
  uint32_t const visible = columns_before(end) & ~columns_before(begin);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if ((visible & 1u << (2 * n + e)) == 0) {
        scores[n][2 * half + e] = -kInfinity;
      }
    }
  }
}

template <int kN>
__device__ __forceinline__ void scale_row(float (&acc)[kN][4], int half, float factor) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    acc[n][2 * half] *= factor;
    acc[n][2 * half + 1] *= factor;
  }
}

/// Maximum and sum so far of row `half` (0: row g, 1: row g + 8 of the fragments). A quad shares
/// the maximum; the sum is over the lane's own columns, and over the quad only at the end of a
/// tile.
struct RowSoftmax {
  float row_max[2];  // of the unscaled scores
  float row_sum[2];

  template <int kN>
  static __device__ __forceinline__ float lane_max(float const (&scores)[kN][4], int half) {
    float even = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
    float odd = fmaxf(scores[1][2 * half], scores[1][2 * half + 1]);
#pragma unroll
    for (int n = 2; n < kN; n += 2) {
      even = fmaxf(even, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      odd = fmaxf(odd, fmaxf(scores[n + 1][2 * half], scores[n + 1][2 * half + 1]));
    }
    return fmaxf(even, odd);
  }

  /// Starts a row with the scores of its first key tile.
  template <int kN>
  __device__ __forceinline__ void start(float const (&scores)[kN][4], int half) {
    row_max[half] = quad_max(lane_max(scores, half));
    row_sum[half] = 0.f;
  }

  /// True if a row whose lane has this maximum in the next key tile needs a new maximum. No
  /// exchange between lanes: some lane of the quad sees it.
  __device__ __forceinline__ bool has_grown(float tile_max, int half, float scale_log2,
                                            float max_slack) const {
    return (tile_max - row_max[half]) * scale_log2 > max_slack;
  }

  /// Takes the maximum over. Returns the factor of what was accumulated before.
  __device__ __forceinline__ float raise(float tile_max, int half, float scale_log2) {
    float const new_max = fmaxf(row_max[half], quad_max(tile_max));
    float const factor = exp2_approx((row_max[half] - finite_or_zero(new_max)) * scale_log2);
    row_max[half] = new_max;
    row_sum[half] *= factor;
    return factor;
  }

  /// Turns scores into probabilities relative to the maximum and adds them to the sum.
  template <int kN>
  __device__ __forceinline__ void exponentiate(float (&scores)[kN][4], int half, float scale_log2) {
    float const shift = finite_or_zero(row_max[half]) * scale_log2;
    float even = 0.f, odd = 0.f;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      float& left = scores[n][2 * half];
      float& right = scores[n][2 * half + 1];
      left = exp2_approx(fmaf(left, scale_log2, -shift));
      right = exp2_approx(fmaf(right, scale_log2, -shift));
      even += left;
      odd += right;
    }
    row_sum[half] += even + odd;
  }
};

}  // namespace flash::sm90
