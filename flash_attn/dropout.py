"""Which probabilities dropout keeps: the same bits in every backend, tile shape and pass.

The bits are a pure function of the random state and an element's batch entry, head, query and key:
Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), one call for
a patch of 2 x 2 elements in each of four quarters of a 16 x 16 tile, a byte an element.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_TILE = 16

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def draw_rng_state(device: torch.device) -> Tensor:
    """A new random state (seed, offset), int64 (2,), from torch's generator of the device.

    Drawn on the device: no wait for it, and every replay of a CUDA graph has another.
    """
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def _product(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * word, in halves: int64 can't hold the product."""
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16)
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _LOW


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-7 of words in int64 tensors of shapes that broadcast: as csrc/arith/philox.h."""
    x, y, z, w = counter
    key_x, key_y = key
    for _ in range(_ROUNDS):
        high_x, low_x = _product(_MULTIPLIERS[0], x)
        high_z, low_z = _product(_MULTIPLIERS[1], z)
        x, y, z, w = high_z ^ y ^ key_x, low_z, high_x ^ w ^ key_y, low_x
        key_x, key_y = (key_x + _WEYL[0]) & _LOW, (key_y + _WEYL[1]) & _LOW
    return x, y, z, w


def dropout_mask(
    rng_state: Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    """The probabilities that dropout keeps, computed with PyTorch's operations on any device.

    A byte is random in 0 to 255, and an element is kept if its byte is at most
    floor((1 - dropout_p) * 255). Memory is some dozens of bytes an element: for tests and a look
    at small problems, not for training.

    Args:
        rng_state: (2,) int64, seed and offset, as the private forward functions return it.
        dropout_p: probability of being dropped, in [0, 1).
        batch, heads, seqlen_q, seqlen_k: sizes. Rows and columns count from 0 in each sequence.

    Returns:
        (batch, heads, seqlen_q, seqlen_k) bool, True where kept.
    """
    seed, offset = rng_state.to(torch.int64).unbind(0)
    key = (seed & _LOW, (seed >> 32) & _LOW)
    row_tiles, column_tiles = -(-seqlen_q // _TILE), -(-seqlen_k // _TILE)
    sizes = (batch * heads, 4 * row_tiles, 4 * column_tiles)
    planes, rows, columns = (torch.arange(n, device=rng_state.device) for n in sizes)
    counter = (rows[:, None], columns, planes[:, None, None], offset & _LOW)
    words = [word.expand(sizes) for word in philox(counter, key)]
    random = torch.stack(words, dim=-1)
    shifts = torch.arange(0, 32, 8, device=random.device)
    kept = ((random[..., None] >> shifts) & 0xFF) <= math.floor((1.0 - dropout_p) * 255)
    # (plane, tile, a, tile, b, row half, column half, row, column): elements in the order of i, j.
    kept = kept.view(batch * heads, row_tiles, 4, column_tiles, 4, 2, 2, 2, 2)
    kept = kept.permute(0, 1, 5, 2, 7, 3, 6, 4, 8)
    kept = kept.reshape(batch, heads, _TILE * row_tiles, _TILE * column_tiles)
    return kept[:, :, :seqlen_q, :seqlen_k]
