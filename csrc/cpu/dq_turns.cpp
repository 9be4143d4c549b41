#include "cpu/dq_turns.h"

namespace flash::cpu {

DqTurns::DqTurns(int num_m_blocks, int num_n_blocks, int num_batch_heads)
    : num_m_blocks_(num_m_blocks),
      num_n_blocks_(num_n_blocks),
      progress_(std::make_unique<std::atomic<int64_t>[]>(int64_t(num_n_blocks) * num_batch_heads)) {
}

void DqTurns::wait(Tile tile, int group_idx, int m_block) {
  if (tile.block == 0) {
    return;
  }
  std::atomic<int64_t>& predecessor = progress({tile.block - 1, tile.batch_head});
  int64_t const needed = group_idx * num_m_blocks_ + m_block + 1;
  int64_t seen = predecessor.load(std::memory_order_acquire);
  while (seen < needed) {
    predecessor.wait(seen, std::memory_order_acquire);
    seen = predecessor.load(std::memory_order_acquire);
  }
}

void DqTurns::pass(Tile tile, int group_idx, int m_block) {
  std::atomic<int64_t>& own = progress(tile);
  own.store(group_idx * num_m_blocks_ + m_block, std::memory_order_release);
  own.notify_all();
}

}  // namespace flash::cpu
