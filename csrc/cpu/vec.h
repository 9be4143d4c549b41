// Vectors of W fp32 lanes through the compiler's vector extension: the operations that the kernels
// are written in, for any machine. An instruction set derives from VectorOps and replaces what it
// does better. Everything is always inlined: a vector that crossed a real call would depend on the
// caller's instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace flash::cpu {

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr double kLn2 = 0.69314718055994530942;
inline constexpr float kInfinity = __builtin_inff();

struct Fp16 {
  uint16_t bits;
};

struct Bf16 {
  uint16_t bits;
};

template <int W>
struct VectorOps {
  static constexpr int kWidth = W;
  typedef float Float __attribute__((vector_size(4 * W)));
  typedef int32_t Int __attribute__((vector_size(4 * W)));
  typedef uint32_t Uint __attribute__((vector_size(4 * W)));
  typedef uint16_t Ushort __attribute__((vector_size(2 * W)));

  template <class V>
  [[gnu::always_inline]]
  static V load_as(void const* from) {
    V value;
    std::memcpy(&value, from, sizeof(V));
    return value;
  }

  template <class To, class From>
  [[gnu::always_inline]]
  static To convert(From x) {
    return __builtin_convertvector(x, To);
  }

  [[gnu::always_inline]]
  static Float broadcast(float x) {
    return x - Float{};
  }

  /// {first, first + 1, ...}
  [[gnu::always_inline]]
  static Int count_from(int first) {
    int32_t lanes[W];
    for (int lane = 0; lane < W; ++lane) {
      lanes[lane] = first + lane;
    }
    return load_as<Int>(lanes);
  }

  [[gnu::always_inline]]
  static Float load(float const* from) {
    return load_as<Float>(from);
  }

  [[gnu::always_inline]]
  static Float load(Bf16 const* from) {
    return Float(convert<Uint>(load_as<Ushort>(from)) << 16);
  }

  /// Moves the 5-bit exponent to fp32's place; subnormals are normalised by a subtraction.
  [[gnu::always_inline]]
  static Float load(Fp16 const* from) {
    Uint const bits = convert<Uint>(load_as<Ushort>(from));
    Uint const magnitude = (bits & 0x7fffu) << 13;
    Uint const rebiased = magnitude + (112u << 23);
    Float const subnormal = Float(rebiased + (1u << 23)) - 0x1p-14f;
    Uint const finite = magnitude < (1u << 23) ? Uint(subnormal) : rebiased;
    Uint const value = magnitude >= (31u << 23) ? rebiased + (112u << 23) : finite;
    return Float(value | (bits & 0x8000u) << 16);
  }

  [[gnu::always_inline]]
  static void store(float* to, Float x) {
    std::memcpy(to, &x, sizeof(x));
  }

  [[gnu::always_inline]]
  static void store(Bf16* to, Float x) {
    Uint const bits = Uint(x);
    Uint const rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    Uint const quiet_nan = bits >> 16 | 0x40u;
    Ushort const result = convert<Ushort>(x == x ? rounded : quiet_nan);
    std::memcpy(to, &result, sizeof(result));
  }

  /// Round to nearest even in both branches by the fp32 adder or by integer carry.
  [[gnu::always_inline]]
  static void store(Fp16* to, Float x) {
    Uint const bits = Uint(x);
    Uint const magnitude = bits & 0x7fffffffu;
    Uint const normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // Adding 0.5 leaves the value in units of 2^-24, fp16's smallest step, in the low bits.
    Uint const subnormal = Uint(Float(magnitude) + 0.5f) - (126u << 23);
    Uint const finite = magnitude < (113u << 23) ? subnormal : normal;
    Uint const overflow = magnitude > 0x7f800000u ? Uint{} + 0x7e00u : Uint{} + 0x7c00u;
    Uint const half = magnitude >= 0x477ff000u ? overflow : finite;
    Ushort const result = convert<Ushort>(half | (bits >> 16 & 0x8000u));
    std::memcpy(to, &result, sizeof(result));
  }

