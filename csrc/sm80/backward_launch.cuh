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
  int const num_batch_heads = shape.batch_size * shape.num_heads_k;
  bool const causal = params.mask.window_right >= 0;
  int64_t const bytes_per_row = (shape.head_dim + shape.head_dim_v) * element_size(config.dtype) +
                                shape.head_dim * int64_t(sizeof(float));
  int64_t const bytes_per_head = bytes_per_row * shape.query_heads_per_key_head() * shape.seqlen_q;
  return {ceil_div(shape.seqlen_k, config.tile_n), num_batch_heads,
          causal ? heads_per_section(bytes_per_head, device.l2_bytes / 2, num_batch_heads) : 1,
          false};
}

template <BackwardConfig kConfig>
void launch_backward(BackwardParams const& params, Device const& device, Stream stream) {
  Shape const& shape = params.shape;
  int const batch_heads = shape.batch_size * shape.num_heads;
  char* const row_stats = static_cast<char*>(params.workspace) + dq_sums_bytes(kConfig, shape);
  char* const counters = row_stats + row_stats_bytes(shape);
  BackwardWorkspace const workspace{
      static_cast<float*>(params.workspace), reinterpret_cast<RowStats*>(row_stats),
      reinterpret_cast<int*>(counters), kConfig.head_dim, ceil_div(shape.seqlen_q, kConfig.tile_m)};
  TileOrder const order = backward_order(kConfig, params, device);

  flash::launch<preprocess_kernel<kConfig.dtype>>(
      int64_t(batch_heads) * (params.softmax_d_rows / kRowsPerBlock), kSideThreads, 0, stream,
      params, workspace, int(num_counters(kConfig, shape)));
  flash::launch<backward_kernel<BackwardTraits<kConfig>>>(
      int64_t(order.num_blocks) * order.num_batch_heads, kConfig.num_threads(),
      kConfig.smem_bytes(), stream, params, order, workspace);
  flash::launch<convert_dq_kernel<kConfig.dtype>>(
      int64_t(batch_heads) * ceil_div(shape.seqlen_q, kRowsPerBlock), kSideThreads, 0, stream,
      params, workspace);
}

template <int kHeadDim>
bool BackwardUnit<kHeadDim>::launch(BackwardConfig const& config, BackwardParams const& params,
                                    Device const& device, Stream stream) {
  auto try_row = [&]<BackwardConfig kRow>() {
    if (!(config == kRow)) {
      return false;
    }
    launch_backward<kRow>(params, device, stream);
    return true;
  };
  return any_compiled_row<kBackwardRows<DType::kBf16>, kHeadDim>(try_row) ||
         any_compiled_row<kBackwardRows<DType::kFp16>, kHeadDim>(try_row);
}

}  // namespace flash::sm80
