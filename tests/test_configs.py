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
from cases import SM90_BACKWARD_TILES, SM90_TILES, sm90_lengths

CSRC = Path(__file__).resolve().parent.parent / "csrc"
HEAD_DIMS = (64, 96, 128, 192, 256)
DTYPES = ("bf16", "fp16")  # of both families
SM80_DTYPES = (*DTYPES, "fp32")
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
    host: ModuleType,
    which: str,
    capability: int,
    dtype: str,
    head_dim: int,
    smem: int,
    extras: bool = False,
) -> Any:
    request = host.KernelRequest(capability, getattr(host.DType, dtype), head_dim, extras, smem)
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
            select(host, which, capability, row.dtype.name, row.head_dim, smem, row.extras).row
            for capability, smem in GPUS
        ]
        assert row in selected, f"{row.name}, tile {row.tile_m} x {row.tile_n}"


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_a_row_name_tells_its_key(host: ModuleType, which: str) -> None:
    for row in rows_of(host, which):
        name = f"{which}/sm{row.arch}/{row.head_dim}/{row.dtype.name}"
        assert row.name == name + "/extras" * row.extras


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_both_16_bit_dtypes_have_the_same_rows(host: ModuleType, which: str) -> None:
    shapes: dict[str, list[tuple[Any, ...]]] = {dtype: [] for dtype in SM80_DTYPES}
    for row in rows_of(host, which):
        key = (row.arch, row.head_dim, row.extras, row.tile_m, row.tile_n, row.smem_bytes)
        shapes[row.dtype.name].append(key)
    assert shapes["bf16"] == shapes["fp16"] != []


@pytest.mark.parametrize("which", ["fwd", "bwd"])
@pytest.mark.parametrize("dtype", SM80_DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize(
    ("capability", "smem"),
    GPUS,
)
def test_every_gpu_has_a_row_for_every_head_dim(
    host: ModuleType,
    which: str,
    dtype: str,
    head_dim: int,
    extras: bool,
    capability: int,
    smem: int,
) -> None:
    selection = select(host, which, capability, dtype, head_dim, smem, extras)
    assert selection.found, selection.why_not
    assert selection.why_not == ""
    assert selection.row.head_dim >= head_dim
    assert selection.row.dtype.name == dtype
    assert selection.row.extras == extras
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
    for dtype in SM80_DTYPES:
        for head_dim in range(8, 257, 8):
            expected = min(rounded for rounded in HEAD_DIMS if rounded >= head_dim)
            assert select(host, which, 80, dtype, head_dim, SMEM_SM80).row.head_dim == expected


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_the_first_row_that_fills_an_sm_is_selected(host: ModuleType, which: str) -> None:
    """Else the first that fits a block's shared memory; CUDA reserves 1 KiB a block."""
    for name in {row.name for row in rows_of(host, which)}:
        rows = [row for row in rows_of(host, which) if row.name == name]
        for smem in range(64 * KIB, 256 * KIB, 8 * KIB):
            fit = [row for row in rows if row.smem_bytes <= smem]
            full = [row for row in fit if row.blocks_per_sm * (row.smem_bytes + KIB) <= smem + KIB]
            key = (rows[0].arch, rows[0].dtype.name, rows[0].head_dim)
            got = select(host, which, *key, smem, rows[0].extras)
            if fit:
                assert got.row == (full or fit)[0], (name, smem)
    names = {row.name for row in rows_of(host, which)}
    assert len(names) == 2 * len(HEAD_DIMS) * len(SM80_DTYPES)


@pytest.mark.parametrize("which", ["fwd", "bwd"])
def test_a_refusal_names_every_row_and_its_reason(host: ModuleType, which: str) -> None:
    rows = [row for row in rows_of(host, which) if row.dtype.name == "bf16" and not row.extras]

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


SM90_HEAD_DIMS = {head_dims for head_dims, _ in SM90_TILES}


def select_sm90(
    host: ModuleType,
    *,
    dtype: str = "bf16",
    seqlen: int = 5000,
    head_dims: tuple[int, int] = (64, 64),
    window: tuple[int, int] = (-1, -1),
    smem: int = SMEM_SM90,
    extras: str = "none",
    **packed: int,
) -> Any:
    sizes = (seqlen, seqlen, *head_dims)
    options = (host.Mask(*window), smem, getattr(host.Extras, extras))
    return host.select_sm90_forward(getattr(host.DType, dtype), *sizes, *options, **packed)


def suffix_of(row: Any) -> str:
    return "/extras" * row.extras


def test_sm90_rows_are_unique_and_the_same_for_both_dtypes(host: ModuleType) -> None:
    rows = {dtype: [] for dtype in DTYPES}
    for row in host.sm90_forward_rows():
        key = (row.head_dim, row.head_dim_v, row.mask, row.max_seqlen_q, row.options)
        rows[row.dtype.name].append((*key, row.tile_m, row.tile_n, row.smem_bytes))
        assert row.name == f"fwd/sm90/{row.head_dim}/{row.dtype.name}{suffix_of(row)}"
        assert row.num_threads == 128 * (1 + row.tile_m // 64)
        assert 99 * KIB < row.smem_bytes <= SMEM_SM90
    assert rows["bf16"] == rows["fp16"]
    assert len({row[:5] for row in rows["bf16"]}) == len(rows["bf16"])
    assert {row[:2] for row in rows["bf16"]} == SM90_HEAD_DIMS


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0)], ids=str)
@pytest.mark.parametrize(("head_dims", "tile"), SM90_TILES, ids=str)
def test_the_lengths_that_are_tested_reach_every_sm90_tile(
    host: ModuleType, head_dims: tuple[int, int], tile: tuple[int, int], window: tuple[int, int]
) -> None:
    """With query rows before, at and after a tile's edge."""
    plain = [row for row in host.sm90_forward_rows() if not row.extras]
    tiles = {((r.head_dim, r.head_dim_v), (r.tile_m, r.tile_n)) for r in plain}
    assert tiles == set(SM90_TILES)
    for seqlen in sm90_lengths(tile)[0][1:4]:
        row = select_sm90(host, seqlen=seqlen, head_dims=head_dims, window=window)
        assert (row.tile_m, row.tile_n) == tile


