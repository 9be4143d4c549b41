"""Peak memory of forward and backward over sequence lengths: tiled, PyTorch's, standard attention.

    python -m flash_attn memory --heads 8 --head-dim 64 --causal
    python -m flash_attn memory --seqlens 1024 4096 16384 --plot memory.png

Peaks are what a call needs beyond its inputs: by PyTorch's allocator on a GPU, else by how far the
resident memory of a process of its own grows (Linux). Standard attention stores its scores; lengths
at which it would not fit the memory that is free are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import flash_attn
from flash_attn import __version__
from flash_attn.commands.peers import (
    first_failure,
    scaled_dot_product_attention,
    standard_attention,
    tiled_attention,
)
from flash_attn.measure import load_pyplot, peak_bytes, save, tidy
from flash_attn.verify import Case, Problem, add_problem_options, problem_of

ATTENTIONS = {
    "flash_attn": tiled_attention,
    "sdpa": lambda case: scaled_dot_product_attention(case.problem),
    "standard": standard_attention,
}
_SCORE_COPIES = 6  # score matrices that standard attention has at once, forward and backward
# malloc then gives memory back as it is freed: the next call's peak is all its own.
_CHILD = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass
class Row:
    """Peak bytes of one length by implementation, or why there is no figure."""

    seqlen: int
    peak_bytes: dict[str, int]
    why_not: dict[str, str]


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    usual = "(default: 512 to 4096 on a CPU, to 16384 on a GPU)"
    add("--seqlens", type=int, nargs="+", help=f"of queries and of keys {usual}")
    add_problem_options(lambda name, **kind: None if "--seqlen" in name else add(name, **kind))
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add("--plot", type=Path, metavar="FILE.png", help="curves over the sequence length")
    parser.set_defaults(batch=1, seqlen=1, seqlen_k=None)


def _free_bytes(device: str) -> int:
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _measure(problem: Problem, name: str, row: Row) -> None:
    case = Case(problem)
    scores = problem.batch * problem.heads * problem.seqlen * problem.seqlen_k
    needed = _SCORE_COPIES * scores * case.dtype.itemsize
    if name == "standard" and needed > _free_bytes(problem.device) // 2:
        row.why_not[name] = f"would need some {needed / 2**30:.1f} GiB"
        return
    try:
        attention = ATTENTIONS[name](case)
    except NotImplementedError as error:
        row.why_not[name] = str(error)
        return
    q, k, v = (tensor.requires_grad_() for tensor in case.inputs[:3])

    def call() -> None:
        torch.autograd.grad(attention(q, k, v), (q, k, v), case.dout)

    def measured() -> None:
        row.peak_bytes[name] = peak_bytes(call, problem.device)

    failure = first_failure(measured)
    if failure:
        row.why_not[name] = failure


def measure(problem: Problem, seqlens: list[int]) -> list[Row]:
    """Of every length, in this process."""
    warm_up = Row(0, {}, {})
    for name in ATTENTIONS:  # what is made once must not count
        _measure(replace(problem, seqlen=64, seqlen_k=64), name, warm_up)
    rows = []
    for seqlen in seqlens:
        row = Row(seqlen, {}, {})
        for name in ATTENTIONS:
            _measure(replace(problem, seqlen=seqlen, seqlen_k=seqlen), name, row)
        rows.append(row)
    return rows


def _measure_in_child(problem: Problem, seqlens: list[int]) -> list[Row]:
    """The same in a process whose allocator returns what is freed."""
    command = [sys.executable, "-c", f"from {__name__} import child; child()"]
    root = str(Path(flash_attn.__file__).parent.parent)
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    environ = {**os.environ, **_CHILD, "PYTHONPATH": paths}
    text = json.dumps({"problem": asdict(problem), "seqlens": seqlens})
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environ)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip() or f"{command} exited with {done.returncode}")
    return [Row(**row) for row in json.loads(done.stdout)]


def child() -> None:
    """Rows of the problem and the lengths on stdin, to stdout."""
    asked = json.load(sys.stdin)
    window = tuple(asked["problem"].pop("window"))
    problem = Problem(**asked["problem"], window=window)
    print(json.dumps([asdict(row) for row in measure(problem, asked["seqlens"])]))


def _table(problem: Problem, rows: list[Row]) -> str:
    lines = [f"flash_attn {__version__}: {_title(problem)}", ""]
    lines.append(f"{'peak MiB at seqlen':<20}" + "".join(f"{name:>14}" for name in ATTENTIONS))
    for row in rows:
        cells = [
            f"{row.peak_bytes[name] / 2**20:>14.1f}" if name in row.peak_bytes else f"{'-':>14}"
            for name in ATTENTIONS
        ]
        lines.append(f"{row.seqlen:<20}" + "".join(cells))
    reasons = {
        f"{name} at {row.seqlen}: {why}" for row in rows for name, why in row.why_not.items()
    }
    return "\n".join([*lines, *sorted(reasons)])


def _title(problem: Problem) -> str:
    """Without the lengths, which vary."""
    return problem.text().replace(f", seqlen {problem.seqlen} x {problem.seqlen_k}", "")


def _plot(problem: Problem, rows: list[Row], path: Path) -> str:
    figure, axis = load_pyplot().subplots(figsize=(7, 4.5))
    tidy(axis)
    for name in ATTENTIONS:
        points = [(r.seqlen, r.peak_bytes[name] / 2**20) for r in rows if name in r.peak_bytes]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set(xscale="log", yscale="log", xlabel="sequence length", ylabel="peak memory, MiB")
    ticks = [row.seqlen for row in rows]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.legend(frameon=False)
    return save(figure, f"forward + backward: {_title(problem)}", path)


def run(options: argparse.Namespace) -> int:
    problem = problem_of(options)
    on_gpu = torch.device(problem.device).type == "cuda"
    seqlens = options.seqlens or [2**power for power in range(9, 15 if on_gpu else 13)]
    if min(seqlens) < 1:
        raise ValueError(f"--seqlens: expected lengths from 1 on, got {min(seqlens)}")
    if options.plot is not None:
        load_pyplot()  # before anything is measured
    rows = measure(problem, seqlens) if on_gpu else _measure_in_child(problem, seqlens)
    if options.json:
        result = {
            "version": __version__,
            "problem": asdict(problem),
            "rows": [asdict(row) for row in rows],
        }
        print(json.dumps(result, indent=1))
    else:
        print(_table(problem, rows))
    if options.plot is not None:
        picture = _plot(problem, rows, options.plot)
        if not options.json:
            print(picture)
    return 0
