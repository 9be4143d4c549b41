// Warp-wide matrix products of 16 x 16 x 16 pieces (mma.sync m16n8k16, ldmatrix), fp32
// accumulators. Products of fp32 operands: mma_fp32.cuh.
//
// Fragment of an accumulator piece (16 rows x 8 columns), lane = 4 * g + t: elements 0, 1 are row
// g, columns 2t, 2t + 1; elements 2, 3 the same columns of row g + 8.
#pragma once

#include <cute/arch/mma_sm80.hpp>
#include <type_traits>

#include "device/element.cuh"
#include "device/smem_tile.cuh"

namespace flash {

/// The columns of an A piece, and rows of a B piece, that one mma sums over.
template <DType kDType>
inline constexpr int kPieceK = 32 / element_size(kDType);

/// Operand registers of one piece, 16 x kPieceK or kPieceK x 16. As B operand, registers 0, 1 feed
/// its first eight columns and 2, 3 its last eight.
struct Piece {
  uint32_t r[4];
};

/// Makes columns 2t and 2t + 1 of fragment n of a row of accumulators part of A pieces; `half` is 1
/// for row g + 8. Of fp32, whose mma wants columns t and t + 4, slot t takes column 2t and slot
/// t + 4 column 2t + 1: the sum does not care, if the rows of B come in the same order.
template <DType kDType, int kPieces>
__device__ __forceinline__ void set_pair(Piece (&row)[kPieces], int n, int half, float left,
                                         float right) {
  if constexpr (kDType == DType::kFp32) {
    row[n].r[half] = __float_as_uint(left);
    row[n].r[2 + half] = __float_as_uint(right);
  } else {
    row[n / 2].r[n % 2 * 2 + half] = pack2<kDType>(left, right);
  }
}

/// c += a b for a 16 x 16 piece a and eight columns (b0, b1) of a piece.
template <DType kDType>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], Piece const& a, uint32_t b0,
                                             uint32_t b1) {
  using Instruction =
      std::conditional_t<kDType == DType::kBf16, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                         cute::SM80_16x8x16_F32F16F16F32_TN>;
  Instruction::fma(c[0], c[1], c[2], c[3], a.r[0], a.r[1], a.r[2], a.r[3], b0, b1, c[0], c[1], c[2],
                   c[3]);
}

/// The piece at (row, col) of `reader`. Own wrapper of ldmatrix: CUTLASS's takes a generic
/// pointer, this one the 32-bit shared address that PieceReader makes with one XOR.
template <class Tile, Operand kOperand>
__device__ __forceinline__ Piece load_piece(PieceReader<Tile, kOperand> const& reader, int row,
                                            int col) {
  uint32_t const address = reader.at(row, col);
  Piece p;
  if constexpr (kOperand == Operand::kA || kOperand == Operand::kBTransposed) {
    asm volatile("ldmatrix.sync.aligned.x4.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(p.r[0]), "=r"(p.r[1]), "=r"(p.r[2]), "=r"(p.r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.x4.trans.m8n8.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(p.r[0]), "=r"(p.r[1]), "=r"(p.r[2]), "=r"(p.r[3])
                 : "r"(address)
                 : "memory");
  }
  return p;
}

struct NothingBeside {
  __device__ __forceinline__ void operator()(int) const {}
};

/// acc[m][2n, 2n + 1] += sum over k of load_a(m, k) * load_b(n, k), pieces of 16. Operands are
/// loaded kAhead pieces of B (one k-step of A) before the products that use them: enough to cover
/// ldmatrix's latency at the fewest registers. beside(step) adds other work behind each of the
/// steps, one for a piece of B.
template <DType kDType, int kPiecesK, int kPiecesM, int kHalfPiecesN, class LoadA, class LoadB,
          class Beside>
__device__ __forceinline__ void warp_gemm(float (&acc)[kPiecesM][kHalfPiecesN][4],
                                          LoadA const& load_a, LoadB const& load_b,
                                          Beside const& beside) {
  constexpr int kPiecesN = kHalfPiecesN / 2;
  constexpr int kSteps = kPiecesK * kPiecesN;
  constexpr int kAhead = 2;
  constexpr int kBuffersA = ceil_div(kAhead, kPiecesN) + 1;  // k-steps of A in use or ahead
  Piece a[kBuffersA][kPiecesM], b[kAhead + 1];
  auto load = [&](int step) {
    if (step < kSteps) {
      int const k = step / kPiecesN, n = step % kPiecesN;
      if (n == 0) {
#pragma unroll
        for (int m = 0; m < kPiecesM; ++m) {
          a[k % kBuffersA][m] = load_a(m, k);
        }
      }
      b[step % (kAhead + 1)] = load_b(n, k);
    }
  };
#pragma unroll
  for (int step = 0; step < kAhead; ++step) {
    load(step);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    load(step + kAhead);
    int const k = step / kPiecesN, n = step % kPiecesN;
    Piece const& b_step = b[step % (kAhead + 1)];
#pragma unroll
    for (int m = 0; m < kPiecesM; ++m) {
      mma_m16n8k16<kDType>(acc[m][2 * n], a[k % kBuffersA][m], b_step.r[0], b_step.r[1]);
      mma_m16n8k16<kDType>(acc[m][2 * n + 1], a[k % kBuffersA][m], b_step.r[2], b_step.r[3]);
    }
    beside(step);
  }
}

/// Sets every element of the rows g and g + 8 of piece m to rows[m][0] and rows[m][1].
template <int kM, int kN>
__device__ __forceinline__ void set_rows(float (&acc)[kM][kN][4], float const (&rows)[kM][2]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        acc[m][n][e] = rows[m][e / 2];
      }
    }
  }
}

template <int kM, int kN>
__device__ __forceinline__ void clear(float (&acc)[kM][kN][4]) {
  float const zeros[kM][2] = {};
  set_rows(acc, zeros);
}

}  // namespace flash
