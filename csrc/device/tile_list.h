// Tiles of packed sequences, whose lengths only the device knows: a list of them, made on the
// device.
#pragma once

#include <cstddef>

#include "params.h"

namespace flash {

/// Tile `block` of the rows of sequence `batch`.
struct ListedTile {
  int block;
  int batch;
};

/// In device memory. The tiles of a sequence follow each other, the longest sequences come first;
/// the last ones may be in the order of their own work.
struct TileList {
  int const* num_tiles = nullptr;  // null: there is no list, tiles are those of a TileOrder
  ListedTile const* tiles = nullptr;
};

/// Which rows tiles are cut from, and in which order those of a sequence are listed.
struct Tiling {
  bool of_keys;
  int tile_rows;
  int other_tile_rows;  // of the tiles that such a tile is paired with: its work is their number
  bool descending;      // the last tile of a sequence first
  int num_by_work = 0;  // so many at the end of the list, of at most 512, the longest first
};

/// With a right bound alone the tiles of a sequence are anything from long to next to nothing.
/// Where they follow each other a long one may come last, and all SMs wait for one; so at the end
/// of a list tiles come in the order of their own work.
inline bool has_uneven_tiles(Mask const& mask) {
  return mask.window_right >= 0 && mask.window_left < 0;
}

/// Rows of a packed tensor that belong to no sequence get zeros.
struct PaddedTensor {
  Strided tensor;
  int num_heads;
  int num_cols;
  bool of_keys;
};

/// What list_tiles() is given besides the tiling.
struct PackedProblem {
  DType dtype;  // of the padded tensors
  Shape shape;
  Sequences sequences;
  Mask mask;
  PaddedTensor padded[3];
  int num_padded;
  float* softmax_lse;  // rows without a sequence get +inf; null: left as it is
};

/// At most this many tiles of packed rows, whatever the lengths.
FLASH_HD constexpr int64_t max_tiles(int rows, int batch_size, int tile_rows) {
  return ceil_div(rows, tile_rows) + int64_t(batch_size);
}

/// Bytes of the memory that a list of so many tiles takes.
inline std::size_t tile_list_bytes(int64_t num_tiles) {
  return std::size_t(num_tiles + 1) * sizeof(ListedTile);
}

inline PackedProblem packed_problem(ForwardParams const& params, DType dtype) {
  Shape const& shape = params.shape;
  return {.dtype = dtype,
          .shape = shape,
          .sequences = params.sequences,
          .mask = params.mask,
          .padded = {{params.out, shape.num_heads, shape.head_dim_v, false}},
          .num_padded = 1,
          .softmax_lse = params.softmax_lse};
}
inline PackedProblem packed_problem(BackwardParams const& params, DType dtype) {
  Shape const& shape = params.shape;
  return {.dtype = dtype,
          .shape = shape,
          .sequences = params.sequences,
          .mask = params.mask,
          .padded = {{params.dq, shape.num_heads, shape.head_dim, false},
                     {params.dk, shape.num_heads_k, shape.head_dim, true},
                     {params.dv, shape.num_heads_k, shape.head_dim_v, true}},
          .num_padded = 3,
          .softmax_lse = nullptr};
}

/// A list to write to `memory`, which is tile_list_bytes() large.
struct ListRequest {
  Tiling tiling;
  void* memory;

  TileList list() const {
    return {static_cast<int const*>(memory), static_cast<ListedTile const*>(memory) + 1};
  }
};

/// Launches one kernel that writes one list or two, and clears rows without a sequence; `early`, on
/// Hopper, as launch_early().
TileList list_tiles(PackedProblem const& problem, ListRequest const& request, void* stream,
                    bool early = false);
void list_tiles(PackedProblem const& problem, ListRequest const& first, ListRequest const& second,
                void* stream, bool early = false);
/// Clears them alone.
void clear_padding(PackedProblem const& problem, void* stream);

}  // namespace flash
