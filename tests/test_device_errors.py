"""Wrong calls that only CUDA tensors can make. Python's checks are also run on fake tensors, which
need no GPU."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backends import CPP_ERROR
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    ops,
)

Q, K = (2, 5, 4, 16), (2, 7, 2, 16)
BF16 = torch.bfloat16


def on_gpu(*sizes: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.ones(sizes, dtype=dtype, device="cuda:0")


def on_cpu(*sizes: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.ones(sizes, dtype=dtype)


FP64 = "expected dtype torch.float32, torch.bfloat16 or torch.float16, got torch.float64"

BAD_CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "fp64": (
        lambda: flash_attn_func(*(on_gpu(*sizes, dtype=torch.float64) for sizes in (Q, K, K))),
        f"q: {FP64}",
    ),
    "fp64_qkv": (
        lambda: flash_attn_qkvpacked_func(on_gpu(2, 5, 3, 2, 16, dtype=torch.float64)),
        f"qkv: {FP64}",
    ),
    "k_on_cpu": (
        lambda: flash_attn_func(on_gpu(*Q), on_cpu(*K), on_gpu(*K)),
        "k: expected the device of q (cuda:0), got cpu",
    ),
    "v_on_cpu": (
        lambda: flash_attn_func(on_gpu(*Q), on_gpu(*K), on_cpu(*K)),
        "v: expected the device of q (cuda:0), got cpu",
    ),
    "q_on_cpu": (
        lambda: flash_attn_func(on_cpu(*Q), on_gpu(*K), on_gpu(*K)),
        "k: expected the device of q (cpu), got cuda:0",
    ),
    "kv_on_cpu": (
        lambda: flash_attn_kvpacked_func(on_gpu(*Q), on_cpu(2, 7, 2, 2, 16)),
        "kv: expected the device of q (cuda:0), got cpu",
    ),
}


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.gpu)])
def _tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    with FakeTensorMode() if request.param == "fake" else contextlib.nullcontext():
        yield


@pytest.mark.usefixtures("_tensors")
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(name: str) -> None:
    call, text = BAD_CALLS[name]
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        call()


def op_tensors(head_dim: int = 16, dtype: torch.dtype = BF16) -> dict[str, Any]:
    """Arguments of the backward op, on the GPU; those from q to v are the forward's too."""
    q, k = (on_gpu(*sizes[:3], head_dim, dtype=dtype) for sizes in (Q, K))
    return {
        "dout": torch.ones_like(q),
        "q": q,
        "k": k,
        "v": torch.ones_like(k),
        "out": torch.ones_like(q),
        "softmax_lse": torch.ones(2, 4, 5, device=q.device),
        "dlse": torch.ones(2, 4, 5, device=q.device),
        "dq": torch.empty_like(q),
        "dk": torch.empty_like(k),
        "dv": torch.empty_like(k),
    }


def run_ops(tensors: dict[str, Any]) -> None:
    ops.forward(tensors["q"], tensors["k"], tensors["v"], 0.25, -1, -1)
    ops.backward(*tensors.values(), 0.25, -1, -1, False)


def with_one_on_cpu(name: str) -> dict[str, Any]:
    tensors = op_tensors()
    return tensors | {name: tensors[name].cpu()}


BAD_OPS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "fp64": (
        lambda: op_tensors(dtype=torch.float64),
        "q: expected dtype Half, BFloat16 or Float, got Double",
    ),
    "head_dim": (
        lambda: op_tensors(head_dim=20),
        "q: expected a head_dim that is a multiple of 8 on CUDA, got 20",
    ),
    "k_on_cpu": (lambda: with_one_on_cpu("k"), "k: expected the device of q"),
    "v_on_cpu": (lambda: with_one_on_cpu("v"), "v: expected the device of k"),
    "dout_on_cpu": (lambda: with_one_on_cpu("dout"), "dout: expected the device of q"),
    "out_on_cpu": (lambda: with_one_on_cpu("out"), "out: expected the device of q"),
    "lse_on_cpu": (lambda: with_one_on_cpu("softmax_lse"), "softmax_lse: expected the device of q"),
    "dlse_on_cpu": (lambda: with_one_on_cpu("dlse"), "dlse: expected the device of q"),
    "dq_on_cpu": (lambda: with_one_on_cpu("dq"), "dq: expected the device of q"),
    "dk_on_cpu": (lambda: with_one_on_cpu("dk"), "dk: expected the device of k"),
    "dv_on_cpu": (lambda: with_one_on_cpu("dv"), "dv: expected the device of v"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", BAD_OPS)
def test_ops_check_what_they_get_and_work_afterwards(name: str) -> None:
    make, text = BAD_OPS[name]
    with pytest.raises(CPP_ERROR, match=f"^{re.escape('flash_attn: ' + text)}$"):
        run_ops(make())
    run_ops(op_tensors())
    torch.cuda.synchronize()


def test_devices_without_a_backend() -> None:
    with FakeTensorMode():
        q = torch.ones(Q, device="xpu")
        with pytest.raises(ValueError, match="^q: expected a CPU or CUDA tensor, got device xpu"):
            flash_attn_func(q, q, q)
