#include "cpu/kernels.h"

namespace flash::cpu {

Kernels const& kernels(DType dtype) {
#if defined(__x86_64__)
  static bool const has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                               __builtin_cpu_supports("f16c");
  return (has_avx2 ? kAvx2Kernels : kPortableKernels)[int(dtype)];
#else
  return kPortableKernels[int(dtype)];
#endif
}

}  // namespace flash::cpu
