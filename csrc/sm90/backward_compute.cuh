// A computing warpgroup: 64 keys of each item.
//
// Of a query tile it makes S^T = K Q^T and dP^T = V dO^T, whose rows are its keys, and with
// P = exp2(S c - lse), dS = P (dP - softmax_d) adds dV += P^T dO and dK += dS^T Q, the left
// operands straight from registers. dQ = dS K runs over the keys of all warpgroups, so dS goes
// through shared memory and each warpgroup makes a part of dQ.
#pragma once

#include "arith/block_range.h"
#include "device/wgmma.cuh"
#include "sm90/backward_load.cuh"
#include "sm90/row_softmax.cuh"

namespace flash::sm90 {

template <class Traits>
struct BackwardWarpgroup {
  static constexpr Sm90BackwardConfig kConfig = Traits::kConfig;
  static constexpr DType kDType = Traits::kDType;
  static constexpr int kFragmentsS = Traits::kTileM / 8, kStepsM = Traits::kTileM / 16;
  using TileQ = typename Traits::TileQ;
  using TileDout = typename Traits::TileDout;
  using TileK = typename Traits::TileK;
  using TileV = typename Traits::TileV;
  using TileDs = typename Traits::TileDs;
  using Scores = float[kFragmentsS][4];  // 64 keys x tile_m queries
  using Operand = uint32_t[kStepsM][4];  // the same as a left operand of 16 queries a step

  BackwardKernelParams const& params;
  typename Traits::SharedStorage& shared;
  int warpgroup_idx;  // among the computing ones
  float const scale_log2;
  int const warp_idx;  // in its warpgroup
  Ring<Traits::kStages> q;
  Ring<Traits::kStages> dout;
  Ring<Traits::kStages> ds;
  Ring<Traits::kStages> last_ds{Traits::kStages - 1, 1};  // of the query tile before
  uint32_t key_phase = 0, outbox_phase = 0;
  float dk[kConfig.head_dim / 8][4];
  float dv[kConfig.head_dim_v / 8][4];

  static __device__ __forceinline__ int lane_idx() { return threadIdx.x % 32; }
  static __device__ __forceinline__ void wait(uint64_t& barrier, uint32_t phase) {
    mbarrier_wait(smem_address(&barrier), phase);
  }
  static __device__ __forceinline__ void arrive(uint64_t& barrier) {
    if (lane_idx() == 0) {
      mbarrier_arrive(smem_address(&barrier));
    }
  }
  /// Makes what this warp has written to shared memory the copy engine's.
  static __device__ __forceinline__ void hand_over(uint64_t& full) {
    fence_async_proxy();
    __syncwarp();
    arrive(full);
  }
  static __device__ __forceinline__ int uniform(int value) {
    return __shfl_sync(0xffffffffu, value, 0);
  }

  // ---- Mask ----

  __device__ __forceinline__ int first_key(WorkItem const& item) const {
    return item.n_block * Traits::kTileN + warpgroup_idx * 64;
  }
  /// Query tiles that need no element mask for the keys of this warpgroup.
  __device__ __forceinline__ BlockRange full_range(WorkItem const& item) const {
    if (first_key(item) + 64 > params.problem.shape.seqlen_k) {
      return {0, 0};
    }
    return full_m_block_range(tile_grid(params.problem, Traits::kTileM, 64),
                              item.n_block * Traits::kWarpgroups + warpgroup_idx);
  }
  /// Hides the queries that don't see a key, and all from keys beyond the end.
  __device__ __forceinline__ void mask(Scores& scores, int key_begin, int m_block) const {
    Shape const& shape = params.problem.shape;
    int const lane_col = m_block * Traits::kTileM + lane_idx() % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const key = key_begin + warp_idx * 16 + half * 8 + lane_idx() / 4;
      KeyRange const rows =
          visible_keys(transposed(params.problem.mask), key, shape.seqlen_k, shape.seqlen_q);
      mask_row(scores, half, rows.begin - lane_col,
               (key < shape.seqlen_k ? rows.end : 0) - lane_col);
    }
  }

  // ---- Products ----

