// Instantiates every kernel for one instruction set.
#pragma once

#include "cpu/backward_tile.h"
#include "cpu/forward_tile.h"
#include "cpu/kernels.h"

namespace flash::cpu {

template <class Isa, class T>
inline constexpr Kernels kKernelsOf = {&forward_tile<Isa, T>, &prepare_rows<Isa, T>,
                                       &backward_tile<Isa, T>, &store_dq<Isa, T>};

}  // namespace flash::cpu
