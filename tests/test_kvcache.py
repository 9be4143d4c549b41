"""flash_attn_with_kvcache against a cache kept in lists and attention in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import on_devices, usual_dtype
from pairwise import pairwise
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn.reference import attention_reference

BATCH, CAPACITY, HEADS, HEADS_K = 3, 24, 4, 2
LENGTHS = (9, 0, 14)  # rows that are there

OPTIONS: dict[str, list[Any]] = {
    "seqlen_q": [1, 3],
    "new": [None, 1, 3],
    "rotary": [None, "halves", "neighbours"],
    "cache": ["dense", "batch_idx", 1, 4, 8],  # numbers: page sizes
    "lengths": ["int", "tensor"],
    "leftpad": [False, True],
    "mask": ["none", "causal", "window"],
    "scores": ["plain", "softcap", "alibi", "alibi by batch", "sink"],
    "head_dim": [16, 20],
}
COMBINATIONS = pairwise(OPTIONS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (rows, heads, head_dim) in fp64, its rows at `positions`."""
    half = cos.shape[1]
    out = x.double().clone()
    columns = torch.arange(2 * half, device=x.device)
    first, second = (columns[::2], columns[1::2]) if interleaved else columns.split(half)
    pairs = torch.complex(out[..., first], out[..., second])
    turned = pairs * torch.complex(cos.double(), sin.double())[positions][:, None]
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


