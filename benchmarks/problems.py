"""The problems that the benchmarks time: sizes, grids, and what each costs at least."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

TOKENS, WIDTH = 16384, 2048  # of the grids that keep the size of the batch and of the model


@dataclass(frozen=True)
class Problem:
    """A dense batch; with `seqlens` packed sequences, where seqlen_q and seqlen_k are the longest
    and the tensors are (total, heads, head_dim)."""

    batch_size: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    causal: bool = False
    window: tuple[int, int] = (-1, -1)  # as window_size of flash_attn_func
    head_dim_v: int | None = None  # None: head_dim
    seqlens: tuple[int, ...] = ()
    softcap: float = 0.0
    alibi: bool = False
    dropout_p: float = 0.0
    sink: bool = False

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Problem:
        """Of what json made of asdict(problem)."""
        known = {name: values[name] for name in (field.name for field in fields(cls))}
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})

    def name(self) -> str:
        heads, head_dim = str(self.num_heads), str(self.head_dim)
        if self.num_heads != self.num_heads_k:
            heads += f"/{self.num_heads_k}"
        if self.v_cols != self.head_dim:
            head_dim += f"/{self.v_cols}"
        mask = " causal" if self.causal else ""
        if self.window != (-1, -1):
            mask += f" w{self.window[0]},{self.window[1]}"
        options = f" softcap{self.softcap:g}" if self.softcap else ""
        options += f" dropout{self.dropout_p:g}" if self.dropout_p else ""
        options += " alibi" * self.alibi + " sink" * self.sink
        return f"{self.sequences_name()} h{heads} d{head_dim}{mask}{options}"

    def sequences_name(self) -> str:
        if not self.seqlens:
            seqlen = f"{self.seqlen_q}" if self.is_square else f"{self.seqlen_q}/{self.seqlen_k}"
            return f"{self.batch_size}x{seqlen}"
        runs = [(length, len(list(run))) for length, run in groupby(self.seqlens)]
        if len(runs) > 3:
            return f"packed {self.batch_size}x{min(self.seqlens)}..{max(self.seqlens)}"
        return "packed " + "+".join(f"{n}x{length}" if n > 1 else f"{length}" for length, n in runs)

    @cached_property
    def is_plain(self) -> bool:
        """Dense and without options; asked in every timed call."""
        return not (self.seqlens or self.softcap or self.alibi or self.dropout_p or self.sink)

    @property
    def is_square(self) -> bool:
        return self.seqlen_q == self.seqlen_k

    @property
    def v_cols(self) -> int:
        return self.head_dim_v or self.head_dim

    def rows(self) -> tuple[int, int]:
        """Of q and of k, in all sequences."""
        if self.seqlens:
            return sum(self.seqlens), sum(self.seqlens)
        return self.batch_size * self.seqlen_q, self.batch_size * self.seqlen_k

    def lengths(self) -> tuple[int, ...]:
        """Queries of every sequence."""
        return self.seqlens or (self.seqlen_q,) * self.batch_size

    def part(self, tensor: Tensor, sequence: int) -> Tensor:
        """The rows of a sequence, (seqlen, heads, head_dim), of a tensor of the problem."""
        if not self.seqlens:
            return tensor[sequence]
        begin = sum(self.seqlens[:sequence])
        return tensor[begin : begin + self.seqlens[sequence]]

    def visible_pairs(self) -> float:
        """Pairs of query and key that the mask leaves, in all sequences."""
        if not self.seqlens:
            return self.batch_size * self._visible_pairs(self.seqlen_q, self.seqlen_k)
        return sum(self._visible_pairs(length, length) for length in self.seqlens)

    def _visible_pairs(self, seqlen_q: int, seqlen_k: int) -> float:
        """Half of them counts as causal."""
        if self.window == (-1, -1):
            return seqlen_q * seqlen_k * (0.5 if self.causal else 1.0)
        left, right = self.window[0], 0 if self.causal else self.window[1]
        row = torch.arange(seqlen_q) + seqlen_k - seqlen_q
        begin = (row - left).clamp(0, seqlen_k) if left >= 0 else torch.zeros_like(row)
        end = (row + right + 1).clamp(0, seqlen_k) if right >= 0 else begin * 0 + seqlen_k
        return float((end - begin).clamp(min=0).sum())

    def flop(self, pass_name: str) -> float:
        """Two products over the visible pairs, 2.5 times that backward."""
        pairs = self.num_heads * self.visible_pairs()
        return 2.0 * pairs * (self.head_dim + self.v_cols) * MATMULS[pass_name]

    def least_bytes(self, pass_name: str, element_size: int) -> int:
        """Every input read once and every output written once."""
        rows, rows_k = self.rows()
        # Forward q, k and out, v; backward q, dq, k, dk and out, dout, v, dv.
        all_rows = rows * self.num_heads + rows_k * self.num_heads_k
        elements = all_rows * (self.head_dim + self.v_cols)
        return element_size * elements * (1 if pass_name == "fwd" else 2)

    def tensors(self, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random q, k, v, which want gradients, and dout."""
        rows: tuple[int, ...] = (self.batch_size, self.seqlen_q)
        rows_k: tuple[int, ...] = (self.batch_size, self.seqlen_k)
        if self.seqlens:
            rows = rows_k = (sum(self.seqlens),)
        q, k, v, dout = (
            torch.randn(shape, device=device, dtype=dtype)
            for shape in (
                (*rows, self.num_heads, self.head_dim),
                (*rows_k, self.num_heads_k, self.head_dim),
                (*rows_k, self.num_heads_k, self.v_cols),
                (*rows, self.num_heads, self.v_cols),
            )
        )
        if self.softcap:
            q *= 4  # scores of 4 at large, so that a cap of 30 shows in the results
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout

    def borders(self, device: torch.device) -> Tensor:
        """cu_seqlens of flash_attn_varlen_func."""
        return _borders(self.seqlens, device)

    def options(self, device: torch.device) -> dict[str, Any]:
        """Arguments of flash_attn_func beside the mask, those that are on."""
        options: dict[str, Any] = {}
        if self.softcap:
            options["softcap"] = self.softcap
        if self.dropout_p:
            options["dropout_p"] = self.dropout_p
        if self.alibi:
            options["alibi_slopes"] = _alibi_slopes(self.num_heads, device)
        if self.sink:
            options["sink"] = _sinks(self.num_heads, device)
        return options


