"""The options of the public functions as torch and users see them: compilation, random state,
checkpointing, what S_dmask shows, pages, the gradient of a sink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import on_devices, usual_dtype
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    ops,
)
from flash_attn.dropout import draw_rng_state, dropout_mask
from flash_attn.flash_attn_interface import _get_block_size_n
from flash_attn.reference import attention_reference, masked_scores

LENGTHS_Q, LENGTHS_K = (17, 0, 40, 5), (30, 12, 33, 0)


def borders(lengths: tuple[int, ...], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def made(device: str, *sizes: tuple[int, ...]) -> list[Tensor]:
    dtype = usual_dtype(device)
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in sizes]


CU_Q, CU_K = borders(LENGTHS_Q), borders(LENGTHS_K)
CALLS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], tuple[Any, ...]]] = {
    "dense": (flash_attn_func, [(2, 33, 4, 16), (2, 20, 2, 16), (2, 20, 2, 8)], ()),
    "kvpacked": (flash_attn_kvpacked_func, [(2, 20, 4, 16), (2, 33, 2, 2, 16)], ()),
    "qkvpacked": (flash_attn_qkvpacked_func, [(2, 20, 3, 4, 16)], ()),
    "varlen": (
        flash_attn_varlen_func,
        [(65, 4, 16), (80, 2, 16), (80, 2, 8)],
        (CU_Q, CU_K, 40, 33),
    ),
    "varlen_kvpacked": (
        flash_attn_varlen_kvpacked_func,
        [(65, 4, 16), (80, 2, 2, 16)],
        (CU_Q, CU_K, 40, 33),
    ),
    "varlen_qkvpacked": (flash_attn_varlen_qkvpacked_func, [(65, 3, 4, 16)], (CU_Q, 40)),
}


def call_of(name: str, device: str) -> tuple[Callable[..., Any], list[Tensor], tuple[Any, ...]]:
    function, sizes, lengths = CALLS[name]
    moved = tuple(x.to(device) if isinstance(x, Tensor) else x for x in lengths)
    return function, made(device, *sizes), moved


def step(function: Callable[..., Any], lengths: tuple[Any, ...], **options: Any) -> Any:
    """A loss through out and softmax_lse; the sink and the slopes are arguments."""

    def loss(sink: Tensor, slopes: Tensor, *tensors: Tensor) -> Tensor:
        given = {"sink": sink, "alibi_slopes": slopes, "return_softmax_lse": True, **options}
        out, lse = function(*tensors, *lengths, **given)
        return out.float().square().sum() + lse.sin().nan_to_num().sum()

    return loss


OPTIONS = {"dropout_p": 0.3, "causal": True, "softcap": 4.0, "deterministic": True}


@on_devices
@pytest.mark.parametrize("name", CALLS)
def test_compiled_step_equals_eager(name: str, device: str) -> None:
    """One graph of forward and backward with every option, from the same random state."""
    function, tensors, lengths = call_of(name, device)
    sink = torch.randn(4, device=device, requires_grad=True)
    inputs = (sink, torch.rand(4, device=device), *tensors)
    loss = step(function, lengths, **OPTIONS)
    leaves = (sink, *tensors)
    torch.manual_seed(3)
    want = loss(*inputs)
    expected = torch.autograd.grad(want, leaves)
    torch._dynamo.reset()
    torch.manual_seed(3)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, want)
    for gradient, other in zip(torch.autograd.grad(got, leaves), expected, strict=True):
        torch.testing.assert_close(gradient, other)


def test_compiled_step_of_one_tensor_as_queries_keys_and_values() -> None:
    (x,) = made("cpu", (2, 20, 4, 16))

    def loss(x: Tensor) -> Tensor:
        return flash_attn_func(x, x, x, causal=True).square().sum()

    torch._dynamo.reset()
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    (want,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.autograd.grad(got, x)[0], want)


class Longest(TorchDispatchMode):
    """What the forward op is told of the longest sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ops.forward:
            self.told.append(kwargs.get("max_seqlen_q", 0))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_op_is_told_the_longest_length_that_the_host_knows(requires_grad: bool) -> None:
    q = torch.randn(30, 2, 16, requires_grad=requires_grad)
    cu_seqlens = borders((20, 10), "cpu")

    def call(longest: Any) -> Tensor:
        return flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, longest, longest)

    with Longest() as mode:
        call(20)
        call(torch.tensor(20))
        flash_attn_varlen_qkvpacked_func(torch.stack((q, q, q), 1), cu_seqlens, 20)
        flash_attn_varlen_kvpacked_func(q, torch.stack((q, q), 1), cu_seqlens, cu_seqlens, 20, 20)
    assert mode.told == [20, 0, 20, 20]


