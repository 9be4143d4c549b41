// Compile-time facts of one sm90 backward kernel: tiles, registers, shared memory, barriers.
#pragma once

#include <type_traits>

#include "arith/block_range.h"
#include "device/barrier.cuh"
#include "device/smem_tile.cuh"
#include "sm90/backward_params.h"

namespace flash::sm90 {

/// A key tile of one key head, a cluster's, and the query tiles [m_min, m_max) of each query head
/// that see it; there may be none.
struct alignas(16) WorkItem {
  int n_block;  // negative: nothing is left
  int head_k, batch;
  int m_min, m_max;
};

template <Sm90BackwardConfig kConfig_>
struct BackwardTraits {
  static constexpr Sm90BackwardConfig kConfig = kConfig_;
  static constexpr DType kDType = kConfig.dtype;
  static constexpr int kTileM = kConfig.tile_m, kTileN = kConfig.tile_n;
  static constexpr int kClusterBlocks = kConfig.cluster_blocks();
  static constexpr int kBlockKeys = kConfig.block_keys();
  static constexpr int kStages = Sm90BackwardConfig::kStages;
  static constexpr int kDoutStages = kConfig.dout_stages;
  static constexpr bool kPaired = kConfig.is_paired();
  static constexpr int kWarpgroups = Sm90BackwardConfig::kWarpgroups;  // those that compute
  static constexpr int kComputingWarps = 4 * kWarpgroups;
  using TileQ = SmemTile<kTileM, kConfig.head_dim>;
  using TileDout = SmemTile<kTileM, kConfig.head_dim_v>;
  using TileK = SmemTile<kBlockKeys, kConfig.head_dim>;
  using TilePeerK = SmemTile<kBlockKeys, kConfig.peer_cols()>;  // of a pair
  using TileV = SmemTile<kBlockKeys, kConfig.head_dim_v>;
  using TileDs = SmemTile<kBlockKeys, kTileM>;  // rows are keys

  // A group of dQ lies in fragments of 8 columns, those of a warp (16 rows, a strip) one behind the
  // other. Without pairs a tile of 128 queries is split by rows, one of 64 by columns or not.
  static constexpr bool kDqByRows = kTileM == 128;
  static constexpr bool kDqInTurn = kConfig.takes_dq_in_turn();
  static constexpr int kGroups = kConfig.num_groups();
  static constexpr int kGroupCols = kDqByRows ? kConfig.head_dim : kConfig.head_dim / kGroups;
  static constexpr int kFragmentBytes = 16 * 8 * 4;
  static constexpr int kStripBytes = kGroupCols / 8 * kFragmentBytes;
  static constexpr int kGroupBytes = 4 * kStripBytes;
  static constexpr int kDqBytes = kGroups * kGroupBytes;
  static_assert(kGroupBytes == kConfig.group_bytes() && (kDqByRows || kTileM == 64));
  static constexpr int kConvertingWarps = Sm90BackwardConfig::kConvertingWarps;
  static constexpr int kLandingStrips = kConfig.landing_strips;

  // Of a pair: each thread block of the cluster makes half of dQ's columns, its first warpgroup the
  // outermost block of 64, the second one the rest, which lies in the next block.
  static constexpr int kColBlocks = kConfig.head_dim / 64;
  static constexpr int kRestCols = kConfig.head_dim / 2 - 64;
  /// The first of the two column blocks of thread block `rank`.
  static __device__ __forceinline__ int first_dq_block(int rank) {
    return rank == 0 ? 0 : kColBlocks - 2;
  }
  /// The first of the groups of a warpgroup; the second warpgroup has kRestCols / kGroupCols.
  static __device__ __forceinline__ int first_dq_group(int rank, int warpgroup) {
    constexpr int kOfFirst = 64 / kGroupCols;
    if (rank == 0) {
      return warpgroup * kOfFirst;
    }
    return warpgroup == 0 ? kGroups - kOfFirst : kGroups / 2;
  }

