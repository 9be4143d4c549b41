"""The ops `torch.ops.flash_attn_3`: fwd, bwd and fwd_combine, on every device that flash_attn has.

Schemas are those of FlashAttention-3. A row that sees no key has softmax_lse -inf here, where
flash_attn's own functions say +inf. What these kernels lack raises NotImplementedError. num_splits,
pack_gqa, sm_margin and scheduler_metadata say how to spread the work over a GPU, which is decided
here; no result depends on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_attn import problem
from flash_attn.autograd import forward_only
from flash_attn.extras import Extras, given, longest
from flash_attn.kvcache import flash_attn_with_kvcache
from flash_attn.ops import backward_flops, forward_flops
from flash_attn.paged import gather_pages
from flash_attn.private_ops import run_backward

_FWD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new=None, Tensor(v_new!)? v_new=None, "
    "Tensor? q_v=None, Tensor(out!)? out=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "Tensor? page_table=None, Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? seqlens_rotary=None, "
    "Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int attention_chunk=0, float softcap=0.0, "
    "bool is_rotary_interleaved=False, Tensor? scheduler_metadata=None, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0) -> (Tensor(out!), Tensor, Tensor, Tensor)"
)
_BWD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, "
    "Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, "
    "Tensor? seqused_k=None, int? max_seqlen_q=None, int? max_seqlen_k=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, float softcap=0.0, bool deterministic=False, int sm_margin=0) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_COMBINE = (
    "fwd_combine(Tensor out_partial, Tensor lse_partial, Tensor(out!)? out=None, "
    "ScalarType? out_dtype=None) -> (Tensor(out!), Tensor)"
)


def refuse(attention_chunk: int = 0, **tensors: Tensor | None) -> None:
    """Raises for arguments that these kernels have nothing for."""
    for name, tensor in tensors.items():
        if tensor is not None:
            raise NotImplementedError(f"flash_attn_3: {name}: expected None, got a tensor")
    if attention_chunk != 0:
        raise NotImplementedError(
            f"flash_attn_3: attention_chunk: expected 0 (off), got {attention_chunk}; window_size "
            "bounds what a query sees"
        )


def may_have_empty_rows(q: Tensor, k: Tensor, window: tuple[int, int], extras: Extras) -> bool:
    """False if the host knows that every row sees a key: its own, on the diagonal of the mask."""
    if extras:
        return True
    return k.size(1) == 0 or (window != problem.UNBOUNDED and k.size(1) < q.size(1))


def minus_inf_where_empty(softmax_lse: Tensor) -> Tensor:
    return torch.where(softmax_lse == math.inf, -math.inf, softmax_lse)


def _nothing(q: Tensor, count: int) -> list[Tensor]:
    """Results that these kernels have no use for. An op's results are tensors of their own."""
    return [q.new_empty(0, dtype=torch.float32) for _ in range(count)]


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    q_v: Tensor | None = None,
    out: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    is_rotary_interleaved: bool = False,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, ...]:
    """out and softmax_lse of dense, packed, cached or paged tensors; two empty tensors."""
    refuse(
        attention_chunk,
        q_v=q_v,
        cu_seqlens_k_new=cu_seqlens_k_new,
        seqused_q=seqused_q,
        seqlens_rotary=seqlens_rotary,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
    )
    window = problem.bounds_of(is_causal, window_size_left, window_size_right)
    if cu_seqlens_q is None and (k_new is not None or page_table is not None):
        result, softmax_lse = flash_attn_with_kvcache(
            q,
            k,
            v,
            k_new,
            v_new,
            rotary_cos,
            rotary_sin,
            seqused_k,
            kv_batch_idx,
            leftpad_k,
            page_table,
            softmax_scale,
            window_size=window,
            softcap=softcap,
            rotary_interleaved=is_rotary_interleaved,
            return_softmax_lse=True,
        )
        result = result if out is None else out.copy_(result)
        return result, minus_inf_where_empty(softmax_lse), *_nothing(q, 2)
    refuse(k_new=k_new, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    if page_table is not None:
        k, v = gather_pages(k, page_table), gather_pages(v, page_table)
    extras = given(
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_k=seqused_k,
        leftpad_k=leftpad_k,
        batch_idx_k=kv_batch_idx,
    )
    options: Extras = {**extras, **({"softcap": softcap} if softcap != 0.0 else {})}
    if cu_seqlens_q is not None and max_seqlen_q is not None:
        options |= longest(max_seqlen_q)
    scale = problem.scale_of(softmax_scale, q.size(-1))
    out, softmax_lse = forward_only((q, k, v), scale, *window, options, out)
    if may_have_empty_rows(q, k, window, extras):
        softmax_lse = minus_inf_where_empty(softmax_lse)
    return out, softmax_lse, *_nothing(q, 2)


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
) -> tuple[Tensor, ...]:
    """Writes dq, dk and dv; rowsum(dout * out), rows padded to 128, and four empty tensors."""
    refuse(seqused_q=seqused_q, seqused_k=seqused_k)
    for name, gradient in (("dq", dq), ("dk", dk), ("dv", dv)):
        if gradient is None:
            raise ValueError(f"{name}: expected a tensor to write to, got None")
    window = problem.bounds_of(is_causal, window_size_left, window_size_right)
    extras = given(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if may_have_empty_rows(q, k, window, extras):
        softmax_lse = torch.where(softmax_lse == -math.inf, math.inf, softmax_lse)
    options: Extras = {**extras, **({"softcap": softcap} if softcap != 0.0 else {})}
    softmax_d = run_backward(
        (dout, q, k, v, out, softmax_lse),
        (dq, dk, dv),
        problem.scale_of(softmax_scale, q.size(-1)),
        window,
        deterministic,
        0.0,
        None,
        options,
    )
    return softmax_d, *_nothing(q, 4)


def fwd_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of all keys from (parts, batch, seqlen, heads, head_dim) outputs of parts of them
    and their (parts, batch, seqlen, heads) softmax_lse: out and softmax_lse without parts."""
    if out_partial.dim() != 5 or lse_partial.shape != out_partial.shape[:-1]:
        raise ValueError(
            "lse_partial: expected the shape of out_partial (parts, batch, seqlen, heads, "
            f"head_dim), head_dim apart, got {tuple(lse_partial.shape)} beside "
            f"{tuple(out_partial.shape)}"
        )
    softmax_lse = torch.logsumexp(lse_partial.float(), dim=0)
    weights = torch.exp(lse_partial - softmax_lse).nan_to_num(nan=0.0)  # nan: no part has a key
    result = (weights[..., None] * out_partial).sum(dim=0)
    if out is not None:
        return out.copy_(result), softmax_lse
    return result.to(out_dtype or out_partial.dtype), softmax_lse


def _define(schema: str, implementation: Callable[..., Any]) -> None:
    """Registers a function as an op. It is its own fake: the ops inside have fakes."""
    name = implementation.__name__
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attn_3::{name}", implementation, lib=_library)


def _flops(name: str, formula: Callable[..., int]) -> None:
    """flash_attn's own count of the op's tensors, which it finds by their names."""
    packet = getattr(torch.ops.flash_attn_3, name)
    names = [argument.name for argument in packet.default._schema.arguments]

    def count(*arguments: Any, **options: Any) -> int:
        return formula(**{**dict(zip(names, arguments, strict=False)), **options})

    register_flop_formula(packet, get_raw=True)(count)


_library: Any = torch.library.Library("flash_attn_3", "DEF")  # type: ignore[no-untyped-call]
_define(_FWD, fwd)
_define(_BWD, bwd)
_define(_COMBINE, fwd_combine)
_flops("fwd", forward_flops)
_flops("bwd", backward_flops)
