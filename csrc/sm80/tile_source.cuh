// Which tile a thread block has.
#pragma once

#include "arith/tile_order.h"
#include "device/tile_list.h"

namespace flash::sm80 {

/// Tiles of a TileOrder, or listed ones, whose heads follow each other.
struct TileSource {
  TileOrder order;
  TileList list;

  /// Tile number idx; block -1 if there are fewer.
  __device__ __forceinline__ Tile tile(int idx, int num_heads) const {
    if (list.num_tiles == nullptr) {
      return order.tile(idx);
    }
    int const number = idx / num_heads;
    if (number >= *list.num_tiles) {
      return {-1, 0};
    }
    ListedTile const listed = list.tiles[number];
    return {listed.block, listed.batch * num_heads + idx % num_heads};
  }
};

/// For how many thread blocks.
struct LaunchedTiles {
  TileSource source;
  int64_t num_blocks;
};

}  // namespace flash::sm80
