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
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from flash_attn.extras import check_bias, check_extras
from flash_attn.problem import check_qkv

OLDEST_TORCH = (2, 10)  # whose stable ABI the module is written for
OLDEST_GPU = (8, 0)  # Ampere
ROW_PADDING = 128  # rows of softmax_d are padded to a multiple of this
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


def too_old_torch(version: str) -> str | None:
    """What to do if the installed torch is older than the module can run with."""
    found = tuple(map(int, version.split(".")[:2]))
    if found >= OLDEST_TORCH:
        return None
    oldest = "{}.{}".format(*OLDEST_TORCH)
    return f"it needs torch {oldest} or later, this is {version}: pip install 'torch>={oldest}'"


def _load() -> str | None:
    """Registers the compiled ops; the reason if that isn't possible."""
    if too_old := too_old_torch(torch.__version__):
        return too_old
    try:
        importlib.import_module("flash_attn._C")
    except (ImportError, OSError) as error:
        return str(error)
    return None


load_error: str | None = _load()


def _raise_not_loaded(*args: Any, **kwargs: Any) -> NoReturn:
    build_it = (
        ". Build it with `pip install .` (needs a C++20 compiler; without a GPU or nvcc the CPU "
        "backend is built)."
    )
    remedy = "" if too_old_torch(torch.__version__) else build_it
    raise RuntimeError(
        "flash_attn: expected the compiled module flash_attn/_C.abi3.so, which could not be "
        f"loaded: {load_error}{remedy}"
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
forward_with_max_logits: Any
forward_into: Any
backward: Any
cuda_archs: tuple[str, ...]
if load_error is None:
    forward = torch.ops.flash_attn.forward.default
    forward_eager = getattr(forward, "_op", forward)
    forward_with_max_logits = torch.ops.flash_attn.forward_with_max_logits.default
    forward_into = torch.ops.flash_attn.forward_into.default
    backward = torch.ops.flash_attn.backward.default
    cuda_archs = tuple(build_info()["cuda_archs"])
else:
    forward = forward_eager = forward_with_max_logits = _raise_not_loaded
    forward_into = backward = _raise_not_loaded
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
    """For what needs CUDA kernels in a build without them."""
    if load_error is not None:
        _raise_not_loaded()
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability()) < OLDEST_GPU:
        raise RuntimeError(
            f"flash_attn: this GPU is sm_{found[0]}{found[1]}, older than Ampere (sm_80), the "
            "oldest that there are kernels for. Use a newer GPU, tensors on the CPU, or torch's "
            "scaled_dot_product_attention."
        )
    raise RuntimeError(
        "flash_attn: CUDA tensors need CUDA kernels, but this build holds the CPU backend only. "
        f"Build the CUDA backends (needs nvcc, but no GPU): {_INSTALL_CUDA}"
    )


def softmax_d_shape(q: Tensor, cu_seqlens_q: Tensor | None) -> tuple[int, ...]:
    """(batch, heads, seqlen_q), or (heads, total_q + 128 * batch) of packed queries, with the rows
    rounded up to a multiple of 128.

    Row i of packed sequence b is at (cu_seqlens_q[b] + 128 * b) // 128 * 128 + i.
    """
    if cu_seqlens_q is None:
        batch_size, seqlen_q, heads, _ = q.shape
        return batch_size, heads, -(-seqlen_q // ROW_PADDING) * ROW_PADDING
    rows = q.size(0) + ROW_PADDING * (cu_seqlens_q.numel() - 1)
    return q.size(1), -(-rows // ROW_PADDING) * ROW_PADDING


def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    *,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    allow_tf32: bool = False,
    max_seqlen_q: int = 0,
    **tensors: Tensor | None,
) -> tuple[Tensor, Tensor]:
    is_packed = tensors.get("cu_seqlens_q") is not None
    k_is_packed = tensors.get("cu_seqlens_k") is not None
    any_batch = is_packed or tensors.get("batch_idx_k") is not None
    check_qkv(q, k, v, is_packed, k_is_packed, any_batch)
    check_extras(q, tensors)
    if tensors.get("bias") is not None:
        check_bias(q, k, tensors["bias"])
    lse_shape = (q.size(1), q.size(0)) if is_packed else (q.size(0), q.size(2), q.size(1))
    softmax_lse = q.new_empty(lse_shape, dtype=torch.float32)
    return q.new_empty((*q.shape[:-1], v.size(-1))), softmax_lse


def _forward_with_max_logits_fake(
    q: Tensor, *args: Any, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out, softmax_lse = _forward_fake(q, *args, **options)
    return out, softmax_lse, q.new_empty(q.size(-2), dtype=torch.float32)


def _forward_into_fake(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *arguments: Any, **options: Any
) -> Tensor:
    return _forward_fake(q, k, v, *arguments, **options)[1]


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
    *,
    cu_seqlens_q: Tensor | None = None,
    **options: Any,
) -> Tensor:
    return q.new_empty(softmax_d_shape(q, cu_seqlens_q), dtype=torch.float32)


def _lengths(tensor: Tensor, cu_seqlens: Tensor | None, batch_size: int) -> list[int]:
    """Rows of every sequence; of packed ones without values, as if they were equally long."""
    if cu_seqlens is None:
        return [tensor.shape[1]] * batch_size
    if cu_seqlens.is_meta or isinstance(cu_seqlens, FakeTensor):
        return [tensor.shape[0] // max(batch_size, 1)] * batch_size
    return cu_seqlens.diff().tolist()


def _pairs(q: Tensor, k: Tensor, options: dict[str, Any]) -> int:
    """Pairs of a query head's row and a key over the batch, counted without a mask."""
    cu_seqlens_q, cu_seqlens_k = options.get("cu_seqlens_q"), options.get("cu_seqlens_k")
    batch_size = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    lengths_q = _lengths(q, cu_seqlens_q, batch_size)
    lengths_k = _lengths(k, cu_seqlens_k, batch_size)
    pairs = sum(rows * keys for rows, keys in zip(lengths_q, lengths_k, strict=True))
    return int(q.shape[-2]) * pairs


def forward_flops(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> int:
    """Two matrix products, counted without a mask, as torch counts its own attention."""
    return 2 * _pairs(q, k, options) * (q.shape[-1] + v.shape[-1])


def backward_flops(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any
) -> int:
    """Five matrix products: the scores again, dq and dk; dP and dv."""
    return 2 * _pairs(q, k, options) * (3 * q.shape[-1] + 2 * v.shape[-1])


if load_error is None:
    torch.library.register_fake("flash_attn::forward")(_forward_fake)
    torch.library.register_fake("flash_attn::forward_with_max_logits")(
        _forward_with_max_logits_fake
    )
    torch.library.register_fake("flash_attn::forward_into")(_forward_into_fake)
    torch.library.register_fake("flash_attn::backward")(_backward_fake)
    for op in ("forward", "forward_with_max_logits", "forward_into"):
        register_flop_formula(getattr(torch.ops.flash_attn, op), get_raw=True)(forward_flops)
    register_flop_formula(torch.ops.flash_attn.backward, get_raw=True)(backward_flops)
