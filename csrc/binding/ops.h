// The ops as functions of C++ whose signatures are those of schema.cpp: the same of every backend,
// which brings run_forward() and run_backward().
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "binding/calls.h"

namespace flash::binding {

using OptionalTensor = std::optional<Tensor>;
using RunForward = ForwardCall (*)(Tensor const& q, Tensor const& k, Tensor const& v,
                                   OptionalTensor const& out, Options const& options,
                                   bool asks_max_logits);
using RunBackward = Tensor (*)(BackwardTensors const& tensors, Options const& options,
                               bool deterministic);

template <bool kMaxLogits>
using ForwardResult =
    std::conditional_t<kMaxLogits, std::tuple<Tensor, Tensor, Tensor>, std::tuple<Tensor, Tensor>>;

/// out, softmax_lse and, if asked, max_logits.
template <RunForward kRun, bool kMaxLogits>
ForwardResult<kMaxLogits> forward_op(
    Tensor const& q, Tensor const& k, Tensor const& v, double softmax_scale, int64_t window_left,
    int64_t window_right, double softcap, OptionalTensor const& alibi_slopes,
    OptionalTensor const& bias, double dropout_p, OptionalTensor const& rng_state,
    OptionalTensor const& sink, OptionalTensor const& cu_seqlens_q,
    OptionalTensor const& cu_seqlens_k, OptionalTensor const& seqused_k,
    OptionalTensor const& leftpad_k, OptionalTensor const& batch_idx_k, bool allow_tf32,
    int64_t max_seqlen_q) {
  Options const options{
      softmax_scale, window_left,
      window_right,  softcap,
      alibi_slopes,  bias,
      dropout_p,     rng_state,
      sink,          {cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, batch_idx_k},
      allow_tf32,    max_seqlen_q};
  ForwardCall const call = kRun(q, k, v, std::nullopt, options, kMaxLogits);
  if constexpr (kMaxLogits) {
    return {call.out, call.softmax_lse, *call.max_logits};
  } else {
    return {call.out, call.softmax_lse};
  }
}

/// softmax_lse; the output goes to `out`.
template <RunForward kRun>
Tensor forward_into_op(Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& out,
                       double softmax_scale, int64_t window_left, int64_t window_right,
                       double softcap, OptionalTensor const& alibi_slopes,
                       OptionalTensor const& bias, double dropout_p,
                       OptionalTensor const& rng_state, OptionalTensor const& sink,
                       OptionalTensor const& cu_seqlens_q, OptionalTensor const& cu_seqlens_k,
                       OptionalTensor const& seqused_k, OptionalTensor const& leftpad_k,
                       OptionalTensor const& batch_idx_k, bool allow_tf32, int64_t max_seqlen_q) {
  Options const options{
      softmax_scale, window_left,
      window_right,  softcap,
      alibi_slopes,  bias,
      dropout_p,     rng_state,
      sink,          {cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, batch_idx_k},
      allow_tf32,    max_seqlen_q};
  return kRun(q, k, v, out, options, false).softmax_lse;
}

/// softmax_d.
template <RunBackward kRun>
Tensor backward_op(Tensor const& dout, Tensor const& q, Tensor const& k, Tensor const& v,
                   Tensor const& out, Tensor const& softmax_lse, OptionalTensor const& dlse,
                   Tensor const& dq, Tensor const& dk, Tensor const& dv, double softmax_scale,
                   int64_t window_left, int64_t window_right, bool deterministic, double softcap,
                   OptionalTensor const& alibi_slopes, OptionalTensor const& bias, double dropout_p,
                   OptionalTensor const& rng_state, OptionalTensor const& cu_seqlens_q,
                   OptionalTensor const& cu_seqlens_k, OptionalTensor const& dbias,
                   bool allow_tf32) {
  OptionalTensor const none;
  Options const options{softmax_scale, window_left,
                        window_right,  softcap,
                        alibi_slopes,  bias,
                        dropout_p,     rng_state,
                        none,          {cu_seqlens_q, cu_seqlens_k, none, none, none},
                        allow_tf32,    0};
  return kRun({dout, q, k, v, out, softmax_lse, dlse, dq, dk, dv, dbias}, options, deterministic);
}

/// Registers the ops of a backend with its library of a device.
template <RunForward kForward, RunBackward kBackward, class Library>
void register_ops(Library& library) {
  constexpr auto forward = &forward_op<kForward, false>;
  constexpr auto forward_with_max_logits = &forward_op<kForward, true>;
  constexpr auto forward_into = &forward_into_op<kForward>;
  constexpr auto backward = &backward_op<kBackward>;
  library.impl("forward", TORCH_BOX(forward));
  library.impl("forward_with_max_logits", TORCH_BOX(forward_with_max_logits));
  library.impl("forward_into", TORCH_BOX(forward_into));
  library.impl("backward", TORCH_BOX(backward));
}

}  // namespace flash::binding
