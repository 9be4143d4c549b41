"""Prints registers, shared memory, spills and compile seconds of every kernel of the last build.

Reads build/ptxas/*.json, which the nvcc gate writes, and the kernel tables through flash_attn_host.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build" / "host"))

HEADER = ("kernel", "tile", "arch", "regs", "smem KB", "spills", "ptxas s")
# Of each table the function that lists its rows, and their fields in the order that a demangled
# kernel name has.
TABLES = {
    "ForwardConfig": (
        "forward_rows",
        *("arch", "dtype", "head_dim", "extras", "tile_m", "tile_n", "num_warps"),
        "blocks_per_sm",
    ),
    "BackwardConfig": (
        "backward_rows",
        *("arch", "dtype", "head_dim", "extras", "tile_m", "tile_n", "num_warps", "warps_m_s"),
        *("warps_n_dkv", "warps_m_dq", "num_stages", "blocks_per_sm"),
    ),
    "Sm90ForwardConfig": (
        "sm90_forward_rows",
        *("dtype", "head_dim", "head_dim_v", "mask", "options", "max_seqlen_q", "tile_m", "tile_n"),
        *("q_stages", "k_stages", "v_stages", "out_in_v", "ping_pong", "rows_in_turn"),
    ),
    "Sm90BackwardConfig": (
        "sm90_backward_rows",
        *("dtype", "head_dim", "head_dim_v", "options", "tile_m", "tile_n", "dout_stages"),
        "landing_strips",
    ),
}
CONFIG = re.compile(r"(\w+Config)\{([^{}]*)\}")


def numbers(text: str) -> tuple[int, ...]:
    """Values of "80, (flash::DType)1, 64, false"."""
    words = (re.sub(r"\([^)]*\)", "", word).strip() for word in text.split(","))
    return tuple(int({"true": "1", "false": "0"}.get(word, word)) for word in words)


def row_of(name: str, host: Any) -> Any | None:
    """The table's row that a kernel was compiled for; None for kernels without a row."""
    config = CONFIG.search(name)
    if config is None:
        return None
    kind, values = config[1], numbers(config[2])
    list_rows, *fields = TABLES[kind]
    for row in getattr(host, list_rows)():
        if tuple(int(getattr(row, field)) for field in fields) == values:
            return row
    raise RuntimeError(
        f"{name}: expected a row of the kernel tables, found none. Build flash_attn_host and the "
        f"kernels from the same tables (make host, make kernels); TABLES of {__file__} has to list "
        f"the fields of {kind} in their order."
    )


def short_name(name: str) -> str:
    """A kernel without its parameters, namespaces and the row among its template arguments."""
    plain = re.sub(r"flash::(sm\d\d::)?", "", CONFIG.sub("", name))
    head = re.match(r"(?:void )?([\w:]+)(<[^()]*>)?", plain.replace("(anonymous namespace)::", ""))
    return head[1] if head else name


def label_of(row: Any) -> str:
    """Head dims, dtype, mask class and options of a row."""
    head_dim_v = getattr(row, "head_dim_v", row.head_dim)
    head_dims = f"{row.head_dim}" + (f"/{head_dim_v}" if head_dim_v != row.head_dim else "")
    mask = f" {row.mask.name}" if hasattr(row, "mask") else ""
    options = (row.options.name if hasattr(row, "options") else "extras") if row.extras else ""
    return f"{head_dims} {row.dtype.name}{mask} {options}".rstrip()


def lines_of(unit: dict[str, Any], host: Any) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for kernel in unit["kernels"]:
        name = kernel.get("name", kernel["symbol"])
        row = row_of(name, host)
        smem = kernel["static_smem"] + (row.smem_bytes if row else 0)
        base = short_name(name)
        lines.append(
            (
                f"{base} {label_of(row)}" if row else base,
                f"{row.tile_m}x{row.tile_n}" if row else "",
                kernel["arch"],
                str(kernel["registers"]),
                f"{smem / 1024:.1f}",
                str(kernel["spill_stores"] + kernel["spill_loads"]),
                f"{kernel.get('ptxas_seconds', 0):.2f}",
            )
        )
    return sorted(lines)


def print_table(lines: list[Sequence[str]]) -> None:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        first, *rest = (cell for cell in zip(line, widths, strict=True))
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
        print("  ".join(cells))


def main() -> int:
    # A unit that no longer exists may have left its record behind.
    units_now = {path.stem for path in (ROOT / "csrc").rglob("*.cu")}
    records = sorted((ROOT / "build" / "ptxas").glob("*.json"))
    files = [record for record in records if record.stem in units_now]
    if not files:
        print('no kernels built: expected build/ptxas/*.json; run "make kernels" (needs nvcc)')
        return 1
    import flash_attn_host as host

    units = [json.loads(file.read_text()) for file in files]
    for unit in units:
        unit["lines"] = lines_of(unit, host)
    print_table([HEADER, *(line for unit in units for line in unit["lines"])])
    print()
    for unit in units:
        print(f"{unit['unit']}: {len(unit['lines'])} kernels, {unit['seconds']:.1f} s")
    print(f"{len(units)} units, {sum(unit['seconds'] for unit in units):.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
