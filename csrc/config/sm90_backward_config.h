// THE table of compiled backward kernels of the sm90 family.
#pragma once

#include "config/kernel_filter.h"
#include "params.h"

namespace flash {

/// One compiled kernel: persistent thread blocks of one warpgroup that moves data and two that
/// compute. These own 64 keys each, or share 64 (is_paired()): then one makes P and dV, the other
/// dS and dK. The first fields say what it serves, the rest is tuning.
struct Sm90BackwardConfig {
  DType dtype;
  int head_dim, head_dim_v;  // columns of the tiles; smaller ones are filled up with zeros
  bool extras;               // softcap, ALiBi and dropout
  int tile_m, tile_n;        // a thread block owns tile_n keys and walks query tiles of tile_m rows
  int dout_stages;           // buffers of dO
  int landing_strips;        // buffers of 16 rows of dq sums in which a warp converts them

  static constexpr int kArch = 90;
  static constexpr int kStages = 2;           // buffers of Q and dS
  static constexpr int kConvertingWarps = 2;  // of dq
  static constexpr int kWarpgroups = 2;       // those that compute

  constexpr bool is_paired() const { return tile_n == 64; }
  constexpr int num_threads() const { return 128 * (kWarpgroups + 1); }

  // dQ of a query tile is made and converted in groups of 64 rows: the blocks of 64 columns of a
  // pair, else one for each warpgroup.
  constexpr int num_groups() const { return is_paired() ? head_dim / 64 : kWarpgroups; }
  constexpr int group_bytes() const {
    return tile_m * head_dim * int(sizeof(float)) / num_groups();
  }
  /// What leaves a warpgroup at once: a group of dQ, or dV of its keys, or in a pair 128 columns of
  /// dK or dV.
  constexpr int outbox_bytes() const {
    return imax(group_bytes(), 64 * imin(head_dim_v, 128) * element_size(dtype));
  }
  constexpr int smem_bytes() const {
    int const keys = tile_n * (head_dim + head_dim_v);
    int const queries = tile_m * (kStages * head_dim + dout_stages * head_dim_v);
    int const probabilities = (kStages + (is_paired() ? 1 : 0)) * tile_n * tile_m;  // dS, P
    int const landing = kConvertingWarps * landing_strips * group_bytes() / 4;
    int const statistics = (kStages + dout_stages) * tile_m * int(sizeof(float));
    constexpr int kItem = 32, kTileAlignment = 1024;
    int const barriers = 4 * kStages + 2 * dout_stages + 7 + 3 * kWarpgroups + kConvertingWarps;
    return round_up((keys + queries + probabilities) * element_size(dtype) +
                        kWarpgroups * outbox_bytes() + landing + statistics + kItem +
                        int(sizeof(uint64_t)) * barriers,
                    kTileAlignment);
  }
  constexpr RowName name() const { return row_name("bwd", kArch, head_dim, dtype, extras); }
  friend constexpr bool operator==(Sm90BackwardConfig const&, Sm90BackwardConfig const&) = default;
};

/// The first row that serves a problem is taken. Measured: docs/lessons.md ("sm90 backward"). With
/// extras 128 queries of head dim 64 need too many registers, and pairs have no code for them.
template <DType kDType>
inline constexpr Sm90BackwardConfig kSm90BackwardRows[] = {
    // clang-format off
    // dtype   d  d_v  extras  m    n  dout landing
    {kDType,  64,  64, false, 128, 128,  2,   4},
    {kDType,  64,  64, true,   64, 128,  2,   4},
    {kDType,  96,  96, false,  64, 128,  2,   4},
    {kDType,  96,  96, true,   64, 128,  2,   4},
    {kDType, 128, 128, false,  64, 128,  2,   4},
    {kDType, 128, 128, true,   64, 128,  2,   4},
    {kDType, 192, 128, false,  64,  64,  2,   4},
    {kDType, 192, 192, false,  64,  64,  1,   4},
    {kDType, 256, 256, false,  64,  64,  1,   1},
    // clang-format on
};

}  // namespace flash
