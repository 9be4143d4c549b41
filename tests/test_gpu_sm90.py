"""The kernels of Hopper: each row of their table at the edges of its tiles, and which calls they
serve."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import GPU, has_sm90, in_gpu_dtypes
from cases import SM90_TILES, Case, lay_out, make_inputs, sm90_lengths
from compare import assert_as_exact_as_torch, largest
from torch import Tensor

from flash_attn import flash_attn_func, ops
from flash_attn.problem import scale_of
from flash_attn.reference import attention_reference, visible_keys

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_sm90("fwd"), reason="needs a Hopper GPU and a build with sm_90"),
]

WINDOWS = [(-1, -1), (-1, 0), (30, 20), (-1, 50), (70, -1), (0, 0)]


def forward(case: Case, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """out and softmax_lse without gradients."""
    with torch.no_grad():
        out, softmax_lse, _ = flash_attn_func(*inputs, return_attn_probs=True, **case.options)
    return out, softmax_lse


def check_forward(case: Case, dtype: torch.dtype, q_gain: float = 1.0) -> None:
    """Against fp64. Memory that the outputs are made of is full of NaN before."""
    q, k, v = (tensor.detach() for tensor in make_inputs(case, dtype, GPU))
    inputs = (q * q_gain, k, v)
    poison = torch.full((case.batch * case.seqlen_q * case.heads * 512,), float("nan"), device=GPU)
    del poison
    out, softmax_lse = forward(case, inputs)
    exact, exact_lse = attention_reference(*inputs, **case.options)
    torch_out, _ = attention_reference(*inputs, **case.options, dtype=dtype)
    _, torch_lse = attention_reference(*inputs, **case.options, dtype=torch.float32)
    unit = torch.finfo(torch.float32).eps / 2 * abs(scale_of(case.scale, case.head_dim))
    floor = unit * largest(inputs[0].float().norm(dim=-1)) * largest(k.float().norm(dim=-1))
    assert_as_exact_as_torch("out", out, torch_out, exact, dtype, floor * largest(v))
    seen = visible_keys(case.seqlen_q, case.seqlen_k, case.causal, case.window, GPU).any(dim=1)
    assert not out[:, ~seen].any() and (softmax_lse[:, :, ~seen] == float("inf")).all()
    lses = (lse[:, :, seen] for lse in (softmax_lse, torch_lse, exact_lse))
    assert_as_exact_as_torch("softmax_lse", *lses, torch.float32, floor)


@in_gpu_dtypes
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("head_dims", "tile"), SM90_TILES, ids=str)
def test_lengths_around_the_tiles(
    head_dims: tuple[int, int], tile: tuple[int, int], window: tuple[int, int], dtype: torch.dtype
) -> None:
    """Each pair of lengths, with more tiles than there are SMs in one of them."""
    lengths_q, lengths_k = sm90_lengths(tile)
    for seqlen_q, seqlen_k in itertools.product(lengths_q, lengths_k):
        case = Case(
            "around",
            batch=3,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            heads=24 if seqlen_q == 3 * tile[0] + 17 else 6,
            heads_k=2,
            head_dim=head_dims[0],
            head_dim_v=head_dims[1],
            window=window,
        )
        check_forward(case, dtype)


@in_gpu_dtypes
@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize("head_dims", dict(SM90_TILES), ids=str)
def test_maxima_that_grow(head_dims: tuple[int, int], causal: bool, dtype: torch.dtype) -> None:
    """By far more than what is let pass without rescaling; long enough for the rows of 192."""
    shape = {"head_dim": head_dims[0], "head_dim_v": head_dims[1]}
    case = Case("grow", seqlen_q=2100, seqlen_k=2300, heads=4, heads_k=4, causal=causal, **shape)
    check_forward(case, dtype, q_gain=6.0)


@in_gpu_dtypes
@pytest.mark.parametrize(
    "head_dims", [(8, 8), (40, 72), (80, 80), (104, 112), (136, 128), (200, 8)]
)
def test_head_dims_between_those_of_the_kernels(
    head_dims: tuple[int, int], dtype: torch.dtype
) -> None:
    """Filled up by the copy engine; what lies behind a row is NaN and must not be read."""
    case = Case(
        "padded",
        seqlen_q=300,
        seqlen_k=500,
        heads=4,
        heads_k=2,
        head_dim=head_dims[0],
        head_dim_v=head_dims[1],
        causal=True,
        layout="wide",
    )
    check_forward(case, dtype)


@pytest.mark.parametrize("layout", ["bhsd", "sbhd", "interleaved", "wide"])
def test_strides_are_served_as_they_are(layout: str) -> None:
    case = Case(
        "strided", seqlen_q=200, seqlen_k=333, heads=4, heads_k=4, head_dim=128, causal=True
    )
    values = [tensor.detach() for tensor in make_inputs(case, torch.bfloat16, GPU)]
    expected = forward(case, tuple(values))
    got = forward(case, tuple(lay_out(tensor, layout) for tensor in values))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    with ops.newest_kernel_family(80):
        older = forward(case, tuple(values))
    assert not torch.equal(older[1], expected[1]), "the sm80 family served the call all the same"


@pytest.mark.parametrize("layout", ["shifted", "expanded"])
def test_what_the_copy_engine_cannot_address_goes_to_the_older_family(layout: str) -> None:
    """Rows at odd places are copied, broadcast ones read by the older family: equal results."""
    case = Case("odd", seqlen_q=200, seqlen_k=333, heads=4, heads_k=4, head_dim=64, layout=layout)
    inputs = tuple(tensor.detach() for tensor in make_inputs(case, torch.bfloat16, GPU))
    out, softmax_lse = forward(case, inputs)
    with ops.newest_kernel_family(80):
        older_out, older_lse = forward(case, inputs)
    torch.testing.assert_close(out, older_out, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(softmax_lse, older_lse, rtol=1e-6, atol=1e-6)


@in_gpu_dtypes
@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
@pytest.mark.parametrize(("head_dims", "tile"), SM90_TILES, ids=str)
def test_200_reruns_are_bit_equal(
    head_dims: tuple[int, int], tile: tuple[int, int], causal: bool, dtype: torch.dtype
) -> None:
    """Tiles are drawn in another order every time."""
    seqlen = 3000 if tile[0] == 192 else 250 if head_dims[0] < 128 else 1100
    shape = {"head_dim": head_dims[0], "head_dim_v": head_dims[1], "heads": 12, "heads_k": 4}
    case = Case("rerun", seqlen_q=seqlen, seqlen_k=seqlen + 9, causal=causal, **shape)
    inputs = tuple(tensor.detach() for tensor in make_inputs(case, dtype, GPU))
    first_out, first_lse = forward(case, inputs)
    assert first_out.isfinite().all()
    differing = torch.zeros((), dtype=torch.int64, device=GPU)
    for _ in range(200):
        out, softmax_lse = forward(case, inputs)
        differing += (out != first_out).sum() + (softmax_lse != first_lse).sum()
    assert differing.item() == 0


CAUSAL = Case(
    "causal", seqlen_q=1500, seqlen_k=1500, heads=16, heads_k=16, head_dim=128, causal=True
)


def test_a_graph_may_be_replayed_beside_calls_and_other_graphs() -> None:
    """Each captured launch draws its tiles from a counter of its own."""
    inputs = tuple(tensor.detach() for tensor in make_inputs(CAUSAL, torch.bfloat16, GPU))
    expected, _ = forward(CAUSAL, inputs)
    capture = torch.cuda.Stream()
    graphs = [torch.cuda.CUDAGraph() for _ in range(3)]
    outs = []
    for graph in graphs:
        with torch.cuda.graph(graph, stream=capture):
            outs.append(forward(CAUSAL, inputs)[0])
    streams = [capture, torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        for out in outs:
            out.fill_(float("nan"))
        torch.cuda.synchronize()
        for stream, graph in zip(streams[1:], graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(capture):
            beside = forward(CAUSAL, inputs)[0]
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for out in (*outs, beside))


def test_streams_without_a_counter_get_their_tiles_dealt_out() -> None:
    """cudaStreamPerThread is one handle for many streams; the same holds past 1024 streams."""
    inputs = tuple(tensor.detach() for tensor in make_inputs(CAUSAL, torch.bfloat16, GPU))
    expected, _ = forward(CAUSAL, inputs)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.ExternalStream(2)):
        got = [forward(CAUSAL, inputs)[0] for _ in range(3)]
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in got)
