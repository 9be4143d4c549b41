// A computing warpgroup of a pair that shares 64 keys of each item: head dims above 128, whose dK
// and dV together don't fit one warpgroup's registers.
//
// The first makes S^T = K Q^T, P and dV += P^T dO, the second dP^T = V dO^T, dS and dK += dS^T Q: P
// goes from one to the other as it lies in registers, dS through shared memory, and each makes some
// of the groups of dQ = dS K.
#pragma once

#include "sm90/backward_core.cuh"

namespace flash::sm90 {

template <class Traits, bool kMakesP>
struct BackwardPairWarpgroup : BackwardCore<Traits> {
  using Core = BackwardCore<Traits>;
  using Core::arrive, Core::hand_over, Core::store_dq, Core::wait;
  using Core::dout, Core::key_phase, Core::params, Core::queries, Core::shared;
  using Core::kConfig, Core::warpgroup_idx;
  using typename Core::Group, typename Core::Operand, typename Core::Scores;
  using typename Core::TileDout, typename Core::TileDs, typename Core::TileK;
  using typename Core::TileQ, typename Core::TileV;

  static constexpr int kGradientCols = kMakesP ? kConfig.head_dim_v : kConfig.head_dim;
  static constexpr int kFirstGroup = kMakesP ? 0 : 2;
  static constexpr bool kHasTwoGroups = kFirstGroup + 1 < Traits::kGroups;

  uint32_t p_phase = 0;
  float gradient[kGradientCols / 8][4];  // dV or dK
  Group last_group;                      // of the query tile before, not yet handed over

  using Core::Core;

  /// Keeps descriptors of K and V from being held in registers for all query tiles: they spill.
  static __device__ __forceinline__ int fresh_zero() { return Core::uniform(fresh(0)); }

  // ---- dQ ----

