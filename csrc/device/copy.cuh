// Copies between global memory and swizzled shared-memory tiles, 16 bytes a lane.
#pragma once

#include "device/shared_memory.cuh"
#include "device/smem_tile.cuh"

namespace flash {

/// Starts an asynchronous 16-byte copy to shared memory; writes zeros where !valid.
__device__ __forceinline__ void cp_async_16(uint32_t smem_address, void const* global, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem_address),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

/// Arrives at an mbarrier, for which this thread counts, once all its copies so far are done.
__device__ __forceinline__ void cp_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}

/// The rows of one head of a sequence in a strided tensor.
struct GlobalRows {
  char* ptr;          // row 0, column 0
  int64_t row_bytes;  // bytes from row to row
  int num_rows;       // rows past these are not touched
  int num_cols;       // columns past these are not touched; a multiple of 8

  __device__ __forceinline__ GlobalRows(Strided const& tensor, int entry, int head, int first_row,
                                        int num_rows, int num_cols, int element_bytes)
      : ptr(static_cast<char*>(tensor.ptr) +
            (tensor.offset(entry, head) + first_row * tensor.row_stride) * element_bytes),
        row_bytes(tensor.row_stride * element_bytes),
        num_rows(num_rows),
        num_cols(num_cols) {}
};

/// How kThreads threads walk a tile: groups of eight (four) lanes share a row of a column block.
template <class Tile, int kThreads>
struct TileCopy {
  static constexpr int kChunksPerRow = Tile::kBlockCols / Tile::kChunkCols;
  static constexpr int kRowsPerPass = kThreads / kChunksPerRow;
  static constexpr int kBlocks = Tile::kCols / Tile::kBlockCols;
  static constexpr int kPasses = ceil_div(Tile::kRows, kRowsPerPass);

  /// Starts copying tile rows [first_row, first_row + kRows) of `source`; zeros outside of it.
  static __device__ __forceinline__ void load(uint32_t tile_address, GlobalRows const& source,
                                              int first_row, int thread_idx) {
    int const row = thread_idx / kChunksPerRow;
    int const col = thread_idx % kChunksPerRow * Tile::kChunkCols;
    static_assert(Tile::kRows % kRowsPerPass == 0 || kPasses == 1,
                  "whole passes, or a part of one");
    if (kRowsPerPass > Tile::kRows && row >= Tile::kRows) {
      return;
    }
    char const* global =
        source.ptr + int64_t(first_row + row) * source.row_bytes + col * Tile::kElementBytes;
    int64_t const pass_bytes = kRowsPerPass * source.row_bytes;
    int const rows_left = source.num_rows - first_row - row;
    uint32_t const address = tile_address + Tile::offset(row, col);
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        bool const valid =
            pass * kRowsPerPass < rows_left && col + block * Tile::kBlockCols < source.num_cols;
        cp_async_16(address + block * Tile::kBlockBytes + pass * kRowsPerPass * Tile::kRowBytes,
                    global + block * Tile::kRowBytes, valid);
      }
      global += pass_bytes;
    }
  }

  /// Stores tile rows [tile_row, tile_row + kRows) to the same rows of `target` from first_row on,
  /// cut to its extent.
  template <int kRows = Tile::kRows>
  static __device__ __forceinline__ void store(uint32_t tile_address, int tile_row,
                                               GlobalRows const& target, int first_row,
                                               int thread_idx) {
    int const col = thread_idx % kChunksPerRow * Tile::kChunkCols;
#pragma unroll
    for (int first = 0; first < kRows; first += kRowsPerPass) {
      int const row = tile_row + first + thread_idx / kChunksPerRow;
      if (row >= tile_row + kRows || first_row + row >= target.num_rows) {
        continue;
      }
      char* global =
          target.ptr + int64_t(first_row + row) * target.row_bytes + col * Tile::kElementBytes;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        if (col + block * Tile::kBlockCols < target.num_cols) {
          *reinterpret_cast<uint4*>(global + block * Tile::kRowBytes) =
              load_shared_16(tile_address + Tile::offset(row, col + block * Tile::kBlockCols));
        }
      }
    }
  }
};

}  // namespace flash
