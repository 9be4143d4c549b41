// Forward schedule: one task per (sequence, query head, query tile). See forward_tile.h.
#include <algorithm>

#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/schedule.h"
#include "cpu/tiles.h"
#include "cpu/vec.h"

namespace flash::cpu {
namespace {

/// out and softmax_lse of the rows that no task has.
void finish_unused_rows(ForwardParams const& params, DType dtype) {
  Shape const& shape = params.shape;
  auto const unused = unused_rows(params.sequences.cu_seqlens_q, shape.batch_size, shape.seqlen_q);
  zero_rows(params.out, unused, shape.num_heads, shape.head_dim_v, dtype);
  for (RowSpan const& rows : unused) {
    for (int head = 0; head < shape.num_heads; ++head) {
      float* const lse = params.softmax_lse + int64_t(head) * shape.seqlen_q;
      std::fill(lse + rows.begin, lse + rows.end, kInfinity);
    }
  }
}

}  // namespace

void forward(ForwardParams const& params, DType dtype, int num_threads) {
  Shape const& shape = params.shape;
  std::vector<Tile> const tiles = query_tiles(shape, params.sequences);
  int const num_tiles = int(tiles.size());
  int64_t const multiply_adds =
      num_pairs(shape, params.sequences) * (shape.head_dim + shape.head_dim_v);
  int const threads = useful_threads(num_threads, num_tiles, multiply_adds);

  ScratchArena counter(nullptr);
  ForwardScratch(counter, shape, params.dropout);
  FloatBuffer const scratch = allocate_floats(counter.used() * threads);
  Kernels const& kernel = kernels(dtype);
  finish_unused_rows(params, dtype);
  Phase const phase = {num_tiles, [&](int task, int thread) {
                         kernel.forward_tile(params, tiles[task],
                                             scratch.get() + thread * counter.used());
                       }};
  run_phases(threads, {&phase, 1});
}

}  // namespace flash::cpu
