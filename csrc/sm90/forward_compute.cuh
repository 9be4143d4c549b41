// A computing warpgroup: 64 query rows of each tile.
#pragma once

#include "device/max_logit.cuh"
#include "device/wgmma.cuh"
#include "sm90/forward_core.cuh"
#include "sm90/forward_extras.cuh"
#include "sm90/row_softmax.cuh"

namespace flash::sm90 {

template <class Traits>
struct ForwardWarpgroup : ForwardCore<Traits> {
  using Core = ForwardCore<Traits>;
  using Core::first_row, Core::full_range, Core::is_full;
  using Core::has_next_tile, Core::pass_turn, Core::release, Core::release_k, Core::release_q;
  using Core::kConfig, Core::kWarpgroups, Core::lane_idx, Core::params, Core::shared,
      Core::warp_idx;
  using Core::q, Core::k, Core::v, Core::warpgroup_idx;
  using Core::release_v, Core::take_tile, Core::take_turn, Core::wait_k, Core::wait_q;
  using Core::wait_v, Core::waits_for_loads;
  using typename Core::SharedStorage;
  static constexpr int kFragmentsS = Traits::kTileN / 8;
  static constexpr int kFragmentsO = kConfig.head_dim_v / 8;
  static constexpr int kStepsP = Traits::kTileN / 16;
  using TileQ = typename Traits::TileQ;
  using TileK = typename Traits::TileK;
  using TileV = typename Traits::TileV;
  using TileOut = typename Traits::TileOut;
  using Scores = float[kFragmentsS][4];
  // Sums become factors and softmax_lse beside the last product with V instead of behind it. Three
  // warpgroups have no registers for that: it spills at 96.
  static constexpr bool kEndsEarly = kWarpgroups == 2;

  float const scale_log2;
  uint64_t const k_descriptor, v_descriptor;  // of buffer 0
  float acc_o[kFragmentsO][4];
  uint32_t p[kStepsP][4];  // probabilities of the last key tile; their product with V is due
  int has_output;          // 0 until a product with V has been issued for this tile
  uint32_t out_stage;      // buffer of V that out leaves through
  RowSoftmax softmax;

  __device__ __forceinline__ ForwardWarpgroup(ForwardKernelParams const& params,
                                              SharedStorage& shared, int warpgroup_idx)
      : Core(params, shared, warpgroup_idx),
        scale_log2(score_scale() * kLog2E),
        k_descriptor(wgmma_descriptor<TileK>(smem_address(shared.k[0]))),
        v_descriptor(wgmma_descriptor<TileV>(smem_address(shared.v[0]))) {}

  /// What the maxima are in units of.
  __device__ __forceinline__ float score_scale() const {
    return score_unit_of<kConfig.extras>(params.problem.scores, params.problem.softmax_scale);
  }

  // ---- Mask ----

  __device__ __forceinline__ void mask(Scores& scores, WorkTile const& tile, int n_block) const {
    int const lane_col = n_block * Traits::kTileN + lane_idx() % 4 * 2;
    int const row = first_row(tile) + lane_idx() / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      KeyRange keys{0, tile.seqlen_k};
      if constexpr (kConfig.mask == MaskClass::kBounded) {
        keys = visible_keys(params.problem.mask, row + half * 8, tile.seqlen_q, tile.seqlen_k);
      }
      mask_row(scores, half, keys.begin - lane_col, keys.end - lane_col);
    }
  }

  // ---- Extras ----

  static constexpr bool kHasExtras = kConfig.extras != Extras::kNone;
  using StepExtras = sm90::StepExtras<kConfig.extras, kStepsP, false>;

  __device__ __forceinline__ void prepare_extras(StepExtras& extras, WorkTile const& tile,
                                                 int n_block) const {
    if constexpr (kHasExtras) {
      ForwardParams const& problem = params.problem;
      extras.prepare(problem.scores, problem.dropout, score_scale(), tile.batch, tile.head,
                     problem.shape.num_heads, {first_row(tile), 0, n_block * Traits::kTileN, 16},
                     tile.seqlen_k - tile.seqlen_q);
    }
  }
  __device__ __forceinline__ void make_scores(Scores& scores, StepExtras const& extras) const {
    auto& pieces = reinterpret_cast<float (&)[1][kFragmentsS][4]>(scores);
    ScoreOptions const& options = params.problem.scores;
    if (has_softcap<kConfig.extras>(options)) {
      cap_scores<kConfig.extras != Extras::kAny>(pieces, options, params.problem.softmax_scale);
    }
    if (has_alibi<kConfig.extras>(options)) {
      subtract_alibi(pieces, {0, 0, 0, 16}, extras.alibi);
    }
  }
  __device__ __forceinline__ void drop_some(Scores& probabilities, StepExtras const& extras) const {
    if (has_dropout<kConfig.extras>(params.problem.dropout)) {
      drop(probabilities, extras.kept);
    }
  }

