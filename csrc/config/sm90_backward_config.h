// THE table of compiled backward kernels of the sm90 family.
#pragma once

#include "config/extras.h"
#include "config/kernel_filter.h"

namespace flash {

/// One compiled kernel: persistent thread blocks of one warpgroup that moves data and two that
/// compute. These own 64 keys each, or share 64 (is_paired()): then one makes P and dV, the other
/// dS and dK, and two thread blocks, a cluster, share a key tile and each query tile's dQ. The
/// first fields say what it serves, the rest is tuning.
struct Sm90BackwardConfig {
  DType dtype;
  int head_dim, head_dim_v;  // columns of the tiles; smaller ones are filled up with zeros
  Extras extras;
  int tile_m, tile_n;  // a cluster owns tile_n keys and walks query tiles of tile_m rows
  int dout_stages;     // buffers of dO
  int landing_strips;  // buffers of 16 rows of dq sums in which a warp converts them

  static constexpr int kArch = 90;
  static constexpr int kStages = 2;           // buffers of Q and dS
  static constexpr int kConvertingWarps = 2;  // of dq
  static constexpr int kWarpgroups = 2;       // those that compute

  constexpr bool is_paired() const { return head_dim > 128; }
  constexpr int cluster_blocks() const { return is_paired() ? 2 : 1; }
  constexpr int block_keys() const { return tile_n / cluster_blocks(); }
  constexpr int num_threads() const { return 128 * (kWarpgroups + 1); }

  /// True if each warpgroup makes all of dQ of every second query tile, else half of each: a
  /// product can't begin amid a block of K's columns, so not all numbers of columns have halves.
  constexpr bool takes_dq_in_turn() const {
    return !is_paired() && tile_m == 64 && head_dim % 128 != 0;
  }
  /// True if there are registers for V: a left operand in them is not read for every query tile.
  constexpr bool keeps_v() const { return head_dim == 96; }

  // dQ of a query tile is handed over and converted in groups of 64 rows: 32 columns of a pair,
  // else what a warpgroup makes.
  constexpr int num_groups() const {
    return is_paired() ? head_dim / 32 : takes_dq_in_turn() ? 1 : kWarpgroups;
  }
  constexpr int group_bytes() const {
    return tile_m * head_dim * int(sizeof(float)) / num_groups();
  }
  /// What leaves a warpgroup at once through shared memory: a group of dQ, or dV of its keys. Of a
  /// pair dQ leaves straight from registers, dV and dK through buffers that are free by then.
  constexpr int outbox_bytes() const {
    return is_paired() ? 0 : imax(group_bytes(), 64 * head_dim_v * element_size(dtype));
  }
  /// Columns of the other thread block's K that a thread block needs for its half of dQ.
  constexpr int peer_cols() const { return is_paired() ? 128 : 0; }
  constexpr int smem_bytes() const {
    int const keys = block_keys() * (head_dim + head_dim_v + peer_cols());
    int const queries = tile_m * (kStages * head_dim + dout_stages * head_dim_v);
    int const probabilities = kStages * cluster_blocks() * block_keys() * tile_m;  // dS
    int const landing = kConvertingWarps * landing_strips * group_bytes() / 4;
    int const statistics = (kStages + dout_stages) * tile_m * int(sizeof(float));
    constexpr int kItem = 56, kTileAlignment = 1024;
    int const barriers = 7 * kStages + 2 * dout_stages + 10 + 3 * kWarpgroups + kConvertingWarps;
    return round_up((keys + queries + probabilities) * element_size(dtype) +
                        kWarpgroups * outbox_bytes() + landing + statistics + kItem +
                        int(sizeof(uint64_t)) * barriers,
                    kTileAlignment);
  }
  constexpr RowName name() const {
    return row_name("bwd", kArch, head_dim, dtype, extras != Extras::kNone);
  }
  friend constexpr bool operator==(Sm90BackwardConfig const&, Sm90BackwardConfig const&) = default;
};

/// The first row that serves a problem is taken. Measured: docs/lessons_sm90.md. With a softcap 128
/// queries of head dim 64 need too many registers, and pairs have no code for extras.
template <DType kDType>
inline constexpr Sm90BackwardConfig kSm90BackwardRows[] = {
    // clang-format off
    // dtype   d  d_v  extras                 m    n  dout landing
    {kDType,  64,  64, Extras::kNone,       128, 128,  2,   4},
    {kDType,  64,  64, Extras::kSoftcap,     64, 128,  2,   4},
    {kDType,  64,  64, Extras::kAlibi,       128, 128,  2,   4},
    {kDType,  64,  64, Extras::kDropout,     128, 128,  2,   4},
    {kDType,  64,  64, Extras::kAny,         64, 128,  2,   4},
    {kDType,  96,  96, Extras::kNone,        64, 128,  2,   4},
    {kDType,  96,  96, Extras::kSoftcap,     64, 128,  2,   4},
    {kDType,  96,  96, Extras::kAlibi,       64, 128,  2,   4},
    {kDType,  96,  96, Extras::kDropout,     64, 128,  2,   4},
    {kDType,  96,  96, Extras::kAny,         64, 128,  2,   4},
    {kDType, 128, 128, Extras::kNone,        64, 128,  2,   4},
    {kDType, 128, 128, Extras::kSoftcap,     64, 128,  2,   4},
    {kDType, 128, 128, Extras::kAlibi,       64, 128,  2,   4},
    {kDType, 128, 128, Extras::kDropout,     64, 128,  2,   4},
    {kDType, 128, 128, Extras::kAny,         64, 128,  2,   4},
    {kDType, 192, 128, Extras::kNone,        64, 128,  2,   4},
    {kDType, 192, 192, Extras::kNone,        64, 128,  2,   4},
    {kDType, 256, 256, Extras::kNone,        64, 128,  1,   4},
    // clang-format on
};

}  // namespace flash
