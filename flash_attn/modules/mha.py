"""Multi-head attention with its projections: self and cross attention, grouped queries, rotary
embedding, ALiBi, windows, and a cache for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_attn.flash_attn_interface import flash_attn_with_kvcache
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.modules.attention import (
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from flash_attn.utils.generation import InferenceParams

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "SelfAttention",
    "get_alibi_slopes",
]

_CONV_SIZE = 3  # tokens that the depthwise convolution sees: its own and those before it


def _reject(name: str, expected: str, got: object) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got}")


class MHA(nn.Module):
    """Projections, attention and output projection.

    Parameters are `Wqkv` (query heads, key heads, value heads, one after the other), or `Wq` and
    `Wkv` with cross_attn, and `out_proj`.

    Args:
        embed_dim: columns of the inputs and of the output.
        num_heads, num_heads_kv: of queries, and of keys and values (default: as many).
        cross_attn: keys and values come from x_kv.
        qkv_proj_bias, out_proj_bias: whether the projections add a bias.
        dropout: of the attention's probabilities while training.
        softmax_scale, causal, window_size: as for `flash_attn_func`.
        layer_idx: number of the layer: its key in the caches of decoding.
        dwconv: a causal depthwise convolution over 3 tokens behind the first projection.
        rotary_emb_dim, rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved: rotary
            embedding of queries and keys, as `RotaryEmbedding` has it; 0: none.
        use_alibi: ALiBi with the slopes of `get_alibi_slopes`.
        fused_bias_fc: taken for the callers that pass it: the bias is always part of the product.
        use_flash_attn: tiled attention instead of standard one. window_size, use_alibi and packed
            sequences need it.
        return_residual: also return x, for a residual branch.
        checkpointing: recompute the attention in the backward.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: Sequence[SupportsIndex] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self._check_sizes()
        self.head_dim = embed_dim // num_heads
        self.cross_attn, self.causal, self.layer_idx = cross_attn, causal, layer_idx
        self.softmax_scale, self.window_size = softmax_scale, tuple(window_size)
        self.dwconv, self.use_flash_attn = dwconv, use_flash_attn
        self.rotary_emb_dim = rotary_emb_dim
        self.return_residual, self.checkpointing = return_residual, checkpointing
        slopes = None
        if use_alibi:
            slopes = torch.tensor(get_alibi_slopes(num_heads), device=device)
        self._check_options(use_alibi)
        if rotary_emb_dim > 0:
            options = (rotary_emb_base, rotary_emb_interleaved, rotary_emb_scale_base, device)
            self.rotary_emb = RotaryEmbedding(rotary_emb_dim, *options)
        kv_dim = 2 * self.head_dim * self.num_heads_kv
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **kind)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **kind)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **kind)
        if dwconv and cross_attn:
            self.dwconv_q = self._convolution(embed_dim, kind)
            self.dwconv_kv = self._convolution(kv_dim, kind)
        elif dwconv:
            self.dwconv_qkv = self._convolution(embed_dim + kv_dim, kind)
        common: dict[str, Any] = {"causal": causal, "softmax_scale": softmax_scale}
        common["attention_dropout"] = dropout
        if use_flash_attn:
            common |= {"alibi_slopes": slopes, "window_size": self.window_size}
        self_attention = FlashSelfAttention if use_flash_attn else SelfAttention
        cross_attention = FlashCrossAttention if use_flash_attn else CrossAttention
        self.inner_attn: nn.Module = self_attention(**common)
        self.inner_cross_attn: nn.Module = cross_attention(**common)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **kind)

    def _check_sizes(self) -> None:
        if self.embed_dim % self.num_heads != 0:
            _reject("embed_dim", f"a multiple of num_heads ({self.num_heads})", self.embed_dim)
        if self.num_heads % self.num_heads_kv != 0:
            expected = f"a multiple of num_heads_kv ({self.num_heads_kv})"
            _reject("num_heads", expected, self.num_heads)

    def _check_options(self, use_alibi: bool) -> None:
        if not self.use_flash_attn and use_alibi:
            _reject("use_flash_attn", "True beside use_alibi", False)
        if not self.use_flash_attn and self.window_size != (-1, -1):
            _reject("use_flash_attn", "True beside window_size", False)
        if self.cross_attn and self.rotary_emb_dim > 0:
            _reject("rotary_emb_dim", "0 beside cross_attn", self.rotary_emb_dim)

    @staticmethod
    def _convolution(columns: int, kind: dict[str, Any]) -> nn.Conv1d:
        padding = _CONV_SIZE - 1
        return nn.Conv1d(columns, columns, _CONV_SIZE, padding=padding, groups=columns, **kind)

    @staticmethod
    def _convolved(convolution: nn.Conv1d, x: Tensor) -> Tensor:
        """Over the tokens of x (batch, seqlen, columns), of which none sees those after it."""
        out: Tensor = convolution(x.transpose(1, 2))
        return out[..., : x.size(1)].transpose(1, 2).contiguous()

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A cache of this layer, (batch_size, max_seqlen, 2, num_heads_kv, head_dim)."""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return torch.empty(shape, dtype=dtype or weight.dtype, device=weight.device)

    def _cache(self, kv: Tensor, inference_params: InferenceParams) -> Tensor:
        """The part of this layer's cache for the batch of kv, made at the first call."""
        if self.layer_idx is None:
            _reject("layer_idx", "a number beside inference_params", None)
        assert self.layer_idx is not None
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(
                inference_params.max_batch_size, inference_params.max_seqlen, kv.dtype
            )
        first = inference_params.batch_size_offset
        return caches[self.layer_idx][first : first + kv.size(0)]

    def _projected(
        self, x: Tensor, x_kv: Tensor | None, subset: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """q (..., heads, head_dim) and kv (..., 2, heads_kv, head_dim), and where they are parts of
        one tensor with as many heads each, that tensor (..., 3, heads, head_dim)."""
        if self.cross_attn:
            q = self.Wq(x if subset is None else x[:, subset])
            kv = self.Wkv(x if x_kv is None else x_kv)
            if self.dwconv:
                q, kv = self._convolved(self.dwconv_q, q), self._convolved(self.dwconv_kv, kv)
            q = q.unflatten(-1, (self.num_heads, self.head_dim))
            return q, kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim)), None
        qkv = self.Wqkv(x)
        if self.dwconv:
            qkv = self._convolved(self.dwconv_qkv, qkv)
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        q, kv = qkv[..., : self.num_heads, :], qkv[..., self.num_heads :, :]
        is_even = self.num_heads == self.num_heads_kv
        packed = qkv.unflatten(-2, (3, self.num_heads)) if is_even else None
        return q, kv.unflatten(-2, (2, self.num_heads_kv)), packed

    def _rotate(
        self, q: Tensor, kv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None
    ) -> None:
        """Rotary embedding in place, if the module has it."""
        if self.rotary_emb_dim == 0:
            return
        if cu_seqlens is None:
            self.rotary_emb(q, kv, 0, max_seqlen)
        elif max_seqlen is not None:
            self._rotate_packed(q, kv, cu_seqlens, max_seqlen)

    def _rotate_packed(self, q: Tensor, kv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> None:
        """Rotary embedding of packed sequences, in place."""
        rotary = self.rotary_emb
        rotary._update_cos_sin_cache(max_seqlen, q.device, q.dtype)
        cos, sin = rotary._cos_cached, rotary._sin_cached
        cos_k, sin_k = (
            (cos, sin) if rotary.scale is None else (rotary._cos_k_cached, rotary._sin_k_cached)
        )
        assert cos is not None and sin is not None and cos_k is not None and sin_k is not None
        options = (rotary.interleaved, True, 0, cu_seqlens)
        apply_rotary_emb(q, cos, sin, *options)
        apply_rotary_emb(kv[:, 0], cos_k, sin_k, *options)

    def _attend(self, attention: nn.Module, *tensors: Tensor, **options: Any) -> Tensor:
        """Attention of projected and rotated tensors, recomputed in the backward if so asked."""
        if self.checkpointing and self.training:
            again: Any = checkpoint
            out = again(attention, *tensors, use_reentrant=False, **options)
        else:
            out = attention(*tensors, **options)
        assert isinstance(out, Tensor)
        return out

    def _decoded(self, q: Tensor, kv: Tensor, inference_params: InferenceParams) -> Tensor:
        """Appends kv to the cache and attends to all that is there, in one call."""
        cache = self._cache(kv, inference_params)
        lengths = inference_params.lengths_per_sample
        offset = inference_params.seqlen_offset if lengths is None else lengths
        options: dict[str, Any] = {}
        if self.rotary_emb_dim > 0:
            self.rotary_emb._update_cos_sin_cache(inference_params.max_seqlen, q.device, q.dtype)
            options["rotary_cos"] = self.rotary_emb._cos_cached
            options["rotary_sin"] = self.rotary_emb._sin_cached
            options["rotary_interleaved"] = self.rotary_emb.interleaved
        slopes: Any = self.inner_cross_attn.alibi_slopes
        options["alibi_slopes"] = None if slopes is None else slopes.float()
        options |= {"causal": self.causal, "softmax_scale": self.softmax_scale}
        options |= {"window_size": self.window_size, "cache_seqlens": offset}
        out = flash_attn_with_kvcache(
            q, cache[:, :, 0], cache[:, :, 1], kv[:, :, 0], kv[:, :, 1], **options
        )
        assert isinstance(out, Tensor)
        return out

    def _cached(self, q: Tensor, kv: Tensor, inference_params: InferenceParams) -> Tensor:
        """Attention with a cache. The prompt, and what isn't tiled, reads the cache as a tensor."""
        offset, lengths = inference_params.seqlen_offset, inference_params.lengths_per_sample
        has_scale = self.rotary_emb_dim > 0 and self.rotary_emb.scale is not None
        if self.use_flash_attn and offset > 0 and not has_scale:
            return self._decoded(q, kv, inference_params)
        if offset > 0 and lengths is not None:
            expected = "None without use_flash_attn or with rotary_emb_scale_base"
            _reject("lengths_per_sample", expected, "a tensor")
        if self.rotary_emb_dim > 0:
            self.rotary_emb(q, kv, offset, inference_params.max_seqlen)
        cache = self._cache(kv, inference_params)
        end = offset + kv.size(1)
        if end > cache.size(1):
            _reject("max_seqlen", f"room for {end} rows in the cache", cache.size(1))
        cache[:, offset:end] = kv
        return self._attend(self.inner_cross_attn, q, cache[:, :end])

    def _check_call(self, x: Tensor, packed: bool, masked: bool, cached: bool) -> None:
        if packed and not self.use_flash_attn:
            _reject("use_flash_attn", "True with packed sequences", False)
        if masked and self.use_flash_attn:
            _reject("key_padding_mask", "None with use_flash_attn (pack the sequences)", "a tensor")
        if cached and (packed or masked or self.cross_attn or self.dwconv):
            what = "None with cu_seqlens, key_padding_mask, cross_attn or dwconv"
            _reject("inference_params", what, "a value")
        if packed and self.dwconv:
            _reject("cu_seqlens", "None with dwconv", "a tensor")
        rank = 2 if packed else 3
        if x.dim() != rank or x.size(-1) != self.embed_dim:
            rows = "total" if packed else "batch, seqlen"
            _reject("x", f"shape ({rows}, embed_dim = {self.embed_dim})", tuple(x.shape))

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: InferenceParams | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output, or (output, x) with return_residual.

        Args:
            x: (batch, seqlen, embed_dim), or (total, embed_dim) with cu_seqlens.
            x_kv: what keys and values are made of, with cross_attn; None: x.
            key_padding_mask: (batch, seqlen), True where a key takes part; for standard attention.
            cu_seqlens, max_seqlen: borders of packed sequences, (batch + 1,) int32; the longest.
            mixer_subset: index of the tokens that ask, with cross_attn; None: all.
            inference_params: caches; the tokens of x come behind seqlen_offset rows that are there.
            kwargs: cu_seqlens_k and max_seqlen_k of x_kv, with cross_attn and packed sequences.
        """
        packed, masked = cu_seqlens is not None, key_padding_mask is not None
        self._check_call(x, packed, masked, inference_params is not None)
        q, kv, qkv = self._projected(x, x_kv, mixer_subset)
        if inference_params is not None:
            out = self._cached(q, kv, inference_params)
        else:
            if cu_seqlens is not None and max_seqlen is None:
                _reject("max_seqlen", "an integer beside cu_seqlens", None)
            self._rotate(q, kv, cu_seqlens, max_seqlen)
            options: dict[str, Any] = {}
            if cu_seqlens is not None:
                options = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
            elif key_padding_mask is not None:
                options = {"key_padding_mask": key_padding_mask}
            if qkv is not None:
                out = self._attend(self.inner_attn, qkv, **options)
            else:
                if cu_seqlens is not None:
                    options["cu_seqlens_k"] = kwargs.get("cu_seqlens_k", cu_seqlens)
                    options["max_seqlen_k"] = kwargs.get("max_seqlen_k", max_seqlen)
                out = self._attend(self.inner_cross_attn, q, kv, **options)
        result: Tensor = self.out_proj(out.flatten(-2))
        return (result, x) if self.return_residual else result
