// What this module was built with.
#pragma once

#include <string>
#include <vector>

namespace flash::binding {

/// CUDA architectures of this build, {80, 90}; empty if only the CPU backend was built.
std::vector<int> const& cuda_archs();

/// JSON object: version, torch_version (of the headers), cuda_version (null without CUDA),
/// cuda_archs, kernels (the filter), rows (names of the compiled kernels).
std::string build_info();

}  // namespace flash::binding
