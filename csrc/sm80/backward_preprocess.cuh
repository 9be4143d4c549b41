// The two small kernels around the main backward kernel.
#pragma once

#include "device/softmax_d.cuh"
#include "sm80/backward_workspace.cuh"

namespace flash::sm80 {

constexpr int kRowsPerBlock = 16;  // query rows of a thread block: one row of dq pieces
constexpr int kSideThreads = 128;

/// softmax_d = rowsum(dout * out) - dlse, row statistics for the main kernel, and clears the dq
/// sums and counters. One thread block per 16 rows of one head, eight lanes a row; rows that belong
/// to no sequence get softmax_d 0.
template <DType kDType>
__global__ void __launch_bounds__(kSideThreads)
    preprocess_kernel(__grid_constant__ BackwardParams const params,
                      __grid_constant__ BackwardWorkspace const workspace, int num_counters) {
  RowBlock const block = row_block(params, blockIdx.x, kRowsPerBlock);
  int const row = threadIdx.x / 8;
  RowStatistics of_row[1];
  row_statistics<kDType>(params, block.sequence, block.head, block.row + row, 0, of_row);
  RowStatistics const& statistics = of_row[0];
  if (threadIdx.x % 8 == 0) {
    int64_t const idx = int64_t(blockIdx.x) * kRowsPerBlock + row;
    params.softmax_d[idx] = statistics.softmax_d;
    workspace.row_stats[idx] = {statistics.lse * kLog2E, -statistics.softmax_d};
  }

  int const chunks = kRowsPerBlock * workspace.head_dim / 4;
  float4* const dq = reinterpret_cast<float4*>(workspace.dq) + int64_t(blockIdx.x) * chunks;
  for (int chunk = threadIdx.x; chunk < chunks; chunk += kSideThreads) {
    dq[chunk] = {0.f, 0.f, 0.f, 0.f};
  }
  for (int64_t idx = int64_t(blockIdx.x) * kSideThreads + threadIdx.x; idx < num_counters;
       idx += int64_t(gridDim.x) * kSideThreads) {
    workspace.counters[idx] = 0;
  }
}

/// Eight neighbours of a row, rounded to the type.
template <DType kDType>
__device__ __forceinline__ void store_eight(char* target, float const (&values)[8]) {
  if constexpr (kDType == DType::kFp32) {
    auto* const chunks = reinterpret_cast<float4*>(target);
    chunks[0] = {values[0], values[1], values[2], values[3]};
    chunks[1] = {values[4], values[5], values[6], values[7]};
  } else {
    *reinterpret_cast<uint4*>(target) = {
        pack2<kDType>(values[0], values[1]), pack2<kDType>(values[2], values[3]),
        pack2<kDType>(values[4], values[5]), pack2<kDType>(values[6], values[7])};
  }
}

/// dq = softmax_scale * sums, from accumulator fragments to rows. One thread block per 16 rows of
/// one head; a thread takes the eight columns of one piece in the rows g and g + 8, which the four
/// lanes 4 g ... 4 g + 3 hold.
template <DType kDType>
__global__ void __launch_bounds__(kSideThreads)
    convert_dq_kernel(__grid_constant__ BackwardParams const params,
                      __grid_constant__ BackwardWorkspace const workspace) {
  Shape const& shape = params.shape;
  RowBlock const block = row_block(params, blockIdx.x, kRowsPerBlock);
  Sequence const& sequence = block.sequence;
  if (block.row >= sequence.seqlen_q) {
    return;
  }
  GlobalRows const dq(params.dq, sequence.entry_q, block.head, sequence.first_q, sequence.seqlen_q,
                      shape.head_dim, element_size(kDType));
  DqSums const sums = workspace.dq_sums(int64_t(blockIdx.x) * kRowsPerBlock);
  int const num_pieces = shape.head_dim / 8;
  for (int idx = threadIdx.x; idx < num_pieces * 8; idx += kSideThreads) {
    int const d = idx % num_pieces, g = idx / num_pieces;
    float quad[4][4];
    DqSums::load_quad(sums.piece(0, d), g, quad);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = quad[i / 2][2 * half + i % 2] * params.softmax_scale;
      }
      int const row = block.row + half * 8 + g;
      if (row < sequence.seqlen_q) {
        store_eight<kDType>(dq.ptr + row * dq.row_bytes + d * 8 * element_size(kDType), values);
      }
    }
  }
}

}  // namespace flash::sm80
