"""Forward and backward without autograd, by the names and arguments that other packages call.

Each is a function and also an op of the same name in `torch.ops.flash_attn`, on every device.
window_size_left and window_size_right are -1 for unbounded, causal=True sets window_size_right = 0.
Tensors, masks and options are those of `flash_attn_func`; head dims on CUDA are multiples of 8, and
nothing is cast or padded. A backward writes the gradients that it is given, whatever their strides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_attn import ops
from flash_attn.autograd import fold_scale, forward_only
from flash_attn.dropout import draw_rng_state
from flash_attn.extras import Extras, longest, with_precision
from flash_attn.paged import gather_pages
from flash_attn.probabilities import signed_probabilities

Forward = tuple[Tensor, Tensor, Tensor, Tensor]


def _extras(softcap: float, alibi_slopes: Tensor | None) -> Extras:
    extras: Extras = {}
    if softcap != 0.0:
        extras["softcap"] = softcap
    if alibi_slopes is not None:
        extras["alibi_slopes"] = alibi_slopes
    return extras


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window: tuple[int, int],
    dropout_p: float,
    return_softmax: bool,
    extras: Extras,
    max_seqlens: tuple[int, int] | None = None,
) -> Forward:
    """out, softmax_lse, S_dmask and rng_state; the last two hold nothing without dropout."""
    rng_state = torch.zeros(2, dtype=torch.int64, device=q.device)
    if dropout_p != 0.0:
        rng_state = draw_rng_state(q.device)
        extras = {**extras, "dropout_p": dropout_p, "rng_state": rng_state}
    out, softmax_lse = forward_only((q, k, v), softmax_scale, *window, extras)
    probabilities = q.new_empty(0)
    if return_softmax and dropout_p != 0.0:
        probabilities = signed_probabilities(q, k, softmax_scale, window, extras, max_seqlens)
    return out, softmax_lse, probabilities, rng_state


def run_backward(
    tensors: tuple[Tensor, ...],
    gradients: tuple[Tensor | None, ...],
    softmax_scale: float,
    window: tuple[int, int],
    deterministic: bool,
    dropout_p: float,
    rng_state: Tensor | None,
    extras: Extras,
) -> Tensor:
    """softmax_d; tensors are dout, q, k, v, out and softmax_lse, gradients are written."""
    dout, *qkv, out, softmax_lse = tensors
    if dropout_p != 0.0:
        if rng_state is None:
            raise ValueError("rng_state: expected that of the forward beside dropout_p, got None")
        extras = {**extras, "dropout_p": dropout_p, "rng_state": rng_state}
    written = [
        torch.empty_like(tensor) if gradient is None else gradient
        for gradient, tensor in zip(gradients, qkv, strict=True)
    ]
    if qkv[0].is_cuda:
        extras = with_precision(extras, qkv[0]) or {}
    folded, scale = fold_scale(tuple(qkv), softmax_scale)
    given = (dout, *folded, out, softmax_lse, None, *written)
    softmax_d: Tensor = ops.backward(*given, scale, *window, deterministic, **extras)
    if softmax_scale <= 0.0:
        written[0].mul_(-1.0 if softmax_scale < 0.0 else 0.0)
    return softmax_d


def _window(causal: bool, left: int, right: int) -> tuple[int, int]:
    return left, 0 if causal else right


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, softmax_lse, S_dmask and rng_state (2,) int64 of (batch, seqlen, heads, head_dim).

    S_dmask is empty without return_softmax or dropout; see `flash_attn_func`.
    """
    window = _window(causal, window_size_left, window_size_right)
    extras = _extras(softcap, alibi_slopes)
    return _forward(q, k, v, softmax_scale, window, dropout_p, return_softmax, extras)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk and dv; softmax_d, (batch, heads, seqlen_q rounded up to 128), fp32.

    softmax_d is rowsum(dout * out). out and softmax_lse may be those of more keys than k has: the
    gradients are then the part that these keys have in them.
    """
    return run_backward(
        (dout, q, k, v, out, softmax_lse),
        (dq, dk, dv),
        softmax_scale,
        _window(causal, window_size_left, window_size_right),
        deterministic,
        dropout_p,
        rng_state,
        _extras(softcap, alibi_slopes),
    )


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As _flash_attn_forward for packed sequences; see `flash_attn_varlen_func`.

    Args:
        block_table: (batch, max_blocks) int32, k and v are pages.
        leftpad_k: (batch,) int32, rows to leave out at the start of a sequence's keys.
        seqused_k: (batch,) int32, how many rows of a sequence's keys there are, if not all.
        zero_tensors, num_splits: nothing depends on them: rows outside of the sequences are always
            zero, and how the work is split is not the caller's to say.
    """
    extras = {"cu_seqlens_q": cu_seqlens_q, **longest(max_seqlen_q)}
    extras |= _extras(softcap, alibi_slopes)
    if block_table is None:
        extras["cu_seqlens_k"] = cu_seqlens_k
    else:
        if num_splits > 1:
            raise RuntimeError("num_splits > 1 is not supported for varlen paged KV")
        k, v = gather_pages(k, block_table), gather_pages(v, block_table)
        seqused_k = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    if seqused_k is not None:
        extras["seqused_k"] = seqused_k
    if leftpad_k is not None:
        extras["leftpad_k"] = leftpad_k
    window = _window(causal, window_size_left, window_size_right)
    max_seqlens = (max_seqlen_q, max_seqlen_k)
    return _forward(q, k, v, softmax_scale, window, dropout_p, return_softmax, extras, max_seqlens)


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """As _flash_attn_backward for packed sequences; softmax_d is (heads, total_q + 128 * batch).

    Row i of sequence b is there at (cu_seqlens_q[b] + 128 * b) // 128 * 128 + i.
    """
    softmax_d = run_backward(
        (dout, q, k, v, out, softmax_lse),
        (dq, dk, dv),
        softmax_scale,
        _window(causal, window_size_left, window_size_right),
        deterministic,
        dropout_p,
        rng_state,
        {
            "cu_seqlens_q": cu_seqlens_q,
            "cu_seqlens_k": cu_seqlens_k,
            **_extras(softcap, alibi_slopes),
        },
    )
    rows = q.size(0) + ops.ROW_PADDING * (cu_seqlens_q.numel() - 1)
    return softmax_d[:, :rows].contiguous()


