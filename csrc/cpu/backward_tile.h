// Backward tasks. One pass, five products: the task of a key tile visits the query tiles that see
// it and recomputes their scores once; dk and dv stay in its scratch, dq goes to a shared fp32 sum.
//   S = Q K^T;  P = exp(scale S - lse);  dV += P^T dO;  dP = dO V^T;  dS = P * (dP - D)
//   dK += dS^T Q;  dQ += dS K        (dK and dQ are scaled when they are stored)
// With dropout Z times P in dV, and Z times dP; params.h has the rest of the options.
// The tasks of one key head add to a query tile of dq in the order of their key tiles (DqTurns):
// the sums are bit-equal for every thread count, and no second recomputing pass is needed.
#pragma once

#include "arith/block_range.h"
#include "arith/tile_order.h"
#include "cpu/bias_gradient.h"
#include "cpu/convert.h"
#include "cpu/dq_turns.h"
#include "cpu/gemm_tile.h"
#include "cpu/score_options.h"

namespace flash::cpu {

/// Rows of one query tile with their softmax_lse, softmax_d and sum of dq.
struct QueryRows {
  RowRange rows;
  float const* lse;
  float* softmax_d;
  Matrix dq;
};

template <class Isa>
QueryRows query_rows(BackwardParams const& params, DqSum const& dq_sum, Sequence const& sequence,
                     int batch, int head, int m_block) {
  Shape const& shape = params.shape;
  RowRange const rows = query_tile_rows(sequence, head, m_block);
  int64_t const plane = int64_t(rows.entry) * shape.num_heads + head;
  int const first_d = first_softmax_d_row(sequence, params.sequences, batch);
  int const first_dq = dq_sum.first_row(sequence, params.sequences, batch);
  return {rows, params.softmax_lse + plane * shape.seqlen_q + rows.first + rows.begin,
          params.softmax_d + plane * params.softmax_d_rows + first_d + rows.begin,
          dq_sum.plane(plane).at(first_dq + rows.begin, 0)};
}

/// Of a tile that counts query heads.
template <class Isa>
QueryRows query_rows(BackwardParams const& params, DqSum const& dq_sum, Tile tile) {
  Shape const& shape = params.shape;
  int const batch = tile.batch_head / shape.num_heads;
  Sequence const sequence = sequence_of(params.sequences, batch, shape.seqlen_q, shape.seqlen_k);
  return query_rows<Isa>(params, dq_sum, sequence, batch, tile.batch_head % shape.num_heads,
                         tile.block);
}

/// Part of a (query tile, key tile) pair: rows and keys counted from the begin of their tiles.
struct PairStrip {
  int row_begin;
  int rows;
  int key_begin;
  int keys;
};

/// S to P (times Z with dropout) and dP to dS, in place. A pair outside the mask gets 0 in both,
/// whatever the inputs hold. visible is null where every pair of the tile is visible; key_begin is
/// where the key tile begins.
template <class Isa, bool kPlain>
void score_gradients(BackwardScratch const& scratch, QueryRows const& query, PairStrip const& strip,
                     int key_begin, HeadOptions const& options, VisibleKeys const* visible) {
  using Float = typename Isa::Float;
  using Int = typename Isa::Int;
  Int const first_keys = Isa::count_from(key_begin);
  Float const scale = Isa::broadcast(options.softmax_scale);
  bool const has_dbias = !kPlain && options.dbias != nullptr;
  for (int row = strip.row_begin; row < strip.row_begin + strip.rows; ++row) {
    float* const p_row = scratch.p.at(row, 0).data;
    float* const ds_row = scratch.ds.at(row, 0).data;
    float const* const kept_row = scratch.kept.at(row, 0).data;
    float* const dbias_row = has_dbias ? scratch.dbias.at(row, 0).data : nullptr;
    float bias[kTileN] = {};
    if (!kPlain && options.bias.ptr != nullptr) {
      load_bias<Isa>(options, query.rows.begin + row, key_begin + strip.key_begin, strip.keys,
                     bias + strip.key_begin);
    }
    Float const lse = Isa::broadcast(query.lse[row]);
    Float const softmax_d = Isa::broadcast(query.softmax_d[row]);
    int const diagonal = query.rows.begin + row + options.diagonal;
    for (int col = strip.key_begin; col < strip.key_begin + strip.keys; col += Isa::kWidth) {
      Int const j = first_keys + col;
      Float const products = Isa::load(p_row + col);
      Float dp = Isa::load(ds_row + col);
      Float p, dropped_p, ds, dbias = {};
      if constexpr (kPlain) {
        p = exp2<Isa>(Isa::fma(products, scale, -lse) * kLog2E);
        dropped_p = p;
        ds = p * (dp - softmax_d);
      } else {
        Scores<Isa> const scores = scores_of<Isa>(options, products, j - diagonal);
        p = exp2<Isa>((scores.value + Isa::load(bias + col) - lse) * kLog2E);
        dropped_p = p;
        if (options.has_dropout()) {
          Float const kept = Isa::load(kept_row + col);
          dropped_p *= kept;
          dp *= kept;
        }
        dbias = p * (dp - softmax_d);
        ds = dbias * scores.derivative;
      }
      if (visible != nullptr) {
        Int const attends = (j >= visible->begin[row]) & (j < visible->end[row]);
        dropped_p = attends ? dropped_p : Float{};
        ds = attends ? ds : Float{};
        dbias = attends ? dbias : Float{};
      }
      if (has_dbias) {
        Isa::store(dbias_row + col, dbias);
      }
      Isa::store(p_row + col, dropped_p);
      Isa::store(ds_row + col, ds);
    }
  }
}

/// The same with whatever options the call has.
template <class Isa>
void apply_options(BackwardScratch const& scratch, QueryRows const& query, PairStrip const& strip,
                   int key_begin, HeadOptions const& options, VisibleKeys const* visible) {
  if (options.is_plain()) {
    score_gradients<Isa, true>(scratch, query, strip, key_begin, options, visible);
    return;
  }
  if (options.has_dropout()) {
    dropout_factors<Isa>(
        options,
        {query.rows.begin + strip.row_begin, strip.rows, key_begin + strip.key_begin, strip.keys},
        scratch.kept.at(strip.row_begin, strip.key_begin).data, scratch.kept.stride, 1);
  }
  score_gradients<Isa, false>(scratch, query, strip, key_begin, options, visible);
  if (options.dbias != nullptr) {
    add_bias_gradient<Isa>(
        scratch.dbias.at(strip.row_begin, strip.key_begin),
        {query.rows.begin + strip.row_begin, strip.rows, key_begin + strip.key_begin, strip.keys},
        options);
  }
}

/// Q and dO of the query tile are in scratch. Leaves dS of the strip there and adds to dk and dv.
template <class Isa>
void key_gradients(BackwardScratch const& scratch, QueryRows const& query, PairStrip const& strip,
                   int key_begin, Shape const& shape, HeadOptions const& options,
                   VisibleKeys const* visible) {
  auto const [row, rows, col, keys] = strip;
  gemm<Isa, AOrder::kRowMajor, Update::kSet>({rows, keys, shape.head_dim}, scratch.q.at(row, 0),
                                             scratch.k_t.at(0, col), scratch.p.at(row, col));
  gemm<Isa, AOrder::kRowMajor, Update::kSet>({rows, keys, shape.head_dim_v},
                                             scratch.dout.at(row, 0), scratch.v_t.at(0, col),
                                             scratch.ds.at(row, col));
  apply_options<Isa>(scratch, query, strip, key_begin, options, visible);
  gemm<Isa, AOrder::kTransposed, Update::kAdd>({keys, shape.head_dim_v, rows},
                                               scratch.p.at(row, col), scratch.dout.at(row, 0),
                                               scratch.dv.at(col, 0));
  gemm<Isa, AOrder::kTransposed, Update::kAdd>({keys, shape.head_dim, rows},
                                               scratch.ds.at(row, col), scratch.q.at(row, 0),
                                               scratch.dk.at(col, 0));
}

template <class Isa>
void query_gradient(BackwardScratch const& scratch, PairStrip const& strip, int head_dim,
                    Matrix dq) {
  gemm<Isa, AOrder::kRowMajor, Update::kAdd>(
      {strip.rows, head_dim, strip.keys}, scratch.ds.at(strip.row_begin, strip.key_begin),
      scratch.k.at(strip.key_begin, 0), dq.at(strip.row_begin, 0));
}

/// The strips of a pair with their visible keys, in whole multiples of kStrip, because products
/// update dk and dv by whole register blocks. Without a mask all rows are one strip.
struct PairStrips {
  PairStrip strips[kTileM / kStrip];
  int count = 0;

