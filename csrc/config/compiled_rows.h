// From a row of a kernel table to the translation unit and the template instance that hold its
// kernel.
#pragma once

#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include "config/kernel_filter.h"

namespace flash {

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

/// Calls launch_unit.template operator()<head_dim>() for the unit of `config`. Throws if that unit
/// does not hold the row.
template <class Config, class LaunchUnit>
void launch_in_unit(Config const& config, LaunchUnit const& launch_unit) {
  auto const try_unit = [&]<int kHeadDim>() {
    return config.head_dim == kHeadDim && launch_unit.template operator()<kHeadDim>();
  };
  bool const launched = try_unit.template operator()<64>() || try_unit.template operator()<96>() ||
                        try_unit.template operator()<128>() ||
                        try_unit.template operator()<192>() || try_unit.template operator()<256>();
  if (!launched) {
    throw std::runtime_error("flash_attn: " + std::string(std::string_view(config.name())) +
                             " is not compiled into this build");
  }
}

}  // namespace flash
