"""FlashAttention-3's functions, by its signatures, on flash_attn's kernels.

They are differentiable, run on every device that flash_attn has, and under torch.compile. Tensors,
masks and errors are those of `flash_attn.flash_attn_func`; what differs:

    - softmax_lse of a row that sees no key is -inf;
    - qv, the descale tensors, attention_chunk, seqused_q, cu_seqlens_k_new and rotary_seqlens raise
      NotImplementedError, where they are given;
    - num_splits, pack_gqa, sm_margin and scheduler_metadata are taken, and no result depends on
      them: how the work is split is not the caller's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from flash_attn import flash_attn_func as dense_attention
from flash_attn import flash_attn_varlen_func as packed_attention
from flash_attn.kvcache import flash_attn_with_kvcache as cached_attention
from flash_attn.problem import UNBOUNDED, window_of
from flash_attn_3 import ops
from flash_attn_3.ops import minus_inf_where_empty, refuse
from flash_attn_3.private_ops import _flash_attn_backward, _flash_attn_forward

# With the names that other packages import from this module.
__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

Window = Sequence[SupportsIndex]
Result = Tensor | tuple[Tensor, Tensor]


def _result(pair: Tensor | tuple[Tensor, ...], with_lse: bool) -> Result:
    out, softmax_lse = pair
    return (out, minus_inf_where_empty(softmax_lse)) if with_lse else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = UNBOUNDED,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """out, or with return_attn_probs (out, softmax_lse), of (batch, seqlen, heads, head_dim)."""
    refuse(attention_chunk, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    pair = dense_attention(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_softmax_lse=True,
    )
    return _result(pair, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = UNBOUNDED,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of (batch, seqlen, 3, heads, head_dim); or, with num_heads_q, of
    (batch, seqlen, num_heads_q + 2 * heads_k, head_dim), heads of q, then k, then v."""
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv: expected a torch.Tensor, got {type(qkv).__name__}")
    if num_heads_q is None:
        if qkv.dim() != 5 or qkv.size(2) != 3:
            raise ValueError(
                "qkv: expected shape (batch, seqlen, 3, heads, head_dim), or num_heads_q, got "
                f"{tuple(qkv.shape)}"
            )
        q, k, v = qkv.unbind(2)
    else:
        others = qkv.size(2) - num_heads_q if qkv.dim() == 4 else 0
        if others < 2 or others % 2 != 0:
            raise ValueError(
                "qkv: expected shape (batch, seqlen, num_heads_q + 2 * heads_k, head_dim) with "
                f"num_heads_q = {num_heads_q}, got {tuple(qkv.shape)}"
            )
        q, k, v = torch.split(qkv, [num_heads_q, others // 2, others // 2], dim=2)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        None,
        q_descale,
        k_descale,
        v_descale,
        window_size,
        attention_chunk,
        softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: SupportsIndex,
    max_seqlen_k: SupportsIndex,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Window = UNBOUNDED,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of packed sequences (total, heads, head_dim), softmax_lse (heads, total).

    Args:
        seqused_k: (batch,) int32, how many keys a sequence has of the rows that cu_seqlens_k gives
            it. For inference: no gradients flow.
    """
    refuse(
        attention_chunk,
        seqused_q=seqused_q,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    if seqused_k is None:
        pair = packed_attention(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            deterministic=deterministic,
            return_softmax_lse=True,
        )
        return _result(pair, return_attn_probs)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        raise NotImplementedError(
            "flash_attn_3: seqused_k: expected None where gradients are wanted, got a tensor; "
            "torch.no_grad() calls without them"
        )
    left, right = window_of(causal, window_size)
    out, softmax_lse, *_ = torch.ops.flash_attn_3.fwd(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        softmax_scale=softmax_scale,
        window_size_left=left,
        window_size_right=right,
        softcap=softcap,
    )
    return (out, softmax_lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: SupportsIndex | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = UNBOUNDED,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
    """`flash_attn.flash_attn_with_kvcache`, where page_table is block_table.

    Args:
        cu_seqlens_q: (batch + 1,) int32, borders of packed queries (total_q, heads, head_dim); not
            with new keys, and cache_seqlens is then a tensor or None.

    Returns:
        The output; with return_softmax_lse=True (output, softmax_lse, empty, empty).
    """
    refuse(
        attention_chunk,
        qv=qv,
        cu_seqlens_k_new=cu_seqlens_k_new,
        rotary_seqlens=rotary_seqlens,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    if cu_seqlens_q is None:
        out, softmax_lse = cached_attention(
            q,
            k_cache,
            v_cache,
            k,
            v,
            rotary_cos,
            rotary_sin,
            cache_seqlens,
            cache_batch_idx,
            cache_leftpad,
            page_table,
            softmax_scale,
            causal,
            window_size,
            softcap,
            rotary_interleaved,
            return_softmax_lse=True,
        )
        softmax_lse = minus_inf_where_empty(softmax_lse)
    else:
        if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
            raise TypeError(
                "cache_seqlens: expected a tensor or None beside cu_seqlens_q, got "
                f"{type(cache_seqlens).__name__}"
            )
        left, right = window_of(causal, window_size)
        out, softmax_lse, *_ = torch.ops.flash_attn_3.fwd(
            q,
            k_cache,
            v_cache,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            seqused_k=cache_seqlens,
            page_table=page_table,
            kv_batch_idx=cache_batch_idx,
            leftpad_k=cache_leftpad,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            softmax_scale=softmax_scale,
            window_size_left=left,
            window_size_right=right,
            softcap=softcap,
        )
    if not return_softmax_lse:
        return out
    return out, softmax_lse, softmax_lse.new_empty(0), softmax_lse.new_empty(0)


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse) of all keys from those of parts of them.

    Args:
        out_partial: (parts, batch, seqlen, heads, head_dim).
        lse_partial: (parts, batch, seqlen, heads), float32, -inf where a part has no key.
        out: where to write the output; a new tensor by default.
        out_dtype: dtype of a new output; that of out_partial by default.
    """
    return ops.fwd_combine(out_partial, lse_partial, out, out_dtype)


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Window = UNBOUNDED,
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """An int32 tensor for scheduler_metadata, on the device of cache_seqlens. It says nothing: the
    kernels here plan their work themselves."""
    return torch.zeros(1, dtype=torch.int32, device=cache_seqlens.device)
