// The two launches of a backward, and the choice of the row's kernel.
#pragma once

#include "config/compiled_rows.h"
#include "device/launch.cuh"
#include "sm90/backward_kernel.cuh"
#include "sm90/backward_preprocess.cuh"
#include "sm90/unit.h"

namespace flash::sm90 {

template <Sm90BackwardConfig kConfig>
void launch_backward(BackwardKernelParams const& params, int num_blocks, void* stream) {
  BackwardParams const& problem = params.problem;
  int64_t const row_blocks = int64_t(problem.sequences.entries_q) * problem.shape.num_heads *
                             (problem.softmax_d_rows / kRowsPerBlock);
  int64_t const num_sums = BackwardWorkspace::sums_bytes(kConfig, params.division) / 4;
  constexpr auto kPreprocess = preprocess_kernel<kConfig.dtype>;
  int64_t const num_counters = BackwardWorkspace::num_counters(params.division);
  auto const preprocess = [&](auto const& launch_kernel) {
    launch_kernel(row_blocks, kPreprocessThreads, 0, stream, problem, params.workspace, num_sums,
                  num_counters);
  };
  if (params.division.items.list.num_tiles == nullptr) {
    preprocess([](auto const&... args) { flash::launch<kPreprocess>(args...); });
  } else {
    preprocess([](auto const&... args) { flash::launch_early<kPreprocess>(args...); });
  }
  flash::launch_early<backward_kernel<BackwardTraits<kConfig>>, kConfig.cluster_blocks()>(
      num_blocks, kConfig.num_threads(), kConfig.smem_bytes(), stream, params);
}

template <int kHeadDim>
bool BackwardUnit<kHeadDim>::launch(Sm90BackwardConfig const& config,
                                    BackwardKernelParams const& params, int num_blocks,
                                    void* stream) {
  auto try_row = [&]<Sm90BackwardConfig kRow>() {
    if (!(config == kRow)) {
      return false;
    }
    launch_backward<kRow>(params, num_blocks, stream);
    return true;
  };
  return any_compiled_row<kSm90BackwardRows<DType::kBf16>, kHeadDim>(try_row) ||
         any_compiled_row<kSm90BackwardRows<DType::kFp16>, kHeadDim>(try_row);
}

}  // namespace flash::sm90
