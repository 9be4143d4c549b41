"""The backward kernels of Hopper: each row of their table at the edges of its tiles, with as many
slots for the sums of dq as usual and with few, many times over."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import GPU, has_sm90, in_gpu_dtypes
from cases import SM90_BACKWARD_TILES, Case, around, lay_out, make_gradients, make_inputs
from compare import Results, assert_bit_equal, check_case, flash_results, op_results
from torch import Tensor

from flash_attn import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_sm90("bwd"), reason="needs a Hopper GPU and a build with sm_90"),
]

MOST = 2**31 - 1
WINDOWS = [(-1, -1), (-1, 0), (30, 20), (-1, 50), (70, -1), (0, 0)]
# Deterministic with a right bound, items walk the other way.
WAYS = [(window, False) for window in WINDOWS] + [(w, True) for w in WINDOWS if w[1] >= 0]
in_sections = pytest.mark.parametrize("section", [MOST, 1], ids=["usual_sections", "few_slots"])
on_tiles = pytest.mark.parametrize(("head_dims", "tile"), SM90_BACKWARD_TILES, ids=str)


@in_gpu_dtypes
@in_sections
@pytest.mark.parametrize(("window", "deterministic"), WAYS, ids=str)
@on_tiles
def test_lengths_around_the_tiles(
    head_dims: tuple[int, int],
    tile: tuple[int, int],
    window: tuple[int, int],
    deterministic: bool,
    section: int,
    dtype: torch.dtype,
) -> None:
    """With few slots every wait for sums happens: a head's come after another's are converted."""
    with ops.backward_sections(section):
        for seqlen_q, seqlen_k in itertools.product(around(tile[0]), around(tile[1])):
            case = Case(
                "around",
                seqlen_q=seqlen_q,
                seqlen_k=seqlen_k,
                heads=6,
                heads_k=3 if seqlen_q % 2 else 6,
                head_dim=head_dims[0],
                head_dim_v=head_dims[1],
                window=window,
            )
            check_case(case, dtype, GPU, deterministic)


def rerun_case(head_dims: tuple[int, int], causal: bool) -> Case:
    return Case(
        "rerun",
        seqlen_q=700,
        seqlen_k=709,
        heads=24,
        heads_k=12,
        head_dim=head_dims[0],
        head_dim_v=head_dims[1],
        causal=causal,
    )


@in_gpu_dtypes
@in_sections
@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "deterministic"])
@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize("head_dims", dict(SM90_BACKWARD_TILES), ids=str)
def test_200_reruns_are_bit_equal(
    head_dims: tuple[int, int], causal: bool, deterministic: bool, section: int, dtype: torch.dtype
) -> None:
    """dk and dv always, dq on demand and else up to the rounding of its sums."""
    case = rerun_case(head_dims, causal)
    inputs = make_inputs(case, dtype, GPU)
    dout, dlse = make_gradients(case, dtype, GPU)
    first = flash_results(case, inputs, dout, dlse, deterministic)
    rounding = torch.finfo(dtype).eps * first.dq.abs().max()
    differing = torch.zeros((), dtype=torch.int64, device=GPU)
    with ops.backward_sections(section):
        for _ in range(200):
            again = flash_results(case, inputs, dout, dlse, deterministic)
            differing += (again.dk != first.dk).sum() + (again.dv != first.dv).sum()
            tolerance = torch.zeros_like(rounding) if deterministic else rounding
            differing += (~((again.dq - first.dq).abs() <= tolerance)).sum()
    assert differing.item() == 0


@pytest.mark.parametrize("deterministic", [False, True], ids=["any_order", "deterministic"])
@pytest.mark.parametrize(
    "case",
    [
        Case("smallest", batch=1, seqlen_q=1, seqlen_k=1, heads=1, heads_k=1),
        Case("odd", seqlen_q=333, seqlen_k=150, heads=6, heads_k=2, head_dim=128, causal=True),
        Case("cluster", seqlen_q=333, seqlen_k=190, heads=6, heads_k=2, head_dim=256, causal=True),
        Case("hidden", seqlen_q=70, seqlen_k=900, heads=2, heads_k=2, head_dim=96, window=(5, 5)),
    ],
    ids=str,
)
def test_10000_launches_end(case: Case, deterministic: bool) -> None:
    inputs = [tensor.detach() for tensor in make_inputs(case, torch.bfloat16, GPU)]
    dout, _ = make_gradients(case, torch.bfloat16, GPU)
    window = (case.window[0], 0 if case.causal else case.window[1])
    scale = case.head_dim**-0.5
    out, softmax_lse = ops.forward(*inputs, scale, *window)
    grads = [torch.empty_like(tensor) for tensor in inputs]
    for section in (MOST, 1):
        with ops.backward_sections(section):
            for _ in range(5000):
                ops.backward(
                    dout, *inputs, out, softmax_lse, None, *grads, scale, *window, deterministic
                )
        torch.cuda.synchronize()
    assert all(tensor.isfinite().all() for tensor in grads)


def older(case: Case, *tensors: Tensor) -> Results:
    with ops.newest_kernel_family(80):
        return flash_results(case, tensors[:3], *tensors[3:], deterministic=True)


@pytest.mark.parametrize("layout", ["bhsd", "sbhd", "interleaved", "wide"])
def test_strides_are_served_as_they_are(layout: str) -> None:
    case = Case("strided", seqlen_q=200, seqlen_k=333, heads=4, heads_k=4, head_dim=128)
    inputs = make_inputs(case, torch.bfloat16, GPU)
    dout, dlse = make_gradients(case, torch.bfloat16, GPU)
    expected = flash_results(case, inputs, dout, dlse, deterministic=True)
    laid_out = tuple(lay_out(t.detach(), layout).detach().requires_grad_() for t in inputs)
    got = flash_results(case, laid_out, lay_out(dout, layout), dlse, deterministic=True)
    assert_bit_equal(got, expected)
    assert not torch.equal(older(case, *inputs, dout, dlse).dk, expected.dk), (
        "the sm80 family served the call all the same"
    )


def test_what_the_copy_engine_cannot_address_goes_to_the_older_family() -> None:
    """A gradient that is the same memory for every head: no stride to address it by."""
    case = Case("odd", seqlen_q=200, seqlen_k=333, heads=4, heads_k=4, layout="expanded")
    inputs = make_inputs(case, torch.bfloat16, GPU)
    dout, dlse = make_gradients(case, torch.bfloat16, GPU)
    got = flash_results(case, inputs, dout, dlse, deterministic=True)
    expected = older(case, *inputs, dout, dlse)
    for one, other in zip(got[2:], expected[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2e-3)


def test_a_graph_may_be_replayed_beside_calls_and_other_graphs() -> None:
    """Every launch has counters of its own, in its workspace."""
    case = rerun_case((128, 128), causal=True)
    dout, dlse = make_gradients(case, torch.bfloat16, GPU)
    arguments = [t.detach() for t in make_inputs(case, torch.bfloat16, GPU)] + [dout]
    expected = op_results(case, arguments, dlse)
    torch.cuda.synchronize()
    capture = torch.cuda.Stream()
    graphs, captured = [torch.cuda.CUDAGraph() for _ in range(3)], []
    for graph in graphs:
        with torch.cuda.graph(graph, stream=capture):
            captured.append(op_results(case, arguments, dlse))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        torch.cuda.synchronize()
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(capture):
            beside = op_results(case, arguments, dlse)
        torch.cuda.synchronize()
        for results in (*captured, beside):
            for one, other in zip(results, expected, strict=True):
                assert torch.equal(one, other)
