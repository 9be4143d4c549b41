"""The public functions for packed sequences; `flash_attn_func` documents what they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

from torch import Tensor

from flash_attn import paged, problem
from flash_attn.attend import Result, attend
from flash_attn.autograd import autocast_inputs
from flash_attn.extras import Extras, check_cu_seqlens, check_max_seqlen, longest, make_extras


def _with_sequences(
    extras: Extras | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: SupportsIndex
) -> Extras:
    borders = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    return {**borders, **longest(max_seqlen_q), **(extras or {})}


def _pages_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_k: Tensor, block_table: Tensor
) -> tuple[Tensor, Tensor]:
    paged.check_pages("k", k)
    paged.check_pages("v", v)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q, None)
    paged.check_block_table(block_table, q, cu_seqlens_k.numel() - 1)
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v: expected the shape of k {tuple(k.shape)}, head_dim apart, got {tuple(v.shape)}"
        )
    packed_k, packed_v = (paged.pack_pages(pages, block_table, cu_seqlens_k) for pages in (k, v))
    return packed_k, packed_v


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: SupportsIndex,
    max_seqlen_k: SupportsIndex,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[SupportsIndex] = problem.UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    return_softmax_lse: bool = False,
    return_max_logits: bool = False,
) -> Result:
    """`flash_attn_func` of sequences of different lengths, packed one after the other.

    Sequence b has the rows cu_seqlens_q[b] to cu_seqlens_q[b + 1] of q and those of cu_seqlens_k of
    k and v; the mask of each is aligned to its own bottom-right corner. Lengths may be 0. Rows
    outside of all sequences have output 0 and gradient 0.

    Args:
        q: (total_q, heads, head_dim).
        k: (total_k, heads_k, head_dim), or pages (num_blocks, page_size, heads_k, head_dim) with
            block_table.
        v: like k, with a head_dim_v of its own.
        cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32 on the device of q, ascending from 0 to at
            most total_q and total_k: where sequences begin and end.
        max_seqlen_q, max_seqlen_k: lengths of the longest sequences: ints or integer tensors of one
            element. Tiles are chosen by max_seqlen_q if it is an int; only S_dmask needs the
            values of tensors.
        block_table: (batch, max_blocks) int32: page n of sequence b is k[block_table[b, n]].
            cu_seqlens_k still says how many keys a sequence has. The pages are gathered into a
            packed copy of batch * max_blocks * page_size rows.
        The rest as for `flash_attn_func`.

    Returns:
        The output, (total_q, heads, head_dim_v); softmax_lse is (heads, total_q); S_dmask has
        max_seqlen_q and max_seqlen_k for lengths.
    """
    options = (dropout_p, softcap, alibi_slopes, sink, s_aux, q, None, return_max_logits)
    extras = make_extras(*options)
    check_max_seqlen("max_seqlen_q", max_seqlen_q)
    check_max_seqlen("max_seqlen_k", max_seqlen_k)
    if block_table is not None:
        k, v = _pages_packed(q, k, v, cu_seqlens_k, block_table)

    def check(q: Tensor, k: Tensor, v: Tensor) -> None:
        problem.check_qkv(q, k, v, q_is_packed=True, k_is_packed=True)

    return attend(
        check,
        autocast_inputs((q, k, v)),
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
        return_softmax_lse,
        _with_sequences(extras, cu_seqlens_q, cu_seqlens_k, max_seqlen_q),
        (max_seqlen_q, max_seqlen_k),
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: SupportsIndex,
    max_seqlen_k: SupportsIndex,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[SupportsIndex] = problem.UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    return_softmax_lse: bool = False,
    return_max_logits: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with keys and values in one tensor.

    Args:
        kv: (total_k, 2, heads_k, head_dim); its gradient is one tensor too, without a copy.
    """
    options = (dropout_p, softcap, alibi_slopes, sink, s_aux, q, None, return_max_logits)
    extras = make_extras(*options)
    check_max_seqlen("max_seqlen_q", max_seqlen_q)
    check_max_seqlen("max_seqlen_k", max_seqlen_k)

    def check(q: Tensor, kv: Tensor) -> None:
        problem.check_kvpacked(q, kv, is_packed=True)

    return attend(
        check,
        autocast_inputs((q, kv)),
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
        return_softmax_lse,
        _with_sequences(extras, cu_seqlens_q, cu_seqlens_k, max_seqlen_q),
        (max_seqlen_q, max_seqlen_k),
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: SupportsIndex,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[SupportsIndex] = problem.UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    return_softmax_lse: bool = False,
    return_max_logits: bool = False,
) -> Result:
    """`flash_attn_varlen_func` with queries, keys and values in one tensor.

    Args:
        qkv: (total, 3, heads, head_dim); its gradient is one tensor too, without a copy.
        cu_seqlens: (batch + 1,) int32, borders of the sequences of queries and keys.
        max_seqlen: length of the longest.
    """
    options = (dropout_p, softcap, alibi_slopes, sink, s_aux, qkv, None, return_max_logits)
    extras = make_extras(*options)
    check_max_seqlen("max_seqlen", max_seqlen)

    def check(qkv: Tensor) -> None:
        problem.check_qkvpacked(qkv, is_packed=True)
        check_cu_seqlens("cu_seqlens", cu_seqlens, qkv, None)

    return attend(
        check,
        autocast_inputs((qkv,)),
        softmax_scale,
        causal,
        window_size,
        deterministic,
        return_attn_probs,
        return_softmax_lse,
        _with_sequences(extras, cu_seqlens, cu_seqlens, max_seqlen),
        (max_seqlen, max_seqlen),
    )
