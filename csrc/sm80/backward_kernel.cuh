// Backward attention of the sm80 family, main kernel: dk and dv of one key tile, and its share of
// dq.
//
// A thread block owns tile_n keys of one (batch, key head) and walks the visible query tiles of
// every query head of the group, so dk and dv are summed in registers over the whole group: no
// atomics, equal bits in every run. P is recomputed from softmax_lse. Per query tile:
//
//   wait Q, dO | S = Q K^T, dP = dO V^T, P = exp(S - lse), dS = P (dP - softmax_d) | P, dS to
//   shared memory | barrier | dV += P^T dO, dK += dS^T Q, dQ = dS K (added to the fp32 sums in the
//   workspace)
//
// dq sums lie in the order of the accumulator fragments (DqSums), so that a warp adds whole lines.
// Deterministic: thread blocks take their tiles from a ticket counter, and the key tiles add to a
// query tile in ascending order. A block waits only for smaller tickets, which are running: no
// deadlock. Design note: docs/sm80.md.
#pragma once

#include "config/backward_config.h"
#include "config/smem_limit.h"
#include "device/mma_fp32.cuh"
#include "sm80/backward_extras.cuh"
#include "sm80/backward_workspace.cuh"
#include "sm80/key_tile.cuh"

namespace flash::sm80 {

/// When the copies of the next visit start: not beside the loads of S and dP, which keep shared
/// memory busy. A thread block that is alone on its SM is 3 % faster when they start later.
enum class CopyPoint { kBeforeDv, kBeforeDk, kBeforeDq };

template <BackwardConfig kConfig_>
struct BackwardTraits {
  static constexpr BackwardConfig kConfig = kConfig_;
  static constexpr DType kDType = kConfig.dtype;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kThreads = kConfig.num_threads();
  static constexpr int kStages = kConfig.num_stages;
  static constexpr CopyPoint kCopyPoint = kStages == 1                ? CopyPoint::kBeforeDq
                                          : kConfig.blocks_per_sm > 1 ? CopyPoint::kBeforeDv
                                                                      : CopyPoint::kBeforeDk;
  // Where a visit finds its key tile: kernels of eight warps spilled 8 to 16 bytes with it in
  // registers, that of 168 registers with extras 20, that of head dim 128 with it in shared memory.
  static constexpr bool kTileInShared =
      kConfig.num_warps > 4 || (kConfig.extras && kConfig.blocks_per_sm > 2);
  static constexpr int kElementBytes = element_size(kDType);
  static constexpr int kPieceK = flash::kPieceK<kDType>;
  using TileQ = SmemTile<kConfig.tile_m, kHeadDim, kElementBytes>;        // Q and dO
  using TileK = SmemTile<kConfig.tile_n, kHeadDim, kElementBytes>;        // K and V
  using TileS = SmemTile<kConfig.tile_m, kConfig.tile_n, kElementBytes>;  // P and dS

  // Warps over the pieces of S (and dP), of dK (and dV), and of dQ.
  // More warps than S has pieces compute the same ones, and store the same values.
  static constexpr int kWarpsMS = kConfig.warps_m_s;
  static constexpr int kWarpsNS = imin(kConfig.num_warps / kWarpsMS, kConfig.tile_n / 16);
  static constexpr int kWarpsS = kWarpsMS * kWarpsNS;
  static constexpr bool kSharesS = kWarpsS < kConfig.num_warps;
  static constexpr int kWarpsNDkv = kConfig.warps_n_dkv;
  static constexpr int kWarpsDDkv = kConfig.num_warps / kWarpsNDkv;
  static constexpr int kWarpsMDq = kConfig.warps_m_dq;
  static constexpr int kWarpsDDq = kConfig.num_warps / kWarpsMDq;
  static constexpr int kMS = kConfig.tile_m / 16 / kWarpsMS, kNS = kConfig.tile_n / 16 / kWarpsNS;
  static constexpr int kNDkv = kConfig.tile_n / 16 / kWarpsNDkv;
  static constexpr int kDDkv = kHeadDim / 16 / kWarpsDDkv;
  static constexpr int kMDq = kConfig.tile_m / 16 / kWarpsMDq;
  static constexpr int kDDq = kHeadDim / 16 / kWarpsDDq;
  static_assert(kMS * kWarpsMS * 16 == kConfig.tile_m && kNS * kWarpsNS * 16 == kConfig.tile_n &&
                    kNDkv * kWarpsNDkv * 16 == kConfig.tile_n &&
                    kDDkv * kWarpsDDkv * 16 == kHeadDim &&
                    kMDq * kWarpsMDq * 16 == kConfig.tile_m && kDDq * kWarpsDDq * 16 == kHeadDim,
                "every product's pieces divide over the warps");

