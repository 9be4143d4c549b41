"""Host microseconds of one dense call: what Python, autograd and the launch cost.

    python -m benchmarks host                           # GPU if there is one, else CPU
    python -m benchmarks host --contenders ours,fa2 --causal

The tensors are so small that the device has next to nothing to do. On a GPU the calls are not
waited for, so the time is the host's alone; "queued" is the share of it that the device still
needed after the last call: far above 0, the device was measured rather than the host.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from contenders import Contender, load
from options import make_parser
from problems import Problem
from timing import Call
from torch import Tensor

MODES = ("no grad", "forward with grad", "forward + backward")


def call_of(contender: Contender, mode: str, tensors: tuple[Tensor, ...], problem: Problem) -> Call:
    q, k, v, dout = tensors
    if mode == "no grad":
        inputs = [x.detach() for x in (q, k, v)]

        def without_grad() -> Tensor:
            with torch.no_grad():
                return contender(*inputs, problem)

        return without_grad
    if mode == "forward with grad":
        return lambda: contender(q, k, v, problem)
    return lambda: torch.autograd.grad(contender(q, k, v, problem), (q, k, v), dout)


def host_us(contender: Contender, call: Call, iterations: int, on_gpu: bool) -> tuple[float, float]:
    """Microseconds of a call on the host, and of the wait for the device, as a share of them."""
    if on_gpu:
        torch.cuda.synchronize()
    with contender.selected():
        start = time.perf_counter()
        for _ in range(iterations):
            call()
        called = time.perf_counter()
    if on_gpu:
        torch.cuda.synchronize()
    waited = time.perf_counter() - called
    return 1e6 * (called - start) / iterations, waited / (called - start)


def times_of(
    contenders: dict[str, Contender],
    mode: str,
    tensors: tuple[Tensor, ...],
    args: argparse.Namespace,
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Median microseconds and queued share of every contender, and why those without have none."""
    on_gpu, calls, failures = args.device == "cuda", {}, {}
    for name, contender in contenders.items():
        call = call_of(contender, mode, tensors, args.problem)
        try:
            host_us(contender, call, 10, on_gpu)  # the first calls compile, plan and allocate
            calls[name] = call
        except RuntimeError as error:
            failures[name] = str(error).splitlines()[0]
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(args.rounds):
        for name in random.sample(list(calls), len(calls)):
            measured[name].append(host_us(contenders[name], calls[name], args.iterations, on_gpu))
    times = {name: statistics.median(us for us, _ in m) for name, m in measured.items()}
    queued = {name: statistics.median(wait for _, wait in m) for name, m in measured.items()}
    return times, queued, failures


def line_of(title: str, texts: dict[str, str], contenders: Iterable[str]) -> str:
    return f"{title:20}" + "".join(f"{texts.get(name, '-'):>10}" for name in contenders)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser("host", __doc__)
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    add("--contenders", help="default: ours,fa2,cudnn,fa3 on a GPU, ours,sdpa on CPU")
    add("--seqlen", type=int, help="default: 128 on a GPU, 8 on CPU")
    add("--causal", action="store_true")
    add("--iterations", type=int, default=100,
        help="in one round, few enough to fit the GPU's queue; default: %(default)s")  # fmt: skip
    add("--rounds", type=int, default=20, help="default: %(default)s")
    add("--most", help="exit with 1 where ours takes longer, three figures: 25,35,150")
    add("--json", type=Path, help="also write the figures here")
    args = parser.parse_args(arguments)
    args.bars = [float(bar) for bar in args.most.split(",")] if args.most else []
    if args.most and len(args.bars) != len(MODES):
        parser.error(f"--most: expected a figure for each of {', '.join(MODES)}, got {args.most}")
    return args


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    on_gpu = args.device == "cuda"
    names = args.contenders or ("ours,fa2,cudnn,fa3" if on_gpu else "ours,sdpa")
    seqlen, heads, head_dim = (args.seqlen or 128, 2, 64) if on_gpu else (args.seqlen or 8, 1, 16)
    args.problem = Problem(1, seqlen, seqlen, heads, heads, head_dim, causal=args.causal)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    tensors = args.problem.tensors(args.device, dtype)
    contenders, why_not = load(names.split(","))
    for name, reason in why_not.items():
        print(f"without {name}: {reason[:150]}")
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    what = f"{args.problem.name()} {str(dtype)[6:]}"
    lines = [
        f"{where}, torch {torch.__version__}, {what}; microseconds a call",
        line_of("", {name: name for name in contenders}, contenders),
    ]
    result: dict[str, dict[str, float]] = {}
    for mode in MODES:
        result[mode], queued, failures = times_of(contenders, mode, tensors, args)
        for name, reason in failures.items():
            print(f"{mode}: without {name}: {reason[:150]}")
        lines.append(line_of(mode, {n: f"{us:.1f}" for n, us in result[mode].items()}, contenders))
        if on_gpu:
            lines.append(
                line_of("  queued", {n: f"{w:.0%}" for n, w in queued.items()}, contenders)
            )
    print("\n".join(lines))
    if args.json:
        args.json.write_text(json.dumps(result))
    ours = [result[mode].get("ours", math.inf) for mode in MODES]
    return 1 if any(us > bar for us, bar in zip(ours, args.bars, strict=False)) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
