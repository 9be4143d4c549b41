"""What the public functions have in common: from their arguments to their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from flash_attn import problem
from flash_attn.autograd import attention, unpack
from flash_attn.extras import Extras, check_bias, check_extras
from flash_attn.probabilities import signed_probabilities

Result = Tensor | tuple[Tensor, ...]


def attend(
    check: Callable[..., None],
    tensors: tuple[Tensor, ...],
    softmax_scale: float | None,
    causal: bool,
    window_size: Sequence[SupportsIndex],
    deterministic: bool,
    return_attn_probs: bool,
    return_softmax_lse: bool,
    extras: Extras | None,
    max_seqlens: tuple[SupportsIndex, SupportsIndex] | None = None,
) -> Result:
    """Attention of (q, k, v), (q, kv) or (qkv,); `check` says what is wrong with them.

    The op checks its arguments before it computes. `check` costs as much as the rest of this layer,
    so it runs only where the op has refused them, and where torch.compile traces the call.
    """
    if torch.compiler.is_compiling():
        _check(check, tensors, extras)
    left, right = problem.window_of(causal, window_size)
    try:
        scale = problem.scale_of(softmax_scale, tensors[0].size(-1))
        out, softmax_lse, *max_logits = attention(
            tensors, scale, left, right, deterministic, extras
        )
    except Exception:
        _check(check, tensors, extras)
        raise
    if not return_attn_probs:
        if not max_logits and not return_softmax_lse:
            return out
        return (out, softmax_lse, *max_logits) if return_softmax_lse else (out, *max_logits)
    if extras is None or "rng_state" not in extras:
        # S_dmask shows which probabilities dropout kept: nothing without dropout.
        return out, softmax_lse, out.new_empty(0), *max_logits
    with torch.no_grad():
        q, k, _ = unpack(tensors)
        probabilities = signed_probabilities(q, k, scale, (left, right), extras, max_seqlens)
    return out, softmax_lse, probabilities, *max_logits


def _check(check: Callable[..., None], tensors: tuple[Tensor, ...], extras: Extras | None) -> None:
    check(*tensors)
    if extras is not None:
        q, k, _ = unpack(tensors)
        check_extras(q, extras)
        if "bias" in extras:
            check_bias(q, k, extras["bias"])
