"""`flash_attn_with_kvcache`: attention of new queries to cached keys and values, for inference."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from flash_attn import paged, problem
from flash_attn.autograd import forward_only
from flash_attn.extras import Extras, check_extras, check_vector, is_index, make_extras
from flash_attn.layers.rotary import apply_rotary_emb


@dataclass
class _Cache:
    """Keys and values of the batch entries: rows of a dense cache, or pages."""

    k: Tensor  # (entries, capacity, heads_k, head_dim), or (num_blocks, page, heads_k, head_dim)
    v: Tensor
    batch_idx: Tensor | None  # (batch,) int32: the entry of a dense cache; None: the same
    block_table: Tensor | None  # (batch, max_blocks) int32

    @property
    def capacity(self) -> int:
        """Rows of a batch entry at most."""
        if self.block_table is None:
            return self.k.size(1)
        return self.block_table.size(1) * self.k.size(1)

    def entries_of(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where rows (batch, seqlen) of the batch entries lie: first and second index into k and v,
        and whether there is such a row."""
        there = (positions >= 0) & (positions < self.capacity)
        if self.block_table is None:
            if self.batch_idx is None:
                entries = torch.arange(positions.size(0), device=positions.device)
            else:
                entries = self.batch_idx.to(torch.int64)
            first = entries[:, None].expand_as(positions)
            second = positions
        else:
            page = self.k.size(1)
            column = (positions // page).clamp(0, max(self.block_table.size(1) - 1, 0))
            first = self.block_table.to(torch.int64).gather(1, column)
            second = positions % page
        there = there & (first >= 0) & (first < self.k.size(0))
        return first.clamp(0, self.k.size(0) - 1), second.clamp(0, self.k.size(1) - 1), there

    def append(self, k: Tensor, v: Tensor, seqlens: int | Tensor) -> None:
        """Writes new rows (batch, seqlen_new, heads_k, head_dim) behind the `seqlens` that are
        there. Rows that would lie outside of the cache are not written."""
        if isinstance(seqlens, int) and self.batch_idx is None and self.block_table is None:
            rows = slice(seqlens, seqlens + k.size(1))
            self.k[:, rows].copy_(k)
            self.v[:, rows].copy_(v)
            return
        if k.size(0) * k.size(1) == 0 or self.k.size(0) * self.k.size(1) == 0:
            return
        new = torch.arange(k.size(1), device=k.device)
        starts = seqlens.to(torch.int64)[:, None] if isinstance(seqlens, Tensor) else seqlens
        positions = (starts + new).expand(k.size(0), k.size(1))
        first, second, there = (t.flatten() for t in self.entries_of(positions))
        # How many rows are there is known to the device alone. Those that aren't repeat what the
        # first one that is there writes; if none is, what the cache has in the first one's place.
        source = torch.arange(there.numel(), device=k.device)
        source = torch.where(there, source, there.to(torch.int32).argmax())
        at = (first[source], second[source])
        for cache, rows_new in ((self.k, k), (self.v, v)):
            values = torch.where(there.any(), rows_new.flatten(0, 1)[source], cache[at])
            cache.index_put_(at, values)


def _check_cache(q: Tensor, cache: _Cache) -> None:
    problem.check_tensor("q", q, "(batch, seqlen_q, heads, head_dim)", 4)
    problem.check_kind("q", q)
    for name, tensor in (("k_cache", cache.k), ("v_cache", cache.v)):
        if cache.block_table is None:
            problem.check_tensor(name, tensor, "(batch, capacity, heads_k, head_dim)", 4)
        else:
            paged.check_pages(name, tensor)
        problem.check_same_kind(name, tensor, q)
    k, v = cache.k, cache.v
    free = cache.block_table is not None or cache.batch_idx is not None
    batch = problem.ANY_BATCH if free else k.size(0)
    problem.check_sizes("k_cache", q.shape, batch, k.size(2), k.size(3))
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v_cache: expected the shape of k_cache {tuple(k.shape)}, head_dim apart, got "
            f"{tuple(v.shape)}"
        )
    if cache.block_table is not None:
        paged.check_block_table(cache.block_table, q, q.size(0))
        if cache.batch_idx is not None:
            raise ValueError("cache_batch_idx: expected None beside block_table, got a tensor")


