// Where the sequences of a batch lie in packed, padded or cached tensors, and how long they are.
#pragma once

#include "arith/integer.h"

namespace flash {

/// Every pointer may be null: then sequence b is all rows of entry b of the batch dimension. The
/// values lie on the device and are not known to the host.
struct Sequences {
  int entries_q, entries_k;     // sizes of the batch dimensions: 1 where packed
  int32_t const* cu_seqlens_q;  // [batch + 1]: q is packed, sequence b its rows [cu[b], cu[b + 1])
  int32_t const* cu_seqlens_k;  // [batch + 1]: the same of k and v
  int32_t const* seqused_k;     // [batch]: how many of a sequence's keys there are; cuts its end
  int32_t const* leftpad_k;     // [batch]: how many keys to leave out at its begin
  int32_t const* batch_idx_k;   // [batch]: the entry of k and v that holds the keys of sequence b

  /// True if every sequence is a whole entry.
  FLASH_HD constexpr bool are_entries() const {
    return cu_seqlens_q == nullptr && cu_seqlens_k == nullptr && seqused_k == nullptr &&
           leftpad_k == nullptr && batch_idx_k == nullptr;
  }
};

/// One sequence: entry of the batch dimension, first row, number of rows.
struct Sequence {
  int entry_q, first_q, seqlen_q;
  int entry_k, first_k, seqlen_k;
};

/// Rows [begin, end) of a tensor with `rows` of them, from values that may be anything.
struct RowSpan {
  int begin;
  int end;
};

FLASH_HD constexpr RowSpan packed_rows(int32_t const* cu_seqlens, int batch, int rows) {
  int const begin = imin(imax(cu_seqlens[batch], 0), rows);
  return {begin, imin(imax(cu_seqlens[batch + 1], begin), rows)};
}

/// Sequence `batch`; rows_q and rows_k are those of an entry of q and of k. Whatever the arrays
/// hold, no row outside of the tensors is named.
FLASH_HD constexpr Sequence sequence_of(Sequences const& sequences, int batch, int rows_q,
                                        int rows_k) {
  Sequence result{batch, 0, rows_q, batch, 0, rows_k};
  if (sequences.cu_seqlens_q != nullptr) {
    RowSpan const rows = packed_rows(sequences.cu_seqlens_q, batch, rows_q);
    result.entry_q = 0;
    result.first_q = rows.begin;
    result.seqlen_q = rows.end - rows.begin;
  }
  if (sequences.cu_seqlens_k != nullptr) {
    RowSpan const rows = packed_rows(sequences.cu_seqlens_k, batch, rows_k);
    result.entry_k = 0;
    result.first_k = rows.begin;
    result.seqlen_k = rows.end - rows.begin;
  } else if (sequences.batch_idx_k != nullptr) {
    result.entry_k = imin(imax(sequences.batch_idx_k[batch], 0), sequences.entries_k - 1);
  }
  if (sequences.seqused_k != nullptr) {
    result.seqlen_k = imin(imax(sequences.seqused_k[batch], 0), result.seqlen_k);
  }
  if (sequences.leftpad_k != nullptr) {
    int const skipped = imin(imax(sequences.leftpad_k[batch], 0), result.seqlen_k);
    result.first_k += skipped;
    result.seqlen_k -= skipped;
  }
  return result;
}

}  // namespace flash
