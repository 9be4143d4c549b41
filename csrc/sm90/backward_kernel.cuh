// Backward attention on Hopper. Thread blocks, or of a pair clusters of two, draw items of tile_n
// keys of one key head and walk over the query tiles that see them. Warpgroup 0 moves data: a
// thread that loads, one that sends or announces what was computed, two warps that convert dQ.
// Design note: docs/backward_sm90.md.
//
//   barrier      | arrive (count)                  | wait                    | protects
//   q_full       | loader and its bytes (1)        | computing warps         | Q, lse_log2
//   q_empty      | computing warps (8)             | loader                  |
//   dout_full    | loader and its bytes (1)        | computing warps         | dO, softmax_d
//   dout_empty   | computing warps (8)             | loader                  |
//   v_full       | loader and its bytes (1)        | computing warps         | V
//   v_empty      | computing warps (8)             | loader                  |
//   k_full       | loader and its bytes (1)        | computing warps, sender | K and the item
//   k_empty      | computing warps, sender (9)     | loader                  |
//   ds_full      | computing warps (8)             | computing warps         | dS of both
//   ds_empty     | computing warps (8)             | computing warps         |   warpgroups
//   outbox_full  | warps of a warpgroup (4)        | sender                  | dQ, dV
//   outbox_empty | sender (1)                      | that warpgroup          |
//   dk_full      | warps of a warpgroup (4)        | sender                  | dK in a buffer of dS
//   dk_empty     | sender (1)                      | computing warps         |
//   landed       | converting warp and bytes (1)   | that warp               | sums to convert
//
// Where warpgroups take dQ in turn, that of warpgroup w alone reads buffer w of dS, and its warps
// end ds_empty (4).
//
// Of a pair, the warps of both thread blocks arrive at q_empty, dout_empty and ds_empty (16), of
// which each has its own; V leaves its place to dV, so the first warpgroup's warps, which send it,
// arrive at v_empty (4); the second one makes dS, and its warps and the bytes of the other thread
// block's end ds_full (4). There are no outboxes and dk barriers, but
//
//   p_full       | first warpgroup's warps (4)     | second warpgroup        | P in a buffer of dS
//   v_read       | second warpgroup's warps (4)    | first warpgroup         | V, then dV
//   peer_k_full  | loader and its bytes (1)        | computing warps         | the other block's K,
//   peer_k_empty | second warpgroup's warps (4)    | loader, first warpgroup |   then dK
//   dq_turn      | announcer (1)                   | computing warps         | where to add dQ
//   dq_added     | computing warps (8)             | announcer               |
//   drawn_full   | a word's bytes (1)              | second block's loader   | number of the item
//   drawn_empty  | second block's loader (1)       | first block's loader    |
#pragma once

#include "sm90/backward_compute.cuh"
#include "sm90/backward_dq.cuh"
#include "sm90/backward_pair.cuh"

namespace flash::sm90 {

template <class Traits>
__device__ __forceinline__ void init_barriers(typename Traits::SharedStorage& shared) {
  auto const init = [](uint64_t& barrier, int arrivals) {
    mbarrier_init(smem_address(&barrier), arrivals);
  };
  // What a cluster shares is read by both thread blocks.
  constexpr int kReaders = Traits::kComputingWarps;
  constexpr int kSharers = Traits::kClusterBlocks * kReaders;
  constexpr int kOfDs = Traits::kPaired ? 4 : kReaders, kOfV = kOfDs;
  constexpr int kReadersOfDs = Traits::kDqInTurn ? 4 : kSharers;
  for (int stage = 0; stage < Traits::kStages; ++stage) {
    init(shared.q_full[stage], 1);
    init(shared.q_empty[stage], kSharers);
    init(shared.ds_full[stage], kOfDs);
    init(shared.ds_empty[stage], kReadersOfDs);
    init(shared.p_full[stage], 4);
    init(shared.dq_turn[stage], 1);
    init(shared.dq_added[stage], kReaders);
  }
  for (int stage = 0; stage < Traits::kDoutStages; ++stage) {
    init(shared.dout_full[stage], 1);
    init(shared.dout_empty[stage], kSharers);
  }
  for (int warp = 0; warp < Traits::kConvertingWarps; ++warp) {
    init(shared.landed[warp], 1);
  }
  init(shared.k_full, 1);
  init(shared.k_empty, kReaders + 1);
  init(shared.v_full, 1);
  init(shared.v_empty, kOfV);
  init(shared.dk_empty, 1);
  init(shared.v_read, 4);
  init(shared.peer_k_full, 1);
  init(shared.peer_k_empty, 4);
  init(shared.drawn_full, 1);
  init(shared.drawn_empty, 1);
  for (int warpgroup = 0; warpgroup < Traits::kWarpgroups; ++warpgroup) {
    init(shared.outbox_full[warpgroup], 4);
    init(shared.outbox_empty[warpgroup], 1);
    init(shared.dk_full[warpgroup], 4);
  }
  mbarrier_init_fence();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kConfig.num_threads(), 1)
    backward_kernel(__grid_constant__ BackwardKernelParams const params) {
  extern __shared__ __align__(1024) char shared_memory[];
  auto& shared = *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory);
  int const warpgroup_idx = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
  if (threadIdx.x == 0) {
    prefetch_tensormap(params.q);
    prefetch_tensormap(params.k);
    prefetch_tensormap(params.v);
    prefetch_tensormap(params.dout);
    init_barriers<Traits>(shared);
  }
  if constexpr (Traits::kPaired) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  // The end of the preprocess kernel, and what it wrote.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (warpgroup_idx == 0) {
    setmaxnreg_dec<Traits::kHelperRegisters>();
    int const warp_idx = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
    if (threadIdx.x == 0) {
      fence_async_proxy_global();
      BackwardLoader<Traits>{params, shared}.run();
    } else if (threadIdx.x == 32) {
      fence_async_proxy_global();
      if constexpr (Traits::kPaired) {
        BackwardAnnouncer<Traits>{params, shared}.run();
      } else {
        BackwardSender<Traits>{params, shared}.run();
      }
    } else if (warp_idx >= 2) {
      BackwardConverter<Traits>{params, shared, warp_idx - 2}.run();
    }
  } else {
    if constexpr (!Traits::kPaired) {
      setmaxnreg_inc<Traits::kComputeRegisters>();
      BackwardWarpgroup<Traits>(params, shared, warpgroup_idx - 1).run();
    } else if (warpgroup_idx == 1) {
      setmaxnreg_inc<Traits::kFirstComputeRegisters>();
      BackwardPairWarpgroup<Traits, true>(params, shared, 0).run();
    } else {
      setmaxnreg_inc<Traits::kComputeRegisters>();
      BackwardPairWarpgroup<Traits, false>(params, shared, 1).run();
    }
  }
  if constexpr (Traits::kPaired) {
    cluster_sync();  // the other thread block may still be sending to this one's shared memory
  }
}

}  // namespace flash::sm90