  static constexpr uint32_t kSmemK = 0;
  static constexpr uint32_t kSmemV = kSmemK + TileK::kBytes;
  static constexpr uint32_t kSmemQ = kSmemV + TileK::kBytes;  // kStages of Q, then kStages of dO
  static constexpr uint32_t kSmemDO = kSmemQ + kStages * TileQ::kBytes;
  static constexpr uint32_t kSmemP = kSmemDO + kStages * TileQ::kBytes;
  static constexpr uint32_t kSmemDS = kSmemP + TileS::kBytes;
  static_assert(kSmemDS + TileS::kBytes == uint32_t(kConfig.smem_bytes()),
                "table and kernel agree");
};

/// Starts the copies of one visit's Q and dO into stage `stage`.
template <class Traits>
__device__ __forceinline__ void load_visit(BackwardParams const& params, uint32_t smem,
                                           Sequence const& sequence, QueryVisit const& visit,
                                           int stage) {
  using Copy = TileCopy<typename Traits::TileQ, Traits::kThreads>;
  Shape const& shape = params.shape;
  int const first_row = visit.m_block * Traits::kConfig.tile_m;
  uint32_t const stage_bytes = stage * Traits::TileQ::kBytes;
  auto const rows = [&](Strided const& tensor, int cols) {
    return GlobalRows(tensor, sequence.entry_q, visit.head, sequence.first_q, sequence.seqlen_q,
                      cols, Traits::kElementBytes);
  };
  Copy::load(smem + Traits::kSmemQ + stage_bytes, rows(params.q, shape.head_dim), first_row,
             fresh_thread_idx());
  Copy::load(smem + Traits::kSmemDO + stage_bytes, rows(params.dout, shape.head_dim_v), first_row,
             fresh_thread_idx());
  cp_async_commit();
}

/// From scores and dP - softmax_d to P and dS, which go to shared memory as tiles of the inputs'
/// type. `kept` is KeptElements, or null without dropout.
template <class Traits, int kM, int kN, class Kept>
__device__ __forceinline__ void store_gradients(float const (&scores)[kM][kN][4],
                                                float const (&dp)[kM][kN][4],
                                                float const (&lse_log2)[kM][2], float scale_log2,
                                                ScoreWriter<typename Traits::TileS> const& writer,
                                                Kept const& kept) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float p[2], ds[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          p[e] = exp2_approx(fmaf(scores[m][n][2 * half + e], scale_log2, -lse_log2[m][half]));
          ds[e] = p[e] * dp[m][n][2 * half + e];
        }
        PackedPair<Traits::kDType> packed_p(p[0], p[1]);
        if constexpr (!std::is_null_pointer_v<Kept>) {
          kept.drop(packed_p, m, n, half);
        }
        uint32_t const address = writer.at(m * 16 * Traits::kWarpsMS + half * 8,
                                           n / 2 * 16 * Traits::kWarpsNS + n % 2 * 8);
        store_score_pair(address + Traits::kSmemP, packed_p);
        store_score_pair(address + Traits::kSmemDS, PackedPair<Traits::kDType>(ds[0], ds[1]));
      }
    }
  }
}

