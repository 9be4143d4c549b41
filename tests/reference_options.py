"""Exact attention over sequences with every option of the ops, and dropout's generator, in torch.

The sequences are spans of rows, so that packed, padded, cached and dense tensors are one problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn.reference import visible_keys

_WORD = 0xFFFFFFFF


class Span(NamedTuple):
    """Rows [begin, end) of an entry of the batch dimension; entry is 0 in packed tensors."""

    entry: int
    begin: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Options:
    """What an op is given besides its rows and sequences."""

    scale: float = 0.125
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None  # (heads) or (sequences, heads)
    dropout_p: float = 0.0
    rng_state: Tensor | None = None
    sink: Tensor | None = None
    bias: Tensor | None = None  # broadcasts to (sequences, heads, seqlen_q, seqlen_k)


def philox4x32_7(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-7 (Salmon et al. 2011) on int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        # The low 64 bits of a product are right whatever its sign.
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high2 = (product >> 32 & _WORD for product in (product0, product2))
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, product2 & _WORD, high0 ^ c3 ^ k1, product0 & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


def kept_pairs(
    rng_state: Tensor, dropout_p: float, batch_head: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    """(seqlen_q, seqlen_k), True where dropout keeps the probability."""
    seed, offset = rng_state.tolist()
    row = torch.arange(seqlen_q).unsqueeze(1).expand(seqlen_q, seqlen_k)
    col = torch.arange(seqlen_k).expand(seqlen_q, seqlen_k)
    counter = (
        row // 16 * 4 + row % 8 // 2,
        col // 16 * 4 + col % 8 // 2,
        torch.full_like(row, batch_head),
        torch.full_like(row, offset & _WORD),
    )
    words = torch.stack(philox4x32_7(counter, (seed & _WORD, seed >> 32 & _WORD)))
    word = words.gather(0, (row // 8 % 2 * 2 + col // 8 % 2).unsqueeze(0)).squeeze(0)
    byte = word >> 8 * (row % 2 * 2 + col % 2) & 255
    return (byte <= int((1 - dropout_p) * 255)).to(rng_state.device)


def one_sequence(
    q: Tensor, k: Tensor, v: Tensor, batch: int, options: Options
) -> tuple[Tensor, Tensor]:
    """(seqlen_q, heads, head_dim_v) and (heads, seqlen_q) of sequence `batch`.

    The products are rounded to the dtype of q; what lies between them is fp32 at least.
    """
    heads, seqlen_q, seqlen_k = q.shape[1], q.shape[0], k.shape[0]
    q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
    k, v = (tensor.repeat_interleave(heads // tensor.shape[0], dim=0) for tensor in (k, v))
    scores = (q @ k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32))
    scores = scores * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.to(scores)
        slopes = slopes[batch] if slopes.dim() == 2 else slopes
        row = torch.arange(seqlen_q, device=q.device).unsqueeze(1) + seqlen_k - seqlen_q
        distance = (row - torch.arange(seqlen_k, device=q.device)).abs()
        scores = scores - slopes[:, None, None] * distance
    if options.bias is not None:
        scores = scores + options.bias[batch % options.bias.shape[0]].to(scores)
    left, right = options.window
    visible = visible_keys(seqlen_q, seqlen_k, False, (left, right), q.device)
    # A finite fill keeps rows without keys free of NaN, also in the backward.
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if options.sink is not None:
        sink = options.sink.to(scores)[:, None, None].expand(heads, seqlen_q, 1)
        scores = torch.cat((scores, sink), dim=-1)
    probabilities = torch.softmax(scores, dim=-1)[..., :seqlen_k].masked_fill(~visible, 0.0)
    softmax_lse = torch.logsumexp(scores, dim=-1)
    if options.sink is None:
        softmax_lse = softmax_lse.masked_fill(~visible.any(dim=-1), float("inf"))
    if options.dropout_p:
        assert options.rng_state is not None
        kept = torch.stack(
            [
                kept_pairs(
                    options.rng_state, options.dropout_p, batch * heads + head, seqlen_q, seqlen_k
                )
                for head in range(heads)
            ]
        )
        probabilities = probabilities * kept / (1 - options.dropout_p)
    return (probabilities.to(v.dtype) @ v).transpose(0, 1), softmax_lse


def attention_of_sequences(
    q: Tensor, k: Tensor, v: Tensor, spans_q: list[Span], spans_k: list[Span], options: Options
) -> tuple[Tensor, Tensor]:
    """out and softmax_lse as the op shapes them, differentiable; q is (entries, rows, ...)."""
    entries, rows, heads = q.shape[:3]
    out = q.new_zeros(entries, rows, heads, v.shape[3])
    softmax_lse = q.new_full(
        (entries, heads, rows),
        float("inf"),
        dtype=torch.promote_types(q.dtype, torch.float32),
    )
    for batch, (of_q, of_k) in enumerate(zip(spans_q, spans_k, strict=True)):
        keys = slice(of_k.begin, of_k.end)
        queries = slice(of_q.begin, of_q.end)
        one_out, one_lse = one_sequence(
            q[of_q.entry, queries],
            k[of_k.entry, keys],
            v[of_k.entry, keys],
            batch,
            options,
        )
        out[of_q.entry, queries] = one_out
        softmax_lse[of_q.entry, :, queries] = one_lse
    return out, softmax_lse
