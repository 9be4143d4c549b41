"""fp32 on CUDA: as exact as fp32's own products, or TF32's where torch's matmul may use it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from backends import GPU
from cases import Case, make_gradients, make_inputs
from compare import Results, check_case, flash_results, largest, reference_results

from flash_attn import flash_attn_func

pytestmark = pytest.mark.gpu

CASES = [
    Case("d64", seqlen_q=300, seqlen_k=300, causal=True),
    Case("d96", seqlen_q=200, seqlen_k=333, head_dim=96, heads=4),
    Case("d128", seqlen_q=257, seqlen_k=300, head_dim=128, window=(100, 20)),
    Case("d192", seqlen_q=130, seqlen_k=130, head_dim=192, head_dim_v=128, causal=True),
    Case("d256", seqlen_q=150, seqlen_k=170, head_dim=256, heads=4),
]


@pytest.fixture
def precision() -> Iterator[object]:
    """torch's settings for matrix products, as they were again afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


def errors(case: Case, precision: object, setting: str) -> dict[str, float]:
    """By result, relative to its largest element."""
    torch.manual_seed(0)
    inputs = make_inputs(case, torch.float32, GPU)
    dout, dlse = make_gradients(case, torch.float32, GPU)
    precision.fp32_precision = setting  # type: ignore[attr-defined]
    got = flash_results(case, inputs, dout, dlse)
    precision.fp32_precision = "ieee"  # type: ignore[attr-defined]
    exact = reference_results(case, inputs, dout, dlse, torch.float64)
    return {
        name: largest(one.double() - other) / largest(other)
        for name, one, other in zip(Results._fields, got, exact, strict=True)
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_settings_are_honoured(case: Case, precision: object) -> None:
    full, tf32 = errors(case, precision, "ieee"), errors(case, precision, "tf32")
    for name in Results._fields:
        assert full[name] < 5e-6, (name, full)
        assert 1e-5 < tf32[name] < 1e-2, (name, tf32)


def test_the_backward_has_the_precision_of_the_forward(precision: object) -> None:
    """Also where the setting has changed in between."""
    q, k, v = make_inputs(CASES[0], torch.float32, GPU)

    def gradients(before: str, between: str) -> tuple[torch.Tensor, ...]:
        precision.fp32_precision = before  # type: ignore[attr-defined]
        out = flash_attn_func(q, k, v, causal=True, deterministic=True)
        precision.fp32_precision = between  # type: ignore[attr-defined]
        return torch.autograd.grad(out.sum(), (q, k, v))

    for one, other in zip(gradients("tf32", "tf32"), gradients("tf32", "ieee"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("seqlen", [2000, 4100])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_sums_stay_exact(seqlen: int, head_dim: int) -> None:
    case = Case("long", 1, seqlen, seqlen, heads=4, heads_k=2, head_dim=head_dim, causal=True)
    check_case(case, torch.float32, GPU, deterministic=True)
