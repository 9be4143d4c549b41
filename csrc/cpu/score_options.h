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
  int batch, head;
  Bias const& bias;
  Bias const* dbias;  // null: not asked
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
  Bias const* dbias = nullptr;
  if constexpr (requires { params.dbias; }) {
    dbias = params.dbias.ptr == nullptr ? nullptr : &params.dbias;
  }
  return {.softmax_scale = params.softmax_scale,
          .softcap = scores.softcap,
          .slope = scores.alibi_slopes == nullptr
                       ? 0.0f
                       : scores.alibi_slopes[int64_t(batch) * scores.alibi_batch_stride + head],
          .diagonal = sequence.seqlen_k - sequence.seqlen_q,
          .changes_scores = scores.is_on(),
          .batch = batch,
          .head = head,
          .bias = scores.bias,
          .dbias = dbias,
          .dropout = params.dropout,
          .batch_head = batch * params.shape.num_heads + head};
}

/// fp32 of what broadcasts to a row of scores, `stride` elements apart.
template <class Isa, class T>
void load_spread(T const* from, int64_t stride, int count, float* to) {
  int idx = 0;
  if (stride == 1) {
    for (; idx + Isa::kWidth <= count; idx += Isa::kWidth) {
      Isa::store(to + idx, Isa::load(from + idx));
    }
  }
  for (; idx < count; ++idx) {
    T lanes[Isa::kWidth] = {from[idx * stride]};
    float values[Isa::kWidth];
    Isa::store(values, Isa::load(lanes));
    to[idx] = values[0];
  }
}

/// The bias of a query row and `count` keys from `key` on.
template <class Isa>
void load_bias(HeadOptions const& options, int row, int key, int count, float* to) {
  Bias const& bias = options.bias;
  int64_t const first =
      bias.plane(options.batch, options.head) + row * bias.row_stride + key * bias.col_stride;
  auto const load = [&]<class T>(T const* elements) {
    load_spread<Isa>(elements + first, bias.col_stride, count, to);
  };
  switch (bias.dtype) {
    case DType::kFp32:
      return load(static_cast<float const*>(bias.ptr));
    case DType::kBf16:
      return load(static_cast<Bf16 const*>(bias.ptr));
    case DType::kFp16:
      return load(static_cast<Fp16 const*>(bias.ptr));
  }
}

/// Scores, and their derivatives by the scaled products. The bias is left to the caller.
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
