#include "binding/calls.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <utility>

namespace flash::binding {
namespace {

bool is_aligned(Tensor const& tensor, int alignment) {
  if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % alignment != 0) {
    return false;
  }
  int64_t const elements = alignment / int64_t(tensor.element_size());
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    if (elements > 1 && tensor.size(dim) > 1 && tensor.stride(dim) % elements != 0) {
      return false;
    }
  }
  return true;
}

bool has_contiguous_rows(Tensor const& tensor) {
  return tensor.stride(tensor.dim() - 1) == 1 || tensor.size(tensor.dim() - 1) <= 1;
}

/// A new contiguous tensor like `tensor` but for the last size, contents undefined.
Tensor new_like(Tensor const& tensor, int64_t last_size) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return tensor.dim() == 3
             ? new_tensor(tensor, {tensor.size(0), tensor.size(1), last_size}, dtype)
             : new_tensor(tensor, {tensor.size(0), tensor.size(1), tensor.size(2), last_size},
                          dtype);
}

Tensor new_like(Tensor const& tensor) {
  return new_like(tensor, tensor.size(tensor.dim() - 1));
}

Tensor readable(Tensor const& tensor, int alignment) {
  if (has_contiguous_rows(tensor) && is_aligned(tensor, alignment)) {
    return tensor;
  }
  Tensor copy = new_like(tensor);
  torch::stable::copy_(copy, tensor);
  return copy;
}

Tensor as_contiguous(Tensor const& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor writable(Tensor const& tensor, int alignment) {
  return is_aligned(tensor, alignment) ? tensor : new_like(tensor);
}

void copy_back(Tensor const& given, Tensor const& computed) {
  if (given.get() != computed.get()) {
    Tensor target = given;
    torch::stable::copy_(target, computed);
  }
}

/// Packed rows are one entry.
Strided strided(Tensor const& tensor) {
  int64_t const heads = tensor.dim() - 2;
  return {.ptr = tensor.data_ptr(),
          .batch_stride = heads == 2 ? tensor.stride(0) : 0,
          .row_stride = tensor.stride(heads - 1),
          .head_stride = tensor.stride(heads)};
}

/// fp32, one value a row and head of q, which is packed or not; `rows` a head.
Tensor new_row_statistic(Tensor const& q, Problem const& problem, int64_t rows) {
  int32_t const dtype = aoti_torch_dtype_float32();
  return q.dim() == 3 ? new_tensor(q, {problem.shape.num_heads, rows}, dtype)
                      : new_tensor(q, {q.size(0), problem.shape.num_heads, rows}, dtype);
}

Mask mask_of(Options const& options) {
  return {window_bound(options.window_left), window_bound(options.window_right)};
}

Problem checked_inputs(Tensor const& q, Tensor const& k, Tensor const& v,
                       SequenceTensors const& sequences) {
  Problem const problem = checked_problem(q, k, v, sequences);
  check_rows_contiguous("q", q);
  check_rows_contiguous("k", k);
  check_rows_contiguous("v", v);
  return problem;
}

Tensor output(std::optional<Tensor> const& given, Tensor const& q, Tensor const& v, int alignment) {
  if (!given) {
    return new_like(q, v.size(v.dim() - 1));
  }
  check_out("out", *given, q, v);
  check_writable("out", *given);
  return writable(*given, alignment);
}

/// Everything but the sizes of q, k and v.
void check_backward(BackwardTensors const& in) {
  check_rows_contiguous("q", in.q);
  check_rows_contiguous("k", in.k);
  check_rows_contiguous("v", in.v);
  check_out("dout", in.dout, in.q, in.v);
  check_out("out", in.out, in.q, in.v);
  check_row_statistic("softmax_lse", in.softmax_lse, in.q);
  if (in.dlse) {
    check_row_statistic("dlse", *in.dlse, in.q);
  }
  check_like("dq", in.dq, "q", in.q);
  check_like("dk", in.dk, "k", in.k);
  check_like("dv", in.dv, "v", in.v);
  check_writable("dq", in.dq);
  check_writable("dk", in.dk);
  check_writable("dv", in.dv);
}

/// fp32 (num_heads), -inf.
Tensor new_max_logits(Tensor const& q, Problem const& problem) {
  Tensor result = new_tensor(q, {problem.shape.num_heads}, aoti_torch_dtype_float32());
  torch::stable::fill_(result, -std::numeric_limits<double>::infinity());
  return result;
}

/// Of zeros, where the gradients of the pairs are summed.
Bias zeroed_dbias(std::optional<Tensor>& dbias, Options const& options, Problem const& problem,
                  bool deterministic) {
  if (!dbias) {
    return {};
  }
  Bias const result = checked_dbias(*dbias, options.bias, problem, deterministic);
  torch::stable::zero_(*dbias);
  return result;
}

BackwardTensors checked_and_aligned(BackwardTensors const& in, int alignment) {
  check_backward(in);
  std::optional<Tensor> dlse;
  if (in.dlse) {
    dlse = as_contiguous(*in.dlse);
  }
  return {.dout = readable(in.dout, alignment),
          .q = readable(in.q, alignment),
          .k = readable(in.k, alignment),
          .v = readable(in.v, alignment),
          .out = readable(in.out, alignment),
          .softmax_lse = as_contiguous(in.softmax_lse),
          .dlse = std::move(dlse),
          .dq = writable(in.dq, alignment),
          .dk = writable(in.dk, alignment),
          .dv = writable(in.dv, alignment),
          .dbias = in.dbias};
}

}  // namespace

