// The two small kernels around the main backward kernel.
#pragma once

#include "device/copy.cuh"
#include "device/element.cuh"
#include "sm80/backward_workspace.cuh"

namespace flash::sm80 {

constexpr int kRowsPerBlock = 16;  // query rows of a thread block: one row of dq pieces
constexpr int kSideThreads = 128;

/// softmax_d = rowsum(dout * out) - dlse, row statistics for the main kernel, and clears the dq
/// sums and counters. One thread block per 16 rows of one (batch, head), eight lanes a row; rows
/// past seqlen_q get softmax_d 0.
template <DType kDType>
__global__ void __launch_bounds__(kSideThreads)
    preprocess_kernel(__grid_constant__ BackwardParams const params,
                      __grid_constant__ BackwardWorkspace const workspace, int num_counters) {
  Shape const& shape = params.shape;
  int const rows = softmax_d_rows(shape.seqlen_q);
  int const blocks_per_head = rows / kRowsPerBlock;
  int const batch_head = blockIdx.x / blocks_per_head, block = blockIdx.x % blocks_per_head;
  int const batch = batch_head / shape.num_heads, head = batch_head % shape.num_heads;
  int const row = block * kRowsPerBlock + threadIdx.x / 8;

  float sum = 0.f;
  if (row < shape.seqlen_q) {
    GlobalRows const out(params.out, batch, head, shape.seqlen_q, shape.head_dim_v);
    GlobalRows const dout(params.dout, batch, head, shape.seqlen_q, shape.head_dim_v);
    for (int col = threadIdx.x % 8 * 8; col < shape.head_dim_v; col += 64) {
      uint4 const a = *reinterpret_cast<uint4 const*>(out.ptr + row * out.row_bytes + col * 2);
      uint4 const b = *reinterpret_cast<uint4 const*>(dout.ptr + row * dout.row_bytes + col * 2);
      auto add_pair = [&](uint32_t x, uint32_t y) {
        float2 const o = unpack2<kDType>(x), d = unpack2<kDType>(y);
        sum = fmaf(o.x, d.x, fmaf(o.y, d.y, sum));
      };
      add_pair(a.x, b.x);
      add_pair(a.y, b.y);
      add_pair(a.z, b.z);
      add_pair(a.w, b.w);
    }
  }
  for (int distance = 1; distance < 8; distance *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
  }
  if (threadIdx.x % 8 == 0) {
    float lse = kInfinity;
    if (row < shape.seqlen_q) {
      int64_t const idx = int64_t(batch_head) * shape.seqlen_q + row;
      lse = params.softmax_lse[idx];
      if (params.dlse != nullptr) {
        sum -= params.dlse[idx];
      }
      // A row without visible keys has gradient 0 whatever comes in for it.
      if (lse == kInfinity) {
        sum = 0.f;
      }
    }
    int64_t const idx = int64_t(batch_head) * rows + row;
    params.softmax_d[idx] = sum;
    workspace.row_stats[idx] = {lse * kLog2E, -sum};
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
/// one (batch, head); a thread takes the eight columns of one piece in the rows g and g + 8, which
/// the four lanes 4 g ... 4 g + 3 hold.
template <DType kDType>
__global__ void __launch_bounds__(kSideThreads)
    convert_dq_kernel(__grid_constant__ BackwardParams const params,
                      __grid_constant__ BackwardWorkspace const workspace) {
  Shape const& shape = params.shape;
  int const blocks_per_head = ceil_div(shape.seqlen_q, kRowsPerBlock);
  int const batch_head = blockIdx.x / blocks_per_head, block = blockIdx.x % blocks_per_head;
  int const batch = batch_head / shape.num_heads, head = batch_head % shape.num_heads;
  GlobalRows const dq(params.dq, batch, head, shape.seqlen_q, shape.head_dim);
  DqSums const sums = workspace.dq_sums(shape, batch, head);
  int const num_pieces = shape.head_dim / 8;
  for (int idx = threadIdx.x; idx < num_pieces * 8; idx += kSideThreads) {
    int const d = idx % num_pieces, g = idx / num_pieces;
    float quad[4][4];
    DqSums::load_quad(sums.piece(block, d), g, quad);
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
      int const row = block * kRowsPerBlock + half * 8 + g;
      if (row < shape.seqlen_q) {
        *reinterpret_cast<uint4*>(dq.ptr + row * dq.row_bytes + d * 16) = {
            pairs[half][0], pairs[half][1], pairs[half][2], pairs[half][3]};
      }
    }
  }
}

}  // namespace flash::sm80
