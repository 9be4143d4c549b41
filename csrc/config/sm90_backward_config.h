// THE table of compiled backward kernels of the sm90 family.
#pragma once

#include "config/kernel_filter.h"
#include "params.h"

namespace flash {

/// One compiled kernel: persistent thread blocks of one warpgroup that moves data and two that
/// compute. The first fields say what it serves, the rest is tuning.
struct Sm90BackwardConfig {
  DType dtype;
  int head_dim, head_dim_v;  // columns of the tiles; smaller ones are filled up with zeros
  int tile_m, tile_n;  // a thread block owns tile_n keys and walks query tiles of tile_m rows

  static constexpr int kArch = 90;
  static constexpr int kQStages = 3;    // buffers of Q
  static constexpr int kStages = 2;     // buffers of dO and dS
  static constexpr int kWarpsDq = 2;    // that convert dq
  static constexpr int kPiecesDq = 4;   // of a query tile, which they take one at a time

  constexpr int num_warpgroups() const { return 2; }  // those that compute
  constexpr int num_threads() const { return 128 * (num_warpgroups() + 1); }
  /// What leaves a warpgroup at once: its share of a query tile's fp32 dQ, or dV of its keys.
  constexpr int outbox_bytes() const {
    int const share = tile_m * head_dim * int(sizeof(float)) / num_warpgroups();
    return imax(share, 64 * head_dim_v * element_size(dtype));
  }
  constexpr int smem_bytes() const {
    int const keys = tile_n * (head_dim + head_dim_v);
    int const queries = tile_m * (kQStages * head_dim + kStages * head_dim_v);
    int const ds = kStages * tile_n * tile_m;
    int const landing = kWarpsDq * (tile_m * head_dim / kPiecesDq) * int(sizeof(float));
    int const statistics = (kQStages + kStages) * tile_m * int(sizeof(float));
    constexpr int kItem = 32, kTileAlignment = 1024;
    constexpr int kBarriers = (2 * kQStages + 4 * kStages + 4 + 3 * 2 + 1 + kWarpsDq) * int(sizeof(uint64_t));
    return round_up((keys + queries + ds) * element_size(dtype) +
                        num_warpgroups() * outbox_bytes() + landing + statistics + kItem + kBarriers,
                    kTileAlignment);
  }
  constexpr RowName name() const {
    return row_name("bwd", kArch, head_dim, dtype == DType::kBf16 ? "bf16" : "fp16");
  }
  friend constexpr bool operator==(Sm90BackwardConfig const&, Sm90BackwardConfig const&) = default;
};

/// The first row that serves a problem is taken. Measured: docs/lessons.md ("sm90 backward").
template <DType kDType>
inline constexpr Sm90BackwardConfig kSm90BackwardRows[] = {
    // clang-format off
    // dtype   d  d_v   m    n
    {kDType,  64,  64, 128, 128},
    {kDType,  96,  96,  64, 128},
    {kDType, 128, 128,  64, 128},
    // clang-format on
};

}  // namespace flash
