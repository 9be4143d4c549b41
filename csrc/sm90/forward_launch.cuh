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
    flash::launch_early<forward_kernel<ForwardTraits<kRow>>>(num_blocks, kRow.num_threads(),
                                                             kRow.smem_bytes(), stream, params);
    return true;
  };
  return any_compiled_row<kSm90ForwardRows<DType::kBf16>, kHeadDim>(try_row) ||
         any_compiled_row<kSm90ForwardRows<DType::kFp16>, kHeadDim>(try_row);
}

}  // namespace flash::sm90