@on_devices
def test_compiled_once_for_all_lengths(device: str) -> None:
    """And for any number of sequences, with max_seqlen as a tensor that no one reads."""
    q, k, v = made(device, *[(60, 4, 16)] * 3)

    def loss(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: Tensor) -> Tensor:
        borders = (cu_seqlens, cu_seqlens, longest, longest)
        slopes = torch.ones(4, device=device)
        out = flash_attn_varlen_func(q, k, v, *borders, causal=True, alibi_slopes=slopes)
        return out.float().square().sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for lengths in ((20, 7), (31, 0, 9), (3, 1, 2, 40)):
        cu_seqlens = borders(lengths, device)
        parts = [t[: sum(lengths)] for t in (q, k, v)]
        call = (*parts, cu_seqlens, cu_seqlens.diff().max())
        torch.testing.assert_close(compiled(*call), loss(*call))
        counts.append(counter.frame_count)
    assert counts[0] > 0 and counts == [counts[0]] * 3


@on_devices
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_drops_the_same(use_reentrant: bool, device: str) -> None:
    function, tensors, lengths = call_of("varlen", device)
    sink = torch.randn(4, device=device, requires_grad=True)
    inputs = (sink, torch.rand(4, device=device), *tensors)
    loss = step(function, lengths, **OPTIONS)
    torch.manual_seed(3)
    expected = torch.autograd.grad(loss(*inputs), (sink, *tensors))
    torch.manual_seed(3)
    checkpoint(loss, *inputs, use_reentrant=use_reentrant).backward()
    for leaf, want in zip((sink, *tensors), expected, strict=True):
        assert torch.equal(leaf.grad, want)


@on_devices
def test_what_is_dropped_follows_from_the_seed(device: str) -> None:
    q, k, v = made(device, (1, 50, 2, 16), (1, 60, 2, 16), (1, 60, 2, 16))
    torch.manual_seed(1)
    one, other = (flash_attn_func(q, k, v, 0.5) for _ in range(2))
    torch.manual_seed(1)
    again = flash_attn_func(q, k, v, 0.5)
    assert torch.equal(one, again) and not torch.equal(one, other)
    before = torch.get_rng_state()
    flash_attn_func(q, k, v)
    assert torch.equal(before, torch.get_rng_state()), "nothing is drawn without dropout"


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_mask_keeps_what_it_should(p: float) -> None:
    state = torch.tensor([123, 45])
    kept = dropout_mask(state, p, 2, 3, 200, 170)
    assert kept.shape == (2, 3, 200, 170) and kept.dtype == torch.bool
    share = (int((1 - p) * 255) + 1) / 256
    assert kept.double().mean().item() == pytest.approx(share, abs=4e-3)
    assert torch.equal(kept[:, :, :33, :50], dropout_mask(state, p, 2, 3, 33, 50))
    assert torch.equal(kept, dropout_mask(state, p, 2, 3, 200, 170))
    planes = kept.flatten(0, 1)
    assert all(not torch.equal(planes[0], plane) for plane in planes[1:])
    for other in ([124, 45], [123, 46], [123 + 2**40, 45], [-123, 45]):
        assert not torch.equal(kept, dropout_mask(torch.tensor(other), p, 2, 3, 200, 170))
    assert dropout_mask(state, p, 2, 3, 0, 7).shape == (2, 3, 0, 7)


def test_dropout_mask_of_known_bits() -> None:
    """Philox4x32-7 as its authors published it: counter 0 and key 0, and all ones."""
    from flash_attn.dropout import philox

    zero, ones = torch.tensor(0), torch.tensor(0xFFFFFFFF)
    assert [int(word) for word in philox((zero,) * 4, (zero,) * 2)] == [
        *(0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    ]
    assert [int(word) for word in philox((ones,) * 4, (ones,) * 2)] == [
        *(0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)
    ]


MASKS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window_size": torch.tensor([9, 4])},
    {"causal": True, "softcap": 2.0, "alibi": True, "sink": True},
]


