#include "arith/block_range.h"
#include "device/element.cuh"
#include "device/launch.cuh"
#include "device/tile_list.h"

namespace flash {
namespace {

constexpr int kThreads = 1024;
constexpr int kLevels = kThreads;  // of work; one thread each
constexpr int kClearingBlocks = 32;

/// Tiles of a sequence, and the work of its longest one: tiles of the other side that it meets.
struct SequenceTiles {
  int num_tiles;
  int work;
};

__device__ __forceinline__ SequenceTiles tiles_of(PackedProblem const& problem,
                                                  Tiling const& tiling, int batch) {
  Sequence const sequence = sequence_of(problem, batch);
  int const rows = tiling.of_keys ? sequence.seqlen_k : sequence.seqlen_q;
  int const others = tiling.of_keys ? sequence.seqlen_q : sequence.seqlen_k;
  Mask const mask = tiling.of_keys ? transposed(problem.mask) : problem.mask;
  int const left = mask.window_left < 0 ? others : imin(mask.window_left, others);
  int const right = mask.window_right < 0 ? others : imin(mask.window_right, others);
  int const seen = right >= others - left
                       ? others
                       : imin(left + right, others - tiling.tile_rows) + tiling.tile_rows;
  return {ceil_div(rows, tiling.tile_rows), ceil_div(seen, tiling.other_tile_rows)};
}

/// Exclusive prefix sums of one value a thread, in `sums`.
__device__ __forceinline__ void prefix_sums(int (&sums)[kLevels]) {
  int const own = sums[threadIdx.x];
  for (int distance = 1; distance < kLevels; distance *= 2) {
    int const before = int(threadIdx.x) >= distance ? sums[threadIdx.x - distance] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
    __syncthreads();
  }
  sums[threadIdx.x] -= own;
  __syncthreads();
}

/// Sequences are sorted by counting those of each level of work.
__device__ void write_list(PackedProblem const& problem, Tiling const& tiling, int* num_tiles,
                           ListedTile* tiles) {
  __shared__ int starts[kLevels];
  __shared__ int max_work;
  if (threadIdx.x == 0) {
    max_work = 1;
  }
  starts[threadIdx.x] = 0;
  __syncthreads();
  int const batch_size = problem.shape.batch_size;
  for (int batch = threadIdx.x; batch < batch_size; batch += kThreads) {
    atomicMax(&max_work, tiles_of(problem, tiling, batch).work);
  }
  __syncthreads();
  auto const level = [&](SequenceTiles const& sequence) {
    return kLevels - 1 - int(int64_t(sequence.work) * (kLevels - 1) / max_work);
  };
  for (int batch = threadIdx.x; batch < batch_size; batch += kThreads) {
    SequenceTiles const sequence = tiles_of(problem, tiling, batch);
    atomicAdd(&starts[level(sequence)], sequence.num_tiles);
  }
  __syncthreads();
  int const last = starts[kLevels - 1];
  __syncthreads();
  prefix_sums(starts);
  if (threadIdx.x == 0) {
    *num_tiles = starts[kLevels - 1] + last;
  }
  __syncthreads();
  int const lane_idx = threadIdx.x % 32;
  for (int batch = threadIdx.x / 32; batch < batch_size; batch += kThreads / 32) {
    SequenceTiles const sequence = tiles_of(problem, tiling, batch);
    int first = 0;
    if (lane_idx == 0) {
      first = atomicAdd(&starts[level(sequence)], sequence.num_tiles);
    }
    first = __shfl_sync(0xffffffffu, first, 0);
    for (int i = lane_idx; i < sequence.num_tiles; i += 32) {
      tiles[first + i] = {tiling.descending ? sequence.num_tiles - 1 - i : i, batch};
    }
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
  // A kernel that uses the lists may start meanwhile: it waits for the end itself.
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

void launch_list_tiles(PackedProblem const& problem, ListRequests const& requests, void* stream) {
  launch<list_tiles_kernel>(requests.count + kClearingBlocks, kThreads, 0, stream, problem,
                            requests);
}

}  // namespace

TileList list_tiles(PackedProblem const& problem, ListRequest const& request, void* stream) {
  launch_list_tiles(problem, {{request, request}, 1}, stream);
  return request.list();
}

void list_tiles(PackedProblem const& problem, ListRequest const& first, ListRequest const& second,
                void* stream) {
  launch_list_tiles(problem, {{first, second}, 2}, stream);
}

void clear_padding(PackedProblem const& problem, void* stream) {
  launch_list_tiles(problem, {}, stream);
}

}  // namespace flash
