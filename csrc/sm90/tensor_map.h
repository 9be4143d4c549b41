// Descriptions of tensors for Hopper's copy engine (TMA).
#pragma once

#include <cuda.h>

#include "params.h"
#include "sm90/row_map.h"

namespace flash::sm90 {

/// An (entries, seqlen, heads, head_dim) tensor for the copy engine.
struct TensorView {
  Strided tensor;
  DType dtype;
  bool whole_entries;  // false: sequences are parts of entries
  int entries, seqlen, num_heads, head_dim;

  /// Of a tensor that is addressable.
  RowMap row_map() const;
};

/// False where a base or stride is no multiple of 16 bytes, a stride is zero or too long, or the
/// tensor is empty; and where sequences are parts of entries and these don't begin whole rows
/// apart.
bool is_addressable(TensorView const& view);

/// Makes a context of the device current in this thread, which make_tensor_map() asks for.
void make_context_current(int device_index);

/// Boxes of `rows` rows of one head, and of the columns of a column block of the kernel's tile
/// (SmemTile) of kernel_cols columns, by whose length rows are swizzled. What lies outside of the
/// tensor is read as zero. What L2 lacks it fetches in pieces of l2_promotion. Throws if the driver
/// refuses.
CUtensorMap make_tensor_map(
    TensorView const& view, int rows, int kernel_cols,
    CUtensorMapL2promotion l2_promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B);

}  // namespace flash::sm90
