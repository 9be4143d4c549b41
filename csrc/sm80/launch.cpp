#include "sm80/launch.h"

#include <stdexcept>
#include <string>

#include "sm80/unit.h"
#include "sm80/workspace_size.h"

namespace flash::sm80 {
namespace {

/// Calls launch_unit.template operator()<head_dim>() for the unit of `config`.
template <class Config, class LaunchUnit>
void launch_in_unit(Config const& config, LaunchUnit const& launch_unit) {
  auto const try_unit = [&]<int kHeadDim>() {
    return config.head_dim == kHeadDim && launch_unit.template operator()<kHeadDim>();
  };
  bool const launched = try_unit.template operator()<64>() || try_unit.template operator()<96>() ||
                        try_unit.template operator()<128>() ||
                        try_unit.template operator()<192>() || try_unit.template operator()<256>();
  if (!launched) {
    throw std::runtime_error("flash_attn: " + std::string(std::string_view(config.name())) +
                             " is not compiled into this build");
  }
}

}  // namespace

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
