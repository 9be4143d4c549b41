"""Keys and values in pages: (num_blocks, page, heads_k, head_dim), found through a block table.

block_table, (batch, max_blocks) int32, says which page holds rows page * n to page * (n + 1) of a
sequence. Pages that a sequence doesn't use may be any number, -1 for instance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_attn.extras import check_vector
from flash_attn.problem import check_tensor


def check_block_table(block_table: Any, q: Tensor, batch: int) -> None:
    if not isinstance(block_table, Tensor):
        raise TypeError(f"block_table: expected a torch.Tensor, got {type(block_table).__name__}")
    shape = (batch, block_table.size(-1) if block_table.dim() else 0)
    shapes = {"(batch, max_blocks)": shape}
    check_vector("block_table", block_table, shapes, torch.int32, q.device)


def check_pages(name: str, pages: Tensor) -> None:
    check_tensor(name, pages, "(num_blocks, page_size, heads_k, head_dim) beside block_table", 4)
    if pages.size(0) == 0 or pages.size(1) == 0:
        raise ValueError(f"{name}: expected at least one page of one row, got {tuple(pages.shape)}")


def gather_pages(pages: Tensor, block_table: Tensor) -> Tensor:
    """(batch, max_blocks * page, ...): every sequence's pages in a row, a copy."""
    blocks = block_table.clamp(0, pages.size(0) - 1)
    return pages[blocks.to(torch.int64)].flatten(1, 2)


def pack_pages(pages: Tensor, block_table: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(batch * max_blocks * page, ...): the rows that cu_seqlens counts, packed, a copy.

    The rows past the last sequence's hold anything. Differentiable.
    """
    page = pages.size(1)
    batch, max_blocks = block_table.shape
    borders = cu_seqlens.to(torch.int64)
    rows = torch.arange(batch * max_blocks * page, device=pages.device)
    sequence = (torch.searchsorted(borders, rows, right=True) - 1).clamp(0, max(batch - 1, 0))
    position = (rows - borders[sequence]).clamp(0, max(max_blocks * page - 1, 0))
    blocks = block_table[sequence, position // page].clamp(0, pages.size(0) - 1)
    return pages[blocks.to(torch.int64), position % page]
