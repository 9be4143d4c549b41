"""return_max_logits: the largest score that enters the softmax of every query head."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from backends import on_backends, on_devices, usual_dtype
from option_problems import Inputs, Problem, cu_seqlens, make_inputs, on_one_torch_thread
from reference_options import Options
from torch import Tensor

from flash_attn import flash_attn_func, flash_attn_varlen_func, ops
from flash_attn.reference import masked_scores

pytestmark = on_one_torch_thread

CAUSAL = {"window": (-1, 0)}
PACKED = {"packed_q": True, "packed_k": True, "unused": (3, 2)}

PROBLEMS = (
    Problem("plain"),
    Problem("causal", (200,), (333,), **CAUSAL),
    Problem("long", (64,), (4097,), heads=2, heads_k=2),
    Problem("window", (300,), (300,), window=(37, 11)),
    Problem("half_the_rows_see_nothing", (130,), (60,), **CAUSAL),
    Problem("one_query", (1,), (140,), heads=6, heads_k=1),
    Problem("softcap", softcap=1.5, window=(50, 20)),
    Problem("alibi", (150,), (350,), alibi="heads", heads_k=4, **CAUSAL),
    Problem("dropout_and_sink", dropout_p=0.3, sink=True),
    Problem("bias", bias="hqk", softcap=3.0, **CAUSAL),
    Problem("packed", (0, 97, 20, 130), (9, 30, 0, 170), **PACKED, **CAUSAL),
    Problem("packed_alibi", (0, 97, 20, 130), (9, 30, 0, 170), **PACKED, alibi="sequences"),
    *[Problem(f"head_dim_{cols}", head_dim=cols, **CAUSAL) for cols in (32, 96, 128, 192, 256)],
    Problem("head_dim_192_128", (300,), (300,), head_dim=192, head_dim_v=128),
)


def expected_max(inputs: Inputs, heads: int) -> Tensor:
    largest = torch.full((heads,), -torch.inf, dtype=torch.float64)
    options: Options = inputs.options
    for batch, (of_q, of_k) in enumerate(zip(inputs.spans_q, inputs.spans_k, strict=True)):
        if of_q.length == 0 or of_k.length == 0:
            continue
        slopes, bias = options.alibi_slopes, options.bias
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[batch : batch + 1]
        if bias is not None and bias.shape[0] > 1:
            bias = bias[batch : batch + 1]
        scores, visible = masked_scores(
            inputs.q[of_q.entry, None, of_q.begin : of_q.end].double(),
            inputs.k[of_k.entry, None, of_k.begin : of_k.end].double(),
            options.scale,
            window_size=options.window,
            softcap=options.softcap,
            alibi_slopes=slopes,
            bias=bias,
        )
        hidden = scores.masked_fill(~visible, -torch.inf)
        largest = torch.maximum(largest, hidden.amax(dim=(0, 2, 3)).cpu())
    return largest


def op_max(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    options, device = inputs.options, inputs.q.device
    q, k, v = inputs[:3]
    given = {
        name: getattr(options, name)
        for name in ("softcap", "alibi_slopes", "bias", "dropout_p", "rng_state", "sink")
    }
    if problem.packed_q:
        q, k, v = q[0], k[0], v[0]
        given["cu_seqlens_q"] = cu_seqlens(inputs.spans_q, device)
        given["cu_seqlens_k"] = cu_seqlens(inputs.spans_k, device)
    out: Tensor
    settings = (options.scale, *options.window)
    out, lse, max_logits = ops.forward_with_max_logits(q, k, v, *settings, **given)
    plain_out, plain_lse = ops.forward(q, k, v, *settings, **given)
    tolerance = 0.0 if device.type == "cpu" else 2e-2
    torch.testing.assert_close(out, plain_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, plain_lse, rtol=1e-4, atol=1e-4)
    return out, lse, max_logits


@on_backends
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_problem(problem: Problem, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(problem, dtype, device)
    max_logits = op_max(problem, inputs)[2]
    assert max_logits.shape == (problem.heads,) and max_logits.dtype == torch.float32
    expected = expected_max(inputs, problem.heads)
    torch.testing.assert_close(max_logits.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@on_devices
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_maximum_that_creeps_up(sign: float, device: str) -> None:
    """From key to key by less than what makes a running maximum follow; also of negative scores."""
    dtype = usual_dtype(device)
    q = torch.full((1, 70, 2, 64), sign, device=device, dtype=dtype)
    steps = torch.arange(1000, device=device).div(256, rounding_mode="floor")
    k = ((20 + sign * steps) / 64).to(dtype).view(1, 1000, 1, 1).repeat(1, 1, 2, 64)
    v = torch.randn(1, 1000, 2, 64, device=device).to(dtype)
    _, max_logits = flash_attn_func(q, k, v, softmax_scale=1.0, return_max_logits=True)
    scores = q[0, 0, 0].double() @ k[0, :, 0].double().T
    largest = scores.max().float().expand(2)
    torch.testing.assert_close(max_logits, largest, rtol=1e-6, atol=1e-6)
    flipped = flash_attn_func(q, k.flip(1), v, softmax_scale=1.0, return_max_logits=True)[1]
    torch.testing.assert_close(flipped, largest, rtol=1e-6, atol=1e-6)


@on_devices
def test_nothing_visible(device: str) -> None:
    dtype = usual_dtype(device)
    q = torch.randn(1, 8, 2, 32, device=device, dtype=dtype)
    k = torch.randn(1, 0, 2, 32, device=device, dtype=dtype)
    for queries in (q, q[:, :0], q[:0]):
        keys = k[: queries.shape[0]]
        _, max_logits = flash_attn_func(queries, keys, keys, return_max_logits=True)
        assert max_logits.tolist() == [-torch.inf] * 2


@on_devices
def test_place_among_the_results_and_no_gradient(device: str) -> None:
    inputs = make_inputs(Problem("plain"), usual_dtype(device), device)
    q, k, v = (tensor.requires_grad_() for tensor in inputs[:3])
    out, lse, max_logits = flash_attn_func(q, k, v, return_softmax_lse=True, return_max_logits=True)
    assert out.requires_grad and lse.requires_grad and not max_logits.requires_grad
    expected = flash_attn_func(q, k, v)
    (out.float().sum() + lse.sum()).backward()
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    both = flash_attn_func(q, k, v, return_max_logits=True)
    assert len(both) == 2 and torch.equal(both[1], max_logits)
    four = flash_attn_func(q, k, v, return_attn_probs=True, return_max_logits=True)
    assert len(four) == 4 and torch.equal(four[3], max_logits)
    with torch.no_grad():
        assert torch.equal(flash_attn_func(q, k, v, return_max_logits=True)[1], max_logits)


@on_devices
def test_packed_sequences(device: str) -> None:
    inputs = make_inputs(Problem("plain"), usual_dtype(device), device)
    q, k, v = inputs[:3]
    borders = [
        torch.arange(3, device=device, dtype=torch.int32) * tensor.shape[1] for tensor in (q, k)
    ]
    packed = (tensor.flatten(0, 1) for tensor in (q, k, v))
    _, got = flash_attn_varlen_func(*packed, *borders, 70, 110, return_max_logits=True)
    expected = flash_attn_func(q, k, v, return_max_logits=True)[1]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@on_devices
def test_a_bias_that_hides_the_largest(device: str) -> None:
    inputs = make_inputs(Problem("plain"), usual_dtype(device), device)
    bias = torch.zeros(110, device=device)
    bias[50:] = -torch.inf
    options = dataclasses.replace(inputs.options, bias=bias.view(1, 1, 1, 110))
    problem = Problem("plain")
    got = op_max(problem, inputs._replace(options=options))[2]
    k, v = inputs.k[:, :50], inputs.v[:, :50]
    expected = ops.forward_with_max_logits(inputs.q, k, v, inputs.options.scale, -1, -1)[2]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
