// Keeps the compiler from hoisting what is derived from a value out of the main loop: it is
// computed where it is used instead of being held in registers. The 128-wide kernels need all 255
// registers and spilled loop invariants otherwise (nvcc 13.0).
#pragma once

#include "arith/integer.h"

namespace flash {

/// The same value, which the compiler takes for a new one at every call.
__device__ __forceinline__ int fresh(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

__device__ __forceinline__ float fresh_float(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

template <class T>
__device__ __forceinline__ T* fresh(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}

/// threadIdx.x, read anew. Its range makes / and % by powers of two single instructions.
__device__ __forceinline__ int fresh_thread_idx() {
  int idx;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(idx));
  __builtin_assume(idx >= 0 && idx < 1024);
  return idx;
}

/// A value that all lanes share, known to be such: the compiler may hold it in a uniform register.
template <class Value>
__device__ __forceinline__ Value uniform(Value value) {
  return __shfl_sync(0xffffffffu, value, 0);
}

}  // namespace flash
