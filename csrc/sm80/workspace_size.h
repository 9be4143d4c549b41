// Sizes of the backward's scratch memory, for host and device.
#pragma once

#include "config/backward_config.h"

namespace flash::sm80 {

/// Bytes of the fp32 dq sums.
inline int64_t dq_sums_bytes(BackwardConfig const& config, Shape const& shape) {
  return int64_t(shape.batch_size) * shape.num_heads * softmax_d_rows(shape.seqlen_q) *
         config.head_dim * int64_t(sizeof(float));
}

/// Bytes of lse and softmax_d as the main kernel reads them, two floats a row.
inline int64_t row_stats_bytes(Shape const& shape) {
  return int64_t(shape.batch_size) * shape.num_heads * softmax_d_rows(shape.seqlen_q) * 2 *
         int64_t(sizeof(float));
}

/// The ticket counter and one turn per (batch, head, query tile).
inline int64_t num_counters(BackwardConfig const& config, Shape const& shape) {
  return 1 + int64_t(shape.batch_size) * shape.num_heads * ceil_div(shape.seqlen_q, config.tile_m);
}

}  // namespace flash::sm80
