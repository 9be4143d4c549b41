// Forward task: the output rows of one query tile, by online softmax over its visible key tiles.
//   S^T = K Q^T;  m, l: running row maximum and sum;  out = (diag(rescale) out + P V) / l
#pragma once

#include <cmath>

#include "arith/block_range.h"
#include "arith/tile_order.h"
#include "cpu/convert.h"
#include "cpu/gemm_tile.h"

namespace flash::cpu {

/// scores_t[key][row] = -inf where the row does not attend to the key. Keys from key_begin.
template <class Isa>
void mask_transposed(Matrix scores_t, int keys, int rows, int key_begin,
                     VisibleKeys const& visible) {
  using Int = typename Isa::Int;
  for (int row = 0; row < rows; row += Isa::kWidth) {
    Int const begin = Isa::template load_as<Int>(visible.begin + row);
    Int const end = Isa::template load_as<Int>(visible.end + row);
    for (int key = 0; key < keys; ++key) {
      float* const score = scores_t.data + key * scores_t.stride + row;
      Int const j = Int{} + (key_begin + key);
      Isa::store(score, (j >= begin) & (j < end) ? Isa::load(score) : Isa::broadcast(-kInfinity));
    }
  }
}

/// Scores to probabilities in place; moves row_max and row_sum on by one key tile and writes the
/// factor by which the previous output shrinks.
template <class Isa>
void online_softmax(ForwardScratch const& scratch, int keys, int rows, float softmax_scale_log2) {
  using Float = typename Isa::Float;
  Float const scale = Isa::broadcast(softmax_scale_log2);
  int64_t const stride = scratch.scores_t.stride;
  for (int row = 0; row < rows; row += Isa::kWidth) {
    float* const column = scratch.scores_t.data + row;
    Float tile_max = Isa::broadcast(-kInfinity);
    for (int key = 0; key < keys; ++key) {
      tile_max = Isa::max(Isa::load(column + key * stride), tile_max);
    }
    Float const old_max = Isa::load(scratch.row_max + row);
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
    Isa::store(scratch.rescale + row, rescale);
    Isa::store(scratch.row_max + row, new_max);
    Isa::store(scratch.row_sum + row, Isa::fma(Isa::load(scratch.row_sum + row), rescale, sum));
  }
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
      std::memset(out_row, 0, sizeof(float) * shape.head_dim);
    }
    lse[row] =
        no_keys ? kInfinity : float(double(scratch.row_max[row]) * kLn2 + std::log(double(sum)));
    store_row<Isa>(out_row, no_keys ? 0.0f : 1.0f / sum, shape.head_dim,
                   row_pointer<T>(params.out, rows, row));
  }
}

template <class Isa, class T>
void forward_tile(ForwardParams const& params, Tile tile, float* scratch_base) {
  Shape const& shape = params.shape;
  int const head_dim = shape.head_dim;
  ScratchArena arena(scratch_base);
  ForwardScratch const scratch(arena, head_dim);

  int const m_begin = tile.block * kTileM;
  int const head = tile.batch_head % shape.num_heads;
  RowRange const rows = {tile.batch_head / shape.num_heads, head, m_begin,
                         imin(kTileM, shape.seqlen_q - m_begin)};
  int const head_k = head / shape.query_heads_per_key_head();

  VisibleKeys visible = {};
  for (int row = 0; row < rows.count; ++row) {
    KeyRange const keys = visible_keys(params.mask, m_begin + row, shape.seqlen_q, shape.seqlen_k);
    visible.begin[row] = keys.begin;
    visible.end[row] = keys.end;
  }
  int const padded_rows = round_up(rows.count, kPanelCols);
  for (int row = 0; row < padded_rows; ++row) {
    scratch.row_max[row] = -kInfinity;
    scratch.row_sum[row] = 0.0f;
  }
  fill_zero<Isa>(scratch.out, round_up(rows.count, kMicroRows));
  load_tile<Isa, T>(params.q, rows, head_dim, scratch.out);
  transpose<Isa>(scratch.out, rows.count, head_dim, scratch.q_t);
  fill_zero<Isa>(scratch.out, round_up(rows.count, kMicroRows));

  TileGrid const grid = {kTileM, kTileN, shape.seqlen_q, shape.seqlen_k, params.mask};
  BlockRange const blocks = n_block_range(grid, tile.block);
  BlockRange const full = full_n_block_range(grid, tile.block);
  for (int n_block = blocks.min; n_block < blocks.max; ++n_block) {
    int const n_begin = n_block * kTileN;
    int const keys = imin(kTileN, shape.seqlen_k - n_begin);
    RowRange const key_rows = {rows.batch, head_k, n_begin, keys};
    load_tile<Isa, T>(params.k, key_rows, head_dim, scratch.k);
    gemm<Isa, AOrder::kRowMajor, Update::kSet>({keys, rows.count, head_dim}, scratch.k, scratch.q_t,
                                               scratch.scores_t);
    if (n_block < full.min || n_block >= full.max) {
      mask_transposed<Isa>(scratch.scores_t, keys, padded_rows, n_begin, visible);
    }
    online_softmax<Isa>(scratch, keys, padded_rows, params.softmax_scale * kLog2E);
    load_tile<Isa, T>(params.v, key_rows, head_dim, scratch.v);
    gemm<Isa, AOrder::kTransposed, Update::kScaleAdd>(
        {rows.count, head_dim, keys}, scratch.scores_t, scratch.v, scratch.out, scratch.rescale);
  }
  finish_rows<Isa, T>(params, rows, scratch);
}

}  // namespace flash::cpu
