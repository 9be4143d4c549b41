// Which elements of a score tile dropout keeps (arith/dropout.h), in the order of the accumulator
// fragments (mma.cuh).
//
// A generator call decides 16 elements of a 16 x 16 block. Eight belong to lane 4g + t of even g,
// eight to lane 4(g + 1) + t. So of two blocks the even lane makes the call of one and the odd lane
// that of the other, and they exchange halves: a call of 34 instructions (of ten rounds)
// is saved for ten of the exchange: 88 for the 16 elements of a lane, from 506 without any of this.
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
    return dropout_bits(int64_t(uint64_t(seed_high) << 32 | seed_low), offset, batch_head, row,
                        col);
  }
};

/// Nibble i of `select` names byte i of the result: 0 to 3 of `a`, 4 to 7 of `b`. With 8 added, the
/// byte is the named one's sign eight times.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t select) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(select));
  return result;
}

/// Sets the sign of every byte that is at most that of `last_kept`, a byte four times. Three
/// instructions for four elements; other bits are undefined.
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
    // Known, they save 20 instructions of the counters.
    __builtin_assume(place.first_row >= 0 && place.first_col >= 0);
    __builtin_assume(place.first_row % 16 == 0);
    __builtin_assume(place.first_col % 16 == 0);
    int const lane_idx = fresh_thread_idx() % 32;
    bool const is_odd = lane_idx / 4 % 2 != 0;
    uint32_t const last_kept = dropout.last_kept_byte * 0x01010101u;
#pragma unroll
    for (int piece = 0; piece < kM * kN; piece += 2) {
      // An odd number of pieces: both lanes make the call of the last.
      int const next = piece + 1 < kM * kN ? piece + 1 : piece;
      int const m = is_odd ? next / kN : piece / kN, n = is_odd ? next % kN : piece % kN;
      Philox4 const bits = key.bits(batch_head, place.first_row + m * place.row_step + lane_idx / 4,
                                    place.first_col + n * place.col_step + lane_idx % 4 * 2);
      uint32_t const halves[2][2] = {
          {kept_signs(bits.x, last_kept), kept_signs(bits.y, last_kept)},
          {kept_signs(bits.z, last_kept), kept_signs(bits.w, last_kept)}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        exchange(word[piece / kN][piece % kN][half], word[next / kN][next % kN][half], halves[half],
                 is_odd, next != piece);
      }
    }
  }

  /// Mask of two packed elements of fragment n of 16 x 8.
  __device__ __forceinline__ uint32_t pair_mask(int m, int n, int half) const {
    return permute(word[m][n / 2][half], 0, n % 2 == 0 ? 0x9988 : 0xbbaa);
  }
  /// Mask of element e of fragment n as fp32.
  __device__ __forceinline__ uint32_t mask(int m, int n, int e) const {
    return permute(word[m][n / 2][e / 2], 0, 0x8888 + 0x1111 * (n % 2 * 2 + e % 2));
  }
  /// `value`, element e of fragment n, or 0 if it is dropped.
  __device__ __forceinline__ float kept(float value, int m, int n, int e) const {
    return __uint_as_float(__float_as_uint(value) & mask(m, n, e));
  }
  /// Clears what is dropped of two neighbours in row half `half` of fragment n.
  template <DType kDType>
  __device__ __forceinline__ void drop(PackedPair<kDType>& pair, int m, int n, int half) const {
    if constexpr (kDType == DType::kFp32) {
      pair.word[0] &= mask(m, n, 2 * half);
      pair.word[1] &= mask(m, n, 2 * half + 1);
    } else {
      pair.word[0] &= pair_mask(m, n, half);
    }
  }

 private:
  /// From a call's words of the left and the right columns, bytes 0 and 1 of which belong to the
  /// even lane and 2 and 3 to the odd one, to this lane's words of two pieces: of `first`, the even
  /// lane's call, and of `second`, the odd lane's.
  static __device__ __forceinline__ void exchange(uint32_t& first, uint32_t& second,
                                                  uint32_t const (&called)[2], bool is_odd,
                                                  bool has_second) {
    constexpr uint32_t kEven = 0x5410, kOdd = 0x7632;
    uint32_t const own = permute(called[0], called[1], is_odd ? kOdd : kEven);
    if (!has_second) {
      first = own;
      return;
    }
    uint32_t const other =
        __shfl_xor_sync(0xffffffffu, permute(called[0], called[1], is_odd ? kEven : kOdd), 4);
    first = is_odd ? other : own;
    second = is_odd ? own : other;
  }
};

/// The kept elements of one row of kN pieces of 16 x 16 in a bit each. Transposed, the rows of the
/// pieces are columns of the score matrix. As in KeptElements the lanes of even and odd g make the
/// calls of two pieces, but what they exchange is one word: bit j of byte b of it is element b of
/// word j of the call.
template <int kN, bool kTransposed>
struct KeptBits {
  static constexpr int kWords = (kN + 3) / 4;
  uint32_t word[kWords];  // pieces 4w to 4w + 3; two each in the lower and upper nibbles

