"""Every rule of the mask, the layouts and the sizes on CPU, against exact attention."""

from __future__ import annotations

import pytest
import torch
from cases import ALL, Case, lay_out, make_inputs
from compare import Results, check_case, check_results, flash_results

from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_case(case: Case, dtype: torch.dtype) -> None:
    check_case(case, dtype)


@pytest.mark.parametrize("wants_lse_gradient", [False, True], ids=["out_only", "lse_only"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_of_two_gradients(wants_lse_gradient: bool, dtype: torch.dtype) -> None:
    """A loss of the output alone, or of softmax_lse alone."""
    case = Case("gqa_causal", heads=4, heads_k=2, seqlen_q=50, seqlen_k=70, causal=True)
    inputs = make_inputs(case, dtype)
    out, softmax_lse, _ = flash_attn_func(*inputs, return_attn_probs=True, **case.options)
    dout = torch.zeros_like(out) if wants_lse_gradient else torch.randn_like(out)
    dlse = torch.randn_like(softmax_lse) if wants_lse_gradient else torch.zeros_like(softmax_lse)
    output, gradient = (softmax_lse, dlse) if wants_lse_gradient else (out, dout)
    grads = torch.autograd.grad(output, inputs, gradient)
    check_results(case, inputs, dout, dlse, Results(out, softmax_lse, *grads))


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "interleaved", "wide", "shifted"])
def test_gradients_of_any_layout_equal_those_of_contiguous_tensors(layout: str) -> None:
    case = Case("gqa", heads=4, heads_k=2, seqlen_q=40, seqlen_k=60, causal=True)
    inputs = make_inputs(case, torch.bfloat16)
    dout, dlse = torch.randn(2, 40, 4, 64), torch.randn(2, 4, 40)
    expected = flash_results(case, inputs, dout, dlse)
    laid_out = tuple(lay_out(t.detach(), layout).detach().requires_grad_() for t in inputs)
    strides = [tensor.stride() for tensor in laid_out]
    got = flash_results(case, laid_out, lay_out(dout.bfloat16(), layout), dlse)
    for name, one, other in zip(Results._fields, got, expected, strict=True):
        assert torch.equal(one, other), name
    assert [tensor.stride() for tensor in laid_out] == strides
    assert all(tensor.stride(-1) == 1 for tensor in got[2:])


@pytest.mark.parametrize("layout", ["contiguous", "heads_first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qkvpacked_equals_separate(dtype: torch.dtype, layout: str) -> None:
    qkv = torch.randn(2, 70, 3, 4, 32, dtype=dtype)
    if layout == "heads_first":
        qkv = qkv.transpose(1, 3).contiguous().transpose(1, 3)
    qkv.requires_grad_()
    separate = tuple(tensor.detach().requires_grad_() for tensor in qkv.unbind(2))
    options = {"causal": True, "window_size": (20, -1), "return_attn_probs": True}
    out, lse, _ = flash_attn_qkvpacked_func(qkv, **options)
    expected_out, expected_lse, _ = flash_attn_func(*separate, **options)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    (grad,) = torch.autograd.grad((out, lse), qkv, (dout, dlse))
    expected = torch.autograd.grad((expected_out, expected_lse), separate, (dout, dlse))
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    assert torch.equal(grad, torch.stack(expected, dim=2))
    assert grad.stride() == qkv.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kvpacked_equals_separate(dtype: torch.dtype) -> None:
    q = torch.randn(2, 50, 4, 32, dtype=dtype, requires_grad=True)
    kv = torch.randn(2, 70, 2, 2, 32, dtype=dtype, requires_grad=True)
    k, v = (tensor.detach().requires_grad_() for tensor in kv.unbind(2))
    out = flash_attn_kvpacked_func(q, kv, causal=True, softmax_scale=0.3)
    expected_out = flash_attn_func(q, k, v, causal=True, softmax_scale=0.3)
    dout = torch.randn_like(out)
    dq, dkv = torch.autograd.grad(out, (q, kv), dout)
    expected_dq, dk, dv = torch.autograd.grad(expected_out, (q, k, v), dout)
    assert torch.equal(out, expected_out) and torch.equal(dq, expected_dq)
    assert torch.equal(dkv, torch.stack((dk, dv), dim=2))


def test_packed_with_negative_scale() -> None:
    """The sign is folded into q, which leaves the packed path."""
    qkv = torch.randn(1, 20, 3, 2, 16, requires_grad=True)
    separate = tuple(tensor.detach().requires_grad_() for tensor in qkv.unbind(2))
    out = flash_attn_qkvpacked_func(qkv, softmax_scale=-0.5)
    expected_out = flash_attn_func(*separate, softmax_scale=-0.5)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    expected = torch.autograd.grad(expected_out.sum(), separate)
    assert torch.equal(out, expected_out)
    assert torch.equal(grad, torch.stack(expected, dim=2))


def test_window_elements_may_be_tensors() -> None:
    q, k, v = torch.randn(3, 1, 30, 2, 16).unbind(0)
    window = torch.tensor([4, 2])
    assert torch.equal(
        flash_attn_func(q, k, v, window_size=window), flash_attn_func(q, k, v, window_size=(4, 2))
    )


def test_causal_overrides_the_right_window() -> None:
    q, k, v = torch.randn(3, 1, 30, 2, 16).unbind(0)
    assert torch.equal(
        flash_attn_func(q, k, v, causal=True, window_size=(9, 9)),
        flash_attn_func(q, k, v, window_size=(9, 0)),
    )


def test_only_some_inputs_require_gradients() -> None:
    """Frozen keys and values: the query's gradient is the same."""
    case = Case("causal", causal=True)
    q, k, v = make_inputs(case, torch.float32)
    dq, _, _ = torch.autograd.grad(flash_attn_func(q, k, v, causal=True).sum(), (q, k, v))
    out = flash_attn_func(q, k.detach(), v.detach(), causal=True)
    assert torch.equal(torch.autograd.grad(out.sum(), q)[0], dq)


def test_same_results_without_gradients() -> None:
    inputs = make_inputs(Case("causal", causal=True), torch.bfloat16)
    with_gradients = flash_attn_func(*inputs, causal=True)
    with torch.no_grad():
        assert torch.equal(flash_attn_func(*inputs, causal=True), with_gradients)
    with torch.inference_mode():
        assert torch.equal(flash_attn_func(*inputs, causal=True), with_gradients)


def test_same_results_for_every_thread_count() -> None:
    case = Case("gqa", heads=4, heads_k=2, seqlen_q=300, seqlen_k=300, causal=True)
    inputs = make_inputs(case, torch.bfloat16)
    dout, dlse = torch.randn(2, 300, 4, 64), torch.randn(2, 4, 300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = flash_results(case, inputs, dout, dlse)
        torch.set_num_threads(3)
        three = flash_results(case, inputs, dout, dlse)
    finally:
        torch.set_num_threads(threads)
    for name, a, b in zip(Results._fields, one, three, strict=True):
        assert torch.equal(a, b), name


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
