// The translation units of the sm80 family: one per pass and head dimension, in csrc/units/.
#pragma once

#include <iterator>
#include <utility>

#include "sm80/launch.h"

namespace flash::sm80 {

/// Every compiled row of kForwardRows with this head_dim.
template <int kHeadDim>
struct ForwardUnit {
  /// Launches `config`; false if it is not a row of this unit.
  static bool launch(ForwardConfig const& config, ForwardParams const& params, Device const& device,
                     Stream stream);
};

/// Every compiled row of kBackwardRows with this head_dim.
template <int kHeadDim>
struct BackwardUnit {
  static bool launch(BackwardConfig const& config, BackwardParams const& params,
                     Device const& device, Stream stream);
};

/// Calls try_row.template operator()<row>() for the compiled rows of `kRows` with this head_dim
/// until one returns true.
template <auto const& kRows, int kHeadDim, class TryRow>
bool any_compiled_row(TryRow const& try_row) {
  auto visit = [&]<std::size_t kIdx>() {
    if constexpr (kRows[kIdx].head_dim == kHeadDim && is_compiled(kRows[kIdx].name())) {
      return try_row.template operator()<kRows[kIdx]>();
    }
    return false;
  };
  return [&]<std::size_t... kIdx>(std::index_sequence<kIdx...>) {
    return (visit.template operator()<kIdx>() || ...);
  }(std::make_index_sequence<std::size(kRows)>{});
}

}  // namespace flash::sm80
