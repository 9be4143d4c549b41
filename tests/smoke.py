"""Does the installed flash-attn work? `python tests/smoke.py [--device cuda]`, with torch alone.

A training step, results and gradients beside exact ones, packed sequences, decoding with a cache,
and what programs ask of a distribution before they import it.

Prints the seconds from the start of Python to the end of the training step. Not a test module, for
it has to run where neither pytest nor this repository is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Callable

import torch
from cases import Case
from compare import assert_as_exact_as_torch, check_case
from torch import Tensor

import flash_attn
from flash_attn import (
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    ops,
)
from flash_attn.reference import attention_reference

CASES = [
    Case("odd_causal", heads=4, heads_k=2, seqlen_q=65, seqlen_k=131, head_dim=40, causal=True),
    Case("window", seqlen_q=100, seqlen_k=77, head_dim=128, window=(20, 3)),
]
Check = Callable[[str, torch.dtype], None]
LENGTHS = (37, 0, 90)  # of the packed sequences


def started() -> float:
    """When this process began, by the clock of time.time()."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:  # noqa: PTH123
        ticks = int(stat.read().rpartition(")")[2].split()[19])
        age = float(uptime.read().split()[0]) - ticks / 100
    return time.time() - age


def training_step(device: str, dtype: torch.dtype) -> None:
    """One step of a layer with attention: the parameters move and stay finite."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 3 * 64).to(device, dtype)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(2, 50, 64, device=device, dtype=dtype)
    out = flash_attn_qkvpacked_func(layer(x).view(2, 50, 3, 4, 16), causal=True)
    assert isinstance(out, Tensor)
    out.float().pow(2).mean().backward()
    optimizer.step()
    assert layer.weight.isfinite().all() and not torch.equal(layer.weight, before)


def check_dense(device: str, dtype: torch.dtype) -> None:
    for case in CASES:
        check_case(case, dtype, device)


def compare_outputs(got: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    """got against exact causal attention of q, k and v, all (1, seqlen, heads, head_dim)."""
    exact, _ = attention_reference(q, k, v, causal=True)
    torch_result, _ = attention_reference(q, k, v, causal=True, dtype=q.dtype)
    assert_as_exact_as_torch("out", got, torch_result, exact, q.dtype, floor=1e-6)


def check_varlen(device: str, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, sum(LENGTHS), 2, 64, device=device, dtype=dtype)
    ends = torch.tensor((0, *LENGTHS)).cumsum(0).to(device, torch.int32)
    longest = max(LENGTHS)
    out = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=True)
    parts = zip(*(tensor.split(LENGTHS) for tensor in (out, q, k, v)), strict=True)
    for got, *inputs in parts:
        if len(got):
            compare_outputs(got[None], *(tensor[None] for tensor in inputs))


def check_kvcache(device: str, dtype: torch.dtype) -> None:
    """Decoding token by token gives what one causal call gives."""
    q, k, v = torch.randn(3, 1, 6, 2, 64, device=device, dtype=dtype)
    cache = [torch.zeros(1, 16, 2, 64, device=device, dtype=dtype) for _ in range(2)]
    for step in range(6):
        now = slice(step, step + 1)
        out = flash_attn_with_kvcache(
            q[:, now], *cache, k[:, now], v[:, now], cache_seqlens=step, causal=True
        )
        compare_outputs(out, q[:, now], k[:, : step + 1], v[:, : step + 1])


def check_gates() -> None:
    """What importers ask of the distribution, in their ways of asking."""
    version = importlib.metadata.version("flash-attn")
    assert version == flash_attn.__version__ == ops.build_info()["version"], version
    public = version.partition("+")[0]
    assert public == "2.8.3", f"expected 2.8.3 with a local part, got {version}"
    assert (2, 7, 3) <= tuple(map(int, public.split("."))) < (2, 8, 4)
    owners = importlib.metadata.packages_distributions()
    for module in ("flash_attn", "flash_attn_2_cuda"):
        names = [name.lower().replace("_", "-") for name in owners.get(module, [])]
        assert "flash-attn" in names, f"{module}: expected the distribution flash-attn, got {names}"
    top_level = importlib.metadata.distribution("flash-attn").read_text("top_level.txt")
    assert set((top_level or "").split()) == {"flash_attn", "flash_attn_2_cuda"}, top_level
    import flash_attn_2_cuda

    for name in ("fwd", "varlen_fwd", "bwd", "varlen_bwd", "fwd_kvcache"):
        assert callable(getattr(flash_attn_2_cuda, name)), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    device = parser.parse_args().device
    assert ops.load_error is None, ops.load_error
    dtypes = [torch.bfloat16] if device == "cuda" else [torch.float32, torch.bfloat16]
    training_step(device, dtypes[0])
    print(f"first training step after {time.time() - started():.1f} s")
    checks: list[Check] = [check_dense, check_varlen, check_kvcache]
    for dtype in dtypes:
        for check in checks:
            check(device, dtype)
    check_gates()
    print(f"flash_attn {flash_attn.__version__} works on {device}: {flash_attn.__file__}")


if __name__ == "__main__":
    sys.exit(main())
