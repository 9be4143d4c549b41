"""The kernel tables and the selection of a row, through flash_attn_host; the filter by g++."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = ("bf16", "fp16")
KIB = 1024
SMEM_SM80 = 163 * KIB  # the most that one thread block can have
SMEM_SM86 = 99 * KIB  # also sm_89 and sm_120
SMEM_SM90 = 227 * KIB
GPUS = [(80, SMEM_SM80), (86, SMEM_SM86), (89, SMEM_SM86), (90, SMEM_SM90), (120, SMEM_SM86)]

Select = Callable[..., Any]


@pytest.fixture(scope="module")
def host() -> ModuleType:
    """Built by `make host`."""
    return importlib.import_module("flash_attn_host")


def rows_of(host: ModuleType, which: str) -> Sequence[Any]:
    return host.forward_rows() if which == "fwd" else host.backward_rows()


def select(
    host: ModuleType, which: str, capability: int, dtype: str, head_dim: int, smem: int
) -> Any:
    request = host.KernelRequest(capability, getattr(host.DType, dtype), head_dim, smem)
    return (host.select_forward if which == "fwd" else host.select_backward)(request)


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_rows_are_unique(host: ModuleType, which: str) -> None:
    rows = rows_of(host, which)
    tiles = [(row.name, row.tile_m, row.tile_n, row.smem_bytes) for row in rows]
    assert len(set(tiles)) == len(tiles), "two rows with one key and one tile"


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_every_row_is_some_gpus_row(host: ModuleType, which: str) -> None:
    for row in rows_of(host, which):
        selected = [
            select(host, which, capability, row.dtype.name, row.head_dim, smem).row
            for capability, smem in GPUS
        ]
        assert row in selected, f"{row.name}, tile {row.tile_m} x {row.tile_n}"


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_a_row_name_tells_its_key(host: ModuleType, which: str) -> None:
    for row in rows_of(host, which):
        assert row.name == f"{which}/sm{row.arch}/{row.head_dim}/{row.dtype.name}"


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_both_dtypes_have_the_same_rows(host: ModuleType, which: str) -> None:
    shapes: dict[str, list[tuple[Any, ...]]] = {dtype: [] for dtype in DTYPES}
    for row in rows_of(host, which):
        key = (row.arch, row.head_dim, row.tile_m, row.tile_n, row.num_warps, row.smem_bytes)
        shapes[row.dtype.name].append(key)
    assert shapes["bf16"] == shapes["fp16"] != []


@pytest.mark.parametrize("which", ["fwd", "bwd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("capability", "smem"),
    GPUS,
)
def test_every_gpu_has_a_row_for_every_head_dim(
    host: ModuleType, which: str, dtype: str, head_dim: int, capability: int, smem: int
) -> None:
    selection = select(host, which, capability, dtype, head_dim, smem)
    assert selection.found, selection.why_not
    assert selection.why_not == ""
    assert selection.row.head_dim >= head_dim
    assert selection.row.dtype.name == dtype
    assert selection.row.smem_bytes <= smem
    assert selection.row.arch <= capability


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_blocks_per_sm_fit_the_registers(host: ModuleType, which: str) -> None:
    """65536 registers an SM; a thread of the kernels needs at least 64 of them."""
    for row in rows_of(host, which):
        assert row.num_threads == 32 * row.num_warps <= 1024
        assert row.num_threads * row.blocks_per_sm * 64 <= 65536, row.name
        assert row.tile_m % 16 == 0 and row.tile_n % 8 == 0, row.name


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_the_smallest_sufficient_head_dim_is_selected(host: ModuleType, which: str) -> None:
    for head_dim in range(8, 257, 8):
        expected = min(rounded for rounded in HEAD_DIMS if rounded >= head_dim)
        assert select(host, which, 80, "bf16", head_dim, SMEM_SM80).row.head_dim == expected


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_the_first_row_that_fills_an_sm_is_selected(host: ModuleType, which: str) -> None:
    """Else the first that fits a block's shared memory; CUDA reserves 1 KiB a block."""
    for name in {row.name for row in rows_of(host, which)}:
        rows = [row for row in rows_of(host, which) if row.name == name]
        for smem in range(64 * KIB, 256 * KIB, 8 * KIB):
            fit = [row for row in rows if row.smem_bytes <= smem]
            full = [row for row in fit if row.blocks_per_sm * (row.smem_bytes + KIB) <= smem + KIB]
            got = select(host, which, rows[0].arch, rows[0].dtype.name, rows[0].head_dim, smem)
            if fit:
                assert got.row == (full or fit)[0], (name, smem)
    assert len({row.name for row in rows_of(host, which)}) == len(HEAD_DIMS) * len(DTYPES)


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_a_refusal_names_every_row_and_its_reason(host: ModuleType, which: str) -> None:
    rows = [row for row in rows_of(host, which) if row.dtype.name == "bf16"]

    old_gpu = select(host, which, 75, "bf16", 64, SMEM_SM80)
    assert not old_gpu.found
    assert old_gpu.why_not.count("needs compute capability 8.0") == len(rows)

    wide = select(host, which, 80, "bf16", 257, SMEM_SM80)
    assert not wide.found
    for row in rows:
        assert f"{row.name}: head_dim is at most {row.head_dim}" in wide.why_not

    small = select(host, which, 80, "bf16", 64, 1000)
    assert not small.found
    for row in rows:
        expected = f"{row.name}: needs {row.smem_bytes} bytes of shared memory, the device has 1000"
        assert expected in small.why_not

    fp32 = select(host, which, 80, "fp32", 64, SMEM_SM80)
    assert not fp32.found
    assert "no kernel of this dtype" in fp32.why_not


FILTER_PROGRAM = """
#include <cstdio>
#include "config/kernel_filter.h"
int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    std::putchar(flash::is_compiled(argv[i]) ? '1' : '0');
  }
}
"""

NAMES = ("fwd/sm80/64/bf16", "fwd/sm80/128/bf16", "fwd/sm80/128/fp16", "bwd/sm80/128/bf16")


@pytest.mark.parametrize(
    ("kernels", "compiled"),
    [
        ("", "1111"),
        ("fwd", "1110"),
        ("fwd/sm80/128/bf16", "0100"),
        ("fwd/sm80/64,bwd/sm80/128", "1001"),
        ("bwd,", "0001"),
        (",", "0000"),
        ("sm80", "0000"),
        ("fwd/sm90", "0000"),
    ],
)
def test_the_filter_compiles_the_named_rows(tmp_path: Path, kernels: str, compiled: str) -> None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    source = tmp_path / "filter.cpp"
    source.write_text(FILTER_PROGRAM)
    program = tmp_path / "filter"
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    define = f'-DFLASH_ATTN_KERNELS="{kernels}"'
    subprocess.run([compiler, *flags, define, str(source), "-o", str(program)], check=True)
    answer = subprocess.run([str(program), *NAMES], check=True, capture_output=True, text=True)
    assert answer.stdout == compiled