/// S = Q K^T, dP - softmax_d = dO V^T - softmax_d; leaves P and dS in shared memory.
template <class Traits>
__device__ __forceinline__ void scores(BackwardParams const& params, DropoutKey const& dropout_key,
                                       RowStats const* row_stats, uint32_t smem,
                                       KeyTile const& tile, QueryVisit const& visit, int stage) {
  constexpr BackwardConfig kConfig = Traits::kConfig;
  constexpr int kRowStep = 16 * Traits::kWarpsMS, kColStep = 16 * Traits::kWarpsNS;
  using ReadRows = PieceReader<typename Traits::TileQ, Operand::kA>;
  using ReadKeys = PieceReader<typename Traits::TileK, Operand::kBTransposed>;
  int const thread_idx = fresh_thread_idx();
  int const warp = Traits::kSharesS ? thread_idx / 32 % Traits::kWarpsS : thread_idx / 32;
  int const warp_m = warp % Traits::kWarpsMS, warp_n = warp / Traits::kWarpsMS;
  int const first_row = visit.m_block * kConfig.tile_m + 16 * warp_m;

  RowStats const* const lane_stats = row_stats + first_row + thread_idx % 32 / 4;
  float lse_log2[Traits::kMS][2], minus_d[Traits::kMS][2];
#pragma unroll
  for (int m = 0; m < Traits::kMS; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      RowStats const stats = lane_stats[m * kRowStep + half * 8];
      lse_log2[m][half] = stats.lse_log2;
      minus_d[m][half] = stats.minus_d;
    }
  }

  float acc_s[Traits::kMS][2 * Traits::kNS][4], acc_dp[Traits::kMS][2 * Traits::kNS][4];
  uint32_t const stage_bytes = stage * Traits::TileQ::kBytes;
  auto add_product = [&](auto& acc, uint32_t rows_address, uint32_t keys_address) {
    ReadRows const read_rows(rows_address, 16 * warp_m, 0, thread_idx);
    ReadKeys const read_keys(keys_address, 16 * warp_n, 0, thread_idx);
    warp_product<Traits::kDType, Traits::kHeadDim>(
        acc, [&](int m, int k) { return load_piece(read_rows, m * kRowStep, Traits::kPieceK * k); },
        [&](int n, int k) { return load_piece(read_keys, n * kColStep, Traits::kPieceK * k); },
        params.allow_tf32);
  };
  clear(acc_s);
  add_product(acc_s, smem + Traits::kSmemQ + stage_bytes, smem + Traits::kSmemK);
  bool const has_dropout = kConfig.extras && params.dropout.rng_state != nullptr;
  if (has_dropout) {
    clear(acc_dp);  // dropout comes before softmax_d
  } else {
    set_rows(acc_dp, minus_d);
  }
  add_product(acc_dp, smem + Traits::kSmemDO + stage_bytes, smem + Traits::kSmemV);

  ScoreHead const of{tile.batch, visit.head, tile.sequence};
  PiecePlacement const place{first_row, kRowStep, tile.n_block * kConfig.tile_n + 16 * warp_n,
                             kColStep};
  float const slope = kConfig.extras ? alibi_slope(params.scores, tile.batch, visit.head) : 0.f;
  if constexpr (kConfig.extras) {
    apply_options(acc_s, place, params.scores, params.softmax_scale, slope, of.sequence);
    add_bias<Traits::kDType>(acc_s, place, params, of);
  }
  if (visit.m_block < tile.full.min || visit.m_block >= tile.full.max) {
    apply_mask(acc_s, place, params.mask, of.sequence.seqlen_q, of.sequence.seqlen_k);
  }
  float scale_log2 = params.softmax_scale * kLog2E;
  ScoreWriter<typename Traits::TileS> const writer(smem, 16 * warp_m, 16 * warp_n, thread_idx);
  if constexpr (kConfig.extras) {
    scale_log2 = score_unit(params.scores, params.softmax_scale) * kLog2E;
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
        store_gradients<Traits>(acc_s, acc_dp, lse_log2, scale_log2, writer, kept_elements());
        return;
      }
    } else if (has_dropout) {
      auto const kept = kept_elements();
      drop_dp(acc_dp, kept, params.dropout.scale, minus_d);
      multiply_by_derivative(acc_dp, acc_s, place, params, slope, of.sequence);
      store_gradients<Traits>(acc_s, acc_dp, lse_log2, scale_log2, writer, kept);
      return;
    } else {
      multiply_by_derivative(acc_dp, acc_s, place, params, slope, of.sequence);
    }
  }
  store_gradients<Traits>(acc_s, acc_dp, lse_log2, scale_log2, writer, nullptr);
}

/// acc += tile_s^T rows: dV with (P, dO), dK with (dS, Q).
template <class Traits>
__device__ __forceinline__ void accumulate_keys(float (&acc)[Traits::kNDkv][2 * Traits::kDDkv][4],
                                                uint32_t tile_s, uint32_t rows, bool allow_tf32) {
  int const thread_idx = fresh_thread_idx();
  int const warp_n = thread_idx / 32 % Traits::kWarpsNDkv;
  int const warp_d = thread_idx / 32 / Traits::kWarpsNDkv;
  PieceReader<typename Traits::TileS, Operand::kATransposed> const read_s(tile_s, 0, 16 * warp_n,
                                                                          thread_idx);
  PieceReader<typename Traits::TileQ, Operand::kB> const read_rows(rows, 0, 16 * warp_d,
                                                                   thread_idx);
  constexpr int kStep = Traits::kPieceK;
  warp_product<Traits::kDType, Traits::kConfig.tile_m>(
      acc, [&](int n, int k) { return load_piece(read_s, kStep * k, 16 * Traits::kWarpsNDkv * n); },
      [&](int d, int k) { return load_piece(read_rows, kStep * k, 16 * Traits::kWarpsDDkv * d); },
      allow_tf32);
}

