"""Rotary embedding against multiplication by complex numbers in fp64."""

from __future__ import annotations

import pytest
import torch
from backends import on_devices, usual_dtype
from torch import Tensor

from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)

in_layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])


def angles(positions: int, rotary_dim: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    even = torch.arange(0, rotary_dim, 2, dtype=torch.float64)
    turns = torch.outer(torch.arange(positions, dtype=torch.float64), 100.0 ** (-even / rotary_dim))
    return turns.cos().to(device), turns.sin().to(device)


def exact(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x, (..., tokens, heads, head_dim), its tokens at `positions`, (..., tokens)."""
    half = cos.shape[1]
    out = x.double().clone()
    columns = torch.arange(2 * half, device=x.device)
    first, second = (columns[::2], columns[1::2]) if interleaved else columns.split(half)
    pairs = torch.complex(out[..., first], out[..., second])
    turned = pairs * torch.complex(cos.double(), sin.double())[positions][..., None, :]
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


@on_devices
@in_layouts
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("rotary_dim", [8, 6])
@pytest.mark.parametrize("offset", [0, 3, (0, 4, 2)], ids=str)
def test_padded(
    offset: int | tuple[int, ...], rotary_dim: int, inplace: bool, interleaved: bool, device: str
) -> None:
    dtype = usual_dtype(device)
    x = torch.randn(3, 7, 2, 8, device=device, dtype=dtype)
    cos, sin = (t.to(dtype) for t in angles(12, rotary_dim, device))
    offsets = torch.tensor(offset, device=device) if isinstance(offset, tuple) else offset
    per_batch = torch.tensor(offset, device=device).expand(3)
    positions = per_batch[:, None] + torch.arange(7, device=device)
    want = exact(x, cos, sin, positions, interleaved)
    got = apply_rotary_emb(x, cos, sin, interleaved, inplace, offsets)
    assert (got is x) == inplace and got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=1e-2 if dtype.itemsize == 2 else 1e-6,
                               atol=1e-2 if dtype.itemsize == 2 else 1e-6)  # fmt: skip


@on_devices
@in_layouts
@pytest.mark.parametrize("offset", [0, (1, 0, 5)], ids=str)
def test_packed(offset: int | tuple[int, ...], interleaved: bool, device: str) -> None:
    """With an empty sequence, and rows past the last, which stay as they are."""
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32, device=device)
    x = torch.randn(11, 2, 8, device=device)
    cos, sin = (t.float() for t in angles(12, 8, device))
    offsets = torch.tensor(offset, device=device) if isinstance(offset, tuple) else offset
    starts = torch.tensor(offset, device=device).expand(3).tolist()
    positions = [*range(starts[0], starts[0] + 4), *range(starts[2], starts[2] + 5)]
    want = exact(x[:9], cos, sin, torch.tensor(positions, device=device), interleaved)
    got = apply_rotary_emb(
        x, cos, sin, interleaved, seqlen_offsets=offsets, cu_seqlens=cu_seqlens, max_seqlen=5
    )
    torch.testing.assert_close(got[:9].double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(got[9:], x[9:])


def test_positions_past_the_angles_are_left_alone() -> None:
    x = torch.randn(2, 5, 1, 4)
    cos, sin = (t.float() for t in angles(6, 4))
    got = apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.tensor([0, 4]))
    assert torch.equal(got[1, 2:], x[1, 2:]) and not torch.equal(got[1, :2], x[1, :2])


@in_layouts
def test_gradients(interleaved: bool) -> None:
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)
    cos, sin = angles(8, 4)
    for offsets in (1, torch.tensor([0, 3])):
        assert torch.autograd.gradcheck(
            lambda t, o=offsets: apply_rotary_emb(t, cos, sin, interleaved, seqlen_offsets=o), x
        )
        assert torch.autograd.gradcheck(
            lambda t, o=offsets: apply_rotary_emb(t * 1, cos, sin, interleaved, True, o), x
        )
    packed = torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda t: apply_rotary_emb(t, cos, sin, interleaved, cu_seqlens=cu_seqlens), packed
    )


@in_layouts
def test_packed_queries_keys_and_values(interleaved: bool) -> None:
    """In place, through views of one tensor, with gradients."""
    (cos, sin), (cos_k, sin_k) = angles(9, 6), (t * 2 for t in angles(9, 6))
    positions = torch.arange(7) + 2

    def want(t: Tensor, keys: bool = False) -> Tensor:
        return exact(t, *((cos_k, sin_k) if keys else (cos, sin)), positions, interleaved)

    for shape, num_heads_q in (((2, 7, 3, 4, 8), None), ((2, 7, 8, 8), 4)):
        qkv = torch.randn(*shape, dtype=torch.float64)
        got = apply_rotary_emb_qkv_(
            qkv.clone(), cos, sin, cos_k, sin_k, interleaved, 2, num_heads_q
        )
        cut = (lambda t: t.unbind(2)) if num_heads_q is None else (lambda t: t.split((4, 2, 2), 2))
        (q, k, v), (got_q, got_k, got_v) = cut(qkv), cut(got)
        torch.testing.assert_close(got_q, want(q))
        torch.testing.assert_close(got_k, want(k, keys=True))
        assert torch.equal(got_v, v)
        leaf = qkv.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda t, n=num_heads_q: apply_rotary_emb_qkv_(
                t * 1, cos, sin, cos_k, sin_k, interleaved, 2, n
            ),
            leaf[:1, :2].detach().requires_grad_(),
        )
    kv = torch.randn(2, 7, 2, 3, 8, dtype=torch.float64)
    got = apply_rotary_emb_kv_(kv.clone(), cos, sin, interleaved, 2)
    torch.testing.assert_close(got[:, :, 0], want(kv[:, :, 0]))
    assert torch.equal(got[:, :, 1], kv[:, :, 1])


@in_layouts
def test_written_out_version(interleaved: bool) -> None:
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    cos, sin = angles(7, 6)
    got = apply_rotary_emb_torch(x, cos, sin, interleaved)
    torch.testing.assert_close(got, exact(x, cos, sin, torch.arange(7), interleaved))
    quarter = rotate_half(rotate_half(x, interleaved), interleaved)
    assert torch.equal(quarter, -x)
    assert apply_rotary_emb_func is apply_rotary_emb


@pytest.mark.parametrize("scale_base", [None, 16.0])
@in_layouts
def test_module_makes_scores_of_distances_alone(
    interleaved: bool, scale_base: float | None
) -> None:
    """Scores of the same query and key depend on how far apart they are, not on where."""
    rotary = RotaryEmbedding(8, interleaved=interleaved, scale_base=scale_base)
    q, k = torch.randn(2, 1, 1, 2, 8).unbind(0)
    qkv = torch.stack((q, k, k), dim=2).expand(1, 12, 3, 2, 8).contiguous()
    out = rotary(qkv)
    assert out is qkv
    scores = torch.einsum("bqhd,bkhd->bhqk", out[:, :, 0], out[:, :, 1])
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance, dim1=-2, dim2=-1)
        torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal))
    apart = rotary(
        q.expand(1, 12, 2, 8).contiguous(), torch.stack((k, k), 2).repeat(1, 12, 1, 1, 1)
    )
    torch.testing.assert_close(apart[0], out[:, :, 0])
    torch.testing.assert_close(apart[1], out[:, :, 1:])


def test_module_keeps_angles_and_makes_more_when_asked() -> None:
    rotary = RotaryEmbedding(8)
    first = torch.randn(1, 10, 3, 2, 8)
    whole = rotary(first.clone())
    kept = rotary._cos_cached
    rotary(first[:, :4].clone())
    assert rotary._cos_cached is kept and kept is not None and kept.shape == (10, 4)
    step = rotary(first[:, 9:].clone(), seqlen_offset=9)
    torch.testing.assert_close(step, whole[:, 9:])
    rotary(first.clone(), seqlen_offset=5)
    assert rotary._cos_cached is not None and rotary._cos_cached.shape[0] == 15
    rotary(first.bfloat16(), max_seqlen=20, seqlen_offset=torch.tensor([3]))
    assert rotary._cos_cached.shape[0] == 20 and rotary._cos_cached.dtype == torch.bfloat16
    assert not rotary.state_dict(), "angles are made, not saved"


def test_module_takes_its_frequencies_from_its_buffer_unless_that_was_cast() -> None:
    qkv = torch.randn(1, 300, 3, 2, 8)
    usual = RotaryEmbedding(8)
    whole = usual(qkv.clone())
    half_precision = RotaryEmbedding(8).bfloat16()
    assert half_precision.inv_freq.dtype == torch.bfloat16
    assert torch.equal(half_precision(qkv.clone()), whole)
    slower = RotaryEmbedding(8)
    slower.inv_freq /= 2
    every_second = slower(qkv[:, :150].repeat_interleave(2, dim=1))[:, ::2]
    torch.testing.assert_close(every_second, whole[:, :150], rtol=1e-4, atol=1e-4)


def test_errors_say_what_was_expected() -> None:
    x = torch.randn(2, 5, 2, 8)
    cos, sin = (t.float() for t in angles(6, 8))
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, seqlen, heads, head_dim\)"):
        apply_rotary_emb(x[0], cos, sin)
    with pytest.raises(ValueError, match=r"packed by cu_seqlens, got \(2, 5, 2, 8\)"):
        apply_rotary_emb(x, cos, sin, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"cos, sin: expected one shape .*\(6, 4\) and \(5, 4\)"):
        apply_rotary_emb(x, cos, sin[:5])
    with pytest.raises(ValueError, match=r"rotary_dim = 2 \* 4 .*head_dim of x, 6"):
        apply_rotary_emb(x[..., :6], cos, sin)
    with pytest.raises(ValueError, match=r"seqlen \+ seqlen_offsets = 7 positions .* got 6"):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=2)
    with pytest.raises(ValueError, match=r"qkv: expected shape .* with num_heads_q = None"):
        apply_rotary_emb_qkv_(x, cos, sin)
    with pytest.raises(ValueError, match=r"kv: expected shape"):
        apply_rotary_emb_kv_(x, cos, sin)
    with pytest.raises(ValueError, match=r"max_seqlen: expected the most positions"):
        RotaryEmbedding(8)(x[:, :, None].expand(2, 5, 3, 2, 8), seqlen_offset=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"dim: expected an even number of columns, got 7"):
        RotaryEmbedding(7)
