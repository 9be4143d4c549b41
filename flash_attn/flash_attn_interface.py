"""The public functions. `flash_attn_func` is documented in full, the others by how they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from flash_attn import positional as flash_attn_gpu
from flash_attn import problem
from flash_attn.attend import Result, attend
from flash_attn.autograd import autocast_inputs
from flash_attn.extras import make_extras
from flash_attn.function_classes import (
    FlashAttnVarlenFunc,
    FlashAttnVarlenKVPackedFunc,
    FlashAttnVarlenQKVPackedFunc,
    by_position,
)
from flash_attn.kvcache import flash_attn_with_kvcache
from flash_attn.private_ops import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
)
from flash_attn.probabilities import round_multiple
from flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

# With the names that other packages import from this module.
__all__ = [
    "USE_TRITON_ROCM",
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "FlashAttnVarlenKVPackedFunc",
    "FlashAttnVarlenQKVPackedFunc",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]

USE_TRITON_ROCM = False


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x, or a copy if its last dimension isn't contiguous."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _get_block_size_n(
    device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool
) -> int:
    """Keys over which the probabilities of S_dmask have one largest score: more than any row has.

    For tests that turn S_dmask into probabilities block by block.
    """
    return 1 << 30


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
    *,
    sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    return_softmax_lse: bool = False,
    bias: Tensor | None = None,
    return_max_logits: bool = False,
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

    A query that sees no key has output 0, softmax_lse +inf (with a sink: the sink), and takes and
    gives no gradient.

    q, k and v are read where they are: any strides will do as long as the last dimension is
    contiguous. With fewer heads in k and v than in q (a divisor of them), query head h reads
    key head h // (heads / heads_k): grouped-query attention.

    Under torch.autocast the tensors are cast as for a matrix product. Gradients flow into q, k
    and v from the output and from softmax_lse; there is no double backward, no forward-mode
    differentiation and no torch.func transform.

    Args:
        q: (batch, seqlen_q, heads, head_dim), head_dim up to 256; torch.bfloat16,
            torch.float16 or torch.float32. On CUDA, products of float32 have TF32's rounding where
            torch.backends.cuda.matmul.fp32_precision is "tf32" (allow_tf32=True), else float32's;
            a head_dim that isn't a multiple of 8 costs a padded copy of q, k and v.
        k: (batch, seqlen_k, heads_k, head_dim), dtype and device of q.
        v: (batch, seqlen_k, heads_k, head_dim_v), head_dim_v up to 256; the output has head_dim_v
            too.
        dropout_p: probability from 0 to below 1 that an element of the softmax is dropped; the
            others are scaled by 1 / (1 - dropout_p). Which ones follows from torch's generator of
            q's device, so torch.manual_seed repeats them, and no backend chooses others. The
            probability is realised in steps of 1/256: `flash_attn.dropout`.
        softmax_scale: factor of q k^T, by default 1 / sqrt(head_dim).
        causal: mask keys to the right of the diagonal.
        window_size: (left, right), how far a query sees to either side of the diagonal.
        softcap: if above 0, scores become softcap * tanh(scores / softcap), before ALiBi.
        alibi_slopes: (heads,) or (batch, heads), float32: the score of query i and key j is lowered
            by slope * |i + seqlen_k - seqlen_q - j|. They get no gradient.
        deterministic: make the gradient of q bit-equal from run to run too, at some cost in speed
            and memory; all other results always are.
        return_attn_probs: also return softmax_lse and S_dmask, for tests.
        sink: (heads,), one more score for every row of a head, without a key: exp(sink) is added to
            the softmax's denominator and to softmax_lse. Gets its gradient. Any floating dtype,
            computed in float32.
        s_aux: another name of sink.
        return_softmax_lse: also return softmax_lse.
        bias: any shape that broadcasts to (batch, heads, seqlen_q, seqlen_k), any strides, float32
            or dtype of q: added to the scores, beside ALiBi. Nothing of the broadcast shape is
            stored. Where it is -inf a query doesn't see the key. It gets its gradient if it
            requires one, summed in float32 in its own shape, where it is broadcast in no fixed
            order: with deterministic=True that is refused (pass bias.expand(batch, heads, seqlen_q,
            seqlen_k) instead, whose gradient has the full shape). On Hopper the kernels of sm80
            serve it. The functions for packed sequences and caches don't take it.
        return_max_logits: also return, last, the largest score that enters the softmax of each
            query head, (heads,), float32: the maximum over the batch of the scaled, capped and
            biased scores of all queries and the keys they see; -inf if there are none. A sink
            doesn't count. Not differentiable. What optimisers that clip queries and keys read.

    Returns:
        The output, (batch, seqlen_q, heads, head_dim_v). With return_softmax_lse=True, (output,
        softmax_lse): (batch, heads, seqlen_q), float32, the natural logarithm of the sum of
        exp(scores), from scaled, capped and biased scores. With return_attn_probs=True, (output,
        softmax_lse, S_dmask): empty without dropout, otherwise (batch, heads, seqlen_q, seqlen_k),
        lengths rounded up to multiples of 128, exp(score - largest score of the row), negative
        where dropped, at the cost of the whole score matrix. With return_max_logits=True,
        max_logits comes behind what else is returned: (output, max_logits), (output, softmax_lse,
        max_logits) or (output, softmax_lse, S_dmask, max_logits).

    Raises:
        ValueError, TypeError: an argument isn't as described above.
        NotImplementedError: a torch.func transform or forward-mode differentiation.
        RuntimeError: no compiled backend serves the call; the text says why and what to do.

    Example:
        >>> q = torch.randn(2, 1024, 8, 64, dtype=torch.bfloat16, requires_grad=True)
        >>> k, v = torch.randn(2, 2, 1024, 2, 64, dtype=torch.bfloat16)  # 4 query heads a key head
        >>> out = flash_attn_func(q, k, v, causal=True, window_size=(255, 0))
        >>> out.sum().backward()
    """
    given = (dropout_p, softcap, alibi_slopes, sink, s_aux, q, bias, return_max_logits)
    extras = make_extras(*given)
    options = (softmax_scale, causal, window_size, deterministic, return_attn_probs)
    tensors = autocast_inputs((q, k, v))
    return attend(problem.check_qkv, tensors, *options, return_softmax_lse, extras)


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
    *,
    sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    return_softmax_lse: bool = False,
    bias: Tensor | None = None,
    return_max_logits: bool = False,
) -> Result:
    """`flash_attn_func` with keys and values in one tensor.

    Args:
        kv: (batch, seqlen_k, 2, heads_k, head_dim); its gradient is one tensor too, without a copy.
    """
    given = (dropout_p, softcap, alibi_slopes, sink, s_aux, q, bias, return_max_logits)
    extras = make_extras(*given)
    options = (softmax_scale, causal, window_size, deterministic, return_attn_probs)
    tensors = autocast_inputs((q, kv))
    return attend(problem.check_kvpacked, tensors, *options, return_softmax_lse, extras)


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
    *,
    sink: Tensor | None = None,
    s_aux: Tensor | None = None,
    return_softmax_lse: bool = False,
    bias: Tensor | None = None,
    return_max_logits: bool = False,
) -> Result:
    """`flash_attn_func` with queries, keys and values in one tensor.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim); its gradient is one tensor too, without a copy.
    """
    given = (dropout_p, softcap, alibi_slopes, sink, s_aux, qkv, bias, return_max_logits)
    extras = make_extras(*given)
    options = (softmax_scale, causal, window_size, deterministic, return_attn_probs)
    tensors = autocast_inputs((qkv,))
    return attend(problem.check_qkvpacked, tensors, *options, return_softmax_lse, extras)


class FlashAttnFunc:
    apply = staticmethod(by_position(flash_attn_func, 3))


class FlashAttnKVPackedFunc:
    apply = staticmethod(by_position(flash_attn_kvpacked_func, 2))


class FlashAttnQKVPackedFunc:
    apply = staticmethod(by_position(flash_attn_qkvpacked_func, 1))
