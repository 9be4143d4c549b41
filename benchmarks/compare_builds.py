"""Two builds of this package side by side: what a change of the kernels gains or costs.

    cp flash_attn/_C.abi3.so /tmp/before.so             # then change, and `make build`
    python -m benchmarks builds /tmp/before.so flash_attn/_C.abi3.so --head-dims 64 --passes bwd

Each build has a process of its own; they take turns on the same problem, and the ratio of every
pair of neighbouring times is taken, so that a clock that drifts or a shared machine cancels out.
Where memory lies makes one process faster than another with the same build, by 3 % at times: hence
several pairs of processes. Times are those between two events on a GPU, and on CPU the processor
time of all threads.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from bench_attention import prepare
from contenders import ours
from options import add_problems, make_parser, parse_problems
from problems import Problem
from timing import MOST_ITERATIONS, Call, CudaClock, WallClock


class Build:
    """A compiled module in a process of its own."""

    def __init__(self, module: Path, device: str, dtype: str) -> None:
        command = [sys.executable, __file__, "--worker", str(module), device, dtype]
        self.module = module
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> float:
        """Milliseconds that the worker measured."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            sys.exit(f"{self.module} failed; its error is above")
        return float(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(module: str, device: str, dtype: str) -> int:
    """The worker: times calls of one build for as long as there are requests."""
    sys.path.append(str(Path(__file__).resolve().parent.parent))
    torch.ops.load_library(module)
    sys.modules["flash_attn._C"] = ModuleType("flash_attn._C")  # its ops are there already
    contender = ours()
    clock = CudaClock() if device == "cuda" else WallClock(time.process_time)
    call: Call = int
    for line in sys.stdin:
        request = json.loads(line)
        if "problem" in request:
            torch.manual_seed(0)
            problem = Problem.from_json(request["problem"])
            tensors = problem.tensors(device, getattr(torch, dtype))
            call, _ = prepare(contender, request["pass_name"], tensors, problem)
        print(clock.ms(call, request["iterations"]), flush=True)
    return 0


def ratios_of(
    builds: tuple[Build, Build], problem: Problem, pass_name: str, rounds: int, target_ms: float
) -> tuple[float, list[float]]:
    """Least milliseconds of the new build, and new / old of every pair of neighbouring times."""
    first = [b.ask(problem=asdict(problem), pass_name=pass_name, iterations=2) for b in builds]
    iterations = max(1, min(MOST_ITERATIONS, int(target_ms / max(*first, 1e-4))))
    least, ratios = math.inf, []
    for _ in range(rounds):
        ms = {build: build.ask(iterations=iterations) for build in random.sample(builds, 2)}
        old, new = (ms[build] for build in builds)
        least = min(least, new)
        ratios.append(new / old)
    return least, ratios


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = make_parser("builds", __doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    add_problems(parser, cpu_grid="cpu")
    parser.set_defaults(rounds=7)
    add = parser.add_argument
    add("--processes", type=int, default=3, help="pairs of them; default: %(default)s")
    add("--most", type=float, help="ratio of times above which the exit code is 1")
    args = parse_problems(parser, arguments)
    for module in (args.old, args.new):
        if not module.is_file():
            parser.error(f"expected two compiled modules, got {module}")
    return args


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--worker"]:
        return serve(*arguments[1:])
    args = parse(arguments)
    rows = [(pass_name, problem) for problem in args.problems for pass_name in args.passes]
    least = dict.fromkeys(rows, math.inf)
    ratios: dict[tuple[str, Problem], list[list[float]]] = {row: [] for row in rows}
    for number in range(args.processes):
        print(f"{number + 1} of {args.processes} pairs of processes", file=sys.stderr, flush=True)
        modules = args.old.resolve(), args.new.resolve()
        old, new = (Build(module, args.device, args.dtype) for module in modules)
        for pass_name, problem in rows:
            row = pass_name, problem
            ms, of_pair = ratios_of((old, new), problem, pass_name, args.rounds, args.target_ms)
            least[row] = min(least[row], ms)
            ratios[row].append(of_pair)
        old.close()
        new.close()
    print(f"{args.device}, torch {torch.__version__}, {args.dtype}")
    width = max(26, *(len(problem.name()) for problem in args.problems))
    print(f"{'':{width + 5}} {'new, ms':>9}  new / old (least and most of the pairs of processes)")
    medians: dict[str, list[float]] = {pass_name: [] for pass_name in args.passes}
    for (pass_name, problem), of_pairs in ratios.items():
        median = statistics.median(ratio for of_pair in of_pairs for ratio in of_pair)
        medians[pass_name].append(median)
        ends = sorted(map(statistics.median, of_pairs))
        figures = f"{least[pass_name, problem]:9.3f}  {median:.3f} ({ends[0]:.3f} {ends[-1]:.3f})"
        print(f"{pass_name:4} {problem.name():{width}} {figures}")
    for pass_name, values in medians.items():
        mean = statistics.geometric_mean(values)
        print(f"{pass_name} new / old: geometric mean {mean:.3f}, most {max(values):.3f}")
    return 1 if args.most is not None and max(map(max, medians.values())) > args.most else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
