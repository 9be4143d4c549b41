// What there is to do in a call: the tiles of its sequences in the order that threads take them,
// and the rows of packed tensors that belong to no sequence.
#pragma once

#include <vector>

#include "arith/tile_order.h"
#include "params.h"

namespace flash::cpu {

/// Query tiles of every query head: those that see the most keys first, as far as whole heads stay
/// together.
std::vector<Tile> query_tiles(Shape const& shape, Sequences const& sequences);

/// Key tiles of every key head. Those of a head are in order, and between them are tiles of other
/// heads, so that threads seldom wait for each other's dq turn.
std::vector<Tile> key_tiles(Shape const& shape, Sequences const& sequences, int num_threads);

/// Pairs of query and key over all sequences and query heads, counted without a mask.
int64_t num_pairs(Shape const& shape, Sequences const& sequences);

/// Rows of a packed tensor that no sequence has; none if cu_seqlens is null.
std::vector<RowSpan> unused_rows(int32_t const* cu_seqlens, int batch_size, int rows);

/// Zeros in the given rows of a packed tensor.
void zero_rows(Strided const& x, std::vector<RowSpan> const& spans, int heads, int cols,
               DType dtype);

}  // namespace flash::cpu
