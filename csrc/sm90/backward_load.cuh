// The thread that draws items and copies their operands to shared memory.
#pragma once

#include "device/counter.cuh"
#include "device/fresh.cuh"
#include "device/tma.cuh"
#include "sm90/backward_traits.cuh"

namespace flash::sm90 {

/// Where item number item_idx lies.
template <class Traits>
__device__ __forceinline__ WorkItem work_item(BackwardKernelParams const& params, int item_idx) {
  Tile const tile = params.division.items.tile(item_idx);
  if (tile.block < 0) {
    return {-1, 0, 0, 0, 0};
  }
  int const num_heads_k = params.problem.shape.num_heads_k;
  int const batch = tile.batch_head / num_heads_k;
  Sequence const sequence = params.sequence(batch);
  BlockRange const range = m_block_range(
      tile_grid(params.problem, sequence, Traits::kTileM, Traits::kTileN), tile.block);
  return {tile.block, tile.batch_head % num_heads_k, batch, range.min, range.max};
}

/// The first of this thread block's keys.
template <class Traits>
__device__ __forceinline__ int first_key(WorkItem const& item) {
  int const key = item.n_block * Traits::kTileN;
  return Traits::kPaired ? key + Traits::kBlockKeys * int(cluster_rank()) : key;
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
                                                   uint32_t barrier, int row, int head,
                                                   RowOrigin const& origin, Policy... l2_policy) {
#pragma unroll
    for (int block = 0; block < Tile::kCols / Tile::kBlockCols; ++block) {
      tma_load(smem_address(tile) + block * Tile::kBlockBytes, map, barrier,
               {block * Tile::kBlockCols, origin.row + row, head, origin.outer, origin.wrap},
               l2_policy...);
    }
  }
  /// Rows of Q or dO for both thread blocks of a cluster: each copies half of them to both.
  template <class Tile>
  static __device__ __forceinline__ void load_shared_rows(CUtensorMap const& map, char* tile,
                                                          uint32_t barrier, int row, int head,
                                                          RowOrigin const& origin) {
    int const first_row = Tile::kRows / 2 * cluster_rank();
#pragma unroll
    for (int block = 0; block < Tile::kCols / Tile::kBlockCols; ++block) {
      tma_load_both(smem_address(tile) + block * Tile::kBlockBytes + first_row * Tile::kRowBytes,
                    map, barrier,
                    {block * Tile::kBlockCols, origin.row + row + first_row, head, origin.outer,
                     origin.wrap});
    }
  }
  /// Copies this thread block's rows of a key tile, which are not needed again.
  template <class Tile>
  __device__ __forceinline__ void load_keys(CUtensorMap const& map, char* tile, uint64_t& full,
                                            WorkItem const& item) const {
    uint32_t const barrier = smem_address(&full);
    Sequence const sequence = params.sequence(fresh(item.batch));
    mbarrier_arrive_expect_tx(barrier, Tile::kBytes);
    load_rows<Tile>(map, tile, barrier, first_key<Traits>(item), item.head_k,
                    params.rows.origin(sequence.entry_k, sequence.first_k, sequence.seqlen_k),
                    evict_first());
  }
  /// The columns of the other thread block's K by which this one multiplies its dS.
  __device__ __forceinline__ void load_peer_k(WorkItem const& item) const {
    using Tile = typename Traits::TilePeerK;
    uint32_t const barrier = smem_address(&shared.peer_k_full);
    uint32_t const rank = cluster_rank();
    Sequence const sequence = params.sequence(fresh(item.batch));
    RowOrigin const origin =
        params.rows.origin(sequence.entry_k, sequence.first_k, sequence.seqlen_k);
    int const row = origin.row + item.n_block * Traits::kTileN + Tile::kRows * (1 - rank);
    mbarrier_wait(smem_address(&shared.peer_k_empty), key_phase ^ 1);
    mbarrier_arrive_expect_tx(barrier, Tile::kBytes);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      tma_load(
          smem_address(shared.peer_k) + i * Tile::kBlockBytes, params.k, barrier,
          {(Traits::first_dq_block(rank) + i) * 64, row, item.head_k, origin.outer, origin.wrap});
    }
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
    if constexpr (Traits::kPaired) {
      load_peer_k(item);
    }
  }

  /// Copies a query tile's rows of Q or dO and of their statistics, which travel together.
  template <class Tile>
  __device__ __forceinline__ void load_queries(CUtensorMap const& map, char* tile,
                                               float const* statistics, float* target,
                                               uint64_t& full, uint64_t& empty, uint32_t phase,
                                               int head, int batch, int m_block) const {
    BackwardParams const& problem = params.problem;
    Sequence const sequence = params.sequence(fresh(batch));
    int const row = m_block * Traits::kTileM;
    uint32_t const barrier = smem_address(&full);
    mbarrier_wait(smem_address(&empty), phase ^ 1);
    mbarrier_arrive_expect_tx(barrier, Tile::kBytes + Traits::kTileM * 4);
    RowOrigin const origin =
        params.rows.origin(sequence.entry_q, sequence.first_q, sequence.seqlen_q);
    if constexpr (Traits::kPaired) {
      load_shared_rows<Tile>(map, tile, barrier, row, head, origin);
    } else {
      load_rows<Tile>(map, tile, barrier, row, head, origin);
    }
    int64_t const entry_head = int64_t(sequence.entry_q) * problem.shape.num_heads + head;
    int const first_row = first_softmax_d_row(sequence, problem.sequences, batch);
    bulk_load(smem_address(target),
              statistics + entry_head * problem.softmax_d_rows + first_row + row,
              Traits::kTileM * 4, barrier);
  }
  __device__ __forceinline__ void load_q(int head, int batch, int m_block) {
    load_queries<typename Traits::TileQ>(params.q, shared.q[q.stage], params.workspace.lse_log2,
                                         shared.lse_log2[q.stage], shared.q_full[q.stage],
                                         shared.q_empty[q.stage], q.phase, head, batch, m_block);
    q.advance();
  }
  __device__ __forceinline__ void load_dout(int head, int batch, int m_block) {
    load_queries<typename Traits::TileDout>(
        params.dout, shared.dout[dout.stage], params.problem.softmax_d,
        shared.softmax_d[dout.stage], shared.dout_full[dout.stage], shared.dout_empty[dout.stage],
        dout.phase, head, batch, m_block);
    dout.advance();
  }

  /// Waits until the sums of the tile have been cleared of those of the slot's previous owner. Here
  /// and not where they are added to: this thread is one or two tiles ahead, so it waits for free.
  __device__ __forceinline__ void wait_for_slot(WorkItem const& item, int head_in_group,
                                                int m_block) const {
    BackwardDivision const& division = params.division;
    BackwardParams const& problem = params.problem;
    int const batch = fresh(item.batch);
    Sequence const sequence = params.sequence(batch);
    int const owner = sequence.entry_q * problem.shape.num_heads_k + item.head_k - division.slots;
    if (owner >= 0) {
      int64_t const query_tile = int64_t(owner) * division.query_tiles +
                                 head_in_group * division.m_blocks +
                                 first_query_tile<Traits>(problem, sequence, batch) + m_block;
      while (load_acquire(params.workspace.converted + query_tile) < Traits::kGroups) {
        __nanosleep(64);
      }
      fence_async_proxy_global();  // the zeros are plain stores, the additions are not
    }
  }

  /// The first query tile's operands come with V and K in between, in the order of their use; K is
  /// last because the previous item needs its own longest.
  __device__ __forceinline__ void load(WorkItem const& item) {
    int const group_size = params.problem.shape.query_heads_per_key_head();
    int const step = params.division.step;
    bool is_first = true;
    for_each_query_tile(item, group_size, step, [&](int head_in_group, int m_block) {
      int const head = fresh(item.head_k) * group_size + head_in_group;
      wait_for_slot(item, fresh(head_in_group), m_block);
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

  /// Number of the next item. Of a cluster the first thread block draws it and tells the other.
  __device__ __forceinline__ int draw() const {
    if constexpr (!Traits::kPaired) {
      return atomicAdd(params.workspace.next, 1);
    }
    if (cluster_rank() == 0) {
      int const idx = atomicAdd(params.workspace.next, 1);
      mbarrier_wait(smem_address(&shared.drawn_empty), key_phase ^ 1);
      store_async(cluster_address(smem_address(&shared.drawn), 1), idx,
                  cluster_address(smem_address(&shared.drawn_full), 1));
      return idx;
    }
    mbarrier_arrive_expect_tx(smem_address(&shared.drawn_full), sizeof(int));
    mbarrier_wait(smem_address(&shared.drawn_full), key_phase);
    int const idx = int(load_shared(smem_address(&shared.drawn)));
    mbarrier_arrive_at(smem_address(&shared.drawn_empty), 0);
    return idx;
  }

  __device__ __forceinline__ void run() {
    while (true) {
      WorkItem const item = work_item<Traits>(params, draw());
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
