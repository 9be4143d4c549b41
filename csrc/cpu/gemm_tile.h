// Products of tiles in scratch memory. One register block is kMicroRows rows by two vectors: 12
// accumulators, two vectors of B and one broadcast element of A fill the 16 registers of AVX2 (and
// of SSE2), and the 12 independent chains cover the latency of a fused multiply-add.
#pragma once

#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace flash::cpu {

/// How element (row, k) of the left operand lies in memory.
enum class AOrder {
  kRowMajor,   // a[row * stride + k]
  kTransposed  // a[k * stride + row]
};

enum class Update {
  kSet,      // c = a b
  kAdd,      // c += a b
  kScaleAdd  // c = diag(row_scale) c + a b
};

struct GemmShape {
  int rows;
  int cols;
  int depth;
};

template <class Isa, AOrder kOrder, Update kUpdate>
[[gnu::always_inline]]
inline void gemm_block(Matrix a, Matrix b, Matrix c, int depth, float const* row_scale) {
  using Float = typename Isa::Float;
  Float acc[kMicroRows][2];
  for (int r = 0; r < kMicroRows; ++r) {
    float const* const c_row = c.data + r * c.stride;
    acc[r][0] = kUpdate == Update::kSet ? Float{} : Isa::load(c_row);
    acc[r][1] = kUpdate == Update::kSet ? Float{} : Isa::load(c_row + Isa::kWidth);
    if constexpr (kUpdate == Update::kScaleAdd) {
      Float const scale = Isa::broadcast(row_scale[r]);
      acc[r][0] *= scale;
      acc[r][1] *= scale;
    }
  }
  int64_t const a_row_step = kOrder == AOrder::kRowMajor ? a.stride : 1;
  int64_t const a_k_step = kOrder == AOrder::kRowMajor ? 1 : a.stride;
  float const* a_k = a.data;
  float const* b_k = b.data;
  for (int k = 0; k < depth; ++k, a_k += a_k_step, b_k += b.stride) {
    Float const b0 = Isa::load(b_k);
    Float const b1 = Isa::load(b_k + Isa::kWidth);
    for (int r = 0; r < kMicroRows; ++r) {
      Float const a_rk = Isa::broadcast(a_k[r * a_row_step]);
      acc[r][0] = Isa::fma(a_rk, b0, acc[r][0]);
      acc[r][1] = Isa::fma(a_rk, b1, acc[r][1]);
    }
  }
  for (int r = 0; r < kMicroRows; ++r) {
    Isa::store(c.data + r * c.stride, acc[r][0]);
    Isa::store(c.data + r * c.stride + Isa::kWidth, acc[r][1]);
  }
}

/// Rows and columns are rounded up to register blocks: A and C have rows, B and C columns to spare.
/// The depth is exact. The column panel is the outer loop: one panel of B stays in the first cache.
template <class Isa, AOrder kOrder, Update kUpdate>
[[gnu::noinline]]
void gemm(GemmShape const& shape, Matrix a, Matrix b, Matrix c, float const* row_scale = nullptr) {
  int64_t const a_row_step = kOrder == AOrder::kRowMajor ? a.stride : 1;
  for (int col = 0; col < shape.cols; col += 2 * Isa::kWidth) {
    for (int row = 0; row < shape.rows; row += kMicroRows) {
      gemm_block<Isa, kOrder, kUpdate>(
          {a.data + row * a_row_step, a.stride}, {b.data + col, b.stride},
          {c.data + int64_t(row) * c.stride + col, c.stride}, shape.depth,
          kUpdate == Update::kScaleAdd ? row_scale + row : nullptr);
    }
  }
}

}  // namespace flash::cpu
