// Copies of boxes of a (batch, seqlen, heads, head_dim) tensor by Hopper's copy engine (TMA).
#pragma once

#include <cuda.h>

#include "arith/integer.h"

namespace flash {

__device__ __forceinline__ void prefetch_tensormap(CUtensorMap const& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// Starts the copy of the map's box at (col, row) of one head to shared memory; its bytes count
/// towards the barrier's phase. What lies outside of the tensor becomes zero.
__device__ __forceinline__ void tma_load(uint32_t smem_address, CUtensorMap const& map,
                                         uint32_t barrier, int col, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem_address),
      "l"(&map), "r"(barrier), "r"(col), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

/// Starts the copy of a box from shared memory; what lies outside of the tensor is not written.
__device__ __forceinline__ void tma_store(CUtensorMap const& map, uint32_t smem_address, int col,
                                          int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          &map),
      "r"(smem_address), "r"(col), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/// Waits until the shared memory of this thread's stores may be written again.
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
/// Makes this thread's writes to shared memory visible to the copy engine and the tensor cores.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace flash
