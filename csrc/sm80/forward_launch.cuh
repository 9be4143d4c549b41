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
  int const num_batch_heads = params.sequences.entries_q * shape.num_heads;
  bool const causal = params.mask.window_right >= 0;
  int64_t const bytes_per_head = shape.kv_bytes_per_query_head(config.dtype);
  return {ceil_div(shape.seqlen_q, config.tile_m), num_batch_heads,
          causal ? heads_per_section(bytes_per_head, device.l2_bytes / 2, num_batch_heads) : 1,
          causal};
}

/// Packed queries: the tiles are listed first.
inline LaunchedTiles forward_tiles(ForwardConfig const& config, ForwardParams const& params,
                                   Device const& device, Stream stream) {
  Shape const& shape = params.shape;
  TileOrder order = forward_order(config, params, device);
  if (params.sequences.cu_seqlens_q == nullptr) {
    return {{order, {}}, int64_t(order.num_blocks) * order.num_batch_heads};
  }
  Tiling const tiling{.of_keys = false,
                      .tile_rows = config.tile_m,
                      .other_tile_rows = config.tile_n,
                      .descending = order.descending};
  order.descending = false;  // the list is in order
  return {
      {order, list_tiles(packed_problem(params, config.dtype), {tiling, params.workspace}, stream)},
      max_tiles(shape.seqlen_q, shape.batch_size, config.tile_m) * shape.num_heads};
}

template <int kHeadDim, int kElementBytes>
bool ForwardUnit<kHeadDim, kElementBytes>::launch(ForwardConfig const& config,
                                                  ForwardParams const& params, Device const& device,
                                                  Stream stream) {
  auto try_row = [&]<ForwardConfig kRow>() {
    if (!(config == kRow)) {
      return false;
    }
    LaunchedTiles const tiles = forward_tiles(config, params, device, stream);
    flash::launch<forward_kernel<ForwardTraits<kRow>>>(
        tiles.num_blocks, kRow.num_threads(), kRow.smem_bytes(), stream, params, tiles.source);
    return true;
  };
  if constexpr (kElementBytes == 4) {
    return any_compiled_row<kForwardRows<DType::kFp32>, kHeadDim>(try_row);
  } else {
    return any_compiled_row<kForwardRows<DType::kBf16>, kHeadDim>(try_row) ||
           any_compiled_row<kForwardRows<DType::kFp16>, kHeadDim>(try_row);
  }
}

}  // namespace flash::sm80
