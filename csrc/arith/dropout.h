// Which probabilities dropout keeps: the same in every backend, tile shape and pass.
#pragma once

#include "arith/philox.h"

namespace flash {

struct Dropout {
  int64_t const* rng_state;  // [2]: seed, offset. Null: no dropout
  int last_kept_byte;        // floor((1 - p) * 255)
  float scale;               // of what is kept, 1 / (1 - p)
};

/// One generator call decides 16 elements of a 16 x 16 block of a head's (seqlen_q, seqlen_k)
/// matrix: the rows {2a, 2a + 1, 2a + 8, 2a + 9} and the columns {2b, 2b + 1, 2b + 8, 2b + 9}. A
/// lane that holds an mma fragment of the block, as it is or transposed, finds its elements in one
/// call.
FLASH_HD constexpr Philox4 dropout_bits(int64_t seed, int64_t offset, int batch_head, int row,
                                        int col) {
  Philox4 const counter{uint32_t(row / 16 * 4 + row % 8 / 2), uint32_t(col / 16 * 4 + col % 8 / 2),
                        uint32_t(batch_head), uint32_t(offset)};
  return philox4x32_7(counter, uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
}

/// The byte of dropout_bits() that decides the element: its word is chosen by the halves of the
/// block that row and column lie in, its place in the word by their parity.
FLASH_HD constexpr int dropout_byte(Philox4 const& bits, int row, int col) {
  int const word = row / 8 % 2 * 2 + col / 8 % 2;
  uint32_t const value = word == 0 ? bits.x : word == 1 ? bits.y : word == 2 ? bits.z : bits.w;
  return int(value >> (8 * (row % 2 * 2 + col % 2)) & 255);
}

/// True if dropout keeps the probability of (row, col) of head batch_head = batch * num_heads +
/// head.
FLASH_HD constexpr bool dropout_keeps(Dropout const& dropout, int64_t seed, int64_t offset,
                                      int batch_head, int row, int col) {
  return dropout_byte(dropout_bits(seed, offset, batch_head, row, col), row, col) <=
         dropout.last_kept_byte;
}

}  // namespace flash
