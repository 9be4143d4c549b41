// Online softmax without the maxima of a tile's scores.
//
// Most tiles need none: where sums of the scores' squares show that no probability can overflow
// with the row maxima as they are, the sums of the probabilities tell whether these have grown. A
// multiply-add takes less time beside products of tensor cores than a maximum (docs/lessons.md),
// and the tanh of scores that are known to be small is a short polynomial.
#pragma once

#include "device/softcap.cuh"
#include "sm90/forward_params.h"
#include "sm90/row_softmax.cuh"

namespace flash::sm90 {

/// From scores to exponents of 2. Of capped scores alone the first term is used.
struct CappedExponent {
  float term[CapPolynomial::kTerms];

  __device__ __forceinline__ float operator()(float score, float shift) const {
    float const square = score * score;
    float const sum = fmaf(square, term[2], term[1]);
    return fmaf(score, fmaf(square, sum, term[0]), -shift);
  }
};

struct PlainExponent {
  float scale_log2;

  __device__ __forceinline__ float operator()(float score, float shift) const {
    return fmaf(score, scale_log2, -shift);
  }
};

template <int kFragments>
struct SumSoftmax {
  using Scores = float[kFragments][4];

  RowSoftmax& rows;
  float scale_log2;  // of what rows.row_max is in
  float max_slack;

  /// True in the whole warp if all scores are shown to be so small that no probability overflows,
  /// whose exponents are at most unit_log2 * |score|, and below the root of `square_limit`.
  __device__ __forceinline__ bool fits(Scores const& scores, float unit_log2,
                                       float square_limit = kInfinity) const {
    constexpr float kLargestExponent = 120.f;
    constexpr int kSums = 8;  // several, or many middling scores would seem a large one
    float sum[kSums] = {};
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& square = sum[(4 * n + i) % kSums];
        square = fmaf(scores[n][i], scores[n][i], square);
      }
    }
    float largest = sum[0];
#pragma unroll
    for (int i = 1; i < kSums; ++i) {
      largest = fmaxf(largest, sum[i]);
    }
    // -inf for a row that has not seen a key.
    float const lowest = fminf(rows.row_max[0], rows.row_max[1]) * scale_log2;
    float const limit = (lowest + kLargestExponent) * reciprocal_approx(unit_log2);
    bool const is_small = limit > 0.f && largest < fminf(limit * limit, square_limit);
    return __all_sync(0xffffffffu, is_small) && max_slack > 0.f;
  }

  /// Takes the maxima over where they have grown; true if so.
  __device__ __forceinline__ bool raise(Scores const& scores, float (&factor)[2]) const {
    float tile_max[2];
    bool has_grown = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      tile_max[half] = hidden_to_infinity(RowSoftmax::lane_max(scores, half));
      has_grown |= rows.has_grown(tile_max[half], half, scale_log2, max_slack);
    }
    has_grown = __any_sync(0xffffffffu, has_grown);
    if (has_grown) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        factor[half] = rows.raise(tile_max[half], half, scale_log2);
      }
    }
    return has_grown;
  }

  /// Scores to probabilities, and these to the sums; true if it took new maxima over.
  template <class Exponent>
  __device__ __forceinline__ bool exponentiate(Scores& scores, Exponent const& exponent,
                                               float (&factor)[2]) const {
    // What maxima with a slack allow at most: no more than a 16-bit type holds.
    constexpr float kLargestSum = 2 * kFragments * 256.f;
    float sum[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = rows.exponentiate(scores, half, scale_log2, exponent);
    }
    bool const is_large = __any_sync(0xffffffffu, fmaxf(sum[0], sum[1]) > kLargestSum);
    if (is_large) {
      lower(scores, sum, factor);
    }
    rows.row_sum[0] += sum[0];
    rows.row_sum[1] += sum[1];
    return is_large;
  }

  /// What stands for -inf where an exponent is a polynomial, which has no value there.
  static constexpr float kHidden = -0x1p62f;

 private:
  static __device__ __forceinline__ float hidden_to_infinity(float score) {
    return score == kHidden ? -kInfinity : score;
  }
  /// Makes the largest probability of each row 1.
  __device__ __forceinline__ void lower(Scores& probabilities, float (&sum)[2],
                                        float (&factor)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float const largest = quad_max(RowSoftmax::lane_max(probabilities, half));
      float const shift = finite_or_zero(rows.row_max[half]) * scale_log2;
      float const grown = (log2_approx(largest) + shift) * reciprocal_approx(scale_log2);
      factor[half] *= rows.raise(grown, half, scale_log2);
      float const lowering = exp2_approx(shift - finite_or_zero(rows.row_max[half]) * scale_log2);
      scale_row(probabilities, half, lowering);
      sum[half] *= lowering;
    }
  }
};

}  // namespace flash::sm90
