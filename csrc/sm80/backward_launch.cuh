// Host side of the sm80 backward: three launches, workspace layout, choice of the row's kernel.
#pragma once

#include "config/compiled_rows.h"
#include "device/launch.cuh"
#include "sm80/backward_kernel.cuh"
#include "sm80/backward_preprocess.cuh"
#include "sm80/unit.h"

namespace flash::sm80 {

/// Early key tiles see the most query tiles under a causal mask and come first; sections hold the
/// heads whose Q, dO and dq sums fill half of L2.
inline TileOrder backward_order(BackwardConfig const& config, BackwardParams const& params,
                                Device const& device) {
  Shape const& shape = params.shape;
  int const num_batch_heads = params.sequences.entries_k * shape.num_heads_k;
  bool const causal = params.mask.window_right >= 0;
  int64_t const bytes_per_row = (shape.head_dim + shape.head_dim_v) * element_size(config.dtype) +
                                shape.head_dim * int64_t(sizeof(float));
  int64_t const bytes_per_head = bytes_per_row * shape.query_heads_per_key_head() * shape.seqlen_q;
  return {ceil_div(shape.seqlen_k, config.tile_n), num_batch_heads,
          causal ? heads_per_section(bytes_per_head, device.l2_bytes / 2, num_batch_heads) : 1,
          false};
}

/// Packed keys: the tiles are listed first.
inline LaunchedTiles backward_tiles(BackwardConfig const& config, BackwardParams const& params,
                                    void* list_memory, Device const& device, Stream stream) {
  TileOrder const order = backward_order(config, params, device);
  if (params.sequences.cu_seqlens_k == nullptr) {
    if (params.sequences.cu_seqlens_q != nullptr) {
      clear_padding(packed_problem(params, config.dtype), stream);
    }
    return {{order, {}}, int64_t(order.num_blocks) * order.num_batch_heads};
  }
  Tiling const tiling{.of_keys = true,
                      .tile_rows = config.tile_n,
                      .other_tile_rows = config.tile_m,
                      .descending = false};
  return {{order, list_tiles(packed_problem(params, config.dtype), {tiling, list_memory}, stream)},
          max_key_tiles(config, params) * params.shape.num_heads_k};
}

template <BackwardConfig kConfig>
void launch_backward(BackwardParams const& params, Device const& device, Stream stream) {
  char* const row_stats = static_cast<char*>(params.workspace) + dq_sums_bytes(kConfig, params);
  char* const counters = row_stats + row_stats_bytes(params);
  char* const list = counters + num_counters(kConfig, params) * int64_t(sizeof(int));
  BackwardWorkspace const workspace{.dq = static_cast<float*>(params.workspace),
                                    .row_stats = reinterpret_cast<RowStats*>(row_stats),
                                    .counters = reinterpret_cast<int*>(counters),
                                    .head_dim = kConfig.head_dim,
                                    .tile_m = kConfig.tile_m,
                                    .num_heads = params.shape.num_heads,
                                    .rows = params.softmax_d_rows};
  int64_t const row_blocks = num_rows(params) / kRowsPerBlock;
  flash::launch<preprocess_kernel<kConfig.dtype>>(row_blocks, kSideThreads, 0, stream, params,
                                                  workspace, int(num_counters(kConfig, params)));
  LaunchedTiles const tiles = backward_tiles(kConfig, params, list, device, stream);
  flash::launch<backward_kernel<BackwardTraits<kConfig>>>(tiles.num_blocks, kConfig.num_threads(),
                                                          kConfig.smem_bytes(), stream, params,
                                                          tiles.source, workspace);
  flash::launch<convert_dq_kernel<kConfig.dtype>>(row_blocks, kSideThreads, 0, stream, params,
                                                  workspace);
}

template <int kHeadDim, int kElementBytes>
bool BackwardUnit<kHeadDim, kElementBytes>::launch(BackwardConfig const& config,
                                                   BackwardParams const& params,
                                                   Device const& device, Stream stream) {
  auto try_row = [&]<BackwardConfig kRow>() {
    if (!(config == kRow)) {
      return false;
    }
    launch_backward<kRow>(params, device, stream);
    return true;
  };
  if constexpr (kElementBytes == 4) {
    return any_compiled_row<kBackwardRows<DType::kFp32>, kHeadDim>(try_row);
  } else {
    return any_compiled_row<kBackwardRows<DType::kBf16>, kHeadDim>(try_row) ||
           any_compiled_row<kBackwardRows<DType::kFp16>, kHeadDim>(try_row);
  }
}

}  // namespace flash::sm80
