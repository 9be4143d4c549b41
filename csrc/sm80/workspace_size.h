// Sizes of the backward's scratch memory, for host and device.
#pragma once

#include "config/backward_config.h"
#include "device/tile_list.h"

namespace flash::sm80 {

/// Rows of softmax_d.
inline int64_t num_rows(BackwardParams const& params) {
  return int64_t(params.sequences.entries_q) * params.shape.num_heads * params.softmax_d_rows;
}

/// Bytes of the fp32 dq sums.
inline int64_t dq_sums_bytes(BackwardConfig const& config, BackwardParams const& params) {
  return num_rows(params) * config.head_dim * int64_t(sizeof(float));
}

/// Bytes of lse and softmax_d as the main kernel reads them, two floats a row.
inline int64_t row_stats_bytes(BackwardParams const& params) {
  return num_rows(params) * 2 * int64_t(sizeof(float));
}

/// The ticket counter and one turn per query tile, rounded up to 16 bytes.
inline int64_t num_counters(BackwardConfig const& config, BackwardParams const& params) {
  return (num_rows(params) / config.tile_m + 4) / 4 * 4;
}

/// Key tiles of packed sequences that may be listed.
inline int64_t max_key_tiles(BackwardConfig const& config, BackwardParams const& params) {
  return params.sequences.cu_seqlens_k == nullptr
             ? 0
             : max_tiles(params.shape.seqlen_k, params.shape.batch_size, config.tile_n);
}

}  // namespace flash::sm80
