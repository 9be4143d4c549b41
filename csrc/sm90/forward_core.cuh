// What a computing warpgroup of the sm90 forward waits for and lets go, and which rows are its own.
#pragma once

#include "arith/block_range.h"
#include "device/tma.cuh"
#include "sm90/forward_params.h"
#include "sm90/forward_traits.cuh"

namespace flash::sm90 {

template <class Traits>
struct ForwardCore {
  static constexpr Sm90ForwardConfig kConfig = Traits::kConfig;
  static constexpr int kWarpgroups = Traits::kWarpgroups;
  using SharedStorage = typename Traits::SharedStorage;

  ForwardKernelParams const& params;
  SharedStorage& shared;
  int const warpgroup_idx;  // among the computing ones
  int const warp_idx;       // in the warpgroup; by a shuffle, which tells the compiler that
                            // it is the same in all lanes
  Ring<kConfig.q_stages> q;
  Ring<kConfig.k_stages> k;
  Ring<kConfig.v_stages> v;
  Ring<kConfig.kWorkStages> work;

  __device__ __forceinline__ ForwardCore(ForwardKernelParams const& params, SharedStorage& shared,
                                         int warpgroup_idx)
      : params(params),
        shared(shared),
        warpgroup_idx(warpgroup_idx),
        warp_idx(__shfl_sync(0xffffffffu, threadIdx.x / 32 % 4, 0)) {
    for (int i = 0; i < warpgroup_idx; ++i) {
      q.advance();
    }
  }

  static __device__ __forceinline__ int lane_idx() { return threadIdx.x % 32; }

  /// First query row of this warp.
  __device__ __forceinline__ int first_row(WorkTile const& tile) const {
    return tile.m_block * Traits::kTileM + warpgroup_idx * 64 + warp_idx * 16;
  }
  /// Key tiles that need no element mask in the rows of this warpgroup.
  __device__ __forceinline__ BlockRange full_range(WorkTile const& tile) const {
    if constexpr (kConfig.mask == MaskClass::kNone) {
      return {0, tile.seqlen_k / Traits::kTileN};
    } else {
      TileGrid const grid{64, Traits::kTileN, tile.seqlen_q, tile.seqlen_k, params.problem.mask};
      return full_n_block_range(grid, tile.m_block * kWarpgroups + warpgroup_idx);
    }
  }
  static __device__ __forceinline__ bool is_full(BlockRange const& full, int n_block) {
    return n_block >= full.min && n_block < full.max;
  }

  /// Between the two calls only this warpgroup issues products: its softmax then runs beside the
  /// products of the others.
  __device__ __forceinline__ void take_turn() {
    if constexpr (kConfig.ping_pong) {
      named_barrier_sync(1 + warpgroup_idx, 256);
    }
  }
  __device__ __forceinline__ void pass_turn() {
    if constexpr (kConfig.ping_pong) {
      named_barrier_arrive(1 + (warpgroup_idx + 1) % kWarpgroups, 256);
    }
  }
  /// With turns it is enough that the first warpgroup waits for K and V: its turn tells the others.
  __device__ __forceinline__ bool waits_for_loads() const {
    return !kConfig.ping_pong || warpgroup_idx == 0;
  }

  static __device__ __forceinline__ void wait(uint64_t& full, uint32_t phase) {
    mbarrier_wait(smem_address(&full), phase);
  }
  static __device__ __forceinline__ void release(uint64_t& empty) {
    if (lane_idx() == 0) {
      mbarrier_arrive(smem_address(&empty));
    }
  }
  __device__ __forceinline__ void wait_q() { wait(shared.q_full[q.stage], q.phase); }
  __device__ __forceinline__ void wait_k() { wait(shared.k_full[k.stage], k.phase); }
  __device__ __forceinline__ void wait_v() { wait(shared.v_full[v.stage], v.phase); }
  /// The ring of Q advances in turn_over(), not here in a branch: its place stays a uniform value.
  __device__ __forceinline__ void release_q() { release(shared.q_empty[q.stage]); }
  __device__ __forceinline__ void release_k() {
    release(shared.k_empty[k.stage]);
    k.advance();
  }
  __device__ __forceinline__ void release_v() {
    release(shared.v_empty[v.stage]);
    v.advance();
  }

  // One lane reads a WorkTile, so that its own arrival tells that it has been read.

  static __device__ __forceinline__ int from_lane_0(int value) {
    return __shfl_sync(0xffffffffu, value, 0);
  }
  /// Waits for the next tile; true if there is one.
  __device__ __forceinline__ bool has_next_tile() {
    int m_block = 0;
    if (lane_idx() == 0) {
      wait(shared.work_full[work.stage], work.phase);
      m_block = shared.work[work.stage].m_block;
    }
    return from_lane_0(m_block) >= 0;
  }
  /// The tile that has_next_tile() has seen.
  __device__ __forceinline__ WorkTile take_tile() {
    WorkTile tile{};
    if (lane_idx() == 0) {
      tile = shared.work[work.stage];
      mbarrier_arrive(smem_address(&shared.work_empty[work.stage]));
    }
    work.advance();
    return {from_lane_0(tile.m_block), from_lane_0(tile.head),  from_lane_0(tile.batch),
            from_lane_0(tile.n_min),   from_lane_0(tile.n_max), from_lane_0(tile.seqlen_q),
            from_lane_0(tile.seqlen_k)};
  }
};

}  // namespace flash::sm90
