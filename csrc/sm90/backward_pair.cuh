// A computing warpgroup of a pair that shares 64 keys of each item: head dims above 128, whose dK
// and dV together don't fit one warpgroup's registers.
//
// The first makes S^T = K Q^T, P and dV += P^T dO, the second dP^T = V dO^T, dS and dK += dS^T Q: P
// goes from one to the other as it lies in registers. Two such thread blocks, a cluster, walk over
// the same query tiles with neighbouring keys. They exchange dS, and each makes half of the columns
// of dQ = dS K over the keys of both.
#pragma once

#include "sm90/backward_core.cuh"

namespace flash::sm90 {

template <class Traits, bool kMakesP>
struct BackwardPairWarpgroup : BackwardCore<Traits> {
  using Core = BackwardCore<Traits>;
  using Core::arrive, Core::lane_idx, Core::wait;
  using Core::dout, Core::key_phase, Core::params, Core::queries, Core::shared;
  using Core::kConfig, Core::kDType, Core::warp_idx, Core::warpgroup_idx;
  using typename Core::Operand, typename Core::Scores, typename Core::Statistics;
  using typename Core::TileDout, typename Core::TileDs, typename Core::TileK;
  using typename Core::TileQ, typename Core::TileV;
  using TilePeerK = typename Traits::TilePeerK;

  static constexpr int kGradientCols = kMakesP ? kConfig.head_dim_v : kConfig.head_dim;
  static constexpr int kDqCols = kMakesP ? 64 : Traits::kRestCols;
  static constexpr int kGroupFragments = Traits::kGroupCols / 8;
  static constexpr int kWarpBytesOfDs = 16 * TileDs::kRowBytes;
  using Dq = float[kDqCols / 8][4];

  float gradient[kGradientCols / 8][4];  // dV or dK

  using Core::Core;

  /// Keeps descriptors of K and V from being held in registers for all query tiles: they spill.
  static __device__ __forceinline__ int fresh_zero() { return Core::uniform(fresh(0)); }
  static __device__ __forceinline__ int fresh_rank() {
    return Core::uniform(fresh(int(cluster_rank())));
  }
  /// For the whole warp: as arrive(), in both thread blocks.
  static __device__ __forceinline__ void arrive_both(uint64_t& barrier) {
    __syncwarp();
    if (lane_idx() < 2) {
      mbarrier_arrive_at(smem_address(&barrier), lane_idx());
    }
  }

  // ---- dQ ----

  /// This warpgroup's columns of dQ of the tile before.
  __device__ __forceinline__ void issue_dq(Dq& dq) const {
    static_assert(TilePeerK::kBlockBytes == TileK::kBlockBytes);
    Ring<Traits::kStages> const last = queries.previous();
    int const rank = fresh_rank();
    int const block = kMakesP ? rank : 1 - rank;  // of the two of this thread block
    int const first_col = kMakesP || rank == 0 ? 0 : 64 - kDqCols;
    int const peer_columns = block * TileK::kBlockBytes + first_col * 2;
    int const columns = Traits::first_dq_block(rank) * TileK::kBlockBytes + peer_columns;
    uint64_t const ds = wgmma_descriptor<TileDs>(smem_address(shared.ds[last.stage]));
    uint64_t const k = advanced(wgmma_descriptor<TileK>(smem_address(shared.k)), columns);
    uint64_t const peer_k =
        advanced(wgmma_descriptor<TilePeerK>(smem_address(shared.peer_k)), peer_columns);
    wait(shared.peer_k_full, key_phase);
    wait(shared.ds_full[last.stage], last.phase);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < 2 * Traits::kBlockKeys / 16; ++step) {
      constexpr int kSteps = Traits::kBlockKeys / 16;
      Wgmma<kDqCols, kDType>::template ss<true, true>(
          dq, advanced(ds, rows_step<TileDs>(step)),
          advanced(step < kSteps ? k : peer_k, rows_step<TileK>(step % kSteps)), step > 0);
    }
    wgmma_commit();
  }
  /// Adds to the sums straight from registers: the way through shared memory would be twice through
  /// what limits this kernel.
  __device__ __forceinline__ void add_dq(Dq const& dq) const {
    Ring<Traits::kStages> const last = queries.previous();
    arrive_both(shared.ds_empty[last.stage]);
    wait(shared.dq_turn[last.stage], last.phase);
    int const group = Traits::first_dq_group(fresh_rank(), warpgroup_idx);
    uint32_t const offset =
        group * Traits::kGroupBytes + warp_idx * Traits::kStripBytes + lane_idx() * 16;
    char* const strip = reinterpret_cast<char*>(shared.dq_sums[last.stage]) + offset;
#pragma unroll
    for (int n = 0; n < kDqCols / 8; ++n) {
      add_relaxed(reinterpret_cast<float*>(strip + n / kGroupFragments * Traits::kGroupBytes +
                                           n % kGroupFragments * Traits::kFragmentBytes),
                  dq[n]);
    }
    arrive(shared.dq_added[last.stage]);
  }
  /// dQ of an item's last query tile.
  __device__ __forceinline__ void finish_dq() const {
    Dq dq;
    issue_dq(dq);
    wgmma_wait<0>();
    pin(dq);
    add_dq(dq);
  }

