// Which tile a thread block has.
#pragma once

#include "arith/tile_order.h"
#include "device/tile_list.h"

namespace flash {

/// The tiles of a TileOrder, or listed ones: there the order is that of their numbers in the list
/// (num_blocks is the length of the list, which only the device knows) and of the heads.
struct TileSource {
  TileOrder order;
  TileList list;

  FLASH_HD int num_tiles() const {
    return list.num_tiles == nullptr ? order.num_tiles() : *list.num_tiles * order.num_batch_heads;
  }
  /// Tile number idx; block -1 if there are fewer.
  FLASH_HD Tile tile(int idx) const {
    if (idx >= num_tiles()) {
      return {-1, 0};
    }
    if (list.num_tiles == nullptr) {
      return order.tile(idx);
    }
    TileOrder numbers = order;
    numbers.num_blocks = *list.num_tiles;
    Tile const number = numbers.tile(idx);
    ListedTile const listed = list.tiles[number.block];
    return {listed.block, listed.batch * order.num_batch_heads + number.batch_head};
  }
};

/// For how many thread blocks.
struct LaunchedTiles {
  TileSource source;
  int64_t num_blocks;
};

}  // namespace flash
