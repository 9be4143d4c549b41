"""Problems with sequences and options: their tensors, the ops' results and the acceptance rule."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pytest
import torch
from compare import assert_as_exact_as_torch, cut_of_tf32, gradients, largest
from reference_options import Options, Span, attention_of_sequences
from torch import Tensor

from flash_attn import ops

NAN = float("nan")

# For these tests' many small torch operations: threads that wait for the next one, as OpenMP's do,
# take the processor from whatever else runs. Ours are started for a call.
on_one_torch_thread = pytest.mark.usefixtures("one_torch_thread")
OP_THREADS = 3


@contextmanager
def op_threads(count: int = OP_THREADS) -> Iterator[None]:
    """Inside, the ops on CPU run on that many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Problem:
    """Sequences of the given lengths. Dense ones have the same length each."""

    name: str
    lengths_q: tuple[int, ...] = (70, 70)
    lengths_k: tuple[int, ...] = (110, 110)
    packed_q: bool = False
    packed_k: bool = False
    unused: tuple[int, int] = (0, 0)  # rows before and behind all packed sequences
    heads: int = 4
    heads_k: int = 2
    head_dim: int = 64
    head_dim_v: int | None = None  # None: head_dim
    window: tuple[int, int] = (-1, -1)
    scale: float = 0.125
    softcap: float = 0.0
    alibi: Literal["", "heads", "sequences"] = ""
    dropout_p: float = 0.0
    sink: bool = False
    bias: str = ""  # of "bhqk": the dimensions that it has, of (batch, heads, seqlen_q, seqlen_k)
    bias_in_fp32: bool = False  # else of the dtype of q

    def __str__(self) -> str:
        return self.name

    @property
    def v_cols(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

    def random_bias(self, dtype: torch.dtype, device: str) -> Tensor | None:
        if not self.bias:
            return None
        sizes = (len(self.lengths_q), self.heads, self.lengths_q[0], self.lengths_k[0])
        shape = [size if dim in self.bias else 1 for dim, size in zip("bhqk", sizes, strict=True)]
        bias = torch.randn(shape, device=device) * 2
        return bias if self.bias_in_fp32 else bias.to(dtype)

    def options(self, dtype: torch.dtype, device: str) -> Options:
        """Random where it is tensors."""
        shape = (len(self.lengths_q), self.heads) if self.alibi == "sequences" else (self.heads,)
        slopes = torch.rand(shape, device=device) * 0.5 if self.alibi else None
        rng_state = torch.tensor([0x123456789ABCDEF, 77], device=device)
        return Options(
            self.scale,
            self.window,
            self.softcap,
            slopes,
            self.dropout_p,
            rng_state if self.dropout_p else None,
            torch.randn(self.heads, device=device) * 2 if self.sink else None,
            self.random_bias(dtype, device),
        )

    def spans(self, lengths: Sequence[int], packed: bool) -> list[Span]:
        if not packed:
            return [Span(batch, 0, length) for batch, length in enumerate(lengths)]
        ends = list(itertools.accumulate(lengths, initial=self.unused[0]))
        return [Span(0, begin, end) for begin, end in itertools.pairwise(ends)]


class Inputs(NamedTuple):
    """Tensors of (entries, rows, heads, columns), with NaN in rows that belong to no sequence."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    spans_q: list[Span]
    spans_k: list[Span]
    options: Options


def cu_seqlens(spans: list[Span], device: torch.device | str) -> Tensor:
    values = [spans[0].begin, *(span.end for span in spans)]
    return torch.tensor(values, dtype=torch.int32, device=device)


def random_rows(problem: Problem, spans: list[Span], packed: bool, heads: int, cols: int) -> Tensor:
    """NaN outside of the spans."""
    entries = 1 if packed else len(spans)
    rows = spans[-1].end + (problem.unused[1] if packed else 0)
    tensor = torch.full((entries, rows, heads, cols), NAN)
    for entry, begin, end in spans:
        tensor[entry, begin:end] = torch.randn(end - begin, heads, cols)
    return tensor


def make_inputs(problem: Problem, dtype: torch.dtype, device: str) -> Inputs:
    spans_q = problem.spans(problem.lengths_q, problem.packed_q)
    spans_k = problem.spans(problem.lengths_k, problem.packed_k)
    of_q = spans_q, problem.packed_q, problem.heads
    of_k = spans_k, problem.packed_k, problem.heads_k
    q = random_rows(problem, *of_q, problem.head_dim)
    k = random_rows(problem, *of_k, problem.head_dim)
    v = random_rows(problem, *of_k, problem.v_cols)
    dout = random_rows(problem, *of_q, problem.v_cols)
    dlse = random_rows(problem, *of_q, 1).squeeze(3).transpose(1, 2).contiguous()
    q, k, v, dout = (tensor.to(device, dtype) for tensor in (q, k, v, dout))
    return Inputs(q, k, v, dout, dlse.to(device), spans_q, spans_k, problem.options(dtype, device))


class Results(NamedTuple):
    out: Tensor
    softmax_lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    softmax_d: Tensor
    dbias: Tensor  # without elements if there is no bias


def score_arguments(options: Options) -> dict[str, Any]:
    """What forward and backward are both given."""
    return {
        "softcap": options.softcap,
        "alibi_slopes": options.alibi_slopes,
        "bias": options.bias,
        "dropout_p": options.dropout_p,
        "rng_state": options.rng_state,
    }


def op_results(
    inputs: Inputs, packed_q: bool, packed_k: bool, threads: int = OP_THREADS
) -> Results:
    """Of forward and backward. Gradients are given to the op full of NaN."""
    device, options = inputs.q.device, inputs.options
    arguments = score_arguments(options)
    if packed_q:
        arguments["cu_seqlens_q"] = cu_seqlens(inputs.spans_q, device)
    if packed_k:
        arguments["cu_seqlens_k"] = cu_seqlens(inputs.spans_k, device)
    q, dout, dlse = (
        tensor[0] if packed_q else tensor for tensor in (inputs.q, inputs.dout, inputs.dlse)
    )
    k, v = (tensor[0] if packed_k else tensor for tensor in (inputs.k, inputs.v))
    grads = [torch.full_like(tensor, NAN) for tensor in (q, k, v)]
    bias = options.bias
    dbias = None if bias is None else torch.full(bias.shape, NAN, device=device)
    is_shared = bias is not None and any(size == 1 for size in bias.shape)
    settings = options.scale, *options.window
    with op_threads(threads):
        out, lse = ops.forward(q, k, v, *settings, sink=options.sink, **arguments)
        given = (dout, q, k, v, out, lse, dlse, *grads, *settings, not is_shared)
        softmax_d = ops.backward(*given, dbias=dbias, **arguments)
    assert out.dtype == q.dtype and lse.dtype == softmax_d.dtype == torch.float32
    of_q = [tensor[None] if packed_q else tensor for tensor in (out, lse, grads[0], softmax_d)]
    of_k = [tensor[None] if packed_k else tensor for tensor in grads[1:]]
    return Results(*of_q[:3], *of_k, of_q[3], q.new_empty(0) if dbias is None else dbias)


def reference_results(inputs: Inputs, dtype: torch.dtype) -> Results:
    """By torch in dtype. softmax_d is left out."""
    leaves = tuple(
        tensor.detach().to(dtype).requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v)
    )
    options = inputs.options
    if options.bias is not None:
        # As exact as the scores that it is added to, and its gradient as what it is summed of.
        bias = options.bias.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        options, leaves = dataclasses.replace(options, bias=bias), (*leaves, bias)
    out, lse = attention_of_sequences(*leaves[:3], inputs.spans_q, inputs.spans_k, options)
    dout, dlse = inputs.dout.nan_to_num(), inputs.dlse.nan_to_num()
    dq, dk, dv, *dbias = gradients(out, lse, leaves, dout, dlse)
    none = lse.new_empty(0)
    return Results(out, lse, dq, dk, dv, none, *(dbias or [none]))


def check_problem(problem: Problem, dtype: torch.dtype, device: str) -> None:
    """out, softmax_lse and the gradients through both."""
    inputs = make_inputs(problem, dtype, device)
    got = op_results(inputs, problem.packed_q, problem.packed_k)
    check_results(problem, inputs, got)


def check_results(problem: Problem, inputs: Inputs, got: Results) -> None:
    dtype = inputs.q.dtype
    exact = reference_results(inputs, torch.float64)
    torch_result = reference_results(inputs, dtype)
    floors = fp32_floors(problem, inputs, exact)
    for name in ("out", "dq", "dk", "dv", "dbias"):
        results = (getattr(of, name) for of in (got, torch_result, exact))
        assert_as_exact_as_torch(name, *results, dtype, floors[name])
    check_lse(inputs, got.softmax_lse, exact.softmax_lse, floors["softmax_lse"])
    check_unused_rows(inputs, got)


def fp32_floors(problem: Problem, inputs: Inputs, exact: Results) -> dict[str, float]:
    """As compare.fp32_floors, with the rounding of what options add to the scores."""
    q, k, v, dout = (tensor.nan_to_num() for tensor in inputs[:4])
    unit = torch.finfo(torch.float32).eps / 2
    scaled_unit = unit * problem.scale
    score = scaled_unit * largest(q.float().norm(dim=-1)) * largest(k.float().norm(dim=-1))
    if inputs.options.alibi_slopes is not None:
        farthest = max(problem.lengths_q + problem.lengths_k)
        score += unit * largest(inputs.options.alibi_slopes) * farthest
    if inputs.options.bias is not None:
        score += unit * largest(inputs.options.bias)
    lse = 2 * unit * largest(exact.softmax_lse[exact.softmax_lse.isfinite()])
    kept = 1 / (1 - problem.dropout_p)
    row_ds = unit * kept * largest((dout.double() * exact.out).abs().sum(dim=-1))
    if q.is_cuda and q.dtype == torch.float32:
        row_ds *= cut_of_tf32(problem.head_dim)
    ds = problem.scale * row_ds
    steps = max(problem.lengths_q) * problem.heads // problem.heads_k / 16
    cut = unit * steps if q.is_cuda else 0.0
    return {
        "out": score * kept * largest(v),
        "softmax_lse": score,
        "dq": (score + lse) * largest(exact.dq) + ds * largest(k),
        "dk": (score + lse + cut) * largest(exact.dk) + ds * largest(q),
        "dv": (score + lse + cut) * largest(exact.dv),
        "dbias": (score + lse) * largest(exact.dbias) + rows_each(inputs) * row_ds,
    }


def rows_each(inputs: Inputs) -> int:
    """Rows of scores in which one element of the bias lies."""
    bias = inputs.options.bias
    return 0 if bias is None else inputs.q[..., 0].numel() // bias.shape[:3].numel()


def check_lse(inputs: Inputs, got: Tensor, exact: Tensor, floor: float) -> None:
    """softmax_lse is fp32 whatever the inputs are, so it is compared with torch in fp32."""
    fp32_inputs = [tensor.float() for tensor in inputs[:3]]
    spans = inputs.spans_q, inputs.spans_k
    fp32_lse = attention_of_sequences(*fp32_inputs, *spans, inputs.options)[1]
    finite = exact.isfinite()
    assert torch.equal(got[~finite].double(), exact[~finite])
    assert_as_exact_as_torch(
        "softmax_lse", got[finite], fp32_lse[finite], exact[finite], torch.float32, floor
    )


def outside(tensor: Tensor, spans: list[Span]) -> Tensor:
    """The rows of (entries, rows, ...) that are in no span."""
    inside = torch.zeros(tensor.shape[:2], dtype=torch.bool, device=tensor.device)
    for entry, begin, end in spans:
        inside[entry, begin:end] = True
    return tensor[~inside]


def check_unused_rows(inputs: Inputs, got: Results) -> None:
    """They are exactly zero, and their lse is +inf."""
    for tensor in (got.out, got.dq):
        assert not outside(tensor, inputs.spans_q).any()
    for tensor in (got.dk, got.dv):
        assert not outside(tensor, inputs.spans_k).any()
    assert (outside(got.softmax_lse.transpose(1, 2), inputs.spans_q) == float("inf")).all()


def assert_bit_equal(got: Results, expected: Results) -> None:
    for name, one, other in zip(Results._fields, got, expected, strict=True):
        assert torch.equal(one, other), f"{name}: {(one != other).sum()} elements differ"


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """The same problem posed in two ways: to the bit on CPU; on CUDA other kernels may serve it."""
    for one, other in zip(got, expected, strict=True):
        if one.is_cuda:
            size = max(1.0, largest(other[other.isfinite()]))
            tolerance = 4 * torch.finfo(one.dtype).eps * size
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
        else:
            assert torch.equal(one, other)