  /// S^T or dP^T: rows of `keys` times rows of `queries`.
  template <class TileKeys, class TileQueries>
  __device__ __forceinline__ void issue_scores(Scores& scores, char* keys, char* rows) const {
    uint64_t const a = advanced(wgmma_descriptor<TileKeys>(smem_address(keys)),
                                warpgroup_idx * 64 * TileKeys::kRowBytes);
    uint64_t const b = wgmma_descriptor<TileQueries>(smem_address(rows));
#pragma unroll
    for (int step = 0; step < TileKeys::kCols / 16; ++step) {
      Wgmma<Traits::kTileM, kDType>::template ss<false>(
          scores, advanced(a, columns_step<TileKeys>(step)),
          advanced(b, columns_step<TileQueries>(step)), step > 0);
    }
    wgmma_commit();
  }
  /// dV += P^T dO or dK += dS^T Q.
  template <class TileQueries, int kFragments>
  __device__ __forceinline__ void issue_gradient(float (&gradient)[kFragments][4],
                                                 Operand const& left, char* rows,
                                                 int has_sums) const {
    uint64_t const b = wgmma_descriptor<TileQueries>(smem_address(rows));
#pragma unroll
    for (int step = 0; step < kStepsM; ++step) {
      Wgmma<kFragments * 8, kDType>::template rs<true>(
          gradient, left[step], advanced(b, rows_step<TileQueries>(step)), step > 0 ? 1 : has_sums);
    }
    wgmma_commit();
  }
  /// 64 rows and columns of dQ = dS K: of its rows this warpgroup's 64, or all of them and the
  /// columns from this warpgroup's column block on.
  __device__ __forceinline__ void issue_dq(float (&dq)[8][4]) const {
    int const rows = Traits::kDqByRows ? warpgroup_idx * TileDs::kBlockBytes : 0;
    int const columns = Traits::kDqByRows ? 0 : warpgroup_idx * TileK::kBlockBytes;
    uint64_t const a =
        advanced(wgmma_descriptor<TileDs>(smem_address(shared.ds[last_ds.stage])), rows);
    uint64_t const b = advanced(wgmma_descriptor<TileK>(smem_address(shared.k)), columns);
#pragma unroll
    for (int step = 0; step < Traits::kTileN / 16; ++step) {
      Wgmma<64, kDType>::template ss<true, true>(dq, advanced(a, rows_step<TileDs>(step)),
                                                 advanced(b, rows_step<TileK>(step)), step > 0);
    }
    wgmma_commit();
  }

  // ---- Steps ----

  /// P^T in both precisions: scores become fp32 probabilities.
  __device__ __forceinline__ void exponentiate(Scores& scores, Operand& p) const {
    uint32_t const lse = smem_address(shared.lse_log2[q.stage]) + lane_idx() % 4 * 8;
#pragma unroll
    for (int n = 0; n < kFragmentsS; ++n) {
      float2 const row_lse = load_shared_float2(lse + n * 32);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float const left = exp2_approx(fmaf(scores[n][2 * half], scale_log2, -row_lse.x));
        float const right = exp2_approx(fmaf(scores[n][2 * half + 1], scale_log2, -row_lse.y));
        p[n / 2][n % 2 * 2 + half] = pack2<kDType>(left, right);
      }
    }
  }
  /// dS^T = P^T (dP^T - softmax_d) with P as it went into dV.
  __device__ __forceinline__ void differentiate(Scores const& dp, Operand const& p,
                                                Operand& ds) const {
    uint32_t const softmax_d = smem_address(shared.softmax_d[dout.stage]) + lane_idx() % 4 * 8;
#pragma unroll
    for (int n = 0; n < kFragmentsS; ++n) {
      float2 const row_d = load_shared_float2(softmax_d + n * 32);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float2 const probability = unpack2<kDType>(p[n / 2][n % 2 * 2 + half]);
        ds[n / 2][n % 2 * 2 + half] =
            pack2<kDType>(probability.x * (dp[n][2 * half] - row_d.x),
                          probability.y * (dp[n][2 * half + 1] - row_d.y));
      }
    }
  }
  /// 16 rows of a warp of packed fragments, into a tile in which the warpgroup's rows begin with
  /// first_row.
  template <class Tile, int kSteps>
  __device__ __forceinline__ void store_rows(uint32_t const (&packed)[kSteps][4], char* tile,
                                             int first_row) const {
    int const row = first_row + warp_idx * 16 + lane_idx() % 16;
    uint32_t const row_address = smem_address(tile) + row * Tile::kRowBytes;
    uint32_t const chunk_offset = (lane_idx() / 16 ^ Tile::swizzle(row)) << 4;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      stmatrix_x4(Tile::moved(row_address, chunk_offset, 0, 16 * step), packed[step][0],
                  packed[step][1], packed[step][2], packed[step][3]);
    }
  }
  __device__ __forceinline__ char* open_outbox() {
    wait(shared.outbox_empty[warpgroup_idx], outbox_phase ^ 1);
    outbox_phase ^= 1;
    return shared.outbox[warpgroup_idx];
  }
  __device__ __forceinline__ void store_dq(float const (&dq)[8][4]) {
    constexpr int kFragments = Traits::kDqCols / 8;
    // With fewer than eight fragments a warpgroup of its own, the later one has the last ones.
    int const skipped = warpgroup_idx * (8 - kFragments);
    uint32_t const strip =
        smem_address(open_outbox()) + warp_idx * Traits::kStripBytes + lane_idx() * 16;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      if (kFragments == 8 || (n >= skipped && n < skipped + kFragments)) {
        store_shared_float4(strip + (n - skipped) * Traits::kFragmentBytes, dq[n]);
      }
    }
    hand_over(shared.outbox_full[warpgroup_idx]);
  }

  /// Only one warpgroup at a time issues S and dP: so the other one's exponentials and dS run
  /// beside them, and not beside its own.
  __device__ __forceinline__ void take_turn() const { named_barrier_sync(1 + warpgroup_idx, 256); }
  __device__ __forceinline__ void pass_turn() const {
    named_barrier_arrive(1 + (warpgroup_idx ^ 1), 256);
  }

  /// One query tile, and dQ of the one before: by then the other warpgroup's dS is there, although
  /// it is half a tile behind. Order of issue: S, dP | dQ, dV, dK. dQ is handed over under dV and
  /// dK, the only products that leave shared memory bandwidth for it.
  template <bool kIsFirst>
  __device__ __forceinline__ void step(int key_begin, int m_block, bool needs_mask) {
    Scores scores, dp;
    wait(shared.q_full[q.stage], q.phase);
    take_turn();
    wgmma_fence();
    issue_scores<TileK, TileQ>(scores, shared.k, shared.q[q.stage]);
    wait(shared.dout_full[dout.stage], dout.phase);
    wgmma_fence();
    issue_scores<TileV, TileDout>(dp, shared.v, shared.dout[dout.stage]);
    pass_turn();
    wgmma_wait<1>();
    pin(scores);
    if (needs_mask) {
      mask(scores, key_begin, m_block);
    }
    Operand p, ds_operand;
    exponentiate(scores, p);
    pin(p);
    if constexpr (kIsFirst) {
      wait(shared.dk_empty, key_phase ^ 1);
    }
    // Also keeps the next wait from moving above the exponentials: ptxas moves it to the top of its
    // basic block.
    wait(shared.ds_empty[ds.stage], ds.phase ^ 1);
    wgmma_wait<0>();
    pin(dp);
    differentiate(dp, p, ds_operand);
    store_rows<TileDs>(ds_operand, shared.ds[ds.stage], warpgroup_idx * 64);
    pin(ds_operand);
    hand_over(shared.ds_full[ds.stage]);
    float dq[8][4];
    if constexpr (!kIsFirst) {
      wait(shared.ds_full[last_ds.stage], last_ds.phase);
      wgmma_fence();
      issue_dq(dq);
    }
    wgmma_fence();
    issue_gradient<TileDout>(dv, p, shared.dout[dout.stage], !kIsFirst);
    issue_gradient<TileQ>(dk, ds_operand, shared.q[q.stage], !kIsFirst);
    if constexpr (!kIsFirst) {
      wgmma_wait<2>();
      pin(dq);
      arrive(shared.ds_empty[last_ds.stage]);
      store_dq(dq);
    }
    wgmma_wait<0>();
    arrive(shared.dout_empty[dout.stage]);
    arrive(shared.q_empty[q.stage]);
    last_ds = ds;
    ds.advance();
    q.advance();
    dout.advance();
  }
  /// dQ of the last query tile of an item.
  __device__ __forceinline__ void finish_steps() {
    arrive(shared.v_empty);
    wait(shared.ds_full[last_ds.stage], last_ds.phase);
    float dq[8][4];
    wgmma_fence();
    issue_dq(dq);
    wgmma_wait<0>();
    pin(dq);
    arrive(shared.k_empty);
    arrive(shared.ds_empty[last_ds.stage]);
    store_dq(dq);
  }

  // ---- Epilogue ----

  template <class Tile, int kFragments>
  __device__ __forceinline__ void store_gradient(float (&gradient)[kFragments][4], float scale,
                                                 char* tile, uint64_t& full) const {
    uint32_t packed[kFragments / 2][4];
#pragma unroll
    for (int step = 0; step < kFragments / 2; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float const* const pair = &gradient[2 * step + i / 2][i % 2 * 2];
        packed[step][i] = pack2<kDType>(pair[0] * scale, pair[1] * scale);
      }
    }
    store_rows<Tile>(packed, tile, 0);
    hand_over(full);
  }
  /// dK leaves through the buffer of dS that has the warpgroup's number, for the outbox is still
  /// taken by dQ.
  __device__ __forceinline__ void finish() {
    wgmma_wait<0>();  // nothing is pending, but ptxas wants it before dK and dV are read (C7514)
    pin(dk);
    pin(dv);
    bool const is_last_ds = int(last_ds.stage) == warpgroup_idx;
    wait(shared.ds_empty[warpgroup_idx], is_last_ds ? last_ds.phase : ds.phase ^ 1);
    store_gradient<typename Traits::TileDk>(
        dk, params.problem.softmax_scale, shared.ds[warpgroup_idx], shared.dk_full[warpgroup_idx]);
    char* const outbox = open_outbox();
    store_gradient<typename Traits::TileDv>(dv, 1.f, outbox, shared.outbox_full[warpgroup_idx]);
  }

  /// Query tiles of an item, in the order of for_each_query_tile().
  __device__ __forceinline__ void walk(WorkItem const& item) {
    BlockRange const full = full_range(item);
    int const key_begin = first_key(item);
    int const m_min = uniform(item.m_min), m_max = uniform(item.m_max);
    int const full_min = uniform(full.min), full_max = uniform(full.max);
    auto const needs_mask = [&](int m_block) { return m_block < full_min || m_block >= full_max; };
    int const steps = params.problem.shape.query_heads_per_key_head() * (m_max - m_min);
    int m_block = m_max - 1;
    step<true>(key_begin, m_block, needs_mask(m_block));
    // Else what the first step derives from it is held in registers for the others, and spills.
    warpgroup_idx = uniform(warpgroup_idx);
#pragma unroll 1
    for (int i = 1; i < steps; ++i) {
      m_block = m_block == m_min ? m_max - 1 : m_block - 1;
      step<false>(key_begin, m_block, needs_mask(m_block));
    }
    finish_steps();
  }

  __device__ __forceinline__ void run() {
    if (warpgroup_idx == 1) {
      pass_turn();
    }
    WorkItem item;
    while (next_item<Traits>(shared, key_phase, item)) {
      wait(shared.v_full, key_phase);
      if (item.m_min < item.m_max) {
        walk(item);
      } else {
        wait(shared.dk_empty, key_phase ^ 1);
        arrive(shared.v_empty);
        arrive(shared.k_empty);
        clear_gradients();
      }
      finish();
      key_phase ^= 1;
    }
  }
  /// No query sees the keys.
  __device__ __forceinline__ void clear_gradients() {
#pragma unroll
    for (int n = 0; n < kConfig.head_dim / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dk[n][e] = 0.f;
      }
    }
#pragma unroll
    for (int n = 0; n < kConfig.head_dim_v / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        dv[n][e] = 0.f;
      }
    }
  }
};

}  // namespace flash::sm90
