// Ops on CPU tensors.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "binding/calls.h"
#include "cpu/attention.h"

namespace flash::binding {
namespace {

constexpr int kAlignment = 1;  // any tensor of whole elements will do

ForwardCall run_forward(Tensor const& q, Tensor const& k, Tensor const& v, Tensor const* out,
                        Options const& options, bool asks_max_logits) {
  ForwardCall call(q, k, v, out, options, asks_max_logits, kAlignment);
  if (!call.is_empty()) {
    cpu::forward(call.params, call.dtype, int(torch::stable::get_num_threads()));
    call.finish(out);
  }
  return call;
}

/// out, softmax_lse and, if asked, max_logits.
template <bool kMaxLogits>
ForwardResult<kMaxLogits> forward_cpu(
    Tensor const& q, Tensor const& k, Tensor const& v, double softmax_scale, int64_t window_left,
    int64_t window_right, double softcap, std::optional<Tensor> const& alibi_slopes,
    std::optional<Tensor> const& bias, double dropout_p, std::optional<Tensor> const& rng_state,
    std::optional<Tensor> const& sink, std::optional<Tensor> const& cu_seqlens_q,
    std::optional<Tensor> const& cu_seqlens_k, std::optional<Tensor> const& seqused_k,
    std::optional<Tensor> const& leftpad_k, std::optional<Tensor> const& batch_idx_k,
    bool allow_tf32) {
  Options const options{
      softmax_scale, window_left,
      window_right,  softcap,
      alibi_slopes,  bias,
      dropout_p,     rng_state,
      sink,          {cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, batch_idx_k},
      allow_tf32};
  return forward_result<kMaxLogits>(run_forward(q, k, v, nullptr, options, kMaxLogits));
}

Tensor forward_into_cpu(Tensor const& q, Tensor const& k, Tensor const& v, Tensor const& out,
                        double softmax_scale, int64_t window_left, int64_t window_right,
                        double softcap, std::optional<Tensor> const& alibi_slopes,
                        std::optional<Tensor> const& bias, double dropout_p,
                        std::optional<Tensor> const& rng_state, std::optional<Tensor> const& sink,
                        std::optional<Tensor> const& cu_seqlens_q,
                        std::optional<Tensor> const& cu_seqlens_k,
                        std::optional<Tensor> const& seqused_k,
                        std::optional<Tensor> const& leftpad_k,
                        std::optional<Tensor> const& batch_idx_k, bool allow_tf32) {
  Options const options{
      softmax_scale, window_left,
      window_right,  softcap,
      alibi_slopes,  bias,
      dropout_p,     rng_state,
      sink,          {cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, batch_idx_k},
      allow_tf32};
  return run_forward(q, k, v, &out, options, false).softmax_lse;
}

Tensor backward_cpu(Tensor const& dout, Tensor const& q, Tensor const& k, Tensor const& v,
                    Tensor const& out, Tensor const& softmax_lse, std::optional<Tensor> const& dlse,
                    Tensor const& dq, Tensor const& dk, Tensor const& dv, double softmax_scale,
                    int64_t window_left, int64_t window_right, bool deterministic, double softcap,
                    std::optional<Tensor> const& alibi_slopes, std::optional<Tensor> const& bias,
                    double dropout_p, std::optional<Tensor> const& rng_state,
                    std::optional<Tensor> const& cu_seqlens_q,
                    std::optional<Tensor> const& cu_seqlens_k, std::optional<Tensor> const& dbias,
                    bool allow_tf32) {
  std::optional<Tensor> const none;
  Options const options{softmax_scale, window_left,
                        window_right,  softcap,
                        alibi_slopes,  bias,
                        dropout_p,     rng_state,
                        none,          {cu_seqlens_q, cu_seqlens_k, none, none, none},
                        allow_tf32};
  BackwardCall call({dout, q, k, v, out, softmax_lse, dlse, dq, dk, dv, dbias}, options,
                    deterministic, kAlignment);
  if (call.is_empty()) {
    call.zero_gradients();
    return call.softmax_d;
  }
  cpu::backward(call.params, call.dtype, int(torch::stable::get_num_threads()));
  call.finish();
  return call.softmax_d;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward_cpu<false>));
  m.impl("forward_with_max_logits", TORCH_BOX(&forward_cpu<true>));
  m.impl("forward_into", TORCH_BOX(&forward_into_cpu));
  m.impl("backward", TORCH_BOX(&backward_cpu));
}

}  // namespace flash::binding
