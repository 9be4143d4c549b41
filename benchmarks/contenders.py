"""The implementations that are timed against each other, and the check that each is right."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from problems import Problem
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Contender:
    """A differentiable function (q, k, v, problem) -> out of (batch, seqlen, heads, head_dim)
    tensors, of whose problem it reads the mask; calls are made inside of selected()."""

    attention: Callable[[Tensor, Tensor, Tensor, Problem], Tensor]
    # Entered around many calls, because entering may cost twice as much as a small call.
    selected: Callable[[], AbstractContextManager[None]] = nullcontext

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        return self.attention(q, k, v, problem)


# Error norm relative to the result's norm, above which a contender counts as wrong. Rounding the
# probabilities and the result to 16 bits gives a fifth to a third of it.
ERROR_BOUND = {torch.float32: 1e-4, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def sdpa(*backends: SDPBackend) -> Contender:
    """PyTorch's attention, restricted to the backends if any are named."""

    def attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        if problem.window != (-1, -1):
            raise NotImplementedError("no windows")
        grouped = q.shape[2] != k.shape[2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=grouped)
        return out.transpose(1, 2)

    if not backends:
        return Contender(attention)
    return Contender(attention, lambda: sdpa_kernel(list(backends)))


def with_mask(flash_attn_func: Callable[..., Tensor], **options: bool) -> Callable[..., Tensor]:
    """A function with the keyword arguments that FlashAttention's functions share."""
    return lambda q, k, v, problem: flash_attn_func(
        q, k, v, causal=problem.causal, window_size=problem.window, **options
    )


def ours(newest_kernel_family: int | None = None, **options: bool) -> Contender:
    from flash_attn import flash_attn_func, ops

    if ops.load_error is not None:
        raise ImportError(ops.load_error)
    attention = with_mask(flash_attn_func, **options)
    if newest_kernel_family is None:
        return Contender(attention)
    return Contender(attention, lambda: ops.newest_kernel_family(newest_kernel_family))


def fa3(**options: bool) -> Contender:
    """FlashAttention-3 as a module `peer_fa3` on the path."""
    from peer_fa3 import flash_attn_func

    return Contender(with_mask(flash_attn_func, **options))


def fa4() -> Contender:
    """FlashAttention-4, whose distribution adds its subpackage to our package's path."""
    from flash_attn.cute import flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> Tensor:
        window = tuple(None if bound < 0 else bound for bound in problem.window)
        return flash_attn_func(q, k, v, causal=problem.causal, window_size=window)[0]

    return Contender(attention)


CONTENDERS: dict[str, Callable[[], Contender]] = {
    "ours": ours,
    "ours_det": lambda: ours(deterministic=True),
    "sm80": lambda: ours(newest_kernel_family=80),
    "fa2": lambda: sdpa(SDPBackend.FLASH_ATTENTION),
    "cudnn": lambda: sdpa(SDPBackend.CUDNN_ATTENTION),
    "fa3": fa3,
    "fa3_det": lambda: fa3(deterministic=True),
    "fa4": fa4,
    "sdpa": sdpa,
}


def load(names: list[str]) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that can be had, and why the others cannot."""
    # The source tree, if the package is not installed.
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    contenders, why_not = {}, {}
    for name in names:
        try:
            contenders[name] = CONTENDERS[name]()
        except (ImportError, OSError, RuntimeError) as error:
            why_not[name] = f"{type(error).__name__}: {error}"
    return contenders, why_not


def reference(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, problem: Problem, rows: int = 2048
) -> dict[str, Tensor]:
    """out, dq, dk, dv of one key head in fp32: q, dout (seqlen_q, heads, head_dim), k, v (seqlen_k,
    head_dim). Of the problem it reads the mask; goes through `rows` queries at a time."""
    q, k, v, dout = (x.float() for x in (q, k, v, dout))
    seqlen_q, num_heads, head_dim = q.shape
    scale = 1 / math.sqrt(head_dim)
    out, dq, dk, dv = (torch.zeros_like(x) for x in (dout, q, k, v))
    left, right = problem.window[0], 0 if problem.causal else problem.window[1]
    columns = torch.arange(len(k), device=q.device)
    for head in range(num_heads):
        for start in range(0, seqlen_q, rows):
            part = slice(start, start + rows)
            scores = scale * q[part, head] @ k.T
            row = torch.arange(start, start + len(scores), device=q.device)[:, None]
            distance = columns - (row + len(k) - seqlen_q)
            if left >= 0:
                scores.masked_fill_(distance < -left, -math.inf)
            if right >= 0:
                scores.masked_fill_(distance > right, -math.inf)
            p = scores.softmax(-1)
            out[part, head] = p @ v
            dp = dout[part, head] @ v.T
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            dq[part, head] = scale * ds @ k
            dk += scale * ds.T @ q[part, head]
            dv += p.T @ dout[part, head]
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def sampled_references(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> list[tuple[int, int, dict[str, Tensor]]]:
    """(batch, key head, reference) of the first and the last key head."""
    ends = {(0, 0), (problem.batch_size - 1, problem.num_heads_k - 1)}
    with torch.no_grad():
        return [
            (b, h, reference(q[b, :, query_heads(problem, h)], k[b, :, h], v[b, :, h],
                             dout[b, :, query_heads(problem, h)], problem))
            for b, h in sorted(ends)
        ]  # fmt: skip


def query_heads(problem: Problem, key_head: int) -> slice:
    group = problem.num_heads // problem.num_heads_k
    return slice(key_head * group, (key_head + 1) * group)


def largest_error(
    problem: Problem,
    results: dict[str, Tensor],
    references: list[tuple[int, int, dict[str, Tensor]]],
) -> float:
    """Largest relative error of whichever of out, dq, dk, dv `results` holds; NaN stays NaN."""
    errors = []
    for name, result in results.items():
        for batch, head, want in references:
            heads = query_heads(problem, head) if name in ("out", "dq") else head
            difference = (result[batch, :, heads].float() - want[name]).norm()
            errors.append(float(difference / want[name].norm()))
    return math.nan if any(map(math.isnan, errors)) else max(errors)
