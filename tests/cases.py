"""Attention problems that every backend is tested on, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["bshd", "bhsd", "sbhd", "interleaved", "wide", "shifted", "expanded"]


@dataclass(frozen=True)
class Case:
    """One problem. The layout says how q, k and v lie in memory."""

    name: str
    batch: int = 2
    seqlen_q: int = 96
    seqlen_k: int = 96
    heads: int = 2
    heads_k: int = 2
    head_dim: int = 64
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    layout: Layout = "bshd"

    def __str__(self) -> str:
        return self.name

    @property
    def options(self) -> dict[str, object]:
        """Keyword arguments that the functions and the reference share."""
        return {
            "softmax_scale": self.scale,
            "causal": self.causal,
            "window_size": self.window,
        }


def lay_out(values: Tensor, layout: Layout) -> Tensor:
    """values, (batch, seqlen, heads, head_dim), in memory of another layout."""
    batch, seqlen, heads, head_dim = values.shape
    if layout == "bhsd":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sbhd":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "interleaved":  # one of three in a packed tensor
        return torch.stack([values, values + 1, values - 1], dim=3)[:, :, :, 0]
    if layout == "wide":  # rows with room behind them, and a first row that isn't the memory's
        wide = values.new_full((batch + 1, seqlen + 3, heads + 1, head_dim + 8), float("nan"))
        wide[1:, 3:, 1:, :head_dim] = values
        return wide[1:, 3:, 1:, :head_dim]
    if layout == "shifted":  # no row starts at a multiple of 16 bytes
        shifted = values.new_full((batch, seqlen, heads, head_dim + 3), float("nan"))
        shifted[..., 1 : head_dim + 1] = values
        return shifted[..., 1 : head_dim + 1]
    if layout == "expanded":  # every batch entry and head is the same memory
        return values[:1, :, :1].expand(batch, seqlen, heads, head_dim)
    return values


def make_inputs(
    case: Case, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Random leaves q, k and v that require gradients."""
    q = torch.randn(case.batch, case.seqlen_q, case.heads, case.head_dim, device=device)
    k = torch.randn(case.batch, case.seqlen_k, case.heads_k, case.head_dim, device=device)
    v = torch.randn(case.batch, case.seqlen_k, case.heads_k, case.head_dim, device=device)
    q, k, v = (lay_out(tensor.to(dtype), case.layout).detach() for tensor in (q, k, v))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


REGULAR = [
    Case("plain"),
    Case("causal", causal=True),
    Case("one_batch", batch=1, heads=3, heads_k=3, seqlen_q=160, seqlen_k=160, causal=True),
    Case("head_dim_8", head_dim=8, causal=True),
    Case("head_dim_32", head_dim=32, seqlen_q=128, seqlen_k=128),
    Case("head_dim_40", head_dim=40, causal=True),
    Case("head_dim_72", head_dim=72),
    Case("head_dim_96", head_dim=96, causal=True),
    Case("head_dim_104", head_dim=104),
    Case("head_dim_128", head_dim=128, seqlen_q=128, seqlen_k=128, causal=True),
    Case("head_dim_160", head_dim=160),
    Case("head_dim_192", head_dim=192, causal=True),
    Case("head_dim_248", head_dim=248),
    Case("head_dim_256", head_dim=256, causal=True),
    Case("mqa", heads=4, heads_k=1, causal=True),
    Case("gqa", heads=6, heads_k=2, head_dim=128),
    Case("gqa_causal", heads=6, heads_k=3, seqlen_q=64, seqlen_k=200, causal=True),
    Case("scale_small", scale=0.01, causal=True),
    Case("scale_large", scale=1.0),
    Case("scale_negative", scale=-0.2, causal=True),
    Case("scale_zero", scale=0.0, causal=True),
    Case("layout_bhsd", layout="bhsd", causal=True),
    Case("layout_sbhd", layout="sbhd", heads=4, heads_k=2),
    Case("layout_interleaved", layout="interleaved", head_dim=32, causal=True),
    Case("layout_wide", layout="wide", seqlen_k=130, heads=4, heads_k=2),
    Case("layout_shifted", layout="shifted", causal=True),
    Case("layout_expanded", layout="expanded", causal=True),
]

