"""Attention by the textbook, with the whole score matrix in memory. For tests and comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from flash_attn.problem import scale_of, window_of


def visible_keys(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool = False,
    window_size: Sequence[SupportsIndex] = (-1, -1),
    device: torch.device | str | None = None,
) -> Tensor:
    """(seqlen_q, seqlen_k), True where a query sees a key: the rule of `flash_attn_func`."""
    left, right = window_of(causal, window_size)
    row = torch.arange(seqlen_q, device=device).unsqueeze(1)
    distance = torch.arange(seqlen_k, device=device) - (row + seqlen_k - seqlen_q)
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    return visible


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[SupportsIndex] = (-1, -1),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Output and softmax_lse of `flash_attn_func`, computed in dtype, differentiable."""
    heads_per_key_head = q.shape[2] // k.shape[2]
    q, k, v = (tensor.to(dtype).transpose(1, 2) for tensor in (q, k, v))
    k = k.repeat_interleave(heads_per_key_head, dim=1)
    v = v.repeat_interleave(heads_per_key_head, dim=1)
    visible = visible_keys(q.shape[2], k.shape[2], causal, window_size, q.device)
    scores = (q @ k.transpose(2, 3)) * scale_of(softmax_scale, q.shape[3])
    # A finite fill keeps rows without keys free of NaN, also in the backward.
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    probabilities = torch.softmax(scores, dim=-1).masked_fill(~visible, 0.0)
    out = (probabilities @ v).transpose(1, 2)
    softmax_lse = torch.logsumexp(scores, dim=-1)
    softmax_lse = softmax_lse.masked_fill(~visible.any(dim=-1), float("inf"))
    return out, softmax_lse
