"""Options of a call beyond scale and mask, as keyword arguments of the ops, and their checks.

A call without any of them has no dictionary at all: the way through the code that costs the least.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_attn.dropout import draw_rng_state

Extras = dict[str, Any]

_CPU = torch.device("cpu")
_PER_BATCH = ("seqused_k", "leftpad_k", "batch_idx_k")


def _reject(name: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{name}: expected {expected}, got {got}")


def _check_number(name: str, value: object, expected: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None
    return number


def make_extras(
    dropout_p: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sink: Tensor | None,
    s_aux: Tensor | None,
    q: Tensor,
    bias: Tensor | None = None,
    return_max_logits: bool = False,
) -> Extras | None:
    """What is on of the options of the public functions; None if nothing is.

    Draws the random state of dropout on the device of q.
    """
    extras: Extras = {}
    if softcap != 0.0:
        extras["softcap"] = _check_number("softcap", softcap, "a number from 0 (off) on")
        if not 0.0 < extras["softcap"] < math.inf:
            _reject("softcap", "a finite number from 0 (off) on", softcap)
    if alibi_slopes is not None:
        extras["alibi_slopes"] = alibi_slopes
    if sink is not None or s_aux is not None:
        if sink is not None and s_aux is not None:
            _reject("s_aux", "None beside sink, of which it is another name", "a tensor")
        extras["sink"] = _as_fp32("sink", sink if sink is not None else s_aux)
    if dropout_p != 0.0:
        extras["dropout_p"] = _check_number("dropout_p", dropout_p, "a number from 0 to below 1")
        if not 0.0 < extras["dropout_p"] < 1.0:
            _reject("dropout_p", "a probability from 0 to below 1", dropout_p)
        extras["rng_state"] = draw_rng_state(getattr(q, "device", _CPU))
    if bias is not None:
        extras["bias"] = bias
    if return_max_logits:
        extras["max_logits"] = True
    return extras or None


def given(**tensors: Tensor | None) -> Extras:
    """Those that are there."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _allows_tf32() -> bool:
    """torch.compile guards the setting itself: another one compiles anew."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# torch.compiler.assume_constant_result, which would import torch._dynamo: 1.8 s.
_allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


def with_precision(extras: Extras | None, q: Tensor) -> Extras | None:
    """`extras` of a call with CUDA tensors; with allow_tf32 if torch's matmul has it, in fp32."""
    if q.dtype != torch.float32 or not _allows_tf32():
        return extras
    return {**(extras or {}), "allow_tf32": True}


def _as_fp32(name: str, tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    return tensor if tensor.dtype == torch.float32 else tensor.float()


def _same_shape(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Size by size: `==` of tuples says no where torch.compile traces sizes that vary."""
    if tensor.dim() != len(shape):
        return False
    return all([tensor.size(dim) == size for dim, size in enumerate(shape)])


def check_vector(
    name: str,
    tensor: object,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Type, shape (one of several, by layout), dtype, device and contiguity of a small tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if not any([_same_shape(tensor, shape) for shape in shapes.values()]):
        # Made here alone: torch.compile takes a size that becomes text for a constant.
        expected = " or ".join([f"{layout} = {shape}" for layout, shape in shapes.items()])
        _reject(name, f"shape {expected}", tuple(tensor.shape))
    if tensor.dtype != dtype:
        _reject(name, f"dtype {dtype}", tensor.dtype)
    if tensor.device != device:
        _reject(name, f"the device of q ({device})", tensor.device)
    if not tensor.is_contiguous():
        _reject(name, "a contiguous tensor", f"strides {tensor.stride()}")


def batch_size_of(q: Tensor, extras: Extras) -> int:
    cu_seqlens_q = extras.get("cu_seqlens_q")
    return q.size(0) if cu_seqlens_q is None else cu_seqlens_q.numel() - 1


def check_cu_seqlens(name: str, cu_seqlens: object, q: Tensor, batch: int | None) -> None:
    """cu_seqlens of `batch` sequences, or of any number of them."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
        _reject(name, "shape (batch + 1,)", tuple(cu_seqlens.shape))
    shape = (cu_seqlens.numel() if batch is None else batch + 1,)
    check_vector(name, cu_seqlens, {"(batch + 1,)": shape}, torch.int32, q.device)


def check_extras(q: Tensor, extras: Extras) -> None:
    """Tensors among the options: `q` has passed its checks."""
    cu_seqlens_q, cu_seqlens_k = extras.get("cu_seqlens_q"), extras.get("cu_seqlens_k")
    if cu_seqlens_q is not None:
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q, None)
    batch, heads = batch_size_of(q, extras), q.size(-2)
    if cu_seqlens_k is not None:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q, batch)
    for name in _PER_BATCH:
        if extras.get(name) is not None:
            check_vector(name, extras[name], {"(batch,)": (batch,)}, torch.int32, q.device)
    slopes, sink, rng_state = (extras.get(name) for name in ("alibi_slopes", "sink", "rng_state"))
    if slopes is not None:
        shapes = {"(heads,)": (heads,), "(batch, heads)": (batch, heads)}
        check_vector("alibi_slopes", slopes, shapes, torch.float32, q.device)
    if sink is not None:
        check_vector("sink", sink, {"(heads,)": (heads,)}, torch.float32, q.device)
    if rng_state is not None:
        check_vector("rng_state", rng_state, {"(seed, offset)": (2,)}, torch.int64, q.device)


