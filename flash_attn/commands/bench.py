"""Times one call beside PyTorch's scaled_dot_product_attention, on this machine and your shapes.

    python -m flash_attn bench --seqlen 4096 --heads 16 --head-dim 128 --causal
    python -m flash_attn bench --seqlen 2048 --window 256 0 --json --plot times.png

Every backend of PyTorch's function is timed that takes the call. Medians of interleaved rounds: by
CUDA events on a GPU, by the clock on a CPU. Before that each output is compared with ours, unless
dropout makes them differ. PyTorch has no window and aligns causal masks to the other corner: where
that matters it gets a mask as a tensor.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flash_attn import __version__
from flash_attn.commands.peers import (
    Attention,
    first_failure,
    peer_names,
    scaled_dot_product_attention,
    selected,
    tiled_attention,
)
from flash_attn.measure import interleaved_ms, load_pyplot, save, tidy
from flash_attn.verify import Case, Problem, add_problem_options, problem_of

OURS = "flash_attn"
PASSES = ("forward", "forward + backward")


@dataclass
class Timing:
    """Of one implementation; without figures where it does not take the call."""

    ms: dict[str, float]  # by pass
    difference: float | None  # largest of its output to ours
    why_not: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_problem_options(add)
    add("--rounds", type=int, default=11, help="of which the median counts")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add("--plot", type=Path, metavar="FILE.png", help="bar chart of the times")


def _calls(case: Case, attention: Attention) -> dict[str, Callable[[], Any]]:
    q, k, v = (tensor.detach().requires_grad_() for tensor in case.inputs[:3])

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return attention(q, k, v)

    def both() -> object:
        return torch.autograd.grad(attention(q, k, v), (q, k, v), case.dout)

    return dict(zip(PASSES, (forward, both), strict=True))


def measure(problem: Problem, rounds: int) -> dict[str, Timing]:
    """Times of ours, then of every backend of PyTorch's function."""
    case = Case(problem)
    calls = {OURS: _calls(case, tiled_attention(case))}
    out = calls[OURS]["forward"]()
    timings = {OURS: Timing({}, 0.0)}
    for name in peer_names(problem.device):
        timings[name] = Timing({}, None)
        try:
            peer = _calls(case, scaled_dot_product_attention(problem))
        except NotImplementedError as error:
            timings[name].why_not = str(error)
            continue
        with selected(name):
            timings[name].why_not = first_failure(peer["forward + backward"])
            if not timings[name].why_not:
                calls[name] = peer
                if problem.dropout == 0.0:
                    timings[name].difference = (peer["forward"]() - out).abs().max().item()
    for pass_name in PASSES:
        entered = {name: _entered(name, peer[pass_name]) for name, peer in calls.items()}
        for name, ms in interleaved_ms(entered, problem.device, rounds).items():
            timings[name].ms[pass_name] = ms
    return timings


def _entered(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def inside() -> Any:
        with nullcontext() if name == OURS else selected(name):
            return call()

    return inside


def _table(problem: Problem, timings: dict[str, Timing]) -> str:
    lines = [f"flash_attn {__version__}: {problem.text()}", ""]
    head = "".join(f"{name:>26}" for name in PASSES)
    lines.append(f"{'ms, and how many times ours':<28}{head}{'difference':>14}")
    ours = timings[OURS].ms
    for name, timing in timings.items():
        if timing.why_not:
            lines.append(f"{name:<32}{timing.why_not}")
            continue
        cells = "".join(f"{timing.ms[p]:>18.3f}{timing.ms[p] / ours[p]:>8.2f}" for p in PASSES)
        difference = "-" if timing.difference is None else f"{timing.difference:.1e}"
        lines.append(f"{name:<28}{cells}{difference:>14}")
    return "\n".join(lines)


def _plot(problem: Problem, timings: dict[str, Timing], path: Path) -> str:
    timed = {name: timing.ms for name, timing in timings.items() if timing.ms}
    figure, axes = load_pyplot().subplots(1, len(PASSES), figsize=(11, 4))
    colors = ["C0" if name == OURS else "0.7" for name in timed]
    for axis, pass_name in zip(axes, PASSES, strict=True):
        tidy(axis)
        values = [ms[pass_name] for ms in timed.values()]
        bars = axis.bar([name.replace(" ", "\n") for name in timed], values, 0.6, color=colors)
        axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=2)
        axis.margins(y=0.12)
        axis.set_title(f"{pass_name}, ms")
    return save(figure, problem.text(), path)


def run(options: argparse.Namespace) -> int:
    problem = problem_of(options)
    if options.plot is not None:
        load_pyplot()  # before anything is measured
    timings = measure(problem, options.rounds)
    if options.json:
        result = {
            "version": __version__,
            "problem": asdict(problem),
            "timings": {name: asdict(timing) for name, timing in timings.items()},
        }
        print(json.dumps(result, indent=1))
    else:
        print(_table(problem, timings))
    if options.plot is not None:
        picture = _plot(problem, timings, options.plot)
        if not options.json:
            print(picture)
    return 0
