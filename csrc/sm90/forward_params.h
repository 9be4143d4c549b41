// What one sm90 forward launch is given.
#pragma once

#include <cuda.h>

#include "device/tile_source.h"
#include "sm90/row_map.h"

namespace flash::sm90 {

/// The problem, the boxes that the copy engine fetches and stores, and who computes what.
struct ForwardKernelParams {
  ForwardParams problem;
  CUtensorMap q;     // boxes of 64 rows
  CUtensorMap k, v;  // boxes of tile_n rows
  CUtensorMap out;   // boxes of 16 rows
  RowMap q_rows, k_rows, v_rows, out_rows;
  bool are_entries;  // sequences are whole entries
  TileSource tiles;
  int* tile_counter;  // [2], zero between launches: tiles drawn, thread blocks done. Null: tiles
                      // are dealt out evenly instead of drawn

  FLASH_HD Sequence sequence(int batch) const { return find_sequence(problem, are_entries, batch); }
};

}  // namespace flash::sm90
