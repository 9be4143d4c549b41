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
  int tile_m, tile_n;        // a thread block owns tile_n keys and walks query tiles of tile_m rows

  static constexpr int kArch = 90;
  static constexpr int kStages = 2;           // buffers of Q, dO and dS
  static constexpr int kConvertingWarps = 2;  // each takes a warpgroup's share of a dq tile at once

  constexpr int num_warpgroups() const { return 2; }  // those that compute
  constexpr int num_threads() const { return 128 * (num_warpgroups() + 1); }
  /// Of a query tile's fp32 dQ, what a warpgroup computes and a converting warp converts.
  constexpr int share_bytes() const {
    return tile_m * head_dim * int(sizeof(float)) / num_warpgroups();
  }
  /// What leaves a warpgroup at once: its share of dQ, or dV of its keys.
  constexpr int outbox_bytes() const {
    return imax(share_bytes(), 64 * head_dim_v * element_size(dtype));
  }
  constexpr int smem_bytes() const {
    int const keys = tile_n * (head_dim + head_dim_v);
    int const queries = kStages * tile_m * (head_dim + head_dim_v);
    int const ds = kStages * tile_n * tile_m;
    int const landing = kConvertingWarps * share_bytes();
    int const statistics = 2 * kStages * tile_m * int(sizeof(float));
    constexpr int kItem = 32, kTileAlignment = 1024;
    int const barriers =
        int(sizeof(uint64_t)) * (6 * kStages + 5 + 3 * num_warpgroups() + kConvertingWarps);
    return round_up((keys + queries + ds) * element_size(dtype) +
                        num_warpgroups() * outbox_bytes() + landing + statistics + kItem + barriers,
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
