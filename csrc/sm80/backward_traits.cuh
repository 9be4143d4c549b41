// What the parts of the sm80 backward share: places in shared memory, barriers, copies of Q and dO.
#pragma once

#include "config/backward_config.h"
#include "device/barrier.cuh"
#include "device/mma_fp32.cuh"
#include "sm80/backward_workspace.cuh"
#include "sm80/key_tile.cuh"

namespace flash::sm80 {

/// When the copies of the next visit start: not beside the loads of S and dP, which keep shared
/// memory busy. A thread block that is alone on its SM is 3 % faster when they start later.
enum class CopyPoint { kBeforeDv, kBeforeDk, kBeforeDq };

template <BackwardConfig kConfig_>
struct BackwardTraits {
  static constexpr BackwardConfig kConfig = kConfig_;
  static constexpr DType kDType = kConfig.dtype;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kThreads = kConfig.num_threads();
  static constexpr int kStages = kConfig.num_stages;
  static constexpr CopyPoint kCopyPoint = kStages == 1                ? CopyPoint::kBeforeDq
                                          : kConfig.blocks_per_sm > 1 ? CopyPoint::kBeforeDv
                                                                      : CopyPoint::kBeforeDk;
  // Where a visit finds its key tile: kernels of eight warps spilled 8 to 16 bytes with it in
  // registers, that of 168 registers with extras 20, that of head dim 128 with it in shared memory.
  static constexpr bool kTileInShared = kConfig.num_warps > 4 || kConfig.keys_own_warps() ||
                                        (kConfig.extras && kConfig.blocks_per_sm > 2);
  // A visit's row statistics are loaded under dQ of the one before: 3 % at head dim 128, whose
  // thread block has the SM for itself; at 192 and 256 it costs 1 to 2 %.
  static constexpr bool kEarlyStats =
      kConfig.blocks_per_sm == 1 && kConfig.head_dim <= 128 && element_size(kDType) == 2;
  static constexpr int kElementBytes = element_size(kDType);
  static constexpr int kPieceK = flash::kPieceK<kDType>;
  using TileQ = SmemTile<kConfig.tile_m, kHeadDim, kElementBytes>;         // Q and dO
  using TileK = SmemTile<kConfig.tile_n, kHeadDim, kElementBytes>;         // K and V
  using TileS = SmemTile<kConfig.tile_m, kConfig.tile_n, kElementBytes>;   // P and dS
  using TileST = SmemTile<kConfig.tile_n, kConfig.tile_m, kElementBytes>;  // dS^T

  // Warps over the pieces of S (and dP), of dK (and dV), and of dQ.
  // More warps than S has pieces compute the same ones, and store the same values.
  static constexpr int kWarpsMS = kConfig.warps_m_s;
  static constexpr int kWarpsNS = imin(kConfig.num_warps / kWarpsMS, kConfig.tile_n / 16);
  static constexpr int kWarpsS = kWarpsMS * kWarpsNS;
  static constexpr bool kSharesS = kWarpsS < kConfig.num_warps;
  static constexpr int kWarpsNDkv = kConfig.warps_n_dkv;
  static constexpr int kWarpsDDkv = kConfig.num_warps / kWarpsNDkv;
  static constexpr int kWarpsMDq = kConfig.warps_m_dq;
  static constexpr int kWarpsDDq = kConfig.num_warps / kWarpsMDq;
  static constexpr int kMS = kConfig.tile_m / 16 / kWarpsMS, kNS = kConfig.tile_n / 16 / kWarpsNS;
  static constexpr int kNDkv = kConfig.tile_n / 16 / kWarpsNDkv;
  static constexpr int kDDkv = kHeadDim / 16 / kWarpsDDkv;
  static constexpr int kMDq = kConfig.tile_m / 16 / kWarpsMDq;
  static constexpr int kDDq = kHeadDim / 16 / kWarpsDDq;
  static_assert(kMS * kWarpsMS * 16 == kConfig.tile_m && kNS * kWarpsNS * 16 == kConfig.tile_n &&
                    kNDkv * kWarpsNDkv * 16 == kConfig.tile_n &&
                    kDDkv * kWarpsDDkv * 16 == kHeadDim &&
                    kMDq * kWarpsMDq * 16 == kConfig.tile_m && kDDq * kWarpsDDq * 16 == kHeadDim,
                "every product's pieces divide over the warps");

