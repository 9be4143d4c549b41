"""Differentiable attention over the ops: one Function for every layout and option."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from flash_attn import ops
from flash_attn.extras import Extras, check_deterministic_bias, with_precision

_AUTOCAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HEAD_DIM_STEP = 8  # CUDA kernels read rows of whole 16-byte pieces

# DTensor and its attention, once flash_attn.sharding is imported: that imports
# torch.distributed.tensor, which takes a second.
sharded: tuple[type, Callable[..., tuple[Tensor, Tensor]]] | None = None


class Options(NamedTuple):
    """What an Attention is called with besides scale and mask; its tensors follow q, k and v."""

    softcap: float
    dropout_p: float
    allow_tf32: bool
    asks_max_logits: bool
    max_seqlen_q: int
    names: tuple[str, ...]  # of the tensors


def unpack(tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of (q, k, v), (q, kv) or (qkv,)."""
    if len(tensors) == 3:
        q, k, v = tensors
    elif len(tensors) == 2:
        q = tensors[0]
        k, v = tensors[1].unbind(-3)
    else:
        q, k, v = tensors[0].unbind(-3)
    return q, k, v


def _split(
    tensors: tuple[Tensor, ...], options: Options
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """The inputs of an Attention, and its options as keyword arguments of both ops."""
    count = len(tensors) - len(options.names)
    extras = dict(zip(options.names, tensors[count:], strict=True))
    numbers = {
        "softcap": options.softcap,
        "dropout_p": options.dropout_p,
        "allow_tf32": options.allow_tf32,
    }
    return tensors[:count], {**numbers, **extras}


class Attention(torch.autograd.Function):
    """out and softmax_lse of (q, k, v), (q, kv) or (qkv,), all of them differentiable, and of the
    tensors among the options, of which the sink and the bias are; max_logits if they are asked.

    Gradients have the packing of the inputs and are written there directly.
    """

    @staticmethod
    def forward(
        ctx: Any,
        softmax_scale: float,
        window_left: int,
        window_right: int,
        deterministic: bool,
        options: Options | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        max_logits: list[Tensor] = []
        if options is None:
            qkv = unpack(tensors)
            out, softmax_lse = ops.forward(*qkv, softmax_scale, window_left, window_right)
        else:
            inputs, extras = _split(tensors, options)
            qkv = unpack(inputs)
            forward = ops.forward_with_max_logits if options.asks_max_logits else ops.forward
            out, softmax_lse, *max_logits = forward(
                *qkv,
                softmax_scale,
                window_left,
                window_right,
                max_seqlen_q=options.max_seqlen_q,
                **extras,
            )
            ctx.mark_non_differentiable(*max_logits)
        ctx.save_for_backward(*tensors, out, softmax_lse)
        ctx.set_materialize_grads(False)
        ctx.call = ((softmax_scale, window_left, window_right, deterministic), options)
        return out, softmax_lse, *max_logits

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        # The guard against double backward costs time, and only a graph of gradients needs it.
        run = _backward_once if torch.is_grad_enabled() else _backward
        return run(ctx, dout, dlse)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *saved, out, softmax_lse = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return (None,) * (5 + len(saved))
        dout = torch.zeros_like(out)
    tensors = tuple(saved)
    arguments, options = ctx.call
    if options is not None:
        extra_grads = _backward_with_options(ctx, tensors, out, softmax_lse, dout, dlse)
        return (None, None, None, None, None, *extra_grads)
    grads = tuple([torch.empty_like(tensor) for tensor in tensors])
    ops.backward(dout, *unpack(tensors), out, softmax_lse, dlse, *unpack(grads), *arguments)
    return (None, None, None, None, None, *grads)


def _backward_with_options(
    ctx: Any,
    tensors: tuple[Tensor, ...],
    out: Tensor,
    softmax_lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs and of the option tensors."""
    arguments, options = ctx.call
    inputs, extras = _split(tensors, options)
    sink = extras.pop("sink", None)
    grads = tuple([torch.empty_like(tensor) for tensor in inputs])
    given = (dout, *unpack(inputs), out, softmax_lse, dlse, *unpack(grads))
    names = options.names
    needed = dict(zip(names, ctx.needs_input_grad[5 + len(inputs) :], strict=True))
    option_grads: dict[str, Tensor | None] = dict.fromkeys(names)
    dbias = None
    if needed.get("bias"):
        bias = extras["bias"]
        dbias = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
    softmax_d = ops.backward(*given, *arguments, **extras, dbias=dbias)
    if dbias is not None:
        option_grads["bias"] = dbias.to(bias.dtype)
    if sink is not None and needed["sink"]:
        cu_seqlens_q = extras.get("cu_seqlens_q")
        option_grads["sink"] = sink_gradient(sink, softmax_lse, softmax_d, cu_seqlens_q)
    return (*grads, *option_grads.values())


_backward_once = once_differentiable(_backward)

# Function.apply without its check for torch.func transforms, which attention() has made already.
_apply: Any = super(torch.autograd.Function, Attention).apply


def _apply_traced(*arguments: Any) -> tuple[Tensor, ...]:
    """Attention.apply for torch.compile, which does not trace one tensor as several arguments."""
    distinct: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor) and any([argument is other for other in distinct]):
            argument = argument.view_as(argument)
        distinct.append(argument)
    results: tuple[Tensor, ...] = Attention.apply(*distinct)  # type: ignore[no-untyped-call]
    return results


def packed_softmax_d(softmax_d: Tensor, cu_seqlens_q: Tensor, total_q: int) -> Tensor:
    """softmax_d of packed queries by rows of q, (heads, total_q); 0 outside of the sequences."""
    padding = ops.ROW_PADDING
    rows = torch.arange(total_q, device=softmax_d.device, dtype=torch.int64)
    borders = cu_seqlens_q.to(torch.int64)
    sequence = torch.searchsorted(borders, rows, right=True) - 1
    in_one = (sequence >= 0) & (sequence < borders.numel() - 1)
    sequence = torch.where(in_one, sequence, 0)
    first = borders[sequence]
    at = (first + padding * sequence) // padding * padding + rows - first
    at = torch.where(in_one, at, 0).clamp(0, max(softmax_d.size(1) - 1, 0))
    return torch.where(in_one, softmax_d[:, at], 0.0)


def sink_gradient(
    sink: Tensor, softmax_lse: Tensor, softmax_d: Tensor, cu_seqlens_q: Tensor | None
) -> Tensor:
    """(heads,): -sum over rows of exp(sink - softmax_lse) * softmax_d.

    That is the softmax's own gradient, for a column whose value is zero. A sink of -inf is none.
    """
    if cu_seqlens_q is None:
        weights = torch.exp(sink[:, None] - softmax_lse)
        sums = (weights * softmax_d[..., : softmax_lse.size(2)]).sum(dim=(0, 2))
    else:
        by_row = packed_softmax_d(softmax_d, cu_seqlens_q, softmax_lse.size(1))
        weights = torch.where(by_row == 0.0, 0.0, torch.exp(sink[:, None] - softmax_lse))
        sums = (weights * by_row).sum(dim=1)
    return torch.where(sink.isinf(), 0.0, -sums)


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


def fold_scale(
    tensors: tuple[Tensor, ...], softmax_scale: float
) -> tuple[tuple[Tensor, ...], float]:
    """The same problem with a positive factor: the kernels scale the running maximum."""
    if softmax_scale > 0.0:
        return tensors, softmax_scale
    q, k, v = unpack(tensors)
    return (-q if softmax_scale < 0.0 else q * 0, k, v), -softmax_scale or 1.0


def padded_on_cuda(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """CUDA tensors with head dims that their backends take; None: they have them."""
    if not ops.cuda_archs:
        ops.raise_no_cuda_backend()
    if tensors[0].size(-1) % _HEAD_DIM_STEP == 0 and tensors[-1].size(-1) % _HEAD_DIM_STEP == 0:
        return None
    return tuple([_pad_columns(tensor) for tensor in tensors])


def _import_sharding(tensor: Tensor) -> None:
    """Imports flash_attn.sharding if a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        importlib.import_module("flash_attn.sharding")


def attention(
    tensors: tuple[Tensor, ...],
    softmax_scale: float,
    window_left: int,
    window_right: int,
    deterministic: bool,
    extras: Extras | None = None,
) -> tuple[Tensor, ...]:
    """out, softmax_lse and, if asked, max_logits of (q, k, v), (q, kv) or (qkv,).

    The compiled op checks them.

    `extras` are keyword arguments of the ops: what extras.py makes, and of packed tensors their
    cu_seqlens.
    """
    apply: Any = _apply_traced
    forward = ops.forward
    if not torch.compiler.is_compiling():
        _reject_transforms(tensors)
        apply, forward = _apply, ops.forward_eager
        if type(tensors[0]) is not Tensor:
            _import_sharding(tensors[0])
    if sharded is not None and isinstance(tensors[0], sharded[0]):
        arguments = (softmax_scale, window_left, window_right, deterministic)
        return sharded[1](tensors, *arguments, extras)
    if softmax_scale <= 0.0:
        tensors, softmax_scale = fold_scale(tensors, softmax_scale)
    head_dim_v = tensors[-1].size(-1)
    padded = None
    if tensors[0].is_cuda:
        extras = with_precision(extras, tensors[0])
        padded = padded_on_cuda(tensors)
    if padded is not None:
        tensors = padded
    numbers = (softmax_scale, window_left, window_right)
    if torch.is_grad_enabled() and (
        any([tensor.requires_grad for tensor in tensors])
        or (extras is not None and _any_requires_grad(extras))
    ):
        if extras is None:
            out, *statistics = apply(*numbers, deterministic, None, *tensors)
        else:
            if deterministic and _requires_grad(extras, "bias"):
                check_deterministic_bias(*unpack(tensors)[:2], extras["bias"])
            out, *statistics = apply(*numbers, deterministic, *_flat(tensors, extras))
    elif extras is None:
        out, *statistics = forward(*unpack(tensors), *numbers)
    elif "max_logits" in extras:
        given = {name: value for name, value in extras.items() if name != "max_logits"}
        out, *statistics = ops.forward_with_max_logits(*unpack(tensors), *numbers, **given)
    else:
        out, *statistics = forward(*unpack(tensors), *numbers, **extras)
    return out[..., :head_dim_v] if padded is not None else out, *statistics


def forward_only(
    tensors: tuple[Tensor, Tensor, Tensor],
    softmax_scale: float,
    window_left: int,
    window_right: int,
    extras: Extras,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and softmax_lse of q, k and v, without gradients, by every option of the forward op.

    With `out` the output goes there, whatever its strides, as long as the last dimension is
    contiguous.
    """
    folded, softmax_scale = fold_scale(tensors, softmax_scale)
    padded, options = None, extras
    if folded[0].is_cuda:
        options = with_precision(extras, folded[0]) or {}
        padded = padded_on_cuda(folded)
    arguments = (softmax_scale, window_left, window_right)
    if out is not None and padded is None:
        return out, ops.forward_into(*folded, out, *arguments, **options)
    computed, softmax_lse = ops.forward(*(padded or folded), *arguments, **options)
    if padded is not None:
        computed = computed[..., : tensors[2].size(-1)]
    return computed if out is None else out.copy_(computed), softmax_lse


def _requires_grad(extras: Extras, name: str) -> bool:
    return isinstance(extras.get(name), Tensor) and bool(extras[name].requires_grad)


def _any_requires_grad(extras: Extras) -> bool:
    return _requires_grad(extras, "sink") or _requires_grad(extras, "bias")


def _flat(tensors: tuple[Tensor, ...], extras: Extras) -> tuple[Any, ...]:
    """Options and tensors of an Attention."""
    numbers = (
        extras.get("softcap", 0.0),
        extras.get("dropout_p", 0.0),
        extras.get("allow_tf32", False),
        "max_logits" in extras,
        extras.get("max_seqlen_q", 0),
    )
    names = tuple([name for name, value in extras.items() if isinstance(value, Tensor)])
    return (Options(*numbers, names), *tensors, *[extras[name] for name in names])
