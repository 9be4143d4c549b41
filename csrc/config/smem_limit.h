// Shared memory that compiled code may count on.
#pragma once

#include "arith/integer.h"

namespace flash {

/// Most bytes of a thread block in code that is compiled for architecture `arch`. Kernels that need
/// more have no body there, also when a later GPU runs that code.
FLASH_HD constexpr int compiled_smem_limit(int arch) {
  return (arch < 90 ? 163 : 227) * 1024;
}

/// False if the architecture being compiled is one whose kernels may not use so much shared memory;
/// the kernel's body is then left out, and the kernel never selected.
FLASH_HD constexpr bool fits_compiled_arch([[maybe_unused]] int smem_bytes) {
#if defined(__CUDA_ARCH__)
  return smem_bytes <= compiled_smem_limit(__CUDA_ARCH__ / 10);
#else
  return true;
#endif
}

}  // namespace flash
