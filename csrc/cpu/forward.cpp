// Forward schedule: one task per (batch, query head, query tile). See forward_tile.h.
#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace flash::cpu {

void forward(ForwardParams const& params, DType dtype, int num_threads) {
  Shape const& shape = params.shape;
  int const batch_heads = shape.batch_size * shape.num_heads;
  // Causal: the last query tiles see the most keys and start first.
  TileOrder const order = {ceil_div(shape.seqlen_q, kTileM), batch_heads, 1, true};
  int64_t const multiply_adds =
      int64_t(batch_heads) * shape.seqlen_q * shape.seqlen_k * (shape.head_dim + shape.head_dim_v);
  int const threads = useful_threads(num_threads, order.num_tiles(), multiply_adds);

  ScratchArena counter(nullptr);
  ForwardScratch(counter, shape);
  FloatBuffer const scratch = allocate_floats(counter.used() * threads);
  Kernels const& kernel = kernels(dtype);
  Phase const phase = {order.num_tiles(), [&](int task, int thread) {
                         kernel.forward_tile(params, order.tile(task),
                                             scratch.get() + thread * counter.used());
                       }};
  run_phases(threads, {&phase, 1});
}

}  // namespace flash::cpu
