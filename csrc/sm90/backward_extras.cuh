// Softcap, ALiBi and dropout on the transposed scores of a warp: fragment n holds the queries
// first_query + 8 n + lane % 4 * 2 + e of the keys first_key + lane / 4 + 8 half.
#pragma once

#include "sm90/forward_extras.cuh"

namespace flash::sm90 {

/// Which scores of which head a warp has.
struct ScorePlace {
  int batch, head;
  int first_query, first_key;  // multiples of 8 and of 16
  int diagonal;                // seqlen_k - seqlen_q
};

/// Products to scores, and the derivative of each by the scaled product, packed; that is left alone
/// without a softcap.
template <DType kDType, int kSteps>
__device__ __forceinline__ void apply_options(float (&scores)[2 * kSteps][4],
                                              uint32_t (&derivative)[kSteps][4],
                                              ScoreOptions const& options, float softmax_scale,
                                              ScorePlace const& place) {
  float scale = softmax_scale;
  if (options.softcap != 0.f) {
    // By exponentials alone: what they are off by, 2^-23 of the softcap, is lost in P's rounding.
    float const exponent_scale = 2.f * kLog2E * softmax_scale / options.softcap;
    scale = options.softcap;
#pragma unroll
    for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& left = scores[n][2 * half];
        float& right = scores[n][2 * half + 1];
        left = tanh_by_exp(left * exponent_scale);
        right = tanh_by_exp(right * exponent_scale);
        derivative[n / 2][n % 2 * 2 + half] =
            pack2<kDType>(fmaf(-left, left, 1.f), fmaf(-right, right, 1.f));
      }
    }
  }
  int const lane_idx = threadIdx.x % 32;
  float const slope =
      options.alibi_slopes == nullptr
          ? 0.f
          : options.alibi_slopes[int64_t(place.batch) * options.alibi_batch_stride + place.head];
  float const distance = float(place.first_query + lane_idx % 4 * 2 + place.diagonal -
                               (place.first_key + lane_idx / 4));
#pragma unroll
  for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float const to_key = distance + float(8 * n + i % 2 - i / 2 * 8);
      scores[n][i] = fmaf(-slope, fabsf(to_key), scores[n][i] * scale);
    }
  }
}

/// Bit 4 n + i of word n / 8: dropout keeps element i of fragment n. The lanes of the keys 2b and
/// 2b + 1 need the same generator calls, two for 32 queries, of which each makes one.
template <int kFragments>
__device__ __forceinline__ void find_kept(uint32_t (&kept)[kFragments / 8], Dropout const& dropout,
                                          int num_heads, ScorePlace const& place) {
  int const lane_idx = threadIdx.x % 32;
  int const key = place.first_key + lane_idx / 4;
  bool const is_odd_key = key % 2 != 0;
  int64_t const seed = dropout.rng_state[0], offset = dropout.rng_state[1];
#pragma unroll
  for (int n = 0; n < kFragments; n += 4) {
    int const query = place.first_query + 8 * n + (is_odd_key ? 16 : 0) + lane_idx % 4 * 2;
    Philox4 const own =
        dropout_bits(seed, offset, place.batch * num_heads + place.head, query, key);
    // Bytes 0 and 2 of a word are the even key's, 1 and 3 the odd one's.
    uint32_t const first_even = __byte_perm(own.x, own.y, 0x6420);
    uint32_t const first_odd = __byte_perm(own.x, own.y, 0x7531);
    uint32_t const last_even = __byte_perm(own.z, own.w, 0x6420);
    uint32_t const last_odd = __byte_perm(own.z, own.w, 0x7531);
    uint32_t const first = __shfl_xor_sync(0xffffffffu, is_odd_key ? first_even : first_odd, 4);
    uint32_t const last = __shfl_xor_sync(0xffffffffu, is_odd_key ? last_even : last_odd, 4);
    // Words of a block: its first eight queries (keys g, then g + 8; two queries each), its last.
    uint32_t const words[4] = {is_odd_key ? first : first_even, is_odd_key ? last : last_even,
                               is_odd_key ? first_odd : first, is_odd_key ? last_odd : last};
    uint32_t bits = 0;
#pragma unroll
    for (int fragment = 0; fragment < 4; ++fragment) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const byte = int(words[fragment] >> (8 * i) & 255);
        bits |= byte <= dropout.last_kept_byte ? 1u << (4 * fragment + i) : 0u;
      }
    }
    kept[n / 8] = n % 8 == 0 ? bits : kept[n / 8] | bits << 16;
  }
}

__device__ __forceinline__ bool is_kept(uint32_t word, int fragment, int element) {
  return (word >> (fragment % 8 * 4 + element) & 1) != 0;
}

/// Clears what dropout drops of packed probabilities.
template <int kSteps>
__device__ __forceinline__ void drop(uint32_t (&p)[kSteps][4], uint32_t const (&kept)[kSteps / 4]) {
#pragma unroll
  for (int n = 0; n < 2 * kSteps; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t const word = kept[n / 8];
      uint32_t const mask = (is_kept(word, n, 2 * half) ? 0x0000ffffu : 0u) |
                            (is_kept(word, n, 2 * half + 1) ? 0xffff0000u : 0u);
      p[n / 2][n % 2 * 2 + half] &= mask;
    }
  }
}

}  // namespace flash::sm90
