"""How measured rows are shown: a table, geometric means and minima, pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]

BEST = "best"  # stands for the fastest right contender of each row that is not ours
OURS = ("ours", "ours_det", "sm80", "dense", "sdpa_ours", "sdpa_fa3")
NAME_WIDTH = 27  # of a problem, where no longer one is in the table


def best_other(row: Row) -> str | None:
    """Fastest contender beside ours that gave a right result."""
    others = {n: t for n, t in row["tflops"].items() if n not in OURS and n not in row["wrong"]}
    return max(others, key=lambda name: others[name]) if others else None


def ratio(row: Row, other: str) -> float | None:
    """Ours as a multiple of another contender; None where one of the two has no figure."""
    tflops = row["tflops"]
    name = best_other(row) if other == BEST else other
    if name is None or "ours" not in tflops or name not in tflops:
        return None
    return tflops["ours"] / tflops[name]


def roofline_share(row: Row) -> float | None:
    return row["least_ms"] / row["ms"]["ours"] if "ours" in row["ms"] else None


def text_of(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def others_of(contenders: list[str]) -> list[str]:
    """What ours is compared with: every other contender, and the best peer if there are several."""
    others = [name for name in contenders if name != "ours"]
    return [*others, BEST] if len([name for name in others if name not in OURS]) > 1 else others


def header(contenders: list[str], name_width: int = NAME_WIDTH) -> str:
    rates = "".join(f"{name:>7}" for name in contenders)
    ratios = "".join(f"{name:>6}" for name in others_of(contenders))
    return f"{'TFLOP/s':{name_width + 5}}{rates} | ours /{ratios}  roof   error"


def row_text(row: Row, contenders: list[str], name_width: int = NAME_WIDTH) -> str:
    rates = "".join(text_of(row["tflops"].get(name), ".3g", 7) for name in contenders)
    ratios = "".join(text_of(ratio(row, name), ".2f", 6) for name in others_of(contenders))
    share = text_of(roofline_share(row), ".0%", 6)
    error = text_of(row["errors"].get("ours"), ".0e", 8)
    wrong = "".join(f"  WRONG: {name} {row['errors'][name]:.1e}" for name in row["wrong"])
    return (
        f"{row['pass']:4} {row['name']:{name_width}}{rates} |       {ratios}{share}{error}{wrong}"
    )


def means_text(rows: list[Row], label: str, others: list[str]) -> str:
    """One line: geometric mean and least of every ratio, mean share of the roofline."""
    parts = []
    for other in others:
        known = [value for row in rows if (value := ratio(row, other)) is not None]
        mean = statistics.geometric_mean(known) if known else None
        least = min(known) if known else None
        parts.append(f"{text_of(mean, '.3f', 7)} ({text_of(least, '.2f', 4)})")
    shares = [share for row in rows if (share := roofline_share(row)) is not None]
    mean_share = statistics.geometric_mean(shares) if shares else None
    return f"{label:18}{''.join(parts)}{text_of(mean_share, '.0%', 10)}"


def where_least(rows: list[Row], pass_name: str, other: str) -> str | None:
    """The row where ours compares worst, in one sentence."""
    known = [(value, row["name"]) for row in rows if (value := ratio(row, other)) is not None]
    if not known:
        return None
    value, name = min(known)
    return f"least {pass_name} over {other}: {value:.2f} at {name}"


def kind_of(row: Row) -> tuple[int, bool]:
    return row["problem"]["head_dim"], row["problem"]["causal"]


def summary(result: dict[str, Any]) -> Iterator[str]:
    """Means by pass, head dim and mask, then by pass; where ours is least; what has no figure."""
    rows, others = result["rows"], others_of(result["contenders"])
    columns = "".join(f"{name:>14}" for name in others)
    yield f"{'mean (least) of /':18}{columns}  roofline"
    leasts = []
    for pass_name in dict.fromkeys(row["pass"] for row in rows):
        of_pass = [row for row in rows if row["pass"] == pass_name]
        kinds = sorted({kind_of(row) for row in of_pass})
        for head_dim, causal in kinds if len(kinds) > 1 else []:
            part = [row for row in of_pass if kind_of(row) == (head_dim, causal)]
            yield means_text(part, f"{pass_name} d{head_dim}{' causal' * causal}", others)
        yield means_text(of_pass, f"{pass_name} all {len(of_pass)}", others)
        leasts += [where_least(of_pass, pass_name, other) for other in others]
    yield from filter(None, leasts)
    failures: dict[str, list[str]] = {}
    for row in rows:
        for name, reason in row["failures"].items():
            failures.setdefault(f"{name}: {reason[:140]}", []).append(row["name"])
    for text, names in failures.items():
        yield f"no figure, {text} ({len(names)} rows)"
    for name, reason in result["without"].items():
        yield f"without {name}: {reason[:140]}"
    for name in sorted({name for row in rows for name in row["wrong"]}):
        yield f"WRONG results from {name}"
    if result["stopped"]:
        yield "STOPPED before the end: the rest of the grid is missing"


def report(result: dict[str, Any]) -> str:
    roofline, contenders = result["roofline"], result["contenders"]
    width = max([NAME_WIDTH, *(len(row["name"]) for row in result["rows"])])
    lines = [
        f"{result['where']}, torch {result['torch']}, {result['dtype']}; matrix product "
        f"{roofline['flop_per_ms'] / 1e9:.3g} TFLOP/s, copy "
        f"{roofline['bytes_per_ms'] / 1e9:.3g} TB/s",
        header(contenders, width),
        *(row_text(row, contenders, width) for row in result["rows"]),
        *summary(result),
    ]
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
    for pass_name in dict.fromkeys(row["pass"] for row in result["rows"]):
        of_pass = [row for row in result["rows"] if row["pass"] == pass_name]
        head_dims = sorted({row["problem"]["head_dim"] for row in of_pass})
        masks = sorted({row["problem"]["causal"] for row in of_pass})
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
                    for row in of_pass
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
        figure.suptitle(
            f"{pass_name}, TFLOP/s by sequence length, {result['dtype']}, {result['where']}"
        )
        figure.tight_layout()
        path = prefix.with_name(f"{prefix.name}-{pass_name}.png")
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(str(path))
    return f"pictures: {', '.join(written)}"