  // ---- P and dS ----

  /// P of this lane waits where the dS will be that the second warpgroup's same lane makes of it.
  __device__ __forceinline__ uint32_t place_of_p() const {
    return smem_address(shared.ds[queries.stage]) + warp_idx * kWarpBytesOfDs + lane_idx() * 16;
  }
  __device__ __forceinline__ void send_p(Operand const& p) {
    wait(shared.ds_empty[queries.stage], queries.phase ^ 1);
#pragma unroll
    for (int step = 0; step < Core::kStepsM; ++step) {
      store_shared_16(place_of_p() + step * 512, p[step]);
    }
    arrive(shared.p_full[queries.stage]);
  }
  __device__ __forceinline__ void receive_p(Operand& p) {
    static_assert(kWarpBytesOfDs == Core::kStepsM * 512);
    wait(shared.p_full[queries.stage], queries.phase);
#pragma unroll
    for (int step = 0; step < Core::kStepsM; ++step) {
      uint4 const four = load_shared_16(place_of_p() + step * 512);
      p[step][0] = four.x, p[step][1] = four.y, p[step][2] = four.z, p[step][3] = four.w;
    }
  }
  /// To both thread blocks; a warp's 16 rows are one run of bytes.
  __device__ __forceinline__ void send_ds(Operand const& ds) {
    char* const tile = shared.ds[queries.stage];
    __syncwarp();  // P has been read
    this->template store_rows<TileDs>(ds, tile, fresh_zero());
    fence_async_proxy();
    __syncwarp();
    if (lane_idx() == 0) {
      constexpr int kBytes = kWarpBytesOfDs;
      uint32_t const peer = 1 - cluster_rank();
      uint32_t const rows = smem_address(tile) + warp_idx * kBytes;
      uint32_t const full = smem_address(&shared.ds_full[queries.stage]);
      bulk_send(cluster_address(rows + TileDs::kBytes, peer), rows, kBytes,
                cluster_address(full, peer));
      mbarrier_arrive_expect_tx(full, kBytes);  // those of the other one's warp
    }
  }

  // ---- Steps ----

  /// The first warpgroup's part of a query tile. dQ is that of the tile before, whose dS takes its
  /// time to come from the other thread block. Across the back edge of the loop nothing is in
  /// flight, for ptxas would wait for it (C7514).
  template <bool kIsFirst>
  __device__ __forceinline__ void make_p_and_dv(int key_begin, int m_block, bool needs_mask) {
    Scores scores;
    wait(shared.q_full[queries.stage], queries.phase);
    wgmma_fence();
    this->template issue_scores<TileK, TileQ>(scores, shared.k, fresh_zero(),
                                              shared.q[queries.stage]);
    Statistics const lse(this->lse_log2());
    wgmma_wait<0>();
    pin(scores);
    if (needs_mask) {
      this->mask(scores, key_begin, m_block);
    }
    Operand p;
    this->exponentiate(scores, lse, p);
    if constexpr (kIsFirst) {
      wait(shared.peer_k_empty, key_phase ^ 1);  // dK of the item before has left dS's place
    }
    send_p(p);
    arrive_both(shared.q_empty[queries.stage]);
    wait(shared.dout_full[dout().stage], dout().phase);
    pin(p);
    Dq dq;
    if constexpr (!kIsFirst) {
      issue_dq(dq);
    }
    wgmma_fence();
    this->template issue_gradient<TileDout>(gradient, p, shared.dout[dout().stage], !kIsFirst);
    if constexpr (!kIsFirst) {
      wgmma_wait<1>();
      pin(dq);
      add_dq(dq);
    }
    wgmma_wait<0>();
    arrive_both(shared.dout_empty[dout().stage]);
  }

