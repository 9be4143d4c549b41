// The thread that draws items and copies their operands to shared memory.
#pragma once

#include "device/counter.cuh"
#include "device/tma.cuh"
#include "sm90/backward_traits.cuh"

namespace flash::sm90 {

/// Where item number item_idx lies.
template <class Traits>
__device__ __forceinline__ WorkItem work_item(BackwardKernelParams const& params, int item_idx) {
  TileOrder const& items = params.division.items;
  if (item_idx >= items.num_tiles()) {
    return {-1, 0, 0, 0, 0};
  }
  int const num_heads_k = params.problem.shape.num_heads_k;
  Tile const tile = items.tile(item_idx);
  BlockRange const range =
      m_block_range(tile_grid(params.problem, Traits::kTileM, Traits::kTileN), tile.block);
  return {tile.block, tile.batch_head % num_heads_k, tile.batch_head / num_heads_k, range.min,
          range.max};
}

template <class Traits>
struct BackwardLoader {
  static constexpr Sm90BackwardConfig kConfig = Traits::kConfig;
  BackwardKernelParams const& params;
  typename Traits::SharedStorage& shared;
  Ring<Traits::kStages> q;
  Ring<Traits::kDoutStages> dout;
  uint32_t key_phase = 0;

  /// Copies rows from `row` on of one head, with a policy for L2 if there is one.
  template <class Tile, class... Policy>
  static __device__ __forceinline__ void load_rows(CUtensorMap const& map, char* tile,
                                                   uint32_t barrier, int row, int head, int batch,
                                                   Policy... l2_policy) {
#pragma unroll
    for (int block = 0; block < Tile::kCols / Tile::kBlockCols; ++block) {
      tma_load(smem_address(tile) + block * Tile::kBlockBytes, map, barrier,
               {block * Tile::kBlockCols, row, head, batch, 0}, l2_policy...);
    }
  }
  /// Copies a key tile, which no other thread block reads.
  template <class Tile>
  static __device__ __forceinline__ void load_keys(CUtensorMap const& map, char* tile,
                                                   uint64_t& full, WorkItem const& item) {
    uint32_t const barrier = smem_address(&full);
    mbarrier_arrive_expect_tx(barrier, Tile::kBytes);
    load_rows<Tile>(map, tile, barrier, item.n_block * Tile::kRows, item.head_k, item.batch,
                    evict_first());
  }
  __device__ __forceinline__ void load_v(WorkItem const& item) {
    mbarrier_wait(smem_address(&shared.v_empty), key_phase ^ 1);
    load_keys<typename Traits::TileV>(params.v, shared.v, shared.v_full, item);
  }
  /// Also hands the item out.
  __device__ __forceinline__ void load_k(WorkItem const& item) {
    mbarrier_wait(smem_address(&shared.k_empty), key_phase ^ 1);
    shared.item = item;
    load_keys<typename Traits::TileK>(params.k, shared.k, shared.k_full, item);
  }

  /// Statistics of a query tile's rows travel with Q and dO.
  __device__ __forceinline__ void load_statistics(float const* of_rows, float* target, int head,
                                                  int batch, int row, uint32_t barrier) {
    Shape const& shape = params.problem.shape;
    int64_t const first = (int64_t(batch) * shape.num_heads + head) * params.problem.softmax_d_rows;
    bulk_load(smem_address(target), of_rows + first + row, Traits::kTileM * 4, barrier);
  }
  __device__ __forceinline__ void load_q(int head, int batch, int m_block) {
    using Tile = typename Traits::TileQ;
    int const row = m_block * Traits::kTileM;
    uint32_t const barrier = smem_address(&shared.q_full[q.stage]);
    mbarrier_wait(smem_address(&shared.q_empty[q.stage]), q.phase ^ 1);
    mbarrier_arrive_expect_tx(barrier, Tile::kBytes + Traits::kTileM * 4);
    load_rows<Tile>(params.q, shared.q[q.stage], barrier, row, head, batch);
    load_statistics(params.workspace.lse_log2, shared.lse_log2[q.stage], head, batch, row, barrier);
    q.advance();
  }
  __device__ __forceinline__ void load_dout(int head, int batch, int m_block) {
    using Tile = typename Traits::TileDout;
    int const row = m_block * Traits::kTileM;
    uint32_t const barrier = smem_address(&shared.dout_full[dout.stage]);
    mbarrier_wait(smem_address(&shared.dout_empty[dout.stage]), dout.phase ^ 1);
    mbarrier_arrive_expect_tx(barrier, Tile::kBytes + Traits::kTileM * 4);
    load_rows<Tile>(params.dout, shared.dout[dout.stage], barrier, row, head, batch);
    load_statistics(params.problem.softmax_d, shared.softmax_d[dout.stage], head, batch, row,
                    barrier);
    dout.advance();
  }

  /// Waits until the sums of the tile have been cleared of those of the slot's previous owner. Here
  /// and not where they are added to: this thread is one or two tiles ahead, so it waits for free.
  __device__ __forceinline__ void wait_for_slot(int key_head, int query_tile) const {
    BackwardDivision const& division = params.division;
    if (key_head >= division.slots) {
      int const* const converted = params.workspace.converted +
                                   int64_t(key_head - division.slots) * division.query_tiles +
                                   query_tile;
      while (load_acquire(converted) < Traits::kGroups) {
        __nanosleep(64);
      }
      fence_async_proxy_global();  // the zeros are plain stores, the additions are not
    }
  }

  /// The first query tile's operands come with V and K in between, in the order of their use; K is
  /// last because the previous item needs its own longest.
  __device__ __forceinline__ void load(WorkItem const& item) {
    Shape const& shape = params.problem.shape;
    int const group_size = shape.query_heads_per_key_head();
    int const key_head = item.batch * shape.num_heads_k + item.head_k;
    bool is_first = true;
    BackwardDivision const& division = params.division;
    for_each_query_tile(item, group_size, division.step, [&](int head_in_group, int m_block) {
      int const head = item.head_k * group_size + head_in_group;
      wait_for_slot(key_head, head_in_group * division.m_blocks + m_block);
      load_q(head, item.batch, m_block);
      if (is_first) {
        load_v(item);
      }
      load_dout(head, item.batch, m_block);
      if (is_first) {
        load_k(item);
      }
      is_first = false;
    });
    if (is_first) {
      load_v(item);
      load_k(item);
    }
    key_phase ^= 1;
  }

  __device__ __forceinline__ void run() {
    while (true) {
      WorkItem const item = work_item<Traits>(params, atomicAdd(params.workspace.next, 1));
      if (item.n_block < 0) {
        break;
      }
      load(item);
    }
    mbarrier_wait(smem_address(&shared.k_empty), key_phase ^ 1);
    shared.item = {-1, 0, 0, 0, 0};
    mbarrier_arrive(smem_address(&shared.k_full));
  }
};

/// Waits for K and the item that came with it; false after the last.
template <class Traits>
__device__ __forceinline__ bool next_item(typename Traits::SharedStorage& shared,
                                          uint32_t key_phase, WorkItem& item) {
  mbarrier_wait(smem_address(&shared.k_full), key_phase);
  item = shared.item;
  return item.n_block >= 0;
}

}  // namespace flash::sm90
