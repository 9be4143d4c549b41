"""Attention by the textbook, with the whole score matrix in memory. For tests and comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from flash_attn.problem import scale_of, window_of


def _distances(
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device | str | None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """j - (i + seqlen_k - seqlen_q), (1 or batch, seqlen_q, seqlen_k): 0 on the diagonal."""
    row = torch.arange(seqlen_q, device=device)[:, None]
    column = torch.arange(seqlen_k, device=device)
    last_q = seqlen_q if seqused_q is None else seqused_q.to(torch.int64)[:, None, None]
    last_k = seqlen_k if seqused_k is None else seqused_k.to(torch.int64)[:, None, None]
    distances = column - (row + last_k - last_q)
    return distances if distances.dim() == 3 else distances[None]


def _visible(
    distances: Tensor,
    window: tuple[int, int],
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> Tensor:
    """Where a query sees a key, of the shape of `distances`, or with a batch of its own."""
    left, right = window
    row = torch.arange(distances.shape[1], device=distances.device)[:, None]
    column = torch.arange(distances.shape[2], device=distances.device)
    visible = torch.ones_like(distances, dtype=torch.bool)
    if left >= 0:
        visible = visible & (distances >= -left)
    if right >= 0:
        visible = visible & (distances <= right)
    if seqused_q is not None:
        visible = visible & (row < seqused_q[:, None, None])
    if seqused_k is not None:
        visible = visible & (column < seqused_k[:, None, None])
    if leftpad_k is not None:
        visible = visible & (column >= leftpad_k[:, None, None])
    return visible


def visible_keys(
    seqlen_q: int,
    seqlen_k: int,
    causal: bool = False,
    window_size: Sequence[SupportsIndex] = (-1, -1),
    device: torch.device | str | None = None,
) -> Tensor:
    """(seqlen_q, seqlen_k), True where a query sees a key: the rule of `flash_attn_func`."""
    window = window_of(causal, window_size)
    return _visible(_distances(seqlen_q, seqlen_k, device), window)[0]


def masked_scores(
    q: Tensor,
    k: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[SupportsIndex] = (-1, -1),
    *,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores, (batch, heads, seqlen_q, seqlen_k), and where queries see keys, broadcastable to it.

    Arguments as those of `attention_reference`. Where a query does not see a key, the score is the
    least number of its dtype: finite, so that rows without keys have no NaN, nor their backward.
    """
    heads, heads_k = q.shape[2], k.shape[2]
    q, k = q.transpose(1, 2), k.transpose(1, 2).repeat_interleave(heads // heads_k, dim=1)
    scores = (q @ k.transpose(2, 3)) * scale_of(softmax_scale, q.shape[3])
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    distances = _distances(q.shape[2], k.shape[2], q.device, seqused_q, seqused_k)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(scores.dtype).view(-1, heads, 1, 1)
        scores = scores - slopes * distances[:, None].abs()
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    window = window_of(causal, window_size)
    visible = _visible(distances, window, seqused_q, seqused_k, leftpad_k)[:, None]
    if bias is not None:
        visible = visible & (scores > float("-inf"))
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min), visible


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[SupportsIndex] = (-1, -1),
    dtype: torch.dtype = torch.float64,
    *,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
    sink: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and softmax_lse of `flash_attn_func`, computed in dtype, differentiable.

    Args:
        q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes, bias, sink: as those
            of `flash_attn_func`.
        dtype: of the computation and of both results.
        dropout_p, keep: dropout with the probabilities kept that `keep` says, (batch, heads,
            seqlen_q, seqlen_k) bool, by column of k: see `flash_attn.dropout.dropout_mask`.
        seqused_q, seqused_k: (batch,) int, how many rows of q, and of k and v, are in use. The
            rows of q after them have output 0 and softmax_lse +inf, or that of the sink.
        leftpad_k: (batch,) int, how many rows of k and v are skipped at the start. Masks and ALiBi
            are relative to the keys that are left.
    """
    q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
    scores, visible = masked_scores(
        q,
        k,
        softmax_scale,
        causal,
        window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        bias=bias,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        leftpad_k=leftpad_k,
    )
    seqlen_k = scores.shape[3]
    if sink is not None:
        column = sink.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=3)
    softmax_lse = torch.logsumexp(scores, dim=-1)
    if sink is None:
        softmax_lse = softmax_lse.masked_fill(~visible.any(dim=-1), float("inf"))
    probabilities = torch.softmax(scores, dim=-1)[..., :seqlen_k].masked_fill(~visible, 0.0)
    if keep is not None:
        probabilities = probabilities * keep / (1.0 - dropout_p)
    v = v.transpose(1, 2).repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    return (probabilities @ v).transpose(1, 2), softmax_lse
