"""flash_attn.modules.mha against attention written out with torch, and its cache against none."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import on_devices, usual_dtype
from torch import Tensor

from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from flash_attn.utils.generation import InferenceParams

WIDTH, HEADS = 64, 4

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "grouped": {"causal": True, "num_heads_kv": 2},
    "rotary": {"causal": True, "rotary_emb_dim": 8},
    "rotary grouped": {"num_heads_kv": 1, "rotary_emb_dim": 16, "rotary_emb_interleaved": True},
    "xpos": {"causal": True, "rotary_emb_dim": 16, "rotary_emb_scale_base": 32.0},
    "alibi": {"causal": True, "use_alibi": True},
    "window": {"causal": True, "window_size": (4, 0)},
    "scale, no bias": {"softmax_scale": 0.5, "qkv_proj_bias": False, "out_proj_bias": False},
    "dwconv": {"causal": True, "dwconv": True},
    "cross": {"cross_attn": True, "num_heads_kv": 2},
    "cross dwconv": {"cross_attn": True, "dwconv": True},
}


def expected(mha: MHA, x: Tensor, x_kv: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The output of the module's parameters, one step of torch after the other."""
    heads_kv = options.get("num_heads_kv", HEADS)
    if options.get("cross_attn"):
        q, kv = mha.Wq(x), mha.Wkv(x if x_kv is None else x_kv)
        if options.get("dwconv"):
            q, kv = conv(mha.dwconv_q, q), conv(mha.dwconv_kv, kv)
        k, v = kv.chunk(2, dim=-1)
    else:
        qkv = mha.Wqkv(x)
        if options.get("dwconv"):
            qkv = conv(mha.dwconv_qkv, qkv)
        q, k, v = qkv.split((WIDTH, 16 * heads_kv, 16 * heads_kv), dim=-1)
    q, k, v = (t.unflatten(-1, (-1, 16)) for t in (q, k, v))
    if options.get("rotary_emb_dim"):
        base, interleaved = 10000.0, options.get("rotary_emb_interleaved", False)
        rotary = RotaryEmbedding(
            options["rotary_emb_dim"], base, interleaved, options.get("rotary_emb_scale_base")
        ).to(x.device)
        kv = torch.stack((k, v), dim=2)
        q, kv = rotary(q.clone(), kv)
        k, v = kv.unbind(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    rows, keys = q.shape[2], k.shape[2]
    distance = torch.arange(keys, device=x.device) - torch.arange(rows, device=x.device)[:, None]
    bias = torch.zeros(HEADS, rows, keys, device=x.device)
    if options.get("use_alibi"):
        slopes = torch.tensor(get_alibi_slopes(HEADS), device=x.device)
        bias = bias - slopes[:, None, None] * distance.abs()
    if options.get("causal"):
        bias = bias.masked_fill(distance > 0, float("-inf"))
    if "window_size" in options:
        bias = bias.masked_fill(distance < -options["window_size"][0], float("-inf"))
    scale = options.get("softmax_scale")
    out = F.scaled_dot_product_attention(
        q, k, v, bias.to(q.dtype), scale=scale, enable_gqa=heads_kv != HEADS
    )
    return mha.out_proj(out.transpose(1, 2).flatten(2))


def conv(convolution: torch.nn.Conv1d, x: Tensor) -> Tensor:
    """Each token with the two before it."""
    weight, bias = convolution.weight[:, 0], convolution.bias
    padded = F.pad(x, (0, 0, 2, 0))
    return sum(padded[:, n : n + x.shape[1]] * weight[:, n] for n in range(3)) + bias


@on_devices
@pytest.mark.parametrize("use_flash_attn", [False, True], ids=["standard", "tiled"])
@pytest.mark.parametrize("name", VARIANTS)
def test_output_and_gradients(name: str, use_flash_attn: bool, device: str) -> None:
    options = VARIANTS[name]
    if not use_flash_attn and name in ("alibi", "window"):
        with pytest.raises(ValueError, match="use_flash_attn: expected True beside"):
            MHA(WIDTH, HEADS, **options)
        return
    dtype = usual_dtype(device)
    mha = MHA(WIDTH, HEADS, use_flash_attn=use_flash_attn, device=device, dtype=dtype, **options)
    x = torch.randn(2, 21, WIDTH, device=device, dtype=dtype, requires_grad=True)
    x_kv = torch.randn(2, 13, WIDTH, device=device, dtype=dtype) if "cross" in name else None
    out = mha(x, x_kv)
    want = expected(mha, x, x_kv, options)
    bound = {"rtol": 1e-4, "atol": 1e-5} if device == "cpu" else {"rtol": 5e-2, "atol": 5e-2}
    torch.testing.assert_close(out, want, **bound)
    leaves = (x, *mha.parameters())
    dout = torch.randn_like(out)
    gradients = [torch.autograd.grad(t, leaves, dout, retain_graph=True) for t in (out, want)]
    for got, other in zip(*gradients, strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(got / scale, other / scale, **bound)


@on_devices
@pytest.mark.parametrize("name", ["plain", "grouped", "rotary", "xpos", "alibi", "window"])
def test_packed_sequences_are_those_one_by_one(name: str, device: str) -> None:
    dtype = usual_dtype(device)
    mha = MHA(WIDTH, HEADS, use_flash_attn=True, device=device, dtype=dtype, **VARIANTS[name])
    x = torch.randn(20, WIDTH, device=device, dtype=dtype)
    cu_seqlens = torch.tensor([0, 7, 7, 20], dtype=torch.int32, device=device)
    out = mha(x, cu_seqlens=cu_seqlens, max_seqlen=13)
    bound = {"rtol": 1e-4, "atol": 1e-5} if device == "cpu" else {"rtol": 5e-2, "atol": 5e-2}
    for part in (slice(0, 7), slice(7, 20)):
        # The centre of XPos depends on how many positions were asked for.
        want = mha(x[None, part], max_seqlen=13)[0]
        torch.testing.assert_close(out[part], want, **bound)


@on_devices
@pytest.mark.parametrize("use_flash_attn", [False, True], ids=["standard", "tiled"])
@pytest.mark.parametrize("name", ["causal", "grouped", "rotary", "xpos", "alibi", "window"])
def test_decoding_with_a_cache_gives_what_the_whole_does(
    name: str, use_flash_attn: bool, device: str
) -> None:
    options = VARIANTS[name]
    if not use_flash_attn and name in ("alibi", "window"):
        return
    dtype = usual_dtype(device)
    kind: dict[str, Any] = {"device": device, "dtype": dtype}
    mha = MHA(WIDTH, HEADS, layer_idx=3, use_flash_attn=use_flash_attn, **options, **kind).eval()
    x = torch.randn(2, 12, WIDTH, **kind)
    # Caches are larger than the batch, which begins at their second entry.
    params = InferenceParams(max_seqlen=12, max_batch_size=4, batch_size_offset=1)
    cache = mha.allocate_inference_cache(4, 12).fill_(float("nan"))
    params.key_value_memory_dict[3] = cache
    whole = mha(x, max_seqlen=12)
    bound = {"rtol": 1e-4, "atol": 1e-5} if device == "cpu" else {"rtol": 5e-2, "atol": 5e-2}
    with torch.no_grad():
        for start, end in ((0, 5), (5, 6), (6, 7), (7, 10), (10, 12)):
            params.seqlen_offset = start
            out = mha(x[:, start:end], inference_params=params)
            torch.testing.assert_close(out, whole[:, start:end], **bound)
    assert params.key_value_memory_dict[3] is cache and cache.shape == (4, 12, 2, *cache.shape[3:])
    assert cache[1:3].isfinite().all() and cache[0].isnan().all() and cache[3].isnan().all()


@on_devices
def test_decoding_of_sequences_of_different_lengths(device: str) -> None:
    dtype = usual_dtype(device)
    options: dict[str, Any] = {"causal": True, "rotary_emb_dim": 8, "use_flash_attn": True}
    mha = MHA(WIDTH, HEADS, layer_idx=0, device=device, dtype=dtype, **options).eval()
    x = torch.randn(2, 9, WIDTH, device=device, dtype=dtype)
    params = InferenceParams(max_seqlen=16, max_batch_size=2)
    bound = {"rtol": 1e-4, "atol": 1e-5} if device == "cpu" else {"rtol": 5e-2, "atol": 5e-2}
    with torch.no_grad():
        mha(x[:, :8], inference_params=params)
        params.seqlen_offset = 8
        params.lengths_per_sample = torch.tensor([8, 4], dtype=torch.int32, device=device)
        out = mha(x[:, 8:], inference_params=params)
        for b, length in enumerate((8, 4)):
            tokens = torch.cat((x[b, :length], x[b, 8:]))
            torch.testing.assert_close(out[b, 0], mha(tokens[None])[0, -1], **bound)
    params.reset(16, 2)
    assert params.seqlen_offset == 0 and not params.lengths_per_sample.any()


@pytest.mark.parametrize("use_flash_attn", [False, True], ids=["standard", "tiled"])
@pytest.mark.parametrize("num_heads_kv", [4, 2])
def test_checkpointing_changes_nothing(num_heads_kv: int, use_flash_attn: bool) -> None:
    options = {"num_heads_kv": num_heads_kv, "causal": True, "dropout": 0.3}
    mha = MHA(WIDTH, HEADS, use_flash_attn=use_flash_attn, return_residual=True, **options)
    x = torch.randn(2, 11, WIDTH, requires_grad=True)
    results = []
    for mha.checkpointing in (False, True):
        torch.manual_seed(4)
        out, residual = mha(x)
        assert residual is x
        results.append(torch.autograd.grad(out.square().sum(), (x, *mha.parameters())))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    torch.manual_seed(5)
    assert not torch.equal(mha(x)[0], out), "dropout is on"
    mha.eval()
    assert torch.equal(mha(x)[0], mha(x)[0])


def test_attention_modules_agree() -> None:
    qkv = torch.randn(2, 9, 3, 4, 16)
    q, kv = torch.randn(2, 5, 4, 16), torch.randn(2, 9, 2, 2, 16)
    for causal in (False, True):
        want = SelfAttention(causal)(qkv)
        torch.testing.assert_close(FlashSelfAttention()(qkv, causal=causal), want)
        want = CrossAttention()(q, kv, causal=causal)
        torch.testing.assert_close(FlashCrossAttention(causal)(q, kv), want)
    borders = torch.tensor([0, 9, 18], dtype=torch.int32)
    packed = FlashSelfAttention(True)(qkv.flatten(0, 1), cu_seqlens=borders, max_seqlen=9)
    torch.testing.assert_close(packed.view(2, 9, 4, 16), SelfAttention(True)(qkv))
    borders_q = torch.tensor([0, 5, 10], dtype=torch.int32)
    lengths = (borders_q, 5, borders, 9)
    packed = FlashCrossAttention()(q.flatten(0, 1), kv.flatten(0, 1), None, *lengths)
    torch.testing.assert_close(packed.view(2, 5, 4, 16), CrossAttention()(q, kv))


def test_keys_of_padding_take_no_part() -> None:
    mha = MHA(WIDTH, HEADS, num_heads_kv=2)
    x = torch.randn(2, 8, WIDTH)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, 5:] = False
    out = mha(x, key_padding_mask=mask)
    torch.testing.assert_close(out[1, :5], mha(x[1:, :5])[0])
    torch.testing.assert_close(out[0], mha(x)[0])
    nothing = CrossAttention()(torch.randn(1, 2, 2, 8), torch.randn(1, 3, 2, 2, 8), None,
                               torch.zeros(1, 3, dtype=torch.bool))  # fmt: skip
    assert not nothing.any()


def test_mixer_subset_asks_with_some_tokens() -> None:
    mha = MHA(WIDTH, HEADS, cross_attn=True)
    x = torch.randn(2, 8, WIDTH)
    torch.testing.assert_close(mha(x, mixer_subset=slice(0, 1)), mha(x)[:, :1])


def test_slopes() -> None:
    assert get_alibi_slopes(8) == pytest.approx([2.0**-n for n in range(1, 9)])
    assert get_alibi_slopes(1) == pytest.approx([2.0**-8])
    twelve = get_alibi_slopes(12)
    assert twelve[:8] == pytest.approx(get_alibi_slopes(8))
    assert twelve[8:] == pytest.approx([math.sqrt(0.5) ** n for n in (1, 3, 5, 7)])


BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"num_heads": 5}, {}, r"embed_dim: expected a multiple of num_heads \(5\), got 64"),
    ({"num_heads_kv": 3}, {}, r"num_heads: expected a multiple of num_heads_kv \(3\), got 4"),
    ({"cross_attn": True, "rotary_emb_dim": 8}, {}, "rotary_emb_dim: expected 0 beside cross_attn"),
    ({}, {"x": torch.zeros(2, 5, 32)}, r"x: expected shape \(batch, seqlen, embed_dim = 64\)"),
    ({}, {"cu_seqlens": torch.zeros(2)}, "use_flash_attn: expected True with packed sequences"),
    (
        {"use_flash_attn": True},
        {"key_padding_mask": torch.ones(2, 5)},
        "key_padding_mask: expected",
    ),
    ({}, {"inference_params": InferenceParams(8, 2)}, "layer_idx: expected a number beside"),
    (
        {"layer_idx": 0, "dwconv": True},
        {"inference_params": InferenceParams(8, 2)},
        "inference_params: expected None with",
    ),
    (
        {"layer_idx": 0},
        {"inference_params": InferenceParams(3, 2)},
        "max_seqlen: expected room for 5 rows in the cache, got 3",
    ),
    (
        {"use_flash_attn": True},
        {"x": torch.zeros(5, 64), "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)},
        "max_seqlen: expected an integer beside cu_seqlens, got None",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_errors(number: int) -> None:
    made, called, text = BAD[number]
    with pytest.raises(ValueError, match="^" + text):
        MHA(**{"embed_dim": WIDTH, "num_heads": HEADS, **made})(
            **{"x": torch.zeros(2, 5, WIDTH), **called}
        )
