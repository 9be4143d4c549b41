// The problem statement that every backend reads: plain structs of small groups.
//
// Glossary: seqlen_q, seqlen_k tokens of queries and keys; num_heads query heads; num_heads_k key
// and value heads (num_heads % num_heads_k == 0, query head h reads key head h / (num_heads /
// num_heads_k)); head_dim columns of queries and keys, head_dim_v columns of values and out.
// Strides are in elements, the last dimension is contiguous.
#pragma once

#include <cstdint>

#include "arith/mask_rule.h"

namespace flash {

enum class DType : uint8_t { kFp16, kBf16, kFp32 };

/// Bytes of one element.
FLASH_HD constexpr int element_size(DType dtype) {
  return dtype == DType::kFp32 ? 4 : 2;
}

/// A (batch, seqlen, heads, columns) tensor.
struct Strided {
  void* ptr;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;

  FLASH_HD int64_t offset(int batch, int head) const {
    return batch * batch_stride + head * head_stride;
  }
};

struct Shape {
  int batch_size;
  int seqlen_q;
  int seqlen_k;
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

/// out = softmax(softmax_scale * q k^T, masked) v; softmax_lse = log sum exp of the scaled scores.
/// A row without a visible key has out = 0 and softmax_lse = +inf.
struct ForwardParams {
  Strided q;           // [batch, seqlen_q, num_heads, head_dim]
  Strided k;           // [batch, seqlen_k, num_heads_k, head_dim]
  Strided v;           // [batch, seqlen_k, num_heads_k, head_dim_v]
  Strided out;         // [batch, seqlen_q, num_heads, head_dim_v]
  float* softmax_lse;  // [batch, num_heads, seqlen_q], natural logarithm
  Shape shape;
  Mask mask;
  float softmax_scale;  // > 0
};

/// Rows of softmax_d and of backward scratch per (batch, head): whole query tiles of every kernel.
FLASH_HD constexpr int softmax_d_rows(int seqlen_q) {
  return round_up(seqlen_q, 128);
}

/// Gradients by recomputation from softmax_lse. With P the probabilities and dP = dout v^T:
///   dv = P^T dout;  dS = P * (dP - softmax_d);  dq = softmax_scale dS k;  dk = softmax_scale dS^T
///   q, softmax_d = rowsum(dout * out) - dlse.
struct BackwardParams {
  Strided q, k, v, out, dout;  // as in ForwardParams; dout like out
  Strided dq, dk, dv;          // like q, k, v; every element is written
  float const* softmax_lse;    // [batch, num_heads, seqlen_q], from the forward
  float const* dlse;           // [batch, num_heads, seqlen_q], gradient of softmax_lse; may be null
  float* softmax_d;            // [batch, num_heads, softmax_d_rows(seqlen_q)], written
  Shape shape;
  Mask mask;
  float softmax_scale;  // > 0
  bool deterministic;   // dq bit-equal from run to run (dk and dv always are)
  void* workspace;  // scratch of the backend's workspace size, 256-byte aligned; may be null if 0
};

}  // namespace flash
