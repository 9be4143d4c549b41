// The fp32 sum of dq that the key tile tasks of a key head share, and the order in which they add.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "arith/tile_order.h"
#include "cpu/tiles.h"

namespace flash::cpu {

/// [batch, num_heads, seqlen_q rounded up to register blocks, head_dim rounded up to panels]
struct DqSum {
  float* data;
  int64_t plane_stride;
  int row_stride;
  int num_heads;

  [[gnu::always_inline]]
  Matrix rows(RowRange const& range) const {
    int64_t const plane = int64_t(range.batch) * num_heads + range.head;
    return {data + plane * plane_stride + int64_t(range.begin) * row_stride, row_stride};
  }
};

/// Key tile n adds to a query tile only after key tile n - 1 is done with it. That alone orders all
/// tiles, because the query tiles of a key tile are a range whose two ends grow with n. There is no
/// deadlock as long as the tasks of a head start in the order of n: the first unfinished one never
/// waits.
class DqTurns {
 public:
  DqTurns(int num_m_blocks, int num_n_blocks, int num_batch_heads);

  /// Until the predecessor of the tile's task has passed m_block of query head group_idx.
  void wait(Tile tile, int group_idx, int m_block);

  /// The tile's task is done with all before m_block of query head group_idx.
  void pass(Tile tile, int group_idx, int m_block);

 private:
  std::atomic<int64_t>& progress(Tile tile) {
    return progress_[int64_t(tile.batch_head) * num_n_blocks_ + tile.block];
  }

  int64_t num_m_blocks_;
  int64_t num_n_blocks_;
  std::unique_ptr<std::atomic<int64_t>[]> progress_;
};

}  // namespace flash::cpu
