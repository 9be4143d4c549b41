#include "sm80/launch.h"

#include "config/compiled_rows.h"
#include "device/tile_list.h"
#include "sm80/unit.h"
#include "sm80/workspace_size.h"

namespace flash::sm80 {
void forward(ForwardConfig const& config, ForwardParams const& params, Device const& device,
             Stream stream) {
  launch_in_unit(config, [&]<int kHeadDim>() {
    return config.dtype == DType::kFp32
               ? ForwardUnit<kHeadDim, 4>::launch(config, params, device, stream)
               : ForwardUnit<kHeadDim, 2>::launch(config, params, device, stream);
  });
}

void backward(BackwardConfig const& config, BackwardParams const& params, Device const& device,
              Stream stream) {
  launch_in_unit(config, [&]<int kHeadDim>() {
    return config.dtype == DType::kFp32
               ? BackwardUnit<kHeadDim, 4>::launch(config, params, device, stream)
               : BackwardUnit<kHeadDim, 2>::launch(config, params, device, stream);
  });
}

std::size_t forward_workspace_bytes(ForwardConfig const& config, ForwardParams const& params) {
  Shape const& shape = params.shape;
  return params.sequences.cu_seqlens_q == nullptr
             ? 0
             : tile_list_bytes(max_tiles(shape.seqlen_q, shape.batch_size, config.tile_m));
}

std::size_t backward_workspace_bytes(BackwardConfig const& config, BackwardParams const& params) {
  return std::size_t(dq_sums_bytes(config, params) + row_stats_bytes(params) +
                     num_counters(config, params) * int64_t(sizeof(int))) +
         tile_list_bytes(max_key_tiles(config, params));
}

}  // namespace flash::sm80
