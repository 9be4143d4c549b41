"""How calls behave on a GPU: streams, devices, graphs, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import pytest
import torch
from backends import GPU
from cases import Case, make_gradients, make_inputs
from compare import Results, assert_bit_equal, check_case, gradients
from torch import Tensor

from flash_attn import flash_attn_func

pytestmark = pytest.mark.gpu

GQA = Case(
    "gqa", heads=8, heads_k=2, seqlen_q=300, seqlen_k=333, head_dim=128, causal=True, scale=0.11
)
PADDED = Case("padded", seqlen_q=130, seqlen_k=70, head_dim=20, window=(40, 10))
MISALIGNED = Case("misaligned", seqlen_q=70, seqlen_k=130, layout="shifted")
SLEEP_CYCLES = 400_000_000  # more than 0.2 s at the clocks of today's GPUs


class Problem:
    """Tensors of a case and its results, which are the same bits in every run."""

    def __init__(self, case: Case, device: str = GPU) -> None:
        self.case = case
        self.inputs = make_inputs(case, torch.bfloat16, device)
        self.dout, self.dlse = make_gradients(case, torch.bfloat16, device)

    def forward(self) -> tuple[Tensor, Tensor]:
        out, softmax_lse, _ = flash_attn_func(
            *self.inputs, deterministic=True, return_attn_probs=True, **self.case.options
        )
        return out, softmax_lse

    def backward(self, out: Tensor, softmax_lse: Tensor) -> Results:
        grads = gradients(out, softmax_lse, self.inputs, self.dout, self.dlse)
        return Results(out, softmax_lse, *grads)

    def run(self) -> Results:
        return self.backward(*self.forward())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.inputs, self.dout, self.dlse)

    @torch.no_grad()
    def set_values(self, values: Iterable[Tensor]) -> None:
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def random_values(self) -> list[Tensor]:
        return [torch.randn_like(tensor) for tensor in self.tensors]


def wait_for(streams: Iterable[torch.cuda.Stream], seconds: float = 60.0) -> None:
    """Waits for the streams, and fails where blocks that wait for each other would hang."""
    deadline = time.monotonic() + seconds
    while not all(stream.query() for stream in streams):
        assert time.monotonic() < deadline, f"the GPU did not finish within {seconds} s"
        time.sleep(0.001)


def warmed_up(problem: Problem, stream: torch.cuda.Stream) -> Results:
    """The problem's results. Leaves kernels loaded and the stream with memory for another run:
    loading and cudaMalloc may wait for the GPU."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        results = problem.run()
        problem.run()
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize("case", [GQA, PADDED, MISALIGNED], ids=str)
def test_work_is_queued_on_the_current_stream(case: Case) -> None:
    """Inputs that the stream has yet to write are read after that, and no call waits for it."""
    problem = Problem(case)
    side = torch.cuda.Stream()
    values = problem.random_values()
    problem.set_values(values)
    expected = warmed_up(problem, side)
    *input_values, dout, dlse = values
    zeros = [torch.zeros_like(value) for value in values]
    problem.set_values(zeros)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES)
        problem.set_values([*input_values, *zeros[3:]])
        out, softmax_lse = problem.forward()
        torch.cuda._sleep(SLEEP_CYCLES)
        problem.dout.copy_(dout)
        problem.dlse.copy_(dlse)
        got = problem.backward(out, softmax_lse)
        assert not side.query(), "a call waited for the GPU"
    wait_for([side])
    assert_bit_equal(got, expected)


def test_a_side_stream_does_not_wait_for_the_default_stream() -> None:
    problem = Problem(GQA)
    side = torch.cuda.Stream()
    expected = warmed_up(problem, side)
    torch.cuda._sleep(SLEEP_CYCLES)
    with torch.cuda.stream(side):
        got = problem.run()
    wait_for([side])
    assert not torch.cuda.default_stream().query(), "work was queued behind the default stream"
    torch.cuda.synchronize()
    assert_bit_equal(got, expected)


@pytest.mark.parametrize("heads", [4, 32], ids=["small_grids", "grids_that_fill_the_gpu"])
def test_streams_at_once_do_not_disturb_each_other(heads: int) -> None:
    """Key tiles that take turns at dq share the GPU with those of another call."""
    problems = [
        Problem(Case("a", batch=1, heads=heads, seqlen_q=2048, seqlen_k=2048, causal=True)),
        Problem(Case("b", batch=1, heads=heads, seqlen_q=1500, seqlen_k=2500, head_dim=128)),
    ]
    expected = [problem.run() for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    got: list[tuple[int, Results]] = []
    for _ in range(10):
        for number, (stream, problem) in enumerate(zip(streams, problems, strict=True)):
            with torch.cuda.stream(stream):
                got.append((number, problem.run()))
    wait_for(streams)
    for number, results in got:
        assert_bit_equal(results, expected[number])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_tensors_on_another_device_than_the_current() -> None:
    with torch.cuda.device(0):
        check_case(GQA, torch.bfloat16, "cuda:1")
        check_case(PADDED, torch.bfloat16, "cuda:1")
        assert torch.cuda.current_device() == 0
        q, k, v = make_inputs(GQA, torch.bfloat16, "cuda:0")
        with pytest.raises(ValueError, match=r"k: expected the device of q \(cuda:0\), got cuda:1"):
            flash_attn_func(q, k.to("cuda:1"), v.to("cuda:1"))


@pytest.mark.parametrize("case", [GQA, PADDED, MISALIGNED], ids=str)
def test_a_graph_replays_forward_and_backward(case: Case) -> None:
    """Nothing of a call is left to the host: a replay with other values equals a call with them."""
    problem = Problem(case)
    warmed_up(problem, torch.cuda.Stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = problem.run()
    for _ in range(3):
        problem.set_values(problem.random_values())
        expected = problem.run()
        for result in replayed:
            result.detach().fill_(float("nan"))
        graph.replay()
        assert_bit_equal(replayed, expected)


def peak_growth(call: Callable[[], object]) -> tuple[int, object]:
    """Bytes that the peak of allocated memory grows by during a call, and the call's result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("seqlen", [8192, 16384])
def test_memory_is_outputs_and_one_fp32_dq(seqlen: int, deterministic: bool) -> None:
    """Linear in the sequence length; a score matrix would be 1 GiB at the shorter length."""
    slack = 8 << 20  # the allocator may give each tensor up to 1 MiB too much
    case = Case("long", batch=1, seqlen_q=seqlen, seqlen_k=seqlen, heads=8, heads_k=8, head_dim=128)
    inputs = make_inputs(case, torch.bfloat16, GPU)
    dout, dlse = make_gradients(case, torch.bfloat16, GPU)

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        return flash_attn_func(*inputs, deterministic=deterministic, return_attn_probs=True)

    forward_bytes, (out, lse, _) = peak_growth(forward)
    assert forward_bytes <= out.nbytes + lse.nbytes + slack
    backward_bytes, grads = peak_growth(lambda: gradients(out, lse, inputs, dout, dlse))
    rows = 8 * seqlen
    dq_sums, softmax_d = 4 * rows * 128, 4 * rows
    least = sum(gradient.nbytes for gradient in grads)
    assert backward_bytes <= least + dq_sums + softmax_d + slack
