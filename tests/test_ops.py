"""The ops as torch sees them: schemas, fake kernels, compilation, autocast, checkpointing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import Case, lay_out, make_inputs
from compare import check_results, flash_results, reference_results
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    ops,
)

CASE = Case("gqa_causal", heads=4, heads_k=2, seqlen_q=40, seqlen_k=72, head_dim=32, causal=True)
LAYOUTS = ["bshd", "bhsd", "sbhd", "interleaved", "expanded"]


def op_inputs(layout: str = "bshd", dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    q, k, v = (tensor.detach() for tensor in make_inputs(CASE, dtype))
    return tuple(lay_out(tensor, layout) for tensor in (q, k, v))


def backward_arguments(inputs: tuple[Tensor, ...], dlse: Tensor | None) -> tuple[object, ...]:
    out, softmax_lse = ops.forward(*inputs, 0.2, -1, 0)
    gradients = [torch.zeros_like(tensor) for tensor in inputs]
    return (torch.ones_like(out), *inputs, out, softmax_lse, dlse, *gradients, 0.2, -1, 0, False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_forward(layout: str) -> None:
    torch.library.opcheck(ops.forward, (*op_inputs(layout), 0.2, 5, 0))


@pytest.mark.parametrize("has_dlse", [False, True])
def test_opcheck_backward(has_dlse: bool) -> None:
    dlse = torch.ones(2, 4, 40) if has_dlse else None
    torch.library.opcheck(ops.backward, backward_arguments(op_inputs(), dlse))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_results_lie_as_real_ones(layout: str) -> None:
    """Sizes, strides and dtypes of every result, also of the gradients."""
    real_inputs = tuple(tensor.requires_grad_() for tensor in op_inputs(layout, torch.bfloat16))

    def results(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        out, softmax_lse, empty = flash_attn_func(*inputs, causal=True, return_attn_probs=True)
        gradients = torch.autograd.grad((out.sum(), softmax_lse.sum()), inputs)
        return [out, softmax_lse, empty, *gradients]

    def facts(tensors: list[Tensor]) -> list[object]:
        return [(t.shape, t.stride(), t.dtype, t.device) for t in tensors]

    with FakeTensorMode() as mode:
        fake_inputs = tuple(mode.from_tensor(tensor) for tensor in real_inputs)
        fake = facts(results(fake_inputs))
    assert fake == facts(results(real_inputs))


def test_softmax_d_of_the_fake_kernel() -> None:
    arguments = backward_arguments(op_inputs(), None)
    real = ops.backward(*arguments)
    with FakeTensorMode() as mode:
        fake = ops.backward(
            *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments)
        )
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert real.shape == (2, 4, 128)


def test_meta_tensors() -> None:
    q, k, v = (tensor.to("meta").requires_grad_() for tensor in op_inputs())
    out = flash_attn_func(q, k, v)
    assert out.device.type == "meta" and out.shape == q.shape
    out.sum().backward()
    assert k.grad.shape == k.shape


COMPILED: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "separate": (flash_attn_func, [(2, 40, 4, 32), (2, 72, 2, 32), (2, 72, 2, 32)]),
    "kvpacked": (flash_attn_kvpacked_func, [(2, 40, 4, 32), (2, 72, 2, 2, 32)]),
    "qkvpacked": (flash_attn_qkvpacked_func, [(2, 40, 3, 4, 32)]),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training_step_equals_eager(name: str) -> None:
    """One graph with forward and backward, through out and lse, with window and negative scale."""
    function, sizes = COMPILED[name]
    inputs = [torch.randn(size, requires_grad=True) for size in sizes]

    def step(*tensors: Tensor) -> Tensor:
        plain, lse, _ = function(*tensors, causal=True, return_attn_probs=True)
        windowed = function(*tensors, window_size=(9, 4), softmax_scale=-0.3, deterministic=True)
        return (plain * windowed).sum() + lse.nan_to_num(posinf=0.0).square().sum()

    torch._dynamo.reset()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    gradients = torch.autograd.grad(loss, inputs)
    expected_loss = step(*inputs)
    expected = torch.autograd.grad(expected_loss, inputs)
    torch.testing.assert_close(loss, expected_loss)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_compiled_by_inductor_with_changing_lengths() -> None:
    """The default compiler, strided inputs inside of the graph, and no recompilation per length."""
    torch._dynamo.reset()
    weight = torch.randn(32, 3 * 64, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        qkv = (x @ weight).view(*x.shape[:2], 3, 4, 16)
        q, k, v = (tensor.relu() for tensor in qkv.transpose(1, 3).unbind(2))
        out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
        return out.flatten(2)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    counter = torch._dynamo.testing.CompileCounter()
    counted = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for seqlen in (16, 33, 40):
        x = torch.randn(2, seqlen, 32)
        (gradient,) = torch.autograd.grad(compiled(x).square().sum(), weight)
        (expected,) = torch.autograd.grad(layer(x).square().sum(), weight)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
        counted(x)
    assert counter.frame_count == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    inputs = make_inputs(CASE, torch.float32)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q * 2, k, v, causal=True).tanh()

    checkpointed = checkpoint(layer, *inputs, use_reentrant=use_reentrant)
    checkpointed.sum().backward()
    expected = torch.autograd.grad(layer(*inputs).sum(), inputs)
    for tensor, gradient in zip(inputs, expected, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_like_a_matrix_product(dtype: torch.dtype) -> None:
    q, k, v = make_inputs(CASE, torch.float32)
    half_k = k.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype):
        out = flash_attn_func(q, half_k, v, causal=True)
        assert out.dtype == (q.flatten(1) @ q.flatten(1).T).dtype == dtype
    expected_inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
    expected = flash_attn_func(*expected_inputs, causal=True)
    assert torch.equal(out, expected)
    gradients = torch.autograd.grad(out.float().sum(), (q, half_k, v))
    expected_gradients = torch.autograd.grad(expected.float().sum(), expected_inputs)
    assert [gradient.dtype for gradient in gradients] == [torch.float32, dtype, torch.float32]
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(gradient.to(dtype), other)


def test_autocast_leaves_double_to_the_checks() -> None:
    q, k, v = (tensor.double() for tensor in op_inputs())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="got torch.float64"),
    ):
        flash_attn_func(q, k, v)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_autocast_of_packed_tensors(is_compiled: bool) -> None:
    def layer(qkv: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return flash_attn_qkvpacked_func(qkv)

    qkv = torch.randn(2, 10, 3, 2, 16)
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if is_compiled else layer
    assert torch.equal(run(qkv), flash_attn_qkvpacked_func(qkv.bfloat16()))


@pytest.mark.parametrize("layout", ["contiguous", "packed", "shifted"])
def test_backward_writes_every_element_it_is_given(layout: str) -> None:
    """Gradients go into tensors full of NaN, which may be parts of others."""
    inputs = make_inputs(CASE, torch.bfloat16)
    dout, dlse = torch.randn(2, 40, 4, 32).bfloat16(), torch.randn(2, 4, 40)
    expected = flash_results(CASE, inputs, dout, dlse)
    room = [torch.full((*t.shape[:-1], 3 * 32), float("nan")).bfloat16() for t in inputs]
    start = {"contiguous": 0, "packed": 32, "shifted": 33}[layout]
    gradients = [tensor[..., start : start + 32] for tensor in room]
    if layout == "contiguous":
        gradients = [tensor.contiguous() for tensor in gradients]
    out, softmax_lse = expected.out, expected.softmax_lse
    scale = 32**-0.5
    ops.backward(dout, *inputs, out, softmax_lse, dlse, *gradients, scale, -1, 0, False)
    for gradient, other in zip(gradients, expected[2:], strict=True):
        assert torch.equal(gradient, other)
    if layout != "contiguous":
        for tensor in room:  # nothing beside them was touched
            assert tensor[..., :start].isnan().all() and tensor[..., start + 32 :].isnan().all()


def test_any_strides_of_dout_and_dlse() -> None:
    """Expanded and transposed gradients arrive from sum() and friends."""
    inputs = make_inputs(CASE, torch.float32)
    for dout in (
        torch.ones(()).expand(2, 40, 4, 32),
        torch.randn(32, 4, 40, 2).permute(3, 2, 1, 0),
    ):
        for dlse in (torch.ones(()).expand(2, 4, 40), torch.randn(40, 4, 2).permute(2, 1, 0)):
            got = flash_results(CASE, inputs, dout, dlse)
            check_results(CASE, inputs, dout, dlse, got)


def test_softmax_d_is_what_it_says() -> None:
    """rowsum(dout * out) - dlse: the part of the backward that others build on."""
    inputs = op_inputs()
    dlse = torch.randn(2, 4, 40)
    arguments = backward_arguments(inputs, dlse)
    softmax_d = ops.backward(*arguments)
    dout, out = arguments[0], arguments[4]
    expected = (dout * out).sum(-1).transpose(1, 2) - dlse
    torch.testing.assert_close(softmax_d[..., :40], expected)


def test_softmax_lse_of_other_keys_gives_partial_gradients() -> None:
    """Backward with lse and out of the whole over a part of the keys, as rings of devices do."""
    q, k, v = make_inputs(CASE, torch.float32)
    dout, dlse = torch.randn(2, 40, 4, 32), torch.zeros(2, 4, 40)
    whole = Case("whole", heads=4, heads_k=2, seqlen_q=40, seqlen_k=72, head_dim=32)
    exact = reference_results(whole, (q, k, v), dout, dlse, torch.float64)
    out, softmax_lse = ops.forward(q.detach(), k.detach(), v.detach(), 32**-0.5, -1, -1)
    dq_sum = torch.zeros_like(q)
    for part in (slice(0, 30), slice(30, 72)):
        dq, dk, dv = (torch.empty_like(t) for t in (q, k[:, part], v[:, part]))
        arguments = (dout, q, k[:, part], v[:, part], out, softmax_lse, None, dq, dk, dv)
        ops.backward(*arguments, 32**-0.5, -1, -1, False)
        torch.testing.assert_close(dk, exact.dk[:, part].float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dv, exact.dv[:, part].float(), rtol=1e-4, atol=1e-5)
        dq_sum += dq
    torch.testing.assert_close(dq_sum, exact.dq.float(), rtol=1e-4, atol=1e-5)


def test_flops_are_counted_like_those_of_torch() -> None:
    q, k, v = (torch.randn(2, 64, 4, 32, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as ours:
        flash_attn_func(q, k, v).sum().backward()
    with FlopCounterMode(display=False) as torch_own:
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
        (scores @ v.transpose(1, 2)).sum().backward()
    scores_again = 2 * 2 * 4 * 64 * 64 * 32  # the recomputation of q k^T in the backward
    assert ours.get_total_flops() == torch_own.get_total_flops() + scores_again
