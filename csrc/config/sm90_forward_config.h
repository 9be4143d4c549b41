// THE table of compiled forward kernels of the sm90 family.
#pragma once

#include <climits>

#include "config/extras.h"
#include "config/kernel_filter.h"

namespace flash {

/// kNone hides no pair of query and key; kBounded has a window with bounds known at run time.
enum class MaskClass : uint8_t { kNone, kBounded };

/// One compiled kernel: persistent thread blocks of one warpgroup that loads and tile_m / 64 that
/// compute 64 rows each. The first fields say what it serves, the rest is tuning.
struct Sm90ForwardConfig {
  DType dtype;
  int head_dim, head_dim_v;  // columns of the tiles; smaller ones are filled up with zeros
  MaskClass mask;
  Extras extras;
  int max_seqlen_q;
  int tile_m, tile_n;
  int q_stages;            // buffers of 64 rows of Q
  int k_stages, v_stages;  // buffers of tile_n rows of K and V
  bool out_in_v;           // out leaves through buffers of V, else through buffers of its own
  bool ping_pong;          // the computing warpgroups take turns to issue products
  bool rows_in_turn;       // softmax of a lane's second row behind that of its first

  static constexpr int kArch = 90;
  static constexpr int kWorkStages = 2;  // tiles that are handed out ahead

