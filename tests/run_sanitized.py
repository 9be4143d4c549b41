"""Small problems with ragged edges for every GPU kernel, to be run under compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/run_sanitized.py      # and synccheck
    compute-sanitizer --tool racecheck python tests/run_sanitized.py 90  # the forward of one family

Prints one line for each problem; the results themselves are checked by the tests. `make sanitize`
runs the three tools.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flash_attn import flash_attn_func, flash_attn_varlen_func, ops

HEAD_DIMS = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (40, 72))
# Around tiles, several key tiles; long enough for the kernels with 192 rows a tile.
LENGTHS = ((1, 1), (129, 127), (193, 300), (2305, 300))
WINDOWS = ((-1, -1), (-1, 0), (50, 20))
Options = dict[str, Any]


def run(
    head_dims: tuple[int, int],
    lengths: tuple[int, int],
    window: tuple[int, int],
    heads: int,
    backward: bool,
    deterministic: bool = False,
) -> None:
    """`heads` decides whether a thread block gets several tiles."""
    kind = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": backward}
    q = torch.randn(1, lengths[0], heads, head_dims[0], **kind)
    k = torch.randn(1, lengths[1], heads // 2, head_dims[0], **kind)
    v = torch.randn(1, lengths[1], heads // 2, head_dims[1], **kind)
    out = flash_attn_func(q, k, v, window_size=window, deterministic=deterministic)
    if backward:
        out.float().sum().backward()
    torch.cuda.synchronize()


def run_packed(head_dims: tuple[int, int], window: tuple[int, int], options: Options) -> None:
    """Sequences of all kinds of lengths, and rows that belong to none."""
    lengths_q, lengths_k = (129, 0, 1, 300, 64), (200, 17, 0, 300, 1)
    kind = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    q = torch.randn(sum(lengths_q) + 9, 2, head_dims[0], **kind)
    k = torch.randn(sum(lengths_k) + 5, 1, head_dims[0], **kind)
    v = torch.randn(sum(lengths_k) + 5, 1, head_dims[1], **kind)
    cu_seqlens = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
        for lengths in (lengths_q, lengths_k)
    ]
    out = flash_attn_varlen_func(q, k, v, *cu_seqlens, 300, 300, window_size=window, **options)
    out.float().sum().backward()
    torch.cuda.synchronize()


def run_biased(head_dims: tuple[int, int], window: tuple[int, int], shape: tuple[int, ...]) -> None:
    """A bias that is read where it lies, unaligned, and its gradient."""
    kind = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    q = torch.randn(2, 193, 2, head_dims[0], **kind)
    k = torch.randn(2, 300, 1, head_dims[0], **kind)
    v = torch.randn(2, 300, 1, head_dims[1], **kind)
    bias = torch.randn(*shape[:-1], shape[-1] + 1, **kind)[..., 1:]
    options: Options = {"softcap": 5.0, "dropout_p": 0.3, "return_max_logits": True}
    out, _ = flash_attn_func(q, k, v, window_size=window, bias=bias, **options)
    out.float().sum().backward()
    torch.cuda.synchronize()


def main() -> int:
    one_family = [int(argument) for argument in sys.argv[1:]]
    for family in one_family or (90, 80):
        with ops.newest_kernel_family(family):
            for head_dims, lengths, window in itertools.product(HEAD_DIMS, LENGTHS, WINDOWS):
                heads = 280 if lengths == (1, 1) else 2
                run(head_dims, lengths, window, heads, backward=not one_family)
                print(f"sm{family} {head_dims} {lengths} {window}", flush=True)
    if not one_family:
        slopes, sink = torch.tensor([0.1, 0.3]).cuda(), torch.tensor([0.5, -1.0]).cuda()
        extras: Options = {"softcap": 5.0, "alibi_slopes": slopes, "dropout_p": 0.3, "sink": sink}
        for family, head_dims, window in itertools.product((90, 80), HEAD_DIMS, WINDOWS):
            with ops.newest_kernel_family(family):
                run_packed(head_dims, window, {})
                print(f"sm{family}, packed: {head_dims} {window}", flush=True)
        alone: list[Options] = [{n: extras[n]} for n in ("softcap", "alibi_slopes", "dropout_p")]
        for head_dims, window, options in itertools.product(HEAD_DIMS, WINDOWS, [extras, *alone]):
            run_packed(head_dims, window, options)
            print(f"{', '.join(options)}, packed: {head_dims} {window}", flush=True)
        shapes = ((2, 2, 193, 300), (2, 193, 300), (2, 1, 1, 300))
        for head_dims, window, shape in itertools.product(HEAD_DIMS, WINDOWS, shapes):
            run_biased(head_dims, window, shape)
            print(f"bias {shape}: {head_dims} {window}", flush=True)
        with ops.backward_sections(1):  # every wait of the sm90 backward for sums of dq
            for head_dims, window, in_order in itertools.product(HEAD_DIMS, WINDOWS, (False, True)):
                run(head_dims, (193, 300), window, 8, backward=True, deterministic=in_order)
                print(f"sm90, few slots: {head_dims} {window} {in_order}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
