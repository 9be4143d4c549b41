"""Attention side by side: every contender on the same tensors, interleaved in one run.

    python benchmarks/bench_attention.py                          # the paper's grid, fwd and bwd
    python benchmarks/bench_attention.py --grid gqa,hdim --contenders ours,fa2
    python benchmarks/bench_attention.py --json run.json --png run
    python benchmarks/bench_attention.py --from run.json --png run

Prints TFLOP/s, ours as a multiple of the best other and of PyTorch's FlashAttention-2 (fa2), and
which share of the roofline ours reaches: the least time is max(FLOP / measured rate of an 8192^3
matrix product, least bytes / measured bandwidth of a copy). Times are medians of interleaved
rounds. Every contender's results are checked against an fp32 reference in the same run. Exits with
1 if any is wrong, or if ours fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from contenders import (
    CONTENDERS,
    ERROR_BOUND,
    Contender,
    largest_error,
    load,
    sampled_references,
)
from problems import GRIDS, MATMULS, Problem, grid
from tables import header, plot, row_text, summary
from timing import Call, Clock, Roofline, clock_for, interleaved, measure_roofline
from torch import Tensor

NAMES = ("out", "dq", "dk", "dv")


def prepare(
    contender: Contender, mode: str, tensors: tuple[Tensor, Tensor, Tensor, Tensor], causal: bool
) -> tuple[Call, dict[str, Tensor]]:
    """The call to time and its checked results."""
    q, k, v, dout = tensors
    if mode == "fwd":
        q, k, v = (x.detach() for x in (q, k, v))

        def forward() -> Tensor:
            with torch.no_grad():
                return contender(q, k, v, causal)

        return forward, {"out": forward()}
    out = contender(q, k, v, causal)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)

    return backward, dict(zip(NAMES, (out.detach(), *backward()), strict=True))


def measure(
    problem: Problem,
    mode: str,
    contenders: dict[str, Contender],
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    references: list[tuple[int, int, dict[str, Tensor]]],
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
            calls[name], results = prepare(contender, mode, tensors, problem.causal)
            errors[name] = largest_error(problem, results, references)
            del results
        except (RuntimeError, ValueError, NotImplementedError) as error:
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    times = interleaved(calls, clock, rounds=rounds, target_ms=target_ms)
    flop = problem.flop(mode)
    least_bytes = problem.least_bytes(mode, tensors[0].element_size())
    bound = ERROR_BOUND[tensors[0].dtype]
    return {
        "mode": mode,
        "problem": vars(problem),
        "name": problem.name(),
        "tflops": {name: flop / ms / 1e9 for name, ms in times.items()},
        "ms": times,
        "least_ms": roofline.least_ms(flop, least_bytes),
        "errors": errors,
        "wrong": [name for name, error in errors.items() if not error <= bound],
        "failures": failures,
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    add("--contenders", default="ours,fa2,cudnn,fa3" if on_gpu else "ours,sdpa",
        help=f"of {', '.join(CONTENDERS)}")  # fmt: skip
    add("--grid", default="paper" if on_gpu else "tiny", help=f"of {', '.join(GRIDS)}")
    add("--modes", default="fwd,bwd")
    add("--causal", default="0,1")
    add("--dtype", choices=["bfloat16", "float16", "float32"],
        default="bfloat16" if on_gpu else "float32")  # fmt: skip
    add("--rounds", type=int, default=5)
    add("--target-ms", type=float, default=20.0, help="of one contender in one round")
    add("--json", type=Path, help="also write everything measured here")
    add("--png", type=Path, help="also plot; PREFIX of one picture a mode")
    add("--from", dest="source", type=Path, help="show a --json file instead of measuring")
    args = parser.parse_args(arguments)
    for option, known in (("contenders", CONTENDERS), ("grid", GRIDS), ("modes", MATMULS)):
        for name in getattr(args, option).split(","):
            if name not in known:
                parser.error(f"--{option}: expected names out of {', '.join(known)}, got {name}")
    if set(args.causal.split(",")) - {"0", "1"}:
        parser.error(f"--causal: expected 0, 1 or 0,1, got {args.causal}")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype, clock = getattr(torch, args.dtype), clock_for(args.device)
    contenders, why_not = load(args.contenders.split(","))
    for name, reason in why_not.items():
        print(f"without {name}: {reason[:150]}")
    roofline = measure_roofline(args.device, dtype, clock)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(
        f"{where}, torch {torch.__version__}, {args.dtype}; matrix product "
        f"{roofline.flop_per_ms / 1e9:.3g} TFLOP/s, copy {roofline.bytes_per_ms / 1e9:.3g} TB/s"
    )
    print(header(list(contenders)))
    rows = []
    for problem in grid(args.grid, args.causal):
        tensors = problem.tensors(args.device, dtype)
        references = sampled_references(problem, *tensors)
        for mode in args.modes.split(","):
            rows.append(
                measure(problem, mode, contenders, tensors, references, clock=clock,
                        roofline=roofline, rounds=args.rounds, target_ms=args.target_ms)
            )  # fmt: skip
            print(row_text(rows[-1], list(contenders)), flush=True)
        del tensors, references
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return {"where": where, "torch": torch.__version__, "dtype": args.dtype,
            "contenders": list(contenders), "roofline": vars(roofline), "rows": rows}  # fmt: skip


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    if args.source:
        result = json.loads(args.source.read_text())
        print(header(result["contenders"]))
        for row in result["rows"]:
            print(row_text(row, result["contenders"]))
    else:
        result = run(args)
    print(summary(result))
    if args.json:
        args.json.write_text(json.dumps(result))
    if args.png:
        print(plot(result, args.png))
    failed = any(row["wrong"] or "ours" in row["failures"] for row in result["rows"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
