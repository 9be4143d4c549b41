// The one statement of which key a query row may attend to.
#pragma once

#include "arith/integer.h"

namespace flash {

/// Window around the diagonal, aligned to the bottom-right corner of the (seqlen_q, seqlen_k) score
/// matrix. A negative bound is unbounded; causal is window_right == 0.
struct Mask {
  int window_left = -1;
  int window_right = -1;

  FLASH_HD constexpr bool is_bounded() const { return window_left >= 0 || window_right >= 0; }
};

/// Half-open range of keys.
struct KeyRange {
  int begin;
  int end;
};

/// Keys that query row i attends to: [i + seqlen_k - seqlen_q - left, i + seqlen_k - seqlen_q +
/// right], cut to [0, seqlen_k). May be empty (end <= begin). A bound near INT_MAX is a legal way
/// to say "unbounded", so bounds are cut before anything is added to them.
FLASH_HD constexpr KeyRange visible_keys(Mask mask, int i, int seqlen_q, int seqlen_k) {
  int const left = mask.window_left, right = mask.window_right;
  int const diagonal = i + (seqlen_k - seqlen_q);
  return {left < 0 ? 0 : imin(imax(diagonal, left) - left, seqlen_k),
          right < 0
              ? seqlen_k
              : (diagonal >= seqlen_k - 1 - right ? seqlen_k : imax(diagonal + right + 1, 0))};
}

/// True if some query row does not attend to some key. Both bounds of visible_keys() grow with the
/// row.
FLASH_HD constexpr bool hides_any_key(Mask mask, int seqlen_q, int seqlen_k) {
  return seqlen_q > 0 && (visible_keys(mask, 0, seqlen_q, seqlen_k).end < seqlen_k ||
                          visible_keys(mask, seqlen_q - 1, seqlen_q, seqlen_k).begin > 0);
}

/// True if query row i attends to key j.
FLASH_HD constexpr bool attends(Mask mask, int i, int j, int seqlen_q, int seqlen_k) {
  KeyRange const keys = visible_keys(mask, i, seqlen_q, seqlen_k);
  return keys.begin <= j && j < keys.end;
}

}  // namespace flash
