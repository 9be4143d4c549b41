"""The check that a contender's results are right: a reference in fp32, of a sample of the heads."""

from __future__ import annotations

import math

import torch
from problems import Problem
from torch import Tensor

# Error norm relative to the result's norm, above which a contender counts as wrong. Rounding the
# probabilities and the result to 16 bits gives a fifth to a third of it.
ERROR_BOUND = {torch.float32: 1e-4, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}

# With dropout the figure is another (`error_with_dropout`): scatter of the sample, and steps of
# 1/256 in which a contender may realise the probability, gave up to 0.02 with 4096 rows.
DROPOUT_BOUND = 0.05
SETTLED = 256  # rows before it have so few keys that each drop shows

Sample = tuple[int, int, dict[str, Tensor]]  # sequence, key head, results


def error_bound(problem: Problem, dtype: torch.dtype) -> float:
    return DROPOUT_BOUND if problem.dropout_p else ERROR_BOUND[dtype]


def scores_of(
    q: Tensor, k: Tensor, distance: Tensor, problem: Problem, head: int
) -> tuple[Tensor, Tensor | None]:
    """Masked scores of a query head, (rows, seqlen_k), and the derivative that a softcap has."""
    scores, slope = q @ k.T / math.sqrt(q.shape[-1]), None
    if problem.softcap:
        capped = torch.tanh(scores / problem.softcap)
        scores, slope = problem.softcap * capped, 1 - capped.square()
    options = problem.options(q.device)
    if problem.alibi:
        scores -= options["alibi_slopes"][head] * distance.abs()
    left, right = problem.window[0], 0 if problem.causal else problem.window[1]
    if left >= 0:
        scores.masked_fill_(distance < -left, -math.inf)
    if right >= 0:
        scores.masked_fill_(distance > right, -math.inf)
    return scores, slope


def probabilities(scores: Tensor, problem: Problem, head: int) -> Tensor:
    if not problem.sink:
        return scores.softmax(-1)
    sink = problem.options(scores.device)["sink"][head].expand(len(scores), 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[:, :-1]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    problem: Problem,
    rows: int = 2048,
    first_head: int = 0,
) -> dict[str, Tensor]:
    """out, dq, dk, dv of one key head in fp32: q, dout (seqlen_q, heads, head_dim), k, v (seqlen_k,
    head_dim). Of the problem it reads the mask and the options, those of heads from `first_head`
    on, and drops nothing; goes through `rows` queries at a time."""
    q, k, v, dout = (x.float() for x in (q, k, v, dout))
    seqlen_q, num_heads, head_dim = q.shape
    scale = 1 / math.sqrt(head_dim)
    out, dq, dk, dv = (torch.zeros_like(x) for x in (dout, q, k, v))
    columns = torch.arange(len(k), device=q.device)
    for head in range(num_heads):
        for start in range(0, seqlen_q, rows):
            part = slice(start, start + rows)
            row = torch.arange(start, min(start + rows, seqlen_q), device=q.device)[:, None]
            distance = columns - (row + len(k) - seqlen_q)
            scores, slope = scores_of(q[part, head], k, distance, problem, first_head + head)
            p = probabilities(scores, problem, first_head + head)
            out[part, head] = p @ v
            dp = dout[part, head] @ v.T
            ds = p * (dp - (p * dp).sum(-1, keepdim=True))
            ds = ds if slope is None else ds * slope
            dq[part, head] = scale * ds @ k
            dk += scale * ds.T @ q[part, head]
            dv += p.T @ dout[part, head]
    return {"out": out, "dq": dq, "dk": dk, "dv": dv}


def sampled_references(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> list[Sample]:
    """Of the first key head of the first and of the longest sequence, and of the last sequence's
    last."""
    lengths = problem.lengths()
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    sample = {(0, 0), (longest, 0), (len(lengths) - 1, problem.num_heads_k - 1)}
    references = []
    for sequence, head in sorted(sample):
        of_head = [problem.part(x, sequence).detach() for x in (q, k, v, dout)]
        heads = query_heads(problem, head)
        q_part, k_part, v_part, dout_part = (
            x[:, at] for x, at in zip(of_head, (heads, head, head, heads), strict=True)
        )
        want = reference(q_part, k_part, v_part, dout_part, problem, first_head=heads.start)
        references.append((sequence, head, want))
    return references


def query_heads(problem: Problem, key_head: int) -> slice:
    group = problem.num_heads // problem.num_heads_k
    return slice(key_head * group, (key_head + 1) * group)


def largest_error(problem: Problem, results: dict[str, Tensor], references: list[Sample]) -> float:
    """Largest error of whichever of out, dq, dk, dv `results` holds; NaN stays NaN."""
    errors = []
    for name, result in results.items():
        for sequence, head, want in references:
            heads = query_heads(problem, head) if name in ("out", "dq") else head
            got = problem.part(result, sequence)[:, heads].float()
            if problem.dropout_p:
                errors.append(error_with_dropout(got, want[name], problem.dropout_p))
            else:
                errors.append(float((got - want[name]).norm() / want[name].norm()))
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def error_with_dropout(got: Tensor, want: Tensor, dropout_p: float) -> float:
    """How far a result with dropout is from what it has to be on the average over the bits, which
    nobody but the contender knows: `want`, that without dropout, times 1, and apart from that noise
    of sqrt(p / (1 - p)) of its norm, for with many keys sums of p_j x_j have a norm of the size of
    their terms'."""
    got, want = got[SETTLED:], want[SETTLED:]
    factor = float((got * want).sum() / want.square().sum())
    noise = float((got - factor * want).norm() / want.norm())
    expected = math.sqrt(dropout_p / (1 - dropout_p))
    return max(abs(factor - 1), abs(noise - expected))