/// dQ = dS K, added to the sums of the visit's query tile.
template <class Traits>
__device__ __forceinline__ void add_dq(DqSums const& sums, uint32_t smem, int m_block,
                                       bool allow_tf32) {
  int const thread_idx = fresh_thread_idx();
  int const warp_m = thread_idx / 32 % Traits::kWarpsMDq,
            warp_d = thread_idx / 32 / Traits::kWarpsMDq;
  PieceReader<typename Traits::TileS, Operand::kA> const read_s(smem + Traits::kSmemDS, 16 * warp_m,
                                                                0, thread_idx);
  PieceReader<typename Traits::TileK, Operand::kB> const read_k(smem + Traits::kSmemK, 0,
                                                                16 * warp_d, thread_idx);
  float acc_dq[Traits::kMDq][2 * Traits::kDDq][4];
  clear(acc_dq);
  constexpr int kStep = Traits::kPieceK;
  warp_product<Traits::kDType, Traits::kConfig.tile_n>(
      acc_dq,
      [&](int m, int k) { return load_piece(read_s, 16 * Traits::kWarpsMDq * m, kStep * k); },
      [&](int d, int k) { return load_piece(read_k, kStep * k, 16 * Traits::kWarpsDDq * d); },
      allow_tf32);
  // One address and constant offsets: 64-bit address arithmetic per piece would cost more than the
  // reductions themselves.
  float* const first = sums.piece(m_block * (Traits::kConfig.tile_m / 16) + warp_m, 2 * warp_d);
#pragma unroll
  for (int m = 0; m < Traits::kMDq; ++m) {
#pragma unroll
    for (int d = 0; d < 2 * Traits::kDDq; ++d) {
      int const piece =
          Traits::kWarpsMDq * m * (Traits::kHeadDim / 8) + 2 * Traits::kWarpsDDq * (d / 2) + d % 2;
      DqSums::add(first + piece * DqSums::kPieceSize, thread_idx % 32, acc_dq[m][d]);
    }
  }
}

