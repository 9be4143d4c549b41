"""Time and peak memory of calls, and pictures of them, for the commands."""

from __future__ import annotations

import contextlib
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

NO_MATPLOTLIB = "no picture: matplotlib is not installed (pip install matplotlib)"


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


def peak_bytes(call: Callable[[], object], device: str) -> int:
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


def _ms(call: Callable[[], object], device: str, iterations: int) -> float:
    """Mean milliseconds: between two events on a GPU, else by the clock."""
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            events: Any = torch.cuda.Event
            start, end = events(enable_timing=True), events(enable_timing=True)
            start.record()
            for _ in range(iterations):
                call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / iterations
    begin = time.perf_counter()
    for _ in range(iterations):
        call()
    return 1e3 * (time.perf_counter() - begin) / iterations


def interleaved_ms(
    calls: Mapping[str, Callable[[], object]], device: str, rounds: int, target_ms: float = 20.0
) -> dict[str, float]:
    """Median milliseconds of every call.

    Each round times all of them in random order, so that none always follows the one that heats the
    machine most, and each as often as fits in `target_ms`.
    """
    iterations = {}
    for name, call in calls.items():
        _ms(call, device, 1)  # the first call may compile or plan
        iterations[name] = max(1, min(200, int(target_ms / max(_ms(call, device, 1), 1e-4))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(max(rounds, 1)):
        for name in random.sample(list(calls), len(calls)):
            times[name].append(_ms(calls[name], device, iterations[name]))
    return {name: statistics.median(measured) for name, measured in times.items()}


def cost_of(call: Callable[[], object], device: str, repeats: int) -> Cost:
    """The first call shows the memory, the next ones the time."""
    on_gpu = torch.device(device).type == "cuda"
    peak = peak_bytes(call, device)
    times = []
    for _ in range(max(repeats, 1)):
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return Cost(statistics.median(times), peak)


def load_pyplot() -> Any:
    """matplotlib.pyplot that draws to files. Raises RuntimeError where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError(NO_MATPLOTLIB) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def tidy(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def save(figure: Any, title: str, path: Path) -> str:
    """Writes and closes the figure; says so."""
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    load_pyplot().close(figure)
    return f"picture: {path}"


def plot(
    title: str,
    errors: dict[str, tuple[float, float, float]],
    costs: dict[str, Cost],
    path: Path,
) -> str:
    """Errors (tiled, PyTorch's, allowed) of every result, time and memory; says what it did."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), width_ratios=[2, 1, 1])
    for axis in axes:
        tidy(axis)
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
    return save(figure, title, path)
