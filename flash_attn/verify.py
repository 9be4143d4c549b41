"""`python -m flash_attn verify`: does tiled attention give what standard attention gives, here?

    python -m flash_attn verify --seqlen 4096 --heads 16 --heads-k 4 --head-dim 128 --causal
    python -m flash_attn verify --dropout 0.1 --window 256 0 --dtype bfloat16 --json

Compares the output, softmax_lse and all gradients of one problem with attention in fp64 that has
the whole score matrix, and asks that the error is at most twice that of the same computation by
PyTorch in the problem's dtype, plus a unit of rounding. Then prints time and peak memory of both.
Standard attention in fp64 takes some 50 bytes for every score: mind the sizes.

Exits with 0 if everything matches, with 1 if something does not, with 2 if nothing could be said.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_attn import __version__, flash_attn_func
from flash_attn.dropout import draw_rng_state, dropout_mask
from flash_attn.measure import Cost, cost_of, load_pyplot, plot
from flash_attn.modules.attention import get_alibi_slopes
from flash_attn.problem import scale_of
from flash_attn.reference import attention_reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Below this no error counts: rounding of single products next to exact zeros.
_LEAST = {torch.float32: 1e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}
_SEED = 20


@dataclass(frozen=True)
class Problem:
    batch: int
    seqlen: int
    seqlen_k: int
    heads: int
    heads_k: int
    head_dim: int
    dtype: str
    device: str
    causal: bool
    window: tuple[int, int]
    softcap: float
    dropout: float
    alibi: bool
    sink: bool

    def text(self, where: str | None = None) -> str:
        parts = [
            f"batch {self.batch}, seqlen {self.seqlen} x {self.seqlen_k}",
            f"heads {self.heads}/{self.heads_k}, head_dim {self.head_dim}",
            f"{self.dtype} on {where or self.device}",
        ]
        parts += [name for name in ("causal", "alibi", "sink") if getattr(self, name)]
        if self.window != (-1, -1):
            parts.append(f"window {self.window[0]}, {self.window[1]}")
        parts += [
            f"{name} {getattr(self, name)}"
            for name in ("softcap", "dropout")
            if getattr(self, name) > 0
        ]
        return ", ".join(parts)


@dataclass
class Check:
    """Of one result: the largest errors, tiled and PyTorch's, and what is allowed."""

    name: str
    error: float
    torch_error: float
    allowed: float

    @property
    def matches(self) -> bool:
        return self.error <= self.allowed  # not so for NaN