def _shape_of_scores(q: Tensor, k: Tensor) -> tuple[int, ...]:
    return q.size(0), q.size(2), q.size(1), k.size(1)


def check_bias(q: Tensor, k: Tensor, bias: object) -> None:
    """Of dense q and k, which have passed their checks."""
    if not isinstance(bias, Tensor):
        raise TypeError(f"bias: expected a torch.Tensor, got {type(bias).__name__}")
    shape = _shape_of_scores(q, k)
    own = shape[len(shape) - min(bias.dim(), len(shape)) :]
    fits = [bias.size(dim) == size or bias.size(dim) == 1 for dim, size in enumerate(own)]
    if bias.dim() > len(shape) or not all(fits):
        expected = f"a shape that broadcasts to (batch, heads, seqlen_q, seqlen_k) = {shape}"
        _reject("bias", expected, tuple(bias.shape))
    if bias.dtype not in (q.dtype, torch.float32):
        expected = f"dtype torch.float32 or that of q ({q.dtype})"
        hint = " (of a mask make -inf where it hides keys)" if bias.dtype == torch.bool else ""
        _reject("bias", expected, f"{bias.dtype}{hint}")
    if bias.device != q.device:
        _reject("bias", f"the device of q ({q.device})", bias.device)


def check_deterministic_bias(q: Tensor, k: Tensor, bias: Tensor) -> None:
    """Where pairs share an element of the bias, their gradients are summed in no fixed order."""
    batch, heads, seqlen_q, seqlen_k = _shape_of_scores(q, k)
    if bias.numel() < batch * heads * seqlen_q * seqlen_k:
        raise ValueError(
            "deterministic: expected False with the gradient of a bias that is broadcast, of shape "
            f"{tuple(bias.shape)}, got True. A bias of the full shape, bias.expand(batch, heads, "
            "seqlen_q, seqlen_k), has its gradient summed by torch, in a fixed order and the "
            "memory of the full shape."
        )


def is_index(value: object) -> bool:
    """An integer, of whatever library, but no bool. torch.compile traces the question."""
    if isinstance(value, (int, torch.SymInt)):
        return not isinstance(value, bool)
    return hasattr(value, "__index__")


def longest(max_seqlen_q: object) -> Extras:
    """The longest packed sequence, by which kernels choose their tiles; nothing where a tensor
    holds it, and for torch.compile, which would compile anew for each value."""
    if isinstance(max_seqlen_q, Tensor) or torch.compiler.is_compiling():
        return {}
    return {"max_seqlen_q": operator.index(max_seqlen_q)}  # type: ignore[arg-type]


def check_max_seqlen(name: str, max_seqlen: object) -> None:
    """An int, or an integer tensor of one element: its value isn't read, to not wait for it."""
    if isinstance(max_seqlen, Tensor):
        if max_seqlen.numel() != 1 or max_seqlen.is_floating_point() or max_seqlen.is_complex():
            got = f"a tensor of shape {tuple(max_seqlen.shape)} and dtype {max_seqlen.dtype}"
            _reject(name, "an integer", got)
    elif not is_index(max_seqlen):
        raise TypeError(f"{name}: expected an integer, got {max_seqlen!r}")
    elif isinstance(max_seqlen, int) and max_seqlen < 0:
        _reject(name, "an integer from 0 on", max_seqlen)
