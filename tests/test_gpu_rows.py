"""Kernels that this GPU does not prefer: those of GPUs with less shared memory, run here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).resolve().parent


@pytest.mark.parametrize("kib", [99, 163], ids=["sm86", "sm80"])
def test_rows_of_smaller_gpus(kib: int) -> None:
    """The cases by head dim and by length run again in a process that is granted less."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-k", "head_dim or gqa or tile", str(TESTS / "test_forward_backward.py")]
    environment = os.environ | {"FLASH_ATTN_SMEM_BYTES": str(kib * 1024)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None and int(passed[1]) >= 40, run.stdout


def test_a_limit_that_is_no_number_is_refused() -> None:
    program = (
        "import torch, flash_attn\n"
        "q = torch.zeros(1, 8, 1, 64, device='cuda', dtype=torch.float16)\n"
        "flash_attn.flash_attn_func(q, q, q)\n"
    )
    environment = os.environ | {"FLASH_ATTN_SMEM_BYTES": "many"}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert 'FLASH_ATTN_SMEM_BYTES: expected a number of bytes, got "many"' in run.stderr