  template <int kGroup>
  __device__ __forceinline__ void issue_dq(Group& dq) const {
    this->issue_ds_k(dq, queries.stage, 0, (kGroup + fresh_zero()) * TileK::kBlockBytes);
  }
  __device__ __forceinline__ void keep(Group const& dq) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        last_group[n][e] = dq[n][e];
      }
    }
  }

  // ---- P ----

  __device__ __forceinline__ void send_p(Operand const& p) {
    wait(shared.p_empty, p_phase ^ 1);
#pragma unroll
    for (int step = 0; step < Core::kStepsM; ++step) {
      *reinterpret_cast<uint4*>(shared.pair.p[step][threadIdx.x % 128]) = {p[step][0], p[step][1],
                                                                           p[step][2], p[step][3]};
    }
    arrive(shared.p_full);
    p_phase ^= 1;
  }
  __device__ __forceinline__ void receive_p(Operand& p) {
    wait(shared.p_full, p_phase);
#pragma unroll
    for (int step = 0; step < Core::kStepsM; ++step) {
      uint4 const four = *reinterpret_cast<uint4 const*>(shared.pair.p[step][threadIdx.x % 128]);
      p[step][0] = four.x, p[step][1] = four.y, p[step][2] = four.z, p[step][3] = four.w;
    }
    arrive(shared.p_empty);
    p_phase ^= 1;
  }

  // ---- Steps ----

  /// The first warpgroup's part of a query tile. The second group of dQ is handed over under S of
  /// the next tile. Across the back edge of the loop nothing is in flight, for ptxas would wait for
  /// it (C7514).
  template <bool kIsFirst>
  __device__ __forceinline__ void make_p_and_dv(int key_begin, int m_block, bool needs_mask) {
    Scores scores;
    wait(shared.q_full[queries.stage], queries.phase);
    wgmma_fence();
    this->template issue_scores<TileK, TileQ>(scores, shared.k, fresh_zero(),
                                              shared.q[queries.stage]);
    if constexpr (!kIsFirst) {
      store_dq(last_group);
    }
    wgmma_wait<0>();
    pin(scores);
    if (needs_mask) {
      this->mask(scores, key_begin, m_block);
    }
    Operand p;
    this->exponentiate(scores, p);
    send_p(p);
    arrive(shared.q_empty[queries.stage]);
    wait(shared.dout_full[dout().stage], dout().phase);
    pin(p);
    wgmma_fence();
    this->template issue_gradient<TileDout>(gradient, p, shared.dout[dout().stage], !kIsFirst);
    wait(shared.ds_full[queries.stage], queries.phase);
    Group first, second;
    wgmma_fence();
    issue_dq<0>(first);
    wgmma_wait<0>();
    pin(first);
    arrive(shared.dout_empty[dout().stage]);
    wgmma_fence();
    issue_dq<1>(second);
    store_dq(first);
    wgmma_wait<0>();
    pin(second);
    arrive(shared.ds_empty[queries.stage]);
    keep(second);
    advance();
  }

  /// The second warpgroup's part.
  template <bool kIsFirst>
  __device__ __forceinline__ void make_ds_and_dk() {
    Scores dp;
    wait(shared.dout_full[dout().stage], dout().phase);
    wgmma_fence();
    this->template issue_scores<TileV, TileDout>(dp, shared.v, fresh_zero(),
                                                 shared.dout[dout().stage]);
    if constexpr (kHasTwoGroups && !kIsFirst) {
      store_dq(last_group);
    }
    Operand p, ds_operand;
    receive_p(p);
    wait(shared.ds_empty[queries.stage], queries.phase ^ 1);
    wgmma_wait<0>();
    pin(dp);
    this->differentiate(dp, p, ds_operand);
    this->template store_rows<TileDs>(ds_operand, shared.ds[queries.stage], 0);
    pin(ds_operand);
    hand_over(shared.ds_full[queries.stage]);
    arrive(shared.dout_empty[dout().stage]);
    wait(shared.q_full[queries.stage], queries.phase);
    wait(shared.ds_full[queries.stage], queries.phase);
    Group first, second;
    wgmma_fence();
    issue_dq<kFirstGroup>(first);
    this->template issue_gradient<TileQ>(gradient, ds_operand, shared.q[queries.stage], !kIsFirst);
    wgmma_wait<1>();
    pin(first);
    store_dq(first);
    if constexpr (kHasTwoGroups) {
      wgmma_fence();
      issue_dq<kFirstGroup + 1>(second);
    }
    wgmma_wait<0>();
    arrive(shared.q_empty[queries.stage]);
    arrive(shared.ds_empty[queries.stage]);
    if constexpr (kHasTwoGroups) {
      pin(second);
      keep(second);
    }
    advance();
  }
  __device__ __forceinline__ void advance() { this->next_queries(); }
  template <bool kIsFirst>
  __device__ __forceinline__ void step(int key_begin, int m_block, bool needs_mask) {
    if constexpr (kMakesP) {
      make_p_and_dv<kIsFirst>(key_begin, m_block, needs_mask);
    } else {
      make_ds_and_dk<kIsFirst>();
    }
  }

  // ---- Items ----

  /// 128 columns of dV or dK, or what is left of it.
  template <int kFirstCol>
  __device__ __forceinline__ void send_columns() {
    if constexpr (kFirstCol < kGradientCols) {
      using Tile = SmemTile<64, imin(128, kGradientCols - kFirstCol)>;
      this->template store_gradient<Tile, kFirstCol / 8>(
          gradient, kMakesP ? 1.f : params.problem.softmax_scale, this->open_outbox());
      hand_over(shared.outbox_full[warpgroup_idx]);
    }
  }

  __device__ __forceinline__ void run() {
    WorkItem item;
    while (next_item<Traits>(shared, key_phase, item)) {
      if (!kMakesP) {
        wait(shared.v_full, key_phase);
      }
      if (item.m_min < item.m_max) {
        int const key_begin = item.n_block * Traits::kTileN;
        auto walk = this->walk(item, key_begin);
        step<true>(key_begin, walk.m_block, walk.needs_mask());
#pragma unroll 1
        while (walk.steps_left > 1) {
          walk.advance();
          step<false>(key_begin, walk.m_block, walk.needs_mask());
        }
        if (kMakesP || kHasTwoGroups) {
          store_dq(last_group);
        }
      } else {
        this->clear(gradient);
      }
      if (!kMakesP) {
        arrive(shared.v_empty);
      }
      arrive(shared.k_empty);
      wgmma_wait<0>();  // nothing is pending, but ptxas wants it before the gradient is read
                        // (C7514)
      pin(gradient);
      send_columns<0>();
      send_columns<128>();
      key_phase ^= 1;
    }
  }
};

}  // namespace flash::sm90
