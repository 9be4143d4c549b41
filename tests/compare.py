"""Runs a case and compares it with the exact result by the error of PyTorch's own computation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from cases import Case, make_gradients, make_inputs
from torch import Tensor

from flash_attn import flash_attn_func, ops
from flash_attn.problem import scale_of
from flash_attn.reference import attention_reference, visible_keys

# Below this no error counts: rounding of single products next to exact zeros.
ABSOLUTE_FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}


class Results(NamedTuple):
    out: Tensor
    softmax_lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def gradients(
    out: Tensor, softmax_lse: Tensor, inputs: tuple[Tensor, ...], dout: Tensor, dlse: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out, softmax_lse), inputs, (dout.to(out), dlse.to(softmax_lse)))


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Tensors that torch allocates inside are full of NaN: an element never written shows.

    torch does it in its deterministic mode. On CPU that reaches the tensors made in Python only.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)


def flash_results(
    case: Case,
    inputs: tuple[Tensor, Tensor, Tensor],
    dout: Tensor,
    dlse: Tensor,
    deterministic: bool = False,
) -> Results:
    with poisoned_allocations():
        out, softmax_lse, _ = flash_attn_func(
            *inputs, return_attn_probs=True, deterministic=deterministic, **case.options
        )
        return Results(out, softmax_lse, *gradients(out, softmax_lse, inputs, dout, dlse))


def op_results(case: Case, arguments: list[Tensor], dlse: Tensor) -> tuple[Tensor, ...]:
    """out, softmax_lse, softmax_d, dq, dk and dv of the ops; arguments are q, k, v and dout."""
    q, k, v, dout = arguments
    scale = case.head_dim**-0.5
    right = 0 if case.causal else -1
    out, softmax_lse = ops.forward(q, k, v, scale, -1, right)
    grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
    softmax_d = ops.backward(dout, q, k, v, out, softmax_lse, dlse, *grads, scale, -1, right, True)
    return out, softmax_lse, softmax_d, *grads


def reference_results(
    case: Case,
    inputs: tuple[Tensor, Tensor, Tensor],
    dout: Tensor,
    dlse: Tensor,
    dtype: torch.dtype,
) -> Results:
    leaves = tuple(tensor.detach().to(dtype).requires_grad_() for tensor in inputs)
    out, softmax_lse = attention_reference(*leaves, **case.options, dtype=dtype)
    return Results(out, softmax_lse, *gradients(out, softmax_lse, leaves, dout, dlse))


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def assert_as_exact_as_torch(
    name: str,
    got: Tensor,
    torch_result: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    floor: float = 0.0,
) -> None:
    """Error at most twice that of torch computing in dtype, plus a unit of dtype's rounding."""
    assert got.shape == exact.shape, f"{name}: expected shape {exact.shape}, got {got.shape}"
    error = largest(got.double() - exact)
    torch_error = largest(torch_result.double() - exact)
    rounding = torch.finfo(dtype).eps * largest(exact) + ABSOLUTE_FLOOR[dtype] + floor
    # NaN fails this as it fails every comparison.
    assert error <= 2 * torch_error + rounding, (
        f"{name}: expected an error up to 2 * {torch_error:.2e} + {rounding:.2e}, got {error:.2e}"
    )


def assert_nearly_equal(got: Tensor, expected: Tensor) -> None:
    """Two ways to one result, whose sums have other orders: a few units of rounding apart."""
    units = 32 if got.dtype == torch.float32 else 2
    atol = units * torch.finfo(got.dtype).eps * largest(expected)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=atol)


def assert_bit_equal(got: Results, expected: Results) -> None:
    for name, one, other in zip(Results._fields, got, expected, strict=True):
        assert torch.equal(one, other), f"{name}: {(one != other).sum()} elements differ"


def check_case(
    case: Case, dtype: torch.dtype, device: str = "cpu", deterministic: bool = False
) -> None:
    """out, softmax_lse and the gradients through both."""
    inputs = make_inputs(case, dtype, device)
    dout, dlse = make_gradients(case, dtype, device)
    got = flash_results(case, inputs, dout, dlse, deterministic)
    check_results(case, inputs, dout, dlse, got)


