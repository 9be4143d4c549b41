// The element types, their packing and stores of them.
#pragma once

#include "device/shared_memory.cuh"
#include "params.h"

namespace flash {

/// Two floats rounded to nearest even and packed: `low` in bits 0-15, `high` in bits 16-31.
template <DType kDType>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  static_assert(kDType == DType::kBf16 || kDType == DType::kFp16, "tensor cores take 16-bit types");
  uint32_t packed;
  if constexpr (kDType == DType::kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

/// The two halves of a packed pair as floats.
template <DType kDType>
__device__ __forceinline__ float2 unpack2(uint32_t packed) {
  float2 pair;
  if constexpr (kDType == DType::kBf16) {
    pair.x = __uint_as_float(packed << 16);
    pair.y = __uint_as_float(packed & 0xffff0000u);
  } else {
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(packed));
  }
  return pair;
}

/// Products of two packed pairs.
template <DType kDType>
__device__ __forceinline__ uint32_t multiply2(uint32_t a, uint32_t b) {
  uint32_t product;
  if constexpr (kDType == DType::kBf16) {
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  } else {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  }
  return product;
}

/// Two neighbours of a row.
template <DType kDType>
struct PackedPair {
  uint32_t word[element_size(kDType) / 2];

  __device__ __forceinline__ PackedPair(float left, float right) {
    if constexpr (kDType == DType::kFp32) {
      word[0] = __float_as_uint(left);
      word[1] = __float_as_uint(right);
    } else {
      word[0] = pack2<kDType>(left, right);
    }
  }
};

template <DType kDType>
__device__ __forceinline__ void store_pair(uint32_t address, PackedPair<kDType> const& pair) {
  if constexpr (kDType == DType::kFp32) {
    store_shared_8(address, pair.word[0], pair.word[1]);
  } else {
    store_shared(address, pair.word[0]);
  }
}

/// 2^x by the special function unit; 2^-inf is 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// log2(x) by the special function unit; of 0 it is -inf.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
__device__ constexpr float kInfinity = __builtin_huge_valf();

}  // namespace flash
