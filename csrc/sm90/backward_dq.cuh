// The way of dQ: a thread that adds the shares of this block's keys to fp32 sums, and warps that
// convert complete sums. Protocol: docs/backward_sm90.md.
#pragma once

#include "device/element.cuh"
#include "device/wgmma.cuh"
#include "sm90/backward_load.cuh"

namespace flash::sm90 {

/// Where an item's shares of dQ go.
template <class Traits>
struct ItemSums {
  BackwardKernelParams const& params;
  WorkItem const& item;
  TileGrid grid;
  int first_tile;    // of the sequence, among the query tiles of a head
  float* sums;       // of the key head's query tiles
  int* contributed;  // the same

  __device__ __forceinline__ ItemSums(BackwardKernelParams const& params, WorkItem const& item)
      : params(params), item(item) {
    BackwardDivision const& division = params.division;
    Sequence const sequence = sequence_of(params.problem, item.batch);
    int const key_head = sequence.entry_q * params.problem.shape.num_heads_k + item.head_k;
    grid = tile_grid(params.problem, sequence, Traits::kTileM, Traits::kTileN);
    first_tile = first_query_tile<Traits>(params.problem, sequence, item.batch);
    sums = params.workspace.dq_sums +
           int64_t(key_head % division.slots) * division.query_tiles * (Traits::kDqBytes / 4);
    contributed = params.workspace.contributed + int64_t(key_head) * division.query_tiles;
  }
  __device__ __forceinline__ float* sums_of(int query_tile) const {
    return sums + int64_t(query_tile) * (Traits::kDqBytes / 4);
  }
  /// Deterministic: how many shares are added before this item's.
  __device__ __forceinline__ int turn(int m_block) const {
    return Traits::kClusterBlocks *
           params.division.num_earlier(n_block_range(grid, m_block), item.n_block);
  }
  /// Calls visit(query_tile, m_block), the first a number among those of the key head.
  template <class Visit>
  __device__ __forceinline__ void for_each_query_tile(Visit const& visit) const {
    BackwardDivision const& division = params.division;
    int const group_size = params.problem.shape.query_heads_per_key_head();
    sm90::for_each_query_tile(item, group_size, division.step, [&](int head, int m_block) {
      visit(head * division.m_blocks + first_tile + m_block, m_block);
    });
  }
};

/// Empties the outboxes of the computing warpgroups: their groups of dQ tile by tile, then dV; and
/// sends dK.
template <class Traits>
struct BackwardSender {
  static constexpr Sm90BackwardConfig kConfig = Traits::kConfig;
  BackwardKernelParams const& params;
  typename Traits::SharedStorage& shared;
  uint32_t outbox_phases = 0;   // bit w: of warpgroup w
  Ring<Traits::kStages> tiles;  // of dQ
  uint32_t unread = 0;  // barrier to arrive at when the last group of copies has been read; 0: none

  // Reading a parcel takes as long as half a query tile: the next is started meanwhile.

  __device__ __forceinline__ void give_back() {
    if (unread != 0) {
      tma_store_wait_read();
      mbarrier_arrive(unread);
      unread = 0;
    }
  }
  __device__ __forceinline__ void wait_for(uint64_t& full, uint32_t phase) {
    if (!mbarrier_test(smem_address(&full), phase)) {
      give_back();
      mbarrier_wait(smem_address(&full), phase);
    }
  }
  /// The copies that have been started read what may be refilled once `empty` is arrived at.
  __device__ __forceinline__ void commit(uint64_t& empty) {
    tma_store_commit();
    if (unread != 0) {
      tma_store_wait_read<1>();
      mbarrier_arrive(unread);
    }
    unread = smem_address(&empty);
  }
  /// Calls send(outbox), which starts copies, for the warpgroup's next parcel.
  template <class Send>
  __device__ __forceinline__ void send_parcel(int warpgroup, Send const& send) {
    wait_for(shared.outbox_full[warpgroup], outbox_phases >> warpgroup & 1);
    outbox_phases ^= 1u << warpgroup;
    send(smem_address(shared.outbox[warpgroup]));
    commit(shared.outbox_empty[warpgroup]);
  }
  /// Deterministic sums: key tiles add in the order in which they were drawn. Mostly it is this
  /// one's turn at the first look: a fence after that would cost as much again.
  __device__ __forceinline__ void wait_turn(int const* contributed, int turn) {
    while (load_acquire(contributed) < turn) {
      give_back();
    }
    fence_async_proxy_global();
  }

