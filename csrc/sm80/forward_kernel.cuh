// Forward attention of the sm80 family: out = softmax(softmax_scale * q k^T, masked) v.
//
// A thread block owns tile_m query rows of one (batch, head) and walks the visible key tiles from
// the last to the first, so that tiles which need the element mask come first under a causal mask.
// Each warp owns the query-row pieces warp_idx, warp_idx + num_warps, ... of 16 rows: softmax needs
// no exchange between warps, and P goes from accumulator to operand registers without shared
// memory. Copies run under the arithmetic: V[n] under Q K[n]^T, K[n - 1] under softmax and P V[n].
// Warps wait for copies, and copies for the warps that read what they replace, by mbarriers: no
// warp waits until all are at the same place.
// Design note: docs/sm80.md.
#pragma once

#include "arith/block_range.h"
#include "config/forward_config.h"
#include "device/barrier.cuh"
#include "device/bias.cuh"
#include "device/copy.cuh"
#include "device/dropout.cuh"
#include "device/max_logit.cuh"
#include "device/mma_fp32.cuh"
#include "device/score_options.cuh"
#include "device/tile_source.h"

namespace flash::sm80 {

template <ForwardConfig kConfig_>
struct ForwardTraits {
  static constexpr ForwardConfig kConfig = kConfig_;
  static constexpr int kHeadDim = kConfig.head_dim;
  static constexpr int kThreads = kConfig.num_threads();
  static constexpr int kElementBytes = element_size(kConfig.dtype);
  using TileQ = SmemTile<kConfig.tile_m, kHeadDim, kElementBytes>;
  using TileK = SmemTile<kConfig.tile_n, kHeadDim, kElementBytes>;
  static constexpr int kPiecesM = kConfig.tile_m / 16 / kConfig.num_warps;
  static constexpr int kPiecesN = kConfig.tile_n / 16;
  static constexpr int kPiecesD = kHeadDim / 16;
  static constexpr int kPieceK = flash::kPieceK<kConfig.dtype>;
  static constexpr int kPiecesP = kConfig.tile_n / kPieceK;  // of P as operand
  static constexpr uint32_t kSmemK = TileQ::kBytes;
  static constexpr uint32_t kSmemV = kSmemK + TileK::kBytes;
  static_assert(kSmemV + TileK::kBytes == uint32_t(kConfig.smem_bytes()), "table and kernel agree");
  static_assert(kConfig.tile_m % (16 * kConfig.num_warps) == 0, "warps own whole pieces");
};

/// State of one warp: its row pieces of one query tile.
template <class Traits>
struct ForwardWarp {
  static constexpr DType kDType = Traits::kConfig.dtype;
  static constexpr int kRowStep = 16 * Traits::kConfig.num_warps;

  float acc_o[Traits::kPiecesM][2 * Traits::kPiecesD][4];
  OnlineSoftmax<Traits::kPiecesM> softmax;
  uint32_t smem;

  __device__ __forceinline__ ForwardWarp(uint32_t smem) : smem(smem) { clear(acc_o); }

  /// S = Q K^T; `beside` as in warp_product().
  template <class Beside>
  __device__ __forceinline__ void scores(float (&acc_s)[Traits::kPiecesM][2 * Traits::kPiecesN][4],
                                         bool allow_tf32, Beside const& beside) {
    int const thread_idx = fresh_thread_idx();
    PieceReader<typename Traits::TileQ, Operand::kA> const read_q(smem, 16 * (thread_idx / 32), 0,
                                                                  thread_idx);
    PieceReader<typename Traits::TileK, Operand::kBTransposed> const read_k(smem + Traits::kSmemK,
                                                                            0, 0, thread_idx);
    clear(acc_s);
    warp_product<kDType, Traits::kHeadDim>(
        acc_s, [&](int m, int k) { return load_piece(read_q, m * kRowStep, Traits::kPieceK * k); },
        [&](int n, int k) { return load_piece(read_k, 16 * n, Traits::kPieceK * k); }, allow_tf32,
        beside);
  }

