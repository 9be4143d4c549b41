"""Differentiable attention over the ops: one Function for separate and packed tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from flash_attn import ops

_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HEAD_DIM_STEP = 8  # CUDA kernels read rows of whole 16-byte pieces


def unpack(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of (q, k, v), (q, kv) or (qkv,)."""
    if len(tensors) == 3:
        q, k, v = tensors
    elif len(tensors) == 2:
        q = tensors[0]
        k, v = tensors[1].unbind(2)
    else:
        q, k, v = tensors[0].unbind(2)
    return q, k, v


class Attention(torch.autograd.Function):
    """out and softmax_lse of (q, k, v), (q, kv) or (qkv,), all of them differentiable.

    Gradients have the packing of the inputs and are written there directly.
    """

    @staticmethod
    def forward(
        ctx: Any,
        softmax_scale: float,
        window_left: int,
        window_right: int,
        deterministic: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, softmax_lse = ops.forward(*unpack(tensors), softmax_scale, window_left, window_right)
        ctx.save_for_backward(*tensors, out, softmax_lse)
        ctx.set_materialize_grads(False)
        ctx.options = (softmax_scale, window_left, window_right, deterministic)
        return out, softmax_lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        # The guard against double backward costs time, and only a graph of gradients needs it.
        run = _backward_once if torch.is_grad_enabled() else _backward
        return run(ctx, dout, dlse)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, out, softmax_lse = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return (None,) * (4 + len(inputs))
        dout = torch.zeros_like(out)
    tensors = tuple(inputs)
    grads = tuple([torch.empty_like(tensor) for tensor in tensors])
    ops.backward(dout, *unpack(tensors), out, softmax_lse, dlse, *unpack(grads), *ctx.options)
    return (None, None, None, None, *grads)


_backward_once = once_differentiable(_backward)

# Function.apply without its check for torch.func transforms, which attention() has made already.
_apply: Any = super(torch.autograd.Function, Attention).apply


def autocast_inputs(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, as torch treats the inputs of a matrix product."""
    device_type = "cuda" if getattr(tensors[0], "is_cuda", False) else "cpu"
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple([_autocast(tensor, dtype) for tensor in tensors])


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # What can't be cast is left to the checks of the arguments.
    castable = isinstance(tensor, Tensor) and tensor.dtype in _AUTOCAST_DTYPES
    return tensor.to(dtype) if castable else tensor


def _reject_transforms(tensors: tuple[Tensor, ...]) -> None:
    """Transforms that would otherwise be ignored, or fail in the words of torch's internals."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "flash_attn: torch.func transforms (vmap, grad, jvp, ...) are not supported; expected "
            "a call outside of them. Use torch.autograd for gradients and the batch dimension "
            "instead of vmap."
        )
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
        for tensor in tensors
    ):
        raise NotImplementedError(
            "flash_attn: forward-mode automatic differentiation is not supported; expected "
            "tensors without tangents"
        )


def _pad_columns(tensor: Tensor) -> Tensor:
    padding = -tensor.size(-1) % _HEAD_DIM_STEP
    return pad(tensor, (0, padding)) if padding else tensor


def attention(
    tensors: tuple[Tensor, ...],
    softmax_scale: float,
    window_left: int,
    window_right: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """out and softmax_lse of (q, k, v), (q, kv) or (qkv,), which the compiled op checks."""
    apply: Any = Attention.apply
    forward = ops.forward
    if not torch.compiler.is_compiling():
        _reject_transforms(tensors)
        apply, forward = _apply, ops.forward_eager
    if softmax_scale <= 0.0:
        # The kernels scale the running maximum: that takes a positive factor. Fold the sign into q.
        q, k, v = unpack(tensors)
        tensors = (-q, k, v) if softmax_scale < 0.0 else (q * 0, k, v)
        softmax_scale = -softmax_scale or 1.0
    head_dim, head_dim_v = tensors[0].size(-1), tensors[-1].size(-1)
    is_padded = False
    if tensors[0].is_cuda:
        if not ops.cuda_archs:
            ops.raise_no_cuda_backend()
        is_padded = head_dim % _HEAD_DIM_STEP != 0 or head_dim_v % _HEAD_DIM_STEP != 0
    if is_padded:
        tensors = tuple([_pad_columns(tensor) for tensor in tensors])
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors]):
        out, softmax_lse = apply(softmax_scale, window_left, window_right, deterministic, *tensors)
    else:
        out, softmax_lse = forward(*unpack(tensors), softmax_scale, window_left, window_right)
    return out[..., :head_dim_v] if is_padded else out, softmax_lse
