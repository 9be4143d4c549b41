"""Draws speed_h200.png, the forward's chart of the README, from the table in performance.md.

python docs/speed_chart.py
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

HERE = Path(__file__).resolve().parent
NAMES = ("flash_attn", "FlashAttention-3", "cuDNN")
COLORS = ("#1d4ed8", "#94a3b8", "#cbd5e1")


def figures() -> dict[str, tuple[int, int, int]]:
    """TFLOP/s at 2 x 8192 tokens of the first table: head dim to ours, FlashAttention-3, cuDNN."""
    text = (HERE / "performance.md").read_text()
    row = re.compile(
        r"^\| (\d+(?: causal)?) \|.*\| (\d+) / (\d+) / (\d+) \| [\d.]+ \([\d.]+\) \|$", re.M
    )
    found = {}
    for label, ours, cudnn, fa3 in row.findall(text):
        found.setdefault(label, (int(ours), int(fa3), int(cudnn)))
    return found


def draw(path: Path) -> None:
    rates = figures()
    figure, axis = pyplot.subplots(figsize=(10, 3.6))
    for index, (name, color) in enumerate(zip(NAMES, COLORS, strict=True)):
        places = [place + 0.28 * (index - 1) for place in range(len(rates))]
        bars = axis.bar(
            places, [rate[index] for rate in rates.values()], 0.26, label=name, color=color
        )
        axis.bar_label(bars, padding=2, fontsize=8.5, fontweight="bold" if index == 0 else "normal")
    axis.set_xticks(range(len(rates)), [f"head dim {label}" for label in rates])
    axis.set_ylabel("TFLOP/s")
    axis.margins(y=0.1)
    axis.set_title(
        "Forward, bfloat16, 2 x 8192 tokens, width 2048, NVIDIA H200", fontsize=11, pad=24
    )
    axis.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 0.98))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(length=0)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=160)


if __name__ == "__main__":
    draw(HERE / "speed_h200.png")