  /// O += P V.
  __device__ __forceinline__ void accumulate(Piece const (&p)[Traits::kPiecesM][Traits::kPiecesP],
                                             bool allow_tf32) {
    PieceReader<typename Traits::TileK, Operand::kB> const read_v(smem + Traits::kSmemV, 0, 0,
                                                                  fresh_thread_idx());
    warp_product<kDType, Traits::kConfig.tile_n, 1>(
        acc_o, [&](int m, int k) { return p[m][k]; },
        [&](int n, int k) { return load_piece(read_v, Traits::kPieceK * k, 16 * n); }, allow_tf32);
  }
};

/// A query tile and its sequence.
struct QueryTile {
  int block, batch, head;
  Sequence sequence;
};

__device__ __forceinline__ QueryTile query_tile(ForwardParams const& params,
                                                TileSource const& source, int idx) {
  Shape const& shape = params.shape;
  Tile const tile = source.tile(idx);
  int const batch = tile.batch_head / shape.num_heads;
  return {tile.block, batch, tile.batch_head % shape.num_heads, sequence_of(params, batch)};
}

/// Normalises, and stores out through the warp's own rows of the query tile in shared memory.
template <class Traits>
__device__ __forceinline__ void store_tile(ForwardWarp<Traits> const& warp,
                                           ForwardParams const& params, QueryTile const& tile) {
  using TileQ = typename Traits::TileQ;
  constexpr int kRowStep = ForwardWarp<Traits>::kRowStep;
  Shape const& shape = params.shape;
  Sequence const& sequence = tile.sequence;
  int const first_row = tile.block * Traits::kConfig.tile_m;
  GlobalRows const out(params.out, sequence.entry_q, tile.head, sequence.first_q, sequence.seqlen_q,
                       shape.head_dim_v, Traits::kElementBytes);
  float* const softmax_lse =
      params.softmax_lse +
      (int64_t(sequence.entry_q) * shape.num_heads + tile.head) * shape.seqlen_q + sequence.first_q;
  float const* const sink = params.sink == nullptr ? nullptr : params.sink + tile.head;
  float const max_scale = Traits::kConfig.extras ? score_unit(params.scores, params.softmax_scale)
                                                 : params.softmax_scale;
  int const thread_idx = fresh_thread_idx();
  int const warp_idx = thread_idx / 32, lane_idx = thread_idx % 32;
  float largest = -kInfinity;
  FragmentWriter<TileQ> const writer(warp.smem, 16 * warp_idx, 0, thread_idx);
#pragma unroll
  for (int m = 0; m < Traits::kPiecesM; ++m) {
    int const piece_row = 16 * warp_idx + m * kRowStep;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int const row = piece_row + half * 8 + lane_idx / 4;
      float const row_max = warp.softmax.row_max[m][half] * max_scale;
      RowEnd const end = row_end(row_max, quad_sum(warp.softmax.row_sum[m][half]), sink);
      largest = first_row + row < sequence.seqlen_q ? fmaxf(largest, row_max) : largest;
      float const scale = Traits::kConfig.extras ? end.scale * params.dropout.scale : end.scale;
      if (lane_idx % 4 == 0 && first_row + row < sequence.seqlen_q) {
        softmax_lse[first_row + row] = end.lse;
      }
#pragma unroll
      for (int d = 0; d < 2 * Traits::kPiecesD; ++d) {
        PackedPair<Traits::kConfig.dtype> const pair(warp.acc_o[m][d][2 * half] * scale,
                                                     warp.acc_o[m][d][2 * half + 1] * scale);
        store_pair(writer.at(m * kRowStep + half * 8, 8 * d), pair);
      }
    }
  }
  if (params.max_logits != nullptr) {
    raise_by_warp(params.max_logits + tile.head, largest);
  }
  __syncwarp();
#pragma unroll
  for (int m = 0; m < Traits::kPiecesM; ++m) {
    TileCopy<TileQ, 32>::template store<16>(warp.smem, 16 * warp_idx + m * kRowStep, out, first_row,
                                            lane_idx);
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kConfig.blocks_per_sm)
    forward_kernel(__grid_constant__ ForwardParams const params,
                   __grid_constant__ TileSource const source) {
  using CopyQ = TileCopy<typename Traits::TileQ, Traits::kThreads>;
  using CopyK = TileCopy<typename Traits::TileK, Traits::kThreads>;
  constexpr ForwardConfig kConfig = Traits::kConfig;
  extern __shared__ __align__(128) char shared_memory[];
  uint32_t const smem = smem_address(shared_memory);

  Shape const& shape = params.shape;
  QueryTile const tile = query_tile(params, source, blockIdx.x);
  if (tile.block < 0) {
    return;
  }
  Sequence const& sequence = tile.sequence;
  int const head_k = tile.head / shape.query_heads_per_key_head();
  int const first_row = tile.block * kConfig.tile_m;
  TileGrid const grid{kConfig.tile_m, kConfig.tile_n, sequence.seqlen_q, sequence.seqlen_k,
                      params.mask};
  BlockRange const visible = n_block_range(grid, tile.block);
  BlockRange const full = full_n_block_range(grid, tile.block);
  __shared__ uint64_t barriers[4];
  uint32_t const k_full = smem_address(barriers), k_read = k_full + 8;
  uint32_t const v_full = k_full + 16, v_read = k_full + 24;
  if (threadIdx.x == 0) {
    mbarrier_init(k_full, Traits::kThreads);
    mbarrier_init(v_full, Traits::kThreads);
    mbarrier_init(k_read, kConfig.num_warps);
    mbarrier_init(v_read, kConfig.num_warps);
  }
  __syncthreads();
  auto const copy_tile = [&](Strided const& tensor, int cols, uint32_t smem_tile, uint32_t full,
                             int n_block) {
    GlobalRows const rows(tensor, fresh(sequence.entry_k), fresh(head_k), fresh(sequence.first_k),
                          sequence.seqlen_k, cols, Traits::kElementBytes);
    CopyK::load(smem + smem_tile, rows, n_block * kConfig.tile_n, fresh_thread_idx());
    cp_async_arrive(full);
  };

  DropoutKey const dropout_key(kConfig.extras ? params.dropout : Dropout{});
  ForwardWarp<Traits> warp(smem);
  if (visible.max > visible.min) {
    GlobalRows const q(params.q, sequence.entry_q, tile.head, sequence.first_q, sequence.seqlen_q,
                       shape.head_dim, Traits::kElementBytes);
    CopyQ::load(smem, q, first_row, fresh_thread_idx());
    copy_tile(params.k, shape.head_dim, Traits::kSmemK, k_full, visible.max - 1);
  }
  uint32_t parity = 0;  // of the phases that this key tile's copies and readers end
  for (int n_block = visible.max - 1; n_block >= visible.min; --n_block, parity ^= 1) {
    float acc_s[Traits::kPiecesM][2 * Traits::kPiecesN][4];
    mbarrier_wait(k_full, parity);
    warp.scores(acc_s, params.allow_tf32, [&](int step) {
      if (step == 2) {                      // not ahead of the first products
        mbarrier_wait(v_read, parity ^ 1);  // returns at once in the first phase
        copy_tile(params.v, shape.head_dim_v, Traits::kSmemV, v_full, n_block);
      }
    });
    mbarrier_arrive_warp(k_read);
    PiecePlacement const place{first_row + 16 * (fresh_thread_idx() / 32), warp.kRowStep,
                               n_block * kConfig.tile_n, 16};
    float scale_log2 = params.softmax_scale * kLog2E;
    if constexpr (kConfig.extras) {
      float const slope = alibi_slope(params.scores, fresh(tile.batch), fresh(tile.head));
      apply_options(acc_s, place, params.scores, params.softmax_scale, slope, sequence);
      add_bias<kConfig.dtype>(acc_s, place, params, {tile.batch, tile.head, sequence});
      scale_log2 = score_unit(params.scores, params.softmax_scale) * kLog2E;
    }
    if (n_block < full.min || n_block >= full.max) {
      // Fresh: where the diagonal lies is not to be held in registers (spilled on sm_80).
      apply_mask(acc_s, place, params.mask, fresh(sequence.seqlen_q), sequence.seqlen_k);
    }
    warp.softmax.rescale(acc_s, warp.acc_o, scale_log2, params.max_slack);
    if (n_block > visible.min) {
      mbarrier_wait(k_read, parity);
      copy_tile(params.k, shape.head_dim, Traits::kSmemK, k_full, n_block - 1);
    }
    mbarrier_wait(v_full, parity);  // here, for exponentials and P V to mix
    Piece p[Traits::kPiecesM][Traits::kPiecesP];
    warp.softmax.template exponentials<kConfig.dtype>(acc_s, p, scale_log2);
    if (kConfig.extras && params.dropout.rng_state != nullptr) {
      int const batch_head = tile.batch * shape.num_heads + tile.head;
      drop<kConfig.dtype>(p, KeptElements<Traits::kPiecesM, Traits::kPiecesN>(
                                 params.dropout, dropout_key, batch_head, place));
    }
    warp.accumulate(p, params.allow_tf32);
    mbarrier_arrive_warp(v_read);
  }

  store_tile(warp, params, query_tile(params, source, fresh(blockIdx.x)));
}

}  // namespace flash::sm80
