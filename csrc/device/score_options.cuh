// Softcap, ALiBi and dropout on the accumulators of a score tile.
#pragma once

#include "device/softmax.cuh"

namespace flash {

/// tanh to fp32's rounding next to 1: tanh.approx would be off by 2^-11 of the softcap.
__device__ __forceinline__ float tanh_by_exp(float x) {
  return 1.f - __fdividef(2.f, exp2_approx(x * (2.f * kLog2E)) + 1.f);
}

/// What one head does to its scores.
struct HeadScores {
  float softmax_scale;
  float softcap, inverse_softcap;  // softcap 0: none
  float slope;                     // 0: none
  int diagonal;                    // seqlen_k - seqlen_q: row i lies on column i + diagonal

  __device__ __forceinline__ HeadScores(ScoreOptions const& options, float softmax_scale, int batch,
                                        int head, Sequence const& sequence)
      : softmax_scale(softmax_scale),
        softcap(options.softcap),
        inverse_softcap(1.f / options.softcap),
        slope(options.alibi_slopes == nullptr
                  ? 0.f
                  : options.alibi_slopes[int64_t(batch) * options.alibi_batch_stride + head]),
        diagonal(sequence.seqlen_k - sequence.seqlen_q) {}

  /// The score that enters the softmax, of the product q k^T. `distance` is i + diagonal - j.
  __device__ __forceinline__ float score(float product, float distance) const {
    float const scaled = product * softmax_scale;
    float const capped = softcap == 0.f ? scaled : softcap * tanh_by_exp(scaled * inverse_softcap);
    return fmaf(-slope, fabsf(distance), capped);
  }
  /// The derivative of a score by the scaled product. 0 for hidden pairs, whose score is -inf.
  __device__ __forceinline__ float derivative(float score, float distance) const {
    float const capped = fmaf(slope, fabsf(distance), score);
    float const tanh = fmaxf(capped * inverse_softcap, -1.f);
    return softcap == 0.f ? 1.f : 1.f - tanh * tanh;
  }

  /// Calls visit(m, n, e, distance) for the elements of a lane's accumulator.
  template <int kM, int kN, class Visit>
  __device__ __forceinline__ void for_each_element(PiecePlacement const& place,
                                                   Visit const& visit) const {
    int const lane_idx = fresh_thread_idx() % 32;
    float const first =
        float(place.first_row + lane_idx / 4 + diagonal - (place.first_col + lane_idx % 4 * 2));
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          int const row = m * place.row_step + e / 2 * 8;
          int const col = n / 2 * place.col_step + n % 2 * 8 + e % 2;
          visit(m, n, e, first + float(row - col));
        }
      }
    }
  }
};

/// Products q k^T to scores.
template <int kM, int kN>
__device__ __forceinline__ void apply_options(float (&scores)[kM][kN][4],
                                              PiecePlacement const& place, HeadScores const& head) {
  head.for_each_element<kM, kN>(place, [&](int m, int n, int e, float distance) {
    scores[m][n][e] = head.score(scores[m][n][e], distance);
  });
}

/// Which of a lane's elements of an accumulator dropout keeps.
struct DropoutLane {
  int64_t seed, offset;
  int batch_head;
  int last_kept_byte;

  __device__ __forceinline__ DropoutLane(Dropout const& dropout, int batch_head)
      : seed(dropout.rng_state[0]),
        offset(dropout.rng_state[1]),
        batch_head(batch_head),
        last_kept_byte(dropout.last_kept_byte) {}

  /// Calls drop(n, e) for the dropped elements of the fragments n (0, 1) of a 16 x 16 block.
  template <class Drop>
  __device__ __forceinline__ void visit_block(int first_row, int first_col,
                                              Drop const& drop) const {
    int const lane_idx = fresh_thread_idx() % 32;
    int const row = first_row + lane_idx / 4, col = first_col + lane_idx % 4 * 2;
    Philox4 const bits = dropout_bits(seed, offset, batch_head, row, col);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (dropout_byte(bits, row + e / 2 * 8, col + n * 8 + e % 2) > last_kept_byte) {
          drop(n, e);
        }
      }
    }
  }
};

/// Clears what dropout drops of probabilities that are packed as operands.
template <int kM, int kN>
__device__ __forceinline__ void drop(Piece (&p)[kM][kN], PiecePlacement const& place,
                                     DropoutLane const& lane) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      lane.visit_block(place.first_row + m * place.row_step, place.first_col + n * place.col_step,
                       [&](int half, int e) {
                         p[m][n].r[half * 2 + e / 2] &= e % 2 == 0 ? 0xffff0000u : 0x0000ffffu;
                       });
    }
  }
}

}  // namespace flash
