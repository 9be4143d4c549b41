"""One problem on several processes beside the same problem on one; fails if they differ.

torchrun --standalone --nproc-per-node 2 tests/run_distributed.py {cpu|cuda} SCENARIO ...

On "cuda" every process has a GPU of its own. Scenarios are the names in SCENARIOS.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

import flash_attn.sharding  # noqa: F401
from flash_attn import flash_attn_func, flash_attn_varlen_func

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16


def random(*sizes: int) -> Tensor:
    """The same on every rank."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(DEVICE, DTYPE)


def assert_close(name: str, got: Tensor, expected: Tensor) -> None:
    got = got.full_tensor() if isinstance(got, DTensor) else got
    largest = expected.float().abs().max().item()
    rtol = 1e-5 if DTYPE == torch.float32 else 2e-2
    torch.testing.assert_close(
        got.float(), expected.float(), rtol=0.0, atol=rtol * largest, msg=lambda m: f"{name}: {m}"
    )


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    loss.backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def check_sharded(
    mesh: Any, placements: tuple[Placement, ...], expected: tuple[Placement, ...], heads_k: int
) -> None:
    """q, k, v with a sink and ALiBi: out, softmax_lse and all gradients."""
    heads = 2 * heads_k
    values = [random(3, 20, heads, 16), random(3, 33, heads_k, 16), random(3, 33, heads_k, 24)]
    slopes = random(3, heads).float().abs()

    def run(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
        options = dict(causal=True, alibi_slopes=slopes, deterministic=True)
        out, lse = flash_attn_func(q, k, v, sink=sink, return_softmax_lse=True, **options)
        return out, lse

    sinks = [random(heads).float().requires_grad_() for _ in range(2)]
    leaves = [value.clone().requires_grad_() for value in values]
    parts = [distribute_tensor(v, mesh, placements).requires_grad_() for v in values]
    whole, shared = run(*leaves, sinks[0]), run(*parts, sinks[1])
    assert shared[0].placements == expected, (shared[0].placements, expected)
    for name, one, other in zip(("out", "softmax_lse"), shared, whole, strict=True):
        assert one.shape == other.shape and one.stride() == other.stride()
        assert_close(name, one, other)
    weight = random(3, 20, heads, 24)
    whole_loss = (whole[0] * weight).sum() + whole[1].sum()
    spread = distribute_tensor(weight, mesh, expected)
    shared_loss = (shared[0] * spread).sum() + shared[1].sum()
    got = gradients(shared_loss, [*parts, sinks[1]])
    for name, one, other in zip(
        ("dq", "dk", "dv", "dsink"), got, gradients(whole_loss, [*leaves, sinks[0]]), strict=True
    ):
        assert_close(name, one, other)


def check_refused(mesh: Any, **option: Any) -> None:
    q = distribute_tensor(random(2, 20, 4, 16), mesh, (Shard(0),))
    (name,) = option
    try:
        flash_attn_func(q, q, q, **option)
    except NotImplementedError as error:
        assert str(error).startswith(f"{name}: expected"), error
        return
    raise AssertionError(f"{name}: expected NotImplementedError with DTensors")


def sharded() -> None:
    ranks = dist.get_world_size()
    mesh = init_device_mesh(DEVICE, (ranks,))
    whole = (Replicate(),)
    for heads_k in (2 * ranks, ranks + 1):  # the second can't be divided among the ranks
        for placement in (Replicate(), Shard(0), Shard(1), Shard(2)):
            stays = placement == Shard(0) or (placement == Shard(2) and heads_k % ranks == 0)
            check_sharded(mesh, (placement,), (placement,) if stays else whole, heads_k)
    grid = init_device_mesh(DEVICE, (1, ranks))
    check_sharded(grid, (Shard(0), Shard(2)), (Shard(0), Shard(2)), 2 * ranks)
    check_refused(mesh, bias=random(20, 20))
    check_refused(mesh, return_max_logits=True)
    check_refused(mesh, dropout_p=0.5)


def packed_heads() -> None:
    """Packed sequences, split by heads; their borders are plain tensors."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    borders = torch.tensor([0, 7, 30, 50], dtype=torch.int32, device=DEVICE)
    values = [random(50, 4, 16), random(50, 2, 16), random(50, 2, 16)]
    leaves = [value.clone().requires_grad_() for value in values]
    parts = [distribute_tensor(v, mesh, [Shard(1)]).requires_grad_() for v in values]
    given = (borders, borders, 23, 23)
    out = flash_attn_varlen_func(*leaves, *given, causal=True)
    shared = flash_attn_varlen_func(*parts, *given, causal=True)
    assert shared.placements == (Shard(1),)
    assert_close("out", shared, out)
    got, expected = gradients(shared.sum(), parts), gradients(out.sum(), leaves)
    for name, one, other in zip(("dq", "dk", "dv"), got, expected, strict=True):
        assert_close(name, one, other)


class Layer(nn.Module):
    """Attention with its projections, batch first."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (linear(x).view(shape) for linear in (self.q, self.k, self.v))
        attention = flash_attn_func(q, k, v, causal=True, deterministic=True)
        return x + self.out(attention.flatten(2))


def make_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(Layer(), Layer()).to(DEVICE, DTYPE)


def compare_models(model: nn.Module, parallel: nn.Module, x: Tensor, part: Tensor) -> None:
    """One training step of both: gradients of the mean loss."""
    model(x).float().square().mean().backward()
    parallel(part).float().square().mean().backward()
    expected = dict(model.named_parameters())
    for name, parameter in parallel.named_parameters():
        assert_close(name, parameter.grad, expected[name].grad)


def fsdp() -> None:
    """Parameters sharded by FSDP2, a batch entry a rank."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    parallel = make_model()
    mesh = init_device_mesh(DEVICE, (ranks,))
    for layer in parallel:
        fully_shard(layer, mesh=mesh)
    fully_shard(parallel, mesh=mesh)
    x = random(ranks, 40, 64)
    compare_models(make_model(), parallel, x, x[rank : rank + 1])


def tensor_parallel() -> None:
    """Heads over the ranks, by torch's plan for linear layers: attention sees local tensors, or
    DTensors, compiled or not."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    x = random(2, 40, 64)
    for is_local in (True, False):
        for is_compiled in (False, True):
            parallel = make_model()
            for layer in parallel:
                into = [ColwiseParallel(use_local_output=is_local) for _ in range(3)]
                plan = dict(zip("qkv", into, strict=True))
                parallelize_module(layer, mesh, {**plan, "out": RowwiseParallel()})
            torch._dynamo.reset()
            run = torch.compile(parallel, backend="aot_eager") if is_compiled else parallel
            model = make_model()
            model(x).float().square().mean().backward()
            run(x).float().square().mean().backward()
            expected = dict(model.named_parameters())
            for name, parameter in parallel.named_parameters():
                assert_close(name, parameter.grad, expected[name].grad)


def flash_op(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    """What scaled_dot_product_attention selects on a GPU, of CPU tensors too."""
    result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)
    return result[0]


def context_parallel() -> None:
    """torch's context parallelism: sequences over the ranks, attention of the whole. Causal, for
    that is what torch balances by default."""
    from torch.distributed.tensor import experimental
    from torch.distributed.tensor.experimental import _attention

    activate_flash_attention_impl("flash_attn")
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    if DEVICE == "cpu":
        flash_op.__name__ = "scaled_dot_product_attention"  # by its name torch replaces it
        F.scaled_dot_product_attention = flash_op
    buffers = [random(2, 4, 256, 32 + i)[..., :32].contiguous() for i in range(3)]
    leaves = [buffer.clone().requires_grad_() for buffer in buffers]
    out = flash_op(*leaves, is_causal=True)
    expected = [out, *gradients(out.square().sum(), leaves)]
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        experimental.context_parallel(
            mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2], no_restore_buffers={*buffers}
        ),
    ):
        parts = [buffer.detach().requires_grad_() for buffer in buffers]
        shared = F.scaled_dot_product_attention(*parts, is_causal=True)
        assert shared.size(2) == 256 // dist.get_world_size()
        got = [shared, *gradients(shared.square().sum(), parts)]
        got = _attention.context_parallel_unshard(mesh, got, [2] * 4)
    for name, one, other in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert_close(name, one, other)


SCENARIOS: dict[str, Callable[[], None]] = {
    scenario.__name__: scenario
    for scenario in (sharded, packed_heads, fsdp, tensor_parallel, context_parallel)
}


def main(names: list[str]) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if DEVICE == "cpu" else "nccl")
    try:
        for name in names:
            SCENARIOS[name]()
            if dist.get_rank() == 0:
                print(f"{name}: {dist.get_world_size()} processes on {DEVICE} agree with one")
        dist.barrier()  # no process leaves while another still talks to it
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[2:])
