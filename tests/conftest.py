"""Shared set-up. GPU tests (marker `gpu`) are collected only where they can run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flash_attn import ops


def why_no_gpu() -> str | None:
    """Why GPU tests can't run here; None if they can."""
    if ops.load_error is not None:
        return f"flash_attn._C is not loaded: {ops.load_error}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not ops.cuda_archs:
        return "flash_attn is built without CUDA backends"
    return None


def pytest_report_header() -> str:
    build = "not loaded" if ops.load_error else ops.build_info()
    return f"flash_attn: {build}; torch {torch.__version__}; GPU tests: {why_no_gpu() or 'yes'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if why_no_gpu() is None:
        return
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        config.hook.pytest_deselected(items=gpu_items)
        items[:] = [item for item in items if item not in gpu_items]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