class Step:
    """One call with its cache in both forms: as the function takes it, and as rows by sequence."""

    def __init__(self, chosen: dict[str, Any], device: str) -> None:
        self.chosen, self.device, self.dtype = chosen, device, usual_dtype(device)
        head_dim = chosen["head_dim"]
        self.lengths = LENGTHS if chosen["lengths"] == "tensor" else (9,) * BATCH
        self.rows = [self.rand(2, CAPACITY, HEADS_K, head_dim) for _ in range(BATCH)]
        self.q = self.rand(BATCH, chosen["seqlen_q"], HEADS, head_dim)
        self.new = chosen["new"]
        if chosen["rotary"] is not None and self.new is None:
            self.new = 2
        self.k, self.v = (
            self.rand(2, BATCH, self.new, HEADS_K, head_dim) if self.new else (None, None)
        )
        angles = torch.outer(torch.arange(CAPACITY), 0.3 ** torch.arange(head_dim // 4))
        self.cos, self.sin = (t.to(device, self.dtype) for t in (angles.cos(), angles.sin()))
        self.leftpad = torch.tensor([2, 0, 14], dtype=torch.int32, device=device)
        self.options = self.make_options()

    def rand(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, device=self.device).to(self.dtype)

    def make_options(self) -> dict[str, Any]:
        """Of mask and scores, as the reference takes them too."""
        mask, scores = self.chosen["mask"], self.chosen["scores"]
        options: dict[str, Any] = {"causal": mask == "causal"}
        if mask == "window":
            options["window_size"] = (5, 1)
        if scores == "softcap":
            options["softcap"] = 2.0
        elif scores == "alibi":
            options["alibi_slopes"] = torch.rand(HEADS, device=self.device)
        elif scores == "alibi by batch":
            options["alibi_slopes"] = torch.rand(BATCH, HEADS, device=self.device)
        elif scores == "sink":
            options["sink"] = torch.randn(HEADS, device=self.device)
        return options

    def caches(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        kind = self.chosen["cache"]
        rows = torch.stack(self.rows)
        if kind == "dense":
            return rows[:, 0].clone(), rows[:, 1].clone(), {}
        if kind == "batch_idx":
            place = torch.tensor([3, 0, 2], dtype=torch.int32, device=self.device)
            cache = rows.new_zeros(5, *rows.shape[1:])
            cache[place] = rows
            return cache[:, 0], cache[:, 1], {"cache_batch_idx": place}
        blocks = CAPACITY // kind
        shuffled = torch.randperm(BATCH * blocks, device=self.device).view(BATCH, blocks) + 1
        pages = rows.new_zeros(BATCH * blocks + 2, 2, kind, HEADS_K, rows.shape[-1])
        for b in range(BATCH):
            pages[shuffled[b]] = self.rows[b].unflatten(1, (blocks, kind)).transpose(0, 1)
        return pages[:, 0], pages[:, 1], {"block_table": shuffled.to(torch.int32)}

    def rows_of(self, k_cache: Tensor, v_cache: Tensor, where: dict[str, Tensor]) -> list[Tensor]:
        """The cache after the call by sequence, (2, CAPACITY, heads_k, head_dim) each."""
        if "block_table" in where:
            parts = [(k_cache[n].flatten(0, 1), v_cache[n].flatten(0, 1))
                     for n in where["block_table"]]  # fmt: skip
        else:
            place = where.get("cache_batch_idx", range(BATCH))
            parts = [(k_cache[n], v_cache[n]) for n in place]
        return [torch.stack(part) for part in parts]

    def call(self, k_cache: Tensor, v_cache: Tensor, where: dict[str, Tensor]) -> Any:
        lengths = (
            self.lengths[0]
            if self.chosen["lengths"] == "int"
            else torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        )
        rotary = {} if self.chosen["rotary"] is None else {
            "rotary_cos": self.cos,
            "rotary_sin": self.sin,
            "rotary_interleaved": self.chosen["rotary"] == "neighbours",
        }  # fmt: skip
        return flash_attn_with_kvcache(
            self.q,
            k_cache,
            v_cache,
            self.k,
            self.v,
            cache_seqlens=lengths,
            cache_leftpad=self.leftpad if self.chosen["leftpad"] else None,
            return_softmax_lse=True,
            **rotary,
            **where,
            **self.options,
        )

    def expected(self, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """out, softmax_lse and cache of one sequence, the first two of fp64."""
        q, rows, length = self.q[b], self.rows[b].double(), self.lengths[b]
        end = length + (self.new or 0)
        if self.new:
            k = self.k[b].double()
            if self.chosen["rotary"] is not None:
                interleaved = self.chosen["rotary"] == "neighbours"
                at = torch.arange(length, end, device=self.device)
                k = rotate(self.k[b], self.cos, self.sin, at, interleaved).to(self.dtype).double()
                at_q = torch.arange(q.shape[0], device=self.device) + length
                if self.chosen["mask"] == "none":
                    at_q = torch.full_like(at_q, length)
                q = rotate(q, self.cos, self.sin, at_q, interleaved).to(self.dtype)
            rows[0, length:end], rows[1, length:end] = k, self.v[b].double()
        start = int(self.leftpad[b]) if self.chosen["leftpad"] else 0
        options = dict(self.options)
        if options.get("alibi_slopes") is not None and options["alibi_slopes"].dim() == 2:
            options["alibi_slopes"] = options["alibi_slopes"][b]
        seen = rows[:, start:end]
        out, lse = attention_reference(q[None], seen[:1], seen[1:], **options)
        return out[0], lse[0], rows


def describe(chosen: dict[str, Any]) -> str:
    return "-".join(str(value) for value in chosen.values())


@on_devices
@pytest.mark.parametrize("chosen", COMBINATIONS, ids=describe)
def test_step(chosen: dict[str, Any], device: str) -> None:
    step = Step(chosen, device)
    k_cache, v_cache, where = step.caches()
    out, lse = step.call(k_cache, v_cache, where)
    bound = 2e-5 if step.dtype == torch.float32 else 2e-2
    for b, rows in enumerate(step.rows_of(k_cache, v_cache, where)):
        want_out, want_lse, want_rows = step.expected(b)
        torch.testing.assert_close(out[b].double(), want_out, rtol=bound, atol=bound)
        torch.testing.assert_close(lse[b].double(), want_lse, rtol=bound, atol=bound)
        torch.testing.assert_close(rows.double(), want_rows, rtol=bound, atol=bound)


@pytest.mark.parametrize("chosen", COMBINATIONS[::4], ids=describe)
def test_compiled_step_equals_eager(chosen: dict[str, Any]) -> None:
    """One graph, the cache written in place."""
    step = Step(chosen, "cpu")
    torch._dynamo.reset()
    caches, compiled_caches = (
        (k.clone(), v.clone(), where) for k, v, where in (step.caches(),) * 2
    )
    expected = step.call(*caches)
    compiled = torch.compile(step.call, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*compiled_caches), expected, strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(compiled_caches[:2], caches[:2], strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_steps_of_growing_length_are_compiled_twice_at_most() -> None:
    """With an int that changes from step to step."""
    q, k, v = (torch.randn(2, 6, 2, 16) for _ in range(3))
    k_cache, v_cache = torch.zeros(2, 2, 8, 2, 16)

    def step(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        options = {"cache_seqlens": length, "causal": True}
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    want = flash_attn_func(q, k, v, causal=True)
    for n in range(6):
        out = compiled(*(t[:, n : n + 1].contiguous() for t in (q, k, v)), n)
        torch.testing.assert_close(out[:, 0], want[:, n])
    assert counter.frame_count <= 3


@on_devices
def test_without_lengths_the_whole_cache_is_seen(device: str) -> None:
    dtype = usual_dtype(device)
    q, k, v = (torch.randn(2, n, 2, 16, device=device).to(dtype) for n in (3, 11, 11))
    out = flash_attn_with_kvcache(q, k, v, causal=True)
    torch.testing.assert_close(out, flash_attn_func(q, k, v, causal=True))
    assert not flash_attn_with_kvcache(q.requires_grad_(), k, v).requires_grad


def cached_rows(*lengths: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, a cache of 2 x 8 rows that hold their own number, and int32 lengths."""
    rows = torch.arange(8.0).view(1, 8, 1, 1).expand(2, 8, 1, 8)
    return (
        torch.randn(2, 1, 1, 8),
        rows.clone(),
        rows.clone(),
        torch.tensor(lengths, dtype=torch.int32),
    )


@pytest.mark.parametrize("page_size", [None, 2])
def test_rows_without_room_are_left_out_where_lengths_are_not_read(page_size: int | None) -> None:
    """As on a GPU: a compiled call does not read them. Nothing else in the cache changes."""
    q, k_cache, v_cache, lengths = cached_rows(7, 8)
    where = {}
    if page_size is not None:
        k_cache, v_cache = (t.reshape(8, page_size, 1, 8) for t in (k_cache, v_cache))
        where["block_table"] = torch.arange(8, dtype=torch.int32).view(2, 4)
    before = k_cache.clone()
    new = torch.full((2, 3, 1, 8), 50.0)
    with pytest.raises(RuntimeError, match=r"rows = 8 \+ 3, got 8 rows a sequence"):
        flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=lengths, **where)
    assert torch.equal(k_cache, before)
    torch._dynamo.reset()
    step = torch.compile(flash_attn_with_kvcache, fullgraph=True, backend="aot_eager")
    out = step(q, k_cache, v_cache, new, new, cache_seqlens=lengths, **where)
    before.view(2, 8, 1, 8)[0, 7] = 50.0
    assert torch.equal(k_cache, before) and out.isfinite().all()


def test_pages_that_are_not_there_are_not_written() -> None:
    """Block tables are padded with -1: a new row there would land in another sequence's page."""
    q, k_cache, v_cache, _ = cached_rows(0, 0)
    k_cache, v_cache = (t.reshape(4, 4, 1, 8) for t in (k_cache, v_cache))
    table = torch.tensor([[1, -1], [-1, 7]], dtype=torch.int32)
    lengths = torch.tensor([3, 1], dtype=torch.int32)
    before = k_cache.clone()
    new = torch.full((2, 2, 1, 8), 50.0)
    flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=lengths, block_table=table)
    before[1, 3] = 50.0
    assert torch.equal(k_cache, before) and torch.equal(v_cache, before)


def bad(**replaced: Any) -> dict[str, Any]:
    rows = torch.randn(2, 8, 2, 16)
    arguments = {"q": torch.randn(2, 1, 4, 16), "k_cache": rows, "v_cache": rows.clone()}
    return arguments | replaced


NEW = torch.randn(2, 1, 2, 16)
ANGLES = torch.ones(8, 4)
TABLE = torch.zeros(2, 3, dtype=torch.int32)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (bad(q=None), TypeError, "q: expected a torch.Tensor, got NoneType"),
    (bad(q=torch.randn(3, 1, 4, 16)), ValueError, r"k_cache: expected the batch size of q \(3\)"),
    (bad(k_cache=torch.randn(2, 8, 3, 16)), ValueError, "q: expected a number of heads that is a"),
    (bad(v_cache=torch.randn(2, 7, 2, 16)), ValueError, "v_cache: expected the shape of k_cache"),
    (bad(k_cache=torch.randn(2, 8, 2, 16).half()), ValueError, "k_cache: expected the dtype of q"),
    (bad(k=NEW, cache_seqlens=1), ValueError, "v: expected a tensor beside k, got None"),
    (bad(v=NEW, cache_seqlens=1), ValueError, "k: expected a tensor beside v, got None"),
    (bad(k=NEW, v=NEW), ValueError, "cache_seqlens: expected the lengths of the sequences beside"),
    (bad(k=NEW[:1], v=NEW, cache_seqlens=1), ValueError, r"k: expected shape \(batch, seqlen_new"),
    (bad(k=NEW, v=NEW[..., :8], cache_seqlens=1), ValueError, r"v: expected shape \(batch, seqle"),
    (bad(k=NEW, v=NEW.repeat(1, 2, 1, 1), cache_seqlens=1), ValueError, r"v: expected as many row"),
    (bad(k=NEW, v=NEW, cache_seqlens=8), RuntimeError, r"k_cache: expected room for .* = 8 \+ 1"),
    (bad(cache_seqlens=-1), ValueError, "cache_seqlens: expected lengths from 0 on, got -1"),
    (bad(cache_seqlens=1.5), TypeError, "cache_seqlens: expected an int or a torch.Tensor, got fl"),
    (bad(cache_seqlens=torch.tensor([1, 2])), ValueError, "cache_seqlens: expected dtype torch.i"),
    (bad(cache_seqlens=TABLE[0]), ValueError, r"cache_seqlens: expected shape \(batch,\) = \(2,\)"),
    (bad(cache_batch_idx=torch.tensor([0, 1])), ValueError, "cache_batch_idx: expected dtype"),
    (bad(cache_leftpad=TABLE[0]), ValueError, r"cache_leftpad: expected shape \(batch,\)"),
    (bad(block_table=TABLE[:1]), ValueError, r"block_table: expected shape \(batch, max_blocks\)"),
    (bad(block_table=TABLE.long()), ValueError, "block_table: expected dtype torch.int32"),
    (bad(block_table=TABLE, cache_batch_idx=TABLE[:, 0].contiguous()), ValueError, "cache_batc"),
    (bad(block_table=TABLE, k=NEW, v=NEW, cache_seqlens=24), RuntimeError, "block_table: expected"),
    (bad(rotary_cos=ANGLES), ValueError, "rotary_sin: expected a tensor beside rotary_c"),
    (bad(rotary_cos=ANGLES, rotary_sin=ANGLES), ValueError, "k: expected the new keys beside ro"),
    (
        bad(k=NEW, v=NEW, cache_seqlens=3, rotary_cos=ANGLES[:3], rotary_sin=ANGLES[:3]),
        ValueError,
        r"rotary_cos: expected at least cache_seqlens \+ new rows = 3 \+ 1 positions, got 3",
    ),
    (
        bad(k=NEW, v=NEW, cache_seqlens=3, rotary_cos=torch.ones(8, 9), rotary_sin=ANGLES),
        ValueError,
        r"rotary_cos: expected shape .* with rotary_dim up to 16, got \(8, 9\)",
    ),
    (bad(softcap=-1.0), ValueError, "softcap: expected a finite number from 0"),
    (bad(window_size=(-2, 0)), ValueError, "window_size: expected two integers, each -1"),
    (bad(alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes: expected shape"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)))
def test_errors_leave_the_cache_alone(number: int) -> None:
    arguments, exception, text = BAD[number]
    before = arguments["k_cache"].clone()
    with pytest.raises(exception, match=text):
        flash_attn_with_kvcache(**arguments)
    assert torch.equal(arguments["k_cache"], before)
