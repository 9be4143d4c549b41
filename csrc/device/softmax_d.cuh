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

/// Block number `idx` of `rows` rows each, which divide 128. For whole warps.
__device__ __forceinline__ RowBlock row_block(BackwardParams const& params, int idx, int rows) {
  Shape const& shape = params.shape;
  int const blocks_per_head = params.softmax_d_rows / rows;
  int const entry_head = idx / blocks_per_head, row = idx % blocks_per_head * rows;
  int const head = entry_head % shape.num_heads;
  auto const sequence = [&](int batch) { return sequence_of(params, batch); };
  if (params.sequences.cu_seqlens_q == nullptr) {
    return {head, row, sequence(entry_head / shape.num_heads)};
  }
  // The last sequence that begins at or before the row. Every look at device memory takes as long
  // as a few rows: a warp looks at 32 sequences at a time.
  int batch = 0, end = shape.batch_size;
  while (end - batch > 1) {
    int const step = ceil_div(end - batch, 32), candidate = batch + int(threadIdx.x % 32) * step;
    bool const is_before =
        candidate < end &&
        first_softmax_d_row(sequence(candidate), params.sequences, candidate) <= row;
    batch += imax(__popc(__ballot_sync(0xffffffffu, is_before)) - 1, 0) * step;
    end = imin(batch + step, end);
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

/// Of kRows rows of a sequence, `step` apart, by the eight neighbouring lanes that share them, each
/// of which gets them. Their loads are under way together.
template <DType kDType, int kRows>
__device__ __forceinline__ void row_statistics(BackwardParams const& params,
                                               Sequence const& sequence, int head, int first_row,
                                               int step, RowStatistics (&results)[kRows]) {
  Shape const& shape = params.shape;
  auto const is_row = [&](int i) {
    int const row = first_row + i * step;
    return row >= 0 && row < sequence.seqlen_q;
  };
  int64_t const first_idx = (int64_t(sequence.entry_q) * shape.num_heads + head) * shape.seqlen_q +
                            sequence.first_q + first_row;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    results[i] = {is_row(i) ? params.softmax_lse[first_idx + i * step] : kInfinity, 0.f};
    if (params.dlse != nullptr && threadIdx.x % 8 == 0 && is_row(i)) {
      results[i].softmax_d -= params.dlse[first_idx + i * step];
    }
  }
  GlobalRows const out(params.out, sequence.entry_q, head, sequence.first_q, sequence.seqlen_q,
                       shape.head_dim_v, element_size(kDType));
  GlobalRows const dout(params.dout, sequence.entry_q, head, sequence.first_q, sequence.seqlen_q,
                        shape.head_dim_v, element_size(kDType));
  int const row_bytes = shape.head_dim_v * element_size(kDType);
  for (int byte = threadIdx.x % 8 * 16; byte < row_bytes; byte += 8 * 16) {
    uint4 a[kRows], b[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      a[i] = b[i] = {};
      if (is_row(i)) {
        int64_t const row = first_row + i * step;
        a[i] = *reinterpret_cast<uint4 const*>(out.ptr + row * out.row_bytes + byte);
        b[i] = *reinterpret_cast<uint4 const*>(dout.ptr + row * dout.row_bytes + byte);
      }
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      results[i].softmax_d = add_products<kDType>(results[i].softmax_d, a[i], b[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float& softmax_d = results[i].softmax_d;
    for (int distance = 1; distance < 8; distance *= 2) {
      softmax_d += __shfl_xor_sync(0xffffffffu, softmax_d, distance);
    }
    // A row without visible keys has gradient 0 whatever comes in for it.
    softmax_d = results[i].lse == kInfinity ? 0.f : softmax_d;
  }
}

}  // namespace flash
