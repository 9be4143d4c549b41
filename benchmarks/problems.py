"""The problems that the benchmarks time: sizes, grids, and what each costs at least."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TOKENS, WIDTH = 16384, 2048  # of the grids that keep the size of the batch and of the model


@dataclass(frozen=True)
class Problem:
    batch_size: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    causal: bool = False

    def name(self) -> str:
        seqlen, heads = str(self.seqlen_q), str(self.num_heads)
        if self.seqlen_q != self.seqlen_k:
            seqlen += f"/{self.seqlen_k}"
        if self.num_heads != self.num_heads_k:
            heads += f"/{self.num_heads_k}"
        mask = " causal" if self.causal else ""
        return f"{self.batch_size}x{seqlen} h{heads} d{self.head_dim}{mask}"

    def flop(self, pass_name: str) -> float:
        """Two products of seqlen_q x seqlen_k matrices, half of that causal, 2.5 times backward."""
        pairs = self.batch_size * self.num_heads * self.seqlen_q * self.seqlen_k
        return 4.0 * pairs * self.head_dim * (0.5 if self.causal else 1.0) * MATMULS[pass_name]

    def least_bytes(self, pass_name: str, element_size: int) -> int:
        """Every input read once and every output written once."""
        q = self.batch_size * self.seqlen_q * self.num_heads * self.head_dim
        k = self.batch_size * self.seqlen_k * self.num_heads_k * self.head_dim
        # Forward q, out and k, v; backward q, out, dout, dq and k, v, dk, dv.
        return element_size * (2 * q + 2 * k if pass_name == "fwd" else 4 * q + 4 * k)

    def tensors(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random q, k, v, which want gradients, and dout."""
        shape_q = (self.batch_size, self.seqlen_q, self.num_heads, self.head_dim)
        shape_k = (self.batch_size, self.seqlen_k, self.num_heads_k, self.head_dim)
        q, k, v, dout = (
            torch.randn(shape, device=device, dtype=dtype)
            for shape in (shape_q, shape_k, shape_k, shape_q)
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


MATMULS = {"fwd": 1.0, "bwd": 2.5}


def square(seqlen: int, head_dim: int, *, tokens: int = TOKENS) -> Problem:
    """As many sequences as make up `tokens`, as many heads as make up WIDTH."""
    heads = WIDTH // head_dim
    return Problem(max(1, tokens // seqlen), seqlen, seqlen, heads, heads, head_dim)


GRIDS: dict[str, list[Problem]] = {
    "paper": [
        square(seqlen, head_dim)
        for head_dim in (64, 128, 256)
        for seqlen in (512, 1024, 2048, 4096, 8192, 16384)
    ],
    "quick": [square(seqlen, d) for d in (64, 128, 256) for seqlen in (1024, 4096)],
    "gqa": [
        Problem(2, 8192, 8192, 32, 8, 128),
        Problem(1, 32768, 32768, 32, 8, 128),
        Problem(4, 4096, 4096, 64, 8, 128),
        Problem(2, 8192, 8192, 32, 8, 64),
    ],
    "hdim": [square(seqlen, head_dim) for head_dim in (96, 192) for seqlen in (1024, 8192)],
    "short": [
        *(square(seqlen, head_dim) for head_dim in (64, 128) for seqlen in (64, 128, 256)),
        *(square(seqlen, 128) for seqlen in (77, 197, 500)),
        *(square(seqlen, 128, tokens=seqlen) for seqlen in (128, 512, 2048)),
    ],
    "cpu": [Problem(1, n, n, 4, 4, head_dim) for head_dim in (64, 128, 256) for n in (1024, 2048)],
    "tiny": [Problem(1, 64, 64, 2, 1, 32), Problem(2, 40, 40, 2, 2, 16)],
}


def grid(names: list[str], causal: list[bool]) -> list[Problem]:
    """Problems of the named grids, each with every value of causal."""
    return [
        replace(problem, causal=flag)
        for name in names
        for problem in GRIDS[name]
        for flag in causal
    ]
