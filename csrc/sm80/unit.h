// The translation units of the sm80 family: one per pass, width of elements and head dimension, in
// csrc/units/.
#pragma once

#include "sm80/launch.h"

namespace flash::sm80 {

/// Every compiled row of kForwardRows with this head_dim, of the dtypes with such elements.
template <int kHeadDim, int kElementBytes>
struct ForwardUnit {
  /// Launches `config`; false if it is not a row of this unit.
  static bool launch(ForwardConfig const& config, ForwardParams const& params, Device const& device,
                     Stream stream);
};

/// The same of kBackwardRows.
template <int kHeadDim, int kElementBytes>
struct BackwardUnit {
  static bool launch(BackwardConfig const& config, BackwardParams const& params,
                     Device const& device, Stream stream);
};

}  // namespace flash::sm80
