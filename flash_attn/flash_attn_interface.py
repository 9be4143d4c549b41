"""The public functions. `flash_attn_func` is documented in full, the others by how they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from flash_attn import problem
from flash_attn.autograd import attention, autocast_inputs

Result = Tensor | tuple[Tensor, Tensor, Tensor]


def _attend(
    check: Callable[..., None],
    tensors: tuple[Tensor, ...],
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[SupportsIndex],
    deterministic: bool,
    return_attn_probs: bool,
) -> Result:
    """Attention of (q, k, v), (q, kv) or (qkv,); `check` says what is wrong with them.

    The op checks its arguments before it computes. `check` costs as much as the rest of this layer,
    so it runs only where the op has refused them, and where torch.compile traces the call.
    """
    if torch.compiler.is_compiling():
        check(*tensors)
    left, right = problem.window_of(causal, window_size)
    try:
        scale = problem.scale_of(softmax_scale, tensors[0].size(-1))
        out, softmax_lse = attention(tensors, scale, left, right, deterministic)
    except Exception:
        check(*tensors)
        raise
    # S_dmask shows which probabilities dropout kept: nothing without dropout.
    return (out, softmax_lse, out.new_empty(0)) if return_attn_probs else out


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[SupportsIndex] = problem.UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Exact attention: softmax(softmax_scale * q k^T, masked) v, without storing the score matrix.

    Query i sees key j if

        i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right

    with (left, right) = window_size; -1 is unbounded, causal=True sets right = 0. The mask is thus
    aligned to the bottom-right corner of the score matrix. Causal, with 1 = seen:

        seqlen_q = 2, seqlen_k = 5:      seqlen_q = 5, seqlen_k = 2:
            1 1 1 1 0                        0 0
            1 1 1 1 1                        0 0
                                             0 0
                                             1 0
                                             1 1

    A query that sees no key has output 0, softmax_lse +inf, and takes and gives no gradient.

    q, k and v are read where they are: any strides will do as long as the last dimension is
    contiguous. With fewer heads in k and v than in q (a divisor of them), query head h reads
    key head h // (heads / heads_k): grouped-query attention.

    Under torch.autocast the tensors are cast as for a matrix product. Gradients flow into q, k
    and v from the output and from softmax_lse; there is no double backward, no forward-mode
    differentiation and no torch.func transform.

    Args:
        q: (batch, seqlen_q, heads, head_dim), head_dim up to 256. On CUDA torch.bfloat16 or
            torch.float16, on CPU also torch.float32. On CUDA, a head_dim that isn't a multiple
            of 8 costs a padded copy of q, k and v.
        k: (batch, seqlen_k, heads_k, head_dim), dtype and device of q.
        v: (batch, seqlen_k, heads_k, head_dim_v), head_dim_v up to 256; the output has head_dim_v
            too.
        dropout_p: only 0.0 is available.
        softmax_scale: factor of q k^T, by default 1 / sqrt(head_dim).
        causal: mask keys to the right of the diagonal.
        window_size: (left, right), how far a query sees to either side of the diagonal.
        softcap: only 0.0 is available.
        alibi_slopes: only None is available.
        deterministic: make the gradient of q bit-equal from run to run too, at some cost in speed
            and memory; all other results always are.
        return_attn_probs: also return softmax_lse and S_dmask.

    Returns:
        The output, (batch, seqlen_q, heads, head_dim_v); with return_attn_probs=True the tuple
        of it, softmax_lse (batch, heads, seqlen_q), float32, the natural logarithm of the sum of
        exp(scores), and S_dmask, an empty tensor as long as there is no dropout.

    Raises:
        ValueError, TypeError: an argument isn't as described above.
        NotImplementedError: an option that isn't available.
        RuntimeError: no compiled backend serves the call; the text says why and what to do.

    Example:
        >>> q = torch.randn(2, 1024, 8, 64, dtype=torch.bfloat16, requires_grad=True)
        >>> k, v = torch.randn(2, 2, 1024, 2, 64, dtype=torch.bfloat16)  # 4 query heads a key head
        >>> out = flash_attn_func(q, k, v, causal=True, window_size=(255, 0))
        >>> out.sum().backward()
    """
    problem.reject_unsupported(dropout_p, softcap, alibi_slopes)
    options = (softmax_scale, causal, window_size, deterministic, return_attn_probs)
    return _attend(problem.check_qkv, autocast_inputs((q, k, v)), *options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[SupportsIndex] = problem.UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with keys and values in one tensor.

    Args:
        kv: (batch, seqlen_k, 2, heads_k, head_dim); its gradient is one tensor too, without a copy.
    """
    problem.reject_unsupported(dropout_p, softcap, alibi_slopes)
    options = (softmax_scale, causal, window_size, deterministic, return_attn_probs)
    return _attend(problem.check_kvpacked, autocast_inputs((q, kv)), *options)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[SupportsIndex] = problem.UNBOUNDED,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with queries, keys and values in one tensor.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim); its gradient is one tensor too, without a copy.
    """
    problem.reject_unsupported(dropout_p, softcap, alibi_slopes)
    options = (softmax_scale, causal, window_size, deterministic, return_attn_probs)
    return _attend(problem.check_qkvpacked, autocast_inputs((qkv,)), *options)