def _check_new(k: Tensor | None, v: Tensor | None, q: Tensor, cache: _Cache) -> None:
    """The rows to append, and that they fit a cache of the right kind."""
    if (k is None) != (v is None):
        name, other = ("v", "k") if v is None else ("k", "v")
        raise ValueError(f"{name}: expected a tensor beside {other}, got None")
    for name, tensor, cached in (("k", k, cache.k), ("v", v, cache.v)):
        if tensor is None:
            continue
        problem.check_tensor(name, tensor, "(batch, seqlen_new, heads_k, head_dim)", 4)
        problem.check_same_kind(name, tensor, q)
        expected = (q.size(0), tensor.size(1), cached.size(2), cached.size(3))
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"{name}: expected shape (batch, seqlen_new, heads_k, head_dim) = ({expected[0]}, "
                f"..., {expected[2]}, {expected[3]}), got {tuple(tensor.shape)}"
            )
    if k is not None and v is not None and k.size(1) != v.size(1):
        raise ValueError(f"v: expected as many rows as k ({k.size(1)}), got {v.size(1)}")


def _check_capacity(
    seqlens: int | Tensor, new: int, cache: _Cache, rotary: tuple[Tensor, Tensor] | None
) -> None:
    """Where the host knows them, lengths fit. Those on a GPU are not waited for."""
    if isinstance(seqlens, Tensor):
        if not seqlens.is_cpu or torch.compiler.is_compiling() or seqlens.numel() == 0:
            return
        least, most = (int(value) for value in seqlens.aminmax())
    else:
        least = most = seqlens
    if least < 0:
        raise ValueError(f"cache_seqlens: expected lengths from 0 on, got {least}")
    if most + new > cache.capacity:
        what = "k_cache" if cache.block_table is None else "block_table"
        raise RuntimeError(
            f"{what}: expected room for cache_seqlens + new rows = {most} + {new}, got "
            f"{cache.capacity} rows a sequence"
        )
    if rotary is not None and most + new > rotary[0].size(0):
        raise ValueError(
            f"rotary_cos: expected at least cache_seqlens + new rows = {most} + {new} positions, "
            f"got {rotary[0].size(0)}"
        )


def _rotated(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlens: int | Tensor,
    interleaved: bool,
    is_masked: bool,
) -> tuple[Tensor, Tensor]:
    """q and the new k rotated by their positions in the cache."""
    options: dict[str, Any] = {"interleaved": interleaved, "seqlen_offsets": seqlens}
    k = apply_rotary_emb(k, cos, sin, **options)
    if is_masked:
        return apply_rotary_emb(q, cos, sin, **options), k
    # Without a mask all queries stand at the first new position.
    as_heads = q.reshape(q.size(0), 1, q.size(1) * q.size(2), q.size(3))
    return apply_rotary_emb(as_heads, cos, sin, **options).view_as(q), k


def _check_rotary(
    cos: Tensor | None, sin: Tensor | None, k: Tensor | None, q: Tensor
) -> tuple[Tensor, Tensor] | None:
    if cos is None and sin is None:
        return None
    if cos is None or sin is None:
        name, other = ("rotary_cos", "rotary_sin") if cos is None else ("rotary_sin", "rotary_cos")
        raise ValueError(f"{name}: expected a tensor beside {other}, got None")
    if k is None:
        raise ValueError("k: expected the new keys beside rotary_cos, got None")
    for name, tensor in (("rotary_cos", cos), ("rotary_sin", sin)):
        if tensor.dim() != 2 or 2 * tensor.size(1) > q.size(3):
            raise ValueError(
                f"{name}: expected shape (positions, rotary_dim / 2) with rotary_dim up to "
                f"{q.size(3)}, got {tuple(tensor.shape)}"
            )
        problem.check_same_kind(name, tensor, q)
    return cos, sin


def _check_per_batch(name: str, tensor: object, q: Tensor) -> None:
    if tensor is not None:
        check_vector(name, tensor, {"(batch,)": (q.size(0),)}, torch.int32, q.device)


def _seqlens_of(cache_seqlens: Any, q: Tensor) -> int | Tensor | None:
    """cache_seqlens as an int or a checked tensor."""
    if cache_seqlens is None:
        return None
    if isinstance(cache_seqlens, Tensor):
        _check_per_batch("cache_seqlens", cache_seqlens, q)
        return cache_seqlens
    if is_index(cache_seqlens):
        # An int that torch.compile traces stays what it is.
        is_int = isinstance(cache_seqlens, (int, torch.SymInt))
        return cache_seqlens if is_int else operator.index(cache_seqlens)
    raise TypeError(
        f"cache_seqlens: expected an int or a torch.Tensor, got {type(cache_seqlens).__name__}"
    )


