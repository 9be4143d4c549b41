"""Softcap, ALiBi, dropout and sinks of the ops, alone and together, against exact attention."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from backends import on_backends, on_devices, usual_dtype
from option_problems import (
    Problem,
    assert_bit_equal,
    assert_same,
    check_problem,
    check_results,
    make_inputs,
    on_one_torch_thread,
    op_results,
    score_arguments,
)
from reference_options import attention_of_sequences, kept_pairs, philox4x32_7
from torch import Tensor

from flash_attn import ops

pytestmark = on_one_torch_thread

OPTIONS: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": "sequences"},
    "dropout": {"dropout_p": 0.3},
    "sink": {"sink": True},
    "bias": {"bias": "hqk"},
}
DENSE_ONLY = ("bias",)
CAUSAL = {"window": (-1, 0)}
PACKED: dict[str, Any] = {
    "lengths_q": (0, 97, 20, 130),
    "lengths_k": (9, 30, 0, 170),
    "packed_q": True,
    "packed_k": True,
    "unused": (3, 2),
}

PROBLEMS = (
    [Problem(name, **option) for name, option in OPTIONS.items()]
    + [Problem(f"{name}_causal", **option, **CAUSAL) for name, option in OPTIONS.items()]
    + [
        Problem(f"{name}_packed", **option, **PACKED)
        for name, option in OPTIONS.items()
        if name not in DENSE_ONLY
    ]
    + [
        Problem(f"{one}_{other}", **OPTIONS[one], **OPTIONS[other], window=(50, 20))
        for one, other in itertools.combinations(OPTIONS, 2)
    ]
)
EVERYTHING: dict[str, Any] = {
    name: value for option in OPTIONS.values() for name, value in option.items()
}
EVERYTHING_PACKED = EVERYTHING | {"bias": ""}
PROBLEMS += [
    Problem("everything", **EVERYTHING),
    Problem("everything_mqa", **EVERYTHING, **CAUSAL, heads=6, heads_k=1, head_dim=32),
    Problem("everything_packed", **EVERYTHING_PACKED, **PACKED, window=(60, 0)),
    Problem("everything_head_dim_128", **EVERYTHING, **CAUSAL, head_dim=128),
    Problem("everything_head_dim_256", **EVERYTHING, head_dim=256),
    Problem("everything_head_dim_96_32", **EVERYTHING, **CAUSAL, head_dim=96, head_dim_v=32),
    Problem("everything_long", (200,), (333,), **EVERYTHING, **CAUSAL),
    # Each alone, where a kernel may serve just that, over several tiles of queries and keys.
    *(
        Problem(f"{name}_head_dim_{d}", (200,), (333,), **OPTIONS[name], **CAUSAL, head_dim=d)
        for name in ("softcap", "alibi", "dropout")
        for d in (64, 96, 128, 192, 256)
    ),
    Problem("softcap_head_dim_192_128", (200,), (333,), softcap=3.0, head_dim=192, head_dim_v=128),
    Problem("half_the_rows_see_nothing", (130,), (60,), **EVERYTHING, **CAUSAL),
    Problem("no_keys", (130,), (0,), **EVERYTHING),
    Problem("one_query", (1,), (140,), **EVERYTHING),
    # Where tanh is nearly its argument, and where it is nearly 1.
    Problem("softcap_high", softcap=50.0),
    Problem("softcap_middle", softcap=8.0),
    Problem("softcap_very_high", softcap=3000.0),
    Problem("softcap_low", softcap=0.2),
    Problem("softcap_of_large_scores", softcap=20.0, scale=20.0),
    Problem("alibi_of_heads", alibi="heads"),
    Problem("alibi_long", (150,), (350,), alibi="heads", window=(-1, 0)),
    Problem("alibi_long_q", (350,), (150,), alibi="heads", heads=2, heads_k=2),
    Problem("dropout_low", dropout_p=0.01),
    Problem("dropout_high", dropout_p=0.95, window=(-1, 0)),
    Problem("dropout_window", (300,), (300,), dropout_p=0.5, window=(37, 11)),
]


@on_backends
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_problem(problem: Problem, device: str, dtype: torch.dtype) -> None:
    check_problem(problem, dtype, device)


@on_backends
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("growth", [0.01, -0.01, 0.1])
def test_softcap_of_scores_that_grow_along_the_keys(
    growth: float, head_dim: int, device: str, dtype: torch.dtype
) -> None:
    """By 10 from one tile of keys to the next, or by 100: far more than a maximum may be behind."""
    problem = Problem("growing", (130,), (500,), softcap=300.0, head_dim=head_dim)
    inputs = make_inputs(problem, dtype, device)
    steps = growth * 64 / head_dim * torch.arange(500, device=device)[:, None, None]
    q = (inputs.q.float() / 4 + 1).to(dtype)
    k = (inputs.k.float() / 4 + steps).to(dtype)
    inputs = inputs._replace(q=q, k=k)
    got = op_results(inputs, packed_q=False, packed_k=False)
    check_results(problem, inputs, got)


# Known answers of Philox4x32-7, from the Random123 distribution: counter, key, bits.
PHILOX_VECTORS = (
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    ),
)


@pytest.mark.parametrize(("counter", "key", "bits"), PHILOX_VECTORS)
def test_the_philox_of_these_tests_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], bits: tuple[int, ...]
) -> None:
    words = philox4x32_7(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(word.item() for word in words) == bits


def shown_mask(
    rng_state: Tensor, dropout_p: float, seqlen_q: int, batch: int, heads: int, device: str
) -> Tensor:
    """(batch, heads, seqlen_q, 256), True where the forward kept a probability: all probabilities
    are the same, and the values are a unit matrix."""
    dtype = usual_dtype(device)
    q = torch.zeros(batch, seqlen_q, heads, 64, dtype=dtype, device=device)
    k = torch.zeros(batch, 256, 1, 64, dtype=dtype, device=device)
    v = torch.eye(256, dtype=dtype, device=device).view(1, 256, 1, 256).expand(batch, 256, 1, 256)
    out, lse = ops.forward(q, k, v, 1.0, -1, -1, dropout_p=dropout_p, rng_state=rng_state)
    torch.testing.assert_close(lse, torch.full_like(lse, 256.0).log())
    kept = out != 0
    expected = torch.full_like(out[kept], 1 / (256 * (1 - dropout_p)))
    torch.testing.assert_close(out[kept], expected)
    return kept.transpose(1, 2)


STATES = ((0, 0), (1234, 5), (2**40 + 7, 3), (-1, 2**32 + 9), (2**63 - 1, -1))


@on_devices
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("state", STATES, ids=str)
def test_which_probabilities_dropout_keeps(
    state: tuple[int, int], dropout_p: float, device: str
) -> None:
    """Every one that the rule of the tests' own Philox keeps, and no other; as many as asked."""
    rng_state = torch.tensor(state, device=device)
    got = shown_mask(rng_state, dropout_p, seqlen_q=113, batch=2, heads=3, device=device)
    expected = [kept_pairs(rng_state, dropout_p, head, 113, 256) for head in range(6)]
    assert torch.equal(got.flatten(0, 1), torch.stack(expected))
    rate = (int((1 - dropout_p) * 255) + 1) / 256
    assert abs(rate - (1 - dropout_p)) <= 1 / 256
    samples = got.numel()
    deviation = (rate * (1 - rate) / samples) ** 0.5
    assert abs(got.double().mean().item() - rate) < 4.5 * deviation


