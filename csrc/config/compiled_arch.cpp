#include "config/compiled_arch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace flash {
namespace {

constexpr int kOldestArch = 80;  // Ampere: cp.async and bf16 mma.sync

}  // namespace

int compiled_arch(std::vector<int> const& archs, int compute_capability) {
  int newest = 0;
  for (int const arch : archs) {
    newest = arch <= compute_capability ? std::max(newest, arch) : newest;
  }
  if (newest != 0) {
    return newest;
  }
  std::string const gpu = "flash_attn: this GPU is sm_" + std::to_string(compute_capability) + ", ";
  if (compute_capability < kOldestArch) {
    throw std::runtime_error(gpu + "older than Ampere (sm_" + std::to_string(kOldestArch) +
                             "), the oldest that there are kernels for. Use a newer GPU, tensors "
                             "on the CPU, or torch's scaled_dot_product_attention");
  }
  std::string built_for;
  for (int const arch : archs) {
    built_for.append(built_for.empty() ? "" : ";").append(std::to_string(arch));
  }
  throw std::runtime_error(gpu + "but this build holds kernels for FLASH_ATTN_CUDA_ARCHS=\"" +
                           built_for + "\" only; rebuild with FLASH_ATTN_CUDA_ARCHS=\"" +
                           std::to_string(compute_capability) + "\"");
}

}  // namespace flash
