"""Two processes beside one: gloo on CPU, NCCL on GPUs. `run_distributed.py` has what they do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import GPU

SCRIPT = Path(__file__).resolve().parent / "run_distributed.py"
SCENARIOS = ["sharded", "packed_heads", "fsdp", "tensor_parallel", "context_parallel"]


def run(device: str, *scenarios: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(SCRIPT), device, *scenarios]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("device", ["cpu", pytest.param(GPU, marks=pytest.mark.gpu)])
def test_two_processes_agree_with_one(device: str) -> None:
    """All in one run, because starting the processes takes longer than what they do."""
    if device == GPU and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    said = run(device, *SCENARIOS)
    assert [line.split(":")[0] for line in said.splitlines() if "agree" in line] == SCENARIOS


def test_a_failing_scenario_fails() -> None:
    with pytest.raises(AssertionError, match="KeyError"):
        run("cpu", "no such scenario")
