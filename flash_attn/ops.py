"""The compiled ops `torch.ops.flash_attn.*`: loading, fake kernels, flop counts.

Importing this module never fails: where the compiled module is missing or can't be loaded, a call
raises with the reason and the remedy.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn, TypedDict

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from flash_attn.problem import check_qkv

_ROW_PADDING = 128  # rows of softmax_d are padded to a multiple of this
_INSTALL_CUDA = (
    'FLASH_ATTN_CUDA_ARCHS="80;90" pip install --no-build-isolation --force-reinstall --no-deps .'
)


class BuildInfo(TypedDict):
    """What the compiled module was built with."""

    version: str
    torch_version: str  # whose headers; the module runs with any torch from 2.10 on
    cuda_version: str | None
    cuda_archs: list[str]  # ["80", "90"]; empty: CPU backend only
    kernels: str  # FLASH_ATTN_KERNELS of the build
    rows: list[str]  # compiled CUDA kernels, ["fwd/sm80/128/bf16", ...]


def _load() -> str | None:
    """Registers the compiled ops; the reason if that isn't possible."""
    try:
        importlib.import_module("flash_attn._C")
    except (ImportError, OSError) as error:
        return str(error)
    return None


load_error: str | None = _load()


def _raise_not_loaded(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "flash_attn: expected the compiled module flash_attn/_C.abi3.so, which could not be "
        f"loaded: {load_error}. Build it with `pip install .` (needs a C++20 compiler and "
        "torch >= 2.10; without a GPU or nvcc the CPU backend is built)."
    )


def build_info() -> BuildInfo:
    """What the compiled module was built with. Raises RuntimeError if there is none."""
    if load_error is not None:
        _raise_not_loaded()
    info: BuildInfo = json.loads(torch.ops.flash_attn.build_info.default())
    return info


# Read in the hot path, hence kept; overloads, because a packet resolves its overload at every call.
# forward_eager is what calling the overload comes down to outside of torch.compile.
forward: Any
forward_eager: Any
backward: Any
cuda_archs: tuple[str, ...]
if load_error is None:
    forward = torch.ops.flash_attn.forward.default
    forward_eager = getattr(forward, "_op", forward)
    backward = torch.ops.flash_attn.backward.default
    cuda_archs = tuple(build_info()["cuda_archs"])
else:
    forward = forward_eager = backward = _raise_not_loaded
    cuda_archs = ()


@contextmanager
def _limited(op_name: str, value: int) -> Iterator[None]:
    """Inside, the limit that an op sets and gives the last value of is `value`, in every thread."""
    limit = getattr(torch.ops.flash_attn, op_name).default
    previous = limit(value)
    try:
        yield
    finally:
        limit(previous)


def newest_kernel_family(arch: int) -> AbstractContextManager[None]:
    """Inside, GPU kernels of families newer than `arch` (80 or 90) serve no call, of any thread.

    For tests and benchmarks of the older families.
    """
    return _limited("limit_kernel_family", arch)


def backward_sections(heads: int) -> AbstractContextManager[None]:
    """Inside, the Hopper backward works on the keys of at most `heads` heads at a time.

    For tests: few heads make thread blocks wait for each other at every step.
    """
    return _limited("limit_backward_section", heads)


def raise_no_cuda_backend() -> NoReturn:
    """For a call with CUDA tensors in a build without CUDA kernels."""
    if load_error is not None:
        _raise_not_loaded()
    raise RuntimeError(
        "flash_attn: q is a CUDA tensor, but this build holds the CPU backend only. Build the CUDA "
        f"backends (needs nvcc, but no GPU): {_INSTALL_CUDA}"
    )


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor]:
    check_qkv(q, k, v)
    batch_size, seqlen_q, num_heads, _ = q.shape
    softmax_lse = q.new_empty((batch_size, num_heads, seqlen_q), dtype=torch.float32)
    return q.new_empty((batch_size, seqlen_q, num_heads, v.shape[3])), softmax_lse


def _backward_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    deterministic: bool,
) -> Tensor:
    batch_size, seqlen_q, num_heads, _ = q.shape
    rows = (seqlen_q + _ROW_PADDING - 1) // _ROW_PADDING * _ROW_PADDING
    return q.new_empty((batch_size, num_heads, rows), dtype=torch.float32)


def _forward_flops(
    q_shape: torch.Size, k_shape: torch.Size, v_shape: torch.Size, *args: Any, **kwargs: Any
) -> int:
    """Two matrix products, counted without a mask, as torch counts its own attention."""
    batch_size, seqlen_q, num_heads, head_dim = q_shape
    return 2 * batch_size * num_heads * seqlen_q * k_shape[1] * (head_dim + v_shape[3])


def _backward_flops(
    dout_shape: torch.Size,
    q_shape: torch.Size,
    k_shape: torch.Size,
    v_shape: torch.Size,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Five matrix products: the scores again, dq and dk; dP and dv."""
    batch_size, seqlen_q, num_heads, head_dim = q_shape
    width = 3 * head_dim + 2 * v_shape[3]
    return 2 * batch_size * num_heads * seqlen_q * k_shape[1] * width


if load_error is None:
    torch.library.register_fake("flash_attn::forward")(_forward_fake)
    torch.library.register_fake("flash_attn::backward")(_backward_fake)
    register_flop_formula(torch.ops.flash_attn.forward)(_forward_flops)
    register_flop_formula(torch.ops.flash_attn.backward)(_backward_flops)