# Lengths next to tile sizes, in every combination with causal and windows at least once.
RAGGED = [
    Case("short_q", seqlen_q=17, seqlen_k=113, causal=True),
    Case("short_q_plain", seqlen_q=17, seqlen_k=113),
    Case("short_k", seqlen_q=113, seqlen_k=17, causal=True),
    Case("short_k_plain", seqlen_q=113, seqlen_k=17, head_dim=96),
    Case("tile_minus_1", seqlen_q=63, seqlen_k=127, causal=True),
    Case("tile_plus_1", seqlen_q=65, seqlen_k=129, causal=True, head_dim=128),
    Case("tiles_127_65", seqlen_q=127, seqlen_k=65, causal=True),
    Case("tiles_129_63", seqlen_q=129, seqlen_k=63, head_dim=32),
    Case("tiles_255_257", seqlen_q=255, seqlen_k=257, batch=1, causal=True),
    Case("tiles_257_255", seqlen_q=257, seqlen_k=255, batch=1, causal=True, head_dim=128),
    Case("window_both", seqlen_q=150, seqlen_k=150, window=(20, 10)),
    Case("window_left", seqlen_q=150, seqlen_k=150, window=(33, -1), head_dim=128),
    Case("window_right", seqlen_q=150, seqlen_k=150, window=(-1, 33)),
    Case("window_causal", seqlen_q=200, seqlen_k=200, window=(64, 64), causal=True),
    Case("window_one", seqlen_q=130, seqlen_k=130, window=(0, 0)),
    Case("window_long_k", seqlen_q=70, seqlen_k=190, window=(40, 5), heads=4, heads_k=2),
    Case("window_long_q", seqlen_q=190, seqlen_k=70, window=(40, 5)),
    Case("window_long_q_causal", seqlen_q=190, seqlen_k=70, window=(30, 0), causal=True),
    Case("window_past_k", seqlen_q=140, seqlen_k=60, window=(-1, 65)),  # wider than seqlen_k
    Case("window_left_past_k", seqlen_q=60, seqlen_k=140, window=(150, 3)),
    Case("window_huge", seqlen_q=90, seqlen_k=80, window=(2**31 - 1, 2**31 - 1)),
    Case("window_d256", seqlen_q=150, seqlen_k=170, window=(50, 0), head_dim=256, batch=1),
]

EDGE = [
    Case("one_query", seqlen_q=1, seqlen_k=130, causal=True),
    Case("one_key", seqlen_q=130, seqlen_k=1),
    Case("one_key_causal", seqlen_q=130, seqlen_k=1, causal=True),
    Case("one_each", seqlen_q=1, seqlen_k=1, causal=True),
    Case("no_queries", seqlen_q=0, seqlen_k=30),
    Case("no_keys", seqlen_q=30, seqlen_k=0),
    Case("no_keys_causal", seqlen_q=30, seqlen_k=0, causal=True, heads=4, heads_k=2),
    Case("nothing", seqlen_q=0, seqlen_k=0),
    Case("no_batch", batch=0),
    Case("half_the_rows_see_nothing", seqlen_q=128, seqlen_k=64, causal=True),
    Case("most_rows_see_nothing", seqlen_q=300, seqlen_k=3, causal=True, batch=1),
    Case("rows_see_nothing_right", seqlen_q=200, seqlen_k=40, window=(10, 10), batch=1),
    Case("large_scores", scale=30.0, causal=True),
    Case("many_heads", heads=17, heads_k=17, seqlen_q=20, seqlen_k=20, batch=1),
]

# Served without a copy on CPU, through padding on CUDA.
ODD_HEAD_DIM = [
    Case("head_dim_1", head_dim=1, causal=True),
    Case("head_dim_3", head_dim=3, layout="bhsd"),
    Case("head_dim_20", head_dim=20, causal=True, heads=4, heads_k=2),
    Case("head_dim_63", head_dim=63, layout="wide"),
    Case("head_dim_127", head_dim=127, causal=True, layout="interleaved"),
    Case("head_dim_255", head_dim=255, layout="shifted", batch=1),
]

ALL = REGULAR + RAGGED + EDGE + ODD_HEAD_DIM
