"""Checks of a call's arguments: every error names the argument, what was expected and what came.

Those of tensors run where no compiled op does, which checks the same, and where one has refused its
arguments: then they turn that into a ValueError or TypeError of Python's.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NoReturn, SupportsIndex

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
UNBOUNDED = (-1, -1)  # the default of window_size
ANY_BATCH = -1  # a batch size that fits every other
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _reject(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {got}")


def check_tensor(name: str, tensor: Tensor, layout: str, rank: int) -> torch.Size:
    """Type, rank, head_dim and contiguous rows of one tensor. Returns its shape."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    shape = tensor.shape
    if len(shape) != rank:
        _reject(name, f"shape {layout}", tuple(shape))
    head_dim = shape[-1]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        _reject(name, f"head_dim from 1 to {MAX_HEAD_DIM}", head_dim)
    if tensor.stride(-1) != 1 and head_dim > 1:
        _reject(
            name,
            "a contiguous last dimension (stride 1; tensor.contiguous() makes one)",
            f"stride {tensor.stride(-1)}",
        )
    return shape


def check_kind(name: str, tensor: Tensor) -> None:
    """dtype and device that a backend exists for."""
    if not (tensor.is_cuda or tensor.is_cpu or tensor.is_meta):
        _reject(name, "a CPU or CUDA tensor", f"device {tensor.device}")
    if tensor.dtype not in _DTYPES:
        _reject(name, "dtype torch.float32, torch.bfloat16 or torch.float16", tensor.dtype)


def check_same_kind(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.dtype != q.dtype:
        _reject(name, f"the dtype of q ({q.dtype})", tensor.dtype)
    if tensor.device != q.device:
        _reject(name, f"the device of q ({q.device})", tensor.device)


def check_sizes(name: str, q: Sequence[int], batch_size: int, heads: int, head_dim: int) -> None:
    """Keys of the given sizes fit queries of shape q."""
    if len(q) == 4 and batch_size not in (q[0], ANY_BATCH):
        _reject(name, f"the batch size of q ({q[0]})", batch_size)
    if head_dim != q[-1]:
        _reject(name, f"the head_dim of q ({q[-1]})", head_dim)
    if heads == 0 or q[-2] == 0 or q[-2] % heads != 0:
        _reject("q", f"a number of heads that is a multiple of the {heads} heads of {name}", q[-2])


def _layout(is_packed: bool, suffix: str, columns: str) -> tuple[str, int]:
    rows = f"total_{suffix}" if is_packed else f"batch, seqlen_{suffix}"
    return f"({rows}, {columns})", 1 + columns.count(",") + (1 if is_packed else 2)


def check_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_is_packed: bool = False,
    k_is_packed: bool = False,
    any_batch: bool = False,
) -> None:
    """q, k and v of a call. `any_batch`: k and v may have another batch size than q."""
    q_shape = check_tensor("q", q, *_layout(q_is_packed, "q", "heads, head_dim"))
    k_shape = check_tensor("k", k, *_layout(k_is_packed, "k", "heads_k, head_dim"))
    v_shape = check_tensor("v", v, *_layout(k_is_packed, "k", "heads_k, head_dim_v"))
    check_kind("q", q)
    check_same_kind("k", k, q)
    check_same_kind("v", v, q)
    batch_size = ANY_BATCH if any_batch or k_is_packed else k_shape[0]
    check_sizes("k", q_shape, batch_size, k_shape[-2], k_shape[-1])
    if v_shape[:-1] != k_shape[:-1]:
        expected = f"the shape of k {tuple(k_shape)}, head_dim apart"
        _reject("v", expected, tuple(v_shape))


def check_kvpacked(q: Tensor, kv: Tensor, is_packed: bool = False) -> None:
    layout, rank = _layout(is_packed, "k", "2, heads_k, head_dim")
    q_shape = check_tensor("q", q, *_layout(is_packed, "q", "heads, head_dim"))
    kv_shape = check_tensor("kv", kv, layout, rank)
    check_kind("q", q)
    check_same_kind("kv", kv, q)
    if kv_shape[-3] != 2:
        _reject("kv", f"shape {layout}", tuple(kv_shape))
    check_sizes("kv", q_shape, ANY_BATCH if is_packed else kv_shape[0], kv_shape[-2], kv_shape[-1])


def check_qkvpacked(qkv: Tensor, is_packed: bool = False) -> None:
    rows, rank = ("total", 4) if is_packed else ("batch, seqlen", 5)
    layout = f"({rows}, 3, heads, head_dim)"
    shape = check_tensor("qkv", qkv, layout, rank)
    check_kind("qkv", qkv)
    if shape[-3] != 3 or shape[-2] == 0:
        _reject("qkv", f"shape {layout}", tuple(shape))


def scale_of(softmax_scale: float | None, head_dim: int) -> float:
    """The factor of q k^T; by default 1 / sqrt(head_dim)."""
    if softmax_scale is None:
        return float(head_dim**-0.5)
    scale = float(softmax_scale)
    if not math.isfinite(scale):
        _reject("softmax_scale", "a finite number or None", scale)
    return scale


def bounds_of(causal: bool, left: int | None, right: int | None) -> tuple[int, int]:
    """(window_left, window_right) as window_of(), where None and any negative are unbounded."""
    left, right = (-1 if bound is None or bound < 0 else bound for bound in (left, right))
    return left, 0 if causal else right


def window_of(causal: bool, window_size: Sequence[SupportsIndex]) -> tuple[int, int]:
    """(window_left, window_right) of the mask, -1 for unbounded. Elements may be 0-d tensors."""
    if window_size is UNBOUNDED:
        return -1, 0 if causal else -1
    try:
        left, right = window_size
        left, right = operator.index(left), operator.index(right)
    except (TypeError, ValueError) as error:
        raise type(error)(f"window_size: expected two integers, got {window_size}") from None
    if left < -1 or right < -1:
        _reject("window_size", "two integers, each -1 (unbounded) or more", (left, right))
    return left, 0 if causal else right
