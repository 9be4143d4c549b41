// Re-checks of what Python has checked already, for callers of the ops themselves. Every text says
// what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "params.h"

namespace flash::binding {

using torch::stable::Tensor;

inline constexpr int kMaxHeadDim = 256;

/// dtype of q, which k, v and everything like them share.
DType checked_dtype(Tensor const& q);

/// The tensors of Sequences (arith/sequence.h).
struct SequenceTensors {
  using Given = std::optional<Tensor> const&;

  Given cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, batch_idx_k;
};

/// Sizes of a problem whose q, k and v fit together, and where its sequences lie. Strides of q, k
/// and v are the matter of the caller.
struct Problem {
  Shape shape;
  Sequences sequences;
};
Problem checked_problem(Tensor const& q, Tensor const& k, Tensor const& v,
                        SequenceTensors const& sequences);

ScoreOptions checked_scores(double softcap, std::optional<Tensor> const& alibi_slopes,
                            std::optional<Tensor> const& bias, Tensor const& q,
                            Problem const& problem);

/// The gradient of `bias`: contiguous, fp32 and of its sizes. Elements that several pairs share are
/// summed in no fixed order.
Bias checked_dbias(Tensor const& dbias, std::optional<Tensor> const& bias, Problem const& problem,
                   bool deterministic);
Dropout checked_dropout(double dropout_p, std::optional<Tensor> const& rng_state, Tensor const& q);
float const* checked_sink(std::optional<Tensor> const& sink, Tensor const& q, Shape const& shape);

/// `tensor` has the sizes, dtype and device of `expected`.
void check_like(char const* name, Tensor const& tensor, char const* expected_name,
                Tensor const& expected);

/// `tensor` has the dtype, device and sizes of q but for the last, which is that of v: as out has.
void check_out(char const* name, Tensor const& tensor, Tensor const& q, Tensor const& v);

/// `tensor` is fp32 (batch, num_heads, seqlen_q), or (num_heads, total_q) if q is packed, on the
/// device of q.
void check_row_statistic(char const* name, Tensor const& tensor, Tensor const& q);

/// Last dimension contiguous, as q, k and v have to be; a gradient must not overlap itself besides.
void check_rows_contiguous(char const* name, Tensor const& tensor);
void check_writable(char const* name, Tensor const& tensor);

/// The softmax_scale of the kernels: finite and positive (callers fold a sign into q).
float checked_scale(double softmax_scale);

/// A window bound cut to what an int holds; negative means unbounded.
int window_bound(int64_t bound);

}  // namespace flash::binding