  /// The second warpgroup's part.
  template <bool kIsFirst>
  __device__ __forceinline__ void make_ds_and_dk(bool is_last) {
    Scores dp;
    wait(shared.dout_full[dout().stage], dout().phase);
    wgmma_fence();
    this->template issue_scores<TileV, TileDout>(dp, shared.v, fresh_zero(),
                                                 shared.dout[dout().stage]);
    Statistics const softmax_d(this->softmax_d());
    Operand p, ds;
    receive_p(p);
    wgmma_wait<0>();
    pin(dp);
    if (is_last) {
      arrive(shared.v_read);
    }
    this->differentiate(dp, p, softmax_d, ds);
    pin(ds);
    arrive_both(shared.dout_empty[dout().stage]);
    send_ds(ds);
    wait(shared.q_full[queries.stage], queries.phase);
    pin(ds);
    Dq dq;
    if constexpr (!kIsFirst) {
      issue_dq(dq);
    }
    wgmma_fence();
    this->template issue_gradient<TileQ>(gradient, ds, shared.q[queries.stage], !kIsFirst);
    if constexpr (!kIsFirst) {
      wgmma_wait<1>();
      pin(dq);
      add_dq(dq);
    }
    wgmma_wait<0>();
    arrive_both(shared.q_empty[queries.stage]);
  }
  template <bool kIsFirst, class Walk>
  __device__ __forceinline__ void step(int key_begin, Walk const& walk) {
    if constexpr (kMakesP) {
      make_p_and_dv<kIsFirst>(key_begin, walk.m_block, walk.needs_mask());
    } else {
      make_ds_and_dk<kIsFirst>(walk.steps_left == 1);
    }
    queries.advance();
  }

  // ---- Items ----

  /// Where a block of 64 columns of dV or dK leaves through: V, or where dS and the other thread
  /// block's K have been.
  __device__ __forceinline__ char* outbox(int block) const {
    constexpr int kBytes = SmemTile<64, 64>::kBytes;
    if constexpr (kMakesP) {
      return shared.v + block * kBytes;
    } else {
      return block < Traits::kStages ? shared.ds[block]
                                     : shared.peer_k + (block - Traits::kStages) * kBytes;
    }
  }
  /// Writes this warp's 16 rows of dV or dK to shared memory, and starts their copies.
  template <int kFirstCol = 0>
  __device__ __forceinline__ void write_gradient() const {
    if constexpr (kFirstCol < kGradientCols) {
      this->template store_gradient<SmemTile<64, 64>, kFirstCol / 8>(
          gradient, kMakesP ? 1.f : params.problem.softmax_scale, outbox(kFirstCol / 64));
      write_gradient<kFirstCol + 64>();
    }
  }
  __device__ __forceinline__ void send_gradient(WorkItem const& item) const {
    write_gradient();
    fence_async_proxy();
    __syncwarp();
    if (lane_idx() == 0) {
      uint64_t const once = evict_first();
      Sequence const sequence = params.sequence(item.batch);
      RowOrigin const origin =
          params.rows.origin(sequence.entry_k, sequence.first_k, sequence.seqlen_k);
      int const row = origin.row + first_key<Traits>(item) + warp_idx * 16;
#pragma unroll
      for (int block = 0; block < kGradientCols / 64; ++block) {
        tma_store(kMakesP ? params.dv : params.dk,
                  smem_address(outbox(block)) + warp_idx * 16 * SmemTile<64, 64>::kRowBytes,
                  {block * 64, row, item.head_k, origin.outer, origin.wrap}, once);
      }
      tma_store_commit();
    }
  }
  /// While dS of the last query tile comes from the other thread block, dV leaves.
  __device__ __forceinline__ void finish_dv(WorkItem const& item) {
    wait(shared.v_read, key_phase);
    send_gradient(item);
    if (item.m_min < item.m_max) {
      finish_dq();
    }
    arrive(shared.k_empty);
    tma_store_wait_read();
    arrive(shared.v_empty);
  }
  /// What dK leaves through is read by both thread blocks' products, and written by their copies,
  /// until dQ of the last query tile is made.
  __device__ __forceinline__ void finish_dk(WorkItem const& item) {
    if (item.m_min < item.m_max) {
      finish_dq();
    } else {
      arrive(shared.v_read);
    }
    arrive(shared.k_empty);
    wait(shared.k_empty, key_phase);
    wait(shared.peer_k_full, key_phase);  // of an item without query tiles
    Ring<Traits::kStages> next = queries;
#pragma unroll
    for (int i = 0; i < Traits::kStages; ++i) {
      wait(shared.ds_empty[next.stage], next.phase ^ 1);
      next.advance();
    }
    send_gradient(item);
    tma_store_wait_read();
    arrive(shared.peer_k_empty);
  }

  __device__ __forceinline__ void run() {
    WorkItem item;
    while (next_item<Traits>(shared, key_phase, item)) {
      if (!kMakesP) {
        wait(shared.v_full, key_phase);
      }
      if (item.m_min < item.m_max) {
        int const key_begin = Core::uniform(first_key<Traits>(item));
        auto walk = this->walk(item, key_begin);
        step<true>(key_begin, walk);
#pragma unroll 1
        while (walk.steps_left > 1) {
          walk.advance();
          step<false>(key_begin, walk);
        }
      } else {
        this->clear(gradient);
      }
      wgmma_wait<0>();  // nothing is pending, but ptxas wants it before the gradient is read
                        // (C7514)
      pin(gradient);
      item = shared.item;  // looked up again: there are no registers to keep it
      if constexpr (kMakesP) {
        finish_dv(item);
      } else {
        finish_dk(item);
      }
      key_phase ^= 1;
    }
  }
};

}  // namespace flash::sm90
