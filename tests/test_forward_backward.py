"""Every rule of the mask, the layouts and the sizes on every backend, against exact attention."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from backends import on_backends, on_devices, usual_dtype
from cases import ALL, Case, lay_out, make_gradients, make_inputs
from compare import (
    Results,
    assert_bit_equal,
    check_case,
    check_results,
    flash_results,
    gradients,
    reference_results,
)
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

GQA = Case("gqa_causal", heads=4, heads_k=2, seqlen_q=50, seqlen_k=70, causal=True)


@on_backends
@pytest.mark.parametrize("case", ALL, ids=str)
def test_case(case: Case, device: str, dtype: torch.dtype) -> None:
    check_case(case, dtype, device)


@on_backends
@pytest.mark.parametrize("wants_lse_gradient", [False, True], ids=["out_only", "lse_only"])
def test_one_of_two_gradients(wants_lse_gradient: bool, device: str, dtype: torch.dtype) -> None:
    """A loss of the output alone, or of softmax_lse alone."""
    inputs = make_inputs(GQA, dtype, device)
    out, softmax_lse, _ = flash_attn_func(*inputs, return_attn_probs=True, **GQA.options)
    dout = torch.zeros_like(out) if wants_lse_gradient else torch.randn_like(out)
    dlse = torch.randn_like(softmax_lse) if wants_lse_gradient else torch.zeros_like(softmax_lse)
    output, gradient = (softmax_lse, dlse) if wants_lse_gradient else (out, dout)
    grads = torch.autograd.grad(output, inputs, gradient)
    check_results(GQA, inputs, dout, dlse, Results(out, softmax_lse, *grads))


@on_devices
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "interleaved", "wide", "shifted"])
def test_gradients_of_any_layout_equal_those_of_contiguous_tensors(
    layout: str, device: str
) -> None:
    inputs = make_inputs(GQA, torch.bfloat16, device)
    dout, dlse = make_gradients(GQA, torch.bfloat16, device)
    expected = flash_results(GQA, inputs, dout, dlse, deterministic=True)
    laid_out = tuple(lay_out(t.detach(), layout).detach().requires_grad_() for t in inputs)
    strides = [tensor.stride() for tensor in laid_out]
    got = flash_results(GQA, laid_out, lay_out(dout, layout), dlse, deterministic=True)
    assert_bit_equal(got, expected)
    assert [tensor.stride() for tensor in laid_out] == strides
    assert all(tensor.stride(-1) == 1 for tensor in got[2:])


@on_backends
@pytest.mark.parametrize("head_dim", [20, 32])
@pytest.mark.parametrize("layout", ["contiguous", "heads_first"])
def test_qkvpacked_equals_separate(
    layout: str, head_dim: int, device: str, dtype: torch.dtype
) -> None:
    qkv = torch.randn(2, 70, 3, 4, head_dim, dtype=dtype, device=device)
    if layout == "heads_first":
        qkv = qkv.transpose(1, 3).contiguous().transpose(1, 3)
    qkv.requires_grad_()
    separate = tuple(tensor.detach().requires_grad_() for tensor in qkv.unbind(2))
    options = {
        "causal": True,
        "window_size": (20, -1),
        "deterministic": True,
        "return_attn_probs": True,
    }
    out, lse, _ = flash_attn_qkvpacked_func(qkv, **options)
    expected_out, expected_lse, _ = flash_attn_func(*separate, **options)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    (grad,) = torch.autograd.grad((out, lse), qkv, (dout, dlse))
    expected = torch.autograd.grad((expected_out, expected_lse), separate, (dout, dlse))
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    assert torch.equal(grad, torch.stack(expected, dim=2))
    if device == "cpu" or head_dim % 8 == 0:  # written in place, not through a padded copy
        assert grad.stride() == qkv.stride()


@on_backends
@pytest.mark.parametrize("head_dim", [20, 32])
def test_kvpacked_equals_separate(head_dim: int, device: str, dtype: torch.dtype) -> None:
    q = torch.randn(2, 50, 4, head_dim, dtype=dtype, device=device, requires_grad=True)
    kv = torch.randn(2, 70, 2, 2, head_dim, dtype=dtype, device=device, requires_grad=True)
    k, v = (tensor.detach().requires_grad_() for tensor in kv.unbind(2))
    options = {"causal": True, "softmax_scale": 0.3, "deterministic": True}
    out = flash_attn_kvpacked_func(q, kv, **options)
    expected_out = flash_attn_func(q, k, v, **options)
    dout = torch.randn_like(out)
    dq, dkv = torch.autograd.grad(out, (q, kv), dout)
    expected_dq, dk, dv = torch.autograd.grad(expected_out, (q, k, v), dout)
    assert torch.equal(out, expected_out) and torch.equal(dq, expected_dq)
    assert torch.equal(dkv, torch.stack((dk, dv), dim=2))


@on_devices
def test_packed_with_negative_scale(device: str) -> None:
    """The sign is folded into q, which leaves the packed path."""
    dtype = usual_dtype(device)
    qkv = torch.randn(1, 20, 3, 2, 16, dtype=dtype, device=device, requires_grad=True)
    separate = tuple(tensor.detach().requires_grad_() for tensor in qkv.unbind(2))
    out = flash_attn_qkvpacked_func(qkv, softmax_scale=-0.5, deterministic=True)
    expected_out = flash_attn_func(*separate, softmax_scale=-0.5, deterministic=True)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    expected = torch.autograd.grad(expected_out.sum(), separate)
    assert torch.equal(out, expected_out)
    assert torch.equal(grad, torch.stack(expected, dim=2))


def test_options_may_be_tensors() -> None:
    q, k, v = torch.randn(3, 1, 30, 2, 16).unbind(0)
    expected = flash_attn_func(q, k, v, window_size=(4, 2), softmax_scale=0.5)
    window, scale = torch.tensor([4, 2]), torch.tensor(0.5)
    assert torch.equal(flash_attn_func(q, k, v, window_size=window, softmax_scale=scale), expected)


def test_causal_overrides_the_right_window() -> None:
    q, k, v = torch.randn(3, 1, 30, 2, 16).unbind(0)
    assert torch.equal(
        flash_attn_func(q, k, v, causal=True, window_size=(9, 9)),
        flash_attn_func(q, k, v, window_size=(9, 0)),
    )


@on_backends
def test_what_return_attn_probs_returns(device: str, dtype: torch.dtype) -> None:
    """Without dropout there is nothing to show of S_dmask; softmax_lse is fp32 in any dtype."""
    inputs = make_inputs(GQA, dtype, device)
    alone = flash_attn_func(*inputs, **GQA.options)
    out, softmax_lse, s_dmask = flash_attn_func(*inputs, return_attn_probs=True, **GQA.options)
    assert isinstance(alone, Tensor) and torch.equal(out, alone)
    assert softmax_lse.shape == (2, 4, 50) and softmax_lse.dtype == torch.float32
    assert s_dmask.shape == (0,) and s_dmask.dtype == dtype and s_dmask.device == out.device


@on_devices
@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3))[1:], ids=str)
def test_only_some_inputs_require_gradients(wanted: tuple[bool, ...], device: str) -> None:
    """Frozen queries, keys or values: the other gradients are the same."""
    inputs = make_inputs(GQA, usual_dtype(device), device)
    dout, dlse = make_gradients(GQA, usual_dtype(device), device)
    options = {**GQA.options, "deterministic": True, "return_attn_probs": True}
    out, lse, _ = flash_attn_func(*inputs, **options)
    expected = gradients(out, lse, inputs, dout, dlse)
    some = tuple(t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True))
    out, lse, _ = flash_attn_func(*some, **options)
    torch.autograd.backward((out, lse), (dout, dlse))
    for tensor, gradient, is_wanted in zip(some, expected, wanted, strict=True):
        if is_wanted:
            assert torch.equal(tensor.grad, gradient)
        else:
            assert tensor.grad is None


@on_devices
def test_same_results_without_gradients(device: str) -> None:
    inputs = make_inputs(Case("causal", causal=True), torch.bfloat16, device)
    with_gradients = flash_attn_func(*inputs, causal=True)
    with torch.no_grad():
        without = flash_attn_func(*inputs, causal=True)
    assert torch.equal(without, with_gradients)
    assert with_gradients.requires_grad and not without.requires_grad
    with torch.inference_mode():
        assert torch.equal(flash_attn_func(*inputs, causal=True), with_gradients)


def test_same_results_for_every_thread_count() -> None:
    case = Case("gqa", heads=4, heads_k=2, seqlen_q=300, seqlen_k=300, causal=True)
    inputs = make_inputs(case, torch.bfloat16)
    dout, dlse = make_gradients(case, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = flash_results(case, inputs, dout, dlse)
        torch.set_num_threads(3)
        three = flash_results(case, inputs, dout, dlse)
    finally:
        torch.set_num_threads(threads)
    assert_bit_equal(one, three)


@on_devices
def test_calls_from_several_threads_at_once(device: str) -> None:
    problems = [
        Case(f"thread_{i}", heads=4, heads_k=2, seqlen_q=80 + 50 * i, seqlen_k=200, causal=True)
        for i in range(4)
    ]
    dtype = usual_dtype(device)
    tensors = [
        (make_inputs(case, dtype, device), make_gradients(case, dtype, device)) for case in problems
    ]

    def run(number: int) -> Results:
        inputs, (dout, dlse) = tensors[number]
        out, lse, _ = flash_attn_func(
            *inputs, causal=True, deterministic=True, return_attn_probs=True
        )
        return Results(out, lse, *gradients(out, lse, inputs, dout, dlse))

    expected = [run(number) for number in range(4)]
    numbers = list(range(4)) * 5
    with ThreadPoolExecutor(4) as pool:
        for number, got in zip(numbers, pool.map(run, numbers), strict=True):
            assert_bit_equal(got, expected[number])


@on_devices
def test_one_tensor_as_queries_keys_and_values(device: str) -> None:
    x = torch.randn(2, 40, 3, 32, device=device, dtype=usual_dtype(device), requires_grad=True)
    (gradient,) = torch.autograd.grad(flash_attn_func(x, x, x, deterministic=True).sum(), x)
    separate = [x.detach().requires_grad_() for _ in range(3)]
    parts = torch.autograd.grad(flash_attn_func(*separate, deterministic=True).sum(), separate)
    rounding = 2 * torch.finfo(x.dtype).eps * max(part.abs().max() for part in parts)
    torch.testing.assert_close(gradient, sum(parts), rtol=0, atol=float(rounding))


def test_backward_twice_through_a_retained_graph() -> None:
    """Nothing saved for the backward is overwritten by it."""
    inputs = make_inputs(Case("causal", causal=True), torch.float32)
    out = flash_attn_func(*inputs, causal=True)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(out.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_changing_an_input_before_the_backward_is_noticed() -> None:
    q, k, v = (tensor * 1 for tensor in make_inputs(Case("plain"), torch.float32))
    out = flash_attn_func(q, k, v)
    k.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@on_backends
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_nan_reaches_what_depends_on_it_and_nothing_else(
    where: str, device: str, dtype: torch.dtype
) -> None:
    """A diverged value must not be lost in a maximum, nor spread to other rows and heads."""
    case = Case("plain", heads=4, heads_k=2, seqlen_q=150, seqlen_k=170)
    inputs = make_inputs(case, dtype, device)
    dout, dlse = make_gradients(case, dtype, device)
    tensors = dict(zip("qkv", inputs, strict=True)) | {"dout": dout}
    with torch.no_grad():
        tensors[where][1, 70, 1, 9] = float("nan")
    got = flash_results(case, inputs, dout, dlse)
    exact = reference_results(case, inputs, dout, dlse, torch.float64)
    for name, one, other in zip(Results._fields, got, exact, strict=True):
        assert torch.equal(one.isnan(), other.isnan()), name
    assert sum(tensor.isnan().any().item() for tensor in exact) >= 3
