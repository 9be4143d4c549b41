// Host side of the sm80 forward: grid, tile order, choice of the row's kernel.
#pragma once

#include "config/compiled_rows.h"
#include "device/launch.cuh"
#include "sm80/forward_kernel.cuh"
#include "sm80/unit.h"

namespace flash::sm80 {

/// Under a causal mask the longest tiles go first, in sections of heads whose K and V fill half of
/// L2; otherwise all tiles are equal and one head's tiles run side by side.
inline TileOrder forward_order(ForwardConfig const& config, ForwardParams const& params,
                               Device const& device) {
  Shape const& shape = params.shape;
  int const num_batch_heads = shape.batch_size * shape.num_heads;
  bool const causal = params.mask.window_right >= 0;
  int64_t const bytes_per_head = shape.kv_bytes_per_query_head(config.dtype);
  return {ceil_div(shape.seqlen_q, config.tile_m), num_batch_heads,
          causal ? heads_per_section(bytes_per_head, device.l2_bytes / 2, num_batch_heads) : 1,
          causal};
}

/// Packed queries: the tiles are listed first, by a kernel that also clears what it won't write.
inline LaunchedTiles forward_tiles(ForwardConfig const& config, ForwardParams const& params,
                                   Device const& device, Stream stream) {
  Shape const& shape = params.shape;
  if (params.sequences.cu_seqlens_q == nullptr) {
    TileOrder const order = forward_order(config, params, device);
    return {{order, {}}, int64_t(order.num_blocks) * order.num_batch_heads};
  }
  PackedProblem const packed{.shape = shape,
                             .sequences = params.sequences,
                             .mask = params.mask,
                             .padded = {{params.out, shape.num_heads, shape.head_dim_v, false}},
                             .num_padded = 1,
                             .softmax_lse = params.softmax_lse};
  Tiling const tiling{.of_keys = false,
                      .tile_rows = config.tile_m,
                      .other_tile_rows = config.tile_n,
                      .descending = params.mask.window_right >= 0};
  TileList const list = list_tiles(packed, tiling, params.workspace, stream);
  return {{{}, list}, max_tiles(shape.seqlen_q, shape.batch_size, config.tile_m) * shape.num_heads};
}

template <int kHeadDim>
bool ForwardUnit<kHeadDim>::launch(ForwardConfig const& config, ForwardParams const& params,
                                   Device const& device, Stream stream) {
  auto try_row = [&]<ForwardConfig kRow>() {
    if (!(config == kRow)) {
      return false;
    }
    LaunchedTiles const tiles = forward_tiles(config, params, device, stream);
    flash::launch<forward_kernel<ForwardTraits<kRow>>>(
        tiles.num_blocks, kRow.num_threads(), kRow.smem_bytes(), stream, params, tiles.source);
    return true;
  };
  return any_compiled_row<kForwardRows<DType::kBf16>, kHeadDim>(try_row) ||
         any_compiled_row<kForwardRows<DType::kFp16>, kHeadDim>(try_row);
}

}  // namespace flash::sm80
