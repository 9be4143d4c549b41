"""`python -m benchmarks`: every benchmark for the GPU, or without one for the CPU."""

import subprocess
import sys
from pathlib import Path

import torch

GPU = ("bench_attention.py", "host_time.py")
CPU = ("bench_cpu.py", "host_time.py")

codes = []
for script in GPU if torch.cuda.is_available() else CPU:
    print(f"== {script}", flush=True)
    command = [sys.executable, str(Path(__file__).with_name(script))]
    codes.append(subprocess.run(command, check=False).returncode)
sys.exit(max(codes))
