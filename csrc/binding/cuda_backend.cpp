// Ops on CUDA tensors. Compiled only into builds with CUDA architectures.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <climits>
#include <stdexcept>
#include <string>

#include "binding/cuda_device.h"
#include "binding/ops.h"
#include "sm80/launch.h"
#include "sm90/launch.h"

namespace flash::binding {
namespace {

constexpr int kAlignment = 16;  // bytes of one cp.async

/// Scratch memory on the device of `like`; none where no bytes are asked for.
struct Workspace {
  Workspace(Tensor const& like, std::size_t bytes) {
    if (bytes > 0) {
      memory = new_tensor(like, {int64_t(bytes)}, aoti_torch_dtype_uint8());
      ptr = memory->data_ptr();
    }
  }
  std::optional<Tensor> memory;
  void* ptr = nullptr;
};

ForwardCall run_forward(Tensor const& q, Tensor const& k, Tensor const& v,
                        OptionalTensor const& out, Options const& options, bool asks_max_logits) {
  int const device_index = q.get_device_index();
  torch::stable::accelerator::DeviceGuard const guard(device_index);
  ForwardCall call(q, k, v, out, options, asks_max_logits, kAlignment);
  CudaDevice const& device = cuda_device(device_index);
  ForwardConfig const& config = device.forward_config(call.dtype, call.params);
  if (call.is_empty()) {
    return call;
  }
  Stream const stream = current_stream(device_index);
  auto const run = [&](std::size_t workspace_bytes, auto const& launch) {
    Workspace const workspace(q, workspace_bytes);
    call.params.workspace = workspace.ptr;
    launch();
  };
  if (auto const* const row = device.sm90_forward_config(call.dtype, call.params)) {
    run(sm90::forward_workspace_bytes(*row, call.params),
        [&] { sm90::forward(*row, call.params, device.properties(), stream); });
  } else {
    run(sm80::forward_workspace_bytes(config, call.params),
        [&] { sm80::forward(config, call.params, device.properties(), stream); });
  }
  call.finish();
  return call;
}

Tensor run_backward(BackwardTensors const& tensors, Options const& options, bool deterministic) {
  int const device_index = tensors.q.get_device_index();
  torch::stable::accelerator::DeviceGuard const guard(device_index);
  BackwardCall call(tensors, options, deterministic, kAlignment);
  CudaDevice const& device = cuda_device(device_index);
  BackwardConfig const& config = device.backward_config(call.dtype, call.params);
  if (call.is_empty()) {
    call.zero_gradients();
    return call.softmax_d;
  }
  auto const run = [&](std::size_t workspace_bytes, auto const& launch) {
    Workspace const workspace(tensors.q, workspace_bytes);
    call.params.workspace = workspace.ptr;
    launch(current_stream(device_index));
  };
  if (auto const* const row = device.sm90_backward_config(call.dtype, call.params)) {
    int const section = sm90::backward_section(*row, call.params, device.properties());
    run(sm90::backward_workspace_bytes(*row, call.params, section), [&](Stream stream) {
      sm90::backward(*row, call.params, section, device.properties(), stream);
    });
  } else {
    run(sm80::backward_workspace_bytes(config, call.params),
        [&](Stream stream) { sm80::backward(config, call.params, device.properties(), stream); });
  }
  call.finish();
  return call.softmax_d;
}

/// For tests: sm90::limit_section().
int64_t limit_backward_section(int64_t heads) {
  if (heads < 1 || heads > INT_MAX) {
    throw std::invalid_argument("flash_attn: heads: expected a positive int, got " +
                                std::to_string(heads));
  }
  return sm90::limit_section(int(heads));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CompositeExplicitAutograd, m) {
  m.impl("limit_kernel_family", TORCH_BOX(&limit_kernel_family));
  m.impl("limit_backward_section", TORCH_BOX(&limit_backward_section));
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn, CUDA, m) {
  register_ops<run_forward, run_backward>(m);
}

}  // namespace flash::binding
