// Softcap, ALiBi and dropout on the scores of a warp: 16 rows of a tile.
#pragma once

#include "device/dropout.cuh"
#include "device/score_options.cuh"

namespace flash::sm90 {

/// What does not depend on the scores of a warp, and is made ready while the products still run.
template <int kPieces, bool kTransposed>
struct StepExtras {
  float slope;  // ALiBi's
  KeptBits<kPieces, kTransposed> kept;

  /// first_row and first_col are those of the pieces' first element.
  __device__ __forceinline__ void prepare(ScoreOptions const& options, Dropout const& dropout,
                                          int batch, int head, int num_heads, int first_row,
                                          int first_col) {
    slope = alibi_slope(options, batch, head);
    if (dropout.rng_state != nullptr) {
      kept.find(dropout, DropoutKey(dropout), batch * num_heads + head, first_row, first_col);
    } else {
      kept.keep_all();
    }
  }
};

}  // namespace flash::sm90
