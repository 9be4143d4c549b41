"""The CPU backend beside PyTorch's own CPU attention: milliseconds, and their ratio.

    python benchmarks/bench_cpu.py                      # 4 heads of 64, 2048 tokens, 2 threads
    python benchmarks/bench_cpu.py --most 3             # exit with 1 where ours takes over 3x

Both are timed in interleaved rounds on the same tensors and checked against an fp32 reference.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bench_attention import measure
from contenders import load, sampled_references
from problems import Problem
from timing import Roofline, WallClock

NO_ROOFLINE = Roofline(float("inf"), float("inf"))


def row_text(row: dict[str, Any]) -> str:
    times = f"{row['ms']['ours']:9.2f} {row['ms']['sdpa']:9.2f} {row['ratio']:10.2f}"
    wrong = f"  WRONG: {', '.join(row['wrong'])}" if row["wrong"] else ""
    error = f"{row['errors']['ours']:8.0e}{wrong}"
    return f"{row['mode']:4} {row['name']:21} {row['dtype']:8} {times} {error}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, default=1)
    add("--seqlen", type=int, default=2048)
    add("--heads", type=int, default=4)
    add("--heads-k", type=int, help="fewer for grouped-query attention")
    add("--head-dim", type=int, default=64)
    add("--dtypes", default="float32,bfloat16")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=5)
    add("--target-ms", type=float, default=300.0, help="of one contender in one round")
    add("--most", type=float, help="ratio of times above which the exit code is 1")
    add("--json", type=Path, help="also write everything measured here")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    contenders, why_not = load(["ours", "sdpa"])
    if why_not:
        sys.exit(f"cannot be timed: {why_not}")
    print(f"torch {torch.__version__}, {args.threads} threads; times in ms")
    print(f"{'':4} {'':30} {'ours':>9} {'sdpa':>9} {'ours/sdpa':>10} {'error':>8}")
    rows = []
    for dtype in (getattr(torch, name) for name in args.dtypes.split(",")):
        for causal in (False, True):
            heads_k = args.heads_k or args.heads
            sizes = (args.batch, args.seqlen, args.seqlen, args.heads, heads_k, args.head_dim)
            problem = Problem(*sizes, causal=causal)
            tensors = problem.tensors("cpu", dtype)
            references = sampled_references(problem, *tensors)
            for mode in ("fwd", "bwd"):
                row = measure(
                    problem,
                    mode,
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
                row["dtype"] = str(dtype).removeprefix("torch.")
                row["ratio"] = row["ms"]["ours"] / row["ms"]["sdpa"]
                rows.append(row)
                print(row_text(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows))
    too_slow = args.most is not None and max(row["ratio"] for row in rows) > args.most
    return 1 if too_slow or any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
