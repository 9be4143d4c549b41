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
  RowStatistics const statistics =
      row_statistics<kDType>(params, block.sequence, block.head, block.row + row);
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
                      shape.head_dim);
  DqSums const sums = workspace.dq_sums(int64_t(blockIdx.x) * kRowsPerBlock);
  int const num_pieces = shape.head_dim / 8;
  for (int idx = threadIdx.x; idx < num_pieces * 8; idx += kSideThreads) {
    int const d = idx % num_pieces, g = idx / num_pieces;
    float quad[4][4];
    DqSums::load_quad(sums.piece(0, d), g, quad);
    uint32_t pairs[2][4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        pairs[half][t] = pack2<kDType>(quad[t][2 * half] * params.softmax_scale,
                                       quad[t][2 * half + 1] * params.softmax_scale);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = block.row + half * 8 + g;
      if (row < sequence.seqlen_q) {
        *reinterpret_cast<uint4*>(dq.ptr + row * dq.row_bytes + d * 16) = {
            pairs[half][0], pairs[half][1], pairs[half][2], pairs[half][3]};
      }
    }
  }
}

}  // namespace flash::sm80
