"""What train_gpt.py shows of its runs: a table, and a picture where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MEMORY_MEANING = {
    "cuda": "most memory that PyTorch had allocated on the GPU during the run",
    "cpu": "growth of the resident memory of the run's own process, at its peak",
}


def table(result: dict[str, Any]) -> str:
    """The runs side by side, then their differences and the verdict."""
    lines = [f"{'attention':<10}{'tokens/s':>10}{'ms/step':>10}{'peak MiB':>10}{'last loss':>11}"]
    for name, run in result["runs"].items():
        if not run["fits"]:
            lines.append(f"{name:<10}  does not fit: {run['reason'][:100]}")
            continue
        lines.append(
            f"{name:<10}{run['tokens_per_second']:>10.0f}{1e3 * run['step_seconds']:>10.1f}"
            f"{run['peak_bytes'] / 2**20:>10.0f}{run['losses'][-1]:>11.4f}"
        )
    lines.append(f"peak: {MEMORY_MEANING[result['options']['device']]}")
    differences = result["differences"]
    for name, apart in differences["loss"].items():
        lines.append(f"largest difference of loss, flash and {name}: {apart:.2g} nats")
    gradient = differences["gradient"]
    if gradient is not None:
        lines.append(
            f"largest difference of gradients at equal weights, flash and standard: "
            f"{gradient['relative']:.2g} relative, {gradient['absolute']:.2g} absolute "
            f"(step {gradient['step']}, {gradient['batch']} x {gradient['seqlen']} tokens)"
        )
    lines += [f"PARTED: {sentence}" for sentence in differences["parted"]]
    return "\n".join(lines)


def bars(axis: Any, runs: dict[str, Any], key: str, unit: float, title: str) -> None:
    """One bar a run in that run's colour, with its figure, or with the reason for having none."""
    for index, (name, run) in enumerate(runs.items()):
        height = run[key] * unit if run["fits"] else 0.0
        bar = axis.bar(name, height, color=f"C{index}", width=0.6)
        axis.bar_label(bar, [f"{height:.3g}" if run["fits"] else "does not fit"], padding=2)
    axis.margins(y=0.12)
    axis.set_title(title)


def plot(result: dict[str, Any], path: Path) -> str:
    """Loss curves, step time and peak memory to `path`; returns what was done in one line."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = result["runs"]
    figure, (curves, times, memory) = pyplot.subplots(1, 3, figsize=(14, 4), width_ratios=[2, 1, 1])
    for axis in (curves, times, memory):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    for index, (name, run) in enumerate(runs.items()):
        if run["fits"]:
            style = {"color": f"C{index}", "lw": 1.5 if index else 5, "alpha": 1 if index else 0.4}
            curves.plot(run["losses"], label=name, **style)
    curves.set(xlabel="step", ylabel="loss, nats a byte", title="loss")
    curves.legend(frameon=False)
    most_bytes = max((run["peak_bytes"] for run in runs.values() if run["fits"]), default=0)
    unit, exponent = ("GiB", 30) if most_bytes >= 2**32 else ("MiB", 20)
    bars(times, runs, "step_seconds", 1e3, "step time, ms")
    bars(memory, runs, "peak_bytes", 2**-exponent, f"peak memory, {unit}")
    options = result["options"]
    figure.suptitle(
        f"{options['layers']} layers, {options['heads']} heads x {options['head_dim']}, "
        f"{options['batch']} x {options['seqlen']} tokens, {options['dtype']} on {result['where']}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"picture: {path}"
