"""Padded batches to packed tokens and back, for the programs that import these names.

A padded batch is (batch, seqlen, ...) with a (batch, seqlen) mask, nonzero where a token is; packed
tokens are (total, ...), those of one sequence after those of another. All functions are
differentiable, on any device. Reading how long the longest sequence is waits for the device.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def index_first_axis(x: Tensor, indices: Tensor) -> Tensor:
    """x[indices]: rows of x, (rows, ...), by number, (total,) int64 or int32."""
    return x.index_select(0, indices)


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """(first_axis_dim, ...) with values, (total, ...), at rows indices, each once; else zeros."""
    padded = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return padded.index_copy(0, indices.long(), values)  # callers decode with int32 borders as rows


def index_first_axis_residual(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """x[indices], and x without a copy for a residual branch beside it."""
    return index_first_axis(x, indices), x


class IndexFirstAxis:
    apply = staticmethod(index_first_axis)


class IndexPutFirstAxis:
    apply = staticmethod(index_put_first_axis)


class IndexFirstAxisResidual:
    apply = staticmethod(index_first_axis_residual)


def _check_mask(name: str, mask: Tensor, hidden_states: Tensor) -> None:
    if hidden_states.dim() < 2 or mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name}: expected shape (batch, seqlen) = {tuple(hidden_states.shape[:2])} of "
            f"hidden_states, got {tuple(mask.shape)}"
        )


def _packed(
    hidden_states: Tensor, is_token: Tensor, seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Tokens where is_token, their rows, and the borders and the longest of `seqlens`, int32."""
    indices = is_token.flatten().nonzero().flatten()
    cu_seqlens = F.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))
    max_seqlen = int(seqlens.max().item()) if seqlens.numel() else 0
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, cu_seqlens, max_seqlen


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens of a padded batch, one sequence after the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int, nonzero where a token takes part.
        unused_mask: (batch, seqlen), nonzero where a token is kept but takes no part in attention.

    Returns:
        tokens (total, ...); indices (total,) int64, their rows in the flattened batch; cu_seqlens
        (batch + 1,) int32, where sequences begin and end in `tokens`; max_seqlen, the longest of
        them; seqused (batch,) int32, how many of a sequence's tokens take part.

    Raises:
        ValueError: a mask has another shape than (batch, seqlen).
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    is_used = attention_mask != 0
    is_token = is_used
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        is_token = is_used | (unused_mask != 0)
    seqlens, seqused = (m.sum(dim=-1, dtype=torch.int32) for m in (is_token, is_used))
    return *_packed(hidden_states, is_token, seqlens), seqused


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """As unpad_input() where a row of the batch holds several sequences one after the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen) int: the lengths of the sequences of a row, in
            order, and zeros.

    Returns:
        tokens (total, ...); indices (total,) int64; cu_seqlens (sequences + 1,) int32; max_seqlen.

    Raises:
        ValueError: the lengths have another shape, or a row's are more than seqlen together.
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    seqlen = hidden_states.shape[1]
    row_lengths = attention_mask_in_length.sum(dim=-1)
    if row_lengths.numel() and int(row_lengths.max().item()) > seqlen:
        raise ValueError(
            f"attention_mask_in_length: expected lengths of a row that add up to at most "
            f"seqlen = {seqlen}, got {int(row_lengths.max().item())}"
        )
    is_token = torch.arange(seqlen, device=hidden_states.device) < row_lengths[:, None]
    lengths = attention_mask_in_length.flatten()
    return _packed(hidden_states, is_token, lengths[lengths != 0].to(torch.int32))


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The padded batch of packed tokens: what unpad_input() did, undone.

    Args:
        hidden_states: (total, ...).
        indices: (total,) int64 or int32, as unpad_input() returned them.
        batch, seqlen: of the padded batch.

    Returns:
        (batch, seqlen, ...), zero where no token is.
    """
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return padded.view(batch, seqlen, *hidden_states.shape[1:])


def __getattr__(name: str) -> Any:
    """einops' functions, which some programs import from here."""
    if name in ("rearrange", "repeat"):
        try:
            einops = importlib.import_module("einops")
        except ImportError as error:
            raise ImportError(
                f"flash_attn.bert_padding.{name} is einops.{name}: install einops, or import "
                "nothing but this module's own functions"
            ) from error
        return getattr(einops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
