// What the backward needs of a query row besides q and dout.
#pragma once

#include "device/copy.cuh"
#include "device/element.cuh"

namespace flash {

struct RowStatistics {
  float lse;        // natural logarithm; +inf where all gradients are 0, and past seqlen_q
  float softmax_d;  // rowsum(dout * out) - dlse
};

/// Of `row`, by the eight neighbouring lanes that share it, each of which gets them.
template <DType kDType>
__device__ __forceinline__ RowStatistics row_statistics(BackwardParams const& params, int batch,
                                                        int head, int row) {
  Shape const& shape = params.shape;
  RowStatistics result{kInfinity, 0.f};
  if (row < shape.seqlen_q) {
    GlobalRows const out(params.out, batch, head, shape.seqlen_q, shape.head_dim_v);
    GlobalRows const dout(params.dout, batch, head, shape.seqlen_q, shape.head_dim_v);
    for (int col = threadIdx.x % 8 * 8; col < shape.head_dim_v; col += 64) {
      uint4 const a = *reinterpret_cast<uint4 const*>(out.ptr + row * out.row_bytes + col * 2);
      uint4 const b = *reinterpret_cast<uint4 const*>(dout.ptr + row * dout.row_bytes + col * 2);
      auto add_pair = [&](uint32_t x, uint32_t y) {
        float2 const o = unpack2<kDType>(x), d = unpack2<kDType>(y);
        result.softmax_d = fmaf(o.x, d.x, fmaf(o.y, d.y, result.softmax_d));
      };
      add_pair(a.x, b.x);
      add_pair(a.y, b.y);
      add_pair(a.z, b.z);
      add_pair(a.w, b.w);
    }
    int64_t const idx = (int64_t(batch) * shape.num_heads + head) * shape.seqlen_q + row;
    result.lse = params.softmax_lse[idx];
    if (params.dlse != nullptr && threadIdx.x % 8 == 0) {
      result.softmax_d -= params.dlse[idx];
    }
  }
  for (int distance = 1; distance < 8; distance *= 2) {
    result.softmax_d += __shfl_xor_sync(0xffffffffu, result.softmax_d, distance);
  }
  // A row without visible keys has gradient 0 whatever comes in for it.
  if (result.lse == kInfinity) {
    result.softmax_d = 0.f;
  }
  return result;
}

}  // namespace flash
