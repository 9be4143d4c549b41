// Choice of the row's kernel.
#pragma once

#include "config/compiled_rows.h"
#include "device/launch.cuh"
#include "sm90/forward_kernel.cuh"
#include "sm90/unit.h"

namespace flash::sm90 {

template <int kHeadDim>
bool ForwardUnit<kHeadDim>::launch(Sm90ForwardConfig const& config,
                                   ForwardKernelParams const& params, int num_blocks,
                                   void* stream) {
  auto try_row = [&]<Sm90ForwardConfig kRow>() {
    if (!(config == kRow)) {
      return false;
    }
    auto const launch = [&](auto const& launch_kernel) {
      launch_kernel(num_blocks, kRow.num_threads(), kRow.smem_bytes(), stream, params);
    };
    constexpr auto kKernel = forward_kernel<ForwardTraits<kRow>>;
    if (params.tiles.list.num_tiles == nullptr) {
      launch([](auto const&... args) { flash::launch<kKernel>(args...); });
    } else {
      launch([](auto const&... args) { flash::launch_early<kKernel>(args...); });
    }
    return true;
  };
  return any_compiled_row<kSm90ForwardRows<DType::kBf16>, kHeadDim>(try_row) ||
         any_compiled_row<kSm90ForwardRows<DType::kFp16>, kHeadDim>(try_row);
}

}  // namespace flash::sm90