  [[gnu::always_inline]]
  PairStrips(QueryRows const& query, RowRange const& key_rows, VisibleKeys const* visible) {
    int const rows = query.rows.count;
    if (visible == nullptr) {
      strips[count++] = {0, rows, 0, key_rows.count};
      return;
    }
    for (int row = 0; row < rows; row += kStrip) {
      int const strip_rows = imin(kStrip, rows - row);
      int const begin = imax(visible->begin[row] - key_rows.begin, 0) / kStrip * kStrip;
      int const last = imin(visible->end[row + strip_rows - 1] - key_rows.begin, key_rows.count);
      int const end = imin(round_up(imax(last, 0), kStrip), key_rows.count);
      if (begin < end) {
        strips[count++] = {row, strip_rows, begin, end - begin};
      }
    }
  }
};

/// K and V of the task, transposed, and zeros in dk and dv.
template <class Isa, class T>
void load_keys(BackwardParams const& params, RowRange const& key_rows,
               BackwardScratch const& scratch) {
  Shape const& shape = params.shape;
  load_tile<Isa, T>(params.v, key_rows, shape.head_dim_v, scratch.k);
  transpose<Isa>(scratch.k, key_rows.count, shape.head_dim_v, scratch.v_t);
  load_tile<Isa, T>(params.k, key_rows, shape.head_dim, scratch.k);
  transpose<Isa>(scratch.k, key_rows.count, shape.head_dim, scratch.k_t);
  fill_zero<Isa>(scratch.dk, round_up(key_rows.count, kMicroRows));
  fill_zero<Isa>(scratch.dv, round_up(key_rows.count, kMicroRows));
}

/// dk and dv of one key tile of one key head, summed over its query heads; adds to dq in turn.
template <class Isa, class T>
void backward_tile(BackwardParams const& params, Tile tile, float* scratch_base,
                   DqSum const& dq_sum, DqTurns& turns) {
  Shape const& shape = params.shape;
  ScratchArena arena(scratch_base);
  BackwardScratch const scratch(arena, params);

  int const batch = tile.batch_head / shape.num_heads_k;
  int const head_k = tile.batch_head % shape.num_heads_k;
  Sequence const sequence = sequence_of(params.sequences, batch, shape.seqlen_q, shape.seqlen_k);
  RowRange const key_rows = key_tile_rows(sequence, head_k, tile.block);
  load_keys<Isa, T>(params, key_rows, scratch);

  TileGrid const grid = {kTileM, kTileN, sequence.seqlen_q, sequence.seqlen_k, params.mask};
  BlockRange const blocks = m_block_range(grid, tile.block);
  BlockRange const full = full_m_block_range(grid, tile.block);
  int const group_size = shape.query_heads_per_key_head();
  for (int group_idx = 0; group_idx < group_size; ++group_idx) {
    int const head = head_k * group_size + group_idx;
    HeadOptions const options = head_options<Isa>(params, sequence, batch, head);
    for (int m_block = blocks.min; m_block < blocks.max; ++m_block) {
      QueryRows const query = query_rows<Isa>(params, dq_sum, sequence, batch, head, m_block);
      VisibleKeys const visible(params.mask, sequence, query.rows);
      bool const is_full = full.min <= m_block && m_block < full.max;
      PairStrips const pair(query, key_rows, is_full ? nullptr : &visible);
      load_tile<Isa, T>(params.q, query.rows, shape.head_dim, scratch.q);
      load_tile<Isa, T>(params.dout, query.rows, shape.head_dim_v, scratch.dout);
      for (int idx = 0; idx < pair.count; ++idx) {
        key_gradients<Isa>(scratch, query, pair.strips[idx], key_rows.begin, shape, options,
                           is_full ? nullptr : &visible);
      }
      turns.wait(tile, group_idx, m_block);
      for (int idx = 0; idx < pair.count; ++idx) {
        query_gradient<Isa>(scratch, pair.strips[idx], shape.head_dim, query.dq);
      }
      turns.pass(tile, group_idx, m_block + 1);
    }
    turns.pass(tile, group_idx + 1, 0);
  }
  store_tile<Isa, T>(scratch.dk, params.softmax_scale, params.dk, key_rows, shape.head_dim);
  store_tile<Isa, T>(scratch.dv, 1.0f, params.dv, key_rows, shape.head_dim_v);
}

/// softmax_d of one query tile, and zeros in the tile's dq sum.
template <class Isa, class T>
void prepare_rows(BackwardParams const& params, Tile tile, float* scratch_base,
                  DqSum const& dq_sum) {
  Shape const& shape = params.shape;
  float* const out_row = scratch_base;
  float* const dout_row = scratch_base + leading_dim(shape.head_dim_v);
  QueryRows const query = query_rows<Isa>(params, dq_sum, tile);
  RowRange const& rows = query.rows;
  float const* const dlse =
      params.dlse == nullptr ? nullptr : params.dlse + (query.lse - params.softmax_lse);
  for (int row = 0; row < rows.count; ++row) {
    load_row<Isa>(row_pointer<T const>(params.out, rows, row), shape.head_dim_v, out_row);
    load_row<Isa>(row_pointer<T const>(params.dout, rows, row), shape.head_dim_v, dout_row);
    // In the order of the product dP = dO V^T: where a row attends to one key, dP - D is exactly 0.
    float sum = 0.0f;
    for (int c = 0; c < shape.head_dim_v; ++c) {
      sum = Isa::scalar_fma(out_row[c], dout_row[c], sum);
    }
    query.softmax_d[row] = dlse == nullptr ? sum : sum - dlse[row];
  }
  fill_zero<Isa>(query.dq, round_up(rows.count, kMicroRows));
}

/// The finished dq of one query tile, scaled and rounded to the input dtype.
template <class Isa, class T>
void store_dq(BackwardParams const& params, Tile tile, DqSum const& dq_sum) {
  QueryRows const query = query_rows<Isa>(params, dq_sum, tile);
  store_tile<Isa, T>(query.dq, params.softmax_scale, params.dq, query.rows, params.shape.head_dim);
}

}  // namespace flash::cpu
