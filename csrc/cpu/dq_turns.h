// The fp32 sum of dq that the key tile tasks of a key head share, and the order in which they add.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "arith/tile_order.h"
#include "cpu/tiles.h"

namespace flash::cpu {

/// [entries, num_heads, rows, head_dim rounded up to panels]: every sequence has whole register
/// blocks of rows.
struct DqSum {
  float* data;
  int64_t plane_stride;
  int row_stride;

  DqSum(Shape const& shape, Sequences const& sequences)
      : data(nullptr), row_stride(round_up(shape.head_dim, kPanelCols)) {
    int const room = sequences.cu_seqlens_q == nullptr ? 0 : kMicroRows * shape.batch_size;
    plane_stride = int64_t(round_up(shape.seqlen_q + room, kMicroRows)) * row_stride;
  }

  [[gnu::always_inline]]
  Matrix plane(int64_t idx) const {
    return {data + idx * plane_stride, row_stride};
  }

  /// The row where a sequence begins.
  [[gnu::always_inline]]
  int first_row(Sequence const& sequence, Sequences const& sequences, int batch) const {
    return sequences.cu_seqlens_q == nullptr
               ? 0
               : (sequence.first_q + kMicroRows * batch) / kMicroRows * kMicroRows;
  }
};

/// Key tile n adds to a query tile only after key tile n - 1 is done with it. That alone orders all
/// tiles, because the query tiles of a key tile are a range whose two ends grow with n. There is no
/// deadlock as long as the tasks of a head start in the order of n: the first unfinished one never
/// waits.
class DqTurns {
 public:
  DqTurns(Shape const& shape, Sequences const& sequences);

  /// Until the predecessor of the tile's task has passed m_block of query head group_idx.
  void wait(Tile tile, int group_idx, int m_block);

  /// The tile's task is done with all before m_block of query head group_idx.
  void pass(Tile tile, int group_idx, int m_block);

 private:
  std::atomic<int64_t>& progress(Tile tile) {
    return progress_[first_tiles_[tile.batch_head] + tile.block];
  }

  std::vector<int64_t> first_tiles_;  // [batch * num_heads_k], of all key tiles
  std::unique_ptr<std::atomic<int64_t>[]> progress_;
};

}  // namespace flash::cpu