@on_devices
def test_dropout_has_no_pattern(device: str) -> None:
    """Neighbours along every axis, and masks of other seeds and offsets, agree by chance alone."""
    seed = torch.tensor([99, 1], device=device)
    mask = shown_mask(seed, 0.5, seqlen_q=128, batch=2, heads=4, device=device)
    others = [
        shown_mask(torch.tensor(state, device=device), 0.5, 128, 2, 4, device)
        for state in ((100, 1), (99, 2), (99 + 2**32, 1))
    ]
    pairs = [(mask, other) for other in others]
    for dim, size in enumerate(mask.shape):
        for step in (1, 2, 8, 16):
            if step < size:
                rest = size - step
                pairs.append((mask.narrow(dim, 0, rest), mask.narrow(dim, step, rest)))
    for one, other in pairs:
        agreeing = (one == other).double()
        assert abs(agreeing.mean().item() - 0.5) < 4.5 * 0.5 / agreeing.numel() ** 0.5
    per_row, per_key = mask.double().mean(dim=3), mask.double().mean(dim=2)
    assert (per_row - 0.5).abs().max() < 6 * 0.5 / 256**0.5
    assert (per_key - 0.5).abs().max() < 6 * 0.5 / 128**0.5


@on_devices
def test_dropout_replays_from_its_state(device: str) -> None:
    problem = Problem("dropout", dropout_p=0.4, window=(-1, 0))
    inputs = make_inputs(problem, usual_dtype(device), device)
    first = op_results(inputs, packed_q=False, packed_k=False)
    assert_bit_equal(op_results(inputs, packed_q=False, packed_k=False), first)
    assert inputs.options.rng_state is not None
    for state in (
        (inputs.options.rng_state + torch.tensor([1, 0], device=device)),
        (inputs.options.rng_state + torch.tensor([0, 1], device=device)),
    ):
        other_options = dataclasses.replace(inputs.options, rng_state=state)
        other = op_results(inputs._replace(options=other_options), packed_q=False, packed_k=False)
        assert not torch.equal(other.out, first.out)
        assert torch.equal(other.softmax_lse, first.softmax_lse)