@on_devices
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("seqlens", [(20, 33), (40, 12)], ids=str)
def test_s_dmask_holds_the_probabilities(
    seqlens: tuple[int, int], mask: dict[str, Any], device: str
) -> None:
    """Normalised by the largest score and softmax_lse they are those that make the output."""
    options = dict(mask)
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.rand(2, 4, device=device)
    if options.pop("sink", False):
        options["sink"] = torch.randn(4, device=device)
    rows, keys = seqlens
    q, k, v = (t.detach() for t in made(device, (2, rows, 4, 16), *[(2, keys, 2, 16)] * 2))
    out, lse, s_dmask = flash_attn_func(q, k, v, 0.25, return_attn_probs=True, **options)
    assert s_dmask.shape == (2, 4, 128, 128) and s_dmask.dtype == q.dtype
    assert s_dmask.isfinite().all() and not s_dmask[:, :, rows:].any()
    assert not s_dmask[..., keys:].any()
    assert _get_block_size_n(q.device, 16, True, False) >= keys
    s_dmask = s_dmask[:, :, :rows, :keys].double()
    options.pop("sink", None)
    scores, visible = masked_scores(q.double(), k.double(), **options)
    largest = scores.masked_fill(~visible, float("-inf")).amax(-1, keepdim=True)
    probabilities = s_dmask.abs() * torch.exp(largest - lse[..., None].double()).nan_to_num()
    bound = 1e-5 if q.dtype == torch.float32 else 2e-2
    want = torch.exp(scores - lse[..., None].double()).masked_fill(~visible, 0.0)
    torch.testing.assert_close(probabilities, want, rtol=bound, atol=bound)
    kept = probabilities * (s_dmask >= 0) / 0.75
    values = v.double().transpose(1, 2).repeat_interleave(2, dim=1)
    torch.testing.assert_close(
        out.double(), (kept @ values).transpose(1, 2), rtol=bound, atol=bound
    )


@on_devices
@pytest.mark.parametrize("as_tensor", [False, True])
def test_s_dmask_of_packed_sequences(as_tensor: bool, device: str) -> None:
    function, tensors, (cu_q, cu_k, *longest) = call_of("varlen", device)
    if as_tensor:
        longest = [torch.tensor(length, device=device) for length in longest]
    torch.manual_seed(2)
    results = function(*tensors, cu_q, cu_k, *longest, 0.4, causal=True, return_attn_probs=True)
    torch.manual_seed(2)
    kept = dropout_mask(draw_rng_state(tensors[0].device), 0.4, 4, 4, 40, 33)
    s_dmask = results[2]
    assert s_dmask.shape == (4, 4, 128, 128) and s_dmask.isfinite().all()
    for b, (rows, keys) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
        visible = torch.ones(rows, keys, device=device).tril(keys - rows).bool()
        part = s_dmask[b, :, :rows, :keys]
        assert torch.equal(part < 0, ~kept[b, :, :rows, :keys] & visible)
        assert not part[:, ~visible].any() and not s_dmask[b, :, rows:].any()


def test_without_dropout_s_dmask_is_empty() -> None:
    for name in CALLS:
        function, tensors, lengths = call_of(name, "cpu")
        out, lse, s_dmask = function(*tensors, *lengths, return_attn_probs=True)
        assert s_dmask.shape == (0,) and s_dmask.dtype == out.dtype
        pair = function(*tensors, *lengths, return_softmax_lse=True)
        assert len(pair) == 2 and torch.equal(pair[0], out) and torch.equal(pair[1], lse)
        packed = "varlen" in name
        rows = tensors[0].shape[0 if packed else 1]
        heads_and_rows = (4, rows) if packed else (2, 4, rows)
        assert lse.shape == heads_and_rows and lse.dtype == torch.float32


