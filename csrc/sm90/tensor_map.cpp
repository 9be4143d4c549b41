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
#if CUDART_VERSION >= 12050  // the other one is gone from CUDA 13
    cudaError_t const error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
#else
    cudaError_t const error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
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

/// Rows from the first of the first entry to the end of the last one; 0 if that is no number of
/// rows that an int holds.
int64_t all_rows(TensorView const& view) {
  Strided const& tensor = view.tensor;
  if (view.entries == 1) {
    return view.seqlen;
  }
  if (tensor.row_stride <= 0 || tensor.batch_stride % tensor.row_stride != 0) {
    return 0;
  }
  int64_t const rows = (view.entries - 1) * (tensor.batch_stride / tensor.row_stride) + view.seqlen;
  return rows < RowMap::kUnit ? rows : 0;
}

/// Extents and strides in bytes (of all dimensions but the first).
struct Extents {
  cuuint64_t sizes[5];
  cuuint64_t strides[4];
};

Extents extents_of(TensorView const& view) {
  Strided const& tensor = view.tensor;
  cuuint64_t const cols = cuuint64_t(view.head_dim), heads = cuuint64_t(view.num_heads);
  cuuint64_t const row = cuuint64_t(stride_bytes(tensor.row_stride, view.seqlen, view.dtype));
  cuuint64_t const head = cuuint64_t(stride_bytes(tensor.head_stride, view.num_heads, view.dtype));
  if (view.whole_entries) {
    return {{cols, cuuint64_t(view.seqlen), heads, cuuint64_t(view.entries), 1},
            {row, head, cuuint64_t(stride_bytes(tensor.batch_stride, view.entries, view.dtype)),
             cuuint64_t(kAlignment)}};
  }
  constexpr cuuint64_t kUnit = RowMap::kUnit;
  return {{cols, kUnit, heads, cuuint64_t(all_rows(view)) + 1, kUnit + 1},
          {row, head, row, (cuuint64_t(1) << 34) - row}};
}

}  // namespace

bool is_addressable(TensorView const& view) {
  Strided const& tensor = view.tensor;
  int64_t const row_bytes = stride_bytes(tensor.row_stride, view.seqlen, view.dtype);
  return reinterpret_cast<uintptr_t>(tensor.ptr) % kAlignment == 0 && view.entries > 0 &&
         view.seqlen > 0 && view.num_heads > 0 && is_addressable_stride(row_bytes) &&
         is_addressable_stride(stride_bytes(tensor.head_stride, view.num_heads, view.dtype)) &&
         is_addressable_stride(stride_bytes(tensor.batch_stride, view.entries, view.dtype)) &&
         (view.whole_entries || (row_bytes < (1LL << 34) && all_rows(view) > 0));
}

RowMap TensorView::row_map() const {
  return {whole_entries ? 0 : entries == 1 ? seqlen : int(tensor.batch_stride / tensor.row_stride)};
}

void make_context_current(int device_index) {
  // The runtime makes one current only when it needs it itself.
  thread_local bool const has_context = cudaSetDevice(device_index) == cudaSuccess;
  if (!has_context) {
    throw std::runtime_error("flash_attn: cudaSetDevice failed");
  }
}

CUtensorMap make_tensor_map(TensorView const& view, int rows, int kernel_cols,
                            CUtensorMapL2promotion l2_promotion) {
  int const cols = kernel_cols % 64 == 0 ? 64 : 32;
  Extents const extents = extents_of(view);
  cuuint32_t const box[5] = {cuuint32_t(cols), cuuint32_t(rows), 1, 1, 1};
  cuuint32_t const every_element[5] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  CUresult const result =
      encode_tiled()(&map,
                     view.dtype == DType::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                     5, view.tensor.ptr, extents.sizes, extents.strides, box, every_element,
                     CU_TENSOR_MAP_INTERLEAVE_NONE,
                     cols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
                     l2_promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("flash_attn: cuTensorMapEncodeTiled failed with CUDA driver error " +
                             std::to_string(int(result)));
  }
  return map;
}

}  // namespace flash::sm90
