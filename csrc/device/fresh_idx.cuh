// Thread and block indices that are read anew at every call. Values derived from them are then
// computed where they are used instead of being held in registers across the main loop: the
// 128-wide kernels need all 255 registers and spilled loop invariants otherwise (nvcc 13.0).
#pragma once

#include "params.h"

namespace flash {

__device__ __forceinline__ int fresh_thread_idx() {
  int idx;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(idx));
  return idx;
}

__device__ __forceinline__ int fresh_block_idx() {
  int idx;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(idx));
  return idx;
}

}  // namespace flash
