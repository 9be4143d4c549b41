"""Attention problems that every backend is tested on, by name."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Literal, get_args

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
    head_dim_v: int | None = None  # of v and out; None: head_dim
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    layout: Layout = "bshd"

    def __str__(self) -> str:
        return self.name

    @property
    def v_cols(self) -> int:
        return self.head_dim if self.head_dim_v is None else self.head_dim_v

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
    v = torch.randn(case.batch, case.seqlen_k, case.heads_k, case.v_cols, device=device)
    q, k, v = (lay_out(tensor.to(dtype), case.layout).detach() for tensor in (q, k, v))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def make_gradients(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Random dout and dlse, the gradients that come in for out and softmax_lse."""
    dout = torch.randn(case.batch, case.seqlen_q, case.heads, case.v_cols, device=device)
    return dout.to(dtype), torch.randn(case.batch, case.heads, case.seqlen_q, device=device)


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
    Case("head_dim_192_128", head_dim=192, head_dim_v=128, seqlen_q=130, causal=True),
    Case("head_dim_192_104", head_dim=192, head_dim_v=104, heads=4, heads_k=2),
    Case("head_dim_64_128", head_dim=64, head_dim_v=128, seqlen_k=200, causal=True),
    Case("head_dim_128_256", head_dim=128, head_dim_v=256, window=(30, 4)),
    Case("head_dim_256_8", head_dim=256, head_dim_v=8, causal=True, layout="interleaved"),
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
    # More than the 65535 that the second and third dimension of a CUDA grid can have.
    Case("heads_66000", heads=66000, heads_k=33000, seqlen_q=3, seqlen_k=5, batch=1, head_dim=8),
    Case("batch_66000", heads=1, heads_k=1, seqlen_q=5, seqlen_k=3, batch=66000, head_dim=8),
]

# Served without a copy on CPU, through padding on CUDA.
ODD_HEAD_DIM = [
    Case("head_dim_1", head_dim=1, causal=True),
    Case("head_dim_3", head_dim=3, layout="bhsd"),
    Case("head_dim_20", head_dim=20, causal=True, heads=4, heads_k=2),
    Case("head_dim_63", head_dim=63, layout="wide"),
    Case("head_dim_127", head_dim=127, causal=True, layout="interleaved"),
    Case("head_dim_96_33", head_dim=96, head_dim_v=33, causal=True),
    Case("head_dim_33_96", head_dim=33, head_dim_v=96, heads=4, heads_k=2),
    Case("head_dim_255", head_dim=255, layout="shifted", batch=1),
]

EVERY_HEAD_DIM = [
    Case(f"multiple_of_8_{dim}", batch=1, heads_k=1, seqlen_q=70, seqlen_k=75, head_dim=dim)
    for dim in range(8, 257, 8)
]


def lengths_around_tiles() -> list[Case]:
    """Every pair of lengths next to tile sizes, plain and causal, over the kernels' head dims."""
    lengths = (1, 63, 64, 65, 127, 128, 129, 257)
    head_dims = itertools.cycle((64, 128, 96, 256, 192))  # 5 of them for 16 cases a length
    return [
        Case(
            f"lengths_{seqlen_q}_{seqlen_k}" + "_causal" * causal,
            batch=1,
            heads_k=1,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            head_dim=next(head_dims),
            causal=causal,
        )
        for seqlen_q, seqlen_k, causal in itertools.product(lengths, lengths, (False, True))
    ]


def random_case(number: int) -> Case:
    """The same case for a number everywhere."""
    draw = random.Random(number)
    heads_k = draw.randint(1, 3)
    window = (draw.choice((-1, draw.randint(0, 300))), draw.choice((-1, draw.randint(0, 300))))
    return Case(
        f"random_{number}",
        batch=draw.randint(1, 3),
        seqlen_q=draw.randint(0, 400),
        seqlen_k=draw.randint(0, 400),
        heads=heads_k * draw.randint(1, 4),
        heads_k=heads_k,
        head_dim=draw.randint(1, 256),
        causal=draw.random() < 0.5,
        window=window,
        scale=draw.choice((None, draw.uniform(-1.0, 1.0))),
        layout=draw.choice(get_args(Layout)),
        head_dim_v=draw.choice((None, None, draw.randint(1, 256))),
    )


