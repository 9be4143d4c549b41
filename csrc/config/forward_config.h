// THE table of compiled forward kernels.
#pragma once

#include "config/kernel_filter.h"
#include "params.h"

namespace flash {

/// One compiled forward kernel. The first four fields are the key, the rest is tuning.
struct ForwardConfig {
  int arch;  // kernel family: 80 runs on compute capability 8.0 and later
  DType dtype;
  int head_dim;  // columns of the tile; smaller head_dims are padded with zeros on load
  bool extras;   // softcap, ALiBi and dropout
  int tile_m, tile_n;
  int num_warps;      // each owns tile_m / num_warps query rows
  int blocks_per_sm;  // thread blocks side by side on an SM

  constexpr int num_threads() const { return 32 * num_warps; }
  constexpr int smem_bytes() const {
    return (tile_m + 2 * tile_n) * head_dim * element_size(dtype);
  }
  constexpr RowName name() const { return row_name("fwd", arch, head_dim, dtype, extras); }
  friend constexpr bool operator==(ForwardConfig const&, ForwardConfig const&) = default;
};

/// Rows of a 16-bit dtype; rows of one (arch, head_dim, extras) are in order of preference. The
/// first whose blocks_per_sm fit an SM's shared memory is taken, else the first that fits at all (a
/// block gets 163 KB on sm_80, 99 KB on sm_86/89/120, 227 KB on sm_90). Measured: docs/lessons.md.
template <DType kDType>
inline constexpr ForwardConfig kForwardRows[] = {
    // clang-format off
    // arch dtype head_dim extras  m    n  warps blocks
    {80, kDType,  64, false,    128, 128,  4,    2},
    {80, kDType,  64, true,      64, 128,  4,    3},
    {80, kDType,  96, false,    128,  64,  4,    2},
    {80, kDType,  96, true,     128,  64,  4,    2},
    {80, kDType, 128, false,    128,  64,  4,    2},
    {80, kDType, 128, true,     128,  64,  4,    2},
    {80, kDType, 192, false,     64,  64,  4,    2},
    {80, kDType, 192, true,      64,  64,  4,    2},
    {80, kDType, 256, false,     64,  64,  4,    2},
    {80, kDType, 256, false,    128,  64,  8,    1},
    {80, kDType, 256, true,      64,  64,  4,    2},
    // clang-format on
};

/// Rows of fp32, in the order of kForwardRows.
template <>
inline constexpr ForwardConfig kForwardRows<DType::kFp32>[] = {
    // clang-format off
    // arch dtype     head_dim extras  m    n  warps blocks
    {80, DType::kFp32,  64, false,     64,  64,  4,    2},
    {80, DType::kFp32,  64, true,      64,  64,  4,    2},
    {80, DType::kFp32,  96, false,     64,  64,  4,    2},
    {80, DType::kFp32,  96, true,      64,  64,  4,    2},
    {80, DType::kFp32, 128, false,     64,  32,  4,    2},
    {80, DType::kFp32, 128, false,    128,  32,  8,    1},
    {80, DType::kFp32, 128, true,      64,  32,  4,    2},
    {80, DType::kFp32, 128, true,     128,  32,  8,    1},
    {80, DType::kFp32, 192, false,     64,  32,  4,    2},
    {80, DType::kFp32, 192, true,      64,  32,  4,    2},
    {80, DType::kFp32, 256, false,    128,  32,  8,    1},
    {80, DType::kFp32, 256, false,    128,  16,  8,    1},
    {80, DType::kFp32, 256, false,     64,  16,  4,    1},
    {80, DType::kFp32, 256, true,     128,  32,  8,    1},
    {80, DType::kFp32, 256, true,     128,  16,  8,    1},
    {80, DType::kFp32, 256, true,      64,  16,  4,    1},
    // clang-format on
};

}  // namespace flash
