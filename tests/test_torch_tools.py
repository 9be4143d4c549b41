"""torch's tools on models that call us: export, selective checkpointing, flop counts, pickling,
autocast, types."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import on_devices, usual_dtype
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from flash_attn import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    ops,
)
from flash_attn.modules.mha import MHA, FlashSelfAttention


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).view(*x.shape[:2], 3, 4, 8)
        return self.out(flash_attn_qkvpacked_func(qkv, causal=True, window_size=(7, 0)).flatten(2))


@on_devices
def test_export(device: str) -> None:
    """A program with a length that varies, saved and loaded; our op is one node of it."""
    model = Model().to(device, usual_dtype(device))
    x = torch.randn(2, 20, 32, device=device, dtype=usual_dtype(device))
    seqlen = torch.export.Dim("seqlen", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: seqlen},))
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(ops.forward) == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (20, 33):
        x = torch.randn(2, rows, 32, device=device, dtype=usual_dtype(device))
        torch.testing.assert_close(loaded(x), model(x))


@on_devices
def test_export_for_training_decomposes_into_our_ops(device: str) -> None:
    model = Model().to(device, usual_dtype(device))
    x = torch.randn(2, 20, 32, device=device, dtype=usual_dtype(device))
    program = torch.export.export(model, (x,)).run_decompositions()
    torch.testing.assert_close(program.module()(x), model(x))


@on_devices
@pytest.mark.parametrize("is_compiled", [False, True])
def test_selective_checkpointing_by_op(is_compiled: bool, device: str) -> None:
    """Saved: attention runs once. Not saved: again in the backward. The gradients are the same."""
    inputs = [
        torch.randn(2, 30, 4, 16, device=device, dtype=usual_dtype(device), requires_grad=True)
        for _ in range(3)
    ]

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q.sin(), k.sin(), v.sin(), causal=True, deterministic=True).tanh()

    expected = torch.autograd.grad(layer(*inputs).sum(), inputs)
    for saved, runs in (([torch.ops.flash_attn.forward.default], 1), ([], 2)):
        contexts = partial(create_selective_checkpoint_contexts, saved)

        def checkpointed(*tensors: Tensor, contexts: Any = contexts) -> Tensor:
            return checkpoint(layer, *tensors, use_reentrant=False, context_fn=contexts)

        torch._dynamo.reset()
        run = torch.compile(checkpointed, backend="aot_eager") if is_compiled else checkpointed
        with FlopCounterMode(display=False) as counter:
            gradients = torch.autograd.grad(run(*inputs).sum(), inputs)
        flops = counter.get_flop_counts()["Global"]
        one_run = 4 * 2 * 4 * 30 * 30 * 16
        assert flops[torch.ops.flash_attn.forward] == runs * one_run
        assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("make", [Model, partial(MHA, 32, 4), FlashSelfAttention])
def test_modules_are_pickled_and_copied(make: Any) -> None:
    torch.manual_seed(0)
    module = make()
    x = torch.randn(2, 9, 32)
    if isinstance(module, FlashSelfAttention):
        x = torch.randn(2, 9, 3, 4, 8)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert torch.equal(other(x), module(x))
    assert pickle.loads(pickle.dumps(flash_attn_func)) is flash_attn_func


def test_flops_of_grouped_heads_are_those_of_all_query_heads() -> None:
    """As torch counts its attention: nothing less for a mask."""
    q = torch.randn(2, 40, 6, 16, requires_grad=True)
    k, v = (torch.randn(2, 56, 2, cols, requires_grad=True) for cols in (16, 32))
    pairs = 2 * 6 * 40 * 56
    for options in ({}, {"causal": True}, {"window_size": (3, 3)}):
        with FlopCounterMode(display=False) as counter:
            out = flash_attn_func(q, k, v, **options)
        assert counter.get_total_flops() == 2 * pairs * (16 + 32)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * pairs * (3 * 16 + 2 * 32)


def test_flops_are_those_that_torch_counts_for_sdpa() -> None:
    q, k, v = (torch.randn(2, 64, 4, 32, requires_grad=True) for _ in range(3))
    aten, sizes = torch.ops.aten, [(2, 4, 64, 32)] * 3
    with FlopCounterMode(display=False) as counter:
        flash_attn_func(q, k, v, causal=True).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    formulas = torch.utils.flop_counter.flop_registry
    forward = formulas[aten._scaled_dot_product_flash_attention]
    backward = formulas[aten._scaled_dot_product_flash_attention_backward]
    meta = [torch.empty(size, device="meta") for size in sizes]
    assert counts[torch.ops.flash_attn.forward] == forward(*meta, out_val=None)
    assert counts[torch.ops.flash_attn.backward] == backward(meta[0], *meta, out_val=None)


def test_flops_of_packed_sequences() -> None:
    """Of each sequence; the functions below autograd count the same."""
    borders = torch.tensor([0, 10, 10, 35], dtype=torch.int32)
    q, k, v = (torch.randn(35, 4, 16, requires_grad=True) for _ in range(3))
    pairs = 4 * (10 * 10 + 25 * 25)
    given = (q, k, v, borders, borders, 25, 25)
    with FlopCounterMode(display=False) as counter:
        flash_attn_varlen_func(*given).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * pairs * 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        out, lse, _, _ = torch.ops.flash_attn._flash_attn_varlen_forward(*given, 0.0, 0.25, False)
        grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
        tail = (0.0, 0.25, False, -1, -1, 0.0, None, False)
        torch.ops.flash_attn._flash_attn_varlen_backward(
            out, q, k, v, out, lse, *grads, *given[3:], *tail
        )
    assert counter.get_total_flops() == (4 + 10) * pairs * 16


def test_flops_of_the_functions_below_autograd() -> None:
    q, k, v = (torch.randn(2, 20, 4, 16) for _ in range(3))
    window = (False, -1, -1, 0.0, None)
    with FlopCounterMode(display=False) as counter:
        out, lse, _, _ = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, 0.0, 0.25, *window, False
        )
        grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
        torch.ops.flash_attn._flash_attn_backward(
            out, q, k, v, out, lse, *grads, 0.0, 0.25, *window, False
        )
    assert counter.get_total_flops() == (4 + 10) * 2 * 4 * 20 * 20 * 16


@on_devices
def test_autocast_of_packed_sequences(device: str) -> None:
    kind: Any = dict(device=device, requires_grad=True)
    q, k, v = (torch.randn(30, 2, 16, **kind) for _ in range(3))
    borders = torch.tensor([0, 11, 30], dtype=torch.int32, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = flash_attn_varlen_func(q, k, v, borders, borders, 19, 19)
    low = flash_attn_varlen_func(*(t.bfloat16() for t in (q, k, v)), borders, borders, 19, 19)
    assert out.dtype == torch.bfloat16 and torch.equal(out, low)
    assert torch.autograd.grad(out.sum(), q)[0].dtype == torch.float32


@on_devices
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "shifted"])
def test_forward_into_writes_where_it_is_told(layout: str, device: str) -> None:
    """Every element of the given tensor, and nothing beside it."""
    q, k, v = (torch.randn(2, 40, 4, 32, device=device, dtype=usual_dtype(device)) for _ in "qkv")
    room = q.new_full((2, 4, 40, 40) if layout == "bhsd" else (2, 40, 4, 40), float("nan"))
    view = room.transpose(1, 2) if layout == "bhsd" else room
    start = 3 if layout == "shifted" else 0
    lse = ops.forward_into(q, k, v, view[..., start : start + 32], 0.2, -1, 0)
    out, expected_lse = ops.forward(q, k, v, 0.2, -1, 0)
    assert torch.equal(view[..., start : start + 32], out) and torch.equal(lse, expected_lse)
    assert view[..., :start].isnan().all() and view[..., start + 32 :].isnan().all()
    torch.library.opcheck(ops.forward_into, (q, k, v, torch.zeros_like(q), 0.2, -1, 0))


WRONG_OUTPUTS = {
    "sizes": (torch.empty(2, 40, 4, 16), "out: expected sizes"),
    "dtype": (torch.empty(2, 40, 4, 32).half(), "out: expected the dtype of q"),
    "expanded": (
        torch.empty(1, 40, 4, 32).expand(2, -1, -1, -1),
        "out: expected a tensor to write",
    ),
    "columns": (torch.empty(2, 40, 32, 4).transpose(2, 3), "out: expected a contiguous last"),
}


@pytest.mark.parametrize("name", WRONG_OUTPUTS)
def test_forward_into_refuses_wrong_outputs(name: str) -> None:
    q, k, v = (torch.randn(2, 40, 4, 32) for _ in "qkv")
    out, message = WRONG_OUTPUTS[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.forward_into(q, k, v, out, 0.2, -1, 0)


def test_a_typed_program_passes_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    root = Path(flash_attn_interface.__file__).parent
    assert (root / "py.typed").exists()
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "from flash_attn import flash_attn_func, flash_attn_with_kvcache\n"
        "from flash_attn.modules.mha import MHA\n\n"
        "def attend(q: torch.Tensor) -> torch.Tensor:\n"
        "    out = flash_attn_func(q, q, q, causal=True, window_size=(3, 0))\n"
        "    assert isinstance(out, torch.Tensor)\n"
        "    module = MHA(64, 4)\n"
        "    return out + flash_attn_func(q, q, q, 0.0, wrong=1)\n"
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root.parent)
    errors = [line for line in done.stdout.splitlines() if "program.py" in line and "error" in line]
    assert errors and all(":9:" in line for line in errors), done.stdout
    assert any("wrong" in line for line in errors)