  // ---- Products ----

  /// scores = Q K^T.
  __device__ __forceinline__ void issue_scores(Scores& scores) {
    uint64_t const a = wgmma_descriptor<TileQ>(smem_address(shared.q[q.stage]));
    uint64_t const b = k_descriptor + k.stage * descriptor_step(TileK::kBytes);
#pragma unroll
    for (int step = 0; step < kConfig.head_dim / 16; ++step) {
      Wgmma<Traits::kTileN, kConfig.dtype>::template ss<false>(
          scores, a + descriptor_step(columns_step<TileQ>(step)),
          b + descriptor_step(columns_step<TileK>(step)), step > 0);
    }
    wgmma_commit();
  }
  /// O += P V.
  __device__ __forceinline__ void issue_output() {
    uint64_t const b = v_descriptor + v.stage * descriptor_step(TileV::kBytes);
#pragma unroll
    for (int step = 0; step < kStepsP; ++step) {
      Wgmma<kConfig.head_dim_v, kConfig.dtype>::template rs<true>(
          acc_o, p[step], b + descriptor_step(rows_step<TileV>(step)), step > 0 ? 1 : has_output);
    }
    wgmma_commit();
    has_output = 1;
  }
  __device__ __forceinline__ void fence_operands() {
    pin(acc_o);
    pin(p);
    wgmma_fence();
  }
  /// An accumulator fragment is an operand fragment of the next product. Only without products in
  /// flight: ptxas serialises all of them if an operand is written beside one (C7513).
  __device__ __forceinline__ void pack(Scores const& scores) {
#pragma unroll
    for (int step = 0; step < kStepsP; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const* const pair = &scores[2 * step + i / 2][i % 2 * 2];
        p[step][i] = pack2<kConfig.dtype>(pair[0], pair[1]);
      }
    }
  }

  // ---- Steps ----

  /// Probabilities of the lane's rows [kFirst, kLast); true if O has to be scaled by `factor`,
  /// which is rare. A branch right behind the maxima: ptxas (13.0) hoists a wait to the top of its
  /// basic block, so without it the wait for P V, with which step() ends, stood before them. No
  /// wait in the branch: the warps of a warpgroup must execute the same ones.
  template <int kFirst, int kLast>
  __device__ __forceinline__ bool exponentiate_rows(Scores& scores, float (&factor)[2]) {
    float tile_max[2];
    bool has_grown = false;
#pragma unroll
    for (int half = kFirst; half < kLast; ++half) {
      tile_max[half] = RowSoftmax::lane_max(scores, half);
      has_grown |= softmax.has_grown(tile_max[half], half, scale_log2, params.problem.max_slack);
    }
    has_grown = __any_sync(0xffffffffu, has_grown);
    if (has_grown) {
#pragma unroll
      for (int half = kFirst; half < kLast; ++half) {
        factor[half] = softmax.raise(tile_max[half], half, scale_log2);
      }
    }
#pragma unroll
    for (int half = kFirst; half < kLast; ++half) {
      softmax.exponentiate(scores, half, scale_log2);
    }
    return has_grown;
  }

  /// One key tile: its scores, beside the product of the last one's probabilities with V, and its
  /// probabilities, beside the products of the other warpgroups.
  __device__ __forceinline__ void step(WorkTile const& tile, int n_block, bool needs_mask) {
    Scores scores;
    if (waits_for_loads()) {
      wait_k();
    }
    take_turn();
    fence_operands();
    issue_scores(scores);
    if (waits_for_loads()) {
      wait_v();
    }
    wgmma_fence();  // the spin between two products needs one, or ptxas adds it (C7519)
    issue_output();
    if constexpr (!kHasExtras) {
      pass_turn();
    }
    StepExtras extras;
    prepare_extras(extras, tile, n_block);
    wgmma_wait<1>();
    pin(scores);
    if constexpr (kHasExtras) {
      pass_turn();  // not before: the other's scores would be ready at the same time as these
    }
    release_k();
    if (n_block == tile.n_min) {
      release_q();
    }
    make_scores(scores, extras);
    if (kConfig.mask == MaskClass::kBounded && needs_mask) {
      mask(scores, tile, n_block);
    }
    float factor[2] = {1.f, 1.f};
    bool has_grown;
    if constexpr (kConfig.rows_in_turn) {
      has_grown = exponentiate_rows<0, 1>(scores, factor);
      has_grown |= exponentiate_rows<1, 2>(scores, factor);
    } else {
      has_grown = exponentiate_rows<0, 2>(scores, factor);
    }
    drop_some(scores, extras);
    pin(scores);
    wgmma_wait<0>();
    pin(acc_o);
    release_v();
    pack(scores);
    if (has_grown) {
      scale_row(acc_o, 0, factor[0]);
      scale_row(acc_o, 1, factor[1]);
    }
  }

  /// The first key tile's scores are complete: its probabilities, maxima and sums.
  __device__ __forceinline__ void start(Scores& scores, WorkTile const& tile) {
    release_k();
    int const n_block = tile.n_max - 1;
    if (n_block == tile.n_min) {
      release_q();
    }
    StepExtras extras;
    prepare_extras(extras, tile, n_block);
    make_scores(scores, extras);
    if (!is_full(full_range(tile), n_block)) {
      mask(scores, tile, n_block);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax.start(scores, half);
      softmax.exponentiate(scores, half, scale_log2);
    }
    drop_some(scores, extras);
    pack(scores);
    has_output = 0;
  }

  /// The first tile. There is one, or the thread block would have ended.
  __device__ __forceinline__ WorkTile begin() {
    Scores scores;
    has_next_tile();
    wait_q();
    wait_k();
    take_turn();
    wgmma_fence();
    issue_scores(scores);
    pass_turn();
    WorkTile const tile = take_tile();
    wgmma_wait<0>();
    pin(scores);
    start(scores, tile);
    return tile;
  }

  /// The end of a tile, with the first scores of the next computed under its epilogue. False after
  /// the last tile: its scores are those of whatever lies in the buffers, and not used.
  __device__ __forceinline__ bool turn_over(WorkTile& tile) {
    Scores scores;
    wait_v();
    take_turn();
    fence_operands();
    issue_output();
    bool const has_next = has_next_tile();
#pragma unroll
    for (int i = 0; i < kWarpgroups; ++i) {
      q.advance();
    }
    Sequence const sequence = params.sequence(tile.batch);
    float scale[2];
    if constexpr (kEndsEarly) {
      end_rows(tile, sequence, [&](int half, float factor) { scale[half] = factor; });
    }
    if (has_next) {
      wait_q();
      wait_k();
    }
    wgmma_fence();
    issue_scores(scores);
    pass_turn();
    wgmma_wait<1>();
    pin(acc_o);
    release_v();
    if constexpr (kEndsEarly) {
      scale_row(acc_o, 0, scale[0]);
      scale_row(acc_o, 1, scale[1]);
    } else {
      end_rows(tile, sequence, [&](int half, float factor) { scale_row(acc_o, half, factor); });
    }
    store(tile, sequence);
    wgmma_wait<0>();
    pin(scores);
    if (!has_next) {
      return false;
    }
    release_out();
    tile = take_tile();
    start(scores, tile);
    return true;
  }

  // ---- Epilogue ----

  /// Where this warp's rows of out wait for the copy engine.
  __device__ __forceinline__ uint32_t acquire_out() {
    if constexpr (kConfig.out_in_v) {
#pragma unroll
      for (int i = 0; i < kWarpgroups; ++i) {
        wait_v();
        if (i == warpgroup_idx) {
          out_stage = v.stage;
        } else {
          release(shared.v_empty[v.stage]);
        }
        v.advance();
      }
      return smem_address(shared.v[out_stage]) + warp_idx * TileOut::kBytes;
    } else {
      if (lane_idx() == 0) {
        tma_store_wait_read();
      }
      __syncwarp();
      return smem_address(shared.out.warp[warpgroup_idx * 4 + warp_idx]);
    }
  }
  __device__ __forceinline__ void release_out() {
    if (kConfig.out_in_v && lane_idx() == 0) {
      tma_store_wait_read();
      mbarrier_arrive(smem_address(&shared.v_empty[out_stage]));
    }
  }

  /// Brings the maxima of the warp's first `rows` rows to the head's.
  __device__ __forceinline__ void raise_max_logit(WorkTile const& tile, int rows) const {
    float largest = -kInfinity;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bool const is_row = 8 * half + lane_idx() / 4 < rows;
      largest = fmaxf(largest, is_row ? softmax.row_max[half] * score_scale() : -kInfinity);
    }
    raise_by_warp(params.problem.max_logits + tile.head, largest);
  }

  /// Writes softmax_lse, and calls scale(half, factor) for the lane's rows of O.
  template <class Scale>
  __device__ __forceinline__ void end_rows(WorkTile const& tile, Sequence const& sequence,
                                           Scale const& scale) const {
    Shape const& shape = params.problem.shape;
    int const row = first_row(tile);
    float* const softmax_lse =
        params.problem.softmax_lse +
        (int64_t(sequence.entry_q) * shape.num_heads + tile.head) * shape.seqlen_q +
        sequence.first_q;
    float const* const sink =
        params.problem.sink == nullptr ? nullptr : params.problem.sink + tile.head;
    if (params.problem.max_logits != nullptr) {
      raise_max_logit(tile, sequence.seqlen_q - row);
    }
    auto const end_of = [&](int half) {
      return row_end(softmax.row_max[half] * score_scale(), quad_sum(softmax.row_sum[half]), sink);
    };
    auto const finish = [&](int half, RowEnd const& end) {
      int const lane_row = row + 8 * half + lane_idx() / 4;
      if (lane_idx() % 4 == 0 && lane_row < sequence.seqlen_q) {
        softmax_lse[lane_row] = end.lse;
      }
      scale(half, kHasExtras ? end.scale * params.problem.dropout.scale : end.scale);
    };
    if constexpr (kEndsEarly) {
      RowEnd const upper = end_of(0), lower = end_of(1);  // side by side
      finish(0, upper);
      finish(1, lower);
    } else {
      finish(0, end_of(0));
      finish(1, end_of(1));
    }
  }

  /// Stores out, without waiting for the store.
  __device__ __forceinline__ void store(WorkTile const& tile, Sequence const& sequence) {
    int const row = first_row(tile);
    RowOrigin const origin =
        params.out_rows.origin(sequence.entry_q, sequence.first_q, sequence.seqlen_q);
    uint32_t const staged = acquire_out();
    // With extras there are no registers to hold addresses in through the main loop.
    int const lane = kHasExtras ? fresh_thread_idx() % 32 : lane_idx();
    int const tile_row = lane % 16, tile_chunk = lane / 16;  // that this lane addresses
    uint32_t const row_address = staged + tile_row * TileOut::kRowBytes;
    uint32_t const chunk_offset = (tile_chunk ^ TileOut::swizzle(tile_row)) << 4;
#pragma unroll
    for (int n = 0; n < kFragmentsO; n += 2) {
      stmatrix_x4(TileOut::moved(row_address, chunk_offset, 0, 8 * n),
                  pack2<kConfig.dtype>(acc_o[n][0], acc_o[n][1]),
                  pack2<kConfig.dtype>(acc_o[n][2], acc_o[n][3]),
                  pack2<kConfig.dtype>(acc_o[n + 1][0], acc_o[n + 1][1]),
                  pack2<kConfig.dtype>(acc_o[n + 1][2], acc_o[n + 1][3]));
    }
    fence_async_proxy();
    __syncwarp();
    if (lane_idx() == 0) {
#pragma unroll
      for (int col = 0; col < TileOut::kCols; col += TileOut::kBlockCols) {
        tma_store(params.out, staged + col / TileOut::kBlockCols * TileOut::kBlockBytes,
                  {col, origin.row + row, tile.head, origin.outer, origin.wrap});
      }
      tma_store_commit();
    }
  }

  __device__ __forceinline__ void run() {
    if (kConfig.ping_pong && warpgroup_idx == kWarpgroups - 1) {
      named_barrier_arrive(1, 256);
    }
    WorkTile tile = begin();
    do {
      BlockRange const full = full_range(tile);
      for (int n_block = tile.n_max - 2; n_block >= tile.n_min; --n_block) {
        step(tile, n_block, !is_full(full, n_block));
      }
    } while (turn_over(tile));
    if (lane_idx() == 0) {
      tma_store_wait_read();
    }
  }
};

}  // namespace flash::sm90
