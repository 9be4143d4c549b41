// Scratch memory of the backward: fp32 dq sums, and the order in which key tiles may add to them.
#pragma once

#include "device/counter.cuh"
#include "sm80/workspace_size.h"

namespace flash::sm80 {

/// fp32 dq sums of one (batch, head), in accumulator fragments of 16 rows x 8 columns: piece (m, d)
/// is 32 lanes x 4 elements, so that a warp's addition touches whole lines.
struct DqSums {
  static constexpr int kPieceSize = 16 * 8;
  float* ptr;
  int pieces_d;  // head_dim of the kernel / 8

  __device__ __forceinline__ float* piece(int m, int d) const {
    return ptr + (int64_t(m) * pieces_d + d) * kPieceSize;
  }

  // With vector reductions (sm_90) a lane's four elements are neighbours; without them each of four
  // scalar reductions covers 32 neighbours.

  /// Adds one lane's elements to the piece at `target`.
  static __device__ __forceinline__ void add(float* target, int lane_idx,
                                             float const (&values)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target + 4 * lane_idx),
                 "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
                 : "memory");
#else
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      asm volatile("red.global.add.f32 [%0], %1;" ::"l"(target + 32 * e + lane_idx), "f"(values[e])
                   : "memory");
    }
#endif
  }

  /// Reads the elements of the four lanes 4 g ... 4 g + 3, which share the rows g and g + 8.
  static __device__ __forceinline__ void load_quad(float const* piece, int g,
                                                   float (&values)[4][4]) {
    auto const* const chunks = reinterpret_cast<float4 const*>(piece);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
      float4 const lane = chunks[4 * g + i];
      values[i][0] = lane.x, values[i][1] = lane.y, values[i][2] = lane.z, values[i][3] = lane.w;
#else
      float4 const element = chunks[8 * i + g];
      values[0][i] = element.x, values[1][i] = element.y;
      values[2][i] = element.z, values[3][i] = element.w;
#endif
    }
  }
};

/// What the main kernel needs of a query row. Rows past seqlen_q have lse_log2 = +inf, so P = 0.
struct alignas(8) RowStats {
  float lse_log2;  // softmax_lse * log2(e)
  float minus_d;   // -softmax_d
};

/// Layout of BackwardParams::workspace. The preprocess kernel writes or clears all of it. `row` is
/// where a sequence begins among the softmax_d_rows of an (entry, head).
struct BackwardWorkspace {
  float* dq;             // [entries, heads, softmax_d_rows, head_dim of the kernel]
  RowStats* row_stats;   // [entries, heads, softmax_d_rows]
  int* counters;         // the ticket counter, then [entries, heads, softmax_d_rows / tile_m] turns
  int head_dim, tile_m;  // of the kernel
  int num_heads, rows;   // query heads, softmax_d_rows

  __device__ __forceinline__ int64_t first_row(int entry, int head, int row) const {
    return (int64_t(entry) * num_heads + head) * rows + row;
  }
  __device__ __forceinline__ DqSums dq_sums(int64_t first_row) const {
    return {dq + first_row * head_dim, head_dim / 8};
  }
  __device__ __forceinline__ int* turn(int64_t first_row, int m_block) const {
    return counters + 1 + first_row / tile_m + m_block;
  }

  /// The next tile index, the same for the whole thread block.
  __device__ __forceinline__ int take_ticket() const {
    __shared__ int ticket;
    if (threadIdx.x == 0) {
      ticket = atomicAdd(counters, 1);
    }
    __syncthreads();
    return ticket;
  }
};

/// Waits until `turn` key tiles have added to the query tile.
__device__ __forceinline__ void wait_turn(int const* counter, int turn) {
  if (threadIdx.x == 0) {
    while (load_acquire(counter) != turn) {
    }
  }
  __syncthreads();
}

/// Lets the next key tile add: every thread's reductions are visible before the counter moves.
__device__ __forceinline__ void pass_turn(int* counter) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    add_release(counter, 1);
  }
}

}  // namespace flash::sm80
