// Which kernel a problem would run on, without tensors and without the GPU.
#pragma once

#include <cstdint>
#include <string>

namespace flash::binding {

struct SelectionProblem {
  int64_t batch_size;
  int64_t seqlen_q, seqlen_k;  // of all sequences if packed
  int64_t head_dim, head_dim_v;
  int64_t window_left, window_right;
  bool softcap, alibi, dropout;
  bool packed;
};

/// JSON: an object for the row of the kernel family (80 or 90) that serves the problem on a GPU of
/// this compute capability and shared memory a thread block, with its name, tile_m, tile_n, threads
/// and smem_bytes; or a list of reasons, of which the sm90 family knows none.
std::string select_kernel(bool backward, int64_t family, int64_t compute_capability,
                          int64_t smem_bytes, std::string dtype_name, int64_t batch_size,
                          int64_t seqlen_q, int64_t seqlen_k, int64_t head_dim, int64_t head_dim_v,
                          int64_t window_left, int64_t window_right, bool softcap, bool alibi,
                          bool dropout, bool packed);

}  // namespace flash::binding