# Made once, so that no timed call makes them.


@lru_cache(maxsize=16)
def _borders(seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(seqlens)], dtype=torch.int32, device=device)


@lru_cache(maxsize=16)
def _alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """2^(-8 / heads) and its powers, as published."""
    return torch.exp2(-8.0 * torch.arange(1, num_heads + 1, device=device) / num_heads)


@lru_cache(maxsize=16)
def _sinks(num_heads: int, device: torch.device) -> Tensor:
    return torch.linspace(-1.0, 5.0, num_heads, device=device)


MATMULS = {"fwd": 1.0, "bwd": 2.5}


def square(seqlen: int, head_dim: int, *, tokens: int = TOKENS) -> Problem:
    """As many sequences as make up `tokens`, as many heads as make up WIDTH."""
    heads = WIDTH // head_dim
    return Problem(max(1, tokens // seqlen), seqlen, seqlen, heads, heads, head_dim)


def packed(seqlens: list[int], num_heads: int, head_dim: int) -> Problem:
    longest, heads = max(seqlens), (num_heads, num_heads)
    return Problem(len(seqlens), longest, longest, *heads, head_dim, seqlens=tuple(seqlens))


def random_lengths(count: int, longest: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randint(1, longest) for _ in range(count)]


def of_lengths(head_dim: int) -> list[Problem]:
    """Packed sequences: equal, one among many short ones, and at random."""
    heads = WIDTH // head_dim
    return [
        packed([1024] * 16, heads, head_dim),
        packed([8192] * 2, heads, head_dim),
        packed([16384] + [256] * 64, heads, head_dim),
        packed(random_lengths(512, 2048), heads // 4, head_dim),
    ]


def with_options(head_dim: int) -> list[Problem]:
    """Causal and plain, with each option alone, and with a window over a longer sequence."""
    plain = replace(square(4096, head_dim), causal=True)
    return [
        plain,
        replace(plain, softcap=30.0),
        replace(plain, alibi=True),
        replace(plain, dropout_p=0.1),
        replace(plain, sink=True),
        replace(square(16384, head_dim), window=(1023, 0)),
    ]


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
    "varlen": [*of_lengths(64), *of_lengths(128)],
    "options": [*with_options(64), *with_options(128)],
    "cpu": [Problem(1, n, n, 4, 4, head_dim) for head_dim in (64, 128, 256) for n in (1024, 2048)],
    "tiny": [Problem(1, 64, 64, 2, 1, 32), Problem(2, 40, 40, 2, 2, 16)],
}


def grid(names: list[str], causal: list[bool]) -> list[Problem]:
    """Problems of the named grids, each with every value of causal unless its mask is part of it:
    a window, or causal in the grid."""

    def has_mask(problem: Problem) -> bool:
        return problem.causal or problem.window != (-1, -1)

    return [
        replace(problem, causal=flag)
        for name in names
        for problem in GRIDS[name]
        for flag in ([problem.causal] if has_mask(problem) else causal)
    ]
