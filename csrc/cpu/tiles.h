// Tile sizes, padding rules and the scratch memory of one thread, stated once for both passes.
#pragma once

#include "params.h"

namespace flash::cpu {

/// Query rows and keys of one tile: what is converted to fp32 at a time.
inline constexpr int kTileM = 96;
inline constexpr int kTileN = 96;

/// The register block of the matrix products: rows, and the columns that every instruction set's
/// block width divides.
inline constexpr int kMicroRows = 6;
inline constexpr int kPanelCols = 16;

/// Rows of a tile that are worked together. At the edges of the mask a strip leaves out the keys
/// that none of its rows attends to.
inline constexpr int kStrip = 48;

// Either side of the scores is the row side of one product and the column side of another.
static_assert(kStrip % kMicroRows == 0 && kStrip % kPanelCols == 0);
static_assert(kTileM % kStrip == 0 && kTileN % kStrip == 0);

/// Floats from one row of a scratch matrix to the next: whole column panels, and an odd number of
/// 64-byte lines so that a column of rows spreads over all cache sets.
FLASH_HD constexpr int leading_dim(int cols) {
  int const panels = ceil_div(cols, kPanelCols);
  return (panels | 1) * kPanelCols;
}

/// Rows [begin, begin + count) of a sequence, in one (entry, head) plane of a tensor.
struct RowRange {
  int entry;
  int head;
  int first;  // row of the entry where the sequence begins
  int begin;
  int count;
};

constexpr RowRange query_tile_rows(Sequence const& sequence, int head, int m_block) {
  int const begin = m_block * kTileM;
  return {sequence.entry_q, head, sequence.first_q, begin, imin(kTileM, sequence.seqlen_q - begin)};
}

constexpr RowRange key_tile_rows(Sequence const& sequence, int head_k, int n_block) {
  int const begin = n_block * kTileN;
  return {sequence.entry_k, head_k, sequence.first_k, begin,
          imin(kTileN, sequence.seqlen_k - begin)};
}

/// A row-major fp32 matrix in scratch memory.
struct Matrix {
  float* data;
  int stride;

  FLASH_HD Matrix at(int row, int col) const {
    return {data + int64_t(row) * stride + col, stride};
  }
};

/// Cuts one allocation into matrices. With a null base it only counts.
class ScratchArena {
 public:
  explicit ScratchArena(float* base) : base_(base) {}

  Matrix matrix(int rows, int cols) {
    int const stride = leading_dim(cols);
    return {floats(int64_t(rows) * stride), stride};
  }

  float* floats(int64_t count) {
    float* const begin = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (count + kPanelCols - 1) / kPanelCols * kPanelCols;
    return begin;
  }

  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

/// Keys that each query row of a tile attends to, as parallel arrays for vector loads. Both bounds
/// grow with the row; padding rows attend to nothing.
struct VisibleKeys {
  VisibleKeys(Mask mask, Sequence const& sequence, RowRange const& rows) {
    for (int row = 0; row < rows.count; ++row) {
      KeyRange const keys =
          visible_keys(mask, rows.begin + row, sequence.seqlen_q, sequence.seqlen_k);
      begin[row] = keys.begin;
      end[row] = keys.end;
    }
  }

  int32_t begin[kTileM] = {};
  int32_t end[kTileM] = {};
};

/// Scratch of a forward task. Scores are held transposed, keys x rows: the softmax then runs along
/// vector lanes without horizontal reductions, and K and V enter the products as they lie in
/// memory.
struct ForwardScratch {
  ForwardScratch(ScratchArena& arena, Shape const& shape, Dropout const& dropout)
      : q_t(arena.matrix(shape.head_dim, kTileM)),
        k(arena.matrix(kTileN, shape.head_dim)),
        v(arena.matrix(kTileN, shape.head_dim_v)),
        scores_t(arena.matrix(kTileN, kStrip)),
        kept_t(arena.matrix(dropout.rng_state == nullptr ? 0 : kTileN, kStrip)),
        out(arena.matrix(kTileM, imax(shape.head_dim, shape.head_dim_v))),
        row_max(arena.floats(kTileM)),
        row_sum(arena.floats(kTileM)),
        rescale(arena.floats(kTileM)) {}

  Matrix q_t, k, v, scores_t;
  Matrix kept_t;   // what dropout makes of ones, keys x rows; only with dropout
  Matrix out;      // holds Q until that is transposed
  float* row_max;  // log2 domain
  float* row_sum;
  float* rescale;  // factor of the previous out and row_sum after the current key tile
};

/// Scratch of a backward task. K and V are transposed once for all the query tiles of the task, so
/// that Q and dO enter all five products as they lie in memory.
struct BackwardScratch {
  BackwardScratch(ScratchArena& arena, BackwardParams const& params)
      : BackwardScratch(arena, params.shape, params.dropout.rng_state != nullptr,
                        params.dbias.ptr != nullptr) {}

  BackwardScratch(ScratchArena& arena, Shape const& shape, bool has_dropout, bool has_dbias)
      : k(arena.matrix(kTileN, imax(shape.head_dim, shape.head_dim_v))),
        k_t(arena.matrix(shape.head_dim, kTileN)),
        v_t(arena.matrix(shape.head_dim_v, kTileN)),
        q(arena.matrix(kTileM, shape.head_dim)),
        dout(arena.matrix(kTileM, shape.head_dim_v)),
        p(arena.matrix(kTileM, kTileN)),
        ds(arena.matrix(kTileM, kTileN)),
        kept(arena.matrix(has_dropout ? kTileM : 0, kTileN)),
        dbias(arena.matrix(has_dbias ? kTileM : 0, kTileN)),
        dk(arena.matrix(kTileN, shape.head_dim)),
        dv(arena.matrix(kTileN, shape.head_dim_v)) {}

  Matrix k;  // holds V until that is transposed
  Matrix k_t, v_t, q, dout;
  Matrix p;      // scores, then P * Z
  Matrix ds;     // dP, then dS
  Matrix kept;   // Z; only with dropout
  Matrix dbias;  // of every pair; only if asked
  Matrix dk, dv;
};

}  // namespace flash::cpu
