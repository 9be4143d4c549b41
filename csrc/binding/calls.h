// Tensors -> params: one checked call with its outputs, the same for every backend.
#pragma once

#include <initializer_list>
#include <tuple>
#include <type_traits>

#include "binding/check.h"

namespace flash::binding {

/// What an op is given besides its tensors of rows. Null: not given.
struct Options {
  using Given = std::optional<Tensor> const&;

  double softmax_scale;
  int64_t window_left;
  int64_t window_right;
  double softcap;
  Given alibi_slopes;
  Given bias;
  double dropout_p;
  Given rng_state;
  Given sink;  // of the forward
  SequenceTensors sequences;
  bool allow_tf32;       // fp32 on CUDA
  int64_t max_seqlen_q;  // of the forward of packed queries; 0: not known
};

/// A new contiguous tensor on the device of `like`; `dtype` is one of aoti_torch_dtype_*().
Tensor new_tensor(Tensor const& like, std::initializer_list<int64_t> sizes, int32_t dtype);

/// One forward call: checked inputs, allocated outputs. `alignment` is what the backend's kernels
/// need, in bytes: pointers and strides are multiples of it. An input that is not so aligned is
/// copied, an output's values are copied to it; those and a dout without contiguous rows are the
/// only copies ever made.
struct ForwardCall {
  /// `out_given`: where the caller wants the output; else it is in a new tensor.
  ForwardCall(Tensor const& q_in, Tensor const& k_in, Tensor const& v_in,
              std::optional<Tensor> const& out_given, Options const& options, bool asks_max_logits,
              int alignment);

  /// True if the outputs have no elements.
  bool is_empty() const { return problem.sequences.entries_q == 0 || problem.shape.seqlen_q == 0; }

  /// Brings an output that was computed in an aligned copy to where the caller wants it.
  void finish();

  DType dtype;
  Problem problem;
  Tensor q, k, v;
  std::optional<Tensor> out_given;
  Tensor out, softmax_lse;
  std::optional<Tensor> max_logits;  // if asked, -inf until the kernels raise it
  ForwardParams params;
};

/// The tensors of a backward call.
struct BackwardTensors {
  Tensor dout, q, k, v, out, softmax_lse;
  std::optional<Tensor> dlse;
  Tensor dq, dk, dv;
  std::optional<Tensor> dbias;  // zeroed by the call
};

/// One backward call: checked tensors, allocated softmax_d. The workspace is left to the backend.
struct BackwardCall {
  BackwardCall(BackwardTensors tensors, Options const& options, bool deterministic, int alignment);

  /// True if there are no queries, keys or sequences; zero_gradients() is then all there is to do.
  bool is_empty() const;
  void zero_gradients();

  /// Brings gradients that were computed in an aligned copy to where the caller wants them.
  void finish();

  DType dtype;
  Problem problem;
  BackwardTensors given;    // what the caller passed
  BackwardTensors aligned;  // what the kernels read and write
  Tensor softmax_d;
  BackwardParams params;
};

}  // namespace flash::binding
