// A computing warpgroup that owns 64 keys of each item: head dims up to 128.
//
// Of a query tile it makes S^T = K Q^T and dP^T = V dO^T, whose rows are its keys, and with
// P = exp2(S c - lse), dS = P (dP - softmax_d) adds dV += P^T dO and dK += dS^T Q, the left
// operands straight from registers. dQ = dS K runs over the keys of all warpgroups, so dS goes
// through shared memory and each warpgroup makes a part of dQ.
#pragma once

#include "sm90/backward_core.cuh"

namespace flash::sm90 {

template <class Traits>
struct BackwardWarpgroup : BackwardCore<Traits> {
  using Core = BackwardCore<Traits>;
  using Core::arrive, Core::hand_over, Core::store_dq, Core::wait;
  using Core::dout, Core::key_phase, Core::params, Core::queries, Core::shared;
  using Core::kConfig, Core::warp_idx, Core::warpgroup_idx;
  using typename Core::Group, typename Core::Operand, typename Core::Scores;
  using typename Core::TileDout, typename Core::TileDs, typename Core::TileK;
  using typename Core::TileQ, typename Core::TileV, typename Core::Walk;

  float dk[kConfig.head_dim / 8][4];
  float dv[kConfig.head_dim_v / 8][4];
  Piece v[kConfig.head_dim_v / 16];  // if it is kept

  using Core::Core;

  /// True if this warpgroup makes dQ of query tile `tile`.
  __device__ __forceinline__ bool has_dq_of(Ring<Traits::kStages> const& tile) const {
    return !Traits::kDqInTurn || int(tile.stage) == warpgroup_idx;
  }
  /// This warpgroup's rows or columns of dQ = dS K, or all of it.
  __device__ __forceinline__ void issue_dq(Group& dq) const {
    constexpr bool kHasHalf = !Traits::kDqInTurn, kByRows = Traits::kDqByRows;
    int const half = kHasHalf ? warpgroup_idx : 0;
    this->issue_ds_k(dq, queries.previous().stage, kByRows ? half * TileDs::kBlockBytes : 0,
                     kByRows ? 0 : half * TileK::kBlockBytes);
  }

  /// V's rows of this warpgroup as left operand.
  __device__ __forceinline__ void load_v() {
    PieceReader<TileV, flash::Operand::kA> const reader(
        smem_address(shared.v), warpgroup_idx * 64 + warp_idx * 16, 0, threadIdx.x);
#pragma unroll
    for (int step = 0; step < kConfig.head_dim_v / 16; ++step) {
      v[step] = load_piece(reader, 0, 16 * step);
    }
  }