@on_devices
@pytest.mark.parametrize("sink_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dense", "varlen"])
def test_gradient_of_the_sink(name: str, sink_dtype: torch.dtype, device: str) -> None:
    """Against fp64, with rows that see no key, and a head without a sink."""
    function, tensors, lengths = call_of(name, device)
    values = torch.tensor([0.5, -1.0, float("-inf"), 2.0], device=device, dtype=sink_dtype)
    sink, exact_sink = (values.to(t).requires_grad_() for t in (sink_dtype, torch.float64))
    out, lse = function(*tensors, *lengths, causal=True, s_aux=sink, return_softmax_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    finite = lse.isfinite()
    loss = (out.float() * dout).sum() + (lse.where(finite, 0.0) * dlse * finite).sum()
    (got,) = torch.autograd.grad(loss, sink)
    total = torch.zeros((), dtype=torch.float64, device=device)
    leaves = [tensor.detach().double() for tensor in tensors]
    for part in sequences_of(name):
        rows, keys = part
        q, k, v = leaves[0][rows], leaves[1][keys], leaves[2][keys]
        lse_part = (rows, slice(None)) if name == "dense" else (slice(None), rows)
        batch = (lambda t: t) if name == "dense" else (lambda t: t[None])
        want, want_lse = attention_reference(
            batch(q), batch(k), batch(v), None, True, sink=exact_sink
        )
        is_finite = want_lse.isfinite()
        lse_weights = dlse[rows] if name == "dense" else batch(dlse[lse_part])
        total = total + (want * batch(dout[rows]).double()).sum()
        total = total + (want_lse.where(is_finite, 0.0) * lse_weights * is_finite).sum()
    (expected,) = torch.autograd.grad(total, exact_sink)
    bound = 1e-4 if usual_dtype(device) == sink_dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), expected.nan_to_num(), rtol=bound, atol=bound)
    assert got.dtype == sink_dtype and got[2] == 0.0


def sequences_of(name: str) -> list[tuple[slice, slice]]:
    if name == "dense":
        return [(slice(None), slice(None))]
    starts = zip(CU_Q.tolist(), CU_K.tolist(), strict=True)
    lengths = zip(LENGTHS_Q, LENGTHS_K, strict=True)
    return [
        (slice(q, q + rows), slice(k, k + keys))
        for (q, k), (rows, keys) in zip(list(starts)[:-1], lengths, strict=True)
    ]


