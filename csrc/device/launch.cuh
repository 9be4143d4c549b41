// Host side of a kernel launch: shared-memory opt-in once a device, errors as exceptions.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace flash {

inline void check_cuda(cudaError_t status, char const* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("flash_attn: ") + what + ": " +
                             cudaGetErrorString(status));
  }
}

/// Lets kKernel use `smem_bytes` of dynamic shared memory on the current device. The attribute call
/// costs about as much as a launch, so each device (of the first 64) is asked once.
template <auto kKernel>
void allow_shared_memory(int smem_bytes) {
  static std::atomic<uint64_t> done{0};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  uint64_t const bit = device < 64 ? uint64_t(1) << device : 0;
  if ((done.load(std::memory_order_relaxed) & bit) == 0) {
    check_cuda(
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
        "shared memory opt-in");
    done.fetch_or(bit, std::memory_order_relaxed);
  }
}

inline unsigned checked_grid(int64_t num_blocks) {
  if (num_blocks > INT32_MAX) {
    throw std::runtime_error("flash_attn: the problem has " + std::to_string(num_blocks) +
                             " tiles, at most 2147483647 fit one launch");
  }
  return unsigned(num_blocks);
}

/// Launches kKernel on a one-dimensional grid; an empty grid launches nothing.
template <auto kKernel, class... Args>
void launch(int64_t num_blocks, int num_threads, int smem_bytes, void* stream,
            Args const&... args) {
  if (num_blocks == 0) {
    return;
  }
  unsigned const grid = checked_grid(num_blocks);
  allow_shared_memory<kKernel>(smem_bytes);
  kKernel<<<grid, num_threads, smem_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  check_cuda(cudaGetLastError(), "kernel launch");
}

/// As launch(), but the kernel starts once all blocks of the stream's last kernel have called
/// griddepcontrol.launch_dependents, and has to wait for that kernel's end itself
/// (griddepcontrol.wait). Thread blocks come in clusters of kClusterBlocks.
template <auto kKernel, int kClusterBlocks = 1, class... Args>
void launch_early(int64_t num_blocks, int num_threads, int smem_bytes, void* stream,
                  Args const&... args) {
  allow_shared_memory<kKernel>(smem_bytes);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {kClusterBlocks, 1, 1};
  cudaLaunchConfig_t const config{.gridDim = {checked_grid(num_blocks), 1, 1},
                                  .blockDim = {unsigned(num_threads), 1, 1},
                                  .dynamicSmemBytes = std::size_t(smem_bytes),
                                  .stream = static_cast<cudaStream_t>(stream),
                                  .attrs = attributes,
                                  .numAttrs = kClusterBlocks > 1 ? 2u : 1u};
  check_cuda(cudaLaunchKernelEx(&config, kKernel, args...), "kernel launch");
}

}  // namespace flash
