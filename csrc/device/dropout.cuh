// Which elements of a score tile dropout keeps (arith/dropout.h), in the order of the accumulator
// fragments (mma.cuh).
//
// A generator call decides 16 elements of a 16 x 16 block. Eight belong to lane 4g + t of even g,
// eight to lane 4(g + 1) + t. So of two blocks the even lane makes the call of one and the odd lane
// that of the other, and they exchange halves: 34 instructions of a call are saved for 10 of the
// exchange.
#pragma once

#include "device/fresh.cuh"
#include "device/mma.cuh"
#include "device/softmax.cuh"

namespace flash {

/// What the bits of one head depend on. All of it is the same in every lane, which the compiler has
/// to be told: the generator's keys are then in uniform registers.
struct DropoutKey {
  uint32_t seed_low, seed_high, offset;

  __device__ __forceinline__ explicit DropoutKey(Dropout const& dropout)
      : seed_low(0), seed_high(0), offset(0) {
    if (dropout.rng_state != nullptr) {
      uint64_t const seed = dropout.rng_state[0];
      seed_low = uniform(uint32_t(seed));
      seed_high = uniform(uint32_t(seed >> 32));
      offset = uniform(uint32_t(dropout.rng_state[1]));
    }
  }

  __device__ __forceinline__ Philox4 bits(int batch_head, int row, int col) const {
    return dropout_bits(int64_t(uint64_t(seed_high) << 32 | seed_low), offset, batch_head, row, col);
  }
};

/// Bytes (first, second) of `select` in every nibble's order of `a` (0 to 3) and `b` (4 to 7); with
/// 8 added, the byte's sign eight times.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t select) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(select));
  return result;
}

/// Sets the sign of every byte that is at most `last_kept`, a byte four times.
__device__ __forceinline__ uint32_t kept_signs(uint32_t bytes, uint32_t last_kept) {
  constexpr uint32_t kSigns = 0x80808080u;
  // By the lower seven bits, then by the sign: no byte borrows from the next.
  uint32_t const lower = (last_kept | kSigns) - (bytes & ~kSigns);
  return (lower & ~bytes) | (last_kept & (lower | ~bytes));
}

/// The kept elements of a lane's kM x kN pieces of 16 x 16: the sign of byte 2h + e of
/// word[m][n][half] is set if element e of row half `half` and column half h is kept.
template <int kM, int kN>
struct KeptElements {
  uint32_t word[kM][kN][2];

  /// Has to be called by whole warps.
  __device__ __forceinline__ KeptElements(Dropout const& dropout, DropoutKey const& key,
                                          int batch_head, PiecePlacement const& place) {
    __builtin_assume(place.first_row >= 0 && place.first_col >= 0);
    __builtin_assume(place.first_row % 16 == 0);
    __builtin_assume(place.first_col % 16 == 0);
    int const lane_idx = fresh_thread_idx() % 32;
    bool const is_odd = lane_idx / 4 % 2 != 0;
    int const first_row = place.first_row + lane_idx / 4, first_col = place.first_col + lane_idx % 4 * 2;
    uint32_t const last_kept = dropout.last_kept_byte * 0x01010101u;
    uint32_t const select_own = is_odd ? 0x7632 : 0x5410;
    auto const word_of = [&](int piece) -> uint32_t(&)[2] { return word[piece / kN][piece % kN]; };
    auto const row_of = [&](int piece) { return first_row + piece / kN * place.row_step; };
    auto const col_of = [&](int piece) { return first_col + piece % kN * place.col_step; };
#pragma unroll
    for (int piece = 0; piece < kM * kN; piece += 2) {
      bool const is_last = piece + 1 == kM * kN;  // of an odd number: both lanes make its call
      int const called = is_odd && !is_last ? 1 : 0;
      int const row = called == 0 ? row_of(piece) : row_of(piece + 1);
      int const col = called == 0 ? col_of(piece) : col_of(piece + 1);
      Philox4 const bits = key.bits(batch_head, row, col);
      uint32_t const x = kept_signs(bits.x, last_kept), y = kept_signs(bits.y, last_kept);
      uint32_t const z = kept_signs(bits.z, last_kept), w = kept_signs(bits.w, last_kept);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t const left = half == 0 ? x : z, right = half == 0 ? y : w;
        uint32_t const own = permute(left, right, select_own);
        if (is_last) {
          word_of(piece)[half] = own;
          continue;
        }
        uint32_t const other =
            __shfl_xor_sync(0xffffffffu, permute(left, right, select_own ^ 0x2222), 4);
        word_of(piece)[half] = is_odd ? other : own;
        word_of(piece + 1)[half] = is_odd ? own : other;
      }
    }
  }

  /// Mask of two packed elements of fragment n of 16 x 8.
  __device__ __forceinline__ uint32_t pair_mask(int m, int n, int half) const {
    return permute(word[m][n / 2][half], 0, n % 2 == 0 ? 0x9988 : 0xbbaa);
  }
  /// `value`, element e of fragment n, or 0 if it is dropped.
  __device__ __forceinline__ float kept(float value, int m, int n, int e) const {
    uint32_t const mask =
        permute(word[m][n / 2][e / 2], 0, 0x8888 + 0x1111 * (n % 2 * 2 + e % 2));
    return __uint_as_float(__float_as_uint(value) & mask);
  }
};

/// Clears what dropout drops of probabilities that are packed as operands.
template <int kM, int kN>
__device__ __forceinline__ void drop(Piece (&p)[kM][kN], KeptElements<kM, kN> const& kept) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[m][n].r[i] &= kept.pair_mask(m, 2 * n + i / 2, i % 2);
      }
    }
  }
}

}  // namespace flash
