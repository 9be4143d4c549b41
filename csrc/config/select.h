// How a problem selects a row of a kernel table, and why a problem has none.
#pragma once

#include <string>
#include <vector>

#include "config/backward_config.h"
#include "config/forward_config.h"
#include "config/sm90_backward_config.h"
#include "config/sm90_forward_config.h"

namespace flash {

/// What a row is chosen by. smem_bytes is the shared memory that the device grants one thread
/// block.
struct KernelRequest {
  int compute_capability;  // 80, 86, 90, ...
  DType dtype;
  int head_dim;
  bool extras;
  int smem_bytes;
};

/// All rows of the table, compiled or not.
std::vector<ForwardConfig> forward_rows();
std::vector<BackwardConfig> backward_rows();

/// The row that serves the request, by the rule above kForwardRows.
template <class Config>
struct Selection {
  Config row;
  bool found;
  std::string why_not;  // one reason per considered row, empty if found
};

Selection<ForwardConfig> select_forward(KernelRequest const& request);
Selection<BackwardConfig> select_backward(KernelRequest const& request);

/// All rows of the sm90 family, compiled or not, dtype by dtype.
std::vector<Sm90ForwardConfig> sm90_forward_rows();

/// The row of the sm90 family for the problem on a GPU of compute capability 9.0; null if none
/// serves it. Whether the copy engine can address the tensors is not its matter.
Sm90ForwardConfig const* select_sm90_forward(DType dtype, ForwardParams const& params,
                                             int smem_bytes);

/// The same for the backward.
std::vector<Sm90BackwardConfig> sm90_backward_rows();
Sm90BackwardConfig const* select_sm90_backward(DType dtype, BackwardParams const& params,
                                               int smem_bytes);

}  // namespace flash
