"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), with gradients, on any device.

Pairs of columns are rotated by angles that grow with the position. Two layouts of the pairs: halves
(column i with column i + rotary_dim / 2, as GPT-NeoX and Llama have it) and, with `interleaved`,
neighbours (2i with 2i + 1, as GPT-J has it). Angles come as their cosines and sines, (positions,
rotary_dim / 2); columns from rotary_dim on are left as they are. Arithmetic is fp32 whatever the
inputs are (fp64 for fp64).

Written with PyTorch's own operations; only the cosines and sines are kept for the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """x turned by a quarter: (a, b) becomes (-b, a) in every pair."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """apply_rotary_emb() in the dtype of its inputs, for (batch, seqlen, heads, head_dim) alone."""
    if interleaved:
        cos, sin = (t.repeat_interleave(2, dim=-1)[:, None, :] for t in (cos, sin))
    else:
        cos, sin = (torch.cat((t, t), dim=-1)[:, None, :] for t in (cos, sin))
    rotary_dim = cos.shape[-1]
    part = x[..., :rotary_dim]
    rotated = part * cos + rotate_half(part, interleaved) * sin
    return torch.cat((rotated, x[..., rotary_dim:]), dim=-1)


def _angles(
    cos: Tensor, sin: Tensor, x: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of every token, (seqlen, half), (batch, seqlen, half), or (total, half) of packed tokens.

    Positions beyond those of cos get the angle 0.
    """
    if cu_seqlens is None and not isinstance(seqlen_offsets, Tensor):
        part = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        return cos[part], sin[part]
    if cu_seqlens is None:
        assert isinstance(seqlen_offsets, Tensor)
        positions = seqlen_offsets[:, None] + torch.arange(x.shape[1], device=x.device)
        is_token = positions >= 0
    else:
        tokens = torch.arange(x.shape[0], device=x.device)
        sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
        is_in_one = sequence < cu_seqlens.numel() - 1
        sequence = torch.where(is_in_one, sequence, 0)
        positions = (
            tokens
            - cu_seqlens[sequence]
            + (seqlen_offsets[sequence] if isinstance(seqlen_offsets, Tensor) else seqlen_offsets)
        )
        is_token = is_in_one & (positions >= 0)
    is_known = (is_token & (positions < cos.shape[0]))[..., None]
    at = positions.clamp(0, max(cos.shape[0] - 1, 0))
    return torch.where(is_known, cos[at], 1), torch.where(is_known, sin[at], 0)


def _check(
    x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None
) -> None:
    layout, rank = (
        ("(batch, seqlen, heads, head_dim)", 4)
        if cu_seqlens is None
        else ("(total, heads, head_dim), packed by cu_seqlens", 3)
    )
    if x.dim() != rank:
        raise ValueError(f"x: expected shape {layout}, got {tuple(x.shape)}")
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise ValueError(
            "cos, sin: expected one shape (positions, rotary_dim / 2) for both, got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos: expected rotary_dim = 2 * {cos.shape[1]} of at most the head_dim of x, "
            f"{x.shape[-1]}"
        )
    if cu_seqlens is None and not isinstance(seqlen_offsets, Tensor):
        needed = x.shape[1] + seqlen_offsets
        if seqlen_offsets < 0 or needed > cos.shape[0]:
            raise ValueError(
                f"cos: expected at least seqlen + seqlen_offsets = {needed} positions from "
                f"seqlen_offsets = {seqlen_offsets} >= 0 on, got {cos.shape[0]}"
            )


def _rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inplace: bool,
    conjugate: bool,
) -> Tensor:
    """x rotated, or with `conjugate` rotated back. Positions beyond those of cos are left alone."""
    half = cos.shape[1]
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    angles = _angles(cos, sin, x, seqlen_offsets, cu_seqlens)
    c, s = (t.to(work)[..., None, :] for t in angles)
    s = -s if conjugate else s
    part = x[..., : 2 * half]
    first, second = (
        (part[..., ::2], part[..., 1::2]) if interleaved else part.tensor_split(2, dim=-1)
    )
    a, b = first.to(work), second.to(work)
    out = x if inplace else x.clone(memory_format=torch.contiguous_format)
    target = out[..., : 2 * half]
    to_first, to_second = (
        (target[..., ::2], target[..., 1::2]) if interleaved else target.tensor_split(2, dim=-1)
    )
    rotated_first, rotated_second = a * c - b * s, a * s + b * c
    to_first.copy_(rotated_first)
    to_second.copy_(rotated_second)
    return out


class ApplyRotaryEmb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        inplace: bool = False,
        seqlen_offsets: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        _check(x, cos, sin, seqlen_offsets, cu_seqlens)
        tensors = (cos, sin, cu_seqlens)
        if isinstance(seqlen_offsets, Tensor):
            ctx.save_for_backward(*tensors, seqlen_offsets)
        else:
            ctx.save_for_backward(*tensors)
            ctx.seqlen_offset = seqlen_offsets
        ctx.interleaved = interleaved
        out = _rotate(x, cos, sin, seqlen_offsets, cu_seqlens, interleaved, inplace, False)
        if inplace:
            ctx.mark_dirty(x)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, cu_seqlens, *rest = ctx.saved_tensors
        offsets = rest[0] if rest else ctx.seqlen_offset
        dx = _rotate(dout, cos, sin, offsets, cu_seqlens, ctx.interleaved, False, True)
        return dx, *[None] * 7


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x with the first rotary_dim columns of every head rotated by their positions.

    Args:
        x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens.
        cos, sin: (positions, rotary_dim / 2); rotary_dim is at most head_dim.
        interleaved: pairs are neighbouring columns instead of halves.
        inplace: write into x, and return it.
        seqlen_offsets: position of a sequence's first token: an int, or (batch,) int.
        cu_seqlens: (batch + 1,) int32, borders of packed sequences.
        max_seqlen: taken for the callers that pass it; not needed here.

    Returns:
        A tensor of the shape and dtype of x. Differentiable in x. Positions past those of cos,
        which only a tensor of offsets or packed sequences can have, are not rotated.

    Raises:
        ValueError: a shape does not fit, or cos has fewer than seqlen + seqlen_offsets positions.
    """
    args = (x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)
    rotated: Tensor = ApplyRotaryEmb.apply(*args)  # type: ignore[no-untyped-call]
    return rotated


apply_rotary_emb_func = apply_rotary_emb  # as importers also know it


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates queries and keys of a packed tensor in place, and returns it.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim); or (batch, seqlen, num_heads_q + 2 * heads_k,
            head_dim) with num_heads_q.
        cos_k, sin_k: of the keys, if not those of the queries.
        The rest as for apply_rotary_emb().

    Raises:
        ValueError: qkv has another shape, or num_heads_q is missing.
    """
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    elif qkv.dim() == 4 and num_heads_q is not None and (qkv.shape[2] - num_heads_q) % 2 == 0:
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k = qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + heads_k]
    else:
        raise ValueError(
            "qkv: expected shape (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, "
            f"num_heads_q + 2 * heads_k, head_dim) with num_heads_q; got {tuple(qkv.shape)} with "
            f"num_heads_q = {num_heads_q}"
        )
    options = {"interleaved": interleaved, "inplace": True, "seqlen_offsets": seqlen_offsets}
    apply_rotary_emb(q, cos, sin, **options)  # type: ignore[arg-type]
    k_angles = (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
    apply_rotary_emb(k, *k_angles, **options)  # type: ignore[arg-type]
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotates the keys of kv, (batch, seqlen, 2, heads, head_dim), in place, and returns it."""
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise ValueError(
            f"kv: expected shape (batch, seqlen, 2, heads, head_dim), got {tuple(kv.shape)}"
        )
    apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, True, seqlen_offsets)
    return kv


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding with angles base^(-2i / dim) a position, kept for as many positions as were
    asked for; with scale_base, also the scaling of XPos (Sun et al. 2022, arXiv:2212.10554).

    Args:
        dim: rotary_dim, even.
        base: of the angles.
        interleaved: pairs are neighbouring columns instead of halves.
        scale_base: positions over which XPos scales by a step; None: no scaling.
        device: of the module's buffers.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ValueError(f"dim: expected an even number of columns, got {dim}")
        self.dim, self.base = dim, float(base)
        self.interleaved, self.scale_base = interleaved, scale_base
        self.register_buffer("inv_freq", self._make_inv_freq(device), persistent=False)
        even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
        scale = None if scale_base is None else (even + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self.inv_freq: Tensor
        self.scale: Tensor | None
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _make_inv_freq(self, device: torch.device | str | None) -> Tensor:
        """Angle that each pair of columns turns by from position to position."""
        even = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return self.base ** (-even / self.dim)

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes cosines and sines of `seqlen` positions, if those at hand don't serve."""
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == (device or cached.device)
            and cached.dtype == (dtype or cached.dtype)
            and not (self.training and cached.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        # Made anew where a cast of the module has made the buffer 16-bit: angles of far positions
        # would be off by whole turns.
        is_fp32 = self.inv_freq.dtype == torch.float32
        inv_freq = self.inv_freq.to(position) if is_fp32 else self._make_inv_freq(device)
        angles = torch.outer(position, inv_freq)
        cos, sin = angles.cos(), angles.sin()
        if self.scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        assert self.scale_base is not None
        # A score has the scale of a difference of positions: the centre matters to range alone.
        power = (position - seqlen // 2) / self.scale_base
        scale = self.scale.to(device=device, dtype=torch.float32) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates queries and keys in place.

        Args:
            qkv: as for apply_rotary_emb_qkv_(); or the queries alone, (batch, seqlen, heads,
                head_dim), with kv.
            kv: (batch, seqlen, 2, heads, head_dim), or None.
            seqlen_offset: position of the first token: an int, or (batch,) int with max_seqlen.
            max_seqlen: positions to make at least.
            num_heads_q: query heads of a packed tensor of grouped queries.

        Returns:
            qkv, or (q, kv).
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        elif isinstance(seqlen_offset, Tensor):
            raise ValueError(
                "max_seqlen: expected the most positions of a sequence beside a tensor of "
                "seqlen_offset, got None"
            )
        else:
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, qkv.device, qkv.dtype)
        assert self._cos_cached is not None and self._sin_cached is not None
        angles = (self._cos_cached, self._sin_cached)
        k_angles = (self._cos_k_cached, self._sin_k_cached)
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, *angles, *k_angles, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, *angles, self.interleaved, True, seqlen_offset)
        cos_k, sin_k = angles if self.scale is None else k_angles
        assert cos_k is not None and sin_k is not None
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
