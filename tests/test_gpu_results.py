"""Results on CUDA beyond the cases shared with the CPU: sizes that only a GPU is asked for,
repetition, and memory that held something else before."""

from __future__ import annotations

import pytest
import torch
from backends import GPU, in_gpu_dtypes
from cases import LARGE, Case, make_gradients, make_inputs, random_case
from compare import assert_bit_equal, check_case, flash_results, op_results

pytestmark = pytest.mark.gpu


@in_gpu_dtypes
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_case(case: Case, dtype: torch.dtype) -> None:
    check_case(case, dtype, GPU)


@in_gpu_dtypes
@pytest.mark.parametrize("number", range(60))
def test_random_case(number: int, dtype: torch.dtype) -> None:
    check_case(random_case(number), dtype, GPU)


RERUN = [case for case in LARGE if not case.name.startswith("long")] + [
    Case("ragged", seqlen_q=333, seqlen_k=777, heads=8, heads_k=2, head_dim=72, causal=True),
    Case("one_head", seqlen_q=3000, seqlen_k=3000, heads=1, heads_k=1, batch=1, head_dim=128),
]


@in_gpu_dtypes
@pytest.mark.parametrize("deterministic", [False, True], ids=["atomic_dq", "deterministic"])
@pytest.mark.parametrize("case", RERUN, ids=str)
def test_reruns_are_bit_equal(case: Case, deterministic: bool, dtype: torch.dtype) -> None:
    """out, softmax_lse, dk and dv always; dq on demand, else up to the rounding of its sums."""
    inputs = make_inputs(case, dtype, GPU)
    dout, dlse = make_gradients(case, dtype, GPU)
    first = flash_results(case, inputs, dout, dlse, deterministic)
    rounding = torch.finfo(dtype).eps * first.dq.abs().max()
    for _ in range(15):
        again = flash_results(case, inputs, dout, dlse, deterministic)
        if not deterministic:
            assert (again.dq - first.dq).abs().max() <= rounding
            again = again._replace(dq=first.dq)
        assert_bit_equal(again, first)


def poisoned_pool() -> torch.cuda.MemPool:
    """Memory full of NaN: up to 16 MiB for small tensors, up to 64 MiB for large ones."""
    mib = 2**20
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        # Up to 1 MiB comes out of segments of 2 MiB, more out of segments of its own.
        sizes = [mib] * 16 + [64 * mib]
        filled = [torch.full((size // 4,), float("nan"), device=GPU) for size in sizes]
        del filled
    return pool


@pytest.mark.parametrize(
    "case",
    [
        Case("ragged", seqlen_q=201, seqlen_k=333, heads=4, heads_k=2, causal=True),
        Case("rows_without_keys", seqlen_q=300, seqlen_k=70, head_dim=128, causal=True),
        Case("narrow", seqlen_q=77, seqlen_k=50, head_dim=8),
        Case("head_dim_160", seqlen_q=130, seqlen_k=190, heads=4, heads_k=1, head_dim=160),
        Case("no_keys", seqlen_q=30, seqlen_k=0),
        Case("no_queries", seqlen_q=0, seqlen_k=30),
    ],
    ids=str,
)
def test_every_element_is_written(case: Case) -> None:
    """Also of softmax_d, and whatever the workspace held before: NaN, as torch's freed blocks."""
    arguments = [tensor.detach() for tensor in make_inputs(case, torch.bfloat16, GPU)]
    dout, dlse = make_gradients(case, torch.bfloat16, GPU)
    arguments.append(dout)
    expected = op_results(case, arguments, dlse)
    assert not any(tensor.isnan().any() for tensor in expected)
    workspace = 4 * expected[2].numel() * 256  # no more than the fp32 sums of dq at head_dim 256
    pool = poisoned_pool()
    with torch.cuda.use_mem_pool(pool):
        sizes = [*(tensor.nbytes for tensor in expected), workspace]
        probes = [torch.empty(size // 4 + 1, device=GPU) for size in sizes]
    # Outside of the pool, for isnan() makes tensors of its own.
    assert all(probe.isnan().all() for probe in probes), "the poison did not reach the allocator"
    del probes
    with torch.cuda.use_mem_pool(pool):
        got = op_results(case, arguments, dlse)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
