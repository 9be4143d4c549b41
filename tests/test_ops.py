"""The ops as torch sees them: schemas, fake kernels, compilation, autocast, checkpointing."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backends import on_backends, on_devices, usual_dtype
from cases import Case, lay_out, make_gradients, make_inputs
from compare import Results, check_results, flash_results
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


def op_inputs(
    layout: str = "bshd", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, ...]:
    q, k, v = (tensor.detach() for tensor in make_inputs(CASE, dtype, device))
    return tuple(lay_out(tensor, layout) for tensor in (q, k, v))


def backward_arguments(inputs: tuple[Tensor, ...], dlse: Tensor | None) -> tuple[object, ...]:
    out, softmax_lse = ops.forward(*inputs, 0.2, -1, 0)
    gradients = [torch.zeros_like(tensor) for tensor in inputs]
    return (torch.ones_like(out), *inputs, out, softmax_lse, dlse, *gradients, 0.2, -1, 0, False)


@on_devices
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_forward(layout: str, device: str) -> None:
    inputs = op_inputs(layout, usual_dtype(device), device)
    torch.library.opcheck(ops.forward, (*inputs, 0.2, 5, 0))


@on_devices
def test_opcheck_forward_of_packed_tensors(device: str) -> None:
    q = torch.randn(40, 4, 32, device=device).to(usual_dtype(device))
    cu_seqlens = torch.tensor([0, 10, 40], dtype=torch.int32, device=device)
    packed = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": 30}
    torch.library.opcheck(ops.forward, (q, q, q, 0.2, 5, 0), packed)


@on_devices
@pytest.mark.parametrize("has_dlse", [False, True])
def test_opcheck_backward(has_dlse: bool, device: str) -> None:
    dlse = torch.ones(2, 4, 40, device=device) if has_dlse else None
    # opcheck compares two runs bit by bit.
    *arguments, _ = backward_arguments(op_inputs("bshd", usual_dtype(device), device), dlse)
    torch.library.opcheck(ops.backward, (*arguments, True))


@on_devices
@pytest.mark.parametrize("head_dim", [20, 32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_results_lie_as_real_ones(layout: str, head_dim: int, device: str) -> None:
    """Sizes, strides and dtypes of every result, also of the gradients."""
    sizes = [(2, 40, 4, head_dim), (2, 72, 2, head_dim), (2, 72, 2, head_dim)]
    real_inputs = tuple(
        lay_out(torch.randn(size, device=device).bfloat16(), layout).requires_grad_()
        for size in sizes
    )

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


@on_devices
def test_softmax_d_of_the_fake_kernel(device: str) -> None:
    arguments = backward_arguments(op_inputs("bshd", usual_dtype(device), device), None)
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


@on_devices
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training_step_equals_eager(name: str, device: str) -> None:
    """One graph with forward and backward, through out and lse, with window and negative scale."""
    function, sizes = COMPILED[name]
    dtype = usual_dtype(device)
    inputs = [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in sizes]

    def step(*tensors: Tensor) -> Tensor:
        options = {"deterministic": True, "return_attn_probs": True}
        plain, lse, _ = function(*tensors, causal=True, **options)
        windowed, _, _ = function(*tensors, window_size=(9, 4), softmax_scale=-0.3, **options)
        product = plain.float() * windowed.float()
        return product.sum() + lse.nan_to_num(posinf=0.0).square().sum()

    torch._dynamo.reset()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    gradients = torch.autograd.grad(loss, inputs)
    expected_loss = step(*inputs)
    expected = torch.autograd.grad(expected_loss, inputs)
    torch.testing.assert_close(loss, expected_loss)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.skipif(
    shutil.which("cc") is None or not Path(sysconfig.get_paths()["include"], "Python.h").exists(),
    reason="torch's compiler needs a C compiler and Python.h",
)
@on_devices
def test_compiled_by_inductor_with_changing_lengths(device: str) -> None:
    """The default compiler, strided inputs inside of the graph, and no recompilation per length."""
    torch._dynamo.reset()
    weight = torch.randn(32, 3 * 64, device=device, requires_grad=True)
    dtype = usual_dtype(device)

    def layer(x: Tensor) -> Tensor:
        qkv = (x @ weight).to(dtype).view(*x.shape[:2], 3, 4, 16)
        q, k, v = (tensor.relu() for tensor in qkv.transpose(1, 3).unbind(2))
        out = flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
        return out.flatten(2).float()

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    counter = torch._dynamo.testing.CompileCounter()
    counted = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for seqlen in (16, 33, 40):
        x = torch.randn(2, seqlen, 32, device=device)
        (gradient,) = torch.autograd.grad(compiled(x).square().sum(), weight)
        (expected,) = torch.autograd.grad(layer(x).square().sum(), weight)
        # The GPU computes in bfloat16, where rounding is relative to the largest terms of a sum.
        cuda_bound = {"rtol": 0.0, "atol": 2e-2 * expected.abs().max().item()}
        bound = {"rtol": 1e-4, "atol": 1e-4} if device == "cpu" else cuda_bound
        torch.testing.assert_close(gradient, expected, **bound)
        counted(x)
    assert counter.frame_count == 1


@on_devices
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool, device: str) -> None:
    inputs = make_inputs(CASE, usual_dtype(device), device)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q * 2, k, v, causal=True, deterministic=True).tanh()

    checkpointed = checkpoint(layer, *inputs, use_reentrant=use_reentrant)
    checkpointed.sum().backward()
    expected = torch.autograd.grad(layer(*inputs).sum(), inputs)
    for tensor, gradient in zip(inputs, expected, strict=True):
        assert torch.equal(tensor.grad, gradient)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_like_a_matrix_product(dtype: torch.dtype, device: str) -> None:
    q, k, v = make_inputs(CASE, torch.float32, device)
    half_k = k.detach().to(dtype).requires_grad_()
    options = {"causal": True, "deterministic": True}
    with torch.autocast(device, dtype):
        out = flash_attn_func(q, half_k, v, **options)
        assert out.dtype == (q.flatten(1) @ q.flatten(1).T).dtype == dtype
    expected_inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
    expected = flash_attn_func(*expected_inputs, **options)
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


@on_devices
@pytest.mark.parametrize("is_compiled", [False, True])
def test_autocast_of_packed_tensors(is_compiled: bool, device: str) -> None:
    def layer(qkv: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return flash_attn_qkvpacked_func(qkv)

    qkv = torch.randn(2, 10, 3, 2, 16, device=device)
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if is_compiled else layer
    assert torch.equal(run(qkv), flash_attn_qkvpacked_func(qkv.bfloat16()))


@on_devices
@pytest.mark.parametrize("layout", ["contiguous", "packed", "shifted"])
def test_backward_writes_every_element_it_is_given(layout: str, device: str) -> None:
    """Gradients go into tensors full of NaN, which may be parts of others."""
    inputs = make_inputs(CASE, torch.bfloat16, device)
    dout, dlse = make_gradients(CASE, torch.bfloat16, device)
    expected = flash_results(CASE, inputs, dout, dlse, deterministic=True)
    room = [
        torch.full((*t.shape[:-1], 3 * 32), float("nan"), dtype=t.dtype, device=device)
        for t in inputs
    ]
    start = {"contiguous": 0, "packed": 32, "shifted": 33}[layout]
    gradients = [tensor[..., start : start + 32] for tensor in room]
    if layout == "contiguous":
        gradients = [tensor.contiguous() for tensor in gradients]
    out, softmax_lse = expected.out, expected.softmax_lse
    scale = 32**-0.5
    ops.backward(dout, *inputs, out, softmax_lse, dlse, *gradients, scale, -1, 0, True)
    for gradient, other in zip(gradients, expected[2:], strict=True):
        assert torch.equal(gradient, other)
    if layout != "contiguous":
        for tensor in room:  # nothing beside them was touched
            assert tensor[..., :start].isnan().all() and tensor[..., start + 32 :].isnan().all()


MAYBE_MISALIGNED = ["dout", "q", "k", "v", "out", "softmax_lse", "dlse", "dq", "dk", "dv"]


@on_devices
@pytest.mark.parametrize("number", range(len(MAYBE_MISALIGNED)), ids=MAYBE_MISALIGNED)
def test_any_one_tensor_may_be_misaligned(number: int, device: str) -> None:
    """One tensor that starts, or has rows that start, beside a multiple of 16 bytes."""
    inputs = op_inputs("bshd", torch.bfloat16, device)
    dlse = torch.randn(2, 4, 40, device=device)
    *arguments, _ = backward_arguments(inputs, dlse)
    ops.backward(*arguments, True)
    expected = [tensor.clone() for tensor in arguments[7:10]]
    tensor = arguments[number]
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan"))
    arguments[number] = wide[..., 1:-2].copy_(tensor)
    out, softmax_lse = ops.forward(*arguments[1:4], 0.2, -1, 0)
    assert torch.equal(out, arguments[4]) and torch.equal(softmax_lse, arguments[5])
    for gradient in arguments[7:10]:
        gradient.fill_(float("nan"))
    ops.backward(*arguments, True)
    for gradient, other in zip(arguments[7:10], expected, strict=True):
        assert torch.equal(gradient, other)


@on_backends
def test_any_strides_of_dout_and_dlse(device: str, dtype: torch.dtype) -> None:
    """Expanded and transposed gradients arrive from sum() and friends."""
    inputs = make_inputs(CASE, dtype, device)
    one = torch.ones((), device=device)
    for dout in (
        one.expand(2, 40, 4, 32),
        torch.randn(32, 4, 40, 2, device=device).to(dtype).permute(3, 2, 1, 0),
    ):
        for dlse in (
            one.expand(2, 4, 40),
            torch.randn(40, 4, 2, device=device).permute(2, 1, 0),
        ):
            got = flash_results(CASE, inputs, dout, dlse)
            check_results(CASE, inputs, dout, dlse, got)


@on_backends
def test_softmax_d_is_what_it_says(device: str, dtype: torch.dtype) -> None:
    """rowsum(dout * out) - dlse: the part of the backward that others build on."""
    dlse = torch.randn(2, 4, 40, device=device)
    arguments = backward_arguments(op_inputs("bshd", dtype, device), dlse)
    softmax_d = ops.backward(*arguments)
    dout, out = arguments[0], arguments[4]
    expected = (dout.float() * out.float()).sum(-1).transpose(1, 2) - dlse
    torch.testing.assert_close(softmax_d[..., :40], expected)
    assert not softmax_d[..., 40:].any()


@on_backends
def test_softmax_lse_of_other_keys_gives_partial_gradients(device: str, dtype: torch.dtype) -> None:
    """Backward with lse and out of the whole over a part of the keys, as rings of devices do."""
    whole = Case("whole", heads=4, heads_k=2, seqlen_q=40, seqlen_k=72, head_dim=32)
    q, k, v = inputs = make_inputs(whole, dtype, device)
    dout, dlse = make_gradients(whole, dtype, device)
    dlse.zero_()
    out, softmax_lse = ops.forward(q.detach(), k.detach(), v.detach(), 32**-0.5, -1, -1)
    dq_sum = torch.zeros_like(q, dtype=torch.float32)
    parts = []
    for part in (slice(0, 30), slice(30, 72)):
        dq, dk, dv = (torch.empty_like(t) for t in (q, k[:, part], v[:, part]))
        arguments = (dout, q, k[:, part], v[:, part], out, softmax_lse, None, dq, dk, dv)
        ops.backward(*arguments, 32**-0.5, -1, -1, False)
        parts.append((dk, dv))
        dq_sum += dq
    dk, dv = (torch.cat(halves, dim=1) for halves in zip(*parts, strict=True))
    got = Results(out, softmax_lse, dq_sum.to(dtype), dk, dv)
    check_results(whole, inputs, dout, dlse, got)


def test_flops_are_counted_like_those_of_torch() -> None:
    q, k, v = (torch.randn(2, 64, 4, 32, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as ours:
        flash_attn_func(q, k, v).sum().backward()
    with FlopCounterMode(display=False) as torch_own:
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
        (scores @ v.transpose(1, 2)).sum().backward()
    scores_again = 2 * 2 * 4 * 64 * 64 * 32  # the recomputation of q k^T in the backward
    assert ours.get_total_flops() == torch_own.get_total_flops() + scores_again
