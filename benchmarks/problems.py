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
    window: tuple[int, int] = (-1, -1)  # as window_size of flash_attn_func
    head_dim_v: int | None = None  # None: head_dim

    def name(self) -> str:
        seqlen, heads = str(self.seqlen_q), str(self.num_heads)
        if self.seqlen_q != self.seqlen_k:
            seqlen += f"/{self.seqlen_k}"
        if self.num_heads != self.num_heads_k:
            heads += f"/{self.num_heads_k}"
        mask = " causal" if self.causal else ""
        if self.window != (-1, -1):
            mask += f" w{self.window[0]},{self.window[1]}"
        head_dim = f"{self.head_dim}"
        if self.v_cols != self.head_dim:
            head_dim += f"/{self.v_cols}"
        return f"{self.batch_size}x{seqlen} h{heads} d{head_dim}{mask}"

    @property
    def v_cols(self) -> int:
        return self.head_dim_v or self.head_dim

    def visible_pairs(self) -> float:
        """Pairs of query and key that the mask leaves; half of them counts as causal."""
        if self.window == (-1, -1):
            return self.seqlen_q * self.seqlen_k * (0.5 if self.causal else 1.0)
        left, right = self.window[0], 0 if self.causal else self.window[1]
        row = torch.arange(self.seqlen_q) + self.seqlen_k - self.seqlen_q
        begin = (row - left).clamp(0, self.seqlen_k) if left >= 0 else torch.zeros_like(row)
        end = (row + right + 1).clamp(0, self.seqlen_k) if right >= 0 else begin * 0 + self.seqlen_k
        return float((end - begin).clamp(min=0).sum())

    def flop(self, pass_name: str) -> float:
        """Two products over the visible pairs, 2.5 times that backward."""
        pairs = self.batch_size * self.num_heads * self.visible_pairs()
        return 2.0 * pairs * (self.head_dim + self.v_cols) * MATMULS[pass_name]

    def least_bytes(self, pass_name: str, element_size: int) -> int:
        """Every input read once and every output written once."""
        rows = self.batch_size * self.seqlen_q * self.num_heads
        rows_k = self.batch_size * self.seqlen_k * self.num_heads_k
        # Forward q, k and out, v; backward q, dq, k, dk and out, dout, v, dv.
        elements = (rows + rows_k) * (self.head_dim + self.v_cols)
        return element_size * elements * (1 if pass_name == "fwd" else 2)

    def tensors(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random q, k, v, which want gradients, and dout."""
        rows = (self.batch_size, self.seqlen_q, self.num_heads)
        rows_k = (self.batch_size, self.seqlen_k, self.num_heads_k)
        q, k, v, dout = (
            torch.randn(shape, device=device, dtype=dtype)
            for shape in (
                (*rows, self.head_dim),
                (*rows_k, self.head_dim),
                (*rows_k, self.v_cols),
                (*rows, self.v_cols),
            )
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
    "hdim": [
        *(square(seqlen, head_dim) for head_dim in (96, 192) for seqlen in (1024, 8192)),
        *(Problem(16384 // n, n, n, 16, 16, 192, head_dim_v=128) for n in (1024, 8192)),
    ],
    "window": [
        replace(square(seqlen, head_dim), window=window)
        for head_dim in (64, 128)
        for seqlen in (4096, 16384)
        for window in ((1023, 0), (256, 256))
    ],
    "short": [
        *(square(seqlen, head_dim) for head_dim in (64, 128) for seqlen in (64, 128, 256)),
        *(square(seqlen, 128) for seqlen in (77, 197, 500)),
        *(square(seqlen, 128, tokens=seqlen) for seqlen in (128, 512, 2048)),
    ],
    "cpu": [Problem(1, n, n, 4, 4, head_dim) for head_dim in (64, 128, 256) for n in (1024, 2048)],
    "tiny": [Problem(1, 64, 64, 2, 1, 32), Problem(2, 40, 40, 2, 2, 16)],
}


def grid(names: list[str], causal: list[bool]) -> list[Problem]:
    """Problems of the named grids, each with every value of causal where it has no window."""
    return [
        replace(problem, causal=flag)
        for name in names
        for problem in GRIDS[name]
        for flag in (causal if problem.window == (-1, -1) else [False])
    ]
