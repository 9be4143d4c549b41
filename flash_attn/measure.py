"""Time and peak memory of a call, and a picture of them, for `python -m flash_attn.verify`."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Cost:
    ms: float  # median
    peak_bytes: int  # beyond what was there before the call


def _resident_bytes(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process; elsewhere than on Linux always the peak."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _peak_bytes(call: Callable[[], object], device: str) -> int:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM restarts at VmRSS
    before = _resident_bytes("VmRSS")
    call()
    return max(_resident_bytes("VmHWM") - before, 0)


def cost_of(call: Callable[[], object], device: str, repeats: int) -> Cost:
    """The first call shows the memory, the next ones the time."""
    on_gpu = torch.device(device).type == "cuda"
    peak = _peak_bytes(call, device)
    times = []
    for _ in range(max(repeats, 1)):
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return Cost(statistics.median(times), peak)


def plot(
    title: str,
    errors: dict[str, tuple[float, float, float]],
    costs: dict[str, Cost],
    path: Path,
) -> str:
    """Errors (tiled, PyTorch's, allowed) of every result, time and memory; says what it did."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), width_ratios=[2, 1, 1])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    for index, label in enumerate(("tiled", "PyTorch", "allowed")):
        places = [place + 0.27 * (index - 1) for place in range(len(errors))]
        axes[0].bar(places, [error[index] for error in errors.values()], 0.25, label=label)
    axes[0].set(title="largest error against fp64", yscale="log")
    axes[0].set_xticks(range(len(errors)), list(errors))
    axes[0].legend(frameon=False)
    names = list(costs)
    for axis, what, values in (
        (axes[1], "forward + backward, ms", [cost.ms for cost in costs.values()]),
        (axes[2], "peak memory, MiB", [cost.peak_bytes / 2**20 for cost in costs.values()]),
    ):
        bars = axis.bar(names, values, 0.6, color=["C0", "C1"])
        axis.bar_label(bars, [f"{value:.3g}" for value in values], padding=2)
        axis.margins(y=0.12)
        axis.set_title(what)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"picture: {path}"
