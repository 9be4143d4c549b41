// Descriptions of tensors for Hopper's copy engine (TMA).
#pragma once

#include <cuda.h>

#include "params.h"

namespace flash::sm90 {

/// What of a (batch, seqlen, heads, head_dim) tensor the copy engine can address.
struct TensorView {
  Strided tensor;
  DType dtype;
  int batch_size, seqlen, num_heads, head_dim;
};

/// False where a base or stride is no multiple of 16 bytes, a stride is zero or too long, or the
/// tensor is empty.
bool is_addressable(TensorView const& view);

/// Makes a context of the device current in this thread, which make_tensor_map() asks for.
void make_context_current(int device_index);

/// Boxes of `rows` rows of one head, and of the columns of a column block of the kernel's tile
/// (SmemTile) of kernel_cols columns, by whose length rows are swizzled. What lies outside of the
/// tensor is read as zero. Throws if the driver refuses.
CUtensorMap make_tensor_map(TensorView const& view, int rows, int kernel_cols);

}  // namespace flash::sm90
