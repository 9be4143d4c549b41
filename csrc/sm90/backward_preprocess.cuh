// The small kernel before the main backward kernel.
#pragma once

#include "device/softmax_d.cuh"
#include "sm90/backward_params.h"

namespace flash::sm90 {

constexpr int kPreprocessThreads = 128;
constexpr int kRowsAtOnce = kPreprocessThreads / 8;  // eight lanes a row
constexpr int kRowsOfThread = 4;
constexpr int kRowsPerBlock = kRowsOfThread * kRowsAtOnce;  // query rows of a thread block

/// softmax_d and lse_log2 of every query row, and clears the dq sums and counters. Rows that belong
/// to no sequence get softmax_d 0 and lse_log2 +inf, so that their probabilities are 0.
template <DType kDType>
__global__ void __launch_bounds__(kPreprocessThreads)
    preprocess_kernel(__grid_constant__ BackwardParams const params,
                      __grid_constant__ BackwardWorkspace const workspace, int64_t num_sums,
                      int64_t num_counters) {
  // The main kernel may start as soon as every block of this one has: it waits for the end itself.
  asm volatile("griddepcontrol.launch_dependents;");
  RowBlock const block = row_block(params, blockIdx.x, kRowsPerBlock);
  int const row = threadIdx.x / 8;
  RowStatistics statistics[kRowsOfThread];
  row_statistics<kDType>(params, block.sequence, block.head, block.row + row, kRowsAtOnce,
                         statistics);
  if (threadIdx.x % 8 == 0) {
#pragma unroll
    for (int i = 0; i < kRowsOfThread; ++i) {
      int64_t const idx = int64_t(blockIdx.x) * kRowsPerBlock + i * kRowsAtOnce + row;
      params.softmax_d[idx] = statistics[i].softmax_d;
      workspace.lse_log2[idx] = statistics[i].lse * kLog2E;
    }
  }
  int64_t const thread = int64_t(blockIdx.x) * kPreprocessThreads + threadIdx.x;
  int64_t const num_threads = int64_t(gridDim.x) * kPreprocessThreads;
  auto* const sums = reinterpret_cast<float4*>(workspace.dq_sums);
  for (int64_t idx = thread; idx < num_sums / 4; idx += num_threads) {
    sums[idx] = {0.f, 0.f, 0.f, 0.f};
  }
  for (int64_t idx = thread; idx < num_counters; idx += num_threads) {
    workspace.next[idx] = 0;
  }
  // The main kernel waits for the end of this one alone: so that of the lists is waited for here.
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

}  // namespace flash::sm90
