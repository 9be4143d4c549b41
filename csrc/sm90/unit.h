// The translation units of the sm90 family: one per pass and head dimension, in csrc/units/.
#pragma once

#include "config/sm90_forward_config.h"
#include "sm90/backward_params.h"
#include "sm90/forward_params.h"

namespace flash::sm90 {

/// Every compiled row of kSm90ForwardRows with this head_dim.
template <int kHeadDim>
struct ForwardUnit {
  /// Launches `config` with `num_blocks` thread blocks; false if it is not a row of this unit.
  static bool launch(Sm90ForwardConfig const& config, ForwardKernelParams const& params,
                     int num_blocks, void* stream);
};

/// Every compiled row of kSm90BackwardRows with this head_dim.
template <int kHeadDim>
struct BackwardUnit {
  /// Launches `config`, its main kernel with `num_blocks` thread blocks; false if it is not a row
  /// of this unit.
  static bool launch(Sm90BackwardConfig const& config, BackwardKernelParams const& params,
                     int num_blocks, void* stream);
};

}  // namespace flash::sm90
