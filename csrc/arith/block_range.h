// Which key tiles a query tile visits, which query tiles a key tile visits, and which of the visits
// need the element mask. All ranges are half-open; an empty range has max == min.
#pragma once

#include "arith/mask_rule.h"

namespace flash {

struct BlockRange {
  int min;
  int max;
};

/// Tile shape and problem size that the ranges below are functions of.
struct TileGrid {
  int tile_m;
  int tile_n;
  int seqlen_q;
  int seqlen_k;
  Mask mask;

  FLASH_HD constexpr int num_m_blocks() const { return ceil_div(seqlen_q, tile_m); }
  FLASH_HD constexpr int num_n_blocks() const { return ceil_div(seqlen_k, tile_n); }
};

/// Key tiles with at least one key that some row of query tile m_block attends to. Interior tiles
/// of the range may be fully masked only where seqlen_q x seqlen_k leaves rows without keys.
FLASH_HD constexpr BlockRange n_block_range(TileGrid const& grid, int m_block) {
  int const row_first = m_block * grid.tile_m;
  int const row_last = imin(row_first + grid.tile_m, grid.seqlen_q) - 1;
  // Both bounds grow with the row: the first row sets the begin, the last row the end.
  int const begin = visible_keys(grid.mask, row_first, grid.seqlen_q, grid.seqlen_k).begin;
  int const end = visible_keys(grid.mask, row_last, grid.seqlen_q, grid.seqlen_k).end;
  if (end <= begin) {
    return {0, 0};
  }
  return {begin / grid.tile_n, ceil_div(end, grid.tile_n)};
}

/// Key tiles of which every (row, key) pair inside the query tile is visible: no element mask
/// needed. A subrange of n_block_range.
FLASH_HD constexpr BlockRange full_n_block_range(TileGrid const& grid, int m_block) {
  int const row_first = m_block * grid.tile_m;
  int const row_last = imin(row_first + grid.tile_m, grid.seqlen_q) - 1;
  int const begin = visible_keys(grid.mask, row_last, grid.seqlen_q, grid.seqlen_k).begin;
  int const end = visible_keys(grid.mask, row_first, grid.seqlen_q, grid.seqlen_k).end;
  int const min = ceil_div(begin, grid.tile_n);
  int const max = end / grid.tile_n;
  return max <= min ? BlockRange{min, min} : BlockRange{min, max};
}

/// The mask seen from the keys: query rows i that attend to key j are
/// [j - offset - right, j - offset + left], offset = seqlen_k - seqlen_q.
FLASH_HD constexpr Mask transposed(Mask mask) {
  return {mask.window_right, mask.window_left};
}

/// Query tiles with at least one row that attends to some key of key tile n_block.
FLASH_HD constexpr BlockRange m_block_range(TileGrid const& grid, int n_block) {
  return n_block_range(
      {grid.tile_n, grid.tile_m, grid.seqlen_k, grid.seqlen_q, transposed(grid.mask)}, n_block);
}

/// Query tiles of which every (row, key) pair inside the key tile is visible.
FLASH_HD constexpr BlockRange full_m_block_range(TileGrid const& grid, int n_block) {
  return full_n_block_range(
      {grid.tile_n, grid.tile_m, grid.seqlen_k, grid.seqlen_q, transposed(grid.mask)}, n_block);
}

}  // namespace flash
