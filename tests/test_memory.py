"""Memory grows with the sequence length, not with its square."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import resource, sys, torch
from flash_attn import flash_attn_func

seqlen = int(sys.argv[1])
torch.set_num_threads(2)
qkv = torch.randn(3, 1, seqlen, 2, 32, requires_grad=True)
window = (64, 64)  # little work; a score matrix would be as large as without
flash_attn_func(*torch.randn(3, 1, 64, 2, 32, requires_grad=True).unbind(0)).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
flash_attn_func(*qkv.unbind(0), window_size=window).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def growth_kib(seqlen: int) -> int:
    """Growth of the peak of resident memory by one forward and backward."""
    command = [sys.executable, "-c", SCRIPT, str(seqlen)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_memory_is_linear() -> None:
    short, long = 8192, 32768
    growth = growth_kib(long)
    tensor_kib = long * 2 * 32 * 4 // 1024
    # out, dout, dq, dk, dv, their gradient with respect to the stacked tensor and its parts.
    linear = 16 * tensor_kib
    matrix = long * long * 2 * 4 // 1024
    assert linear < matrix // 50
    assert growth < linear, f"expected less than {linear} KiB for seqlen {long}, got {growth}"
    assert growth_kib(short) < linear