ALL = REGULAR + RAGGED + EDGE + ODD_HEAD_DIM + EVERY_HEAD_DIM + lengths_around_tiles()

# Enough tiles to fill a GPU several times, many key tiles a query tile. Too large for a CPU test.
LARGE = [
    Case("large_d64", seqlen_q=2048, seqlen_k=2048, heads=16, heads_k=16, causal=True),
    Case("large_d64_gqa", seqlen_q=1999, seqlen_k=2101, heads=16, heads_k=4),
    Case("large_d96", seqlen_q=1500, seqlen_k=1777, heads=12, heads_k=6, head_dim=96, causal=True),
    Case("large_d128", seqlen_q=2048, seqlen_k=2048, heads=16, heads_k=16, head_dim=128),
    Case(
        "large_d128_gqa",
        seqlen_q=2101,
        seqlen_k=1999,
        heads=16,
        heads_k=2,
        head_dim=128,
        causal=True,
    ),
    Case(
        "large_d128_window",
        seqlen_q=2048,
        seqlen_k=2048,
        heads=8,
        heads_k=8,
        head_dim=128,
        window=(300, 100),
    ),
    Case("large_d192", seqlen_q=1111, seqlen_k=1500, heads=8, heads_k=4, head_dim=192, causal=True),
    Case(
        "large_d192_d128",
        seqlen_q=1400,
        seqlen_k=1400,
        heads=8,
        heads_k=4,
        head_dim=192,
        head_dim_v=128,
        causal=True,
    ),
    Case("large_d256", seqlen_q=1024, seqlen_k=2048, heads=8, heads_k=8, head_dim=256, causal=True),
    Case("large_d256_mqa", seqlen_q=1025, seqlen_k=1023, heads=12, heads_k=1, head_dim=256),
    Case("long_q", seqlen_q=66000 * 128, seqlen_k=9, batch=1, heads=1, heads_k=1, head_dim=8),
    Case("long_k", seqlen_q=9, seqlen_k=20_000, batch=1, heads=4, heads_k=2, head_dim=128),
]

# Head dims, tile_m and tile_n of every tile of the sm90 forward.
SM90_TILES = [
    ((64, 64), (128, 128)),
    ((64, 64), (192, 128)),
    ((96, 96), (128, 128)),
    ((96, 96), (192, 112)),
    ((128, 128), (128, 128)),
    ((192, 128), (128, 128)),
    ((192, 192), (128, 80)),
    ((256, 256), (128, 64)),
]


# The same of the sm90 backward.
SM90_BACKWARD_TILES = [
    ((64, 64), (128, 128)),
    ((96, 96), (64, 128)),
    ((128, 128), (64, 128)),
    ((192, 128), (64, 128)),
    ((192, 192), (64, 128)),
    ((256, 256), (64, 128)),
]


def around(size: int, first: int = 0) -> list[int]:
    """Lengths at the edges of tiles of `size`, the first of them after `first` rows."""
    return [first + rest for rest in (1, size - 1, size, size + 1, 3 * size + 17)]


def sm90_lengths(tile: tuple[int, int]) -> tuple[list[int], list[int]]:
    """seqlen_q and seqlen_k around the edges of a tile, where its kernels serve them: those of 192
    rows serve long sequences alone."""
    skipped_m, skipped_n = (12, 18) if tile[0] == 192 else (0, 0)  # whole tiles before
    return around(tile[0], skipped_m * tile[0]), around(tile[1], skipped_n * tile[1])
