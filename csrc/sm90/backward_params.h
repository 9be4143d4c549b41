// What one sm90 backward launch is given.
#pragma once

#include <cuda.h>

#include "arith/block_range.h"
#include "config/sm90_backward_config.h"
#include "device/tile_source.h"
#include "sm90/row_map.h"

namespace flash::sm90 {

/// How the problem is cut. A key head is one of entries * num_heads_k; its query tiles are those of
/// all the query heads that read it, head after head, and with packed queries in a head those of
/// one sequence after the other. An item is one key tile of a key head.
struct BackwardDivision {
  int m_blocks;     // query tiles of a query head
  int query_tiles;  // of a key head
  int key_heads;
  int slots;         // fp32 sums exist for this many key heads at a time: key head i uses i % slots
  TileSource items;  // key tiles
  TileSource tiles;  // query tiles, in the order in which they are converted: of key heads, or if
                     // they are listed, of query heads
  int step;  // 1: a key head's items are drawn from the last key tile to the first, and each
             // walks its query tiles from the first to the last; -1: both the other way

  /// Items of the key head of item n_block that see the same query tile, whose key tiles are
  /// `key_tiles`, and are drawn before it.
  FLASH_HD constexpr int num_earlier(BlockRange key_tiles, int n_block) const {
    return step > 0 ? key_tiles.max - 1 - n_block : n_block - key_tiles.min;
  }
  FLASH_HD constexpr int64_t num_tiles() const { return int64_t(key_heads) * query_tiles; }
};

/// BackwardParams::workspace. The preprocess kernel writes or clears all of it.
struct BackwardWorkspace {
  float* dq_sums;    // [slots, query_tiles, tile_m * head_dim of the kernel], in fragment order
  float* lse_log2;   // [entries, heads, softmax_d_rows], softmax_lse * log2(e)
  int* next;         // [2]: items and conversions drawn
  int* contributed;  // [key_heads, query_tiles]: key tiles whose share is in the sums
  int* converted;    // [key_heads, query_tiles]: groups of the tile written to dq

  static constexpr int64_t lse_bytes(BackwardParams const& problem) {
    return int64_t(problem.sequences.entries_q) * problem.shape.num_heads * problem.softmax_d_rows *
           int64_t(sizeof(float));
  }
  static constexpr int64_t sums_bytes(Sm90BackwardConfig const& config,
                                      BackwardDivision const& division) {
    return int64_t(division.slots) * division.query_tiles * config.tile_m * config.head_dim *
           int64_t(sizeof(float));
  }
  static constexpr int64_t num_counters(BackwardDivision const& division) {
    return 2 + 2 * division.num_tiles();
  }
};

/// The problem, the boxes that the copy engine fetches and stores, and who computes what.
struct BackwardKernelParams {
  BackwardParams problem;
  CUtensorMap q, dout;  // boxes of what a thread block loads of tile_m rows
  CUtensorMap k, v;     // boxes of the rows of a thread block's keys
  CUtensorMap dk, dv;   // boxes of 64 rows, those of a warpgroup; of a pair 16, those of a warp
  RowMap rows;          // of all of them: either all are packed, which is one entry, or none
  BackwardDivision division;
  BackwardWorkspace workspace;

  FLASH_HD Sequence sequence(int batch) const {
    return find_sequence(problem, rows.entry_rows == 0, batch);
  }
};

}  // namespace flash::sm90
