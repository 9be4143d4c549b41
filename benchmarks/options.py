"""Options that benchmarks share: which problems, and how long they are timed."""

from __future__ import annotations

import argparse
from collections.abc import Container

import torch
from problems import GRIDS, MATMULS, grid


def names_of(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def make_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_problems(parser: argparse.ArgumentParser, cpu_grid: str) -> None:
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    add("--grid", type=names_of, default="paper" if on_gpu else cpu_grid,
        help=f"of {', '.join(GRIDS)}; default here: %(default)s")  # fmt: skip
    add("--head-dims", type=names_of, help="only these of the grid")
    add("--seqlens", type=names_of, help="only these numbers of queries of the grid")
    add(
        "--causal",
        type=names_of,
        default="0,1",
        help="0, 1, or both: the default, where the grid has no mask",
    )
    add("--passes", type=names_of, default="fwd,bwd", help="fwd, bwd, or both: the default")
    add("--dtype", choices=["bfloat16", "float16", "float32"],
        default="bfloat16" if on_gpu else "float32")  # fmt: skip
    add("--rounds", type=int, default=15, help="most of a row; default: %(default)s")
    add("--target-ms", type=float, default=20.0,
        help="of one contender in one round; default: %(default)s")  # fmt: skip


def parse_problems(
    parser: argparse.ArgumentParser, arguments: list[str], **more: Container[str]
) -> argparse.Namespace:
    """The options with `problems`, those of the grid that are left; `more` are names to check."""
    args = parser.parse_args(arguments)
    for option, known in {"grid": GRIDS, "passes": MATMULS, "causal": ("0", "1"), **more}.items():
        for name in getattr(args, option) or ():
            if name not in known:
                parser.error(f"--{option}: expected names out of {', '.join(known)}, got {name}")
    args.problems = [
        problem
        for problem in grid(args.grid, [flag == "1" for flag in args.causal])
        if args.head_dims is None or str(problem.head_dim) in args.head_dims
        if args.seqlens is None or str(problem.seqlen_q) in args.seqlens
    ]
    if not args.problems:
        parser.error("--head-dims and --seqlens leave nothing of the grid")
    return args
