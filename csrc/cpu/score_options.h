// What the options of a call do to the scores and probabilities of one head: softcap, ALiBi and
// dropout. A plain call branches around all of it.
#pragma once

#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace flash::cpu {

/// The options of one query head of a sequence.
struct HeadOptions {
  float softmax_scale;
  float softcap;
  float slope;   // 0 without ALiBi
  int diagonal;  // query i lies on key i + diagonal
  bool changes_scores;
  Dropout const& dropout;
  int batch_head;  // that dropout counts

  [[gnu::always_inline]]
  bool has_dropout() const {
    return dropout.rng_state != nullptr;
  }
  [[gnu::always_inline]]
  bool is_plain() const {
    return !changes_scores && !has_dropout();
  }
};

/// Of ForwardParams or BackwardParams.
template <class Isa, class Params>
HeadOptions head_options(Params const& params, Sequence const& sequence, int batch, int head) {
  ScoreOptions const& scores = params.scores;
  return {.softmax_scale = params.softmax_scale,
          .softcap = scores.softcap,
          .slope = scores.alibi_slopes == nullptr
                       ? 0.0f
                       : scores.alibi_slopes[int64_t(batch) * scores.alibi_batch_stride + head],
          .diagonal = sequence.seqlen_k - sequence.seqlen_q,
          .changes_scores = scores.is_on(),
          .dropout = params.dropout,
          .batch_head = batch * params.shape.num_heads + head};
}

/// Scores, and their derivatives by the scaled products.
template <class Isa>
struct Scores {
  typename Isa::Float value;
  typename Isa::Float derivative;
};

/// `products` are of q and k, `distance` is that of the keys from the diagonal, of either sign.
template <class Isa>
[[gnu::always_inline]]
inline Scores<Isa> scores_of(HeadOptions const& options, typename Isa::Float products,
                             typename Isa::Int distance) {
  using Float = typename Isa::Float;
  Float value = products * options.softmax_scale;
  Float derivative = Isa::broadcast(1.0f);
  if (options.softcap != 0.0f) {
    Float const tanh_of_it = tanh<Isa>(value / options.softcap);
    value = tanh_of_it * options.softcap;
    derivative -= tanh_of_it * tanh_of_it;
  }
  Float const signed_distance = Isa::template convert<Float>(distance);
  Float const penalty = Isa::max(signed_distance, -signed_distance) * options.slope;
  return {value - penalty, derivative};
}

/// Whole blocks of dropout (dropout.h) that cover a part of a head's score matrix.
struct DropoutBlocks {
  static constexpr int kSize = 16;
  static_assert(kStrip % kSize == 0, "blocks must not cross strips");

  int row_begin, rows;
  int col_begin, cols;
};

/// What dropout makes of ones, 0 or its scale: element (row, col), counted from the begin of the
/// blocks, to kept[row * row_step + col * col_step].
template <class Isa>
void dropout_factors(HeadOptions const& options, DropoutBlocks const& blocks, float* kept,
                     int64_t row_step, int64_t col_step) {
  int64_t const seed = options.dropout.rng_state[0], offset = options.dropout.rng_state[1];
  int const last_kept = options.dropout.last_kept_byte;
  // The 16 elements of one call are two pairs of neighbours each way, 8 apart.
  constexpr int kOfCall[] = {0, 1, 8, 9};
  constexpr int kFirstOfCall[] = {0, 2, 4, 6};
  for (int block_row = 0; block_row < blocks.rows; block_row += DropoutBlocks::kSize) {
    for (int block_col = 0; block_col < blocks.cols; block_col += DropoutBlocks::kSize) {
      for (int const first_row : kFirstOfCall) {
        for (int const first_col : kFirstOfCall) {
          int const row = block_row + first_row, col = block_col + first_col;
          Philox4 const bits = dropout_bits(seed, offset, options.batch_head,
                                            blocks.row_begin + row, blocks.col_begin + col);
          float* const first = kept + row * row_step + col * col_step;
          for (int const r : kOfCall) {
            for (int const c : kOfCall) {
              first[r * row_step + c * col_step] =
                  dropout_byte(bits, r, c) <= last_kept ? options.dropout.scale : 0.0f;
            }
          }
        }
      }
    }
  }
}

}  // namespace flash::cpu
