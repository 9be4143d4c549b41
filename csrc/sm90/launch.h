// Host entry points of the sm90 family.
#pragma once

#include "config/device.h"
#include "config/sm90_forward_config.h"

namespace flash::sm90 {

/// True if the copy engine can address the tensors: bases and strides that are multiples of 16
/// bytes, no stride of zero, none of 2^40 bytes and more, nothing empty.
bool can_address(ForwardParams const& params, DType dtype);

/// Launches the kernel of `config`, a compiled row of the table, for tensors that can be addressed.
/// Throws std::runtime_error with the CUDA error's text when a launch fails.
void forward(Sm90ForwardConfig const& config, ForwardParams const& params, Device const& device,
             Stream stream);

}  // namespace flash::sm90