  // Registers a thread after the hand-over. The warpgroups' sum is what the launch allots, 504 of
  // the 512 that an SM has for 128 threads: asking for more hangs.
  static constexpr int kHelperRegisters = kPaired ? 48 : 40, kComputeRegisters = 232;
  static constexpr int kFirstComputeRegisters = kPaired ? 224 : 232;  // of the first warpgroup
  static_assert(kHelperRegisters + kFirstComputeRegisters + kComputeRegisters == 504);

  struct OutboxStorage {
    // dQ and dV of a warpgroup leave through its own.
    alignas(1024) char outbox[kWarpgroups][kConfig.outbox_bytes()];
  };
  struct PairStorage {
    alignas(1024) char peer_k[TilePeerK::kBytes];
  };
  // A *_full barrier ends its phase when a buffer is filled, an *_empty one when it may be
  // refilled.
  struct SharedStorage : std::conditional_t<kPaired, PairStorage, OutboxStorage> {
    alignas(1024) char k[TileK::kBytes];
    alignas(1024) char v[TileV::kBytes];
    alignas(1024) char q[kStages][TileQ::kBytes];
    alignas(1024) char dout[kDoutStages][TileDout::kBytes];
    // Without pairs dK of warpgroup w leaves through buffer w. Of a pair, the other thread block's
    // dS is behind this one's.
    alignas(1024) char ds[kStages][kClusterBlocks * TileDs::kBytes];
    alignas(128) char landing[kConvertingWarps][kLandingStrips * kStripBytes];
    alignas(16) float lse_log2[kStages][kTileM];
    alignas(16) float softmax_d[kDoutStages][kTileM];
    WorkItem item;
    float* dq_sums[kStages];  // of a pair's query tiles whose turn it is
    int drawn;  // number of the item that the cluster's first thread block has drawn for this one
    uint64_t q_full[kStages], q_empty[kStages];
    uint64_t dout_full[kDoutStages], dout_empty[kDoutStages];
    uint64_t k_full, k_empty, v_full, v_empty;
    uint64_t ds_full[kStages], ds_empty[kStages];
    uint64_t outbox_full[kWarpgroups], outbox_empty[kWarpgroups];
    uint64_t dk_full[kWarpgroups], dk_empty;  // without pairs
    // Of pairs:
    uint64_t p_full[kStages], v_read, peer_k_full, peer_k_empty;
    uint64_t dq_turn[kStages], dq_added[kStages], drawn_full, drawn_empty;
    uint64_t landed[kConvertingWarps];
  };
  static_assert(sizeof(SharedStorage) == kConfig.smem_bytes(), "table and kernel agree");
  static_assert(kConfig.smem_bytes() <= 227 * 1024, "shared memory of one thread block");
  static_assert(kPaired || (kBlockKeys == 64 * kWarpgroups && kStages >= kWarpgroups &&
                            TileDs::kBytes >= 64 * kConfig.head_dim * 2));
  static_assert(!kDqInTurn || kStages == kWarpgroups, "a buffer of dS is one warpgroup's");
};

__device__ __forceinline__ TileGrid tile_grid(BackwardParams const& problem,
                                              Sequence const& sequence, int tile_m, int tile_n) {
  return {tile_m, tile_n, sequence.seqlen_q, sequence.seqlen_k, problem.mask};
}

/// Where a sequence's query tiles are among those of a query head.
template <class Traits>
__device__ __forceinline__ int first_query_tile(BackwardParams const& problem,
                                                Sequence const& sequence, int batch) {
  return first_softmax_d_row(sequence, problem.sequences, batch) / Traits::kTileM;
}

/// Calls visit(head_in_group, m_block) for the query tiles of `item` in the order in which every
/// role walks them.
template <class Visit>
__device__ __forceinline__ void for_each_query_tile(WorkItem const& item, int group_size, int step,
                                                    Visit const& visit) {
#pragma unroll 1
  for (int head = step > 0 ? 0 : group_size - 1; head >= 0 && head < group_size; head += step) {
#pragma unroll 1
    for (int m_block = step > 0 ? item.m_min : item.m_max - 1;
         m_block >= item.m_min && m_block < item.m_max; m_block += step) {
      visit(head, m_block);
    }
  }
}

}  // namespace flash::sm90
