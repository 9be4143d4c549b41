// How the copy engine finds the rows of a sequence.
#pragma once

#include "params.h"

namespace flash::sm90 {

/// Coordinates of row 0 of a sequence, next to column and head.
struct RowOrigin {
  int row, outer, wrap;
};

/// The engine drops what lies outside of a map's extents. A map of whole entries has the extents
/// (cols, seqlen, heads, entries, 1), strides as the tensor's. Where sequences are parts of
/// entries, each has to end somewhere else: there the extents are (cols, kUnit, heads, all rows +
/// 1, kUnit + 1), the fourth dimension has the stride of a row too, and the fifth one of 2^34 bytes
/// less a row. Of a sequence of n rows from row f on, row i is then at row kUnit - n + i, outer f +
/// n, wrap kUnit: the offsets add up to (f + i) rows and kUnit * 2^34 = 2^64 bytes, which is none;
/// and rows from n on lie outside. The idea is that of Triton's ragged descriptors.
struct RowMap {
  static constexpr int kUnit = 1 << 30;

  int entry_rows;  // rows from one entry to the next; 0: sequences are whole entries

  FLASH_HD constexpr RowOrigin origin(int entry, int first, int seqlen) const {
    return entry_rows == 0 ? RowOrigin{0, entry, 0}
                           : RowOrigin{kUnit - seqlen, entry * entry_rows + first + seqlen, kUnit};
  }
};

/// Sequence `batch` of a problem whose sequences are whole entries, or not: one look at a flag,
/// where sequence_of() looks at five pointers. It is on the way of every tile.
template <class Params>
FLASH_HD Sequence find_sequence(Params const& problem, bool are_entries, int batch) {
  if (are_entries) {
    return {batch, 0, problem.shape.seqlen_q, batch, 0, problem.shape.seqlen_k};
  }
  return sequence_of(problem, batch);
}

}  // namespace flash::sm90