@on_devices
def test_a_sink_of_minus_infinity_is_none(device: str) -> None:
    inputs = make_inputs(Problem("plain", window=(-1, 0)), usual_dtype(device), device)
    expected = op_results(inputs, packed_q=False, packed_k=False)
    sink = torch.full((4,), float("-inf"), device=device)
    with_sink = inputs._replace(options=dataclasses.replace(inputs.options, sink=sink))
    assert_same(op_results(with_sink, packed_q=False, packed_k=False), expected)


@on_devices
@pytest.mark.parametrize("size", [-200.0, 200.0])
def test_a_sink_far_from_the_scores(size: float, device: str) -> None:
    """Neither overflows: it takes nothing or everything."""
    inputs = make_inputs(Problem("plain"), usual_dtype(device), device)
    expected = op_results(inputs, packed_q=False, packed_k=False)
    sink = torch.full((4,), size, device=device)
    with_sink = inputs._replace(options=dataclasses.replace(inputs.options, sink=sink))
    got = op_results(with_sink, packed_q=False, packed_k=False)
    if size > 0:
        assert got.out.abs().max() < 1e-30
        torch.testing.assert_close(got.softmax_lse, torch.full_like(got.softmax_lse, size))
    else:
        torch.testing.assert_close(got.out, expected.out)
        torch.testing.assert_close(got.softmax_lse, expected.softmax_lse)


@on_devices
def test_rows_without_keys_have_the_sink_alone(device: str) -> None:
    problem = Problem("rows_without_keys", (100,), (30,), sink=True, window=(-1, 0))
    inputs = make_inputs(problem, usual_dtype(device), device)
    got = op_results(inputs, packed_q=False, packed_k=False)
    assert not got.out[:, :70].any() and not got.dq[:, :70].any()
    assert inputs.options.sink is not None
    sink = inputs.options.sink[None, :, None].expand(1, 4, 70)
    assert_same((got.softmax_lse[:, :, :70],), (sink,))


