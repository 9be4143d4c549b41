"""Parts of the documentation that are made from the code: mask drawings, kernel tables, help."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "build" / "host"))  # `make host`

SEEN, HIDDEN, EDGE = "#3b82f6", "#94a3b8", "#64748b"
CELL, GAP, MARGIN = 22, 2, 26

# file: window_left, window_right, seqlen_q, seqlen_k, keys of left padding
MASKS = {
    "full": (-1, -1, 6, 6, 0),
    "causal": (-1, 0, 6, 6, 0),
    "causal_short_q": (-1, 0, 3, 8, 0),
    "causal_long_q": (-1, 0, 8, 3, 0),
    "window": (2, 1, 8, 8, 0),
    "window_causal": (2, 0, 8, 8, 0),
    "window_short_q": (2, 0, 3, 8, 0),
    "leftpad": (-1, 0, 4, 8, 3),
}


def host() -> Any:
    """The kernels' own arithmetic and tables, in Python."""
    try:
        return importlib.import_module("flash_attn_host")
    except ImportError as error:
        raise RuntimeError(f"flash_attn_host: expected from `make host`, got {error}") from error


def seen_by(mask: tuple[int, int, int, int, int]) -> list[list[bool]]:
    """Rows of queries, columns of keys, by the rule that every kernel follows."""
    left, right, seqlen_q, seqlen_k, padding = mask
    rule = host().Mask(left, right)
    matrix = host().attends_matrix(rule, seqlen_q, seqlen_k - padding).tolist()
    return [[False] * padding + row for row in matrix]


def mask_svg(mask: tuple[int, int, int, int, int]) -> str:
    rows = seen_by(mask)
    padding = mask[4]
    width = MARGIN + len(rows[0]) * (CELL + GAP)
    height = MARGIN + len(rows) * (CELL + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<text x="{MARGIN}" y="14" fill="{EDGE}">keys →</text>',
        f'<text transform="translate(14 {MARGIN}) rotate(90)" fill="{EDGE}">queries →</text>',
    ]
    for i, row in enumerate(rows):
        for j, seen in enumerate(row):
            x, y = MARGIN + j * (CELL + GAP), MARGIN + i * (CELL + GAP)
            look = f'fill="{SEEN}"' if seen else f'fill="{HIDDEN}" fill-opacity="0.25"'
            if j < padding:
                look = f'fill="none" stroke="{EDGE}" stroke-dasharray="3 2"'
            box = f'x="{x}" y="{y}" width="{CELL}" height="{CELL}" rx="3"'
            parts.append(f"<rect {box} {look}/>")
    return "\n".join([*parts, "</svg>", ""])


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(header), *[list(row) for row in rows]]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def joined(values: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(set(values))))


def coverage() -> str:
    """Which head dims each family has kernels for, by pass and with extras."""
    module = host()
    families = {
        ("sm80", "forward"): module.forward_rows(),
        ("sm80", "backward"): module.backward_rows(),
        ("sm90", "forward"): module.sm90_forward_rows(),
        ("sm90", "backward"): module.sm90_backward_rows(),
    }
    rows = []
    for (family, pass_name), configs in families.items():
        dtypes: dict[tuple[str, ...], list[str]] = {}  # by the head dims that they have
        for dtype in dict.fromkeys(config.dtype.name for config in configs):
            of_dtype = [config for config in configs if config.dtype.name == dtype]
            head_dims = tuple(
                joined(config.head_dim for config in of_dtype if config.extras == extras)
                for extras in (False, True)
            )
            dtypes.setdefault(head_dims, []).append(dtype)
        rows += [[family, pass_name, ", ".join(names), *dims] for dims, names in dtypes.items()]
    head = ("family", "pass", "dtypes", "tiles for head dims", "with softcap, ALiBi or dropout")
    return table(head, rows)


def kernels(configs: Iterable[Any], columns: dict[str, Callable[[Any], object]]) -> str:
    """One line a compiled row."""
    rows = [[get(config) for get in columns.values()] for config in configs]
    return table(columns, rows)


def kernel_tables() -> dict[str, str]:
    """Of every family and pass, without float16, whose rows are those of bfloat16."""
    module = host()
    usual: dict[str, Callable[[Any], object]] = {
        "row": lambda config: f"`{config.name}`",
        "tile": lambda config: f"{config.tile_m}×{config.tile_n}",
        "threads": lambda config: config.num_threads,
        "shared memory, KiB": lambda config: round(config.smem_bytes / 1024),
    }
    per_sm = {**usual, "blocks an SM": lambda config: config.blocks_per_sm}

    def options(config: Any) -> str:
        return {"none": "", "any": "several"}.get(config.options.name, config.options.name)

    forward_sm90 = {
        **usual,
        "head dim of v": lambda config: config.head_dim_v,
        "options": options,
        "mask": lambda config: "any" if config.extras else config.mask.name,
        "queries up to": lambda config: (
            config.max_seqlen_q if config.max_seqlen_q < 2**31 - 1 else "any"
        ),
    }
    backward_sm90 = {
        **usual,
        "head dim of v": lambda config: config.head_dim_v,
        "options": options,
    }
    sources = {
        "forward_sm90": (module.sm90_forward_rows(), forward_sm90),
        "backward_sm90": (module.sm90_backward_rows(), backward_sm90),
        "forward_sm80": (module.forward_rows(), per_sm),
        "backward_sm80": (module.backward_rows(), per_sm),
    }
    return {
        name: kernels([config for config in configs if config.dtype.name != "fp16"], columns)
        for name, (configs, columns) in sources.items()
    }


def command_help(command: str) -> str:
    from flash_attn.cli import main

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([command, "--help"])
    return f"```text\n{text.getvalue()}```\n"


def write_all(folder: Path) -> None:
    """Everything, into `folder`; files that stay the same keep their time."""
    files = {f"mask_{name}.svg": mask_svg(mask) for name, mask in MASKS.items()}
    files |= {f"kernels_{name}.md": text for name, text in kernel_tables().items()}
    files |= {
        f"help_{name}.md": command_help(name) for name in ("info", "verify", "bench", "memory")
    }
    files["coverage.md"] = coverage()
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
