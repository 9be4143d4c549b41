// Counters in global memory by which thread blocks tell each other that data is ready.
//
// The writer of the data adds after it with add_release(); the reader polls with load_relaxed() and
// then fences once. load_acquire() invalidates the L1 cache at every try: it is for values that are
// almost always there at the first look, or for who has nothing in that cache to lose.
#pragma once

#include <cstdint>

namespace flash {

__device__ __forceinline__ int load_relaxed(int const* counter) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
__device__ __forceinline__ int load_acquire(int const* counter) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
__device__ __forceinline__ void add_relaxed(int* counter, int value) {
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
/// Adds to four neighbouring floats.
__device__ __forceinline__ void add_relaxed(float* sums, float const (&values)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(sums),
               "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3])
               : "memory");
}
__device__ __forceinline__ void add_release(int* counter, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ __forceinline__ void fence_gpu() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

}  // namespace flash
