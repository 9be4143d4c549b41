"""torch's own attention on these kernels: `scaled_dot_product_attention`, `varlen_attn` and what is
built on them, such as context parallelism.

Importing flash_attn tells torch of an implementation of this name, where torch has a registry of
them (from 2.10 on). Nothing changes until

    torch.nn.attention.activate_flash_attention_impl("flash_attn")

`torch.nn.attention.restore_flash_attention_impl()` takes it back. Which backend torch chooses for a
call stays torch's decision: on Hopper that is cuDNN unless `torch.nn.attention.sdpa_kernel` says
SDPBackend.FLASH_ATTENTION. The ops run on CPU tensors too, where torch has no kernel for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from flash_attn import ops, problem
from flash_attn.autograd import forward_only
from flash_attn.dropout import draw_rng_state
from flash_attn.extras import Extras, given, longest
from flash_attn.paged import gather_pages
from flash_attn.private_ops import run_backward

NAME = "flash_attn"
_DEBUG_MASK = "return_debug_mask"

Gradients = tuple[Tensor, ...]


def _forward(
    tensors: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    scale: float | None,
    window: tuple[int, int],
    dropout_p: float,
    extras: Extras,
) -> tuple[Tensor, Tensor]:
    """Writes `out`; softmax_lse, and the random state in the dtype of torch's own kernels."""
    q = tensors[0]
    if dropout_p != 0.0:
        state = draw_rng_state(q.device)
        extras = {**extras, "dropout_p": dropout_p, "rng_state": state}
    else:
        state = torch.empty(2, dtype=torch.int64, device=q.device)
    scale = problem.scale_of(scale, q.size(-1))
    softmax_lse = forward_only(tensors, scale, *window, extras, out)[1]
    return softmax_lse, state.view(torch.uint64)


def _unused(q: Tensor) -> tuple[Tensor, Tensor]:
    """What torch's kernels return besides: a random offset, which is in the random state here, and
    dropped probabilities, which nobody asked for."""
    return torch.empty((), dtype=torch.uint64, device=q.device), q.new_empty(0)


def _scaled_dot_product_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | int | None, ...]:
    """Of (batch, heads, seqlen, head_dim); the output lies in memory as the query does."""
    out = torch.empty_like(query)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    window = problem.bounds_of(is_causal, None, None)
    lse, rng_state = _forward((q, k, v), out.transpose(1, 2), scale, window, dropout_p, {})
    return out, lse, None, None, query.size(2), key.size(2), rng_state, *_unused(query)


def _scaled_dot_product_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> Gradients:
    q, k, v, out, grad_out = (t.transpose(1, 2) for t in (query, key, value, out, grad_out))
    gradients = _flash_backward(
        grad_out,
        q,
        k,
        v,
        out,
        logsumexp,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        philox_seed,
        philox_offset,
        scale=scale,
    )
    return tuple([gradient.transpose(1, 2) for gradient in gradients])


def _flash_forward_into(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax_lse and random state of (batch, seqlen, heads, head_dim), or packed sequences.

    max_k and num_splits: nothing depends on them.
    """
    if block_table is not None:
        key, value = gather_pages(key, block_table), gather_pages(value, block_table)
        if seqused_k is None and cum_seq_k is not None:
            seqused_k = cum_seq_k.diff()
        cum_seq_k = None
    extras = given(
        cu_seqlens_q=cum_seq_q,
        cu_seqlens_k=cum_seq_k,
        seqused_k=seqused_k,
        alibi_slopes=alibi_slopes,
    )
    window = problem.bounds_of(is_causal, window_size_left, window_size_right)
    if cum_seq_q is not None:
        extras |= longest(max_q)
    return _forward((query, key, value), out, scale, window, dropout_p, extras)


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **options: Any,
) -> tuple[Tensor, ...]:
    out = torch.empty_like(query)
    borders = (cum_seq_q, cum_seq_k, max_q, max_k)
    arguments = (query, key, value, *borders, dropout_p, is_causal)
    return out, *_flash_forward_into(out, *arguments, **options), *_unused(query)


def _flash_forward_without_dropout(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **options: Any,
) -> Tensor:
    borders = (cum_seq_q, cum_seq_k, max_q, max_k)
    arguments = (query, key, value, *borders, dropout_p, is_causal)
    return _flash_forward_into(out, *arguments, **options)[0]


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> Gradients:
    gradients = tuple([torch.empty_like(tensor) for tensor in (query, key, value)])
    run_backward(
        (grad_out, query, key, value, out, logsumexp),
        gradients,
        problem.scale_of(scale, query.size(-1)),
        problem.bounds_of(is_causal, window_size_left, window_size_right),
        torch.are_deterministic_algorithms_enabled(),
        dropout_p,
        rng_state.view(torch.int64) if dropout_p != 0.0 else None,
        given(cu_seqlens_q=cum_seq_q, cu_seqlens_k=cum_seq_k),
    )
    return gradients


_KERNELS: dict[str, Callable[..., Any]] = {
    "_scaled_dot_product_flash_attention": _scaled_dot_product_forward,
    "_scaled_dot_product_flash_attention_backward": _scaled_dot_product_backward,
    "_flash_attention_forward": _flash_forward,
    "_flash_attention_forward_no_dropout_inplace": _flash_forward_without_dropout,
    "_flash_attention_backward": _flash_backward,
}


def _kernel(name: str, device: str) -> Callable[..., Any]:
    """The implementation of an aten op; torch's own, if it has one, for calls that ask for dropped
    probabilities, which torch's kernel returns in a layout of its own."""
    ours = _KERNELS[name]
    theirs: Any = None
    get_kernel = getattr(torch.library, "get_kernel", None)  # not in every torch
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", device)
    if get_kernel is not None and has_kernel:
        theirs = get_kernel(f"aten::{name}", device)
    schema = getattr(torch.ops.aten, name).default._schema
    names = [argument.name for argument in schema.arguments]
    at = names.index(_DEBUG_MASK) if _DEBUG_MASK in names else len(names)

    def run(keys: Any, *arguments: Any, **options: Any) -> Any:
        wants_mask = arguments[at] if at < len(arguments) else options.get(_DEBUG_MASK, False)
        if not wants_mask:
            return ours(*arguments, **options)
        if theirs is None:
            raise NotImplementedError(
                f"flash_attn: {name}: {_DEBUG_MASK}: expected False on {device}, got True"
            )
        return theirs.call_boxed(keys, *arguments, **options)

    return run


class Activation:
    """The overridden ops of aten: `remove()` gives them back."""

    def __init__(self) -> None:
        devices = ("CUDA", "CPU") if ops.cuda_archs else ("CPU",)
        self._libraries = [_overriding(device) for device in devices]

    def remove(self) -> None:
        self._libraries.clear()


def _overriding(device: str) -> Any:
    library: Any = torch.library.Library("aten", "IMPL", device)  # type: ignore[no-untyped-call]
    for name in _KERNELS:
        if hasattr(torch.ops.aten, name):
            library.impl(name, _kernel(name, device), device, with_keyset=True)
    return library


def activate() -> Activation:
    """What torch calls to activate the implementation. Raises RuntimeError where there is no
    compiled module, or none with CUDA kernels for a machine with a GPU."""
    if ops.load_error is not None or (torch.cuda.is_available() and not ops.cuda_archs):
        ops.raise_no_cuda_backend()
    return Activation()


def register() -> None:
    """Tells torch of this implementation, without activating it."""
    register_impl = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register_impl is not None:
        register_impl(NAME, register_fn=activate)