@on_devices
def test_gradient_of_a_sink(device: str) -> None:
    """It follows from softmax_d: a sink is a key of value 0 that every query sees."""
    inputs = make_inputs(Problem("sink", sink=True, window=(-1, 0)), usual_dtype(device), device)
    got = op_results(inputs, packed_q=False, packed_k=False)
    assert inputs.options.sink is not None
    softmax_d = got.softmax_d[:, :, : got.softmax_lse.shape[2]].double()
    probability = (inputs.options.sink[None, :, None] - got.softmax_lse.double()).exp()
    gradient = -(probability * softmax_d).sum(dim=(0, 2))

    sink = inputs.options.sink.double().requires_grad_()
    options = dataclasses.replace(inputs.options, sink=sink)
    tensors = (tensor.double() for tensor in inputs[:3])
    exact = attention_of_sequences(*tensors, inputs.spans_q, inputs.spans_k, options)
    (expected,) = torch.autograd.grad(exact, sink, (inputs.dout.double(), inputs.dlse.double()))
    tolerance = 1e-4 if device == "cpu" else 5e-2
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


@on_devices
def test_slopes_of_heads_are_those_of_every_sequence(device: str) -> None:
    inputs = make_inputs(Problem("alibi", alibi="heads"), usual_dtype(device), device)
    expected = op_results(inputs, packed_q=False, packed_k=False)
    assert inputs.options.alibi_slopes is not None
    slopes = inputs.options.alibi_slopes.expand(2, 4).contiguous()
    other = inputs._replace(options=dataclasses.replace(inputs.options, alibi_slopes=slopes))
    assert_bit_equal(op_results(other, packed_q=False, packed_k=False), expected)


@on_devices
@pytest.mark.parametrize("option", list(OPTIONS))
def test_nan_is_not_lost(option: str, device: str) -> None:
    """A diverged query reaches its row, also through tanh; no other row."""
    inputs = make_inputs(Problem(option, **OPTIONS[option]), usual_dtype(device), device)
    inputs.q[1, 40, 3, 5] = float("nan")
    got = op_results(inputs, packed_q=False, packed_k=False)
    assert got.softmax_lse[1, 3, 40].isnan() and got.softmax_lse.isnan().sum() == 1
    rows = got.out.isnan().any(dim=3)
    assert rows[1, 40, 3] and rows.sum() == 1
    assert got.dq[1, 40, 3].isnan().any() and got.dk[1, :, 1].isnan().any()
    assert not got.dk[0].isnan().any() and not got.dk[1, :, 0].isnan().any()


@on_devices
def test_infinite_scores_are_capped(device: str) -> None:
    """Those of the largest finite queries and keys."""
    dtype = usual_dtype(device)
    q = torch.full((1, 5, 1, 32), 1e20, dtype=dtype, device=device)
    k = torch.full((1, 130, 1, 32), 1e20, dtype=dtype, device=device)
    k[:, ::2] *= -1
    v = torch.randn(1, 130, 1, 32, device=device).to(dtype)
    out, lse = ops.forward(q, k, v, 0.5, -1, -1, softcap=2.0)
    expected = torch.tensor([2.0, -2.0]).repeat(65).logsumexp(dim=0)
    torch.testing.assert_close(lse, torch.full_like(lse, expected.item()))
    assert out.isfinite().all()


def test_options_that_are_off_change_nothing() -> None:
    """To the bit: they branch around the same code. An rng_state is no matter then."""
    inputs = make_inputs(Problem("plain", window=(30, 5)), torch.float32, "cpu")
    q, k, v = inputs[:3]
    plain = ops.forward(q, k, v, 0.2, 30, 5)
    off = score_arguments(inputs.options) | {"rng_state": torch.tensor([1, 2])}
    got = ops.forward(q, k, v, 0.2, 30, 5, **off)
    assert all(torch.equal(one, other) for one, other in zip(got, plain, strict=True))
