// Forward task: the output rows of one query tile, by online softmax over its visible key tiles.
//   S^T = K Q^T;  m, l: running row maximum and sum;  out = (diag(rescale) out + P V) / l
#pragma once

#include <cmath>

#include "arith/block_range.h"
#include "arith/tile_order.h"
#include "cpu/convert.h"
#include "cpu/gemm_tile.h"

namespace flash::cpu {

/// Scratch and state of a strip of query rows, the first of them row_begin of the tile.
struct ForwardStrip {
  ForwardScratch const& scratch;
  VisibleKeys const& visible;
  int row_begin;
  int rows;

  /// Rows as vector lanes, whole panels of them.
  [[gnu::always_inline]]
  int lanes() const {
    return round_up(rows, kPanelCols);
  }
};

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
void attend(ForwardStrip const& strip, RowRange const& key_rows, Shape const& shape,
            float softmax_scale) {
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
  if (begin[last] > key_begin || end[0] < key_begin + keys) {
    mask_transposed<Isa>(strip, key_begin, keys);
  }
  online_softmax<Isa>(strip, keys, softmax_scale * kLog2E);
  gemm<Isa, AOrder::kTransposed, Update::kScaleAdd>(
      {strip.rows, shape.head_dim_v, keys}, scratch.scores_t, scratch.v.at(skipped, 0),
      scratch.out.at(strip.row_begin, 0), scratch.rescale + strip.row_begin);
}

/// out / row_sum and the log sum exp; a row whose sum is 0 has seen no key.
template <class Isa, class T>
void finish_rows(ForwardParams const& params, RowRange const& rows, ForwardScratch const& scratch) {
  Shape const& shape = params.shape;
  float* const lse = params.softmax_lse +
                     (int64_t(rows.batch) * shape.num_heads + rows.head) * shape.seqlen_q +
                     rows.begin;
  for (int row = 0; row < rows.count; ++row) {
    float const sum = scratch.row_sum[row];
    float* const out_row = scratch.out.data + row * scratch.out.stride;
    bool const no_keys = sum == 0.0f;
    if (no_keys) {
      std::memset(out_row, 0, sizeof(float) * shape.head_dim_v);
    }
    lse[row] =
        no_keys ? kInfinity : float(double(scratch.row_max[row]) * kLn2 + std::log(double(sum)));
    store_row<Isa>(out_row, no_keys ? 0.0f : 1.0f / sum, shape.head_dim_v,
                   row_pointer<T>(params.out, rows, row));
  }
}

template <class Isa, class T>
void forward_tile(ForwardParams const& params, Tile tile, float* scratch_base) {
  Shape const& shape = params.shape;
  ScratchArena arena(scratch_base);
  ForwardScratch const scratch(arena, shape);

  int const m_begin = tile.block * kTileM;
  int const head = tile.batch_head % shape.num_heads;
  RowRange const rows = {tile.batch_head / shape.num_heads, head, m_begin,
                         imin(kTileM, shape.seqlen_q - m_begin)};
  int const head_k = head / shape.query_heads_per_key_head();

  int const padded_rows = round_up(rows.count, kPanelCols);
  for (int row = 0; row < padded_rows; ++row) {
    scratch.row_max[row] = -kInfinity;
    scratch.row_sum[row] = 0.0f;
  }
  load_tile<Isa, T>(params.q, rows, shape.head_dim, scratch.out);
  transpose<Isa>(scratch.out, rows.count, shape.head_dim, scratch.q_t);
  fill_zero<Isa>(scratch.out, round_up(rows.count, kMicroRows));

  VisibleKeys const visible(params.mask, shape, rows);
  TileGrid const grid = {kTileM, kTileN, shape.seqlen_q, shape.seqlen_k, params.mask};
  BlockRange const blocks = n_block_range(grid, tile.block);
  for (int n_block = blocks.min; n_block < blocks.max; ++n_block) {
    int const n_begin = n_block * kTileN;
    RowRange const key_rows = {rows.batch, head_k, n_begin, imin(kTileN, shape.seqlen_k - n_begin)};
    load_tile<Isa, T>(params.k, key_rows, shape.head_dim, scratch.k);
    load_tile<Isa, T>(params.v, key_rows, shape.head_dim_v, scratch.v);
    for (int row = 0; row < rows.count; row += kStrip) {
      attend<Isa>({scratch, visible, row, imin(kStrip, rows.count - row)}, key_rows, shape,
                  params.softmax_scale);
    }
  }
  finish_rows<Isa, T>(params, rows, scratch);
}

}  // namespace flash::cpu