def check_results(
    case: Case,
    inputs: tuple[Tensor, Tensor, Tensor],
    dout: Tensor,
    dlse: Tensor,
    got: Results,
) -> None:
    dtype = inputs[0].dtype
    exact = reference_results(case, inputs, dout, dlse, torch.float64)
    torch_result = reference_results(case, inputs, dout, dlse, dtype)
    # An odd head_dim is padded on CUDA, and out is then a part of the padded result.
    assert got.out.is_contiguous() or (
        got.out.is_cuda and (case.head_dim % 8 != 0 or case.v_cols % 8 != 0)
    )
    assert got.out.dtype == dtype
    assert got.softmax_lse.is_contiguous() and got.softmax_lse.dtype == torch.float32
    floors = fp32_floors(case, inputs, dout, exact)
    for name in ("out", "dq", "dk", "dv"):
        one = getattr(got, name)
        assert one.dtype == dtype
        results = one, getattr(torch_result, name), getattr(exact, name)
        assert_as_exact_as_torch(name, *results, dtype, floors[name])
    check_rows_without_keys(case, got)
    check_lse(case, inputs, got.softmax_lse, exact.softmax_lse, floors["softmax_lse"])


def cut_of_tf32(head_dim: int) -> float:
    """What fp32's products on tensor cores err by in units of one rounding: they cut the sum off
    every eight columns, half a unit in the mean of a sum that is half there in the mean."""
    return 1 + head_dim / 8 / 4


def fp32_floors(
    case: Case, inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor, exact: Results
) -> dict[str, float]:
    """What fp32 arithmetic may do to each result whoever computes it: half a unit of rounding.

    A score is a sum of products of the size |q| |k|. Whether torch's sum or ours comes out nearer
    is chance, so the larger of few errors can exceed twice the other. The backward has the
    probabilities as exp(score - softmax_lse), and dS = P * (dP - rowsum(dout * out)), where torch
    sums P * dP over the very dP that it subtracts from. In 16 bits all of it is far below the
    rounding of the results, but for softmax_lse, which is fp32 always.
    """
    q, k, v = (tensor.detach() for tensor in inputs)
    unit = torch.finfo(torch.float32).eps / 2
    scaled_unit = unit * abs(scale_of(case.scale, case.head_dim))
    score = scaled_unit * largest(q.float().norm(dim=-1)) * largest(k.float().norm(dim=-1))
    lse = 2 * unit * largest(exact.softmax_lse[exact.softmax_lse.isfinite()])
    ds = scaled_unit * largest((dout.double() * exact.out).abs().sum(dim=-1))
    if q.is_cuda and q.dtype == torch.float32:
        ds *= cut_of_tf32(case.head_dim)
    # Tensor cores cut a sum off instead of rounding it, once in 16 query rows (docs/lessons.md).
    steps = case.seqlen_q * case.heads // case.heads_k / 16
    cut = unit * steps if q.is_cuda else 0.0
    return {
        "out": score * largest(v),
        "softmax_lse": score,
        "dq": (score + lse) * largest(exact.dq) + ds * largest(k),
        "dk": (score + lse + cut) * largest(exact.dk) + ds * largest(q),
        "dv": (score + lse + cut) * largest(exact.dv),
    }


def check_lse(
    case: Case, inputs: tuple[Tensor, Tensor, Tensor], got: Tensor, exact: Tensor, floor: float
) -> None:
    """softmax_lse is fp32 whatever the inputs are, so it is compared with torch in fp32."""
    fp32_result = attention_reference(*inputs, **case.options, dtype=torch.float32)[1]
    finite = exact.isfinite()
    assert torch.equal(finite, got.isfinite())
    assert_as_exact_as_torch(
        "softmax_lse", got[finite], fp32_result[finite], exact[finite], torch.float32, floor
    )


def check_rows_without_keys(case: Case, got: Results) -> None:
    """They are exactly zero, and their lse is +inf."""
    seen = visible_keys(case.seqlen_q, case.seqlen_k, case.causal, case.window, got.out.device).any(
        dim=1
    )
    assert not got.out[:, ~seen].any()
    assert not got.dq[:, ~seen].any()
    assert (got.softmax_lse[:, :, ~seen] == float("inf")).all()