  /// Column blocks of a gradient of 64 keys, from first_col on.
  template <class Tile>
  __device__ __forceinline__ void store_keys(CUtensorMap const& map, uint32_t tile,
                                             WorkItem const& item, int first_key,
                                             int first_col) const {
    uint64_t const once = evict_first();
    Sequence const sequence = sequence_of(params.problem, item.batch);
    RowOrigin const origin =
        params.rows.origin(sequence.entry_k, sequence.first_k, sequence.seqlen_k);
    int const row = origin.row + item.n_block * Traits::kTileN + first_key;
#pragma unroll
    for (int block = 0; block < Tile::kCols / Tile::kBlockCols; ++block) {
      tma_store(map, tile + block * Tile::kBlockBytes,
                {first_col + block * Tile::kBlockCols, row, item.head_k, origin.outer, origin.wrap},
                once);
    }
  }
  __device__ __forceinline__ void send_gradients(WorkItem const& item, uint32_t phase) {
#pragma unroll 1
    for (int warpgroup = 0; warpgroup < Traits::kWarpgroups; ++warpgroup) {
      wait_for(shared.dk_full[warpgroup], phase);
      store_keys<SmemTile<64, kConfig.head_dim>>(params.dk, smem_address(shared.ds[warpgroup]),
                                                 item, 64 * warpgroup, 0);
    }
    commit(shared.dk_empty);
#pragma unroll 1
    for (int warpgroup = 0; warpgroup < Traits::kWarpgroups; ++warpgroup) {
      send_parcel(warpgroup, [&](uint32_t outbox) {
        store_keys<SmemTile<64, kConfig.head_dim_v>>(params.dv, outbox, item, 64 * warpgroup, 0);
      });
    }
  }
  /// A tile's addition is announced after the next one has been started: the wait for it is short
  /// then.
  __device__ __forceinline__ void send_dq(WorkItem const& item) {
    ItemSums<Traits> const of_item(params, item);
    int previous = -1;
    auto const announce = [&](int query_tile) {
      if (query_tile >= 0) {
        add_release(of_item.contributed + query_tile, 1);
      }
    };
    of_item.for_each_query_tile([&](int query_tile, int m_block) {
      float* const tile_sums = of_item.sums_of(query_tile);
      if (params.problem.deterministic) {
        wait_turn(of_item.contributed + query_tile, of_item.turn(m_block));
      }
#pragma unroll 1
      for (int group = 0; group < Traits::kGroups; ++group) {
        send_parcel(Traits::kDqInTurn ? tiles.stage : group, [&](uint32_t outbox) {
          bulk_reduce_add(tile_sums + group * (Traits::kGroupBytes / 4), outbox,
                          Traits::kGroupBytes);
        });
        // Sooner where others wait for their turn: 0.73 to 0.88 of the default became 0.87 to 1.0.
        if (group == 0 && params.problem.deterministic) {
          tma_store_wait<1>();
          announce(previous);
          previous = -1;
        }
      }
      tma_store_wait<Traits::kGroups>();
      announce(previous);
      previous = query_tile;
      tiles.advance();
    });
    tma_store_wait<0>();
    announce(previous);
  }

  __device__ __forceinline__ void run() {
    WorkItem item;
    for (uint32_t phase = 0; next_item<Traits>(shared, phase, item); phase ^= 1) {
      mbarrier_arrive(smem_address(&shared.k_empty));  // the item has been read
      send_dq(item);
      send_gradients(item, phase);
      give_back();
    }
  }
};

/// Of a pair, whose warpgroups add their shares themselves: tells them where to, and announces what
/// was added.
template <class Traits>
struct BackwardAnnouncer {
  BackwardKernelParams const& params;
  typename Traits::SharedStorage& shared;
  Ring<Traits::kStages> tiles;  // whose turn it is
  int* unannounced = nullptr;   // counter of the tile before

  /// Waits until its shares are given to memory. The fence before the counter waits for them to
  /// arrive there, those of other threads too.
  __device__ __forceinline__ void announce() {
    if (unannounced != nullptr) {
      Ring<Traits::kStages> const last = tiles.previous();
      mbarrier_wait(smem_address(&shared.dq_added[last.stage]), last.phase);
      add_release(unannounced, 1);
      unannounced = nullptr;
    }
  }
  __device__ __forceinline__ void run() {
    WorkItem item;
    for (uint32_t phase = 0; next_item<Traits>(shared, phase, item); phase ^= 1) {
      mbarrier_arrive(smem_address(&shared.k_empty));  // the item has been read
      ItemSums<Traits> const of_item(params, item);
      of_item.for_each_query_tile([&](int query_tile, int m_block) {
        int* const contributed = of_item.contributed + query_tile;
        if (params.problem.deterministic) {
          announce();  // before this one blocks
          int const turn = of_item.turn(m_block);
          while (load_acquire(contributed) < turn) {
          }
        }
        shared.dq_sums[tiles.stage] = of_item.sums_of(query_tile);
        mbarrier_arrive(smem_address(&shared.dq_turn[tiles.stage]));
        announce();
        unannounced = contributed;
        tiles.advance();
      });
      announce();
    }
  }
};

struct QueryTile {
  int m_block;
  int head, batch;
};

/// A warp that turns complete sums into dq, and clears them for the slot's next owner.
template <class Traits>
struct BackwardConverter {
  BackwardKernelParams const& params;
  typename Traits::SharedStorage& shared;
  int const warp_idx;  // among the converting ones
  uint32_t phase = 0;
  int unannounced = -1;  // lane 0: tile that is written, but not yet announced

