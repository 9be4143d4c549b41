// The problem statement that every backend reads: plain structs of small groups.
//
// Glossary: seqlen_q, seqlen_k tokens of queries and keys; num_heads query heads; num_heads_k key
// and value heads (num_heads % num_heads_k == 0, query head h reads key head h / (num_heads /
// num_heads_k)); head_dim columns of queries and keys, head_dim_v columns of values and out.
// Strides are in elements, the last dimension is contiguous. A tensor of rows has entries of
// seqlen rows: one a sequence, or one for all if the sequences are packed (sequence.h).
#pragma once

#include <cstdint>

#include "arith/dropout.h"
#include "arith/mask_rule.h"
#include "arith/sequence.h"

namespace flash {

enum class DType : uint8_t { kFp16, kBf16, kFp32 };

/// Bytes of one element.
FLASH_HD constexpr int element_size(DType dtype) {
  return dtype == DType::kFp32 ? 4 : 2;
}

/// A (batch, seqlen, heads, columns) tensor, or (rows, heads, columns) as one entry.
struct Strided {
  void* ptr;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;

  FLASH_HD int64_t offset(int entry, int head) const {
    return entry * batch_stride + head * head_stride;
  }
};

struct Shape {
  int batch_size;  // sequences
  int seqlen_q;    // rows of an entry of q: of a sequence, or of all if q is packed
  int seqlen_k;    // the same of k and v
  int num_heads;
  int num_heads_k;
  int head_dim;
  int head_dim_v;

  FLASH_HD constexpr int query_heads_per_key_head() const { return num_heads / num_heads_k; }

  /// Bytes of K and V that fall to each query head: those of a group share theirs.
  FLASH_HD constexpr int64_t kv_bytes_per_query_head(DType dtype) const {
    return int64_t(seqlen_k) * (head_dim + head_dim_v) * element_size(dtype) /
           query_heads_per_key_head();
  }
};

/// A tensor that broadcasts to (batch, heads, seqlen_q, seqlen_k): along a dimension of size 1, or
/// one that it hasn't, the stride is 0. Strides are in elements, none of them need be 1.
struct Bias {
  void* ptr;  // null: none
  DType dtype;
  bool is_shared;  // some element belongs to several pairs of a query and a key
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int64_t col_stride;

  FLASH_HD constexpr int64_t plane(int batch, int head) const {
    return batch * batch_stride + head * head_stride;
  }
};

/// What happens to a scaled score s = softmax_scale * q k^T of row i and column j before the mask.
struct ScoreOptions {
  float softcap;              // 0: none, else s = softcap * tanh(s / softcap)
  float const* alibi_slopes;  // [batch or 1, num_heads]; null: none, else after the softcap
                              // s -= slope * |i + seqlen_k - seqlen_q - j|
  int alibi_batch_stride;     // num_heads, or 0 if all sequences share the slopes
  Bias bias;                  // fp32 or of the dtype of q; after the softcap s += bias[i, j]

  FLASH_HD constexpr bool is_on() const {
    return softcap != 0.f || alibi_slopes != nullptr || bias.ptr != nullptr;
  }
};

/// GPU kernels take a running maximum over when it has grown by more than this many powers of two.
/// Below that the old one does: the probabilities are then up to 2^kMaxSlack, which no 16-bit type
/// rounds differently, and `out / row_sum` is the same.
inline constexpr float kMaxSlack = 8.f;

/// out = softmax(scores) v with the scores masked and some probabilities dropped; softmax_lse = log
/// sum exp of the scores, without dropout. A row without a visible key has out = 0 and softmax_lse
/// = +inf. With sinks, exp(sink) counts in the sum of every row of the head. Rows of packed q that
/// belong to no sequence are such rows without a visible key.
struct ForwardParams {
  Strided q;           // [entries, seqlen_q, num_heads, head_dim]
  Strided k;           // [entries, seqlen_k, num_heads_k, head_dim]
  Strided v;           // [entries, seqlen_k, num_heads_k, head_dim_v]
  Strided out;         // [entries, seqlen_q, num_heads, head_dim_v]
  float* softmax_lse;  // [entries, num_heads, seqlen_q], natural logarithm
  Shape shape;
  int max_seqlen_q;  // of packed queries the longest, as the caller has it, by which alone tiles
                     // are chosen; 0: not known
  Sequences sequences;
  Mask mask;
  float softmax_scale;  // > 0
  bool allow_tf32;      // products of fp32 on tensor cores may be off by TF32's rounding
  ScoreOptions scores;
  Dropout dropout;
  float const* sink;  // [num_heads]; null: none
  float* max_logits;  // [num_heads], raised to the largest score of a visible pair; null: not asked
  float max_slack;    // kMaxSlack, or 0: the maximum that a row ends with is the true one
  void* workspace;    // scratch of the backend's workspace size, 256-byte aligned; may be null if 0

  FLASH_HD constexpr bool has_extras() const {
    return scores.is_on() || dropout.rng_state != nullptr;
  }
};

/// Rows of softmax_d and of backward scratch per (entry, head): whole query tiles of every kernel.
/// Sequences that are packed get whole tiles each.
FLASH_HD constexpr int softmax_d_rows(Shape const& shape, Sequences const& sequences) {
  return round_up(shape.seqlen_q + (sequences.cu_seqlens_q == nullptr ? 0 : 128 * shape.batch_size),
                  128);
}

/// The row of softmax_d where a sequence begins.
FLASH_HD constexpr int first_softmax_d_row(Sequence const& sequence, Sequences const& sequences,
                                           int batch) {
  return sequences.cu_seqlens_q == nullptr ? 0 : (sequence.first_q + 128 * batch) / 128 * 128;
}

/// Gradients by recomputation from softmax_lse. With P the probabilities, Z what dropout makes of
/// ones (0 or its scale), dP = Z * (dout v^T) and dS the gradient of the scaled scores:
///   dv = (P * Z)^T dout;  dS = P * (dP - softmax_d) * (softcap's derivative 1 - tanh^2);
///   dq = softmax_scale dS k;  dk = softmax_scale dS^T q;  softmax_d = rowsum(dout * out) - dlse.
/// dbias is dS without that derivative, summed over the pairs that share an element.
/// Of the sequences only cu_seqlens_q and cu_seqlens_k are used. Rows of packed tensors that belong
/// to no sequence get zeros.
struct BackwardParams {
  Strided q, k, v, out, dout;  // as in ForwardParams; dout like out
  Strided dq, dk, dv;          // like q, k, v; every element is written
  float const* softmax_lse;    // [entries, num_heads, seqlen_q], from the forward
  float const* dlse;           // like softmax_lse, its gradient; may be null
  float* softmax_d;            // [entries, num_heads, softmax_d_rows], written
  int softmax_d_rows;          // softmax_d_rows(shape, sequences)
  Shape shape;
  Sequences sequences;
  Mask mask;
  float softmax_scale;  // > 0
  ScoreOptions scores;
  Bias dbias;  // fp32, of the shape of scores.bias; zeros, to which is added; null: not asked
  Dropout dropout;
  bool allow_tf32;     // as in ForwardParams
  bool deterministic;  // dq bit-equal from run to run (dk and dv always are)
  void* workspace;     // as in ForwardParams

  FLASH_HD constexpr bool has_extras() const {
    return scores.is_on() || dropout.rng_state != nullptr;
  }
};

/// Sequence `batch` of a forward or backward problem.
template <class Params>
FLASH_HD constexpr Sequence sequence_of(Params const& params, int batch) {
  return sequence_of(params.sequences, batch, params.shape.seqlen_q, params.shape.seqlen_k);
}

}  // namespace flash
