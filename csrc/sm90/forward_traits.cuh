// Compile-time facts of one sm90 forward kernel: tiles, registers, shared memory, barriers.
#pragma once

#include <type_traits>

#include "config/sm90_forward_config.h"
#include "device/barrier.cuh"
#include "device/smem_tile.cuh"

namespace flash::sm90 {

/// tile_m query rows of one head, and the key tiles [n_min, n_max) that they see; at least one, so
/// that rows without keys take the same way as others.
struct alignas(16) WorkTile {
  int m_block;  // negative: nothing is left
  int head, batch;
  int n_min, n_max;
  int seqlen_q, seqlen_k;  // of the sequence
};

template <Sm90ForwardConfig kConfig_>
struct ForwardTraits {
  static constexpr Sm90ForwardConfig kConfig = kConfig_;
  static constexpr int kTileM = kConfig.tile_m, kTileN = kConfig.tile_n;
  static constexpr int kWarpgroups = kConfig.num_warpgroups();  // those that compute
  using TileQ = SmemTile<64, kConfig.head_dim>;                 // of a warpgroup
  using TileK = SmemTile<kTileN, kConfig.head_dim>;
  using TileV = SmemTile<kTileN, kConfig.head_dim_v>;
  using TileOut = SmemTile<16, kConfig.head_dim_v>;  // of a warp

  // Registers a thread after the hand-over from the loading warpgroup. The warpgroups' sum is what
  // the launch allots, 504 of the 512 that an SM has for 128 threads: asking for more hangs.
  static constexpr bool kComputesMuch = kConfig.head_dim_v > 128 || kConfig.extras != Extras::kNone;
  static constexpr int kLoadRegisters = kWarpgroups == 3 ? 32 : kComputesMuch ? 24 : 40;
  static constexpr int kComputeRegisters = kWarpgroups == 3 ? 160 : kComputesMuch ? 240 : 232;
  static_assert(kLoadRegisters + kWarpgroups * kComputeRegisters <=
                (kWarpgroups + 1) * (512 / (kWarpgroups + 1) / 8 * 8));
  static_assert(kWarpgroups == 2 || kWarpgroups == 3, "register budgets exist for these");

  struct Nothing {};
  struct alignas(1024) OutBuffers {
    char warp[kWarpgroups * 4][TileOut::kBytes];
  };

  // A *_full barrier ends its phase when a buffer is filled, an *_empty one when it may be
  // refilled.
  struct SharedStorage {
    alignas(1024) char q[kConfig.q_stages][TileQ::kBytes];
    alignas(1024) char k[kConfig.k_stages][TileK::kBytes];
    alignas(1024) char v[kConfig.v_stages][TileV::kBytes];
    std::conditional_t<kConfig.out_in_v, Nothing, OutBuffers> out;
    WorkTile work[kConfig.kWorkStages];
    uint64_t q_full[kConfig.q_stages], q_empty[kConfig.q_stages];
    uint64_t k_full[kConfig.k_stages], k_empty[kConfig.k_stages];
    uint64_t v_full[kConfig.v_stages], v_empty[kConfig.v_stages];
    uint64_t work_full[kConfig.kWorkStages], work_empty[kConfig.kWorkStages];
  };
  static_assert(sizeof(SharedStorage) == kConfig.smem_bytes(), "table and kernel agree");
  static_assert(kConfig.smem_bytes() <= 227 * 1024, "shared memory of one thread block");
  static_assert(!kConfig.out_in_v ||
                    (kConfig.v_stages >= kWarpgroups && TileV::kBytes >= 4 * TileOut::kBytes),
                "a buffer of V holds out of a warpgroup, and there is one for each");
  static_assert(kTileN % 16 == 0 && kTileN <= 128, "one 32-bit mask a row, whole steps of P V");
};

}  // namespace flash::sm90
