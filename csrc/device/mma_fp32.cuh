// Warp-wide products of fp32 operands on tensor cores (mma.sync m16n8k8 of TF32), and what they
// need beyond mma.cuh of tiles in shared memory.
//
// A TF32 operand has 11 significant bits of fp32's 24. Three products of them make one of fp32:
// each operand is split in a big part, itself rounded to TF32, and the small rest,
//   a b = a_big b_big + (a_big b_small + a_small b_big) + a_small b_small,
// of which the last is below fp32's rounding. Tensor cores cut a sum off instead of rounding it, so
// a product is summed in accumulators of its own, big and small parts apart, and added to the
// result in fp32's rounding.
#pragma once

#include "device/mma.cuh"

namespace flash {

/// True of the operands that ldmatrix can't bring: it transposes 16-bit elements only.
template <class Tile, Operand kOperand>
concept ReadByWords =
    Tile::kElementBytes == 4 && (kOperand == Operand::kATransposed || kOperand == Operand::kB);

/// One lane's addresses of the words of such an operand. Slot t of mma's K takes tile row 2t and
/// slot t + 4 row 2t + 1, as set_pair() does it; the 32 words of a load are in 32 banks with them.
/// A tile that is A^T has been written by ScoreWriter.
template <class Tile, Operand kOperand>
  requires ReadByWords<Tile, kOperand>
struct PieceReader<Tile, kOperand> {
  uint32_t row_address;
  uint32_t chunk_offset;

  __device__ __forceinline__ PieceReader(uint32_t tile_address, int first_row, int first_col,
                                         int thread_idx) {
    int const lane_idx = thread_idx % 32;
    int const row = first_row + lane_idx % 4 * 2, g = lane_idx / 4;
    bool const is_score = kOperand == Operand::kATransposed;
    int const chunk = first_col % Tile::kBlockCols / Tile::kChunkCols + (is_score ? g % 2 : g / 4);
    row_address = tile_address + first_col / Tile::kBlockCols * Tile::kBlockBytes +
                  row * Tile::kRowBytes + (is_score ? g / 2 : g % 4) * 4;
    chunk_offset = (chunk ^ Tile::swizzle(row)) << 4;
  }

  /// Address of the lane's word of the even or odd row, in the left or right eight columns, of the
  /// piece `row` rows down (a multiple of 8) and `col` columns right.
  __device__ __forceinline__ uint32_t at(int row, int col, bool is_odd, bool is_right) const {
    uint32_t const chunk = (is_odd ? Tile::swizzle(1) : 0) ^ (is_right ? 2 : 0);
    return Tile::moved(row_address, chunk_offset ^ (chunk << 4), row + is_odd, col);
  }
};

/// The piece at (row, col) of `reader`.
template <class Tile, Operand kOperand>
  requires ReadByWords<Tile, kOperand>
__device__ __forceinline__ Piece load_piece(PieceReader<Tile, kOperand> const& reader, int row,
                                            int col) {
  Piece p;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // A's registers go down its rows, which are columns of the tile, before they go along K.
    bool const is_upper = i / 2 == 1, is_second = i % 2 == 1;
    bool const is_odd = kOperand == Operand::kB ? is_second : is_upper;
    bool const is_right = kOperand == Operand::kB ? is_upper : is_second;
    p.r[i] = load_shared(reader.at(row, col, is_odd, is_right));
  }
  return p;
}

/// One lane's addresses of fragments that are written as an operand of products over their columns
/// or their rows. Of every eight fp32 columns the even ones come first: ldmatrix then brings them
/// in the order of set_pair(), and neither writing nor reading meets a bank twice. 16-bit elements
/// lie in the order of their columns.
template <class Tile>
struct ScoreWriter : FragmentWriter<Tile> {
  __device__ __forceinline__ ScoreWriter(uint32_t tile_address, int first_row, int first_col,
                                         int thread_idx)
      : FragmentWriter<Tile>(tile_address, first_row, first_col, thread_idx) {
    if constexpr (Tile::kElementBytes == 4) {
      int const row = first_row + thread_idx % 32 / 4;
      int const chunk = first_col % Tile::kBlockCols / Tile::kChunkCols;
      this->row_address = tile_address + first_col / Tile::kBlockCols * Tile::kBlockBytes +
                          row * Tile::kRowBytes + thread_idx % 4 * 4;
      this->chunk_offset = (chunk ^ Tile::swizzle(row)) << 4;
    }
  }
};

/// Stores columns 2t and 2t + 1 of a fragment at a ScoreWriter's address.
template <DType kDType>
__device__ __forceinline__ void store_score_pair(uint32_t address, PackedPair<kDType> const& pair) {
  store_shared(address, pair.word[0]);
  if constexpr (kDType == DType::kFp32) {
    store_shared(address ^ 16, pair.word[1]);
  }
}

/// A piece as operand of TF32 products: mma takes the upper 19 bits of a register.
struct Tf32Piece {
  Piece big, small;
};

/// kSplit: both parts, for three products; else the big part alone.
template <bool kSplit>
__device__ __forceinline__ Tf32Piece to_tf32(Piece const& p) {
  Tf32Piece parts;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float const x = __uint_as_float(p.r[i]);
    if constexpr (kSplit) {
      parts.big.r[i] = (p.r[i] + 0x1000u) & 0xffffe000u;  // to nearest; a NaN lives on in `small`
      parts.small.r[i] = __float_as_uint(x - __uint_as_float(parts.big.r[i]));
    } else {
      // What mma cuts off is in the mean what this adds, less than a unit of TF32: what TF32 holds
      // stays as it is. One instruction for rounding, and a NaN stays one.
      parts.big.r[i] = __float_as_uint(x * (1.f + 0x1.63p-12f));
    }
  }
  return parts;
}

