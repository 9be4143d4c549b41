// Shared memory that compiled code may count on.
#pragma once

#include "arith/integer.h"

namespace flash {

/// Most bytes of a thread block in code that is compiled for architecture `arch`. Kernels that need
/// more have no body there, also when a later GPU runs that code.
FLASH_HD constexpr int compiled_smem_limit(int arch) {
  return (arch < 90 ? 163 : 227) * 1024;
}

}  // namespace flash