  static constexpr uint32_t kSmemK = 0;
  static constexpr uint32_t kSmemV = kSmemK + TileK::kBytes;
  static constexpr uint32_t kSmemQ = kSmemV + TileK::kBytes;  // kStages of Q, then kStages of dO
  static constexpr uint32_t kSmemDO = kSmemQ + kStages * TileQ::kBytes;
  static constexpr uint32_t kSmemDS = kSmemDO + kStages * TileQ::kBytes;
  static constexpr uint32_t kSmemP = kSmemDS + TileS::kBytes;
  static constexpr uint32_t kSmemStats = kSmemP;  // in the place of P where warps keep that
  static constexpr uint32_t kSmemEnd = kConfig.keys_own_warps()
                                           ? kSmemStats + kConfig.tile_m * sizeof(RowStats)
                                           : kSmemP + TileS::kBytes;
  static_assert(kSmemEnd == uint32_t(kConfig.smem_bytes()), "table and kernel agree");
};

/// Barriers of one thread block. Warps wait for what they need, never for all to be at the same
/// place. Those of the scores end a phase each visit.
template <class Traits>
struct VisitBarriers {
  static constexpr int kCount = Traits::kStages + 3;
  uint32_t first;

  __device__ __forceinline__ uint32_t full(int stage) const { return first + 8 * stage; }
  __device__ __forceinline__ uint32_t p_stored() const { return full(Traits::kStages); }
  __device__ __forceinline__ uint32_t ds_stored() const { return full(Traits::kStages + 1); }
  /// Every warp is done with the visit.
  __device__ __forceinline__ uint32_t done() const { return full(Traits::kStages + 2); }

  __device__ __forceinline__ void init() const {
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      mbarrier_init(full(stage), Traits::kThreads);
    }
    for (uint32_t const barrier : {p_stored(), ds_stored(), done()}) {
      mbarrier_init(barrier, Traits::kConfig.num_warps);
    }
  }
  /// Behind the copies of a visit.
  __device__ __forceinline__ void arrive_full(int visit_idx) const {
    cp_async_arrive(full(visit_idx % Traits::kStages));
  }
  __device__ __forceinline__ void wait_full(int visit_idx) const {
    mbarrier_wait(full(visit_idx % Traits::kStages), visit_idx / Traits::kStages % 2);
  }
  /// Returns at once in the first visit.
  __device__ __forceinline__ void wait_done_before(int visit_idx) const {
    mbarrier_wait(done(), visit_idx % 2 ^ 1);
  }
};

/// Starts the copies of Q and dO of visit number visit_idx, which arrive_full() has to follow.
template <class Traits>
__device__ __forceinline__ void load_visit(BackwardParams const& params, uint32_t smem,
                                           Sequence const& sequence, QueryVisit const& visit,
                                           int visit_idx) {
  using Copy = TileCopy<typename Traits::TileQ, Traits::kThreads>;
  Shape const& shape = params.shape;
  int const first_row = visit.m_block * Traits::kConfig.tile_m;
  int const stage = visit_idx % Traits::kStages;
  uint32_t const stage_bytes = stage * Traits::TileQ::kBytes;
  auto const rows = [&](Strided const& tensor, int cols) {
    return GlobalRows(tensor, sequence.entry_q, visit.head, sequence.first_q, sequence.seqlen_q,
                      cols, Traits::kElementBytes);
  };
  Copy::load(smem + Traits::kSmemQ + stage_bytes, rows(params.q, shape.head_dim), first_row,
             fresh_thread_idx());
  Copy::load(smem + Traits::kSmemDO + stage_bytes, rows(params.dout, shape.head_dim_v), first_row,
             fresh_thread_idx());
}

/// Starts the copy of a visit's row statistics, from those of its head.
template <class Traits>
__device__ __forceinline__ void load_stats(RowStats const* row_stats, uint32_t smem,
                                           QueryVisit const& visit) {
  int const byte = 16 * fresh_thread_idx();
  if (byte < int(Traits::kConfig.tile_m * sizeof(RowStats))) {
    cp_async_16(
        smem + Traits::kSmemStats + byte,
        reinterpret_cast<char const*>(row_stats + visit.m_block * Traits::kConfig.tile_m) + byte,
        true);
  }
}

}  // namespace flash::sm80