  __device__ __forceinline__ void keep_all() {
#pragma unroll
    for (uint32_t& bits : word) {
      bits = 0xffffffffu;
    }
  }
  /// Has to be called by whole warps. first_row and first_col, the row and column of the pieces'
  /// first element, are multiples of 16.
  __device__ __forceinline__ void find(Dropout const& dropout, DropoutKey const& key,
                                       int batch_head, int first_row, int first_col) {
#pragma unroll
    for (int idx = 0; idx < kWords; ++idx) {
      find_word(idx, dropout, key, batch_head, first_row, first_col);
    }
  }
  /// The same for one word.
  __device__ __forceinline__ void find_word(int idx, Dropout const& dropout, DropoutKey const& key,
                                            int batch_head, int first_row, int first_col) {
    __builtin_assume(first_row >= 0 && first_row % 16 == 0);
    __builtin_assume(first_col >= 0 && first_col % 16 == 0);
    int const lane_idx = fresh_thread_idx() % 32;
    bool const is_odd = lane_idx / 4 % 2 != 0;
    int const row = first_row + lane_idx / 4;
    int const col = first_col + lane_idx % 4 * 2 + (is_odd ? 16 : 0);
    // The bytes of a lane: 0 and 1 of an even one, 2 and 3 of an odd one; transposed 0 and 2, 1 and
    // 3. The even lane's call comes first.
    uint32_t const merge = kTransposed ? (is_odd ? 0x3175 : 0x6420) : (is_odd ? 0x3276 : 0x5410);
    uint32_t const last_kept = dropout.last_kept_byte * 0x01010101u;
    word[idx] = 0;
#pragma unroll
    for (int n = 4 * idx; n < 4 * idx + 4 && n < kN; n += 2) {
      int const call_col = col + 16 * n;
      Philox4 const bits =
          key.bits(batch_head, kTransposed ? call_col : row, kTransposed ? row : call_col);
      uint32_t own = kept_signs(bits.x, last_kept) >> 7 & 0x01010101u;
      own |= kept_signs(bits.y, last_kept) >> 6 & 0x02020202u;
      own |= kept_signs(bits.z, last_kept) >> 5 & 0x04040404u;
      own |= kept_signs(bits.w, last_kept) >> 4 & 0x08080808u;
      uint32_t const pair = permute(own, __shfl_xor_sync(0xffffffffu, own, 4), merge);
      word[idx] |= pair << (n % 4 * 2);
    }
  }

  static constexpr int bit(int fragment, int half) {
    return fragment / 4 % 2 * 4 + (kTransposed ? fragment % 2 * 2 + half : half * 2 + fragment % 2);
  }
  /// Of element i of fragment n of 16 x 8.
  __device__ __forceinline__ bool is_kept(int n, int i) const {
    return (word[n / 8] & 1u << (8 * (n / 2 % 2 * 2 + i % 2) + bit(n, i / 2))) != 0;
  }
  /// Mask of two packed elements of fragment n.
  __device__ __forceinline__ uint32_t pair_mask(int n, int half) const {
    return permute(word[n / 8] << (7 - bit(n, half)), 0, n / 2 % 2 == 0 ? 0x9988 : 0xbbaa);
  }
};

/// Clears what dropout drops of probabilities in fp32: in the order of their bits, of which the
/// compiler makes seven predicates an instruction.
template <int kFragments, int kN, bool kTransposed>
__device__ __forceinline__ void drop(float (&p)[kFragments][4],
                                     KeptBits<kN, kTransposed> const& kept) {
#pragma unroll
  for (int eight = 0; eight < kFragments; eight += 8) {
#pragma unroll
    for (int byte = 0; byte < 4; ++byte) {
#pragma unroll
      for (int bit = 0; bit < 8; ++bit) {
        int const row = kTransposed ? bit % 2 : bit / 2 % 2;
        int const col = kTransposed ? bit / 2 % 2 : bit % 2;
        int const n = eight + bit / 4 * 4 + byte / 2 * 2 + col;
        int const i = row * 2 + byte % 2;
        if (n < kFragments && !kept.is_kept(n, i)) {
          p[n][i] = 0.f;
        }
      }
    }
  }
}

/// Clears what dropout drops of probabilities that are operands (set_pair() of mma.cuh).
template <DType kDType, int kM, int kPieces, int kN>
__device__ __forceinline__ void drop(Piece (&p)[kM][kPieces], KeptElements<kM, kN> const& kept) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kDType == DType::kFp32) {
          p[m][n].r[i] &= kept.mask(m, n, i % 2 * 2 + i / 2);
        } else {
          p[m][n].r[i] &= kept.pair_mask(m, 2 * n + i / 2, i % 2);
        }
      }
    }
  }
}

}  // namespace flash