class Case:
    """A problem with its tensors, and both ways to compute it."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.dtype = problem, DTYPES[problem.dtype]
        device = torch.device(problem.device)
        torch.manual_seed(_SEED)
        size_q = (problem.batch, problem.seqlen, problem.heads, problem.head_dim)
        size_k = (problem.batch, problem.seqlen_k, problem.heads_k, problem.head_dim)
        q, k, v, dout = (
            torch.randn(size, device=device).to(self.dtype)
            for size in (size_q, size_k, size_k, size_q)
        )
        self.inputs, self.dout = [q, k, v], dout
        self.options: dict[str, Any] = {
            "causal": problem.causal,
            "window_size": problem.window,
            "softcap": problem.softcap,
        }
        if problem.alibi:
            slopes = get_alibi_slopes(problem.heads)
            self.options["alibi_slopes"] = torch.tensor(slopes, device=device)
        if problem.sink:
            self.inputs.append(torch.randn(problem.heads, device=device))
        self.names = ["dq", "dk", "dv", "dsink"][: len(self.inputs)]

    def _gradients(
        self, leaves: list[Tensor], out: Tensor, softmax_lse: Tensor
    ) -> dict[str, Tensor]:
        """Through out and, where rows see keys, softmax_lse."""
        visible = softmax_lse.isfinite()
        dlse = torch.linspace(-1.0, 1.0, softmax_lse.size(2), device=out.device)
        total = torch.where(visible, softmax_lse, 0.0) * dlse.to(softmax_lse)
        grads = torch.autograd.grad(
            (out, total.sum()), leaves, (self.dout.to(out), torch.ones_like(total[0, 0, 0]))
        )
        return {"out": out, "softmax_lse": softmax_lse, **dict(zip(self.names, grads, strict=True))}

    def _leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in self.inputs]

    def tiled(self) -> dict[str, Tensor]:
        leaves = self._leaves()
        options = {"dropout_p": self.problem.dropout, "return_softmax_lse": True, **self.options}
        if self.problem.sink:
            options["sink"] = leaves[3]
        torch.manual_seed(_SEED)
        q, k, v = leaves[:3]
        result = flash_attn_func(q, k, v, **options)
        return self._gradients(leaves, result[0], result[1])

    def standard(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """With the probabilities dropped that tiled() drops."""
        dtype = dtype or self.dtype
        leaves = self._leaves(dtype)
        options = dict(self.options)
        if self.problem.sink:
            options["sink"] = leaves[3]
        if self.problem.dropout > 0.0:
            torch.manual_seed(_SEED)
            state = draw_rng_state(self.dout.device)
            sizes = (self.problem.batch, self.problem.heads, self.dout.size(1))
            keys = self.problem.seqlen_k
            options["dropout_p"] = self.problem.dropout
            options["keep"] = dropout_mask(state, self.problem.dropout, *sizes, keys)
        q, k, v = leaves[:3]
        out, softmax_lse = attention_reference(q, k, v, dtype=dtype, **options)
        return self._gradients(leaves, out, softmax_lse)


def _largest(tensor: Tensor) -> float:
    tensor = tensor[tensor.isfinite()]
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _error(got: Tensor, exact: Tensor) -> float:
    """Largest difference; infinities count as equal to themselves, NaN as different from all."""
    difference = (got.double() - exact.double()).abs()
    difference = torch.where(got.double() == exact.double(), 0.0, difference)
    if difference.isnan().any():
        return float("nan")
    return difference.max().item() if difference.numel() else 0.0


def _fp32_rounding(case: Case, exact: dict[str, Tensor]) -> dict[str, float]:
    """What fp32 arithmetic may do to a result whoever computes it: half a unit of its terms.

    Whether PyTorch's sum or ours comes out nearer is chance, where both are as exact as fp32.
    """
    q, k, v = (tensor.float() for tensor in case.inputs[:3])
    unit = torch.finfo(torch.float32).eps / 2
    scaled = unit * scale_of(None, case.problem.head_dim)
    score = scaled * _largest(q.norm(dim=-1)) * _largest(k.norm(dim=-1))
    weight = score + 2 * unit * _largest(exact["softmax_lse"])
    ds = scaled * _largest((case.dout.double() * exact["out"]).abs().sum(dim=-1))
    # Tensor cores cut a sum off instead of rounding it, once in 16 query rows.
    rows = case.problem.seqlen * case.problem.heads // case.problem.heads_k
    cut = unit * rows / 16 if case.dout.is_cuda else 0.0
    result = {
        "out": score * _largest(v),
        "softmax_lse": score,
        "dq": weight * _largest(exact["dq"]) + ds * _largest(k),
        "dk": (weight + cut) * _largest(exact["dk"]) + ds * _largest(q),
        "dv": (weight + cut) * _largest(exact["dv"]),
    }
    if case.problem.sink:
        rows_of_all = case.problem.seqlen * case.problem.batch
        result["dsink"] = weight * _largest(exact["dsink"]) + ds * rows_of_all**0.5
    return result


def compare(case: Case) -> list[Check]:
    """Every result of the tiled computation against fp64, beside PyTorch's own in the same dtype.

    softmax_lse is fp32 whatever dtype is, and so is the sink: they are compared with PyTorch in
    fp32.
    """
    got, exact = case.tiled(), case.standard(torch.float64)
    by_torch, in_fp32 = case.standard(), case.standard(torch.float32)
    rounding = _fp32_rounding(case, exact)
    checks = []
    for name, want in exact.items():
        is_fp32 = name == "softmax_lse"
        dtype = torch.float32 if is_fp32 else case.dtype
        error = _error(got[name], want)
        torch_error = _error((in_fp32 if is_fp32 else by_torch)[name], want)
        unit = torch.finfo(dtype).eps * _largest(want) + _LEAST[dtype]
        checks.append(Check(name, error, torch_error, 2 * torch_error + unit + rounding[name]))
    return checks


def _report(problem: Problem, checks: list[Check], costs: dict[str, Cost]) -> str:
    lines = [f"flash_attn {__version__}: {problem.text()}", ""]
    lines.append(f"{'result':<12}{'error':>12}{'of PyTorch':>12}{'allowed':>12}")
    for check in checks:
        numbers = (check.error, check.torch_error, check.allowed)
        verdict = "ok" if check.matches else "WRONG"
        lines.append(f"{check.name:<12}" + "".join(f"{n:>12.2e}" for n in numbers) + f"  {verdict}")
    lines += ["", f"{'forward + backward':<20}{'ms':>12}{'peak MiB':>12}"]
    for name, cost in costs.items():
        lines.append(f"{name:<20}{cost.ms:>12.2f}{cost.peak_bytes / 2**20:>12.1f}")
    where = "PyTorch's allocations" if problem.device.startswith("cuda") else "the process's growth"
    lines.append(f"peak: {where} beyond inputs")
    return "\n".join(lines)


def add_problem_options(add: Callable[..., object]) -> None:
    """What problem_of() reads, to a parser's or a group's `add_argument`."""
    add("--batch", type=int, default=2)
    add("--seqlen", type=int, default=512, help="of queries; of keys too without --seqlen-k")
    add("--seqlen-k", type=int)
    add("--heads", type=int, default=4)
    add("--heads-k", type=int, help="key and value heads (default: as many as --heads)")
    add("--head-dim", type=int, default=64)
    add("--dtype", choices=DTYPES, help="default: bfloat16 on GPUs, float32 on CPUs")
    add("--device", help="default: the GPU if there is one")
    add("--causal", action="store_true")
    add("--window", type=int, nargs=2, default=(-1, -1), metavar=("LEFT", "RIGHT"))
    add("--softcap", type=float, default=0.0)
    add("--dropout", type=float, default=0.0, metavar="P")
    add("--alibi", action="store_true")
    add("--sink", action="store_true")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_problem_options(add)
    add("--repeats", type=int, default=5, help="timed calls, of which the median counts")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add("--plot", type=Path, metavar="FILE.png", help="bar charts of errors, time and memory")


def problem_of(options: argparse.Namespace, on_gpu: bool | None = None) -> Problem:
    """The options' problem; `on_gpu` decides on the usual dtype, by default the device does."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = torch.device(device).type == "cuda" if on_gpu is None else on_gpu
    return Problem(
        batch=options.batch,
        seqlen=options.seqlen,
        seqlen_k=options.seqlen if options.seqlen_k is None else options.seqlen_k,
        heads=options.heads,
        heads_k=options.heads_k or options.heads,
        head_dim=options.head_dim,
        dtype=options.dtype or ("bfloat16" if on_gpu else "float32"),
        device=device,
        causal=options.causal,
        window=tuple(options.window),
        softcap=options.softcap,
        dropout=options.dropout,
        alibi=options.alibi,
        sink=options.sink,
    )