def _attention_arguments(
    cache: _Cache, seqlens: int | Tensor | None, new: int, leftpad: Tensor | None
) -> tuple[Tensor, Tensor, Extras]:
    """k, v and options of the op for the cache with the new rows in it."""
    extras: Extras = {}
    k, v = cache.k, cache.v
    if cache.block_table is not None:
        k, v = (paged.gather_pages(pages, cache.block_table) for pages in (k, v))
    elif cache.batch_idx is not None:
        extras["batch_idx_k"] = cache.batch_idx
    if isinstance(seqlens, Tensor):
        extras["seqused_k"] = seqlens + new  # the op takes no more than there are
    elif seqlens is not None and seqlens + new < cache.capacity:
        k, v = k[:, : seqlens + new], v[:, : seqlens + new]
    if leftpad is not None:
        extras["leftpad_k"] = leftpad
    return k, v, extras


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: SupportsIndex | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[SupportsIndex] = problem.UNBOUNDED,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    sink: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q to cached keys and values, after appending k and v to the cache in place.

    One call is a step of decoding: the new keys are rotated and written behind the cache_seqlens
    rows that are there, and q sees cache_seqlens + seqlen_new keys. Masks are those of
    `flash_attn_func`, aligned to the last of these keys. No gradients flow.

    Args:
        q: (batch, seqlen_q, heads, head_dim).
        k_cache: (entries, capacity, heads_k, head_dim) with entries = batch unless cache_batch_idx
            is given; or pages (num_blocks, page_size, heads_k, head_dim) with block_table.
        v_cache: like k_cache, with a head_dim_v of its own.
        k, v: new rows, (batch, seqlen_new, heads_k, head_dim), or None. They need cache_seqlens.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), dtype of q: rotates k at cache_seqlens
            and on, and q likewise where a mask tells queries apart (causal or window_size),
            otherwise all of q at cache_seqlens.
        cache_seqlens: how many rows a sequence has: an int, or (batch,) int32. None: all.
        cache_batch_idx: (batch,) int32, the cache entry of a batch entry. Not with block_table.
        cache_leftpad: (batch,) int32, rows to leave out at the start of a sequence. The mask counts
            from the first row that is left; rotary positions count from the first row of all.
        block_table: (batch, max_blocks) int32: page n of a sequence. Any page size. The pages are
            gathered into a copy of batch * max_blocks * page_size rows.
        rotary_interleaved: pairs of columns are neighbours (GPT-J) instead of halves (GPT-NeoX).
        num_splits: taken for the callers that pass it. How the work is split is not theirs to say,
            and no result depends on it.
        return_softmax_lse: also return softmax_lse.
        The rest as for `flash_attn_func`.

    Returns:
        The output, (batch, seqlen_q, heads, head_dim_v); with return_softmax_lse=True also
        softmax_lse, (batch, heads, seqlen_q), float32.

    Raises:
        ValueError, TypeError: an argument isn't as described above.
        RuntimeError: the cache has no room for the new rows. Lengths on a GPU are not waited for:
            rows without room are left out there, as they are under torch.compile.
    """
    cache = _Cache(k_cache, v_cache, cache_batch_idx, block_table)
    _check_cache(q, cache)
    _check_new(k, v, q, cache)
    rotary = _check_rotary(rotary_cos, rotary_sin, k, q)
    seqlens = _seqlens_of(cache_seqlens, q)
    if k is not None and seqlens is None:
        raise ValueError("cache_seqlens: expected the lengths of the sequences beside k, got None")
    new = 0 if k is None else k.size(1)
    if seqlens is not None:
        _check_capacity(seqlens, new, cache, rotary)
    options = make_extras(0.0, softcap, alibi_slopes, sink, s_aux, q) or {}
    check_extras(q, options)
    _check_per_batch("cache_batch_idx", cache_batch_idx, q)
    _check_per_batch("cache_leftpad", cache_leftpad, q)
    window = problem.window_of(causal, window_size)
    scale = problem.scale_of(softmax_scale, q.size(3))
    with torch.no_grad():
        if k is not None and v is not None and seqlens is not None:
            if rotary is not None:
                is_masked = window != problem.UNBOUNDED
                q, k = _rotated(q, k, *rotary, seqlens, rotary_interleaved, is_masked)
            cache.append(k, v, seqlens)
        keys, values, extras = _attention_arguments(cache, seqlens, new, cache_leftpad)
        out, softmax_lse = forward_only((q, keys, values), scale, *window, {**extras, **options})
    return (out, softmax_lse) if return_softmax_lse else out
