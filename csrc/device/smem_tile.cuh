// A (rows, columns) tile in shared memory, swizzled so that the eight 16-byte rows of an ldmatrix
// and the eight lanes of a 128-byte copy fall into different banks.
#pragma once

#include "device/fresh.cuh"

namespace flash {

/// The tile is cut into column blocks of 128 (or 64) bytes; a block stores its rows one after
/// another. Inside a row the 16-byte chunk c lies at place c ^ swizzle(row).
template <int kRows_, int kCols_, int kElementBytes_ = 2>
struct SmemTile {
  static constexpr int kRows = kRows_, kCols = kCols_, kElementBytes = kElementBytes_;
  static constexpr int kChunkCols = 16 / kElementBytes;
  static constexpr int kRowBytes = kCols * kElementBytes % 128 == 0 ? 128 : 64;
  static constexpr int kBlockCols = kRowBytes / kElementBytes;
  static constexpr int kBlockBytes = kRows * kRowBytes;
  static constexpr int kBytes = kRows * kCols * kElementBytes;
  static_assert(kCols % kBlockCols == 0 && kRows % 16 == 0, "tiles are made of whole blocks");

  /// 64-byte rows share a 128-byte line in pairs, so their swizzle advances every second row.
  static __device__ __forceinline__ int swizzle(int row) {
    return kRowBytes == 128 ? row & 7 : (row >> 1) & 3;
  }

  /// Byte offset of an element.
  static __device__ __forceinline__ uint32_t offset(int row, int col) {
    int const block = col / kBlockCols;
    int const chunk = col % kBlockCols / kChunkCols;
    return block * kBlockBytes + row * kRowBytes + ((chunk ^ swizzle(row)) << 4) +
           col % kChunkCols * kElementBytes;
  }

  /// Address `row` rows down and `col` columns right, both multiples of 8, of the chunk at
  /// row_address + chunk_offset. The columns must not carry into the chunk's own.
  static __device__ __forceinline__ uint32_t moved(uint32_t row_address, uint32_t chunk_offset,
                                                   int row, int col) {
    int const block = col / kBlockCols;
    int const chunk = col % kBlockCols / kChunkCols;
    return row_address + block * kBlockBytes + row * kRowBytes + (chunk_offset ^ (chunk << 4));
  }
};

/// Stores four 8 x 8 matrices of fragments; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                            uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

/// What a piece of a tile is to a product: A is (M, K), B is (K, N).
enum class Operand {
  kA,            // tile rows are M, tile columns K
  kATransposed,  // tile rows are K, tile columns M
  kB,            // tile rows are K, tile columns N
  kBTransposed,  // tile rows are N, tile columns K
};

/// One lane's ldmatrix addresses into a tile, of pieces of 16 rows x 32 bytes. The lane that points
/// at a row of an 8 x 8 matrix is chosen so that the four result registers come in mma's operand
/// order; moving them costs an instruction each. Warps that share a dimension take its 16 x 16
/// pieces in turn (warp w of W: pieces w, w + W, ...), so a piece's column is a lane constant plus
/// a multiple of 16 * W and never carries into it.
template <class Tile, Operand kOperand>
struct PieceReader {
  uint32_t row_address;
  uint32_t chunk_offset;

  __device__ __forceinline__ PieceReader(uint32_t tile_address, int first_row, int first_col,
                                         int thread_idx) {
    constexpr bool kTransposed =
        kOperand == Operand::kATransposed || kOperand == Operand::kBTransposed;
    int const lane_idx = thread_idx % 32;
    int const upper = lane_idx / 16, odd = lane_idx / 8 % 2;
    int const row = first_row + lane_idx % 8 + 8 * (kTransposed ? upper : odd);
    int const chunk = first_col % Tile::kBlockCols / Tile::kChunkCols + (kTransposed ? odd : upper);
    row_address =
        tile_address + first_col / Tile::kBlockCols * Tile::kBlockBytes + row * Tile::kRowBytes;
    chunk_offset = (chunk ^ Tile::swizzle(row)) << 4;
  }

  /// Address of the piece `row` rows down (a multiple of 16) and `col` columns right.
  __device__ __forceinline__ uint32_t at(int row, int col) const {
    return Tile::moved(row_address, chunk_offset, row, col);
  }
};

/// One lane's addresses of the accumulator fragments (16 rows x 8 columns, mma.cuh) that its warp
/// writes to a tile. Warps share a dimension as for PieceReader.
template <class Tile>
struct FragmentWriter {
  uint32_t row_address;
  uint32_t chunk_offset;

  __device__ __forceinline__ FragmentWriter(uint32_t tile_address, int first_row, int first_col,
                                            int thread_idx) {
    int const row = first_row + thread_idx % 32 / 4, lane_col = thread_idx % 4 * 2;
    int const chunk = first_col % Tile::kBlockCols / Tile::kChunkCols + lane_col / Tile::kChunkCols;
    row_address = tile_address + first_col / Tile::kBlockCols * Tile::kBlockBytes +
                  row * Tile::kRowBytes + lane_col % Tile::kChunkCols * Tile::kElementBytes;
    chunk_offset = (chunk ^ Tile::swizzle(row)) << 4;
  }

  /// Address of the lane's two elements `row` rows down and `col` columns right, multiples of 8.
  __device__ __forceinline__ uint32_t at(int row, int col) const {
    return Tile::moved(row_address, chunk_offset, row, col);
  }
};

}  // namespace flash
