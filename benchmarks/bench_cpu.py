"""The CPU backend beside PyTorch's own CPU attention: milliseconds, and their ratio.

    python -m benchmarks cpu                            # 4 heads of 64, 2048 tokens, 2 threads
    python -m benchmarks cpu --most 3                   # exit with 1 where ours takes over 3x

Both are timed in interleaved rounds on the same random tensors and checked against an fp32
reference. The figures are medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_attention import measure
from checks import sampled_references
from contenders import Contender, load
from options import make_parser, names_of
from problems import MATMULS, Problem
from timing import Roofline, WallClock

NO_ROOFLINE = Roofline(float("inf"), float("inf"))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser("cpu", __doc__)
    add = parser.add_argument
    add("--batch", type=int, default=1)
    add("--seqlen", type=int, default=2048)
    add("--heads", type=int, default=4)
    add("--heads-k", type=int, help="fewer for grouped-query attention")
    add("--head-dim", type=int, default=64)
    add("--dtypes", type=names_of, default="float32,bfloat16,float16", help="default: all three")
    add("--causal", type=names_of, default="0,1", help="0, 1, or both: the default")
    add("--passes", type=names_of, default=",".join(MATMULS), help="fwd, bwd, or both: the default")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=15, help="most of a row; default: %(default)s")
    add("--target-ms", type=float, default=100.0,
        help="of one contender in one round; default: %(default)s")  # fmt: skip
    add("--most", type=float, help="ratio of times above which the exit code is 1")
    add("--json", type=Path, help="also write everything measured here")
    return parser.parse_args(arguments)


def rows_of(args: argparse.Namespace, contenders: dict[str, Contender]) -> Iterator[dict[str, Any]]:
    heads_k = args.heads_k or args.heads
    sizes = (args.batch, args.seqlen, args.seqlen, args.heads, heads_k, args.head_dim)
    for dtype in args.dtypes:
        for flag in args.causal:
            problem = Problem(*sizes, causal=flag == "1")
            tensors = problem.tensors("cpu", getattr(torch, dtype))
            references = sampled_references(problem, *tensors)
            for pass_name in args.passes:
                row = measure(
                    problem,
                    pass_name,
                    contenders,
                    tensors,
                    references,
                    clock=WallClock(),
                    roofline=NO_ROOFLINE,
                    rounds=args.rounds,
                    target_ms=args.target_ms,
                )
                if row["failures"]:
                    sys.exit(f"cannot be timed: {row['failures']}")
                yield row | {"dtype": dtype, "ratio": row["ms"]["ours"] / row["ms"]["sdpa"]}


def row_text(row: dict[str, Any]) -> str:
    times = f"{row['ms']['ours']:9.2f} {row['ms']['sdpa']:9.2f} {row['ratio']:10.2f}"
    wrong = f"  WRONG: {', '.join(row['wrong'])}" if row["wrong"] else ""
    error = f"{row['errors']['ours']:8.0e}{wrong}"
    return f"{row['pass']:4} {row['name']:21} {row['dtype']:8} {times} {error}"


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    contenders, why_not = load(["ours", "sdpa"])
    if why_not:
        sys.exit(f"cannot be timed: {why_not}")
    print(f"torch {torch.__version__}, {args.threads} threads; times in ms")
    print(f"{'':35} {'ours':>9} {'sdpa':>9} {'ours/sdpa':>10} {'error':>8}")
    rows = []
    for row in rows_of(args, contenders):
        rows.append(row)
        print(row_text(row), flush=True)
    for pass_name in args.passes:
        ratios = [row["ratio"] for row in rows if row["pass"] == pass_name]
        mean, most = statistics.geometric_mean(ratios), max(ratios)
        print(f"{pass_name:4} ours/sdpa: geometric mean {mean:.2f}, most {most:.2f}")
    if args.json:
        args.json.write_text(json.dumps(rows))
    too_slow = args.most is not None and max(row["ratio"] for row in rows) > args.most
    return 1 if too_slow or any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
