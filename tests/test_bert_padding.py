"""Padded batches to packed tokens and back, against loops over the tokens."""

from __future__ import annotations

import sys

import pytest
import torch
from backends import on_devices

from flash_attn import bert_padding
from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASKS = {
    "right_padded": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left_padded": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [0, 0, 1, 1, 0]],
    "one_empty": [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]],
    "all_empty": [[0] * 5] * 3,
    "all_full": [[1] * 5] * 3,
}


@on_devices
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_unpad_and_pad(name: str, dtype: torch.dtype, device: str) -> None:
    mask = torch.tensor(MASKS[name], device=device)
    x = torch.randn(3, 5, 2, 4, device=device, requires_grad=True)
    tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask.to(dtype))
    kept = [(b, s) for b in range(3) for s in range(5) if MASKS[name][b][s]]
    lengths = [sum(row) for row in MASKS[name]]
    assert indices.tolist() == [5 * b + s for b, s in kept]
    assert cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(4)]
    assert cu_seqlens.dtype == seqused.dtype == torch.int32 and indices.dtype == torch.int64
    assert isinstance(max_seqlen, int) and max_seqlen == max(lengths)
    assert seqused.tolist() == lengths
    assert len(tokens) == len(kept)
    for token, (b, s) in zip(tokens, kept, strict=True):
        assert torch.equal(token, x[b, s])

    padded = pad_input(tokens, indices, 3, 5)
    assert torch.equal(padded, x * mask[:, :, None, None])
    gradient = torch.randn_like(padded)
    (dx,) = torch.autograd.grad(padded, x, gradient)
    assert torch.equal(dx, gradient * mask[:, :, None, None])


def test_tokens_that_are_kept_without_taking_part() -> None:
    used = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1]])
    x = torch.randn(2, 4, 3)
    tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, used, unused)
    assert indices.tolist() == [0, 1, 2, 4, 7]
    assert cu_seqlens.tolist() == [0, 3, 5] and max_seqlen == 3
    assert seqused.tolist() == [2, 1]
    assert torch.equal(tokens, x.flatten(0, 1)[indices])
    twice = unpad_input(x, used, used + unused)  # a token of both masks is one token
    assert torch.equal(twice[0], tokens) and twice[2].tolist() == [0, 3, 5]


def test_concatenated_sequences() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 1, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 4)
    tokens, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(x, lengths)
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 11, 17] and max_seqlen == 6
    assert cu_seqlens.dtype == torch.int32
    assert indices.tolist() == [*range(5), *range(6, 18)]
    assert torch.equal(tokens, x.flatten(0, 1)[indices])


@on_devices
def test_one_token_a_sequence_by_its_border(device: str) -> None:
    """As transformers decodes a padded batch: cu_seqlens without its end are the rows, int32."""
    tokens = torch.randn(3, 2, 4, device=device, requires_grad=True)
    cu_seqlens = torch.arange(4, dtype=torch.int32, device=device)
    padded = pad_input(tokens, cu_seqlens[:-1], 3, 1)
    assert torch.equal(padded, tokens[:, None])
    gradient = torch.randn_like(padded)
    assert torch.equal(torch.autograd.grad(padded, tokens, gradient)[0], gradient[:, 0])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_rows_by_number(dtype: torch.dtype) -> None:
    x = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 3], dtype=dtype)
    assert torch.autograd.gradcheck(lambda t: index_first_axis(t, indices), x)
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: index_put_first_axis(t, indices, 6), values)
    rows, residual = index_first_axis_residual(x, indices)
    assert torch.equal(rows, x[indices]) and residual is x
    assert torch.equal(bert_padding.IndexFirstAxis.apply(x, indices), rows)
    assert torch.equal(bert_padding.IndexFirstAxisResidual.apply(x, indices)[0], rows)
    put = bert_padding.IndexPutFirstAxis.apply(values, indices, 6)
    assert torch.equal(put[indices], values) and not put[[1, 2, 5]].any()


def test_no_sequences() -> None:
    tokens, indices, cu_seqlens, max_seqlen, seqused = unpad_input(
        torch.randn(0, 5, 2), torch.ones(0, 5)
    )
    assert tokens.shape == (0, 2) and cu_seqlens.tolist() == [0] and max_seqlen == 0
    assert indices.numel() == seqused.numel() == 0
    assert pad_input(tokens, indices, 0, 5).shape == (0, 5, 2)


def test_errors_say_what_was_expected() -> None:
    x = torch.randn(2, 4, 3)
    with pytest.raises(
        ValueError, match=r"attention_mask: expected shape .*\(2, 4\).*got \(2, 5\)"
    ):
        unpad_input(x, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"unused_mask: expected shape .*got \(4,\)"):
        unpad_input(x, torch.ones(2, 4), torch.ones(4))
    with pytest.raises(ValueError, match=r"at most seqlen = 4, got 5"):
        unpad_input_for_concatenated_sequences(x, torch.tensor([[3, 2, 0, 0], [1, 0, 0, 0]]))


def test_einops_is_there_for_who_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stand:
        rearrange = staticmethod(len)

    monkeypatch.setitem(sys.modules, "einops", Stand)
    assert bert_padding.rearrange is len
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ImportError, match=r"bert_padding\.repeat is einops\.repeat: install"):
        _ = bert_padding.repeat
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = bert_padding.nothing
