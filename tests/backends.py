"""The devices and dtypes that a test runs on, as parameters: the same test for every backend."""

from __future__ import annotations

import pytest
import torch

from flash_attn import ops

GPU = "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SM90_DTYPES = (torch.bfloat16, torch.float16)

# What an exception of C++ arrives as: ValueError under torch 2.10, RuntimeError under 2.15.
CPP_ERROR = (ValueError, RuntimeError)


def _name(device: str, dtype: torch.dtype) -> str:
    return f"{device}-{str(dtype).removeprefix('torch.')}"


def usual_dtype(device: str) -> torch.dtype:
    """For tests in which the dtype is no matter."""
    return torch.float32 if device == "cpu" else torch.bfloat16


on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param(GPU, marks=pytest.mark.gpu)])

on_backends = pytest.mark.parametrize(
    ("device", "dtype"),
    [pytest.param("cpu", dtype, id=_name("cpu", dtype)) for dtype in DTYPES]
    + [pytest.param(GPU, dtype, id=_name(GPU, dtype), marks=pytest.mark.gpu) for dtype in DTYPES],
)

in_gpu_dtypes = pytest.mark.parametrize("dtype", SM90_DTYPES, ids=str)


def has_sm90(pass_name: str) -> bool:
    """True if the forward ("fwd") or backward ("bwd") has kernels for this GPU, a Hopper one."""
    if ops.load_error is not None or not torch.cuda.is_available():
        return False
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    return on_hopper and any(
        row.startswith(f"{pass_name}/sm90/") for row in ops.build_info()["rows"]
    )
