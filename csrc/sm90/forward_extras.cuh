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

/// Clears the probabilities that dropout drops: in the order of their bits, of which the compiler
/// makes seven predicates an instruction.
template <int kN, class Kept>
__device__ __forceinline__ void drop(float (&probabilities)[kN][4], Kept const& kept) {
#pragma unroll
  for (int eight = 0; eight < kN; eight += 8) {
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
#pragma unroll
      for (int bit = 0; bit < 8; ++bit) {
        int const n = eight + bit / 4 * 4 + byte / 2 * 2 + bit % 2;
        int const i = bit / 2 % 2 * 2 + byte % 2;
        if (n < kN && !kept.is_kept(n, i)) {
          probabilities[n][i] = 0.f;
        }
      }
    }
  }
}

}  // namespace flash::sm90
