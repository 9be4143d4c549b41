// Forward attention on Hopper: out = softmax(softmax_scale q k^T, masked) v, and softmax_lse.
//
// One thread block an SM, which draws tiles of tile_m query rows of one head. Warpgroup 0 copies
// (one thread each for K, Q and V), the others compute 64 rows each. Every ring of buffers runs
// straight through the borders between tiles, so the copies of the next tiles are in flight during
// the epilogue of this one. Design note: docs/forward_sm90.md.
//
//   barrier      | arrive (count)                         | wait                   | protects
//   q_full       | load_q and its bytes (1)               | one warpgroup          | 64 rows of Q
//   q_empty      | warps of that warpgroup (4)            | load_q                 |
//   k_full       | load_k and its bytes (1)               | computing warpgroups   | a tile of K
//   k_empty      | computing warps (4 each)               | load_k                 |
//   v_full       | load_v and its bytes (1)               | computing warpgroups   | a tile of V,
//   or out v_empty      | computing warps (4 each)               | load_v                 |
//   work_full    | load_k (1)                             | all who compute, load  | a WorkTile
//   work_empty   | computing warps, load_q, load_v        | load_k                 |
//   named 1 + w  | warpgroup w - 1, warpgroup w (256)     | warpgroup w            | turn to issue
#pragma once

#include "sm90/forward_compute.cuh"
#include "sm90/forward_load.cuh"

namespace flash::sm90 {

template <class Traits>
__device__ __forceinline__ void init_barriers(typename Traits::SharedStorage& shared) {
  constexpr Sm90ForwardConfig kConfig = Traits::kConfig;
  constexpr int kComputingWarps = 4 * Traits::kWarpgroups;
  auto const init = [](uint64_t* full, uint64_t* empty, int stages, int readers) {
    for (int stage = 0; stage < stages; ++stage) {
      mbarrier_init(smem_address(full + stage), 1);
      mbarrier_init(smem_address(empty + stage), readers);
    }
  };
  init(shared.q_full, shared.q_empty, kConfig.q_stages, 4);
  init(shared.k_full, shared.k_empty, kConfig.k_stages, kComputingWarps);
  init(shared.v_full, shared.v_empty, kConfig.v_stages, kComputingWarps);
  init(shared.work_full, shared.work_empty, kConfig.kWorkStages, kComputingWarps + 2);
  mbarrier_init_fence();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kConfig.num_threads(), 1)
    forward_kernel(__grid_constant__ ForwardKernelParams const params) {
  extern __shared__ __align__(1024) char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  int const warpgroup_idx = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    prefetch_tensormap(params.q);
    prefetch_tensormap(params.k);
    prefetch_tensormap(params.v);
    prefetch_tensormap(params.out);
    init_barriers<Traits>(shared);
  }
  // Up to here this runs under the stream's last kernel, and the next one's begin may run under
  // this one; after the wait come the reads and writes of global memory.
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (int(blockIdx.x) >= params.tiles.num_tiles()) {  // listed ones may be fewer than planned
    if (threadIdx.x == 0) {
      leave(params);
    }
    return;
  }
  __syncthreads();
  if (warpgroup_idx == 0) {
    setmaxnreg_dec<Traits::kLoadRegisters>();
    if (threadIdx.x == 0) {
      load_k<Traits>(params, shared);
    } else if (threadIdx.x == 32) {
      load_q<Traits>(params, shared);
    } else if (threadIdx.x == 64) {
      load_v<Traits>(params, shared);
    }
  } else {
    setmaxnreg_inc<Traits::kComputeRegisters>();
    ForwardWarpgroup<Traits>(params, shared, warpgroup_idx - 1).run();
  }
}

}  // namespace flash::sm90
