#include "sm90/tensor_map.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace flash::sm90 {
namespace {

constexpr int64_t kAlignment = 16;             // bytes, of base and strides
constexpr int64_t kLongestStride = 1LL << 40;  // bytes, exclusive

/// cuTensorMapEncodeTiled of the driver, found at run time: this library links no libcuda.
auto encode_tiled() {
  static auto const function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaError_t const error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error(
          "flash_attn: the CUDA driver has no cuTensorMapEncodeTiled; expected one of CUDA 12.0 or "
          "later");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

/// Bytes between neighbours of a dimension; of a single one any stride will do.
int64_t stride_bytes(int64_t stride, int size, DType dtype) {
  return size > 1 ? stride * element_size(dtype) : kAlignment;
}

bool is_addressable_stride(int64_t bytes) {
  return bytes > 0 && bytes < kLongestStride && bytes % kAlignment == 0;
}

}  // namespace

bool is_addressable(TensorView const& view) {
  Strided const& tensor = view.tensor;
  return reinterpret_cast<uintptr_t>(tensor.ptr) % kAlignment == 0 && view.batch_size > 0 &&
         view.seqlen > 0 && view.num_heads > 0 &&
         is_addressable_stride(stride_bytes(tensor.row_stride, view.seqlen, view.dtype)) &&
         is_addressable_stride(stride_bytes(tensor.head_stride, view.num_heads, view.dtype)) &&
         is_addressable_stride(stride_bytes(tensor.batch_stride, view.batch_size, view.dtype));
}

void make_context_current(int device_index) {
  // The runtime makes one current only when it needs it itself.
  thread_local bool const has_context = cudaSetDevice(device_index) == cudaSuccess;
  if (!has_context) {
    throw std::runtime_error("flash_attn: cudaSetDevice failed");
  }
}

CUtensorMap make_tensor_map(TensorView const& view, int rows, int kernel_cols) {
  int const cols = kernel_cols % 64 == 0 ? 64 : 32;
  Strided const& tensor = view.tensor;
  cuuint64_t const sizes[4] = {cuuint64_t(view.head_dim), cuuint64_t(view.seqlen),
                               cuuint64_t(view.num_heads), cuuint64_t(view.batch_size)};
  cuuint64_t const strides[3] = {
      cuuint64_t(stride_bytes(tensor.row_stride, view.seqlen, view.dtype)),
      cuuint64_t(stride_bytes(tensor.head_stride, view.num_heads, view.dtype)),
      cuuint64_t(stride_bytes(tensor.batch_stride, view.batch_size, view.dtype))};
  cuuint32_t const box[4] = {cuuint32_t(cols), cuuint32_t(rows), 1, 1};
  cuuint32_t const every_element[4] = {1, 1, 1, 1};
  CUtensorMap map;
  CUresult const result = encode_tiled()(
      &map,
      view.dtype == DType::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      4, tensor.ptr, sizes, strides, box, every_element, CU_TENSOR_MAP_INTERLEAVE_NONE,
      cols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("flash_attn: cuTensorMapEncodeTiled failed with CUDA driver error " +
                             std::to_string(int(result)));
  }
  return map;
}

}  // namespace flash::sm90
