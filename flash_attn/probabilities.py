"""S_dmask: probabilities with the sign of dropout, from the whole score matrix, for tests."""

from __future__ import annotations

import operator
from typing import SupportsIndex

import torch
from torch import Tensor

from flash_attn.dropout import dropout_mask
from flash_attn.extras import Extras
from flash_attn.reference import masked_scores

_ROUND = 128


def round_multiple(x: int, m: int) -> int:
    """The least multiple of m from x on."""
    return (x + m - 1) // m * m


def padded_sequences(packed: Tensor, cu_seqlens: Tensor, seqlen: int) -> Tensor:
    """(batch, seqlen, ...) of packed (total, ...): rows past a sequence hold those of others."""
    first = cu_seqlens[:-1].to(torch.int64)
    rows = first[:, None] + torch.arange(seqlen, device=packed.device)
    if packed.size(0) == 0:
        return packed.new_zeros((*rows.shape, *packed.shape[1:]))
    return packed[rows.clamp(0, packed.size(0) - 1)]


def _dense(
    tensor: Tensor, cu_seqlens: Tensor | None, max_seqlen: SupportsIndex | None
) -> tuple[Tensor, Tensor | None]:
    """(batch, seqlen, ...) of a dense or packed tensor, and the lengths of packed sequences."""
    if cu_seqlens is None:
        return tensor, None
    assert max_seqlen is not None
    return padded_sequences(tensor, cu_seqlens, operator.index(max_seqlen)), cu_seqlens.diff()


def _kept(extras: Extras, scores: Tensor) -> Tensor:
    """dropout_mask of the scores, whose columns count from the first row of k."""
    kept = dropout_mask(extras["rng_state"], extras["dropout_p"], *scores.shape)
    leftpad_k = extras.get("leftpad_k")
    if leftpad_k is None:
        return kept
    columns = torch.arange(scores.size(3), device=scores.device) - leftpad_k[:, None]
    return kept.gather(3, columns.clamp_min(0)[:, None, None].expand_as(kept))


def signed_probabilities(
    q: Tensor,
    k: Tensor,
    softmax_scale: float,
    window: tuple[int, int],
    extras: Extras,
    max_seqlens: tuple[SupportsIndex, SupportsIndex] | None,
) -> Tensor:
    """exp(score - largest score of the row), negative where dropout dropped it.

    Finite everywhere; 0 where a query does not see a key and outside of the sequences. Memory and
    time of the whole score matrix.

    Returns:
        (batch, heads, seqlen_q, seqlen_k), lengths rounded up to multiples of 128, dtype of q. Of
        packed sequences the lengths are max_seqlen_q and max_seqlen_k, which are read from the
        device if they are tensors there.
    """
    max_q, max_k = max_seqlens or (None, None)
    dense_q, seqused_q = _dense(q, extras.get("cu_seqlens_q"), max_q)
    dense_k, seqused_k = _dense(k, extras.get("cu_seqlens_k"), max_k)
    scores, visible = masked_scores(
        dense_q.float(),
        dense_k.float(),
        softmax_scale,
        window_size=window,
        softcap=extras.get("softcap", 0.0),
        alibi_slopes=extras.get("alibi_slopes"),
        bias=extras.get("bias"),
        seqused_q=seqused_q,
        seqused_k=seqused_k if extras.get("seqused_k") is None else extras["seqused_k"],
        leftpad_k=extras.get("leftpad_k"),
    )
    batch, heads, seqlen_q, seqlen_k = scores.shape
    shape = (batch, heads, round_multiple(seqlen_q, _ROUND), round_multiple(seqlen_k, _ROUND))
    result = q.new_zeros(shape)
    if scores.numel() == 0:
        return result
    kept = _kept(extras, scores)
    magnitude = torch.exp(scores - scores.amax(dim=-1, keepdim=True)).masked_fill(~visible, 0.0)
    # The sign of a dropped probability that would round to zero must show.
    least = 2.0**-24 if q.dtype == torch.float16 else torch.finfo(q.dtype).tiny
    dropped = -magnitude.clamp_min(least).masked_fill(~visible, 0.0)
    result[:, :, :seqlen_q, :seqlen_k] = torch.where(kept, magnitude, dropped).to(q.dtype)
    return result
