"""Attention side by side: every contender on the same tensors, interleaved in one run.

    python -m benchmarks attention                                   # the paper's grid, fwd and bwd
    python -m benchmarks attention --head-dims 128 --seqlens 512,16384 --causal 1 --passes bwd
    python -m benchmarks attention --grid gqa,hdim --contenders ours,fa2
    python -m benchmarks attention --grid varlen                     # packed sequences
    python -m benchmarks attention --grid options                    # softcap, ALiBi, dropout, sink
    python -m benchmarks attention --json run.json --png run
    python -m benchmarks attention --from run.json --png run

Contenders: ours; sm80, which is ours without the kernels of newer GPUs; dense, which is ours with
packed sequences of equal lengths as a dense batch; fa2, cudnn and sdpa, which are PyTorch's
FlashAttention-2, PyTorch's cuDNN attention and whatever PyTorch picks itself; fa3 and fa4,
FlashAttention-3 and -4, where a module peer_fa3 or flash_attn.cute can be imported; ours_det and
fa3_det, with deterministic gradients; sdpa_ours and sdpa_fa3, which are PyTorch's attention on our
kernels. "best" is the fastest of those that are not ours. A contender
that does not know an option of a problem has no figure there.

Times are medians of interleaved rounds on random tensors, backward for the gradients of q, k and v;
rounds end once every median is known to half a percent. The results of every contender are checked
against an fp32 reference in the same run; with dropout, where each draws bits of its own, how far
they are from it on the average and how much they scatter. The table comes last, also after Ctrl-C
or SIGTERM, with what was measured until then: TFLOP/s, ours over each other contender, and the
share of the roofline that ours reaches: the least time is max(FLOP / measured rate of an 8192^3
matrix product, least bytes / measured bandwidth of a copy).
Exits with 1 if a result is wrong, if ours fails, or if the run was stopped.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from checks import Sample, error_bound, largest_error, sampled_references
from contenders import CONTENDERS, Contender, load
from options import add_problems, make_parser, names_of, parse_problems
from problems import Problem
from tables import plot, report
from timing import Call, Clock, Roofline, clock_for, interleaved, measure_roofline
from torch import Tensor

NAMES = ("out", "dq", "dk", "dv")

# On a GPU, where no contenders are named.
USUAL = ("ours", "fa2", "cudnn", "fa3")
OF_GRID = {
    "varlen": ("ours", "sm80", "dense", "fa2", "fa3"),
    "options": ("ours", "sm80", "fa2", "fa3"),
}


def prepare(
    contender: Contender,
    pass_name: str,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    problem: Problem,
) -> tuple[Call, dict[str, Tensor]]:
    """The call to time and its checked results."""
    q, k, v, dout = tensors
    if pass_name == "fwd":
        q, k, v = (x.detach() for x in (q, k, v))

        def forward() -> Tensor:
            with torch.no_grad():
                return contender(q, k, v, problem)

        return forward, {"out": forward()}
    out = contender(q, k, v, problem)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    return backward, dict(zip(NAMES, (out.detach(), *backward()), strict=True))


def measure(
    problem: Problem,
    pass_name: str,
    contenders: dict[str, Contender],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    references: list[Sample],
    *,
    clock: Clock,
    roofline: Roofline,
    rounds: int,
    target_ms: float,
) -> dict[str, Any]:
    """One row: TFLOP/s and errors of every contender, and why those without figures have none."""
    calls: dict[str, Call] = {}
    errors, failures = {}, {}
    for name, contender in contenders.items():
        try:
            with contender.selected():
                calls[name], results = prepare(contender, pass_name, tensors, problem)
            errors[name] = largest_error(problem, results, references)
            del results
        except (RuntimeError, ValueError, NotImplementedError) as error:
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    selected = {name: contender.selected for name, contender in contenders.items()}
    times = interleaved(calls, clock, selected, rounds=rounds, target_ms=target_ms)
    flop = problem.flop(pass_name)
    least_bytes = problem.least_bytes(pass_name, tensors[0].element_size())
    bound = error_bound(problem, tensors[0].dtype)
    return {
        "pass": pass_name,
        "problem": asdict(problem),
        "name": problem.name(),
        "tflops": {name: flop / ms / 1e9 for name, ms in times.items()},
        "ms": times,
        "least_ms": roofline.least_ms(flop, least_bytes),
        "errors": errors,
        "wrong": [name for name, error in errors.items() if not error <= bound],
        "failures": failures,
    }


def default_contenders(grids: list[str], on_gpu: bool) -> list[str]:
    """What there is to compare with on those grids."""
    if not on_gpu:
        return ["ours", "sdpa"]
    return list(dict.fromkeys(name for grid in grids for name in OF_GRID.get(grid, USUAL)))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser("attention", __doc__)
    add_problems(parser, cpu_grid="tiny")
    add = parser.add_argument
    on_gpu = torch.cuda.is_available()
    defaults = {grid: ",".join(default_contenders([grid], on_gpu)) for grid in ("paper", *OF_GRID)}
    more = "".join(f"; {grid}: {defaults[grid]}" for grid in OF_GRID if on_gpu)
    add("--contenders", type=names_of,
        help=f"of {', '.join(CONTENDERS)}; default here: {defaults['paper']}{more}")  # fmt: skip
    add("--json", type=Path, help="also write everything measured here")
    add("--png", type=Path, metavar="PREFIX", help="also plot, one picture a pass")
    add("--from", dest="source", type=Path, metavar="JSON",
        help="show a --json file instead of measuring")  # fmt: skip
    args = parse_problems(parser, arguments, contenders=CONTENDERS)
    if args.contenders is None:
        args.contenders = default_contenders(args.grid, on_gpu)
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything measured, up to the end or to the signal that stopped it."""
    torch.manual_seed(0)
    dtype, clock = getattr(torch, args.dtype), clock_for(args.device)
    contenders, why_not = load(args.contenders)
    roofline = measure_roofline(args.device, dtype, clock)
    result: dict[str, Any] = {
        "where": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "torch": torch.__version__,
        "dtype": args.dtype,
        "contenders": list(contenders),
        "without": why_not,
        "roofline": vars(roofline),
        "rows": [],
        "stopped": False,
    }
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for row in rows_of(args, contenders, clock, roofline):
            result["rows"].append(row)
    except KeyboardInterrupt:
        result["stopped"] = True
    return result


def rows_of(
    args: argparse.Namespace, contenders: dict[str, Contender], clock: Clock, roofline: Roofline
):
    for number, problem in enumerate(args.problems, 1):
        print(f"{number} of {len(args.problems)}: {problem.name()}", file=sys.stderr, flush=True)
        tensors = problem.tensors(args.device, getattr(torch, args.dtype))
        references = sampled_references(problem, *tensors)
        for pass_name in args.passes:
            yield measure(
                problem,
                pass_name,
                contenders,
                tensors,
                references,
                clock=clock,
                roofline=roofline,
                rounds=args.rounds,
                target_ms=args.target_ms,
            )
        del tensors, references
        if args.device == "cuda":
            torch.cuda.empty_cache()


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    result = json.loads(args.source.read_text()) if args.source else run(args)
    if args.json:
        args.json.write_text(json.dumps(result))
    if args.png:
        print(plot(result, args.png))
    print(report(result))
    failed = "ours" in result["without"] or any(
        row["wrong"] or "ours" in row["failures"] for row in result["rows"]
    )
    return 1 if failed or result["stopped"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
