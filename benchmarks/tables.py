"""How measured rows are shown: compact lines, geometric means, pictures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def best_other(row: Row) -> str | None:
    """Fastest contender beside ours that gave a right result."""
    others = {n: t for n, t in row["tflops"].items() if n != "ours" and n not in row["wrong"]}
    return max(others, key=lambda name: others[name]) if others else None


def ratio(row: Row, other: str | None) -> float | None:
    """Ours as a multiple of another contender; None where one of the two has no figure."""
    tflops = row["tflops"]
    if other is None or "ours" not in tflops or other not in tflops:
        return None
    return tflops["ours"] / tflops[other]


def roofline_share(row: Row) -> float | None:
    return row["least_ms"] / row["ms"]["ours"] if "ours" in row["ms"] else None


def text_of(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def header(contenders: list[str]) -> str:
    columns = " ".join(f"{name:>6}" for name in contenders)
    return f"{'':4} {'TFLOP/s':26} {columns} | /best  /fa2  roof   error"


def row_text(row: Row, contenders: list[str]) -> str:
    columns = " ".join(text_of(row["tflops"].get(name), ".3g", 6) for name in contenders)
    ratios = (
        f"{text_of(ratio(row, best_other(row)), '.2f', 5)} {text_of(ratio(row, 'fa2'), '.2f', 5)}"
    )
    share = text_of(roofline_share(row), ".0%", 5)
    error = text_of(row["errors"].get("ours"), ".0e", 7)
    wrong = "".join(f"  WRONG: {name} {row['errors'][name]:.1e}" for name in row["wrong"])
    return f"{row['mode']:4} {row['name']:26} {columns} | {ratios} {share} {error}{wrong}"


def geometric_means(rows: list[Row], label: str) -> str:
    """One line: means and worst of both ratios, mean share of the roofline."""
    parts = []
    for title, values in (
        ("/best", [ratio(row, best_other(row)) for row in rows]),
        ("/fa2", [ratio(row, "fa2") for row in rows]),
    ):
        known = [value for value in values if value is not None]
        mean = statistics.geometric_mean(known) if known else None
        worst = min(known) if known else None
        parts.append(f"{title} {text_of(mean, '.3f', 5)} (min {text_of(worst, '.2f', 4)})")
    shares = [share for row in rows if (share := roofline_share(row)) is not None]
    mean_share = statistics.geometric_mean(shares) if shares else None
    return f"{label:18} {'  '.join(parts)}  roofline {text_of(mean_share, '.0%', 4)}"


def summary(result: dict[str, Any]) -> str:
    """Geometric means by mode, head dim and mask and by mode, and what failed and why."""
    rows = result["rows"]
    lines = ["geometric means of ours"]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        of_mode = [row for row in rows if row["mode"] == mode]
        keys = sorted({(r["problem"]["head_dim"], r["problem"]["causal"]) for r in of_mode})
        for head_dim, causal in keys if len(keys) > 1 else []:
            part = [
                row
                for row in of_mode
                if (row["problem"]["head_dim"], row["problem"]["causal"]) == (head_dim, causal)
            ]
            lines.append(geometric_means(part, f"{mode} d{head_dim}{' causal' if causal else ''}"))
        lines.append(geometric_means(of_mode, f"{mode} all {len(of_mode)}"))
    failures: dict[str, list[str]] = {}
    for row in rows:
        for name, reason in row["failures"].items():
            failures.setdefault(f"{name}: {reason[:140]}", []).append(row["name"])
    lines += [f"no figure, {text} ({len(names)} rows)" for text, names in failures.items()]
    wrong = sorted({name for row in rows for name in row["wrong"]})
    lines += [f"WRONG results from {name}" for name in wrong]
    return "\n".join(lines)


def plot(result: dict[str, Any], prefix: Path) -> str:
    """PREFIX-fwd.png and so on: TFLOP/s over the sequence length, a panel a head dim and mask."""
    try:
        import matplotlib
    except ImportError:
        return "no pictures: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for mode in dict.fromkeys(row["mode"] for row in result["rows"]):
        of_mode = [row for row in result["rows"] if row["mode"] == mode]
        head_dims = sorted({row["problem"]["head_dim"] for row in of_mode})
        masks = sorted({row["problem"]["causal"] for row in of_mode})
        figure, axes = pyplot.subplots(
            len(masks),
            len(head_dims),
            squeeze=False,
            figsize=(4.5 * len(head_dims), 3.5 * len(masks)),
        )
        for axis_row, causal in zip(axes, masks, strict=True):
            for axis, head_dim in zip(axis_row, head_dims, strict=True):
                part = [
                    row
                    for row in of_mode
                    if (row["problem"]["head_dim"], row["problem"]["causal"]) == (head_dim, causal)
                ]
                ticks = range(len(part))
                for name in result["contenders"]:
                    heights = [row["tflops"].get(name, float("nan")) for row in part]
                    axis.plot(ticks, heights, "o-", label=name, lw=2.5 if name == "ours" else 1.2)
                axis.set_xticks(ticks, [row["problem"]["seqlen_q"] for row in part])
                axis.set_title(f"head dim {head_dim}{', causal' if causal else ''}")
                axis.set_ylim(bottom=0)
                axis.grid(alpha=0.3)
        axes[0][0].legend()
        figure.suptitle(f"{mode}, TFLOP/s by sequence length, {result['dtype']}, {result['where']}")
        figure.tight_layout()
        path = prefix.with_name(f"{prefix.name}-{mode}.png")
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(str(path))
    return f"pictures: {', '.join(written)}"
