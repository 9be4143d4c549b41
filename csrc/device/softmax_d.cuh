// What the backward needs of a query row besides q and dout.
#pragma once

#include "device/copy.cuh"
#include "device/element.cuh"

namespace flash {

/// Some rows of softmax_d of one head: which rows of which sequence they are. Those behind its end
/// belong to none.
struct RowBlock {
  int head;
  int row;  // the first, counted from the sequence's begin
  Sequence sequence;
};

/// Block number `idx` of `rows` rows each, which divide 128.
__device__ __forceinline__ RowBlock row_block(BackwardParams const& params, int idx, int rows) {
  Shape const& shape = params.shape;
  int const blocks_per_head = params.softmax_d_rows / rows;
  int const entry_head = idx / blocks_per_head, row = idx % blocks_per_head * rows;
  int const head = entry_head % shape.num_heads;
  auto const sequence = [&](int batch) { return sequence_of(params, batch); };
  if (params.sequences.cu_seqlens_q == nullptr) {
    return {head, row, sequence(entry_head / shape.num_heads)};
  }
  // The last sequence that begins at or before the row.
  int batch = 0;
  for (int end = shape.batch_size; end - batch > 1;) {
    int const middle = (batch + end) / 2;
    int const first = first_softmax_d_row(sequence(middle), params.sequences, middle);
    (first <= row ? batch : end) = middle;
  }
  Sequence const found = sequence(batch);
  return {head, row - first_softmax_d_row(found, params.sequences, batch), found};
}

struct RowStatistics {
  float lse;        // natural logarithm; +inf where all gradients are 0, and past seqlen_q
  float softmax_d;  // rowsum(dout * out) - dlse
};

/// `sum` plus the products of the elements of two 16-byte chunks.
template <DType kDType>
__device__ __forceinline__ float add_products(float sum, uint4 const& a, uint4 const& b) {
  auto const add = [&](uint32_t x, uint32_t y) {
    if constexpr (kDType == DType::kFp32) {
      sum = fmaf(__uint_as_float(x), __uint_as_float(y), sum);
    } else {
      float2 const left = unpack2<kDType>(x), right = unpack2<kDType>(y);
      sum = fmaf(left.x, right.x, fmaf(left.y, right.y, sum));
    }
  };
  add(a.x, b.x);
  add(a.y, b.y);
  add(a.z, b.z);
  add(a.w, b.w);
  return sum;
}

/// Of `row` of a sequence, by the eight neighbouring lanes that share it, each of which gets them.
template <DType kDType>
__device__ __forceinline__ RowStatistics row_statistics(BackwardParams const& params,
                                                        Sequence const& sequence, int head,
                                                        int row) {
  Shape const& shape = params.shape;
  RowStatistics result{kInfinity, 0.f};
  if (row >= 0 && row < sequence.seqlen_q) {
    GlobalRows const out(params.out, sequence.entry_q, head, sequence.first_q, sequence.seqlen_q,
                         shape.head_dim_v, element_size(kDType));
    GlobalRows const dout(params.dout, sequence.entry_q, head, sequence.first_q, sequence.seqlen_q,
                          shape.head_dim_v, element_size(kDType));
    int const row_bytes = shape.head_dim_v * element_size(kDType);
    for (int byte = threadIdx.x % 8 * 16; byte < row_bytes; byte += 8 * 16) {
      uint4 const a = *reinterpret_cast<uint4 const*>(out.ptr + row * out.row_bytes + byte);
      uint4 const b = *reinterpret_cast<uint4 const*>(dout.ptr + row * dout.row_bytes + byte);
      result.softmax_d = add_products<kDType>(result.softmax_d, a, b);
    }
    int64_t const idx = (int64_t(sequence.entry_q) * shape.num_heads + head) * shape.seqlen_q +
                        sequence.first_q + row;
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
