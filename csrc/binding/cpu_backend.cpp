// Ops on CPU tensors.
#include <torch/csrc/stable/ops.h>

#include "binding/ops.h"
#include "cpu/attention.h"

namespace flash::binding {
namespace {

constexpr int kAlignment = 1;  // any tensor of whole elements will do

int num_threads() {
  return int(torch::stable::get_num_threads());
}

ForwardCall run_forward(Tensor const& q, Tensor const& k, Tensor const& v,
                        OptionalTensor const& out, Options const& options, bool asks_max_logits) {
  ForwardCall call(q, k, v, out, options, asks_max_logits, kAlignment);
  if (!call.is_empty()) {
    cpu::forward(call.params, call.dtype, num_threads());
    call.finish();
  }
  return call;
}

Tensor run_backward(BackwardTensors const& tensors, Options const& options, bool deterministic) {
  BackwardCall call(tensors, options, deterministic, kAlignment);
  if (call.is_empty()) {
    call.zero_gradients();
    return call.softmax_d;
  }
  cpu::backward(call.params, call.dtype, num_threads());
  call.finish();
  return call.softmax_d;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CPU, m) {
  register_ops<run_forward, run_backward>(m);
}

}  // namespace flash::binding