/// Scales, rounds and stores dk or dv through shared memory (all of which is free by then).
template <class Traits>
__device__ __forceinline__ void store_keys(float const (&acc)[Traits::kNDkv][2 * Traits::kDDkv][4],
                                           float scale, uint32_t tile_address,
                                           GlobalRows const& target, int first_row) {
  using TileK = typename Traits::TileK;
  int const thread_idx = fresh_thread_idx();
  int const warp_n = thread_idx / 32 % Traits::kWarpsNDkv;
  int const warp_d = thread_idx / 32 / Traits::kWarpsNDkv;
  FragmentWriter<TileK> const writer(tile_address, 16 * warp_n, 16 * warp_d, thread_idx);
#pragma unroll
  for (int n = 0; n < Traits::kNDkv; ++n) {
#pragma unroll
    for (int d = 0; d < 2 * Traits::kDDkv; ++d) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        PackedPair<Traits::kDType> const pair(acc[n][d][2 * half] * scale,
                                              acc[n][d][2 * half + 1] * scale);
        store_pair(writer.at(16 * Traits::kWarpsNDkv * n + half * 8,
                             16 * Traits::kWarpsDDkv * (d / 2) + d % 2 * 8),
                   pair);
      }
    }
  }
  __syncthreads();
  TileCopy<TileK, Traits::kThreads>::store(tile_address, 0, target, first_row, thread_idx);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kConfig.blocks_per_sm)
    backward_kernel(__grid_constant__ BackwardParams const params,
                    __grid_constant__ TileSource const source,
                    __grid_constant__ BackwardWorkspace const workspace) {
  using CopyK = TileCopy<typename Traits::TileK, Traits::kThreads>;
  constexpr BackwardConfig kConfig = Traits::kConfig;
  if (!fits_compiled_arch(kConfig.smem_bytes())) {
    return;
  }
  extern __shared__ __align__(128) char shared_memory[];
  uint32_t const smem = smem_address(shared_memory);

  Shape const& shape = params.shape;
  int const tile_idx = params.deterministic ? workspace.take_ticket() : fresh(blockIdx.x);
  KeyTile const own_tile = key_tile<Traits>(params, source, tile_idx);
  __shared__ KeyTile shared_tile;
  if constexpr (Traits::kTileInShared) {
    if (threadIdx.x == 0) {
      shared_tile = own_tile;
    }
    __syncthreads();
  }
  KeyTile const& tile = Traits::kTileInShared ? shared_tile : own_tile;
  if (tile.n_block < 0) {
    return;
  }
  auto const first_key = [&] { return tile.n_block * kConfig.tile_n; };
  int visits_left = tile.num_visits(shape);
  QueryVisit visit = tile.first_visit(shape);

  CopyK::load(smem + Traits::kSmemK, key_rows<Traits>(params.k, tile, shape.head_dim), first_key(),
              threadIdx.x);
  CopyK::load(smem + Traits::kSmemV, key_rows<Traits>(params.v, tile, shape.head_dim_v),
              first_key(), threadIdx.x);
  cp_async_commit();
  if (visits_left > 0) {
    load_visit<Traits>(params, smem, tile.sequence, visit, visits_left % Traits::kStages);
  }

  float acc_dk[Traits::kNDkv][2 * Traits::kDDkv][4], acc_dv[Traits::kNDkv][2 * Traits::kDDkv][4];
  clear(acc_dk);
  clear(acc_dv);
  DropoutKey const dropout_key(kConfig.extras ? params.dropout : Dropout{});
  for (; visits_left > 0; --visits_left, visit = tile.after(visit)) {
    int const stage = visits_left % Traits::kStages;
    uint32_t const stage_bytes = stage * Traits::TileQ::kBytes;
    auto const first_row = [&] {
      return workspace.first_row(tile.sequence.entry_q, fresh(visit.head), tile.first_row);
    };
    auto const copy_next_visit = [&] {
      if (visits_left > 1) {
        load_visit<Traits>(params, smem, tile.sequence, tile.after(visit),
                           (visits_left - 1) % Traits::kStages);
      }
    };
    cp_async_wait<0>();
    __syncthreads();  // this visit's Q, dO are there; every warp is done with the previous visit
    scores<Traits>(params, dropout_key, workspace.row_stats + first_row(), smem, tile, visit,
                   stage);
    __syncthreads();  // P and dS are complete

    if constexpr (Traits::kCopyPoint == CopyPoint::kBeforeDv) {
      copy_next_visit();
    }
    accumulate_keys<Traits>(acc_dv, smem + Traits::kSmemP, smem + Traits::kSmemDO + stage_bytes,
                            params.allow_tf32);
    if constexpr (Traits::kCopyPoint == CopyPoint::kBeforeDk) {
      copy_next_visit();
    }
    accumulate_keys<Traits>(acc_dk, smem + Traits::kSmemDS, smem + Traits::kSmemQ + stage_bytes,
                            params.allow_tf32);
    if constexpr (Traits::kCopyPoint == CopyPoint::kBeforeDq) {
      __syncthreads();  // every warp is done with Q and dO
      copy_next_visit();
    }
    DqSums const sums = workspace.dq_sums(first_row());
    int* const turn = workspace.turn(first_row(), visit.m_block);
    if (params.deterministic) {
      TileGrid const grid = tile_grid<Traits>(params, tile.sequence);
      wait_turn(turn, tile.n_block - n_block_range(grid, visit.m_block).min);
    }
    add_dq<Traits>(sums, smem, visit.m_block, params.allow_tf32);
    if (params.deterministic) {
      pass_turn(turn);
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // every warp is done with shared memory

  KeyTile const done =
      Traits::kTileInShared ? shared_tile : key_tile<Traits>(params, source, tile_idx);
  store_keys<Traits>(acc_dk, params.softmax_scale, smem + Traits::kSmemK,
                     key_rows<Traits>(params.dk, done, shape.head_dim),
                     done.n_block * kConfig.tile_n);
  store_keys<Traits>(acc_dv, kConfig.extras ? params.dropout.scale : 1.f, smem + Traits::kSmemV,
                     key_rows<Traits>(params.dv, done, shape.head_dim_v),
                     done.n_block * kConfig.tile_n);
}

}  // namespace flash::sm80
