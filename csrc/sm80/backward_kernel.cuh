// Backward attention of the sm80 family, main kernel: dk and dv of one key tile, and its share of
// dq.
//
// A thread block owns tile_n keys of one (batch, key head) and walks the visible query tiles of
// every query head of the group, so dk and dv are summed in registers over the whole group: no
// atomics, equal bits in every run. P is recomputed from softmax_lse. Per query tile:
//
//   wait Q, dO | S = Q K^T, dP = dO V^T, P = exp(S - lse), dS = P (dP - softmax_d) | P, dS to
//   shared memory | wait P, dS of all warps | dV += P^T dO, dK += dS^T Q, dQ = dS K (added to the
//   fp32 sums in the workspace)
//
// dq sums lie in the order of the accumulator fragments (DqSums), so that a warp adds whole lines.
// Deterministic: thread blocks take their tiles from a ticket counter, and the key tiles add to a
// query tile in ascending order. A block waits only for smaller tickets, which are running: no
// deadlock. Design note: docs/sm80.md.
#pragma once

#include "config/smem_limit.h"
#include "sm80/backward_key_warps.cuh"

namespace flash::sm80 {

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

/// dQ = dS K, added to the sums of the visit's query tile; before_add() is called between.
template <class Traits, class BeforeAdd>
__device__ __forceinline__ void add_dq(DqSums const& sums, uint32_t smem, int m_block,
                                       bool allow_tf32, BeforeAdd const& before_add) {
  int const thread_idx = fresh_thread_idx();
  int const warp_m = thread_idx / 32 % Traits::kWarpsMDq,
            warp_d = thread_idx / 32 / Traits::kWarpsMDq;
  uint32_t const ds = smem + Traits::kSmemDS;
  PieceReader<typename Traits::TileS, Operand::kA> const read_ds(ds, 16 * warp_m, 0, thread_idx);
  PieceReader<typename Traits::TileST, Operand::kATransposed> const read_transposed(
      ds, 0, 16 * warp_m, thread_idx);
  PieceReader<typename Traits::TileK, Operand::kB> const read_k(smem + Traits::kSmemK, 0,
                                                                16 * warp_d, thread_idx);
  float acc_dq[Traits::kMDq][2 * Traits::kDDq][4];
  clear(acc_dq);
  constexpr int kStep = Traits::kPieceK;
  warp_product<Traits::kDType, Traits::kConfig.tile_n>(
      acc_dq,
      [&](int m, int k) {
        int const row = 16 * Traits::kWarpsMDq * m, key = kStep * k;
        if constexpr (Traits::kConfig.keys_own_warps()) {
          return load_piece(read_transposed, key, row);
        } else {
          return load_piece(read_ds, row, key);
        }
      },
      [&](int d, int k) { return load_piece(read_k, kStep * k, 16 * Traits::kWarpsDDq * d); },
      allow_tf32);
  before_add();
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

  __shared__ uint64_t barrier_memory[VisitBarriers<Traits>::kCount];
  VisitBarriers<Traits> const barriers{smem_address(barrier_memory)};
  if (threadIdx.x == 0) {
    barriers.init();
  }
  __syncthreads();
  auto const first_row = [&](QueryVisit const& of) {
    return workspace.first_row(tile.sequence.entry_q, fresh(of.head), tile.first_row);
  };
  auto const copy_stats = [&](QueryVisit const& of, int idx) {
    load_stats<Traits>(workspace.row_stats + first_row(of), smem, of);
    barriers.arrive_full(idx);
  };

  if (visits_left > 0) {
    CopyK::load(smem + Traits::kSmemK, key_rows<Traits>(params.k, tile, shape.head_dim),
                first_key(), threadIdx.x);
    CopyK::load(smem + Traits::kSmemV, key_rows<Traits>(params.v, tile, shape.head_dim_v),
                first_key(), threadIdx.x);
    load_visit<Traits>(params, smem, tile.sequence, visit, 0);
    if constexpr (kConfig.keys_own_warps()) {
      copy_stats(visit, 0);
    } else {
      barriers.arrive_full(0);
    }
  }

  LaneStats<Traits> stats;
  auto const load_lane_stats = [&](QueryVisit const& of) {
    stats.load(workspace.row_stats + first_row(of), of.m_block);
  };
  if constexpr (Traits::kEarlyStats) {
    if (visits_left > 0) {
      load_lane_stats(visit);
    }
  }
  KeySums<Traits> key_sums;
  clear(key_sums.dk);
  clear(key_sums.dv);
  DropoutKey const dropout_key(kConfig.extras ? params.dropout : Dropout{});
  for (int idx = 0; visits_left > 0; --visits_left, ++idx, visit = tile.after(visit)) {
    int const stage = idx % Traits::kStages;
    uint32_t const stage_bytes = stage * Traits::TileQ::kBytes;
    auto const copy_next_visit = [&] {
      if (visits_left > 1) {
        load_visit<Traits>(params, smem, tile.sequence, tile.after(visit), idx + 1);
        if constexpr (!Traits::kConfig.keys_own_warps()) {
          barriers.arrive_full(idx + 1);
        }
      }
    };
    barriers.wait_full(idx);
    if constexpr (kConfig.keys_own_warps()) {
      add_queries<Traits>(
          key_sums, params, smem, tile, visit, stage, 0,
          [&] {
            barriers.wait_done_before(idx);
            copy_next_visit();
          },
          [] {});
      add_queries<Traits>(
          key_sums, params, smem, tile, visit, stage, kQueryStep, [] {},
          [&] { mbarrier_arrive_warp(barriers.ds_stored()); });
      mbarrier_wait(barriers.ds_stored(), idx % 2);
      if (visits_left > 1) {  // every warp is done with this visit's statistics
        copy_stats(tile.after(visit), idx + 1);
      }
    } else {
      if constexpr (!Traits::kEarlyStats) {
        load_lane_stats(visit);
      }
      scores<Traits>(params, dropout_key, stats, smem, tile, visit, idx, barriers);
      mbarrier_wait(barriers.p_stored(), idx % 2);
      if constexpr (Traits::kCopyPoint == CopyPoint::kBeforeDv) {
        copy_next_visit();
      }
      accumulate_keys<Traits>(key_sums.dv, smem + Traits::kSmemP,
                              smem + Traits::kSmemDO + stage_bytes, params.allow_tf32);
      if constexpr (Traits::kCopyPoint == CopyPoint::kBeforeDk) {
        copy_next_visit();
      }
      mbarrier_wait(barriers.ds_stored(), idx % 2);
      accumulate_keys<Traits>(key_sums.dk, smem + Traits::kSmemDS,
                              smem + Traits::kSmemQ + stage_bytes, params.allow_tf32);
      if constexpr (Traits::kCopyPoint == CopyPoint::kBeforeDq) {
        __syncthreads();  // every warp is done with Q and dO
        copy_next_visit();
      }
    }
    if constexpr (Traits::kEarlyStats) {
      if (visits_left > 1) {
        load_lane_stats(tile.after(visit));
      }
    }
    DqSums const sums = workspace.dq_sums(first_row(visit));
    int* const turn = workspace.turn(first_row(visit), visit.m_block);
    add_dq<Traits>(sums, smem, visit.m_block, params.allow_tf32, [&] {
      mbarrier_arrive_warp(barriers.done());
      if (params.deterministic) {
        TileGrid const grid = tile_grid<Traits>(params, tile.sequence);
        wait_turn(turn, tile.n_block - n_block_range(grid, visit.m_block).min);
      }
    });
    if (params.deterministic) {
      pass_turn(turn);
    }
  }
  __syncthreads();  // every warp is done with shared memory

  KeyTile const done =
      Traits::kTileInShared ? shared_tile : key_tile<Traits>(params, source, tile_idx);
  store_keys<Traits>(key_sums.dk, params.softmax_scale, smem + Traits::kSmemK,
                     key_rows<Traits>(params.dk, done, shape.head_dim),
                     done.n_block * kConfig.tile_n);
  store_keys<Traits>(key_sums.dv, kConfig.extras ? params.dropout.scale : 1.f,
                     smem + Traits::kSmemV, key_rows<Traits>(params.dv, done, shape.head_dim_v),
                     done.n_block * kConfig.tile_n);
}

}  // namespace flash::sm80
