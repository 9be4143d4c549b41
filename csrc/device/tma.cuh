// Hopper's copy engine (TMA): boxes of a five-dimensional tensor, and plain runs of bytes.
#pragma once

#include <cuda.h>

#include "arith/integer.h"

namespace flash {

__device__ __forceinline__ void prefetch_tensormap(CUtensorMap const& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/// Where a box begins.
struct BoxOrigin {
  int col, row, head, outer, wrap;
};

/// Starts the copy of the map's box at `origin` to shared memory; its bytes count towards the
/// barrier's phase. What lies outside of the tensor becomes zero.
__device__ __forceinline__ void tma_load(uint32_t smem_address, CUtensorMap const& map,
                                         uint32_t barrier, BoxOrigin const& origin) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(smem_address),
      "l"(&map), "r"(barrier), "r"(origin.col), "r"(origin.row), "r"(origin.head),
      "r"(origin.outer), "r"(origin.wrap)
      : "memory");
}

/// For what is read or written once: L2 gives it up first.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
/// As tma_load(), with a policy for L2.
__device__ __forceinline__ void tma_load(uint32_t smem_address, CUtensorMap const& map,
                                         uint32_t barrier, BoxOrigin const& origin,
                                         uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem_address),
      "l"(&map), "r"(barrier), "r"(origin.col), "r"(origin.row), "r"(origin.head),
      "r"(origin.outer), "r"(origin.wrap), "l"(l2_policy)
      : "memory");
}

/// Starts the copy of a box from shared memory; what lies outside of the tensor is not written.
__device__ __forceinline__ void tma_store(CUtensorMap const& map, uint32_t smem_address,
                                          BoxOrigin const& origin) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], "
      "[%1];" ::"l"(&map),
      "r"(smem_address), "r"(origin.col), "r"(origin.row), "r"(origin.head), "r"(origin.outer),
      "r"(origin.wrap)
      : "memory");
}
/// As tma_store(), with a policy for L2.
__device__ __forceinline__ void tma_store(CUtensorMap const& map, uint32_t smem_address,
                                          BoxOrigin const& origin, uint64_t l2_policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group.L2::cache_hint "
      "[%0, {%2, %3, %4, %5, %6}], [%1], %7;" ::"l"(&map),
      "r"(smem_address), "r"(origin.col), "r"(origin.row), "r"(origin.head), "r"(origin.outer),
      "r"(origin.wrap), "l"(l2_policy)
      : "memory");
}

/// As tma_load(), to the same place in both thread blocks of a cluster; the bytes count towards the
/// barrier at this place in each.
__device__ __forceinline__ void tma_load_both(uint32_t smem_address, CUtensorMap const& map,
                                              uint32_t barrier, BoxOrigin const& origin) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(smem_address),
      "l"(&map), "r"(barrier), "r"(origin.col), "r"(origin.row), "r"(origin.head),
      "r"(origin.outer), "r"(origin.wrap), "h"(uint16_t{3})
      : "memory");
}

/// Starts the copy of `bytes` bytes, a multiple of 16, to shared memory; they count towards the
/// barrier's phase.
__device__ __forceinline__ void bulk_load(uint32_t smem_address, void const* source, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(smem_address),
      "l"(source), "r"(bytes), "r"(barrier)
      : "memory");
}
/// Starts a copy to a thread block of the cluster; target and barrier are the cluster's addresses.
__device__ __forceinline__ void bulk_send(uint32_t target, uint32_t smem_address, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(target),
      "r"(smem_address), "r"(bytes), "r"(barrier)
      : "memory");
}
/// Stores a word in a thread block of the cluster, without waiting; its bytes count towards the
/// barrier's phase. Both are the cluster's addresses.
__device__ __forceinline__ void store_async(uint32_t target, int value, uint32_t barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.s32 [%0], %1, [%2];" ::"r"(target),
      "r"(value), "r"(barrier)
      : "memory");
}
/// Starts the addition of floats in shared memory to global memory.
__device__ __forceinline__ void bulk_reduce_add(float* target, uint32_t smem_address,
                                                uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target),
      "r"(smem_address), "r"(bytes)
      : "memory");
}

/// Closes the group of stores and additions that this thread has started.
__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/// Waits until the shared memory of all but the last kPending groups of this thread may be written
/// again.
template <int kPending = 0>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
/// Waits until all but the last kPending groups of this thread are in global memory.
template <int kPending>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}
/// Orders this thread's accesses to global memory and those of the copy engine.
__device__ __forceinline__ void fence_async_proxy_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
/// Makes this thread's writes to shared memory visible to the copy engine and the tensor cores.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace flash
