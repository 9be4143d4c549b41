#include "arith/block_range.h"
#include "device/element.cuh"
#include "device/launch.cuh"
#include "device/tile_list.h"

namespace flash {
namespace {

constexpr int kThreads = 512;
constexpr int kLevels = kThreads;  // of work; one thread each
constexpr int kClearingBlocks = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

/// Tiles of a sequence, and the work of its longest one: tiles of the other side that it meets.
struct SequenceTiles {
  int num_tiles;
  int work;
};

/// Of a sequence whose rows are cut into tiles, and the others, whose tiles these meet.
__device__ __forceinline__ TileGrid grid_of(PackedProblem const& problem, Tiling const& tiling,
                                            int batch) {
  Sequence const sequence = sequence_of(problem, batch);
  int const rows_q = sequence.seqlen_q, rows_k = sequence.seqlen_k;
  return tiling.of_keys
             ? TileGrid{tiling.tile_rows, tiling.other_tile_rows, rows_k, rows_q,
                        transposed(problem.mask)}
             : TileGrid{tiling.tile_rows, tiling.other_tile_rows, rows_q, rows_k, problem.mask};
}

__device__ __forceinline__ SequenceTiles tiles_of(PackedProblem const& problem,
                                                  Tiling const& tiling, int batch) {
  TileGrid const grid = grid_of(problem, tiling, batch);
  int const others = grid.seqlen_k;
  int const left = grid.mask.window_left < 0 ? others : imin(grid.mask.window_left, others);
  int const right = grid.mask.window_right < 0 ? others : imin(grid.mask.window_right, others);
  int const seen = right >= others - left
                       ? others
                       : imin(left + right, others - tiling.tile_rows) + tiling.tile_rows;
  return {grid.num_m_blocks(), ceil_div(seen, tiling.other_tile_rows)};
}

/// The most work has the first level. Of large numbers the first five bits count.
__device__ __forceinline__ int level_of(int work) {
  int const shift = imax(27 - __clz(work), 0);
  return kLevels - 1 - (16 * shift + (work >> shift));
}

/// Exclusive prefix sums of one value a thread, in `sums`.
__device__ __forceinline__ void prefix_sums(int (&sums)[kLevels]) {
  __shared__ int of_warps[kThreads / 32];
  int const warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  auto const inclusive = [&](int sum) {
    for (int distance = 1; distance < 32; distance *= 2) {
      int const before = __shfl_up_sync(kAllLanes, sum, distance);
      sum += lane_idx >= distance ? before : 0;
    }
    return sum;
  };
  int const own = sums[threadIdx.x], sum = inclusive(own);
  if (lane_idx == 31) {
    of_warps[warp_idx] = sum;
  }
  __syncthreads();
  // Every warp adds up all of them, so that none waits for another again.
  int const of_warp = lane_idx < kThreads / 32 ? of_warps[lane_idx] : 0;
  int const before = __shfl_sync(kAllLanes, inclusive(of_warp) - of_warp, warp_idx);
  sums[threadIdx.x] = before + sum - own;
  __syncthreads();
}

/// The first place of each thread's share in its level: those of `num_threads` threads follow each
/// other, so that two lists of the same sequences have equal ones in the same order. `peers` are
/// the lanes of the same level, `before` of `total` places are those of the lanes before this one;
/// level -1 takes none.
__device__ __forceinline__ int take_places(int (&starts)[kLevels], int level, unsigned peers,
                                           int before, int total, int num_threads) {
  int const thread = threadIdx.x, lane_idx = thread % 32, first_lane = __ffs(peers) - 1;
  int start = 0;
  for (int turn = 0; turn < num_threads; turn += 32) {
    if (turn == thread - lane_idx && lane_idx == first_lane && level >= 0) {
      start = starts[level];
      starts[level] = start + total;
    }
    __syncthreads();
  }
  return __shfl_sync(kAllLanes, start, first_lane) + before;
}

/// Sorts up to kThreads tiles by counting those of each level of work.
__device__ void write_by_work(PackedProblem const& problem, Tiling const& tiling,
                              ListedTile const* unsorted, int num_tiles, int (&starts)[kLevels],
                              ListedTile* tiles) {
  int const thread = threadIdx.x;
  starts[thread] = 0;
  __syncthreads();
  ListedTile tile{};
  int level = -1;
  if (thread < num_tiles) {
    tile = unsorted[thread];
    BlockRange const met = n_block_range(grid_of(problem, tiling, tile.batch), tile.block);
    level = level_of(met.max - met.min);
    atomicAdd(&starts[level], 1);
  }
  __syncthreads();
  prefix_sums(starts);
  unsigned const peers = __match_any_sync(kAllLanes, level);
  int const before = __popc(peers & ((1u << thread % 32) - 1));
  int const place = take_places(starts, level, peers, before, __popc(peers), num_tiles);
  if (thread < num_tiles) {
    tiles[place] = tile;
  }
}

/// The same with sequences, whose tiles follow each other.
__device__ void write_list(PackedProblem const& problem, Tiling const& tiling, int* num_tiles,
                           ListedTile* tiles) {
  __shared__ int starts[kLevels];
  __shared__ ListedTile last_tiles[kThreads];
  int const thread = threadIdx.x, lane_idx = thread % 32, batch_size = problem.shape.batch_size;
  starts[thread] = 0;
  __syncthreads();
  for (int batch = thread; batch < batch_size; batch += kThreads) {
    SequenceTiles const sequence = tiles_of(problem, tiling, batch);
    atomicAdd(&starts[level_of(sequence.work)], sequence.num_tiles);
  }
  __syncthreads();
  int const of_last_level = starts[kLevels - 1];
  prefix_sums(starts);
  // Sequences that overlap, which is the caller's mistake, may have more tiles than there is room.
  int const rows = tiling.of_keys ? problem.shape.seqlen_k : problem.shape.seqlen_q;
  int const room = int(max_tiles(rows, batch_size, tiling.tile_rows));
  int const count = imin(starts[kLevels - 1] + of_last_level, room);
  int const num_last = imin(imin(tiling.num_by_work, kThreads), count);
  if (thread == 0) {
    *num_tiles = count;
  }
  __syncthreads();
  for (int begin = 0; begin < batch_size; begin += kThreads) {
    int const num_sequences = imin(batch_size - begin, kThreads);
    SequenceTiles sequence{};
    int level = -1;
    if (thread < num_sequences) {
      sequence = tiles_of(problem, tiling, begin + thread);
      level = level_of(sequence.work);
    }
    unsigned const peers = __match_any_sync(kAllLanes, level);
    int before = 0, total = 0;
    int const sequences_of_warp = imin(num_sequences - (thread - lane_idx), 32);
    for (int lane = 0; lane < sequences_of_warp; ++lane) {
      int const of_lane = __shfl_sync(kAllLanes, sequence.num_tiles, lane) * int(peers >> lane & 1);
      before += lane < lane_idx ? of_lane : 0;
      total += of_lane;
    }
    int const first = take_places(starts, level, peers, before, total, num_sequences);
    for (int lane = 0; lane < sequences_of_warp; ++lane) {  // all lanes a sequence
      int const num = __shfl_sync(kAllLanes, sequence.num_tiles, lane);
      int const first_tile = __shfl_sync(kAllLanes, first, lane);
      for (int i = lane_idx; i < imin(num, count - first_tile); i += 32) {
        ListedTile const tile{tiling.descending ? num - 1 - i : i,
                              begin + thread - lane_idx + lane};
        int const in_last = first_tile + i - (count - num_last);
        (in_last < 0 ? tiles[first_tile + i] : last_tiles[in_last]) = tile;
      }
    }
  }
  if (num_last > 0) {
    __syncthreads();
    write_by_work(problem, tiling, last_tiles, num_last, starts, tiles + count - num_last);
  }
}

/// Calls visit(row) for this thread's share of the rows before the first and behind the last
/// sequence.
template <class Visit>
__device__ __forceinline__ void for_each_padding_row(int32_t const* cu_seqlens, int batch_size,
                                                     int rows, int rank, int num_ranks,
                                                     Visit const& visit) {
  int const begin = imin(imax(cu_seqlens[0], 0), rows);
  int const end = imin(imax(cu_seqlens[batch_size], begin), rows);
  for (int i = rank; i < begin + rows - end; i += num_ranks) {
    visit(i < begin ? i : end + i - begin);
  }
}

/// A warp a row.
__device__ void clear_rows(PackedProblem const& problem, int block_idx) {
  int const warp = block_idx * (kThreads / 32) + threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  int const num_warps = kClearingBlocks * (kThreads / 32);
  int const batch_size = problem.shape.batch_size;
  for (int i = 0; i < problem.num_padded; ++i) {
    PaddedTensor const& padded = problem.padded[i];
    int32_t const* const cu_seqlens =
        padded.of_keys ? problem.sequences.cu_seqlens_k : problem.sequences.cu_seqlens_q;
    if (cu_seqlens == nullptr) {
      continue;
    }
    int const rows = padded.of_keys ? problem.shape.seqlen_k : problem.shape.seqlen_q;
    int const element_bytes = element_size(problem.dtype), chunk_cols = 16 / element_bytes;
    int const chunks = padded.num_cols / chunk_cols;
    for_each_padding_row(cu_seqlens, batch_size, rows, warp, num_warps, [&](int row) {
      for (int chunk = lane_idx; chunk < padded.num_heads * chunks; chunk += 32) {
        int64_t const offset = row * padded.tensor.row_stride +
                               chunk / chunks * padded.tensor.head_stride +
                               chunk % chunks * chunk_cols;
        *reinterpret_cast<uint4*>(static_cast<char*>(padded.tensor.ptr) +
                                  offset * element_bytes) = {};
      }
    });
  }
  if (problem.softmax_lse != nullptr && problem.sequences.cu_seqlens_q != nullptr) {
    int const rows = problem.shape.seqlen_q;
    for_each_padding_row(problem.sequences.cu_seqlens_q, batch_size, rows, warp, num_warps,
                         [&](int row) {
                           for (int head = lane_idx; head < problem.shape.num_heads; head += 32) {
                             problem.softmax_lse[int64_t(head) * rows + row] = kInfinity;
                           }
                         });
  }
}

struct ListRequests {
  ListRequest request[2];
  int count;
};

/// The first thread blocks write a list each, the others clear.
__global__ void __launch_bounds__(kThreads)
    list_tiles_kernel(__grid_constant__ PackedProblem const problem,
                      __grid_constant__ ListRequests const requests) {
#if __CUDA_ARCH__ >= 900
  // Launched early, and a kernel that uses the lists may start meanwhile: it waits for the end
  // itself, but not for the kernel before this one.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  if (int(blockIdx.x) < requests.count) {
    ListRequest const& request = requests.request[blockIdx.x];
    write_list(problem, request.tiling, static_cast<int*>(request.memory),
               static_cast<ListedTile*>(request.memory) + 1);
  } else {
    clear_rows(problem, blockIdx.x - requests.count);
  }
}

void launch_list_tiles(PackedProblem const& problem, ListRequests const& requests, void* stream,
                       bool early) {
  int const num_blocks = requests.count + kClearingBlocks;
  if (early) {
    launch_early<list_tiles_kernel>(num_blocks, kThreads, 0, stream, problem, requests);
  } else {
    launch<list_tiles_kernel>(num_blocks, kThreads, 0, stream, problem, requests);
  }
}

}  // namespace

TileList list_tiles(PackedProblem const& problem, ListRequest const& request, void* stream,
                    bool early) {
  launch_list_tiles(problem, {{request, request}, 1}, stream, early);
  return request.list();
}

void list_tiles(PackedProblem const& problem, ListRequest const& first, ListRequest const& second,
                void* stream, bool early) {
  launch_list_tiles(problem, {{first, second}, 2}, stream, early);
}

void clear_padding(PackedProblem const& problem, void* stream) {
  launch_list_tiles(problem, {}, stream, false);
}

}  // namespace flash
