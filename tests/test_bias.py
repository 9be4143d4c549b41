"""An additive bias: how it broadcasts, its strides and dtypes, -inf, its gradient, wrong ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import on_backends, on_devices, usual_dtype
from compare import poisoned_allocations
from option_problems import Problem, assert_same, check_problem, on_one_torch_thread
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from flash_attn.reference import attention_reference

pytestmark = on_one_torch_thread

SIZES = (2, 4, 70, 110)  # batch, heads, seqlen_q, seqlen_k
PATTERNS = ["".join(dims) for count in range(5) for dims in itertools.combinations("bhqk", count)]
CAUSAL = {"window": (-1, 0)}

PROBLEMS = (
    [Problem(f"bias_{dims}", bias=dims) for dims in PATTERNS if dims]
    + [
        Problem("fp32", bias="bhqk", bias_in_fp32=True),
        Problem("fp32_of_keys", bias="bk", bias_in_fp32=True, softcap=2.0),
        Problem("causal", (150,), (170,), bias="hqk", **CAUSAL),
        Problem("window", (300,), (200,), bias="bhqk", window=(37, 11)),
        Problem("softcap", bias="bhqk", softcap=1.5, **CAUSAL),
        Problem("dropout", bias="qk", dropout_p=0.3),
    ]
    + [
        Problem(f"head_dim_{cols}", (130,), (150,), bias="bhqk", head_dim=cols, softcap=3.0)
        for cols in (32, 96, 128, 192, 256)
    ]
    + [
        Problem(f"rows_of_head_dim_{cols}", bias="hk", head_dim=cols, dropout_p=0.2)
        for cols in (96, 128, 192, 256)
    ]
)


@on_backends
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_problem(problem: Problem, device: str, dtype: torch.dtype) -> None:
    check_problem(problem, dtype, device)


def random_inputs(device: str, head_dim: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, seqlen_q, seqlen_k = SIZES
    shapes = ((seqlen_q, heads), (seqlen_k, heads // 2), (seqlen_k, heads // 2))
    dtype = usual_dtype(device)
    q, k, v = (
        torch.randn(batch, *shape, head_dim, device=device, dtype=dtype, requires_grad=True)
        for shape in shapes
    )
    return q, k, v


def results(
    inputs: tuple[Tensor, ...], bias: Tensor, leaf: Tensor, causal: bool = True
) -> tuple[Tensor, ...]:
    """out, softmax_lse and the gradients of the inputs and of `leaf`, of which the bias is made."""
    with poisoned_allocations():
        out, lse = flash_attn_func(*inputs, causal=causal, bias=bias, return_softmax_lse=True)
        loss = out.float().square().sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()
        return out, lse, *torch.autograd.grad(loss, (*inputs, leaf))


def exact_results(
    inputs: tuple[Tensor, ...], bias: Tensor, causal: bool = True
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().double().requires_grad_() for tensor in (*inputs, bias)]
    out, lse = attention_reference(*leaves[:3], causal=causal, bias=leaves[3])
    loss = out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sin().sum()
    return out, lse, *torch.autograd.grad(loss, leaves)


def assert_near(got: tuple[Tensor, ...], exact: tuple[Tensor, ...], device: str) -> None:
    tolerance = 1e-4 if device == "cpu" else 5e-2
    for one, expected in zip(got, exact, strict=True):
        size = max(1.0, expected[expected.isfinite()].abs().max().item())
        torch.testing.assert_close(one.double(), expected, rtol=0.0, atol=tolerance * size)


@on_devices
@pytest.mark.parametrize("dims", PATTERNS)
def test_gradient_has_the_shape_of_the_bias(dims: str, device: str) -> None:
    shape = [size if dim in dims else 1 for dim, size in zip("bhqk", SIZES, strict=True)]
    inputs = random_inputs(device)
    bias = torch.randn(shape, device=device, requires_grad=True)
    got = results(inputs, bias, bias)
    assert got[-1].shape == bias.shape and got[-1].dtype == bias.dtype
    assert_near(got, exact_results(inputs, bias), device)


@on_devices
@pytest.mark.parametrize("shape", [(110,), (70, 110), (1, 110), (4, 70, 110), ()], ids=str)
def test_fewer_dimensions(shape: tuple[int, ...], device: str) -> None:
    inputs = random_inputs(device)
    bias = torch.randn(shape, device=device, requires_grad=True)
    assert_near(results(inputs, bias, bias), exact_results(inputs, bias), device)


@on_devices
@pytest.mark.parametrize(
    "layout", ["keys_first", "every_other", "unaligned", "expanded", "shifted"]
)
def test_strides(layout: str, device: str) -> None:
    """Read where it lies, to the bit as a copy of it; its gradient too."""
    batch, heads, seqlen_q, seqlen_k = SIZES
    leaf, bias = laid_out(layout, device)
    assert bias.shape == SIZES and (layout == "unaligned" or not bias.is_contiguous())
    inputs = random_inputs(device)
    got = results(inputs, bias, leaf)
    copy = bias.detach().contiguous().requires_grad_()
    out, lse, dq, dk, dv, dbias = results(inputs, copy, copy)
    (expected,) = torch.autograd.grad(bias, leaf, dbias)
    assert_same(got[:5], (out, lse, dq, dk, dv))
    torch.testing.assert_close(got[5], expected)


def laid_out(layout: str, device: str) -> tuple[Tensor, Tensor]:
    """A leaf, and a bias of the full shape that is made of it."""
    batch, heads, seqlen_q, seqlen_k = SIZES

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    if layout == "keys_first":
        leaf = random(seqlen_k, batch, heads, seqlen_q)
        return leaf, leaf.permute(1, 2, 3, 0)
    if layout == "every_other":
        leaf = random(batch, 2 * heads, seqlen_q, 3 * seqlen_k)
        return leaf, leaf[:, ::2, :, ::3]
    if layout == "unaligned":
        leaf = random(batch * heads * seqlen_q * seqlen_k + 1)
        return leaf, leaf[1:].view(SIZES)
    if layout == "expanded":
        leaf = random(heads, 1, seqlen_k)
        return leaf, leaf.expand(SIZES)
    # Of relative positions: rows that overlap.
    leaf = random(heads * (seqlen_q + seqlen_k))
    strides = (0, seqlen_q + seqlen_k, 1, 1)
    return leaf, leaf.as_strided(SIZES, strides)


@on_devices
def test_minus_infinity_is_a_mask(device: str) -> None:
    """Also of a whole row, of a whole tile, and of the first keys that a row meets."""
    inputs = random_inputs(device)
    bias = torch.randn(SIZES, device=device)
    bias[0, :, 3] = -torch.inf
    bias[1, 2, :, :100] = -torch.inf
    bias[1, 3, :, 100:] = -torch.inf
    bias[:, :, ::7, ::2] = -torch.inf
    bias.requires_grad_()
    got = results(inputs, bias, bias, causal=False)
    exact = exact_results(inputs, bias, causal=False)
    assert not got[0][0, 3].any() and (got[1][0, :, 3] == torch.inf).all()
    assert not got[2][0, 3].any() and not got[5][bias == -torch.inf].any()
    assert torch.equal(got[1].isinf(), exact[1].isinf())
    assert_near(got, exact, device)


@on_devices
def test_a_bias_that_equals_alibi(device: str) -> None:
    q, k, v = random_inputs(device)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], device=device)
    row = torch.arange(SIZES[2], device=device)[:, None] + SIZES[3] - SIZES[2]
    bias = -slopes[:, None, None] * (row - torch.arange(SIZES[3], device=device)).abs()
    got = flash_attn_func(q, k, v, bias=bias, causal=True)
    expected = flash_attn_func(q, k, v, alibi_slopes=slopes, causal=True)
    torch.testing.assert_close(got, expected)


@on_devices
def test_packed_functions(device: str) -> None:
    q, k, v = random_inputs(device)
    bias = torch.randn(SIZES[1:], device=device)
    expected = flash_attn_func(q, k, v, bias=bias, softmax_scale=-0.3)
    got = flash_attn_kvpacked_func(q, torch.stack((k, v), dim=2), bias=bias, softmax_scale=-0.3)
    assert_same((got,), (expected,))
    bias = torch.randn(4, 70, 70, device=device)
    qkv = torch.stack((q, q + 1, q * 2), dim=2)
    expected = flash_attn_func(*qkv.unbind(2), bias=bias)
    assert_same((flash_attn_qkvpacked_func(qkv, bias=bias),), (expected,))


@on_devices
def test_only_the_bias_requires_a_gradient(device: str) -> None:
    q, k, v = (tensor.detach() for tensor in random_inputs(device))
    bias = torch.randn(1, 4, 1, 110, device=device, requires_grad=True)
    flash_attn_func(q, k, v, bias=bias).float().square().sum().backward()
    assert bias.grad is not None and bias.grad.isfinite().all()
    with torch.no_grad():
        assert not flash_attn_func(q, k, v, bias=bias).requires_grad


@on_devices
def test_empty_keys_give_a_zero_gradient(device: str) -> None:
    q = torch.randn(2, 5, 4, 32, device=device, dtype=usual_dtype(device))
    k = torch.randn(2, 0, 4, 32, device=device, dtype=usual_dtype(device))
    bias = torch.randn(1, 4, 5, 1, device=device, requires_grad=True)
    with poisoned_allocations():
        out = flash_attn_func(q, k, k, bias=bias)
        (dbias,) = torch.autograd.grad(out.sum(), bias)
    assert not out.any() and not dbias.any()


@on_devices
def test_deterministic(device: str) -> None:
    """Without shared elements it is bit-equal; else refused, with the way out."""
    inputs = random_inputs(device)
    bias = torch.randn(4, 1, 110, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=r"deterministic: expected False.*bias\.expand\("):
        flash_attn_func(*inputs, bias=bias, deterministic=True)
    grads = [
        torch.autograd.grad(
            flash_attn_func(*inputs, bias=bias.expand(SIZES), deterministic=True).float().sum(),
            (*inputs, bias),
        )
        for _ in range(2)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
    flash_attn_func(*inputs, bias=bias.detach(), deterministic=True).sum().backward()


@on_devices
def test_compiled(device: str) -> None:
    inputs = random_inputs(device)
    bias = torch.randn(4, 1, 110, device=device, requires_grad=True)

    def loss(bias: Tensor, *tensors: Tensor) -> Tensor:
        options = {"return_softmax_lse": True, "return_max_logits": True}
        out, lse, max_logits = flash_attn_func(*tensors, bias=bias, softcap=2.0, **options)
        return out.float().square().sum() + lse.sin().sum() + max_logits.sum()

    expected = torch.autograd.grad(loss(bias, *inputs), (bias, *inputs))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(bias, *inputs), (bias, *inputs))
    torch.testing.assert_close(got, expected)


WRONG = [
    (1.0, TypeError, "bias: expected a torch.Tensor, got float"),
    (
        torch.ones(70, 111),
        ValueError,
        "bias: expected a shape that broadcasts to (batch, heads, seqlen_q, seqlen_k) = "
        "(2, 4, 70, 110), got (70, 111)",
    ),
    (torch.ones(1, 1, 1, 1, 1), ValueError, "(2, 4, 70, 110), got (1, 1, 1, 1, 1)"),
    (torch.ones(3, 1, 110), ValueError, "(2, 4, 70, 110), got (3, 1, 110)"),
    (
        torch.ones(110, dtype=torch.float64),
        ValueError,
        "bias: expected dtype torch.float32 or that of q (torch.bfloat16), got torch.float64",
    ),
    (torch.ones(110, dtype=torch.bool), ValueError, "-inf where it hides keys"),
    (torch.ones(110, device="meta"), ValueError, "bias: expected the device of q (cpu), got meta"),
]


@pytest.mark.parametrize(("bias", "error", "text"), WRONG)
def test_wrong_arguments(bias: object, error: type[Exception], text: str) -> None:
    q, k, v = (tensor.detach().bfloat16() for tensor in random_inputs("cpu"))
    with pytest.raises(error) as caught:
        flash_attn_func(q, k, v, bias=bias)  # type: ignore[arg-type]
    assert text in str(caught.value)
