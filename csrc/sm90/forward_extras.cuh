// Softcap, ALiBi and dropout on the scores of a warp: 16 rows of a tile.
#pragma once

#include "config/extras.h"
#include "device/dropout.cuh"
#include "device/score_options.cuh"

namespace flash::sm90 {

// Which options a kernel has code for, and of these which the problem has.

template <Extras kExtras>
inline constexpr bool kMayCap = kExtras == Extras::kSoftcap || kExtras == Extras::kAny;
template <Extras kExtras>
inline constexpr bool kMayBend = kExtras == Extras::kAlibi || kExtras == Extras::kAny;
template <Extras kExtras>
inline constexpr bool kMayDrop = kExtras == Extras::kDropout || kExtras == Extras::kAny;

template <Extras kExtras>
__device__ __forceinline__ bool has_softcap(ScoreOptions const& options) {
  return kExtras == Extras::kSoftcap || (kExtras == Extras::kAny && options.softcap != 0.f);
}
template <Extras kExtras>
__device__ __forceinline__ bool has_alibi(ScoreOptions const& options) {
  return kMayBend<kExtras> && options.alibi_slopes != nullptr;
}
template <Extras kExtras>
__device__ __forceinline__ bool has_dropout(Dropout const& dropout) {
  return kMayDrop<kExtras> && dropout.rng_state != nullptr;
}

/// score_unit() in a kernel that has code for kExtras.
template <Extras kExtras>
__device__ __forceinline__ float score_unit_of(ScoreOptions const& options, float softmax_scale) {
  return has_softcap<kExtras>(options) ? options.softcap : softmax_scale;
}

/// What does not depend on the scores of a warp, and is made ready while the products still run.
template <Extras kExtras, int kPieces, bool kTransposed>
struct StepExtras {
  using Kept = KeptBits<kPieces, kTransposed>;
  AlibiLane alibi;
  Kept kept;

  /// `unit` is score_unit(), `shift` what ALiBi adds to a row's number. In branches even where they
  /// are always taken, for ptxas (13.0) moves the wait for the scores, which follows, up to the top
  /// of its basic block.
  __device__ __forceinline__ void prepare(ScoreOptions const& options, Dropout const& dropout,
                                          float unit, int batch, int head, int num_heads,
                                          PiecePlacement const& place, int shift) {
    if (has_dropout<kExtras>(dropout)) {
      kept.find(dropout, DropoutKey(dropout), batch * num_heads + head, place.first_row,
                place.first_col);
    } else {
      kept.keep_all();
    }
    if (has_alibi<kExtras>(options)) {
      alibi = AlibiLane(place, alibi_slope(options, batch, head), unit, shift);
    }
  }
};

}  // namespace flash::sm90
