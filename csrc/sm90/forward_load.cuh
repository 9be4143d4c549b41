// The loading warpgroup: a thread that hands out tiles and copies K, one that copies Q, one that
// copies V. None waits for another's buffers, so each runs as far ahead as its own allow.
#pragma once

#include "arith/block_range.h"
#include "device/tma.cuh"
#include "sm90/forward_params.h"
#include "sm90/forward_traits.cuh"

namespace flash::sm90 {

/// Where tile number tile_idx lies.
template <class Traits>
__device__ __forceinline__ WorkTile work_tile(ForwardKernelParams const& params, int tile_idx) {
  int const num_heads = params.problem.shape.num_heads;
  Tile const tile = params.tiles.tile(tile_idx);
  if (tile.block < 0) {
    return {-1, 0, 0, 0, 0, 0, 0};
  }
  int const batch = tile.batch_head / num_heads;
  Sequence const sequence = params.sequence(batch);
  BlockRange range{0, ceil_div(sequence.seqlen_k, Traits::kTileN)};
  if constexpr (Traits::kConfig.mask == MaskClass::kBounded) {
    TileGrid const grid{Traits::kTileM, Traits::kTileN, sequence.seqlen_q, sequence.seqlen_k,
                        params.problem.mask};
    range = n_block_range(grid, tile.block);
  }
  return {tile.block,       tile.batch_head % num_heads,    batch,
          range.min,        imax(range.max, range.min + 1), sequence.seqlen_q,
          sequence.seqlen_k};
}

/// The last thread block leaves the counter as it found it.
__device__ __forceinline__ void leave(ForwardKernelParams const& params) {
  if (params.tile_counter != nullptr &&
      atomicAdd(params.tile_counter + 1, 1) == int(gridDim.x) - 1) {
    params.tile_counter[0] = 0;
    params.tile_counter[1] = 0;
  }
}

/// Copies a tile of the rows from first_row on into the next buffer, once that is empty.
template <class Tile, int kStages>
__device__ __forceinline__ void load_tile(CUtensorMap const& map, char* buffers, uint64_t* full,
                                          uint64_t* empty, Ring<kStages>& ring, int first_row,
                                          int head, RowOrigin const& origin) {
  mbarrier_wait(smem_address(empty + ring.stage), ring.phase ^ 1);
  uint32_t const barrier = smem_address(full + ring.stage);
  uint32_t const buffer = smem_address(buffers) + ring.stage * Tile::kBytes;
  mbarrier_arrive_expect_tx(barrier, Tile::kBytes);
#pragma unroll
  for (int col = 0; col < Tile::kCols; col += Tile::kBlockCols) {
    tma_load(buffer + col / Tile::kBlockCols * Tile::kBlockBytes, map, barrier,
             {col, origin.row + first_row, head, origin.outer, origin.wrap});
  }
  ring.advance();
}

/// Copies the key tiles that `tile` sees, the last first.
template <class Tile, int kStages>
__device__ __forceinline__ void load_keys(ForwardKernelParams const& params, CUtensorMap const& map,
                                          RowMap const& rows, char* buffers, uint64_t* full,
                                          uint64_t* empty, Ring<kStages>& ring,
                                          WorkTile const& tile) {
  Sequence const sequence = params.sequence(tile.batch);
  RowOrigin const origin = rows.origin(sequence.entry_k, sequence.first_k, sequence.seqlen_k);
  int const head_k = tile.head / params.problem.shape.query_heads_per_key_head();
#pragma unroll 1
  for (int n_block = tile.n_max - 1; n_block >= tile.n_min; --n_block) {
    load_tile<Tile>(map, buffers, full, empty, ring, n_block * Tile::kRows, head_k, origin);
  }
}

/// The next tile is drawn once this one's K has been requested. Drawn a whole tile earlier, thread
/// blocks part further from the order of tiles, and K and V from L2: 10 % at head dim 256.
template <class Traits>
__device__ __forceinline__ void load_k(ForwardKernelParams const& params,
                                       typename Traits::SharedStorage& shared) {
  constexpr Sm90ForwardConfig kConfig = Traits::kConfig;
  Ring<kConfig.kWorkStages> work;
  Ring<kConfig.k_stages> k;
  int tile_idx = blockIdx.x;
  while (true) {
    WorkTile const tile = work_tile<Traits>(params, tile_idx);
    mbarrier_wait(smem_address(&shared.work_empty[work.stage]), work.phase ^ 1);
    shared.work[work.stage] = tile;
    mbarrier_arrive(smem_address(&shared.work_full[work.stage]));
    work.advance();
    if (tile.m_block < 0) {
      break;
    }
    load_keys<typename Traits::TileK>(params, params.k, params.k_rows, shared.k[0], shared.k_full,
                                      shared.k_empty, k, tile);
    tile_idx = params.tile_counter == nullptr ? tile_idx + int(gridDim.x)
                                              : int(gridDim.x) + atomicAdd(params.tile_counter, 1);
  }
  leave(params);
}

/// Calls load(tile) for every tile that load_k() hands out.
template <class Traits, class Load>
__device__ __forceinline__ void for_each_tile(typename Traits::SharedStorage& shared,
                                              Load const& load) {
  constexpr Sm90ForwardConfig kConfig = Traits::kConfig;
  Ring<kConfig.kWorkStages> work;
  while (true) {
    mbarrier_wait(smem_address(&shared.work_full[work.stage]), work.phase);
    WorkTile const tile = shared.work[work.stage];
    mbarrier_arrive(smem_address(&shared.work_empty[work.stage]));
    work.advance();
    if (tile.m_block < 0) {
      break;
    }
    load(tile);
  }
}

template <class Traits>
__device__ __forceinline__ void load_q(ForwardKernelParams const& params,
                                       typename Traits::SharedStorage& shared) {
  constexpr Sm90ForwardConfig kConfig = Traits::kConfig;
  Ring<kConfig.q_stages> q;
  for_each_tile<Traits>(shared, [&](WorkTile const& tile) {
    Sequence const sequence = params.sequence(tile.batch);
    RowOrigin const origin =
        params.q_rows.origin(sequence.entry_q, sequence.first_q, sequence.seqlen_q);
#pragma unroll 1
    for (int i = 0; i < Traits::kWarpgroups; ++i) {
      load_tile<typename Traits::TileQ>(params.q, shared.q[0], shared.q_full, shared.q_empty, q,
                                        tile.m_block * Traits::kTileM + 64 * i, tile.head, origin);
    }
  });
}

template <class Traits>
__device__ __forceinline__ void load_v(ForwardKernelParams const& params,
                                       typename Traits::SharedStorage& shared) {
  constexpr Sm90ForwardConfig kConfig = Traits::kConfig;
  Ring<kConfig.v_stages> v;
  for_each_tile<Traits>(shared, [&](WorkTile const& tile) {
    load_keys<typename Traits::TileV>(params, params.v, params.v_rows, shared.v[0], shared.v_full,
                                      shared.v_empty, v, tile);
    if constexpr (Traits::kConfig.out_in_v) {
      // One empty buffer for each computing warpgroup's rows of out.
      for (int i = 0; i < Traits::kWarpgroups; ++i) {
        mbarrier_wait(smem_address(&shared.v_empty[v.stage]), v.phase ^ 1);
        mbarrier_arrive(smem_address(&shared.v_full[v.stage]));
        v.advance();
      }
    }
  });
}

}  // namespace flash::sm90