def test_every_sm90_row_serves_something(host: ModuleType) -> None:
    """And the rows that serve one problem end with one for every length."""
    for row in host.sm90_forward_rows():
        window = (-1, -1) if row.mask == host.MaskClass.none else (-1, 0)
        seqlen = min(row.max_seqlen_q, 10**6)
        head_dims = (row.head_dim, row.head_dim_v)
        options = {"dtype": row.dtype.name, "head_dims": head_dims, "window": window}
        options["extras"] = row.options.name
        assert select_sm90(host, seqlen=seqlen, **options) == row
        longest = select_sm90(host, seqlen=2**30, **options)
        assert longest.max_seqlen_q == 2**31 - 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (100, -1), (7, 9)])
def test_sm90_serves_every_pair_of_head_dims_with_the_smallest_kernel(
    host: ModuleType, dtype: str, window: tuple[int, int]
) -> None:
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            row = select_sm90(host, dtype=dtype, head_dims=(head_dim, head_dim_v), window=window)
            fit = [d for d in SM90_HEAD_DIMS if d[0] >= head_dim and d[1] >= head_dim_v]
            assert (row.head_dim, row.head_dim_v) == min(fit)
            assert row.mask == (
                host.MaskClass.none if window == (-1, -1) else host.MaskClass.bounded
            )


OPTIONS = ("softcap", "alibi", "dropout", "any")  # any: all of them


@pytest.mark.parametrize("extras", OPTIONS)
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (7, 9)])
def test_sm90_serves_extras_with_any_mask(
    host: ModuleType, window: tuple[int, int], extras: str
) -> None:
    """One option alone by a kernel of its own."""
    for head_dim in range(8, 257, 8):
        head_dims = (head_dim, head_dim)
        row = select_sm90(host, head_dims=head_dims, window=window, extras=extras)
        plain = select_sm90(host, head_dims=head_dims, window=window)
        assert (row.options.name, plain.options.name) == (extras, "none")
        assert (row.head_dim, row.head_dim_v) == (plain.head_dim, plain.head_dim_v)


def test_sm90_takes_a_window_that_hides_nothing_for_none(host: ModuleType) -> None:
    for window, expected in {
        (4999, 4999): "none",
        (4998, -1): "bounded",
        (-1, 4999): "none",
    }.items():
        assert select_sm90(host, window=window).mask.name == expected


