"""Sequences of the ops: packed rows, and keys that are a part of a cache, against exact attention
of one sequence after the other."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from backends import on_backends, on_devices, usual_dtype
from compare import assert_as_exact_as_torch
from option_problems import (
    Inputs,
    Problem,
    Results,
    assert_bit_equal,
    assert_same,
    check_lse,
    check_problem,
    cu_seqlens,
    fp32_floors,
    make_inputs,
    on_one_torch_thread,
    op_results,
    op_threads,
    outside,
)
from reference_options import Span, attention_of_sequences
from torch import Tensor

from flash_attn import ops

pytestmark = on_one_torch_thread

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


def packed(
    name: str, lengths_q: tuple[int, ...], lengths_k: tuple[int, ...], **options: Any
) -> Problem:
    return Problem(name, lengths_q, lengths_k, packed_q=True, packed_k=True, **options)


RAGGED_Q = (1, 97, 128, 5, 63, 200)
RAGGED_K = (7, 97, 65, 129, 1, 150)
WITH_EMPTY_Q = (0, 40, 0, 70, 30, 0)
WITH_EMPTY_K = (20, 0, 0, 100, 30, 9)

PROBLEMS = [
    packed("one_sequence", (130,), (130,)),
    packed("equal", (96, 96, 96), (96, 96, 96)),
    packed("ragged", RAGGED_Q, RAGGED_K),
    packed("ragged_causal", RAGGED_Q, RAGGED_K, window=(-1, 0)),
    packed("ragged_window", RAGGED_Q, RAGGED_K, window=(20, 9)),
    packed("ragged_window_left", RAGGED_Q, RAGGED_K, window=(33, 0)),
    packed("self_causal", (100, 3, 160), (100, 3, 160), window=(-1, 0)),
    packed("mha", RAGGED_Q, RAGGED_K, heads=2, heads_k=2, head_dim=32),
    packed("mqa", RAGGED_Q, RAGGED_K, heads=4, heads_k=1, window=(-1, 0)),
    packed("no_queries_or_keys", WITH_EMPTY_Q, WITH_EMPTY_K),
    packed("no_queries_or_keys_causal", WITH_EMPTY_Q, WITH_EMPTY_K, window=(-1, 0)),
    packed("nothing", (0, 0, 0), (0, 0, 0)),
    packed("all_without_queries", (0, 0), (30, 140)),
    packed("all_without_keys", (30, 140), (0, 0)),
    packed("nothing_but_unused", (0, 0), (0, 0), unused=(3, 200)),
    packed("unused", RAGGED_Q, RAGGED_K, unused=(3, 150), window=(-1, 0)),
    packed("unused_and_empty", WITH_EMPTY_Q, WITH_EMPTY_K, unused=(130, 5)),
    packed("many_short", tuple(range(1, 40)), tuple(range(39, 0, -1)), heads=2, head_dim=32),
    packed("single_tokens", (1,) * 50, (1,) * 50, heads=2, head_dim=32, window=(-1, 0)),
    packed("long_and_short", (400, 2, 2), (3, 500, 3), window=(-1, 0), heads=2, heads_k=1),
    packed("head_dim_128", RAGGED_Q, RAGGED_K, head_dim=128, window=(-1, 0)),
    packed("head_dim_256", RAGGED_Q, RAGGED_K, head_dim=256, unused=(1, 1)),
    packed("head_dim_72", RAGGED_Q, RAGGED_K, head_dim=72),
    packed("head_dim_96_32", RAGGED_Q, RAGGED_K, head_dim=96, head_dim_v=32, unused=(5, 9)),
    packed("head_dim_192_128", RAGGED_Q, RAGGED_K, head_dim=192, head_dim_v=128, window=(-1, 0)),
    Problem("queries_packed", (1, 97, 0, 128), (70,) * 4, packed_q=True, unused=(2, 70)),
    Problem("keys_packed", (70,) * 4, (1, 97, 0, 128), packed_k=True, unused=(2, 70)),
]
RAGGED = PROBLEMS[3]


@on_backends
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_problem(problem: Problem, device: str, dtype: torch.dtype) -> None:
    check_problem(problem, dtype, device)


def random_problem(number: int) -> Problem:
    """The same problem for a number everywhere."""
    draw = random.Random(number)
    sequences, heads_k = draw.randint(1, 5), draw.randint(1, 2)

    def lengths() -> tuple[int, ...]:
        return tuple(draw.choice((0, draw.randint(1, 260))) for _ in range(sequences))

    return packed(
        f"random_{number}",
        lengths(),
        lengths(),
        heads=heads_k * draw.randint(1, 3),
        heads_k=heads_k,
        head_dim=8 * draw.randint(1, 32),
        window=(draw.choice((-1, draw.randint(0, 99))), draw.choice((-1, 0, draw.randint(0, 99)))),
        unused=(draw.randint(0, 99), draw.randint(0, 99)),
    )


@on_devices
@pytest.mark.parametrize("number", range(20))
def test_random_problem(number: int, device: str) -> None:
    check_problem(random_problem(number), usual_dtype(device), device)


MANY = {  # more sequences than the kernel that lists tiles has threads, more tiles than it sorts
    "sequences": (*range(1, 41),) * 60,
    "tiles": (131, 1500, 129) * 20 + (40, 0, 513),
}


@on_devices
@pytest.mark.parametrize("window", [(-1, 0), (-1, -1)], ids=str)
@pytest.mark.parametrize("many", MANY)
def test_many(many: str, window: tuple[int, int], device: str) -> None:
    """Against as many dense calls as there are lengths."""
    lengths = torch.tensor(MANY[many])
    dtype, total = usual_dtype(device), int(lengths.sum())
    tensors = [torch.randn(total, 1, 64, device=device).to(dtype) for _ in range(4)]
    borders = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))

    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **packed: Tensor) -> tuple[Tensor, ...]:
        out, lse = ops.forward(q, k, v, 0.125, *window, **packed)
        grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
        ops.backward(dout, q, k, v, out, lse, None, *grads, 0.125, *window, False, **packed)
        return out, *grads

    cu = borders.to(device, torch.int32)
    results = run(*tensors, cu_seqlens_q=cu, cu_seqlens_k=cu)
    for length in lengths.unique().tolist():
        rows = borders[:-1][lengths == length][:, None] + torch.arange(length)
        expected = run(*(tensor[rows.to(device)] for tensor in tensors))
        for got, wanted in zip(results, expected, strict=True):
            torch.testing.assert_close(got[rows.to(device)], wanted, rtol=2e-2, atol=2e-2)


@on_devices
def test_results_do_not_depend_on_the_longest_length_that_is_said(device: str) -> None:
    """By which tiles are chosen: of 64 columns there are two."""
    lengths = (2000, *(30,) * 50)
    q = torch.randn(sum(lengths), 2, 64, device=device).to(usual_dtype(device))
    cu = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    expected = ops.forward(q, q, q, 0.125, -1, 0, **packed)
    for longest in (2000, 1, INT_MAX, -1, 2**40):
        got = ops.forward(q, q, q, 0.125, -1, 0, **packed, max_seqlen_q=longest)
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


def dense_part(inputs: Inputs, batch: int) -> Inputs:
    """One sequence of packed inputs as a dense batch of one."""
    (_, begin_q, end_q), (_, begin_k, end_k) = inputs.spans_q[batch], inputs.spans_k[batch]
    return Inputs(
        inputs.q[:, begin_q:end_q],
        inputs.k[:, begin_k:end_k],
        inputs.v[:, begin_k:end_k],
        inputs.dout[:, begin_q:end_q],
        inputs.dlse[:, :, begin_q:end_q].contiguous(),
        [Span(0, 0, end_q - begin_q)],
        [Span(0, 0, end_k - begin_k)],
        inputs.options,
    )


@on_devices
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.packed_q and p.packed_k], ids=str)
def test_packed_equals_a_loop_of_dense_calls(problem: Problem, device: str) -> None:
    """To the bit on CPU, where a sequence is cut into the same tiles either way."""
    inputs = make_inputs(problem, usual_dtype(device), device)
    got = op_results(inputs, packed_q=True, packed_k=True)
    for batch, (of_q, of_k) in enumerate(zip(inputs.spans_q, inputs.spans_k, strict=True)):
        rows, keys = slice(of_q.begin, of_q.end), slice(of_k.begin, of_k.end)
        expected = op_results(dense_part(inputs, batch), packed_q=False, packed_k=False)
        parts = (
            got.out[:, rows],
            got.softmax_lse[:, :, rows],
            got.dq[:, rows],
            got.dk[:, keys],
            got.dv[:, keys],
        )
        assert_same(parts, expected[:5])


@on_devices
def test_where_softmax_d_has_the_rows_of_packed_queries(device: str) -> None:
    """The gradient of a sink is taken from there: rowsum(dout * out) - dlse, in whole tiles of 128
    rows a sequence. It doesn't matter in rows without keys."""
    inputs = make_inputs(RAGGED, usual_dtype(device), device)
    got = op_results(inputs, packed_q=True, packed_k=True)
    total, sequences = inputs.q.shape[1], len(inputs.spans_q)
    assert got.softmax_d.shape == (1, 4, -(-(total + 128 * sequences) // 128) * 128)
    expected = (inputs.dout.double() * got.out.double()).sum(-1).transpose(1, 2) - inputs.dlse
    has_keys = got.softmax_lse.isfinite()
    for batch, span in enumerate(inputs.spans_q):
        first = (span.begin + 128 * batch) // 128 * 128
        rows = got.softmax_d[:, :, first : first + span.length].double()
        of_span = (slice(None), slice(None), slice(span.begin, span.end))
        wanted = torch.where(has_keys[of_span], expected[of_span], rows)
        torch.testing.assert_close(rows, wanted, rtol=0, atol=1e-4)


def test_same_results_for_every_thread_count() -> None:
    problem = dataclasses.replace(
        RAGGED, softcap=5.0, alibi="sequences", dropout_p=0.2, sink=True, unused=(5, 5)
    )
    inputs = make_inputs(problem, torch.bfloat16, "cpu")
    results = [op_results(inputs, True, True, threads=count) for count in (1, 2, 5)]
    assert_bit_equal(results[1], results[0])
    assert_bit_equal(results[2], results[0])


@on_devices
def test_no_sequences(device: str) -> None:
    """Of a batch of none every row is unused."""
    dtype = usual_dtype(device)
    q = torch.full((40, 2, 32), float("nan"), dtype=dtype, device=device)
    none = torch.tensor([0], dtype=torch.int32, device=device)
    out, lse = ops.forward(q, q, q, 0.1, -1, -1, cu_seqlens_q=none, cu_seqlens_k=none)
    assert out.shape == q.shape and not out.any()
    assert lse.shape == (2, 40) and (lse == float("inf")).all()
    grads = [torch.full_like(q, float("nan")) for _ in range(3)]
    arguments = {"cu_seqlens_q": none, "cu_seqlens_k": none}
    ops.backward(q, q, q, q, out, lse, None, *grads, 0.1, -1, -1, True, **arguments)
    assert not any(grad.any() for grad in grads)


@on_devices
def test_packed_rows_of_any_layout(device: str) -> None:
    """A part of packed q, k and v, rows with room behind them."""
    inputs = make_inputs(RAGGED, usual_dtype(device), device)
    expected = op_results(inputs, packed_q=True, packed_k=True)

    def apart(tensor: Tensor) -> Tensor:
        entries, rows, heads, cols = tensor.shape
        wide = tensor.new_full((entries, rows + 1, heads + 1, cols + 8), float("nan"))
        wide[:, 1:, 1:, :cols] = tensor
        return wide[:, 1:, 1:, :cols]

    laid_out = inputs._replace(
        q=apart(inputs.q), k=apart(inputs.k), v=apart(inputs.v), dout=apart(inputs.dout)
    )
    assert not laid_out.q.is_contiguous()
    assert_bit_equal(op_results(laid_out, packed_q=True, packed_k=True), expected)


GARBAGE = [
    (0, 0, 0, 0, 0),
    (0, 500, 40, 9, 100),
    (INT_MAX, INT_MIN, INT_MAX, INT_MIN, INT_MAX),
    (INT_MIN, INT_MIN, 0, INT_MAX, INT_MAX),
    (100, 80, 60, 40, 20),
    (-5, 20, 30, 300, 301),
    (0, 100, 0, 100, 0),
    (90, 95, 0, 100, 100),
]


@on_devices
@pytest.mark.parametrize("of_k", GARBAGE[1:], ids=str)
@pytest.mark.parametrize("of_q", GARBAGE[1:], ids=str)
def test_garbage_in_cu_seqlens_stays_inside_the_tensors(
    of_q: tuple[int, ...], of_k: tuple[int, ...], device: str
) -> None:
    """Results mean nothing then, but what lies around the gradients stays as it was."""
    dtype = usual_dtype(device)
    q, k, v, dout = (torch.randn(100, 2, 32, device=device).to(dtype) for _ in range(4))
    cu_q, cu_k = (torch.tensor(cu, dtype=torch.int32, device=device) for cu in (of_q, of_k))
    arguments = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    out, lse = ops.forward(q, k, v, 0.2, -1, 0, **arguments)
    around = [torch.full((500, 2, 32), 7.0, dtype=dtype, device=device) for _ in range(3)]
    grads = [tensor[200:300] for tensor in around]
    ops.backward(dout, q, k, v, out, lse, None, *grads, 0.2, -1, 0, True, **arguments)
    for tensor in around:
        assert (tensor[:200] == 7).all() and (tensor[300:] == 7).all()


def check_keys(inputs: Inputs, problem: Problem, **arguments: Tensor) -> None:
    """out and softmax_lse where the keys are those of inputs.spans_k."""
    options, dtype = inputs.options, inputs.q.dtype
    spans = inputs.spans_q, inputs.spans_k
    if problem.packed_q:
        arguments["cu_seqlens_q"] = cu_seqlens(inputs.spans_q, inputs.q.device)
    q = inputs.q[0] if problem.packed_q else inputs.q
    k, v = (t[0] if "cu_seqlens_k" in arguments else t for t in (inputs.k, inputs.v))
    with op_threads():
        out, lse = ops.forward(q, k, v, options.scale, *options.window, **arguments)
    out, lse = (t[None] if problem.packed_q else t for t in (out, lse))
    (exact, exact_lse), (torch_out, _) = (
        attention_of_sequences(*(t.to(kind) for t in inputs[:3]), *spans, options)
        for kind in (torch.float64, dtype)
    )
    got = Results(exact, exact_lse, *inputs[:3], exact_lse, exact.new_empty(0))
    floors = fp32_floors(problem, inputs, got)
    assert_as_exact_as_torch("out", out, torch_out, exact, dtype, floors["out"])
    check_lse(inputs, lse, exact_lse, floors["softmax_lse"])
    assert not outside(out, inputs.spans_q).any()


# Of 6 sequences with room for 200 keys each: how many there are, how many of them to leave out at
# the begin, and the entry of the cache that holds them.
SEQUSED = (200, 0, 1, 97, 150, 130)
LEFTPAD = (0, 0, 1, 96, 20, 129)
ENTRIES = (3, 1, 0, 5, 3, 2)
PARTS = {
    "seqused": (SEQUSED, None, None),
    "leftpad": (None, LEFTPAD, None),
    "batch_idx": (None, None, ENTRIES),
    "seqused_leftpad": (SEQUSED, LEFTPAD, None),
    "seqused_batch_idx": (SEQUSED, None, ENTRIES),
    "all": (SEQUSED, LEFTPAD, ENTRIES),
}


@on_backends
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (40, 10)], ids=str)
@pytest.mark.parametrize("queries", ["dense", "packed"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_keys(
    part: str, queries: str, window: tuple[int, int], device: str, dtype: torch.dtype
) -> None:
    """What of the keys isn't named is full of NaN, and never read."""
    seqused, leftpad, entries = PARTS[part]
    lengths = (1, 3, 97, 0, 40, 8) if queries == "packed" else (20,) * 6
    problem = Problem("keys", lengths, (200,) * 6, packed_q=queries == "packed", window=window)
    inputs = make_inputs(problem, dtype, device)
    spans = [
        Span(
            batch if entries is None else entries[batch],
            0 if leftpad is None else leftpad[batch],
            200 if seqused is None else seqused[batch],
        )
        for batch in range(6)
    ]
    named = torch.zeros(6, 200, dtype=torch.bool, device=device)
    for entry, begin, end in spans:
        named[entry, begin:end] = True
    for tensor in (inputs.k, inputs.v):
        tensor[~named] = float("nan")
    arguments = {
        name: torch.tensor(values, dtype=torch.int32, device=device)
        for name, values in (
            ("seqused_k", seqused),
            ("leftpad_k", leftpad),
            ("batch_idx_k", entries),
        )
        if values is not None
    }
    check_keys(inputs._replace(spans_k=spans), problem, **arguments)


@on_devices
def test_a_part_of_packed_keys(device: str) -> None:
    problem = packed("parts", (30, 20, 5), (120, 50, 100), window=(-1, 0), unused=(4, 4))
    inputs = make_inputs(problem, usual_dtype(device), device)
    parts = [(0, 10, 90), (0, 0, 50), (0, 60, 60)]
    spans = [
        Span(0, span.begin + begin, span.begin + end)
        for span, (_, begin, end) in zip(inputs.spans_k, parts, strict=True)
    ]
    unnamed = torch.ones(inputs.k.shape[1], dtype=torch.bool, device=device)
    for _, begin, end in spans:
        unnamed[begin:end] = False
    inputs.k[0, unnamed] = float("nan")
    inputs.v[0, unnamed] = float("nan")
    check_keys(
        inputs._replace(spans_k=spans),
        problem,
        cu_seqlens_k=cu_seqlens(inputs.spans_k, device),
        leftpad_k=torch.tensor([10, 0, 60], dtype=torch.int32, device=device),
        seqused_k=torch.tensor([90, 50, 60], dtype=torch.int32, device=device),
    )


@on_devices
def test_sequences_that_share_an_entry_of_a_cache_of_other_size(device: str) -> None:
    """More sequences than entries, and fewer."""
    dtype = usual_dtype(device)
    cache = torch.randn(3, 50, 2, 32, device=device).to(dtype)
    for entries in ([2, 0, 2, 1, 1], [1]):
        q = torch.randn(len(entries), 7, 2, 32, device=device).to(dtype)
        batch_idx = torch.tensor(entries, dtype=torch.int32, device=device)
        got = ops.forward(q, cache, cache, 0.2, -1, 0, batch_idx_k=batch_idx)
        part = cache[batch_idx.long()]
        assert_same(got, ops.forward(q, part, part, 0.2, -1, 0))


@on_devices
def test_garbage_in_what_names_keys_stays_inside_the_tensors(device: str) -> None:
    """Clamped to what there is, one way for each of them."""
    dtype = usual_dtype(device)
    q = torch.randn(5, 7, 2, 32, device=device).to(dtype)
    cache = torch.randn(3, 50, 2, 32, device=device).to(dtype)

    def run(**arguments: list[int]) -> tuple[Tensor, Tensor]:
        tensors = {
            name: torch.tensor(values, dtype=torch.int32, device=device)
            for name, values in arguments.items()
        }
        return ops.forward(q, cache, cache, 0.2, -1, -1, **tensors)

    got = run(
        batch_idx_k=[INT_MIN, -1, 3, INT_MAX, 1],
        seqused_k=[INT_MAX, 51, 30, INT_MIN, 40],
        leftpad_k=[INT_MIN, -3, 40, 5, INT_MAX],
    )
    expected = run(
        batch_idx_k=[0, 0, 2, 2, 1], seqused_k=[50, 50, 30, 0, 40], leftpad_k=[0, 0, 30, 0, 40]
    )
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert (got[1][2:] == float("inf")).all() and got[1][:2].isfinite().all()
