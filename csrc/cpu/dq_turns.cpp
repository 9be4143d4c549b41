#include "cpu/dq_turns.h"

namespace flash::cpu {
namespace {

/// How far a task is, as a number that grows with every step.
constexpr int64_t step(int group_idx, int m_block) {
  return int64_t(group_idx) << 32 | m_block;
}

}  // namespace

DqTurns::DqTurns(Shape const& shape, Sequences const& sequences) {
  first_tiles_.reserve(int64_t(shape.batch_size) * shape.num_heads_k);
  int64_t tiles = 0;
  for (int batch = 0; batch < shape.batch_size; ++batch) {
    int const seqlen_k = sequence_of(sequences, batch, shape.seqlen_q, shape.seqlen_k).seqlen_k;
    for (int head_k = 0; head_k < shape.num_heads_k; ++head_k) {
      first_tiles_.push_back(tiles);
      tiles += ceil_div(seqlen_k, kTileN);
    }
  }
  progress_ = std::make_unique<std::atomic<int64_t>[]>(tiles);
}

void DqTurns::wait(Tile tile, int group_idx, int m_block) {
  if (tile.block == 0) {
    return;
  }
  std::atomic<int64_t>& predecessor = progress({tile.block - 1, tile.batch_head});
  int64_t const needed = step(group_idx, m_block + 1);
  int64_t seen = predecessor.load(std::memory_order_acquire);
  while (seen < needed) {
    predecessor.wait(seen, std::memory_order_acquire);
    seen = predecessor.load(std::memory_order_acquire);
  }
}

void DqTurns::pass(Tile tile, int group_idx, int m_block) {
  std::atomic<int64_t>& own = progress(tile);
  own.store(step(group_idx, m_block), std::memory_order_release);
  own.notify_all();
}

}  // namespace flash::cpu