Tensor new_tensor(Tensor const& like, std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[4];
  int64_t stride = 1;
  for (std::size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    // As torch does it: an empty dimension counts as one.
    stride *= sizes.begin()[dim] > 0 ? sizes.begin()[dim] : 1;
  }
  int32_t device_type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(),
                                                         strides, dtype, device_type,
                                                         like.get_device_index(), &handle));
  return Tensor(handle);
}

ForwardCall::ForwardCall(Tensor const& q_in, Tensor const& k_in, Tensor const& v_in,
                         std::optional<Tensor> const& out_given, Options const& options,
                         bool asks_max_logits, int alignment)
    : dtype(checked_dtype(q_in)),
      problem(checked_inputs(q_in, k_in, v_in, options.sequences)),
      q(readable(q_in, alignment)),
      k(readable(k_in, alignment)),
      v(readable(v_in, alignment)),
      out_given(out_given),
      out(output(out_given, q, v, alignment)),
      softmax_lse(new_row_statistic(q, problem, problem.shape.seqlen_q)),
      max_logits(asks_max_logits ? std::optional(new_max_logits(q, problem)) : std::nullopt),
      params{
          .q = strided(q),
          .k = strided(k),
          .v = strided(v),
          .out = strided(out),
          .softmax_lse = static_cast<float*>(softmax_lse.data_ptr()),
          .shape = problem.shape,
          .max_seqlen_q = int(std::clamp<int64_t>(options.max_seqlen_q, 0, problem.shape.seqlen_q)),
          .sequences = problem.sequences,
          .mask = mask_of(options),
          .softmax_scale = checked_scale(options.softmax_scale),
          .allow_tf32 = options.allow_tf32,
          .scores = checked_scores(options.softcap, options.alibi_slopes, options.bias, q, problem),
          .dropout = checked_dropout(options.dropout_p, options.rng_state, q),
          .sink = checked_sink(options.sink, q, problem.shape),
          .max_logits = max_logits ? static_cast<float*>(max_logits->data_ptr()) : nullptr,
          .max_slack = max_logits ? 0.f : kMaxSlack,
          .workspace = nullptr} {}

void ForwardCall::finish() {
  if (out_given) {
    copy_back(*out_given, out);
  }
}

BackwardCall::BackwardCall(BackwardTensors tensors, Options const& options, bool deterministic,
                           int alignment)
    : dtype(checked_dtype(tensors.q)),
      problem(checked_problem(tensors.q, tensors.k, tensors.v, options.sequences)),
      given(std::move(tensors)),
      aligned(checked_and_aligned(given, alignment)),
      softmax_d(
          new_row_statistic(given.q, problem, softmax_d_rows(problem.shape, problem.sequences))),
      params{.q = strided(aligned.q),
             .k = strided(aligned.k),
             .v = strided(aligned.v),
             .out = strided(aligned.out),
             .dout = strided(aligned.dout),
             .dq = strided(aligned.dq),
             .dk = strided(aligned.dk),
             .dv = strided(aligned.dv),
             .softmax_lse = static_cast<float const*>(aligned.softmax_lse.data_ptr()),
             .dlse = aligned.dlse ? static_cast<float const*>(aligned.dlse->data_ptr()) : nullptr,
             .softmax_d = static_cast<float*>(softmax_d.data_ptr()),
             .softmax_d_rows = softmax_d_rows(problem.shape, problem.sequences),
             .shape = problem.shape,
             .sequences = problem.sequences,
             .mask = mask_of(options),
             .softmax_scale = checked_scale(options.softmax_scale),
             .scores = checked_scores(options.softcap, options.alibi_slopes, options.bias, given.q,
                                      problem),
             .dbias = zeroed_dbias(given.dbias, options, problem, deterministic),
             .dropout = checked_dropout(options.dropout_p, options.rng_state, given.q),
             .allow_tf32 = options.allow_tf32,
             .deterministic = deterministic,
             .workspace = nullptr} {}

bool BackwardCall::is_empty() const {
  Shape const& shape = problem.shape;
  return shape.batch_size == 0 || shape.seqlen_q == 0 || shape.seqlen_k == 0;
}

void BackwardCall::zero_gradients() {
  torch::stable::zero_(given.dq);
  torch::stable::zero_(given.dk);
  torch::stable::zero_(given.dv);
  torch::stable::zero_(softmax_d);
}

void BackwardCall::finish() {
  copy_back(given.dq, aligned.dq);
  copy_back(given.dk, aligned.dk);
  copy_back(given.dv, aligned.dv);
}

}  // namespace flash::binding