def _define(implementation: Callable[..., Any], writes: tuple[str, ...] = ()) -> None:
    """Registers a function as an op of its name. It is its own fake: the ops inside have fakes."""
    name = implementation.__name__
    schema = torch.library.infer_schema(implementation, op_name=name, mutates_args=writes)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attn::{name}", implementation, lib=_library)


_library: Any = torch.library.Library("flash_attn", "FRAGMENT")  # type: ignore[no-untyped-call]
_define(_flash_attn_forward)
_define(_flash_attn_backward, writes=("dq", "dk", "dv"))
_define(_flash_attn_varlen_forward)
_define(_flash_attn_varlen_backward, writes=("dq", "dk", "dv"))


def _varlen_forward_flops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *args: Any,
    **options: Any,
) -> int:
    return ops.forward_flops(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)


def _varlen_backward_flops(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any
) -> int:
    borders = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), args[5:7], strict=False))
    return ops.backward_flops(dout, q, k, v, **{**borders, **options})


for _name, _formula in (
    ("_flash_attn_forward", ops.forward_flops),
    ("_flash_attn_backward", ops.backward_flops),
    ("_flash_attn_varlen_forward", _varlen_forward_flops),
    ("_flash_attn_varlen_backward", _varlen_backward_flops),
):
    register_flop_formula(getattr(torch.ops.flash_attn, _name), get_raw=True)(_formula)

_wrapped_flash_attn_forward = torch.ops.flash_attn._flash_attn_forward
_wrapped_flash_attn_backward = torch.ops.flash_attn._flash_attn_backward
_wrapped_flash_attn_varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward
