// S, dP, P and dS of a visit where they go to shared memory: warps along rows and keys.
#pragma once

#include "sm80/backward_extras.cuh"
#include "sm80/backward_traits.cuh"

namespace flash::sm80 {

/// Calls f(m, n, half) for each pair that a lane holds of an accumulator; with kParts for those of
/// one of as many parts.
template <int kM, int kN, int kParts = 1, class F>
__device__ __forceinline__ void for_each_pair(F const& f, int part = 0) {
  constexpr int kPairs = kM * kN * 2;
#pragma unroll
  for (int idx = 0; idx < kPairs; ++idx) {
    if (idx >= part * kPairs / kParts && idx < (part + 1) * kPairs / kParts) {
      f(idx / 2 % kM, idx / 2 / kM, idx % 2);
    }
  }
}

/// From scores and dP - softmax_d to P and dS, which go to shared memory as tiles of the inputs'
/// type.
template <class Traits>
struct GradientStore {
  static constexpr int kM = Traits::kMS, kN = 2 * Traits::kNS;
  using Scores = float[kM][kN][4];
  float const (&lse_log2)[kM][2];
  float scale_log2;
  ScoreWriter<typename Traits::TileS> writer;

  __device__ __forceinline__ uint32_t address(int m, int n, int half) const {
    return writer.at(m * 16 * Traits::kWarpsMS + half * 8,
                     n / 2 * 16 * Traits::kWarpsNS + n % 2 * 8);
  }
  /// P of a pair, in the place of its scores too. `kept` is KeptElements, or null without dropout.
  template <class Kept>
  __device__ __forceinline__ void store_p(Scores& scores, int m, int n, int half,
                                          Kept const& kept) const {
    float* const p = scores[m][n] + 2 * half;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      p[e] = exp2_approx(fmaf(p[e], scale_log2, -lse_log2[m][half]));
    }
    PackedPair<Traits::kDType> packed(p[0], p[1]);
    if constexpr (!std::is_null_pointer_v<Kept>) {
      kept.drop(packed, m, n, half);
    }
    store_score_pair(address(m, n, half) + Traits::kSmemP, packed);
  }
  __device__ __forceinline__ void store_ds(Scores const& p, Scores const& dp, int m, int n,
                                           int half) const {
    PackedPair<Traits::kDType> const packed(p[m][n][2 * half] * dp[m][n][2 * half],
                                            p[m][n][2 * half + 1] * dp[m][n][2 * half + 1]);
    store_score_pair(address(m, n, half) + Traits::kSmemDS, packed);
  }
  template <class Kept>
  __device__ __forceinline__ void store_all(Scores& scores, Scores const& dp,
                                            Kept const& kept) const {
    for_each_pair<kM, kN>([&](int m, int n, int half) {
      store_p(scores, m, n, half, kept);
      store_ds(scores, dp, m, n, half);
    });
  }
};

/// Row statistics of the rows that a lane has of S.
template <class Traits>
struct LaneStats {
  float lse_log2[Traits::kMS][2], minus_d[Traits::kMS][2];

  /// Of query tile m_block, from those of the head.
  __device__ __forceinline__ void load(RowStats const* row_stats, int m_block) {
    int const thread_idx = fresh_thread_idx();
    int const warp_m = thread_idx / 32 % Traits::kWarpsMS;
    RowStats const* const lane_stats =
        row_stats + m_block * Traits::kConfig.tile_m + 16 * warp_m + thread_idx % 32 / 4;
#pragma unroll
    for (int m = 0; m < Traits::kMS; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        RowStats const stats = lane_stats[m * 16 * Traits::kWarpsMS + half * 8];
        lse_log2[m][half] = stats.lse_log2;
        minus_d[m][half] = stats.minus_d;
      }
    }
  }
};

