// Backward schedule, three phases: softmax_d and zeroed dq sums per query tile; the key tiles of
// every key head (backward_tile.h); dq rounded to the input dtype.
#include <algorithm>

#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/schedule.h"
#include "cpu/tiles.h"

namespace flash::cpu {
namespace {

/// What no task writes: gradients of rows without a sequence, and the padding of softmax_d.
void zero_the_rest(BackwardParams const& params, DType dtype) {
  Shape const& shape = params.shape;
  Sequences const& sequences = params.sequences;
  auto const unused_q = unused_rows(sequences.cu_seqlens_q, shape.batch_size, shape.seqlen_q);
  auto const unused_k = unused_rows(sequences.cu_seqlens_k, shape.batch_size, shape.seqlen_k);
  zero_rows(params.dq, unused_q, shape.num_heads, shape.head_dim, dtype);
  zero_rows(params.dk, unused_k, shape.num_heads_k, shape.head_dim, dtype);
  zero_rows(params.dv, unused_k, shape.num_heads_k, shape.head_dim_v, dtype);
  std::fill_n(params.softmax_d,
              int64_t(sequences.entries_q) * shape.num_heads * params.softmax_d_rows, 0.0f);
}

}  // namespace

void backward(BackwardParams const& params, DType dtype, int num_threads) {
  Shape const& shape = params.shape;
  Sequences const& sequences = params.sequences;
  std::vector<Tile> const rows = query_tiles(shape, sequences);
  std::vector<Tile> const keys = key_tiles(shape, sequences, num_threads);
  int const num_rows = int(rows.size()), num_keys = int(keys.size());
  int64_t const multiply_adds =
      num_pairs(shape, sequences) * (3 * shape.head_dim + 2 * shape.head_dim_v);
  int const threads = useful_threads(num_threads, std::max(num_rows, num_keys), multiply_adds);

  ScratchArena counter(nullptr);
  BackwardScratch(counter, params);
  FloatBuffer const scratch = allocate_floats(counter.used() * threads);
  DqSum dq_sum(shape, sequences);
  FloatBuffer const dq_buffer =
      allocate_floats(dq_sum.plane_stride * sequences.entries_q * shape.num_heads);
  dq_sum.data = dq_buffer.get();
  DqTurns turns(shape, sequences);

  Kernels const& kernel = kernels(dtype);
  auto const scratch_of = [&](int thread) { return scratch.get() + thread * counter.used(); };
  zero_the_rest(params, dtype);
  Phase const phases[] = {
      {num_rows,
       [&](int task, int thread) {
         kernel.prepare_rows(params, rows[task], scratch_of(thread), dq_sum);
       }},
      {num_keys,
       [&](int task, int thread) {
         kernel.backward_tile(params, keys[task], scratch_of(thread), dq_sum, turns);
       }},
      {num_rows, [&](int task, int) { kernel.store_dq(params, rows[task], dq_sum); }},
  };
  run_phases(threads, phases);
}

}  // namespace flash::cpu
