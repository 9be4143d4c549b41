// A visit by warps that own keys: each has S^T, dP^T, dV and dK of the same keys, so that P^T and
// dS^T go from accumulator to operand registers, as P does in the forward. Of shared memory only dQ
// needs dS^T, which it finds complete some products later.
#pragma once

#include "sm80/backward_scores.cuh"

namespace flash::sm80 {

/// The accumulators of a warp's keys.
template <class Traits>
struct KeySums {
  float dk[Traits::kNDkv][2 * Traits::kDDkv][4], dv[Traits::kNDkv][2 * Traits::kDDkv][4];
};

/// Queries whose scores are in registers at a time.
inline constexpr int kQueryStep = 32;

/// Hides the pairs of keys (rows) and queries that the mask does, and keys past the end.
template <int kM, int kN>
__device__ __forceinline__ void apply_transposed_mask(float (&scores)[kM][kN][4],
                                                      PiecePlacement const& place, Mask mask,
                                                      Sequence const& sequence) {
  apply_mask(scores, place, transposed(mask), sequence.seqlen_k, sequence.seqlen_q);
  for_each_pair<kM, kN>([&](int m, int n, int half) {
    int const key = place.first_row + m * place.row_step + half * 8 + fresh_thread_idx() % 32 / 4;
    if (key >= sequence.seqlen_k) {
      scores[m][n][2 * half] = scores[m][n][2 * half + 1] = -kInfinity;
    }
  });
}

/// dV += P^T dO and dK += dS^T Q of kQueryStep queries of a visit, from `first_query` on; dS^T goes
/// to shared memory too. before_ds() is called before the first of it, after_ds() behind the last.
template <class Traits, class BeforeDs, class AfterDs>
__device__ __forceinline__ void add_queries(KeySums<Traits>& sums, BackwardParams const& params,
                                            uint32_t smem, KeyTile const& tile,
                                            QueryVisit const& visit, int stage, int first_query,
                                            BeforeDs const& before_ds, AfterDs const& after_ds) {
  using TileQ = typename Traits::TileQ;
  using TileK = typename Traits::TileK;
  using ReadKeys = PieceReader<TileK, Operand::kA>;
  using ReadQueries = PieceReader<TileQ, Operand::kBTransposed>;
  using ReadColumns = PieceReader<TileQ, Operand::kB>;
  constexpr BackwardConfig kConfig = Traits::kConfig;
  constexpr DType kDType = Traits::kDType;
  constexpr int kM = Traits::kNDkv, kN = kQueryStep / 8, kRowStep = 16 * kConfig.num_warps;
  static_assert(kConfig.tile_m == 2 * kQueryStep, "a visit is two steps");
  int const thread_idx = fresh_thread_idx();
  int const first_key = 16 * (thread_idx / 32);
  uint32_t const q = smem + Traits::kSmemQ + stage * TileQ::kBytes;
  uint32_t const dout = smem + Traits::kSmemDO + stage * TileQ::kBytes;

  float s[kM][kN][4], dp[kM][kN][4];
  auto const add_product = [&](auto& acc, uint32_t keys, uint32_t queries, auto const& beside) {
    ReadKeys const read_keys(keys, first_key, 0, thread_idx);
    ReadQueries const read_queries(queries, first_query, 0, thread_idx);
    warp_gemm<kDType, Traits::kHeadDim / 16>(
        acc, [&](int m, int k) { return load_piece(read_keys, m * kRowStep, 16 * k); },
        [&](int n, int k) { return load_piece(read_queries, 16 * n, 16 * k); }, beside);
  };
  clear(s);
  add_product(s, smem + Traits::kSmemK, q, NothingBeside{});
  if (visit.m_block < tile.full.min || visit.m_block >= tile.full.max) {
    PiecePlacement const place{tile.n_block * kConfig.tile_n + first_key, kRowStep,
                               visit.m_block * kConfig.tile_m + first_query, 16};
    apply_transposed_mask(s, place, params.mask, tile.sequence);
  }

  float4 stats[kN];  // of two queries each
  uint32_t const lane_stats =
      smem + Traits::kSmemStats + (first_query + thread_idx % 4 * 2) * sizeof(RowStats);
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    stats[n] = load_shared_float4(lane_stats + 8 * n * sizeof(RowStats));
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      dp[m][n][0] = dp[m][n][2] = stats[n].y;
      dp[m][n][1] = dp[m][n][3] = stats[n].w;
    }
  }
  float const scale_log2 = params.softmax_scale * kLog2E;
  Piece p[kM][kN / 2], ds[kM][kN / 2];
  add_product(dp, smem + Traits::kSmemV, dout, [&](int step) {
    for_each_pair<kM, kN, Traits::kHeadDim / 16 * kN / 2>(
        [&](int m, int n, int half) {
          float* const pair = s[m][n] + 2 * half;
          pair[0] = exp2_approx(fmaf(pair[0], scale_log2, -stats[n].x));
          pair[1] = exp2_approx(fmaf(pair[1], scale_log2, -stats[n].z));
          set_pair<kDType>(p[m], n, half, pair[0], pair[1]);
        },
        step);
  });

  before_ds();
  FragmentWriter<typename Traits::TileST> const writer(smem + Traits::kSmemDS, first_key, 0,
                                                       thread_idx);
  ReadColumns const read_dout(dout, first_query, 0, thread_idx);
  ReadColumns const read_q(q, first_query, 0, thread_idx);
  warp_gemm<kDType, kN / 2>(
      sums.dv, [&](int m, int k) { return p[m][k]; },
      [&](int d, int k) { return load_piece(read_dout, 16 * k, 16 * d); },
      [&](int step) {
        for_each_pair<kM, kN, kN / 2 * Traits::kDDkv>(
            [&](int m, int n, int half) {
              set_pair<kDType>(ds[m], n, half, s[m][n][2 * half] * dp[m][n][2 * half],
                               s[m][n][2 * half + 1] * dp[m][n][2 * half + 1]);
              store_shared(writer.at(kRowStep * m + 8 * half, first_query + 8 * n),
                           ds[m][n / 2].r[n % 2 * 2 + half]);
            },
            step);
      });
  after_ds();
  warp_gemm<kDType, kN / 2>(
      sums.dk, [&](int m, int k) { return ds[m][k]; },
      [&](int d, int k) { return load_piece(read_q, 16 * k, 16 * d); }, NothingBeside{});
}

}  // namespace flash::sm80
