// From the gradients of pairs of a query and a key to that of the bias that they share.
#pragma once

#include <atomic>

#include "cpu/score_options.h"

namespace flash::cpu {

/// Part of a head's score matrix.
struct PairBlock {
  int row_begin, rows;
  int key_begin, keys;
};

/// An element that one pair has belongs to one task. Others are added to by several: each takes the
/// sum of its pairs there, in whatever order the threads come.
template <class Isa>
void add_bias_gradient(Matrix of_pairs, PairBlock const& block, HeadOptions const& options) {
  Bias const& dbias = *options.dbias;
  float* const plane = static_cast<float*>(dbias.ptr) + dbias.plane(options.batch, options.head);
  int const rows_each = dbias.row_stride == 0 ? block.rows : 1;
  int const keys_each = dbias.col_stride == 0 ? block.keys : 1;
  for (int row = 0; row < block.rows; row += rows_each) {
    for (int key = 0; key < block.keys; key += keys_each) {
      float sum = 0.0f;
      for (int r = row; r < row + rows_each; ++r) {
        for (int k = key; k < key + keys_each; ++k) {
          sum += *of_pairs.at(r, k).data;
        }
      }
      float& element = plane[(block.row_begin + row) * dbias.row_stride +
                             (block.key_begin + key) * dbias.col_stride];
      if (dbias.is_shared) {
        std::atomic_ref(element).fetch_add(sum, std::memory_order_relaxed);
      } else {
        element = sum;
      }
    }
  }
}

}  // namespace flash::cpu
