// Host entry points of the sm90 family. What it can't address goes to the sm80 family.
#pragma once

#include <cstddef>

#include "config/device.h"
#include "config/sm90_backward_config.h"
#include "config/sm90_forward_config.h"

namespace flash::sm90 {

/// True if the copy engine can address the tensors: bases and strides that are multiples of 16
/// bytes, no stride of zero, none of 2^40 bytes and more, nothing empty.
bool can_address(ForwardParams const& params, DType dtype);

/// Bytes of ForwardParams::workspace: a list of the tiles of packed queries, else 0.
std::size_t forward_workspace_bytes(Sm90ForwardConfig const& config, ForwardParams const& params);

/// Launches the kernel of `config`, a compiled row of the table, for tensors that can be addressed.
/// Throws std::runtime_error with the CUDA error's text when a launch fails.
void forward(Sm90ForwardConfig const& config, ForwardParams const& params, Device const& device,
             Stream stream);

/// As for the forward; and tiles must be few enough to be numbered by ints.
bool can_address(Sm90BackwardConfig const& config, BackwardParams const& params,
                 Device const& device);

/// Key heads whose keys are worked on together, a section: as the next two are to agree on it.
int backward_section(Sm90BackwardConfig const& config, Shape const& shape, Device const& device);

/// Bytes of BackwardParams::workspace: fp32 dq sums of two or, deterministic with a right bound,
/// three sections (usually 8 MB each, of one key head where that is more, and never more than all
/// of dq), a float per query row and two counters per query tile.
std::size_t backward_workspace_bytes(Sm90BackwardConfig const& config, BackwardParams const& params,
                                     int section);

/// Gradients in two launches: softmax_d (and a cleared workspace), and the main kernel.
void backward(Sm90BackwardConfig const& config, BackwardParams const& params, int section,
              Device const& device, Stream stream);

/// At most this many key heads a section from now on: with few of them every wait for sums happens,
/// which is for tests. Returns what was set before; INT_MAX is where it starts.
int limit_section(int heads);

}  // namespace flash::sm90
