// The CPU backend: tiled, multi-threaded, fp32 accumulation, memory linear in the sequence lengths.
#pragma once

#include "params.h"

namespace flash::cpu {

/// Runs on up to num_threads threads (at least 1); the result does not depend on the count.
void forward(ForwardParams const& params, DType dtype, int num_threads);

/// dq, dk and dv are bit-equal from run to run and for every thread count; workspace is not used.
void backward(BackwardParams const& params, DType dtype, int num_threads);

}  // namespace flash::cpu
