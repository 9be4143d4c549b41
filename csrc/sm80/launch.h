// Host entry points of the sm80 family. Compiles without CUDA headers.
#pragma once

#include <cstddef>

#include "config/backward_config.h"
#include "config/device.h"
#include "config/forward_config.h"

namespace flash::sm80 {

/// Bytes of ForwardParams::workspace: a list of the tiles of packed queries, else 0.
std::size_t forward_workspace_bytes(ForwardConfig const& config, ForwardParams const& params);

/// Launches the kernel of `config`, a compiled row of the table. Throws std::runtime_error with the
/// CUDA error's text when a launch fails.
void forward(ForwardConfig const& config, ForwardParams const& params, Device const& device,
             Stream stream);

/// Bytes of BackwardParams::workspace: the fp32 dq sums (batch * heads * seqlen_q * head_dim,
/// rounded up to tiles), two floats per query row, one counter per query tile, and the list of the
/// tiles of packed keys.
std::size_t backward_workspace_bytes(BackwardConfig const& config, BackwardParams const& params);

/// Gradients in three launches: softmax_d (and a cleared workspace), the main kernel, dq
/// conversion.
void backward(BackwardConfig const& config, BackwardParams const& params, Device const& device,
              Stream stream);

}  // namespace flash::sm80
