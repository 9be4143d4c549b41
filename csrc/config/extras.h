// Which options on the scores a kernel of the sm90 family has code for.
#pragma once

#include "params.h"

namespace flash {

/// A kernel of one option has that and no other: it needs no branch and no register for what it
/// does not have. kAny has all of them, and looks which are on.
enum class Extras : uint8_t { kNone, kSoftcap, kAlibi, kDropout, kAny };

/// True if a kernel that has `extras` serves the problem.
template <class Params>
constexpr bool serves_options(Extras extras, Params const& params) {
  bool const softcap = params.scores.softcap != 0.f;
  bool const alibi = params.scores.alibi_slopes != nullptr;
  bool const dropout = params.dropout.rng_state != nullptr;
  return extras == Extras::kAny
             ? softcap || alibi || dropout
             : softcap == (extras == Extras::kSoftcap) && alibi == (extras == Extras::kAlibi) &&
                   dropout == (extras == Extras::kDropout);
}

}  // namespace flash