@pytest.mark.parametrize(
    ("lengths", "tile_m"),
    [([1024] * 16, 128), ([2048] * 16, 192), ([16384] + [256] * 64, 192), ([16] * 4096, 128)],
    ids=["equal", "equal long", "one long", "short"],
)
def test_tiles_of_packed_sequences_suit_those_with_most_rows(
    host: ModuleType, lengths: list[int], tile_m: int
) -> None:
    """As far as the longest is known, else their mean length."""
    packed = {"seqlen": sum(lengths), "batch_size": len(lengths), "window": (-1, 0)}
    assert select_sm90(host, **packed, max_seqlen_q=max(lengths)).tile_m == tile_m
    mean = sum(lengths) // len(lengths)
    assert select_sm90(host, **packed) == select_sm90(host, seqlen=mean, window=(-1, 0))
    if min(lengths) == max(lengths):
        assert select_sm90(host, **packed).tile_m == tile_m


def test_sm90_refuses_what_it_has_no_kernel_for(host: ModuleType) -> None:
    assert select_sm90(host, dtype="fp32") is None
    assert select_sm90(host, head_dims=(257, 64)) is None
    assert select_sm90(host, head_dims=(64, 257)) is None
    assert select_sm90(host, smem=SMEM_SM80) is None


def test_sm90_refuses_a_bias(host: ModuleType) -> None:
    """The sm80 family serves it."""
    bf16 = host.DType.bf16
    for head_dim in range(8, 257, 8):
        args = (bf16, 64, 64, head_dim, head_dim, host.Mask(-1, 0), SMEM_SM90, host.Extras.any)
        assert host.select_sm90_forward(*args) is not None
        assert host.select_sm90_forward(*args, bias=True) is None
        args = (bf16, head_dim, head_dim, SMEM_SM90, host.Extras.any)
        assert host.select_sm90_backward(*args, bias=True) is None


def test_sm90_backward_rows_are_unique_and_the_same_for_both_dtypes(host: ModuleType) -> None:
    rows = {dtype: [] for dtype in DTYPES}
    for row in host.sm90_backward_rows():
        key = ((row.head_dim, row.head_dim_v), (row.tile_m, row.tile_n))
        rows[row.dtype.name].append((*key, row.options, row.num_threads, row.smem_bytes))
        assert row.name == f"bwd/sm90/{row.head_dim}/{row.dtype.name}{suffix_of(row)}"
        assert 99 * KIB < row.smem_bytes <= SMEM_SM90
    assert rows["bf16"] == rows["fp16"]
    plain = [row[:2] for row in rows["bf16"] if row[2] == host.Extras.none]
    assert plain == SM90_BACKWARD_TILES


@pytest.mark.parametrize("dtype", DTYPES)
def test_sm90_backward_serves_head_dims_with_the_smallest_kernel(
    host: ModuleType, dtype: str
) -> None:
    served = {head_dims for head_dims, _ in SM90_BACKWARD_TILES}
    for head_dim in range(8, 257, 8):
        for head_dim_v in range(8, 257, 8):
            fit = [d for d in served if d[0] >= head_dim and d[1] >= head_dim_v]
            args = (getattr(host.DType, dtype), head_dim, head_dim_v)
            row = host.select_sm90_backward(*args, SMEM_SM90)
            assert (row and (row.head_dim, row.head_dim_v)) == (min(fit) if fit else None)
            assert host.select_sm90_backward(*args, SMEM_SM80) is None
            fit = [d for d in (64, 96, 128) if d >= max(head_dim, head_dim_v)]
            for extras in OPTIONS:
                row = host.select_sm90_backward(*args, SMEM_SM90, getattr(host.Extras, extras))
                assert (row and (row.head_dim, row.options.name)) == (
                    (fit[0], extras) if fit else None
                )
    assert host.select_sm90_backward(host.DType.fp32, 64, 64, SMEM_SM90) is None


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


@pytest.mark.parametrize(
    ("archs", "gpu", "arch"),
    [
        ([80, 90], 80, 80),
        ([80, 90], 86, 80),
        ([80, 90], 90, 90),
        ([80, 90], 120, 90),
        ([86], 90, 86),
    ],
)
def test_a_gpu_runs_the_newest_code_that_is_not_newer(
    host: ModuleType, archs: list[int], gpu: int, arch: int
) -> None:
    assert host.compiled_arch(archs, gpu) == arch


@pytest.mark.parametrize(
    ("archs", "gpu", "message"),
    [
        ([80, 90], 75, r"this GPU is sm_75, older than Ampere \(sm_80\).*tensors on the CPU"),
        ([86, 90], 80, r'this GPU is sm_80, .*"86;90" only; rebuild with .*ARCHS="80"'),
    ],
)
def test_a_gpu_without_code_is_refused_with_what_to_do(
    host: ModuleType, archs: list[int], gpu: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        host.compiled_arch(archs, gpu)
