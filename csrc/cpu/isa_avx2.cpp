// The kernels for x86-64 with AVX2, FMA and F16C. Everything that is not a template over the
// instruction set is included before the target pragma: an inline function compiled for AVX2 could
// be the copy that the linker keeps for the whole library, and fault on an older processor.
#if defined(__x86_64__)

#include <immintrin.h>

#include <atomic>
#include <cmath>
#include <cstring>

#include "arith/block_range.h"
#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "cpu/kernel_table.h"

namespace flash::cpu {
namespace {

struct Avx2 : VectorOps<8> {
  using VectorOps<8>::load;
  using VectorOps<8>::store;

  [[gnu::always_inline]]
  static Float load(Fp16 const* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<__m128i const*>(from)));
  }
  [[gnu::always_inline]]
  static void store(Fp16* to, Float x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  [[gnu::always_inline]]
  static Float fma(Float a, Float b, Float c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  [[gnu::always_inline]]
  static float scalar_fma(float a, float b, float c) {
    return __builtin_fmaf(a, b, c);
  }
  [[gnu::always_inline]]
  static Float max(Float a, Float b) {
    return _mm256_max_ps(a, b);
  }
  [[gnu::always_inline]]
  static Float min(Float a, Float b) {
    return _mm256_min_ps(a, b);
  }
};

}  // namespace

constexpr Kernels kAvx2Kernels[3] = {kKernelsOf<Avx2, Fp16>, kKernelsOf<Avx2, Bf16>,
                                     kKernelsOf<Avx2, float>};

}  // namespace flash::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
