// Re-checks of what Python has checked already, for callers of the ops themselves. Every text says
// what was expected and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>

#include "params.h"

namespace flash::binding {

using torch::stable::Tensor;

inline constexpr int kMaxHeadDim = 256;

/// dtype of q, which k, v and everything like them share.
DType checked_dtype(Tensor const& q);

/// Sizes of a problem whose q, k and v fit together. Only the sizes, dtypes and devices are
/// checked; strides are the matter of the caller.
Shape checked_shape(Tensor const& q, Tensor const& k, Tensor const& v);

/// `tensor` has the sizes, dtype and device of `expected`.
void check_like(char const* name, Tensor const& tensor, char const* expected_name,
                Tensor const& expected);

/// `tensor` has the sizes, dtype and device of out: (batch, seqlen_q, num_heads, head_dim_v).
void check_out(char const* name, Tensor const& tensor, Tensor const& q, Tensor const& v);

/// `tensor` is fp32 (batch, num_heads, seqlen_q) on the device of q.
void check_row_statistic(char const* name, Tensor const& tensor, Tensor const& q);

/// Last dimension contiguous, as q, k and v have to be; a gradient must not overlap itself besides.
void check_rows_contiguous(char const* name, Tensor const& tensor);
void check_writable(char const* name, Tensor const& tensor);

/// The softmax_scale of the kernels: finite and positive (callers fold a sign into q).
float checked_scale(double softmax_scale);

/// A window bound cut to what an int holds; negative means unbounded.
int window_bound(int64_t bound);

}  // namespace flash::binding