@on_devices
@pytest.mark.parametrize("page", [1, 7, 16])
def test_pages_give_what_packed_keys_do(page: int, device: str) -> None:
    """Also their gradients."""
    function, (q, k, v), (cu_q, cu_k, *longest) = call_of("varlen", device)
    counts = [-(-length // page) for length in LENGTHS_K]
    table = torch.full((4, max(counts) + 1), -1, dtype=torch.int32, device=device)
    places = torch.randperm(sum(counts), device=device) + 2
    pages = [t.new_zeros(sum(counts) + 3, page, *t.shape[1:]).detach() for t in (k, v)]
    for b, (start, length) in enumerate(zip(cu_k.tolist(), LENGTHS_K, strict=False)):
        taken = places[sum(counts[:b]) : sum(counts[: b + 1])]
        table[b, : counts[b]] = taken
        for paged, packed in zip(pages, (k, v), strict=True):
            rows = paged.new_zeros(counts[b] * page, *packed.shape[1:])
            rows[:length] = packed[start : start + length].detach()
            paged[taken] = rows.unflatten(0, (counts[b], page))
    leaves = [paged.requires_grad_() for paged in pages]
    options = {"causal": True, "deterministic": True}
    out = function(q, *leaves, cu_q, cu_k, *longest, **options, block_table=table)
    want = function(q, k, v, cu_q, cu_k, *longest, **options)
    assert torch.equal(out, want)
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, (q, *leaves), dout)
    want_dq, want_dk, want_dv = torch.autograd.grad(want, (q, k, v), dout)
    torch.testing.assert_close(dq, want_dq)
    for got, expected in ((dk, want_dk), (dv, want_dv)):
        torch.testing.assert_close(got.sum((0, 1)), expected.sum(0), rtol=1e-2, atol=1e-2)
        first = table[0, : counts[0]]
        torch.testing.assert_close(
            got[first].flatten(0, 1)[: LENGTHS_K[0]], expected[: LENGTHS_K[0]]
        )


@on_devices
def test_autocast_of_packed_sequences(device: str) -> None:
    function, tensors, lengths = call_of("varlen", device)
    with torch.autocast(device, torch.bfloat16):
        out = function(*[tensor.float() for tensor in tensors], *lengths)
    assert torch.equal(out, function(*[tensor.bfloat16() for tensor in tensors], *lengths))


def test_flops_of_packed_sequences_are_those_of_each() -> None:
    function, tensors, lengths = call_of("varlen", "cpu")
    with FlopCounterMode(display=False) as packed:
        function(*tensors, *lengths).sum().backward()
    pairs = sum(rows * keys for rows, keys in zip(LENGTHS_Q, LENGTHS_K, strict=True))
    assert packed.get_total_flops() == 2 * 4 * pairs * ((16 + 8) + (3 * 16 + 2 * 8))


GOOD: dict[str, Any] = {
    "q": torch.randn(65, 4, 16),
    "k": torch.randn(80, 2, 16),
    "v": torch.randn(80, 2, 16),
    "cu_seqlens_q": CU_Q,
    "cu_seqlens_k": CU_K,
    "max_seqlen_q": 40,
    "max_seqlen_k": 33,
}
TABLE = torch.zeros(4, 2, dtype=torch.int32)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": torch.randn(2, 5, 4, 16)}, ValueError, r"q: expected shape \(total_q, heads, head_dim"),
    ({"k": torch.randn(80, 3, 16)}, ValueError, "q: expected a number of heads that is a multiple"),
    ({"v": torch.randn(79, 2, 16)}, ValueError, r"v: expected the shape of k \(80, 2, 16\)"),
    ({"cu_seqlens_q": CU_Q.long()}, ValueError, "cu_seqlens_q: expected dtype torch.int32, got"),
    ({"cu_seqlens_q": [0, 1]}, TypeError, "cu_seqlens_q: expected a torch.Tensor, got list"),
    ({"cu_seqlens_q": CU_Q[None]}, ValueError, r"cu_seqlens_q: expected shape \(batch \+ 1,\)"),
    ({"cu_seqlens_q": CU_Q.to("meta")}, ValueError, "cu_seqlens_q: expected the device of q"),
    ({"cu_seqlens_k": CU_K[:-1]}, ValueError, r"cu_seqlens_k: expected shape .* = \(5,\), got"),
    ({"cu_seqlens_k": CU_K.repeat(2)[::2]}, ValueError, "cu_seqlens_k: expected a contiguous ten"),
    ({"max_seqlen_q": 1.5}, TypeError, "max_seqlen_q: expected an integer, got 1.5"),
    ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q: expected an integer from 0 on, got -1"),
    ({"max_seqlen_k": torch.ones(2)}, ValueError, "max_seqlen_k: expected an integer, got a tens"),
    ({"alibi_slopes": torch.ones(2, 4)}, ValueError, r"alibi_slopes: .* \(batch, heads\) = \(4, 4"),
    ({"block_table": TABLE}, ValueError, r"k: expected shape \(num_blocks, page_size, heads_k"),
    (
        {"block_table": TABLE[:3], "k": torch.ones(3, 8, 2, 16), "v": torch.ones(3, 8, 2, 16)},
        ValueError,
        r"block_table: expected shape \(batch, max_blocks\) = \(4, 2\), got \(3, 2\)",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_arguments(number: int) -> None:
    replaced, exception, text = BAD[number]
    with pytest.raises(exception, match="^" + text):
        flash_attn_varlen_func(**(GOOD | replaced))


def test_bad_arguments_of_packed_tensors() -> None:
    qkv, kv = torch.randn(65, 3, 4, 16), torch.randn(80, 2, 2, 16)
    with pytest.raises(ValueError, match=r"^qkv: expected shape \(total, 3, heads, head_dim\)"):
        flash_attn_varlen_qkvpacked_func(qkv[:, :2], CU_Q, 40)
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected dtype torch.int32"):
        flash_attn_varlen_qkvpacked_func(qkv, CU_Q.long(), 40)
    with pytest.raises(ValueError, match=r"^kv: expected shape \(total_k, 2, heads_k, head_dim\)"):
        flash_attn_varlen_kvpacked_func(GOOD["q"], kv[:, 0], CU_Q, CU_K, 40, 33)
