"""The implementations that are timed against each other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from problems import Problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Contender:
    """A differentiable function (q, k, v, problem) -> out of the problem's tensors, of which it
    reads the mask, the options and how they are packed; calls are made inside of selected()."""

    attention: Callable[[Tensor, Tensor, Tensor, Problem], Tensor]
    # Entered around many calls, because entering may cost twice as much as a small call.
    selected: Callable[[], AbstractContextManager[None]] = nullcontext

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        return self.attention(q, k, v, problem)


def refuse(problem: Problem, *, knows: Collection[str], packed: bool, window: bool) -> None:
    """Raises for what a contender does not know, so that it gets no figure."""
    if problem.window != (-1, -1) and not window:
        raise NotImplementedError("no windows")
    if problem.is_plain:
        return
    if problem.seqlens and not packed:
        raise NotImplementedError("no packed sequences")
    for name in ("softcap", "alibi", "dropout_p", "sink"):
        if getattr(problem, name) and name not in knows:
            raise NotImplementedError(f"no {name}")


def fa2_op(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
    """PyTorch's FlashAttention-2 with what scaled_dot_product_attention has no argument for. ALiBi
    is left out of PyTorch's build of it."""
    refuse(problem, knows=("dropout_p",), packed=True, window=True)
    borders = problem.borders(q.device) if problem.seqlens else None
    longest_q, longest_k = problem.seqlen_q, problem.seqlen_k
    left, right = problem.window
    return torch.ops.aten._flash_attention_forward(
        q, k, v, borders, borders, longest_q, longest_k, problem.dropout_p, problem.causal, False,
        window_size_left=left, window_size_right=right,
    )[0]  # fmt: skip


def sdpa(*backends: SDPBackend) -> Contender:
    """PyTorch's attention, restricted to the backends if any are named."""
    is_fa2 = backends == (SDPBackend.FLASH_ATTENTION,)

    def attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        if is_fa2 and (problem.seqlens or problem.window != (-1, -1)):
            return fa2_op(q, k, v, problem)
        refuse(problem, knows=("dropout_p",), packed=False, window=False)
        grouped = q.shape[2] != k.shape[2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=problem.causal, dropout_p=problem.dropout_p, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    if not backends:
        return Contender(attention)
    return Contender(attention, lambda: sdpa_kernel(list(backends)))


def through_torch(implementation: str) -> Contender:
    """PyTorch's attention on our kernels, by a name of PyTorch's registry of implementations; "FA3"
    finds them through the companion distribution."""
    import flash_attn  # noqa: F401

    registry, on_our_kernels = torch.nn.attention, sdpa(SDPBackend.FLASH_ATTENTION)
    if implementation not in registry.list_flash_attention_impls():
        raise ImportError(f"this PyTorch has no attention implementation {implementation}")

    @contextmanager
    def selected() -> Iterator[None]:
        registry.activate_flash_attention_impl(implementation)
        try:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                yield
        finally:
            registry.restore_flash_attention_impl()

    def attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        if not q.is_cuda:
            raise NotImplementedError("PyTorch has attention of its own on CPU")
        return on_our_kernels(q, k, v, problem)

    return Contender(attention, selected)


def with_mask(
    dense: Callable[..., Tensor], packed: Callable[..., Tensor], **options: bool
) -> Callable[..., Tensor]:
    """Two functions with the arguments that FlashAttention's functions share, by the problem."""

    def attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        keywords = dict(causal=problem.causal, window_size=problem.window, **options)
        if problem.is_plain:
            return dense(q, k, v, **keywords)
        keywords |= problem.options(q.device)
        if not problem.seqlens:
            return dense(q, k, v, **keywords)
        borders, longest = problem.borders(q.device), problem.seqlen_q
        return packed(q, k, v, borders, borders, longest, longest, **keywords)

    return attention


def ours(newest_kernel_family: int | None = None, **options: bool) -> Contender:
    from flash_attn import flash_attn_func, flash_attn_varlen_func, ops

    if ops.load_error is not None:
        raise ImportError(ops.load_error)
    attention = with_mask(flash_attn_func, flash_attn_varlen_func, **options)
    if newest_kernel_family is None:
        return Contender(attention)
    return Contender(attention, lambda: ops.newest_kernel_family(newest_kernel_family))


def ours_dense() -> Contender:
    """Packed sequences of equal lengths as a dense batch: what being packed costs."""
    contender = ours()

    def attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        if len(set(problem.seqlens)) != 1:
            raise NotImplementedError("for packed sequences of equal lengths")
        batch = (problem.batch_size, problem.seqlen_q)
        dense = replace(problem, seqlens=())
        return contender(*(x.unflatten(0, batch) for x in (q, k, v)), dense).flatten(0, 1)

    return Contender(attention)


def fa3(**options: bool) -> Contender:
    """FlashAttention-3 as a module `peer_fa3` on the path."""
    from peer_fa3 import flash_attn_func, flash_attn_varlen_func

    with_options = with_mask(flash_attn_func, flash_attn_varlen_func, **options)

    def attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        refuse(problem, knows=("softcap",), packed=True, window=True)
        return with_options(q, k, v, problem)

    return Contender(attention)


def fa4() -> Contender:
    """FlashAttention-4, whose distribution adds its subpackage to our package's path."""
    from flash_attn.cute import flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        refuse(problem, knows=(), packed=False, window=True)
        window = tuple(None if bound < 0 else bound for bound in problem.window)
        return flash_attn_func(q, k, v, causal=problem.causal, window_size=window)[0]

    return Contender(attention)


CONTENDERS: dict[str, Callable[[], Contender]] = {
    "ours": ours,
    "ours_det": lambda: ours(deterministic=True),
    "dense": ours_dense,
    "sm80": lambda: ours(newest_kernel_family=80),
    "fa2": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    "efficient": lambda: sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    "fa3": fa3,
    "fa3_det": lambda: fa3(deterministic=True),
    "fa4": fa4,
    "sdpa": sdpa,
    "sdpa_ours": lambda: through_torch("flash_attn"),
    "sdpa_fa3": lambda: through_torch("FA3"),
}


def load(names: list[str]) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that can be had, and why the others cannot."""
    # The source trees, if the packages are not installed.
    root = Path(__file__).resolve().parent.parent
    sys.path += [str(root), str(root / "companion" / "flash_attn_3")]
    contenders, why_not = {}, {}
    for name in names:
        try:
            contenders[name] = CONTENDERS[name]()
        except (ImportError, OSError, RuntimeError) as error:
            why_not[name] = f"{type(error).__name__}: {error}"
    return contenders, why_not