  static __device__ __forceinline__ int lane_idx() { return threadIdx.x % 32; }

  /// Waits for the stores of the last group: late, when they are done.
  __device__ __forceinline__ void announce() {
    if (unannounced >= 0) {
      fence_gpu();
      add_relaxed(params.workspace.converted + unannounced, 1);
      unannounced = -1;
    }
  }

  /// Waits for the last of `expected` key tiles. Announces before it blocks: whoever it waits for
  /// may be waiting for that.
  __device__ __forceinline__ void wait_complete(int const* contributed, int expected) {
    if (load_acquire(contributed) < expected) {
      announce();
      while (load_relaxed(contributed) < expected) {
        __nanosleep(64);
      }
      fence_gpu();
    }
    fence_async_proxy_global();
  }

  /// Two neighbouring fragments of a row: the lanes of a pair exchange halves, so that each stores
  /// four neighbouring columns.
  static __device__ __forceinline__ void store_columns(char* row, uint32_t left, uint32_t right,
                                                       bool is_wanted) {
    bool const is_odd = lane_idx() % 2;
    uint32_t const other = __shfl_xor_sync(0xffffffffu, is_odd ? left : right, 1);
    if (is_wanted) {
      __stcs(reinterpret_cast<uint2*>(row), is_odd ? uint2{other, right} : uint2{left, other});
    }
  }

  /// A strip of 16 rows of sums, scaled, to the rows from `target` on, of which rows_left exist and
  /// cols_left columns; both count from the lane's own. Zeros if nothing was added.
  __device__ __forceinline__ void store_strip(uint32_t strip, char* target, int64_t row_bytes,
                                              int rows_left, int cols_left, float scale) const {
    auto const packed = [&](float x, float y) {
      return scale != 0.f ? pack2<Traits::kDType>(x * scale, y * scale) : 0u;
    };
#pragma unroll 2
    for (int j = 0; j < Traits::kGroupCols / 8; j += 2) {
      float4 const a = load_shared_float4(strip + j * Traits::kFragmentBytes);
      float4 const b = load_shared_float4(strip + (j + 1) * Traits::kFragmentBytes);
      bool const is_col = 8 * j < cols_left;
      store_columns(target + 16 * j, packed(a.x, a.y), packed(b.x, b.y), rows_left > 0 && is_col);
      store_columns(target + 8 * row_bytes + 16 * j, packed(a.z, a.w), packed(b.z, b.w),
                    rows_left > 8 && is_col);
    }
  }

  __device__ __forceinline__ float4* sums_at(uint32_t idx) const {
    return reinterpret_cast<float4*>(params.workspace.dq_sums) + idx;
  }
  static constexpr int kLandingBytes = Traits::kLandingStrips * Traits::kStripBytes;

  /// Starts to bring strips of sums to the landing zone.
  __device__ __forceinline__ void fetch(uint32_t sums) {
    uint32_t const landed = smem_address(&shared.landed[warp_idx]);
    mbarrier_arrive_expect_tx(landed, kLandingBytes);
    // With extras the address spills where it is held from one group to the next.
    int const idx = Traits::kConfig.extras == Extras::kNone ? warp_idx : fresh(warp_idx);
    bulk_load(smem_address(shared.landing[idx]), sums_at(sums), kLandingBytes, landed);
  }
  /// Waits for what fetch() has started, and clears the sums.
  __device__ __forceinline__ void land(uint32_t sums) {
    mbarrier_wait(smem_address(&shared.landed[warp_idx]), phase);
    phase ^= 1;
    float4* const lane_sums = sums_at(sums + lane_idx());
#pragma unroll 8
    for (int i = 0; i < kLandingBytes / 512; ++i) {
      __stcg(lane_sums + 32 * i, float4{0.f, 0.f, 0.f, 0.f});
    }
  }

