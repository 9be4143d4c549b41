// The kernels for any machine: four lanes, lowered by the compiler to SSE2, NEON or scalar code.
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/kernel_table.h"

namespace flash::cpu {
namespace {

struct Portable : VectorOps<4> {
#if defined(__aarch64__)
  [[gnu::always_inline]]
  static Float fma(Float a, Float b, Float c) {
    return Float(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b)));
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
