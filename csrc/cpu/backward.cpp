// Backward schedule, three phases: softmax_d and zeroed dq sums per query tile; the key tiles of
// every key head (backward_tile.h); dq rounded to the input dtype.
#include <algorithm>

#include "cpu/attention.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace flash::cpu {
namespace {

/// What of a section's q, dout and dq the last cache is counted on to hold.
constexpr int64_t kSectionBytes = 8 << 20;

/// Neighbouring tasks take different heads, so that threads seldom wait for each other's dq turn.
TileOrder key_tile_order(Shape const& shape, int num_threads) {
  int const batch_heads = shape.batch_size * shape.num_heads_k;
  int64_t const bytes_per_head = int64_t(sizeof(float)) * shape.query_heads_per_key_head() *
                                 shape.seqlen_q * (2 * shape.head_dim + shape.head_dim_v);
  int const heads = heads_per_section(bytes_per_head, kSectionBytes, batch_heads);
  return {ceil_div(shape.seqlen_k, kTileN), batch_heads,
          std::clamp(heads, std::min(num_threads, batch_heads), std::max(batch_heads, 1)), false};
}

DqSum dq_sum_layout(Shape const& shape) {
  int const row_stride = round_up(shape.head_dim, kPanelCols);
  int64_t const plane_stride = int64_t(round_up(shape.seqlen_q, kMicroRows)) * row_stride;
  return {nullptr, plane_stride, row_stride, shape.num_heads};
}

}  // namespace

void backward(BackwardParams const& params, DType dtype, int num_threads) {
  Shape const& shape = params.shape;
  int const batch_heads = shape.batch_size * shape.num_heads;
  TileOrder const rows = {ceil_div(shape.seqlen_q, kTileM), batch_heads, 1, false};
  int64_t const multiply_adds = int64_t(batch_heads) * shape.seqlen_q * shape.seqlen_k *
                                (3 * shape.head_dim + 2 * shape.head_dim_v);
  TileOrder const key_tiles = key_tile_order(shape, num_threads);
  int const threads =
      useful_threads(num_threads, std::max(rows.num_tiles(), key_tiles.num_tiles()), multiply_adds);

  ScratchArena counter(nullptr);
  BackwardScratch(counter, shape);
  FloatBuffer const scratch = allocate_floats(counter.used() * threads);
  DqSum dq_sum = dq_sum_layout(shape);
  FloatBuffer const dq_buffer = allocate_floats(dq_sum.plane_stride * batch_heads);
  dq_sum.data = dq_buffer.get();
  DqTurns turns(rows.num_blocks, key_tiles.num_blocks, key_tiles.num_batch_heads);

  Kernels const& kernel = kernels(dtype);
  auto const scratch_of = [&](int thread) { return scratch.get() + thread * counter.used(); };
  Phase const phases[] = {
      {rows.num_tiles(),
       [&](int task, int thread) {
         kernel.prepare_rows(params, rows.tile(task), scratch_of(thread), dq_sum);
       }},
      {key_tiles.num_tiles(),
       [&](int task, int thread) {
         kernel.backward_tile(params, key_tiles.tile(task), scratch_of(thread), dq_sum, turns);
       }},
      {rows.num_tiles(), [&](int task, int) { kernel.store_dq(params, rows.tile(task), dq_sum); }},
  };
  run_phases(threads, phases);
}

}  // namespace flash::cpu
