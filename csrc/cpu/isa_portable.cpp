// The kernels for any machine: four lanes, lowered by the compiler to SSE2, NEON or scalar code.
#include "cpu/kernel_table.h"

namespace flash::cpu {
namespace {

struct Portable : VectorOps<4> {
#if defined(__aarch64__)
  [[gnu::always_inline]]
  static Float fma(Float a, Float b, Float c) {
    return {__builtin_fmaf(a[0], b[0], c[0]), __builtin_fmaf(a[1], b[1], c[1]),
            __builtin_fmaf(a[2], b[2], c[2]), __builtin_fmaf(a[3], b[3], c[3])};
  }
  [[gnu::always_inline]]
  static float scalar_fma(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
  }
#endif
};

}  // namespace

constexpr Kernels kPortableKernels[3] = {kKernelsOf<Portable, Fp16>, kKernelsOf<Portable, Bf16>,
                                         kKernelsOf<Portable, float>};

}  // namespace flash::cpu
