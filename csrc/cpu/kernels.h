// The compiled kernels: one table per instruction set and element type, chosen once at run time, so
// that one binary runs on any machine of its architecture.
#pragma once

#include "cpu/dq_turns.h"
#include "params.h"

namespace flash::cpu {

/// Tiles: block is a query tile and batch_head counts query heads, except in backward_tile, where
/// they are a key tile and key heads. scratch is a thread's own, scratch_floats long.
struct Kernels {
  void (*forward_tile)(ForwardParams const& params, Tile tile, float* scratch);
  void (*prepare_rows)(BackwardParams const& params, Tile tile, float* scratch, DqSum const& dq);
  void (*backward_tile)(BackwardParams const& params, Tile tile, float* scratch, DqSum const& dq,
                        DqTurns& turns);
  void (*store_dq)(BackwardParams const& params, Tile tile, DqSum const& dq);
};

/// The fastest kernels that this processor runs.
Kernels const& kernels(DType dtype);

/// [DType]; plain data, safe to name on any machine. kAvx2Kernels exists on x86-64 only.
extern Kernels const kPortableKernels[3];
extern Kernels const kAvx2Kernels[3];

}  // namespace flash::cpu
