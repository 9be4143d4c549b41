#include "binding/cuda_device.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "binding/build_info.h"
#include "config/compiled_arch.h"
#include "config/smem_limit.h"
#include "sm90/launch.h"

// Declared by torch's header only where torch itself is built with CUDA. Weak, so that this library
// loads beside a CPU-only torch too.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace flash::binding {
namespace {

constexpr int kMaxDevices = 64;

std::atomic<int> newest_family{90};

void check_cuda(cudaError_t error, char const* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("flash_attn: ") + what + ": " + cudaGetErrorString(error));
  }
}

int attribute(cudaDeviceAttr attr, int device_index) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attr, device_index), "cudaDeviceGetAttribute");
  return value;
}

std::string version_text(int compute_capability) {
  return std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10);
}

void check_head_dim_step(char const* name, int head_dim) {
  if (head_dim % kHeadDimStep != 0) {
    throw std::invalid_argument(
        std::string("flash_attn: ") + name + ": expected a head_dim that is a multiple of " +
        std::to_string(kHeadDimStep) + " on CUDA, got " + std::to_string(head_dim));
  }
}

/// FLASH_ATTN_SMEM_BYTES, which the tests set to run the kernels of GPUs with less shared memory.
int smem_limit_of_environment() {
  char const* const text = std::getenv("FLASH_ATTN_SMEM_BYTES");
  if (text == nullptr) {
    return INT_MAX;
  }
  int const bytes = std::atoi(text);
  if (bytes <= 0) {
    throw std::runtime_error(
        std::string("flash_attn: FLASH_ATTN_SMEM_BYTES: expected a number of bytes, got \"") +
        text + "\"");
  }
  return bytes;
}

/// Shared memory of a thread block that the device grants and the compiled code uses.
int usable_smem_bytes(int device_index, int arch) {
  int const granted = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index);
  return std::min({granted, compiled_smem_limit(arch), smem_limit_of_environment()});
}

}  // namespace

CudaDevice::CudaDevice(int device_index)
    : compute_capability_(10 * attribute(cudaDevAttrComputeCapabilityMajor, device_index) +
                          attribute(cudaDevAttrComputeCapabilityMinor, device_index)),
      smem_bytes_(
          usable_smem_bytes(device_index, compiled_arch(cuda_archs(), compute_capability_))),
      has_sm90_(compute_capability_ == 90 &&
                compiled_arch(cuda_archs(), compute_capability_) == 90),
      properties_{.index = device_index,
                  .num_sms = attribute(cudaDevAttrMultiProcessorCount, device_index),
                  .l2_bytes = attribute(cudaDevAttrL2CacheSize, device_index)} {
  for (bool const extras : {false, true}) {
    for (DType const dtype : {DType::kFp16, DType::kBf16, DType::kFp32}) {
      for (std::size_t step = 0; step < forward_[0][0].size(); ++step) {
        KernelRequest const request{compute_capability_, dtype, int(step) * kHeadDimStep, extras,
                                    smem_bytes_};
        forward_[extras][std::size_t(dtype)][step] = select_forward(request);
        backward_[extras][std::size_t(dtype)][step] = select_backward(request);
      }
    }
  }
}

template <class Config, class Params>
Config const& CudaDevice::find(Table<Config> const& table, char const* pass, DType dtype,
                               Params const& params) const {
  check_head_dim_step("q", params.shape.head_dim);
  check_head_dim_step("v", params.shape.head_dim_v);
  int const head_dim = std::max(params.shape.head_dim, params.shape.head_dim_v);
  Selection<Config> const& selection =
      table[params.has_extras()][std::size_t(dtype)][std::size_t(head_dim / kHeadDimStep)];
  if (!selection.found) {
    throw std::runtime_error(std::string("flash_attn: no ") + pass + " kernel for head_dim " +
                             std::to_string(head_dim) + " on a GPU of compute capability " +
                             version_text(compute_capability_) + ":" + selection.why_not);
  }
  return selection.row;
}

ForwardConfig const& CudaDevice::forward_config(DType dtype, ForwardParams const& params) const {
  return find(forward_, "forward", dtype, params);
}

BackwardConfig const& CudaDevice::backward_config(DType dtype, BackwardParams const& params) const {
  return find(backward_, "backward", dtype, params);
}

bool CudaDevice::uses_sm90() const {
  return has_sm90_ && newest_family.load(std::memory_order_relaxed) >= 90;
}

Sm90ForwardConfig const* CudaDevice::sm90_forward_config(DType dtype,
                                                         ForwardParams const& params) const {
  if (!uses_sm90()) {
    return nullptr;
  }
  Sm90ForwardConfig const* const row = select_sm90_forward(dtype, params, smem_bytes_);
  return row != nullptr && sm90::can_address(params, dtype) ? row : nullptr;
}

Sm90BackwardConfig const* CudaDevice::sm90_backward_config(DType dtype,
                                                           BackwardParams const& params) const {
  if (!uses_sm90()) {
    return nullptr;
  }
  Sm90BackwardConfig const* const row = select_sm90_backward(dtype, params, smem_bytes_);
  return row != nullptr && sm90::can_address(*row, params, properties_) ? row : nullptr;
}

int64_t limit_kernel_family(int64_t arch) {
  if (arch != 80 && arch != 90) {
    throw std::invalid_argument("flash_attn: kernel family: expected 80 or 90, got " +
                                std::to_string(arch));
  }
  return newest_family.exchange(int(arch));
}

CudaDevice const& cuda_device(int device_index) {
  static std::once_flag made[kMaxDevices];
  static std::unique_ptr<CudaDevice const> devices[kMaxDevices];
  if (device_index < 0 || device_index >= kMaxDevices) {
    throw std::runtime_error("flash_attn: expected a CUDA device index below " +
                             std::to_string(kMaxDevices) + ", got " + std::to_string(device_index));
  }
  std::call_once(made[device_index],
                 [&] { devices[device_index] = std::make_unique<CudaDevice const>(device_index); });
  return *devices[device_index];
}

Stream current_stream(int device_index) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream == nullptr ||
      aoti_torch_get_current_cuda_stream(device_index, &stream) != 0) {
    throw std::runtime_error(
        "flash_attn: torch has no current CUDA stream; expected a torch built with CUDA");
  }
  return stream;
}

}  // namespace flash::binding
