// Forward task: the output rows of one query tile, by online softmax over its visible key tiles.
//   S^T = K Q^T;  m, l: running row maximum and sum;  out = (diag(rescale) out + P V) / l
#pragma once

#include <atomic>
#include <cmath>

#include "arith/block_range.h"
#include "arith/tile_order.h"
#include "cpu/convert.h"
#include "cpu/gemm_tile.h"
#include "cpu/score_options.h"

namespace flash::cpu {

/// Scratch and state of a strip of query rows, the first of them row_begin of the tile.
struct ForwardStrip {
  ForwardScratch const& scratch;
  VisibleKeys const& visible;
  HeadOptions const& options;
  RowRange const& tile_rows;
  int row_begin;
  int rows;

  /// Rows as vector lanes, whole panels of them.
  [[gnu::always_inline]]
  int lanes() const {
    return round_up(rows, kPanelCols);
  }
};

/// Products to scores in place, where options make more of them than a factor.
template <class Isa>
void score_transposed(ForwardStrip const& strip, int key_begin, int keys) {
  Matrix const scores_t = strip.scratch.scores_t;
  int const first_row = strip.tile_rows.begin + strip.row_begin;
  for (int row = 0; row < strip.lanes(); row += Isa::kWidth) {
    typename Isa::Int const diagonal =
        Isa::count_from(first_row + row + strip.options.diagonal - key_begin);
    for (int key = 0; key < keys; ++key) {
      float* const score = scores_t.at(key, row).data;
      Isa::store(score, scores_of<Isa>(strip.options, Isa::load(score), key - diagonal).value);
    }
  }
  if (strip.options.bias.ptr == nullptr) {
    return;
  }
  for (int row = 0; row < strip.rows; ++row) {
    float bias[kTileN];
    load_bias<Isa>(strip.options, first_row + row, key_begin, keys, bias);
    for (int key = 0; key < keys; ++key) {
      *scores_t.at(key, row).data += bias[key];
    }
  }
}

/// Probabilities times what dropout makes of ones. `skipped` keys of the tile are left out.
template <class Isa>
void drop_transposed(ForwardStrip const& strip, int tile_begin, int skipped, int keys) {
  Matrix const scores_t = strip.scratch.scores_t;
  Matrix const kept_t = strip.scratch.kept_t;
  int const first_key = skipped / DropoutBlocks::kSize * DropoutBlocks::kSize;
  dropout_factors<Isa>(strip.options,
                       {strip.tile_rows.begin + strip.row_begin, strip.rows, tile_begin + first_key,
                        skipped + keys - first_key},
                       kept_t.at(first_key, 0).data, 1, kept_t.stride);
  for (int key = 0; key < keys; ++key) {
    float* const p = scores_t.at(key, 0).data;
    float const* const kept = kept_t.at(skipped + key, 0).data;
    for (int row = 0; row < strip.lanes(); row += Isa::kWidth) {
      Isa::store(p + row, Isa::load(p + row) * Isa::load(kept + row));
    }
  }
}

/// scores_t[key][row] = -inf where the row does not attend to the key. Keys from key_begin.
template <class Isa>
void mask_transposed(ForwardStrip const& strip, int key_begin, int keys) {
  using Int = typename Isa::Int;
  Matrix const scores_t = strip.scratch.scores_t;
  for (int row = 0; row < strip.lanes(); row += Isa::kWidth) {
    Int const begin = Isa::template load_as<Int>(strip.visible.begin + strip.row_begin + row);
    Int const end = Isa::template load_as<Int>(strip.visible.end + strip.row_begin + row);
    for (int key = 0; key < keys; ++key) {
      float* const score = scores_t.at(key, row).data;
      Int const j = Int{} + (key_begin + key);
      Int const attends = (j >= begin) & (j < end);
      Isa::store(score, attends ? Isa::load(score) : Isa::broadcast(-kInfinity));
    }
  }
}

/// Scores to probabilities in place; moves row_max and row_sum on by these keys and writes the
/// factor by which the previous output shrinks.
template <class Isa>
void online_softmax(ForwardStrip const& strip, int keys, float softmax_scale_log2) {
  using Float = typename Isa::Float;
  Float const scale = Isa::broadcast(softmax_scale_log2);
  int64_t const stride = strip.scratch.scores_t.stride;
  for (int lane = 0; lane < strip.lanes(); lane += Isa::kWidth) {
    int const row = strip.row_begin + lane;
    float* const column = strip.scratch.scores_t.data + lane;
    Float tile_max = Isa::broadcast(-kInfinity);
    for (int key = 0; key < keys; ++key) {
      tile_max = Isa::max(Isa::load(column + key * stride), tile_max);
    }
    Float const old_max = Isa::load(strip.scratch.row_max + row);
    Float const new_max = Isa::max(tile_max * scale, old_max);
    // No visible key so far: any finite offset gives exp2(-inf) = 0, where -inf gives NaN.
    Float const offset = new_max == -kInfinity ? Float{} : new_max;
    Float sum = {};
    for (int key = 0; key < keys; ++key) {
      Float const p = exp2<Isa>(Isa::fma(Isa::load(column + key * stride), scale, -offset));
      Isa::store(column + key * stride, p);
      sum += p;
    }
    Float const rescale = exp2<Isa>(old_max - offset);
    float* const row_sum = strip.scratch.row_sum + row;
    Isa::store(strip.scratch.rescale + row, rescale);
    Isa::store(strip.scratch.row_max + row, new_max);
    Isa::store(row_sum, Isa::fma(Isa::load(row_sum), rescale, sum));
  }
}

/// One key tile's part of a strip. K and V of the tile are in scratch.
template <class Isa>
void attend(ForwardStrip const& strip, RowRange const& key_rows, Shape const& shape) {
  ForwardScratch const& scratch = strip.scratch;
  int32_t const* const begin = strip.visible.begin + strip.row_begin;
  int32_t const* const end = strip.visible.end + strip.row_begin;
  int const last = strip.rows - 1;
  int const skipped = imax(begin[0] - key_rows.begin, 0) / kMicroRows * kMicroRows;
  int const keys = imin(end[last] - key_rows.begin, key_rows.count) - skipped;
  if (keys <= 0) {
    return;
  }
  int const key_begin = key_rows.begin + skipped;
  gemm<Isa, AOrder::kRowMajor, Update::kSet>({keys, strip.rows, shape.head_dim},
                                             scratch.k.at(skipped, 0),
                                             scratch.q_t.at(0, strip.row_begin), scratch.scores_t);
  float softmax_scale = strip.options.softmax_scale;
  if (strip.options.changes_scores) {
    score_transposed<Isa>(strip, key_begin, keys);
    softmax_scale = 1.0f;
  }
  if (begin[last] > key_begin || end[0] < key_begin + keys) {
    mask_transposed<Isa>(strip, key_begin, keys);
  }
  online_softmax<Isa>(strip, keys, softmax_scale * kLog2E);
  if (strip.options.has_dropout()) {
    drop_transposed<Isa>(strip, key_rows.begin, skipped, keys);
  }
  gemm<Isa, AOrder::kTransposed, Update::kScaleAdd>(
      {strip.rows, shape.head_dim_v, keys}, scratch.scores_t, scratch.v.at(skipped, 0),
      scratch.out.at(strip.row_begin, 0), scratch.rescale + strip.row_begin);
}

/// Makes `value` the maximum of itself and `other`, which other threads may do too.
template <class Isa>
void raise(float& value, float other) {
  std::atomic_ref const shared(value);
  float seen = shared.load();
  while (seen < other && !shared.compare_exchange_weak(seen, other)) {
  }
}

/// What is left to do to a row: out times factor, and softmax_lse.
struct RowResult {
  float factor;
  float lse;
};

/// From the scores' maximum in the log2 domain, their sum, and the sink of the head. A row whose
/// sum is 0 has seen no key.
template <class Isa>
RowResult finish_row(float row_max, float row_sum, float const* sink) {
  if (row_sum == 0.0f) {
    return {0.0f, sink == nullptr ? kInfinity : *sink};
  }
  double const lse = double(row_max) * kLn2 + std::log(double(row_sum));
  if (sink == nullptr) {
    return {1.0f / row_sum, float(lse)};
  }
  double const with_sink = std::fmax(lse, *sink) + std::log1p(std::exp(-std::fabs(lse - *sink)));
  return {float(std::exp(lse - with_sink) / row_sum), float(with_sink)};
}

/// Rows without keys are zeroed whatever lies in scratch.
template <class Isa, class T>
void finish_rows(ForwardParams const& params, RowRange const& rows, ForwardScratch const& scratch) {
  Shape const& shape = params.shape;
  float* const lse = params.softmax_lse +
                     (int64_t(rows.entry) * shape.num_heads + rows.head) * shape.seqlen_q +
                     rows.first + rows.begin;
  float const* const sink = params.sink == nullptr ? nullptr : params.sink + rows.head;
  float largest = -kInfinity;
  for (int row = 0; row < rows.count; ++row) {
    float* const out_row = scratch.out.data + row * scratch.out.stride;
    if (scratch.row_sum[row] == 0.0f) {
      std::memset(out_row, 0, sizeof(float) * shape.head_dim_v);
    }
    RowResult const result = finish_row<Isa>(scratch.row_max[row], scratch.row_sum[row], sink);
    lse[row] = result.lse;
    largest = std::fmax(largest, scratch.row_max[row]);
    store_row<Isa>(out_row, result.factor, shape.head_dim_v, row_pointer<T>(params.out, rows, row));
  }
  if (params.max_logits != nullptr) {
    raise<Isa>(params.max_logits[rows.head], float(double(largest) * kLn2));
  }
}

/// Q of the tile, transposed, and the state before the first key.
template <class Isa, class T>
void start_rows(ForwardParams const& params, RowRange const& rows, ForwardScratch const& scratch) {
  int const padded_rows = round_up(rows.count, kPanelCols);
  for (int row = 0; row < padded_rows; ++row) {
    scratch.row_max[row] = -kInfinity;
    scratch.row_sum[row] = 0.0f;
  }
  load_tile<Isa, T>(params.q, rows, params.shape.head_dim, scratch.out);
  transpose<Isa>(scratch.out, rows.count, params.shape.head_dim, scratch.q_t);
  fill_zero<Isa>(scratch.out, round_up(rows.count, kMicroRows));
}

template <class Isa, class T>
void forward_tile(ForwardParams const& params, Tile tile, float* scratch_base) {
  Shape const& shape = params.shape;
  ScratchArena arena(scratch_base);
  ForwardScratch const scratch(arena, shape, params.dropout);

  int const batch = tile.batch_head / shape.num_heads;
  int const head = tile.batch_head % shape.num_heads;
  int const head_k = head / shape.query_heads_per_key_head();
  Sequence const sequence = sequence_of(params.sequences, batch, shape.seqlen_q, shape.seqlen_k);
  RowRange const rows = query_tile_rows(sequence, head, tile.block);
  start_rows<Isa, T>(params, rows, scratch);

  HeadOptions const options = head_options<Isa>(params, sequence, batch, head);
  VisibleKeys const visible(params.mask, sequence, rows);
  TileGrid const grid = {kTileM, kTileN, sequence.seqlen_q, sequence.seqlen_k, params.mask};
  BlockRange const blocks = n_block_range(grid, tile.block);
  for (int n_block = blocks.min; n_block < blocks.max; ++n_block) {
    RowRange const key_rows = key_tile_rows(sequence, head_k, n_block);
    load_tile<Isa, T>(params.k, key_rows, shape.head_dim, scratch.k);
    load_tile<Isa, T>(params.v, key_rows, shape.head_dim_v, scratch.v);
    for (int row = 0; row < rows.count; row += kStrip) {
      attend<Isa>({scratch, visible, options, rows, row, imin(kStrip, rows.count - row)}, key_rows,
                  shape);
    }
  }
  finish_rows<Isa, T>(params, rows, scratch);
}

}  // namespace flash::cpu
