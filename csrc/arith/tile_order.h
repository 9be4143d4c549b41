// The order in which thread blocks take the tiles of a problem.
#pragma once

#include <climits>

#include "arith/integer.h"

namespace flash {

struct Tile {
  int block;       // tile along the sequence: m_block in the forward, n_block in the backward
  int batch_head;  // batch * num_heads + head
};

/// A permutation of num_blocks x num_batch_heads tiles. Batch-heads are cut into sections small
/// enough for their shared operand (K, V or Q, dO) to stay in L2; inside a section the block is the
/// slow index, so that with `descending` (causal: later query tiles see more keys) the longest work
/// of a section starts first. heads_per_section == 1 walks the blocks of one head before the next
/// head. Heads from first_in_last_section on (a multiple of heads_per_section) are one section,
/// whatever its size: a long row of short tiles at the end keeps every SM busy.
struct TileOrder {
  int num_blocks;
  int num_batch_heads;
  int heads_per_section;
  bool descending;
  int first_in_last_section = INT_MAX;

  FLASH_HD constexpr int num_tiles() const { return num_blocks * num_batch_heads; }

  FLASH_HD constexpr Tile tile(int tile_idx) const {
    int const section = tile_idx / (num_blocks * heads_per_section);
    bool const is_regular = section * heads_per_section < first_in_last_section;
    int const first_head = is_regular ? section * heads_per_section : first_in_last_section;
    int const end_head =
        is_regular ? imin(first_head + heads_per_section, num_batch_heads) : num_batch_heads;
    int const heads = end_head - first_head;
    int const idx = tile_idx - first_head * num_blocks;
    int const block = idx / heads;
    return {descending ? num_blocks - 1 - block : block, first_head + idx % heads};
  }
};

/// How many heads a section holds: as many as fit `budget_bytes` of L2, at least one.
FLASH_HD constexpr int heads_per_section(int64_t bytes_per_head, int64_t budget_bytes,
                                         int num_batch_heads) {
  int64_t const fit = bytes_per_head > 0 ? budget_bytes / bytes_per_head : num_batch_heads;
  return fit < 1 ? 1 : fit > num_batch_heads ? num_batch_heads : int(fit);
}

/// TileOrder::first_in_last_section for a last section of at least `heads` heads, or all there are.
FLASH_HD constexpr int first_in_last_section(int heads, int heads_per_section,
                                             int num_batch_heads) {
  return imax(num_batch_heads - heads, 0) / heads_per_section * heads_per_section;
}

}  // namespace flash