/// S = Q K^T, dP - softmax_d = dO V^T - softmax_d; leaves P and dS in shared memory, when all warps
/// are done with the last visit's.
template <class Traits>
__device__ __forceinline__ void scores(BackwardParams const& params, DropoutKey const& dropout_key,
                                       LaneStats<Traits> const& stats, uint32_t smem,
                                       KeyTile const& tile, QueryVisit const& visit, int visit_idx,
                                       VisitBarriers<Traits> const& barriers) {
  constexpr BackwardConfig kConfig = Traits::kConfig;
  constexpr int kRowStep = 16 * Traits::kWarpsMS, kColStep = 16 * Traits::kWarpsNS;
  // Exponentials under the product of dP: nothing comes between scores and P, and 16-bit products
  // are made in steps.
  constexpr bool kEarlyP = !kConfig.extras && Traits::kElementBytes == 2;
  using Store = GradientStore<Traits>;
  using ReadRows = PieceReader<typename Traits::TileQ, Operand::kA>;
  using ReadKeys = PieceReader<typename Traits::TileK, Operand::kBTransposed>;
  int const thread_idx = fresh_thread_idx();
  int const warp = Traits::kSharesS ? thread_idx / 32 % Traits::kWarpsS : thread_idx / 32;
  int const warp_m = warp % Traits::kWarpsMS, warp_n = warp / Traits::kWarpsMS;
  int const first_row = visit.m_block * kConfig.tile_m + 16 * warp_m;

  auto const& lse_log2 = stats.lse_log2;
  auto const& minus_d = stats.minus_d;
  float acc_s[Store::kM][Store::kN][4], acc_dp[Store::kM][Store::kN][4];
  uint32_t const stage_bytes = visit_idx % Traits::kStages * Traits::TileQ::kBytes;
  auto add_product = [&](auto& acc, uint32_t rows_address, uint32_t keys_address,
                         auto const& beside) {
    ReadRows const read_rows(rows_address, 16 * warp_m, 0, thread_idx);
    ReadKeys const read_keys(keys_address, 16 * warp_n, 0, thread_idx);
    warp_product<Traits::kDType, Traits::kHeadDim>(
        acc, [&](int m, int k) { return load_piece(read_rows, m * kRowStep, Traits::kPieceK * k); },
        [&](int n, int k) { return load_piece(read_keys, n * kColStep, Traits::kPieceK * k); },
        params.allow_tf32, beside);
  };
  ScoreHead const of{tile.batch, visit.head, tile.sequence};
  PiecePlacement const place{first_row, kRowStep, tile.n_block * kConfig.tile_n + 16 * warp_n,
                             kColStep};
  auto const hide = [&] {
    if (visit.m_block < tile.full.min || visit.m_block >= tile.full.max) {
      apply_mask(acc_s, place, params.mask, of.sequence.seqlen_q, of.sequence.seqlen_k);
    }
  };
  float const scale_log2 =
      (kConfig.extras ? score_unit(params.scores, params.softmax_scale) : params.softmax_scale) *
      kLog2E;
  Store const store{
      lse_log2, scale_log2,
      ScoreWriter<typename Traits::TileS>(smem, 16 * warp_m, 16 * warp_n, thread_idx)};
  bool const has_dropout = kConfig.extras && params.dropout.rng_state != nullptr;

  clear(acc_s);
  add_product(acc_s, smem + Traits::kSmemQ + stage_bytes, smem + Traits::kSmemK, NothingBeside{});
  if constexpr (kEarlyP) {
    hide();
    barriers.wait_done_before(visit_idx);
  }
  if (has_dropout) {
    clear(acc_dp);  // dropout comes before softmax_d
  } else {
    set_rows(acc_dp, minus_d);
  }
  constexpr int kSteps = Traits::kHeadDim / Traits::kPieceK * Traits::kNS;
  add_product(acc_dp, smem + Traits::kSmemDO + stage_bytes, smem + Traits::kSmemV, [&](int step) {
    if constexpr (kEarlyP) {
      for_each_pair<Store::kM, Store::kN, kSteps>(
          [&](int m, int n, int half) { store.store_p(acc_s, m, n, half, nullptr); }, step);
    }
  });
  if constexpr (kEarlyP) {
    mbarrier_arrive_warp(barriers.p_stored());
    for_each_pair<Store::kM, Store::kN>(
        [&](int m, int n, int half) { store.store_ds(acc_s, acc_dp, m, n, half); });
    mbarrier_arrive_warp(barriers.ds_stored());
    return;
  }

  float const slope = kConfig.extras ? alibi_slope(params.scores, tile.batch, visit.head) : 0.f;
  if constexpr (kConfig.extras) {
    apply_options(acc_s, place, params.scores, params.softmax_scale, slope, of.sequence);
    add_bias<Traits::kDType>(acc_s, place, params, of);
  }
  hide();
  barriers.wait_done_before(visit_idx);
  auto const store_all = [&](auto const& kept) {
    store.store_all(acc_s, acc_dp, kept);
    mbarrier_arrive_warp(barriers.p_stored());
    mbarrier_arrive_warp(barriers.ds_stored());
  };
  if constexpr (kConfig.extras) {
    auto const kept_elements = [&] {
      int const batch_head = fresh(tile.batch * params.shape.num_heads + visit.head);
      return KeptElements<Traits::kMS, Traits::kNS>(params.dropout, dropout_key, batch_head, place);
    };
    if (params.scores.bias.ptr != nullptr) {
      if (has_dropout) {
        drop_dp(acc_dp, kept_elements(), params.dropout.scale, minus_d);
      }
      // Warps beyond the pieces repeat others' work, which must not be added twice.
      if (!Traits::kSharesS || thread_idx / 32 < Traits::kWarpsS) {
        store_bias_gradient(acc_dp, acc_s, lse_log2, scale_log2, place, params.dbias, of);
      }
      multiply_by_biased_derivative<Traits::kDType>(acc_dp, acc_s, place, params, of);
      if (has_dropout) {  // what it keeps is computed again: held until now, it spilled
        store_all(kept_elements());
        return;
      }
    } else if (has_dropout) {
      auto const kept = kept_elements();
      drop_dp(acc_dp, kept, params.dropout.scale, minus_d);
      multiply_by_derivative(acc_dp, acc_s, place, params, slope, of.sequence);
      store_all(kept);
      return;
    } else {
      multiply_by_derivative(acc_dp, acc_s, place, params, slope, of.sequence);
    }
  }
  store_all(nullptr);
}

}  // namespace flash::sm80