  /// Stores a group's rows of dq; without sums zeros.
  __device__ __forceinline__ void store_group(QueryTile const& tile, int group, uint32_t sums,
                                              bool has_sums) {
    BackwardParams const& problem = params.problem;
    Sequence const sequence = params.sequence(tile.batch);
    int const row =
        tile.m_block * Traits::kTileM + (Traits::kDqByRows ? 64 * group : 0) + lane_idx() / 4;
    int const col = (Traits::kDqByRows ? 0 : Traits::kGroupCols * group) + lane_idx() % 2 * 8 +
                    lane_idx() % 4 / 2 * 4;
    int64_t const row_bytes = problem.dq.row_stride * 2;
    char* target = static_cast<char*>(problem.dq.ptr) +
                   (problem.dq.offset(sequence.entry_q, tile.head) + col) * 2 +
                   (int64_t(sequence.first_q) + row) * row_bytes;
    int rows_left = sequence.seqlen_q - row;
    uint32_t const landing = smem_address(shared.landing[warp_idx]) + lane_idx() * 16;
#pragma unroll 1
    for (int strip = 0; strip < 4; strip += Traits::kLandingStrips) {
      if (has_sums) {
        if (strip > 0) {
          __syncwarp();  // the landing zone has been read
          sums += kLandingBytes / 16;
          if (lane_idx() == 0) {
            fetch(sums);
          }
        }
        land(sums);
      }
#pragma unroll 1
      for (int i = 0; i < Traits::kLandingStrips; ++i) {
        store_strip(landing + i * Traits::kStripBytes, target, row_bytes, rows_left,
                    problem.shape.head_dim - col, has_sums ? problem.softmax_scale : 0.f);
        target += 16 * row_bytes;
        rows_left -= 16;
      }
    }
  }

  /// Where number tile_idx in the order of conversions lies; m_block -1 behind the last.
  __device__ __forceinline__ QueryTile query_tile(int tile_idx) const {
    BackwardDivision const& division = params.division;
    Shape const& shape = params.problem.shape;
    Tile const tile = division.tiles.tile(tile_idx);
    if (tile.block < 0 || division.tiles.list.num_tiles != nullptr) {
      return {tile.block, tile.batch_head % shape.num_heads, tile.batch_head / shape.num_heads};
    }
    int const head_k = tile.batch_head % shape.num_heads_k;
    return {tile.block % division.m_blocks,
            head_k * shape.query_heads_per_key_head() + tile.block / division.m_blocks,
            tile.batch_head / shape.num_heads_k};
  }

  __device__ __forceinline__ void convert(QueryTile const& tile, int group, int& next) {
    BackwardDivision const& division = params.division;
    Shape const& shape = params.problem.shape;
    Sequence const sequence = params.sequence(tile.batch);
    int const group_size = shape.query_heads_per_key_head();
    int const key_head = sequence.entry_q * shape.num_heads_k + tile.head / group_size;
    int const number = tile.head % group_size * division.m_blocks +
                       first_query_tile<Traits>(params.problem, sequence, tile.batch) +
                       tile.m_block;
    BlockRange const contributors = n_block_range(
        tile_grid(params.problem, sequence, Traits::kTileM, Traits::kTileN), tile.m_block);
    int const expected = Traits::kClusterBlocks * (contributors.max - contributors.min);
    int const counter = key_head * division.query_tiles + number;
    // In 16 bytes, of which there are fewer than 2^32.
    uint32_t sums = uint32_t(key_head % division.slots * division.query_tiles + number) *
                        (Traits::kDqBytes / 16) +
                    group * (Traits::kGroupBytes / 16);
    // Nobody adds to a tile that no key sees, and its slot may still be another key head's.
    if (lane_idx() == 0) {
      if (expected > 0) {
        wait_complete(params.workspace.contributed + counter, expected);
        fetch(sums);
      }
      next = atomicAdd(params.workspace.next + 1, 1);
      announce();
      unannounced = counter;
    }
    store_group(tile, group, sums, expected > 0);
    fence_async_proxy_global();  // the next owner's additions are not plain stores as the zeros are
    __syncwarp();                // the landing zone has been read
  }

  __device__ __forceinline__ void run() {
    int next = 0;
    if (lane_idx() == 0) {
      next = atomicAdd(params.workspace.next + 1, 1);
    }
    while (true) {
      int const idx = __shfl_sync(0xffffffffu, next, 0);
      QueryTile const tile = query_tile(idx / Traits::kGroups);
      if (tile.m_block < 0) {
        break;
      }
      convert(tile, idx % Traits::kGroups, next);
    }
    if (lane_idx() == 0) {
      announce();
    }
  }
};

}  // namespace flash::sm90
