#include "sm80/launch.h"

#include "config/compiled_rows.h"
#include "sm80/unit.h"
#include "sm80/workspace_size.h"

namespace flash::sm80 {
void forward(ForwardConfig const& config, ForwardParams const& params, Device const& device,
             Stream stream) {
  launch_in_unit(config, [&]<int kHeadDim>() {
    return ForwardUnit<kHeadDim>::launch(config, params, device, stream);
  });
}

void backward(BackwardConfig const& config, BackwardParams const& params, Device const& device,
              Stream stream) {
  launch_in_unit(config, [&]<int kHeadDim>() {
    return BackwardUnit<kHeadDim>::launch(config, params, device, stream);
  });
}

std::size_t backward_workspace_bytes(BackwardConfig const& config, Shape const& shape) {
  return std::size_t(dq_sums_bytes(config, shape) + row_stats_bytes(shape) +
                     num_counters(config, shape) * int64_t(sizeof(int)));
}

}  // namespace flash::sm80
