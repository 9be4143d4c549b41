"""Attention of projected tensors as modules: tiled, and standard with the score matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor, nn

from flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.reference import masked_scores


def get_alibi_slopes(nheads: int) -> list[float]:
    """Slopes of ALiBi (Press et al. 2022, arXiv:2108.12409) for any number of heads.

    For a power of two they are 2^(-8 i / nheads), i from 1. For others, those of the next smaller
    power, then every second of the next larger one.
    """

    def of_power(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (head + 1) / count) for head in range(count)]

    power = 2 ** int(math.log2(nheads))
    return of_power(power) + of_power(2 * power)[::2][: nheads - power]


def _output(result: object) -> Tensor:
    assert isinstance(result, Tensor)
    return result


class _Flash(nn.Module):
    """What FlashSelfAttention and FlashCrossAttention have in common."""

    def __init__(
        self,
        causal: bool,
        softmax_scale: float | None,
        attention_dropout: float,
        window_size: Sequence[SupportsIndex],
        alibi_slopes: Tensor | None,
        deterministic: bool,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.alibi_slopes: Tensor | None
        self.window_size = window_size
        self.deterministic = deterministic

    def options(self, causal: bool | None) -> dict[str, object]:
        """Keyword arguments of the functions; `causal` replaces the module's own if given."""
        slopes = self.alibi_slopes
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            # A cast of the module casts its buffers.
            "alibi_slopes": None if slopes is None else slopes.float(),
            "window_size": self.window_size,
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_Flash):
    """Tiled attention of packed queries, keys and values.

    Args:
        causal, softmax_scale, window_size, alibi_slopes, deterministic: as for `flash_attn_func`.
        attention_dropout: its dropout_p while training.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: Sequence[SupportsIndex] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        options = (window_size, alibi_slopes, deterministic)
        super().__init__(causal, softmax_scale, attention_dropout, *options)

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: SupportsIndex | None = None,
    ) -> Tensor:
        """qkv (batch, seqlen, 3, heads, head_dim), or (total, 3, heads, head_dim) with cu_seqlens
        and max_seqlen. Returns (..., heads, head_dim)."""
        options = self.options(causal)
        if cu_seqlens is None:
            return _output(flash_attn_qkvpacked_func(qkv, **options))  # type: ignore[arg-type]
        if max_seqlen is None:
            raise ValueError("max_seqlen: expected an integer beside cu_seqlens, got None")
        borders = (cu_seqlens, max_seqlen)
        out = flash_attn_varlen_qkvpacked_func(qkv, *borders, **options)  # type: ignore[arg-type]
        return _output(out)


class FlashCrossAttention(_Flash):
    """Tiled attention of queries to packed keys and values. Arguments as FlashSelfAttention's."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: Sequence[SupportsIndex] = (-1, -1),
        deterministic: bool = False,
    ) -> None:
        options = (window_size, alibi_slopes, deterministic)
        super().__init__(causal, softmax_scale, attention_dropout, *options)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: SupportsIndex | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: SupportsIndex | None = None,
    ) -> Tensor:
        """q (batch, seqlen_q, heads, head_dim) and kv (batch, seqlen_k, 2, heads_k, head_dim), or
        both packed, with cu_seqlens and max_seqlen of q and of kv. Returns the shape of q."""
        options = self.options(causal)
        if cu_seqlens is None:
            return _output(flash_attn_kvpacked_func(q, kv, **options))  # type: ignore[arg-type]
        borders = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        names = ("cu_seqlens", "cu_seqlens_k", "max_seqlen", "max_seqlen_k")
        for name, value in zip(names, borders, strict=True):
            if value is None:
                raise ValueError(f"{name}: expected a value with packed sequences, got None")
        out = flash_attn_varlen_kvpacked_func(q, kv, *borders, **options)  # type: ignore[arg-type]
        return _output(out)


def _standard_attention(
    q: Tensor,
    kv: Tensor,
    softmax_scale: float | None,
    causal: bool,
    key_padding_mask: Tensor | None,
    drop: nn.Module,
) -> Tensor:
    k, v = kv.unbind(2)
    scores, visible = masked_scores(q, k, softmax_scale, causal)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None, None].bool()
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(scores, dim=-1).masked_fill(~visible, 0.0)
    v = v.transpose(1, 2).repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    out: Tensor = drop(probabilities) @ v
    return out.transpose(1, 2)


class CrossAttention(nn.Module):
    """Standard attention of queries to packed keys and values, with the whole score matrix.

    A query without a visible key has output 0, as everywhere in this package.

    Args:
        causal, softmax_scale: as for `flash_attn_func`.
        attention_dropout: probability of dropping a probability while training.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """q (batch, seqlen_q, heads, head_dim), kv (batch, seqlen_k, 2, heads_k, head_dim),
        key_padding_mask (batch, seqlen_k), True where a key takes part. Returns the shape of q."""
        is_causal = self.causal if causal is None else causal
        options = (self.softmax_scale, is_causal, key_padding_mask, self.drop)
        return _standard_attention(q, kv, *options)


class SelfAttention(CrossAttention):
    """CrossAttention of packed queries, keys and values."""

    def forward(  # type: ignore[override]  # of one tensor instead of two
        self,
        qkv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """qkv (batch, seqlen, 3, heads, head_dim). Returns (batch, seqlen, heads, head_dim)."""
        return super().forward(qkv[:, :, 0], qkv[:, :, 1:], causal, key_padding_mask)
