// Products of one warpgroup on Hopper's tensor cores: wgmma m64nNk16, 16-bit operands, fp32
// accumulators, and what orders them. Own wrappers: CUTLASS's headers of these shapes cost
// 3 s of compile time a unit, this one none that shows.
//
// Accumulator of a 64 x N product: warp w of the group holds rows 16w to 16w + 15 as the N / 8
// fragments of mma.cuh, float[N / 8][4]; an A operand in registers is a Piece of mma.cuh.
#pragma once

#include "device/element.cuh"
#include "device/smem_tile.cuh"

namespace flash {

/// Matrix descriptor of a tile: bits 0-13 its address, 16-29 the bytes between column blocks (read
/// for an operand whose columns are N alone), 32-45 the bytes between groups of eight rows, all in
/// units of 16 bytes; 62-63 the swizzle. The tile begins at a multiple of 1024 bytes.
template <class Tile>
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle = Tile::kRowBytes == 128 ? 1 : 2;
  return kSwizzle << 62 | uint64_t(8 * Tile::kRowBytes / 16) << 32 |
         uint64_t(Tile::kBlockBytes / 16) << 16 | (address & 0x3ffff) >> 4;
}
/// What leads a descriptor `bytes` further.
constexpr uint64_t descriptor_step(int bytes) {
  return bytes / 16;
}
/// The descriptor of what lies `bytes` further. Only its low word changes, in which an address
/// can't overflow: that spares an addition with carry between two products.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, int bytes) {
  uint32_t const low = uint32_t(descriptor) + uint32_t(bytes / 16);
  return (descriptor & 0xffffffff00000000) | low;
}
/// Bytes to step k, of 16 columns, of an operand whose columns are K.
template <class Tile>
constexpr int columns_step(int k) {
  return 16 * k / Tile::kBlockCols * Tile::kBlockBytes + 16 * k % Tile::kBlockCols * 2;
}
/// Bytes to step k, of 16 rows, of an operand whose rows are K.
template <class Tile>
constexpr int rows_step(int k) {
  return 16 * k * Tile::kRowBytes;
}

/// Orders register accesses of the warpgroup before the products issued after it.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/// Closes the group of products issued since the last call.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Waits until at most kPending groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Keeps the compiler from moving what produces or reads these values across this point, for it
/// does not know that products in flight use them.
template <int kN>
__device__ __forceinline__ void pin(float (&acc)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      asm volatile("" : "+f"(acc[n][e])::"memory");
    }
  }
}
template <int kN>
__device__ __forceinline__ void pin(uint32_t (&operand)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      asm volatile("" : "+r"(operand[n][e])::"memory");
    }
  }
}

/// d = (accumulate ? d : 0) + a b. ss: a from shared memory, rs: from registers. kRowsAreK: how b
/// lies in shared memory, kRowsOfAAreK: how a does.
template <int kN, DType kDType>
struct Wgmma;

// The instruction names all its accumulators, so its text is written once per N, by macros.
// clang-format off
#define FLASH_D8(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3]), \
                    "+f"(d[n + 1][0]), "+f"(d[n + 1][1]), "+f"(d[n + 1][2]), "+f"(d[n + 1][3])
#define FLASH_D32(n) FLASH_D8(n), FLASH_D8(n + 2), FLASH_D8(n + 4), FLASH_D8(n + 6)
#define FLASH_D16(n) FLASH_D8(n), FLASH_D8(n + 2)
#define FLASH_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FLASH_R32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASH_R40 FLASH_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FLASH_R48 FLASH_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FLASH_R56 FLASH_R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FLASH_R64 FLASH_R56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FLASH_R96 FLASH_R64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
                  "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, " \
                  "%94, %95"
#define FLASH_R128 FLASH_R96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, " \
                   "%108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, " \
                   "%121, %122, %123, %124, %125, %126, %127"

// R: the accumulators' names; i0 to i6: the names of the operands after them; then the accumulators.
#define FLASH_WGMMA(N, DTYPE, TYPE, R, i0, i1, i2, i3, i4, i5, i6, ...)                           \
  template <>                                                                                     \
  struct Wgmma<N, DType::DTYPE> {                                                                 \
    template <bool kRowsAreK, bool kRowsOfAAreK = false>                                          \
    static __device__ __forceinline__ void ss(float (&d)[N / 8][4], uint64_t a, uint64_t b,       \
                                              int accumulate) {                                   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i2 ", 0;\n"                                \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                \
                   " {" R "}, " i0 ", " i1 ", p, 1, 1, " i4 ", " i3 ";\n}\n"                      \
                   : __VA_ARGS__ : "l"(a), "l"(b), "r"(accumulate), "n"(int(kRowsAreK)),          \
                     "n"(int(kRowsOfAAreK)));                                                     \
    }                                                                                             \
    template <bool kRowsAreK>                                                                     \
    static __device__ __forceinline__ void rs(float (&d)[N / 8][4], uint32_t const (&a)[4],       \
                                              uint64_t b, int accumulate) {                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i5 ", 0;\n"                                \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE                \
                   " {" R "}, {" i0 ", " i1 ", " i2 ", " i3 "}, " i4 ", p, 1, 1, " i6 ";\n}\n"    \
                   : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),            \
                     "r"(accumulate), "n"(int(kRowsAreK)));                                       \
    }                                                                                             \
  };
#define FLASH_WGMMA_BOTH(N, ...)                \
  FLASH_WGMMA(N, kBf16, "bf16", __VA_ARGS__)    \
  FLASH_WGMMA(N, kFp16, "f16", __VA_ARGS__)

FLASH_WGMMA_BOTH(32, FLASH_R16, "%16", "%17", "%18", "%19", "%20", "%21", "%22", FLASH_D16(0))
FLASH_WGMMA_BOTH(64, FLASH_R32, "%32", "%33", "%34", "%35", "%36", "%37", "%38",
                 FLASH_D32(0))
FLASH_WGMMA_BOTH(80, FLASH_R40, "%40", "%41", "%42", "%43", "%44", "%45", "%46",
                 FLASH_D32(0), FLASH_D8(8))
FLASH_WGMMA_BOTH(96, FLASH_R48, "%48", "%49", "%50", "%51", "%52", "%53", "%54",
                 FLASH_D32(0), FLASH_D8(8), FLASH_D8(10))
FLASH_WGMMA_BOTH(112, FLASH_R56, "%56", "%57", "%58", "%59", "%60", "%61", "%62",
                 FLASH_D32(0), FLASH_D8(8), FLASH_D8(10), FLASH_D8(12))
FLASH_WGMMA_BOTH(128, FLASH_R64, "%64", "%65", "%66", "%67", "%68", "%69", "%70",
                 FLASH_D32(0), FLASH_D32(8))
FLASH_WGMMA_BOTH(192, FLASH_R96, "%96", "%97", "%98", "%99", "%100", "%101", "%102",
                 FLASH_D32(0), FLASH_D32(8), FLASH_D32(16))
FLASH_WGMMA_BOTH(256, FLASH_R128, "%128", "%129", "%130", "%131", "%132", "%133", "%134",
                 FLASH_D32(0), FLASH_D32(8), FLASH_D32(16), FLASH_D32(24))
// clang-format on

#undef FLASH_D8
#undef FLASH_D16
#undef FLASH_D32
#undef FLASH_R16
#undef FLASH_R32
#undef FLASH_R40
#undef FLASH_R48
#undef FLASH_R56
#undef FLASH_R64
#undef FLASH_R96
#undef FLASH_R128
#undef FLASH_WGMMA
#undef FLASH_WGMMA_BOTH

}  // namespace flash