/// c[m][n] += a[m] b[n], 16 x 8 x 8.
template <int kM, int kN>
__device__ __forceinline__ void mma_tf32(float (&c)[kM][2 * kN][4], Tf32Piece const (&a)[kM],
                                         Piece Tf32Piece::* a_part, Tf32Piece const (&b)[kN],
                                         Piece Tf32Piece::* b_part) {
  using Instruction = cute::SM80_16x8x8_F32TF32TF32F32_TN;
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    uint32_t const(&a_m)[4] = (a[m].*a_part).r;
#pragma unroll
    for (int n = 0; n < 2 * kN; ++n) {
      uint32_t const* const b_n = (b[n / 2].*b_part).r + n % 2 * 2;
      float (&d)[4] = c[m][n];
      Instruction::fma(d[0], d[1], d[2], d[3], a_m[0], a_m[1], a_m[2], a_m[3], b_n[0], b_n[1], d[0],
                       d[1], d[2], d[3]);
    }
  }
}

/// acc[.][2 * kFirst ...] += the products of kCount pieces of B from kFirst on.
template <bool kSplit, int kPiecesK, int kFirst, int kCount, int kM, int kN, class LoadA,
          class LoadB>
__device__ __forceinline__ void add_product(float (&acc)[kM][kN][4], LoadA const& load_a,
                                            LoadB const& load_b) {
  float sum[kM][2 * kCount][4], rest[kM][2 * kCount][4];
  clear(sum);
  clear(rest);
  Piece next_a[kM], next_b[kCount];
  auto const load = [&](int k) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      next_a[m] = load_a(m, k);
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      next_b[n] = load_b(kFirst + n, k);
    }
  };
  auto const step = [&](int k) {
    Tf32Piece a[kM], b[kCount];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      a[m] = to_tf32<kSplit>(next_a[m]);
    }
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      b[n] = to_tf32<kSplit>(next_b[n]);
    }
    if (k + 1 < kPiecesK) {
      load(k + 1);
    }
    if constexpr (kSplit) {
      mma_tf32(rest, a, &Tf32Piece::small, b, &Tf32Piece::big);
      mma_tf32(rest, a, &Tf32Piece::big, b, &Tf32Piece::small);
    }
    mma_tf32(sum, a, &Tf32Piece::big, b, &Tf32Piece::big);
  };
  // With all steps in a row ptxas moves loads to the front until there is no register left.
  constexpr int kUnrolled = kPiecesK <= 8 ? kPiecesK : 4;
  static_assert(kPiecesK % kUnrolled == 0);
  load(0);
#pragma unroll 1
  for (int first = 0; first < kPiecesK; first += kUnrolled) {
#pragma unroll
    for (int k = 0; k < kUnrolled; ++k) {
      step(first + k);
    }
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * kCount; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        acc[m][2 * kFirst + n][e] += kSplit ? sum[m][n][e] + rest[m][n][e] : sum[m][n][e];
      }
    }
  }
}

/// warp_gemm() of fp32 operands, of one TF32 product each if `allow_tf32`. Goes through B in groups
/// of kGroup pieces, for each of which A is loaded again: the sums of a group are all that is held
/// beside the result. The branch stands in every group because it keeps ptxas from mixing groups,
/// which spilled 4 to 56 bytes.
template <int kPiecesK, int kGroup, int kFirst = 0, int kM, int kN, class LoadA, class LoadB>
__device__ __forceinline__ void warp_gemm_tf32(float (&acc)[kM][kN][4], LoadA const& load_a,
                                               LoadB const& load_b, bool allow_tf32) {
  constexpr int kCount = imin(kGroup, kN / 2 - kFirst);
  if (allow_tf32) {
    add_product<false, kPiecesK, kFirst, kCount>(acc, load_a, load_b);
  } else {
    add_product<true, kPiecesK, kFirst, kCount>(acc, load_a, load_b);
  }
  if constexpr (kFirst + kCount < kN / 2) {
    warp_gemm_tf32<kPiecesK, kGroup, kFirst + kCount>(acc, load_a, load_b, allow_tf32);
  }
}

/// acc += a b over kK columns of A. `allow_tf32` (ForwardParams) and kGroup, the pieces of B that
/// an A from shared memory is loaded once for, are of fp32 alone. `beside` as in warp_gemm(); with
/// fp32 it comes before the product.
template <DType kDType, int kK, int kGroup = 2, int kM, int kN, class LoadA, class LoadB,
          class Beside = NothingBeside>
__device__ __forceinline__ void warp_product(float (&acc)[kM][kN][4], LoadA const& load_a,
                                             LoadB const& load_b, [[maybe_unused]] bool allow_tf32,
                                             Beside const& beside = {}) {
  constexpr int kPiecesK = kK / kPieceK<kDType>;
  if constexpr (kDType == DType::kFp32) {
#pragma unroll
    for (int step = 0; step < kPiecesK * kN / 2; ++step) {
      beside(step);
    }
    warp_gemm_tf32<kPiecesK, kGroup>(acc, load_a, load_b, allow_tf32);
  } else {
    warp_gemm<kDType, kPiecesK>(acc, load_a, load_b, beside);
  }
}

}  // namespace flash
