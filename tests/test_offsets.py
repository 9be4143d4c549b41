"""Offsets past 2^31 elements: by strides on every backend, by size on a GPU that has the memory."""

from __future__ import annotations

import pytest
import torch
from backends import GPU, on_devices
from cases import Case, make_gradients, make_inputs
from compare import Results, check_results, op_results, poisoned_allocations
from torch import Tensor

from flash_attn import ops

LONG = 2**31  # elements: past every 32-bit index


def far_apart(values: Tensor, dim: int, buffer: Tensor, start: int) -> Tensor:
    """values in the buffer from start on; the first and the last along dim are LONG apart."""
    strides = [0, 0, 0, 0]
    stride = 1
    for other in (3, 2, 1, 0):
        if other != dim:
            strides[other] = stride
            stride *= values.shape[other]
    strides[dim] = LONG // (values.shape[dim] - 1)
    assert start + stride <= strides[dim], "tensors would overlap"
    return buffer.as_strided(values.shape, strides, start).copy_(values)


@on_devices
@pytest.mark.parametrize("dim", [0, 1, 2], ids=["batch", "rows", "heads"])
def test_strides_past_32_bits(dim: int, device: str) -> None:
    """Every tensor of a call in one buffer of 4 GiB, of which a CPU touches little."""
    case = Case("far", batch=2, seqlen_q=33, seqlen_k=33, heads=2, heads_k=2, causal=True)
    inputs = [tensor.detach() for tensor in make_inputs(case, torch.bfloat16, device)]
    dout, dlse = make_gradients(case, torch.bfloat16, device)
    q, k, v, dout, *expected = inputs + [dout, *op_results(case, [*inputs, dout], dlse)]
    out, softmax_lse, _, *grads = expected

    room = 1 << 20
    buffer = torch.empty(LONG + 10 * room, dtype=torch.bfloat16, device=device)
    if device != "cpu":
        buffer.fill_(float("nan"))
    nan = torch.full_like(q, float("nan"))
    far = [
        far_apart(values, dim, buffer, number * room)
        for number, values in enumerate((q, k, v, dout, out, nan, nan, nan))
    ]
    far_q, far_k, far_v, far_dout, far_out, *far_grads = far
    scale = 64**-0.5
    got_out, got_lse = ops.forward(far_q, far_k, far_v, scale, -1, 0)
    assert torch.equal(got_out, out) and torch.equal(got_lse, softmax_lse)
    ops.backward(
        *(far_dout, far_q, far_k, far_v, far_out, softmax_lse, dlse),
        *(*far_grads, scale, -1, 0, True),
    )
    for gradient, other in zip(far_grads, grads, strict=True):
        assert torch.equal(gradient, other)


def gpu_memory_gib() -> float:
    if not torch.cuda.is_available():
        return 0.0
    return torch.cuda.get_device_properties(0).total_memory / 2**30


@pytest.mark.gpu
@pytest.mark.skipif(gpu_memory_gib() < 75, reason="needs a GPU with 80 GB of memory")
@pytest.mark.parametrize("long", ["queries", "keys"])
@pytest.mark.parametrize("heads", [512, 1024], ids=["two_batch_entries", "one_batch_entry"])
def test_more_than_2_to_31_elements(long: str, heads: int) -> None:
    """Contiguous tensors; the first and the last head are compared with exact attention."""
    seqlen_q, seqlen_k = (16640, 64) if long == "queries" else (64, 16640)
    batch = 1024 // heads
    q_sizes, k_sizes = (batch, seqlen_q, heads, 128), (batch, seqlen_k, heads, 128)
    kind = {"device": GPU, "dtype": torch.bfloat16}
    q, k, v, dout = (torch.randn(size, **kind) for size in (q_sizes, k_sizes, k_sizes, q_sizes))
    assert max(q.numel(), k.numel()) > LONG
    dlse = torch.randn(batch, heads, seqlen_q, device=GPU)
    case = Case(
        "one_head",
        batch=1,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        heads=1,
        heads_k=1,
        head_dim=128,
    )
    with poisoned_allocations():
        out, softmax_lse, _, dq, dk, dv = op_results(case, [q, k, v, dout], dlse)
    for part in (slice(0, 1), slice(-1, None)):
        one_q, one_k, one_v, one_dout, one_out, one_dq, one_dk, one_dv = (
            tensor[part, :, part].contiguous() for tensor in (q, k, v, dout, out, dq, dk, dv)
        )
        inputs = (one_q.requires_grad_(), one_k.requires_grad_(), one_v.requires_grad_())
        one_lse = softmax_lse[part, part].contiguous()
        got = Results(one_out, one_lse, one_dq, one_dk, one_dv)
        check_results(case, inputs, one_dout, dlse[part, part], got)