def run(options: argparse.Namespace) -> int:
    if options.plot is not None:
        load_pyplot()  # before anything is computed
    problem = problem_of(options)
    case = Case(problem)
    small = Case(replace(problem, batch=1, seqlen=16, seqlen_k=16))
    small.tiled(), small.standard()  # what is made once must not count
    # Tiled first: a heap that standard attention has grown would hide what is used afterwards.
    costs = {
        "tiled": cost_of(case.tiled, problem.device, options.repeats),
        "standard": cost_of(case.standard, problem.device, options.repeats),
    }
    checks = compare(case)
    matches = all(check.matches for check in checks)
    if options.json:
        result = {
            "version": __version__,
            "problem": asdict(problem),
            "matches": matches,
            "checks": [{**asdict(check), "matches": check.matches} for check in checks],
            "costs": {name: asdict(cost) for name, cost in costs.items()},
        }
        print(json.dumps(result, indent=1))
    else:
        print(_report(problem, checks, costs))
    if options.plot is not None:
        errors = {check.name: (check.error, check.torch_error, check.allowed) for check in checks}
        print(plot(problem.text(), errors, costs, options.plot), file=sys.stderr)
    return 0 if matches else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flash_attn.verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser)
    try:
        return run(parser.parse_args(arguments))
    except (RuntimeError, ValueError) as error:
        print(f"nothing verified: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
