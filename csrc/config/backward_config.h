// THE table of compiled backward kernels.
#pragma once

#include "config/kernel_filter.h"
#include "params.h"

namespace flash {

/// One compiled backward kernel. The first four fields are the key, the rest is tuning.
struct BackwardConfig {
  int arch;
  DType dtype;
  int head_dim;
  bool extras;         // softcap, ALiBi and dropout
  int tile_m, tile_n;  // a thread block owns tile_n keys and walks query tiles of tile_m rows
  int num_warps;
  int warps_m_s;      // warps along the query rows of S and dP; the rest lie along the keys
  int warps_n_dkv;    // warps along the keys of dK and dV; the rest lie along head_dim
  int warps_m_dq;     // warps along the query rows of dQ; the rest lie along head_dim
  int num_stages;     // buffers of Q and dO
  int blocks_per_sm;  // thread blocks side by side on an SM

  constexpr int num_threads() const { return 32 * num_warps; }
  /// True if every warp has the scores, dK and dV of the same keys: P then stays in its registers.
  constexpr bool keys_own_warps() const {
    return warps_m_s == 1 && warps_n_dkv == num_warps && !extras && element_size(dtype) == 2;
  }
  constexpr int smem_bytes() const {
    int const operands = (2 * tile_n + 2 * num_stages * tile_m) * head_dim;
    int const gradients = (keys_own_warps() ? 1 : 2) * tile_m * tile_n;  // dS, and P
    int const row_stats = keys_own_warps() ? 2 * 4 * tile_m : 0;         // bytes
    return (operands + gradients) * element_size(dtype) + row_stats;
  }
  constexpr RowName name() const { return row_name("bwd", arch, head_dim, dtype, extras); }
  friend constexpr bool operator==(BackwardConfig const&, BackwardConfig const&) = default;
};

/// Of a 16-bit dtype; order of preference as in kForwardRows.
template <DType kDType>
inline constexpr BackwardConfig kBackwardRows[] = {
    // clang-format off
    // arch dtype head_dim extras  m    n  warps  m_s n_dkv m_dq stages blocks
    {80, kDType,  64, false,     64, 128,  4,     1,   4,   2,    2,    2},
    {80, kDType,  64, true,     128,  64,  4,     2,   2,   2,    1,    2},
    {80, kDType,  96, false,     64,  64,  4,     2,   2,   2,    2,    2},
    {80, kDType,  96, true,      64,  64,  4,     2,   2,   2,    2,    2},
    {80, kDType, 128, false,     64, 128,  8,     2,   4,   2,    2,    1},
    {80, kDType, 128, false,     64,  64,  4,     2,   2,   2,    1,    2},
    {80, kDType, 128, true,      64,  64,  4,     2,   2,   2,    2,    2},
    {80, kDType, 128, true,      64,  64,  4,     2,   2,   2,    1,    2},
    {80, kDType, 192, false,     64,  96,  8,     4,   2,   2,    2,    1},
    {80, kDType, 192, false,     64,  96,  8,     4,   2,   2,    1,    1},
    {80, kDType, 192, false,     32,  64,  8,     2,   4,   2,    1,    1},
    {80, kDType, 192, true,      64,  96,  8,     4,   2,   2,    1,    1},
    {80, kDType, 192, true,      32,  64,  8,     2,   4,   2,    1,    1},
    {80, kDType, 256, false,     64,  64,  8,     2,   2,   2,    2,    1},
    {80, kDType, 256, false,     32,  64,  8,     2,   2,   2,    2,    1},
    {80, kDType, 256, false,     32,  32,  4,     2,   2,   1,    1,    1},
    {80, kDType, 256, true,      64,  64,  8,     2,   2,   2,    2,    1},
    {80, kDType, 256, true,      32,  64,  8,     2,   2,   2,    2,    1},
    {80, kDType, 256, true,      32,  32,  4,     2,   2,   1,    1,    1},
    // clang-format on
};

/// Rows of fp32. One buffer of Q and dO: its copy is short beside three products for each.
template <>
inline constexpr BackwardConfig kBackwardRows<DType::kFp32>[] = {
    // clang-format off
    // arch dtype     head_dim extras  m    n  warps  m_s n_dkv m_dq stages blocks
    {80, DType::kFp32,  64, false,     64,  64,  8,     4,   4,   4,    1,    1},
    {80, DType::kFp32,  64, true,      64,  64,  8,     4,   4,   4,    1,    1},
    {80, DType::kFp32,  96, false,     64,  64,  8,     4,   4,   4,    1,    1},
    {80, DType::kFp32,  96, false,     32,  32,  4,     2,   2,   2,    1,    1},
    {80, DType::kFp32,  96, true,      64,  64,  8,     4,   4,   4,    1,    1},
    {80, DType::kFp32,  96, true,      32,  32,  4,     2,   2,   2,    1,    1},
    {80, DType::kFp32, 128, false,     64,  64,  8,     4,   4,   4,    1,    1},
    {80, DType::kFp32, 128, false,     32,  32,  4,     2,   2,   2,    1,    1},
    {80, DType::kFp32, 128, true,      64,  64,  8,     4,   4,   4,    1,    1},
    {80, DType::kFp32, 128, true,      32,  32,  4,     2,   2,   2,    1,    1},
    {80, DType::kFp32, 192, false,     64,  64,  8,     4,   4,   4,    1,    1},
    {80, DType::kFp32, 192, false,     32,  64,  8,     2,   4,   2,    1,    1},
    {80, DType::kFp32, 192, false,     16,  32,  4,     1,   2,   1,    1,    1},
    {80, DType::kFp32, 192, true,      64,  64,  8,     4,   4,   4,    1,    1},
    {80, DType::kFp32, 192, true,      32,  64,  8,     2,   4,   2,    1,    1},
    {80, DType::kFp32, 192, true,      16,  32,  4,     1,   2,   1,    1,    1},
    {80, DType::kFp32, 256, false,     64,  32,  8,     4,   2,   4,    1,    1},
    {80, DType::kFp32, 256, false,     32,  32,  8,     2,   2,   2,    1,    1},
    {80, DType::kFp32, 256, false,     16,  16,  4,     1,   1,   1,    1,    1},
    {80, DType::kFp32, 256, true,      64,  32,  8,     4,   2,   4,    1,    1},
    {80, DType::kFp32, 256, true,      32,  32,  8,     2,   2,   2,    1,    1},
    {80, DType::kFp32, 256, true,      16,  16,  4,     1,   1,   1,    1,    1},
    // clang-format on
};

}  // namespace flash