  /// fma and scalar_fma round alike: both fused, or both not.
  [[gnu::always_inline]]
  static Float fma(Float a, Float b, Float c) {
    return a * b + c;
  }
  [[gnu::always_inline]]
  static float scalar_fma(float a, float b, float c) {
    return a * b + c;
  }

  /// max and min return the second operand if either is NaN.
  [[gnu::always_inline]]
  static Float max(Float a, Float b) {
    return a > b ? a : b;
  }
  [[gnu::always_inline]]
  static Float min(Float a, Float b) {
    return a < b ? a : b;
  }
};

/// 2^x to 1 ulp for x <= 127; 0 below 2^-126, NaN to NaN. The number of instructions is what counts
/// here (an AVX2 core runs the chains of several vectors at once), so no case costs one that scores
/// cannot reach.
template <class Isa>
[[gnu::always_inline]]
inline typename Isa::Float exp2(typename Isa::Float x) {
  using Float = typename Isa::Float;
  using Int = typename Isa::Int;
  x = Isa::max(Isa::broadcast(-127.0f), x);
  // Adding 1.5 * 2^23 rounds x to an integer in the low bits; 127 more makes it the exponent field
  // of 2^x, which is 0, and so the factor, for x = -127.
  constexpr float kShift = 0x1.8p23f + 127.0f;
  Float const shifted = x + kShift;
  Float const factor = Float(Int(shifted) << 23);
  Float const fraction = x - (shifted - kShift);
  // Least relative error on [-0.5, 0.5] among polynomials of degree 6 with value 1 at 0: 1e-8.
  Float poly = Isa::broadcast(0x1.44138ap-13f);
  poly = Isa::fma(poly, fraction, Isa::broadcast(0x1.5f0890p-10f));
  poly = Isa::fma(poly, fraction, Isa::broadcast(0x1.3b2a54p-7f));
  poly = Isa::fma(poly, fraction, Isa::broadcast(0x1.c6af6cp-5f));
  poly = Isa::fma(poly, fraction, Isa::broadcast(0x1.ebfbe0p-3f));
  poly = Isa::fma(poly, fraction, Isa::broadcast(0x1.62e430p-1f));
  poly = Isa::fma(poly, fraction, Isa::broadcast(1.0f));
  return poly * factor;
}

/// tanh(x) to 2 ulp, NaN to NaN. A polynomial near 0, where 1 - 2 / (e^2x + 1) has lost its digits.
template <class Isa>
[[gnu::always_inline]]
inline typename Isa::Float tanh(typename Isa::Float x) {
  using Float = typename Isa::Float;
  using Int = typename Isa::Int;
  Float const one = Isa::broadcast(1.0f);
  Float const magnitude = Float(Int(x) & 0x7fffffff);
  // From 10 on it is 1 in fp32.
  Float const power = exp2<Isa>(Isa::min(Isa::broadcast(10.0f), magnitude) * (2.0f * kLog2E));
  Float const far = one - 2.0f / (power + one);
  // Of tanh(x) / x in x^2, on |x| < 0.625 (Cephes, tanhf).
  Float const square = x * x;
  Float poly = Isa::broadcast(-5.70498872745e-3f);
  poly = Isa::fma(poly, square, Isa::broadcast(2.06390887954e-2f));
  poly = Isa::fma(poly, square, Isa::broadcast(-5.37397155531e-2f));
  poly = Isa::fma(poly, square, Isa::broadcast(1.33314422036e-1f));
  poly = Isa::fma(poly, square, Isa::broadcast(-3.33332819422e-1f));
  Float const near = Isa::fma(poly * square, magnitude, magnitude);
  Float const result = magnitude < 0.625f ? near : far;
  return Float(Int(result) | (Int(x) & Int(Isa::broadcast(-0.0f))));
}

}  // namespace flash::cpu
