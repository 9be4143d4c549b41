// What one sm90 forward launch is given.
#pragma once

#include <cuda.h>

#include "device/tile_source.h"
#include "sm90/row_map.h"

namespace flash::sm90 {

/// A softcap's exponents by a polynomial of the products s = q k^T: sum_i term[i] s^(2i + 1) is
/// log2(e) softcap tanh(softmax_scale s / softcap), to 1.7e-7 of the first two factors, where
/// s^2 < square_limit.
struct CapPolynomial {
  static constexpr int kTerms = 3;
  float term[kTerms];
  float square_limit;
};

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
  CapPolynomial cap;  // zeros without a softcap

  FLASH_HD Sequence sequence(int batch) const { return find_sequence(problem, are_entries, batch); }
};

}  // namespace flash::sm90