  constexpr int num_warpgroups() const { return tile_m / 64; }
  constexpr int num_threads() const { return 128 * (num_warpgroups() + 1); }
  constexpr int smem_bytes() const {
    int const elements = 64 * q_stages * head_dim +
                         tile_n * (k_stages * head_dim + v_stages * head_dim_v) +
                         (out_in_v ? 0 : tile_m * head_dim_v);
    int const barriers = 2 * (q_stages + k_stages + v_stages + kWorkStages);
    constexpr int kTileAlignment = 1024;
    return round_up(
        elements * element_size(dtype) + 32 * kWorkStages + int(sizeof(uint64_t)) * barriers,
        kTileAlignment);
  }
  constexpr RowName name() const {
    return row_name("fwd", kArch, head_dim, dtype, extras != Extras::kNone);
  }
  friend constexpr bool operator==(Sm90ForwardConfig const&, Sm90ForwardConfig const&) = default;
};

/// The first row that serves a problem is taken; rows of extras serve any mask. Each was the
/// fastest of several in the runs of docs/lessons_sm90.md: 192 query rows a tile where three
/// warpgroups' accumulators fit the registers and the sequence is long enough to fill the tile;
/// then as many keys as registers and shared memory leave.
template <DType kDType>
inline constexpr Sm90ForwardConfig kSm90ForwardRows[] = {
    // clang-format off
    // dtype   d  d_v  mask                 extras            seqlen_q  m    n   q  k  v  out_in_v ping_pong in_turn
    {kDType,  64,  64, MaskClass::kNone,    Extras::kNone,        256, 128, 128, 4, 4, 4,  false,   true,    false},
    {kDType,  64,  64, MaskClass::kNone,    Extras::kNone,    INT_MAX, 192, 128, 6, 4, 4,  false,   false,   false},
    {kDType,  64,  64, MaskClass::kBounded, Extras::kNone,       1024, 128, 128, 4, 4, 4,  false,   true,    false},
    {kDType,  64,  64, MaskClass::kBounded, Extras::kNone,    INT_MAX, 192, 128, 6, 4, 4,  false,   true,    false},
    {kDType,  64,  64, MaskClass::kBounded, Extras::kSoftcap, INT_MAX, 128, 128, 4, 4, 4,  false,   true,    false},
    {kDType,  64,  64, MaskClass::kBounded, Extras::kAlibi,   INT_MAX, 128, 128, 4, 4, 4,  false,   true,    false},
    {kDType,  64,  64, MaskClass::kBounded, Extras::kDropout, INT_MAX, 128, 128, 4, 4, 4,  false,   true,    false},
    {kDType,  64,  64, MaskClass::kBounded, Extras::kAny,     INT_MAX, 128, 128, 4, 4, 4,  false,   true,    false},
    {kDType,  96,  96, MaskClass::kNone,    Extras::kNone,       1024, 128, 128, 4, 2, 2,  false,   true,    false},
    {kDType,  96,  96, MaskClass::kNone,    Extras::kNone,    INT_MAX, 192, 112, 4, 3, 3,  false,   true,    false},
    {kDType,  96,  96, MaskClass::kBounded, Extras::kNone,       2048, 128, 128, 4, 2, 2,  false,   true,    false},
    {kDType,  96,  96, MaskClass::kBounded, Extras::kNone,    INT_MAX, 192, 112, 4, 3, 3,  false,   true,    false},
    {kDType,  96,  96, MaskClass::kBounded, Extras::kSoftcap, INT_MAX, 128, 128, 4, 2, 2,  false,   true,    false},
    {kDType,  96,  96, MaskClass::kBounded, Extras::kAlibi,   INT_MAX, 128, 128, 4, 2, 2,  false,   true,    false},
    {kDType,  96,  96, MaskClass::kBounded, Extras::kDropout, INT_MAX, 128, 128, 4, 2, 2,  false,   true,    false},
    {kDType,  96,  96, MaskClass::kBounded, Extras::kAny,     INT_MAX, 128, 128, 4, 2, 2,  false,   true,    false},
    {kDType, 128, 128, MaskClass::kNone,    Extras::kNone,    INT_MAX, 128, 128, 4, 2, 2,  false,   true,    true},
    {kDType, 128, 128, MaskClass::kBounded, Extras::kNone,    INT_MAX, 128, 128, 4, 2, 2,  false,   true,    true},
    {kDType, 128, 128, MaskClass::kBounded, Extras::kSoftcap, INT_MAX, 128, 128, 4, 2, 2,  false,   true,    true},
    {kDType, 128, 128, MaskClass::kBounded, Extras::kAlibi,   INT_MAX, 128, 128, 4, 2, 2,  false,   true,    true},
    {kDType, 128, 128, MaskClass::kBounded, Extras::kDropout, INT_MAX, 128, 128, 4, 2, 2,  false,   true,    true},
    {kDType, 128, 128, MaskClass::kBounded, Extras::kAny,     INT_MAX, 128, 112, 4, 2, 2,  false,   true,    true},
    {kDType, 192, 128, MaskClass::kNone,    Extras::kNone,    INT_MAX, 128, 128, 2, 2, 2,  true,    true,    false},
    {kDType, 192, 128, MaskClass::kBounded, Extras::kNone,    INT_MAX, 128, 128, 2, 2, 2,  true,    true,    false},
    {kDType, 192, 128, MaskClass::kBounded, Extras::kSoftcap, INT_MAX, 128, 128, 2, 2, 2,  true,    true,    false},
    {kDType, 192, 128, MaskClass::kBounded, Extras::kAlibi,   INT_MAX, 128, 128, 2, 2, 2,  true,    true,    false},
    {kDType, 192, 128, MaskClass::kBounded, Extras::kDropout, INT_MAX, 128, 128, 2, 2, 2,  true,    true,    false},
    {kDType, 192, 128, MaskClass::kBounded, Extras::kAny,     INT_MAX, 128, 112, 2, 2, 2,  true,    true,    false},
    {kDType, 192, 192, MaskClass::kNone,    Extras::kNone,    INT_MAX, 128,  80, 2, 2, 2,  false,   true,    false},
    {kDType, 192, 192, MaskClass::kBounded, Extras::kNone,    INT_MAX, 128,  80, 2, 2, 2,  false,   true,    false},
    {kDType, 192, 192, MaskClass::kBounded, Extras::kSoftcap, INT_MAX, 128,  80, 2, 2, 2,  false,   true,    false},
    {kDType, 192, 192, MaskClass::kBounded, Extras::kAlibi,   INT_MAX, 128,  80, 2, 2, 2,  false,   true,    false},
    {kDType, 192, 192, MaskClass::kBounded, Extras::kDropout, INT_MAX, 128,  80, 2, 2, 2,  false,   true,    false},
    {kDType, 192, 192, MaskClass::kBounded, Extras::kAny,     INT_MAX, 128,  80, 2, 2, 2,  false,   true,    false},
    {kDType, 256, 256, MaskClass::kNone,    Extras::kNone,    INT_MAX, 128,  64, 2, 2, 3,  true,    true,    false},
    {kDType, 256, 256, MaskClass::kBounded, Extras::kNone,    INT_MAX, 128,  64, 2, 2, 3,  true,    true,    false},
    {kDType, 256, 256, MaskClass::kBounded, Extras::kSoftcap, INT_MAX, 128,  64, 2, 2, 3,  true,    true,    false},
    {kDType, 256, 256, MaskClass::kBounded, Extras::kAlibi,   INT_MAX, 128,  64, 2, 2, 3,  true,    true,    false},
    {kDType, 256, 256, MaskClass::kBounded, Extras::kDropout, INT_MAX, 128,  64, 2, 2, 3,  true,    true,    false},
    {kDType, 256, 256, MaskClass::kBounded, Extras::kAny,     INT_MAX, 128,  64, 2, 2, 3,  true,    true,    false},
    // clang-format on
};

}  // namespace flash
