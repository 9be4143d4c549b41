// Op schemas. Implementations are registered by cpu_backend.cpp and cuda_backend.cpp.
#include <torch/csrc/stable/library.h>

#include "binding/build_info.h"

STABLE_TORCH_LIBRARY(flash_attn, m) {
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, float softmax_scale, int window_left, "
      "int window_right, *, float softcap=0.0, Tensor? alibi_slopes=None, float dropout_p=0.0, "
      "Tensor? rng_state=None, Tensor? sink=None, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, Tensor? seqused_k=None, Tensor? leftpad_k=None, "
      "Tensor? batch_idx_k=None) -> (Tensor out, Tensor softmax_lse)");
  m.def(
      "forward_into(Tensor q, Tensor k, Tensor v, Tensor(a!) out, float softmax_scale, "
      "int window_left, int window_right, *, float softcap=0.0, Tensor? alibi_slopes=None, "
      "float dropout_p=0.0, Tensor? rng_state=None, Tensor? sink=None, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, Tensor? seqused_k=None, Tensor? leftpad_k=None, "
      "Tensor? batch_idx_k=None) -> Tensor softmax_lse");
  m.def(
      "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
      "Tensor? dlse, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, float softmax_scale, "
      "int window_left, int window_right, bool deterministic, *, float softcap=0.0, "
      "Tensor? alibi_slopes=None, float dropout_p=0.0, Tensor? rng_state=None, "
      "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None) -> Tensor softmax_d");
  m.def("build_info() -> str");
  m.def("limit_kernel_family(int arch) -> int");
  m.def("limit_backward_section(int heads) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&flash::binding::build_info));
}