  /// One query tile, and perhaps dQ of the one before: by then the other warpgroup's dS is there,
  /// even if it is half a tile behind. Order of issue: S, dP | dQ, dV, dK. dQ is handed over under
  /// dV and dK, the only products that leave shared memory bandwidth for it.
  template <bool kIsFirst, bool kMakesDq>
  __device__ __forceinline__ void step(int key_begin, Walk const& walk) {
    int const m_block = walk.m_block;
    bool const needs_mask = walk.needs_mask();
    auto const last = queries.previous();
    Scores scores, dp;
    typename Core::StepExtras extras;
    wait(shared.q_full[queries.stage], queries.phase);
    wgmma_fence();
    this->template issue_scores<TileK, TileQ>(
        scores, shared.k, warpgroup_idx * 64, shared.q[queries.stage],
        this->template prepare_word<0>(extras, key_begin, walk));
    wait(shared.dout_full[dout().stage], dout().phase);
    wgmma_fence();
    char* const dout_tile = shared.dout[dout().stage];
    auto const beside = this->template prepare_word<1>(extras, key_begin, walk);
    if constexpr (kConfig.keeps_v()) {
      this->template issue_scores<TileDout>(dp, v, dout_tile, beside);
    } else {
      this->template issue_scores<TileV, TileDout>(dp, shared.v, warpgroup_idx * 64, dout_tile,
                                                   beside);
    }
    this->prepare_extras(extras, key_begin, walk);
    typename Core::Statistics const lse(this->lse_log2());
    wgmma_wait<1>();
    pin(scores);
    Operand p, sloped, ds_operand;
    if constexpr (Core::kHasExtras) {
      this->make_scores(scores, sloped, extras);
    }
    if (needs_mask) {
      this->mask(scores, key_begin, m_block);
    }
    if constexpr (kMayCap<kConfig.extras>) {
      this->exponentiate(scores, lse, p, sloped);
      pin(sloped);
    } else {
      this->exponentiate(scores, lse, p);
    }
    pin(p);
    if constexpr (kIsFirst) {
      wait(shared.dk_empty, key_phase ^ 1);
    }
    // Also keeps the next wait from moving above the exponentials: ptxas moves it to the top of its
    // basic block.
    wait(shared.ds_empty[queries.stage], queries.phase ^ 1);
    typename Core::Statistics const row_d(this->softmax_d());
    wgmma_wait<0>();
    pin(dp);
    if constexpr (Core::kHasExtras) {
      this->drop_some(dp, extras);
    }
    if constexpr (kMayCap<kConfig.extras>) {
      this->differentiate(dp, sloped, row_d, ds_operand);
    } else {
      this->differentiate(dp, p, row_d, ds_operand);
    }
    if constexpr (Core::kHasExtras) {
      this->drop_some(p, extras);
      pin(p);
    }
    this->template store_rows<TileDs>(ds_operand, shared.ds[queries.stage], warpgroup_idx * 64);
    pin(ds_operand);
    hand_over(shared.ds_full[queries.stage]);
    Group dq;
    if constexpr (kMakesDq) {
      wait(shared.ds_full[last.stage], last.phase);
      wgmma_fence();
      issue_dq(dq);
    }
    wgmma_fence();
    this->template issue_gradient<TileDout>(dv, p, shared.dout[dout().stage], !kIsFirst);
    this->template issue_gradient<TileQ>(dk, ds_operand, shared.q[queries.stage], !kIsFirst);
    if constexpr (kMakesDq) {
      wgmma_wait<2>();
      pin(dq);
      arrive(shared.ds_empty[last.stage]);
      store_dq(dq);
    }
    wgmma_wait<0>();
    arrive(shared.dout_empty[dout().stage]);
    arrive(shared.q_empty[queries.stage]);
    queries.advance();
  }
  /// dQ of the last query tile of an item.
  __device__ __forceinline__ void finish_steps() {
    arrive(shared.v_empty);
    auto const last = queries.previous();
    if (!has_dq_of(last)) {
      arrive(shared.k_empty);
      return;
    }
    wait(shared.ds_full[last.stage], last.phase);
    Group dq;
    wgmma_fence();
    issue_dq(dq);
    wgmma_wait<0>();
    pin(dq);
    arrive(shared.k_empty);
    arrive(shared.ds_empty[last.stage]);
    store_dq(dq);
  }

  /// dK leaves through the buffer of dS that has the warpgroup's number, for the outbox is still
  /// taken by dQ.
  __device__ __forceinline__ void finish() {
    wgmma_wait<0>();  // nothing is pending, but ptxas wants it before dK and dV are read (C7514)
    pin(dk);
    pin(dv);
    auto const last = queries.previous();
    bool const is_last_ds = int(last.stage) == warpgroup_idx;
    wait(shared.ds_empty[warpgroup_idx], is_last_ds ? last.phase : queries.phase ^ 1);
    this->template store_gradient<SmemTile<64, kConfig.head_dim>, 0>(
        dk, params.problem.softmax_scale, shared.ds[warpgroup_idx]);
    hand_over(shared.dk_full[warpgroup_idx]);
    float const dv_scale = Core::kHasExtras ? params.problem.dropout.scale : 1.f;
    this->template store_gradient<SmemTile<64, kConfig.head_dim_v>, 0>(dv, dv_scale,
                                                                       this->open_outbox());
    hand_over(shared.outbox_full[warpgroup_idx]);
  }

  __device__ __forceinline__ void run() {
    WorkItem item;
    while (next_item<Traits>(shared, key_phase, item)) {
      wait(shared.v_full, key_phase);
      if (item.m_min < item.m_max) {
        if constexpr (kConfig.keeps_v()) {
          load_v();
        }
        int const key_begin = item.n_block * Traits::kTileN + warpgroup_idx * 64;
        auto walk = this->walk(item, key_begin);
        step<true, false>(key_begin, walk);
        // Else what the first step derives from it is held in registers for the others, and spills.
        warpgroup_idx = this->uniform(warpgroup_idx);
#pragma unroll 1
        while (walk.steps_left > 1) {
          walk.advance();
          if (has_dq_of(queries.previous())) {
            step<false, true>(key_begin, walk);
          } else {
            step<false, false>(key_begin, walk);
          }
        }
        finish_steps();
      } else {
        wait(shared.dk_empty, key_phase ^ 1);
        arrive(shared.v_empty);
        arrive(shared.k_empty);
        this->clear(dk);
        this->clear(dv);
      }
      finish();
      key_phase ^= 1;
    }
  }
};

}  // namespace flash::sm90
