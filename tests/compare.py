"""Runs a case and compares it with the exact result by the error of PyTorch's own computation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from cases import Case, make_inputs
from torch import Tensor

from flash_attn import flash_attn_func
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


def flash_results(
    case: Case, inputs: tuple[Tensor, Tensor, Tensor], dout: Tensor, dlse: Tensor
) -> Results:
    out, softmax_lse, _ = flash_attn_func(*inputs, return_attn_probs=True, **case.options)
    return Results(out, softmax_lse, *gradients(out, softmax_lse, inputs, dout, dlse))


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
    relative_floor: float = 0.0,
) -> None:
    """Error at most twice that of torch computing in dtype, plus a unit of dtype's rounding."""
    assert got.shape == exact.shape, f"{name}: expected shape {exact.shape}, got {got.shape}"
    error = largest(got.double() - exact)
    torch_error = largest(torch_result.double() - exact)
    relative = torch.finfo(dtype).eps + relative_floor
    rounding = relative * largest(exact) + ABSOLUTE_FLOOR[dtype]
    # NaN fails this as it fails every comparison.
    assert error <= 2 * torch_error + rounding, (
        f"{name}: expected an error up to 2 * {torch_error:.2e} + {rounding:.2e}, got {error:.2e}"
    )


def check_case(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """out, softmax_lse and the gradients through both."""
    inputs = make_inputs(case, dtype, device)
    dout = torch.randn(inputs[0].shape, device=device).to(dtype)
    dlse = torch.randn(case.batch, case.heads, case.seqlen_q, device=device)
    got = flash_results(case, inputs, dout, dlse)
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
    assert got.out.is_contiguous() and got.out.dtype == dtype
    assert got.softmax_lse.is_contiguous() and got.softmax_lse.dtype == torch.float32
    assert_as_exact_as_torch("out", got.out, torch_result.out, exact.out, dtype)
    # The backward knows the probabilities as exp(score - softmax_lse), with softmax_lse in fp32.
    finite_lse = exact.softmax_lse[exact.softmax_lse.isfinite()]
    lse_rounding = torch.finfo(torch.float32).eps * largest(finite_lse)
    for name in ("dq", "dk", "dv"):
        gradient = getattr(got, name)
        assert gradient.dtype == dtype
        assert_as_exact_as_torch(
            name,
            gradient,
            getattr(torch_result, name),
            getattr(exact, name),
            dtype,
            relative_floor=lse_rounding,
        )
    check_rows_without_keys(case, got)
    check_lse(case, inputs, got.softmax_lse, exact.softmax_lse)


def check_lse(
    case: Case, inputs: tuple[Tensor, Tensor, Tensor], got: Tensor, exact: Tensor
) -> None:
    """softmax_lse is fp32 whatever the inputs are, so it is compared with torch in fp32."""
    fp32_result = attention_reference(*inputs, **case.options, dtype=torch.float32)[1]
    finite = exact.isfinite()
    assert torch.equal(finite, got.isfinite())
    assert_as_exact_as_torch(
        "softmax_lse", got[finite], fp32_result[finite], exact[finite], torch.float32
    )


def check_rows_without_keys(case: Case, got: Results) -> None:
    """They are exactly zero, and their lse is +inf."""
    seen = visible_keys(case.seqlen_q, case.seqlen_k, case.causal, case.window, got.out.device).any(
        dim=1
    )
    assert not got.out[:, ~seen].any()
    assert not got.dq[:, ~seen].any()
    assert (got.softmax_lse[:, :, ~seen] == float("inf")).all()
