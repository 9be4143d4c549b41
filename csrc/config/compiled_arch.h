// Which compiled code a GPU runs.
#pragma once

#include <vector>

namespace flash {

/// The architecture whose code runs on a GPU of `compute_capability` (90 for 9.0): the newest of
/// `archs`, those of the build, that is not newer. Throws with what to do if there is none.
int compiled_arch(std::vector<int> const& archs, int compute_capability);

}  // namespace flash
