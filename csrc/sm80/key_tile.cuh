// A key tile of the sm80 backward, and the walk over the query tiles that see it.
#pragma once

#include "arith/block_range.h"
#include "device/copy.cuh"
#include "device/tile_source.h"

namespace flash::sm80 {

/// One visit of the walk: query tile m_block of query head `head`.
struct QueryVisit {
  int head;
  int m_block;
};

/// The tile's place in the problem.
struct KeyTile {
  int n_block;  // negative: there is none
  int batch;
  int head_k;
  Sequence sequence;
  int first_row;        // of the sequence in the rows of softmax_d
  BlockRange m_blocks;  // query tiles that see some key
  BlockRange full;      // query tiles without need of the element mask

  /// Query tiles of all query heads that read head_k.
  __device__ __forceinline__ int num_visits(Shape const& shape) const {
    return (m_blocks.max - m_blocks.min) * shape.query_heads_per_key_head();
  }
  /// Visits go from the last query tile to the first, last head first.
  __device__ __forceinline__ QueryVisit first_visit(Shape const& shape) const {
    return {(head_k + 1) * shape.query_heads_per_key_head() - 1, m_blocks.max - 1};
  }
  __device__ __forceinline__ QueryVisit after(QueryVisit const& visit) const {
    bool const same_head = visit.m_block > m_blocks.min;
    return {same_head ? visit.head : visit.head - 1,
            same_head ? visit.m_block - 1 : m_blocks.max - 1};
  }
};

template <class Traits>
__device__ __forceinline__ TileGrid tile_grid(BackwardParams const& params,
                                              Sequence const& sequence) {
  return {Traits::kConfig.tile_m, Traits::kConfig.tile_n, sequence.seqlen_q, sequence.seqlen_k,
          params.mask};
}

template <class Traits>
__device__ __forceinline__ KeyTile key_tile(BackwardParams const& params, TileSource const& source,
                                            int tile_idx) {
  Shape const& shape = params.shape;
  Tile const tile = source.tile(tile_idx);
  int const batch = tile.batch_head / shape.num_heads_k;
  Sequence const sequence = sequence_of(params, batch);
  TileGrid const grid = tile_grid<Traits>(params, sequence);
  // Keys past the end have to be masked in every visit: exp(0 - lse) may be infinite.
  bool const ragged = (tile.block + 1) * Traits::kConfig.tile_n > sequence.seqlen_k;
  return {tile.block,
          batch,
          tile.batch_head % shape.num_heads_k,
          sequence,
          first_softmax_d_row(sequence, params.sequences, batch),
          m_block_range(grid, tile.block),
          ragged ? BlockRange{0, 0} : full_m_block_range(grid, tile.block)};
}

/// The tile's rows of k, v or a gradient of theirs.
template <class Traits>
__device__ __forceinline__ GlobalRows key_rows(Strided const& tensor, KeyTile const& tile,
                                               int cols) {
  Sequence const& sequence = tile.sequence;
  return GlobalRows(tensor, sequence.entry_k, tile.head_k, sequence.first_k, sequence.seqlen_k,
                    cols, Traits::kElementBytes);
}

}  // namespace flash::sm80
