"""Timing beside other implementations of attention, on the GPU or without one on the CPU.

python -m benchmarks                            every benchmark for this machine
python -m benchmarks attention [option ...]     TFLOP/s of one call: dense, packed, with options
python -m benchmarks sdpa [option ...]          PyTorch's attention on our kernels: attention with
                                                other defaults
python -m benchmarks host [option ...]          host microseconds of one call
python -m benchmarks cpu [option ...]           the CPU backend beside PyTorch's own
python -m benchmarks builds OLD.so NEW.so ...   two builds of this package: before and after
python -m benchmarks --help                     this, and the options of each
"""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SCRIPTS = {
    "attention": "bench_attention.py",
    "sdpa": "bench_attention.py",
    "host": "host_time.py",
    "cpu": "bench_cpu.py",
    "builds": "compare_builds.py",
}
DEFAULTS = {
    "sdpa": "--contenders ours,sdpa_ours,sdpa_fa3,cudnn --seqlens 4096,8192,16384".split(),
}
FOR_GPU, FOR_CPU = ("attention", "host"), ("cpu", "host")


def run(name: str, options: list[str]) -> int:
    """In a process of its own, so that no benchmark inherits another's memory or settings."""
    command = [sys.executable, str(FOLDER / SCRIPTS[name]), *DEFAULTS.get(name, []), *options]
    return subprocess.run(command).returncode


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in SCRIPTS:
        return run(arguments[0], arguments[1:])
    if arguments and arguments[0] in ("-h", "--help"):
        print(__doc__)
        for name in (name for name in SCRIPTS if name not in DEFAULTS):
            print(f"== {name}", flush=True)
            run(name, ["--help"])
        return 0
    if arguments:
        print(f"expected one of {', '.join(SCRIPTS)}, got {arguments[0]}\n{__doc__}")
        return 2
    import torch

    codes = []
    for name in FOR_GPU if torch.cuda.is_available() else FOR_CPU:
        print(f"== {name}", flush=True)
        codes.append(run(name, []))
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
