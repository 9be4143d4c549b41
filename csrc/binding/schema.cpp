// Op schemas. Implementations are registered by cpu_backend.cpp and cuda_backend.cpp.
#include <torch/csrc/stable/library.h>

#include <string>

#include "binding/build_info.h"
#include "binding/explain.h"

STABLE_TORCH_LIBRARY(flash_attn, m) {
  std::string const inputs = "Tensor q, Tensor k, Tensor v, ";
  std::string const options =
      "float softmax_scale, int window_left, int window_right, *, float softcap=0.0, "
      "Tensor? alibi_slopes=None, Tensor? bias=None, float dropout_p=0.0, Tensor? rng_state=None, "
      "Tensor? sink=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
      "Tensor? seqused_k=None, Tensor? leftpad_k=None, Tensor? batch_idx_k=None, "
      "bool allow_tf32=False, int max_seqlen_q=0";
  auto const define = [&](std::string const& schema) { m.def(schema.c_str()); };
  define("forward(" + inputs + options + ") -> (Tensor out, Tensor softmax_lse)");
  define("forward_with_max_logits(" + inputs + options +
         ") -> (Tensor out, Tensor softmax_lse, Tensor max_logits)");
  define("forward_into(" + inputs + "Tensor(a!) out, " + options + ") -> Tensor softmax_lse");
  m.def(
      "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
      "Tensor? dlse, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, float softmax_scale, "
      "int window_left, int window_right, bool deterministic, *, float softcap=0.0, "
      "Tensor? alibi_slopes=None, Tensor? bias=None, float dropout_p=0.0, "
      "Tensor? rng_state=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
      "Tensor(d!)? dbias=None, bool allow_tf32=False) -> Tensor softmax_d");
  m.def("build_info() -> str");
  m.def("limit_kernel_family(int arch) -> int");
  m.def("limit_backward_section(int heads) -> int");
  m.def(
      "select_kernel(bool backward, int family, int compute_capability, int smem_bytes, str dtype, "
      "int batch_size, int seqlen_q, int seqlen_k, int head_dim, int head_dim_v, int window_left, "
      "int window_right, bool softcap, bool alibi, bool dropout, bool packed) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&flash::binding::build_info));
  m.impl("select_kernel", TORCH_BOX(&flash::binding::select_kernel));
}
