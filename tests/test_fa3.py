"""The companion distribution flash-attn-3: signatures, schemas, results beside the reference."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from pathlib import Path
from typing import Any

import flash_attn_interface
import pytest
import torch
from backends import on_backends, on_devices, usual_dtype
from cases import Case, make_gradients, make_inputs
from compare import Results, assert_nearly_equal, check_results, gradients
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn import flash_attn_with_kvcache as cached_attention
from flash_attn.version import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT = (ROOT / "companion/flash_attn_3/pyproject.toml").read_text()
SCALES = "q_descale=None, k_descale=None, v_descale=None"
WORK = "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False"
OPTIONS = f"{SCALES}, window_size=(-1, -1), attention_chunk=0, softcap=0.0"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, softmax_scale=None, causal=False, qv=None, {OPTIONS}, {WORK}",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
    f"seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, {OPTIONS}, {WORK}",
    "flash_attn_qkvpacked_func": f"qkv, softmax_scale=None, causal=False, {OPTIONS}, "
    "deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, "
    "rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
    "page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, "
    f"rotary_seqlens=None, {SCALES}, softmax_scale=None, causal=False, window_size=(-1, -1), "
    "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, "
    "num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False",
    "flash_attn_combine": "out_partial, lse_partial, out=None, out_dtype=None",
    "get_scheduler_metadata": "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, "
    "headdim, cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, "
    "cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, "
    "window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0, pack_gqa=None, "
    "sm_margin=0",
}
# What xformers compares the ops with.
BWD_SCHEMA = (
    "flash_attn_3::bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(dq!)? dq=None, Tensor(dk!)? dk=None, Tensor(dv!)? dv=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, "
    "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, float softcap=0., "
    "bool deterministic=False, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
FWD_NAMES = (
    "q k v k_new v_new q_v out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k "
    "max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin "
    "seqlens_rotary q_descale k_descale v_descale softmax_scale is_causal window_size_left "
    "window_size_right attention_chunk softcap is_rotary_interleaved scheduler_metadata num_splits "
    "pack_gqa sm_margin"
)
CAUSAL = Case("gqa_causal", heads=4, heads_k=2, seqlen_q=70, seqlen_k=110, causal=True)
EMPTY_ROWS = Case("empty_rows", heads=4, heads_k=2, seqlen_q=70, seqlen_k=40, causal=True)
WINDOW = Case("window", heads=3, heads_k=3, seqlen_q=70, seqlen_k=70, window=(9, 4))
CASES = [CAUSAL, EMPTY_ROWS, WINDOW, Case("scaled", head_dim=32, scale=-0.3)]


def parameters(text: str) -> dict[str, Any]:
    """Names and defaults, in order."""
    names: dict[str, Any] = {"torch": torch}
    exec(f"def function({text}): pass", names)
    return defaults(names["function"])


def defaults(function: Any) -> dict[str, Any]:
    signature = inspect.signature(function)
    return {name: parameter.default for name, parameter in signature.parameters.items()}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    ours, expected = defaults(getattr(flash_attn_interface, name)), parameters(SIGNATURES[name])
    assert list(ours) == list(expected) and ours == expected


def test_the_companion_requires_this_version() -> None:
    local = re.findall(r'^version = "3\.0\.0\+(.*)"$', PROJECT, re.MULTILINE)
    assert f'dependencies = ["flash-attn=={__version__}"]' in PROJECT
    assert local == [__version__.split("+")[1]]


def test_the_ops_and_their_module() -> None:
    importlib.import_module("flash_attn_3._C")
    schema = torch.ops.flash_attn_3.fwd.default._schema
    assert [argument.name for argument in schema.arguments] == FWD_NAMES.split()
    writes = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert writes == ["k_new", "v_new", "out"] and len(schema.returns) == 4
    backward = torch.ops.flash_attn_3.bwd.default._schema
    assert backward.is_backward_compatible_with(torch._C.parse_schema(BWD_SCHEMA))


def plus_inf(softmax_lse: Tensor) -> Tensor:
    """flash_attn's own mark of rows without keys; there must be none yet."""
    assert not (softmax_lse == math.inf).any()
    return torch.where(softmax_lse == -math.inf, math.inf, softmax_lse)


@on_backends
@pytest.mark.parametrize("case", CASES, ids=str)
def test_functions_are_exact(case: Case, device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype, device)
    dout, dlse = make_gradients(case, dtype, device)
    out, lse = flash_attn_interface.flash_attn_func(*inputs, **case.options, return_attn_probs=True)
    got = Results(out, plus_inf(lse), *gradients(out, lse, inputs, dout, dlse))
    check_results(case, inputs, dout, dlse, got)
    assert torch.equal(flash_attn_interface.flash_attn_func(*inputs, **case.options), out)


@on_devices
@pytest.mark.parametrize("layout", ["new", "bshd", "bhsd"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ops_are_exact(case: Case, layout: str, device: str) -> None:
    """Called as torch does it, with tensors to write to."""
    dtype = usual_dtype(device)
    inputs = make_inputs(case, dtype, device)
    q, k, v = (tensor.detach() for tensor in inputs)
    dout, dlse = make_gradients(case, dtype, device)
    given = None
    if layout != "new":
        given = torch.full_like(q, math.nan)
        if layout == "bhsd":
            given = given.transpose(1, 2).contiguous().transpose(1, 2)
    options = dict(softmax_scale=case.scale, is_causal=case.causal)
    options |= dict(window_size_left=case.window[0], window_size_right=case.window[1])
    out, lse, *nothing = torch.ops.flash_attn_3.fwd(q, k, v, out=given, **options)
    assert given is None or out is given
    assert [tensor.numel() for tensor in nothing] == [0, 0]
    written = [torch.full_like(tensor, math.nan) for tensor in (q, k, v)]
    results = torch.ops.flash_attn_3.bwd(dout, q, k, v, out, lse, *written, **options)
    assert len(results) == 5 and not results[0].isnan().any()
    got = Results(out.contiguous(), plus_inf(lse), *written)
    check_results(case, inputs, dout, torch.zeros_like(dlse), got)


BORDERS_Q, BORDERS_K = [0, 30, 30, 71, 80], [0, 5, 60, 105, 120]


def packed(device: str, requires_grad: bool = False) -> tuple[Tensor, ...]:
    kind: Any = dict(device=device, dtype=usual_dtype(device), requires_grad=requires_grad)
    borders = [torch.tensor(b, dtype=torch.int32, device=device) for b in (BORDERS_Q, BORDERS_K)]
    q, k, v = torch.randn(80, 4, 32, **kind), *torch.randn(2, 120, 2, 32, **kind).unbind(0)
    return q, k, v, *borders


@on_devices
def test_packed_sequences(device: str) -> None:
    q, k, v, *borders = packed(device, requires_grad=True)
    options = dict(causal=True, softcap=3.0, deterministic=True)
    given = (q, k, v, *borders, 41, 55)
    out, lse = flash_attn_interface.flash_attn_varlen_func(
        *given, **options, return_attn_probs=True
    )
    expected, expected_lse, _ = flash_attn_varlen_func(*given, **options, return_attn_probs=True)
    assert torch.equal(out, expected) and torch.equal(plus_inf(lse), expected_lse)
    assert (lse == -math.inf).any()
    grads, expected_grads = (torch.autograd.grad(o.sum(), (q, k, v)) for o in (out, expected))
    assert all(torch.equal(*pair) for pair in zip(grads, expected_grads, strict=True))
    with torch.no_grad():
        used = torch.tensor([5, 20, 0, 9], dtype=torch.int32, device=device)
        short = flash_attn_interface.flash_attn_varlen_func(*given, seqused_k=used, causal=True)
        assert not short[30:71].any()
        one = flash_attn_func(q[None, 71:], k[None, 105:114], v[None, 105:114], causal=True)
        assert_nearly_equal(short[71:], one[0])
    with pytest.raises(NotImplementedError, match="seqused_k: expected None where gradients"):
        flash_attn_interface.flash_attn_varlen_func(*given, seqused_k=used)


@on_devices
def test_qkvpacked(device: str) -> None:
    heads = torch.randn(2, 40, 8, 32, device=device, dtype=usual_dtype(device))
    q, k, v = heads.split([4, 2, 2], dim=2)
    out = flash_attn_interface.flash_attn_qkvpacked_func(heads, causal=True, num_heads_q=4)
    assert torch.equal(out, flash_attn_func(q, k, v, causal=True))
    qkv = torch.stack([q, q + 1, q - 1], dim=2)
    out = flash_attn_interface.flash_attn_qkvpacked_func(qkv, 0.3)
    assert torch.equal(out, flash_attn_func(q, q + 1, q - 1, softmax_scale=0.3))
    for wrong, number in ((heads, None), (heads, 7), (heads, 8)):
        with pytest.raises(ValueError, match="qkv: expected shape"):
            flash_attn_interface.flash_attn_qkvpacked_func(wrong, num_heads_q=number)


@on_devices
@pytest.mark.parametrize("is_paged", [False, True])
def test_a_step_of_decoding(is_paged: bool, device: str) -> None:
    """Append, rotary embedding and pages, and the same through the op; packed queries."""
    kind: Any = dict(device=device, dtype=usual_dtype(device))
    q, k, v = (torch.randn(2, 3, heads, 32, **kind) for heads in (4, 2, 2))
    cos, sin = torch.rand(2, 64, 16, **kind).unbind(0)
    lengths = torch.tensor([7, 20], dtype=torch.int32, device=device)
    caches = torch.randn(2, *((8, 16) if is_paged else (2, 64)), 2, 32, **kind)
    table = torch.tensor([[3, 0, 1, 2], [5, 4, 7, 6]], dtype=torch.int32, device=device)
    pages = table if is_paged else None
    ours, theirs, by_op = caches.clone(), caches.clone(), caches.clone()
    out, lse, *nothing = flash_attn_interface.flash_attn_with_kvcache(
        q,
        *ours,
        k,
        v,
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=lengths,
        page_table=pages,
        causal=True,
        return_softmax_lse=True,
    )
    expected, expected_lse = cached_attention(
        q, *theirs, k, v, cos, sin, lengths, None, None, pages, causal=True, return_softmax_lse=True
    )
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert torch.equal(ours, theirs) and not torch.equal(ours, caches)
    assert len(nothing) == 2
    options: Any = dict(seqused_k=lengths, page_table=pages, rotary_cos=cos, rotary_sin=sin)
    op_out, op_lse, *_ = torch.ops.flash_attn_3.fwd(
        q, *by_op, k, v, **options, is_causal=True, is_rotary_interleaved=True
    )
    assert torch.equal(op_out, out) and torch.equal(op_lse, lse) and torch.equal(by_op, ours)
    borders = torch.tensor([0, 3, 6], dtype=torch.int32, device=device)
    flat = flash_attn_interface.flash_attn_with_kvcache(
        q.flatten(0, 1), *ours, cache_seqlens=lengths + 3, page_table=pages, cu_seqlens_q=borders
    )
    dense = cached_attention(q, *ours, cache_seqlens=lengths + 3, block_table=pages)
    assert_nearly_equal(flat, dense.flatten(0, 1))


@on_devices
def test_combine(device: str) -> None:
    """Two parts of the keys, of which one is invisible to some rows, give what all of them give."""
    q, k, v = (t.detach() for t in make_inputs(EMPTY_ROWS, usual_dtype(device), device))
    whole, whole_lse = flash_attn_interface.flash_attn_func(q, k, v, return_attn_probs=True)
    parts = [
        flash_attn_interface.flash_attn_func(q, k[:, part], v[:, part], return_attn_probs=True)
        for part in (slice(0, 0), slice(0, 13), slice(13, 40))
    ]
    outs = torch.stack([out.float() for out, _ in parts])
    lses = torch.stack([lse.transpose(1, 2) for _, lse in parts])
    out, lse = flash_attn_interface.flash_attn_combine(outs, lses, out_dtype=q.dtype)
    assert out.dtype == q.dtype
    assert_nearly_equal(out, whole)
    assert_nearly_equal(lse.transpose(1, 2), whole_lse)
    nothing, no_lse = flash_attn_interface.flash_attn_combine(outs[:1], lses[:1])
    assert not nothing.any() and (no_lse == -math.inf).all()
    with pytest.raises(ValueError, match="lse_partial: expected the shape of out_partial"):
        flash_attn_interface.flash_attn_combine(outs, lses[..., :1])


REFUSED: dict[str, Any] = {
    "qv": torch.ones(1),
    "q_descale": torch.ones(1),
    "k_descale": torch.ones(1),
    "v_descale": torch.ones(1),
    "attention_chunk": 64,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_lack_is_refused(name: str) -> None:
    q, k, v = make_inputs(CAUSAL, torch.float32)
    with pytest.raises(NotImplementedError, match=f"{name}: expected"):
        flash_attn_interface.flash_attn_func(q, k, v, **{name: REFUSED[name]})
    with pytest.raises(NotImplementedError, match=f"{name}: expected"):
        flash_attn_interface.flash_attn_with_kvcache(q, k, v, **{name: REFUSED[name]})


def test_wrong_arguments() -> None:
    q, k, v = (tensor.detach() for tensor in make_inputs(CAUSAL, torch.float32))
    out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v)
    with pytest.raises(ValueError, match="dk: expected a tensor to write to, got None"):
        torch.ops.flash_attn_3.bwd(q, q, k, v, out, lse, q, None, v)
    with pytest.raises(ValueError, match="k: expected the dtype of q"):
        flash_attn_interface.flash_attn_func(q, k.half(), v)
    with pytest.raises(TypeError, match="cache_seqlens: expected a tensor or None"):
        flash_attn_interface.flash_attn_with_kvcache(
            q[0], k, v, cache_seqlens=3, cu_seqlens_q=torch.tensor([0, 1, 2], dtype=torch.int32)
        )


def test_scheduler_metadata() -> None:
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    metadata = flash_attn_interface.get_scheduler_metadata(2, 1, 64, 4, 2, 64, lengths)
    assert metadata.dtype == torch.int32
    q, k, v = (torch.randn(2, rows, 2, 32) for rows in (1, 8, 8))
    options = dict(cache_seqlens=lengths, num_splits=3)
    planned = flash_attn_interface.flash_attn_with_kvcache(
        q, k, v, **options, scheduler_metadata=metadata
    )
    assert torch.equal(planned, flash_attn_interface.flash_attn_with_kvcache(q, k, v, **options))


def test_the_private_functions_are_the_ops() -> None:
    q, k, v = (tensor.detach() for tensor in make_inputs(CAUSAL, torch.float32))
    out, lse, *_ = flash_attn_interface._flash_attn_forward(q, k, v, causal=True, out_=None)
    assert torch.equal(out, torch.ops.flash_attn_3.fwd(q, k, v, is_causal=True)[0])
    written = [[torch.empty_like(tensor) for tensor in (q, k, v)] for _ in range(2)]
    dq, dk, dv = written[0]
    softmax_d = flash_attn_interface._flash_attn_backward(
        q, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, is_causal=True, deterministic=True
    )
    expected = torch.ops.flash_attn_3.bwd(
        q, q, k, v, out, lse, *written[1], is_causal=True, deterministic=True
    )[0]
    assert torch.equal(softmax_d, expected)
    assert all(torch.equal(one, other) for one, other in zip(*written, strict=True))


@on_devices
def test_opcheck(device: str) -> None:
    q, k, v = (t.detach() for t in make_inputs(EMPTY_ROWS, usual_dtype(device), device))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.flash_attn_3.fwd.default, (q, k, v), dict(is_causal=True), test_utils=tests
    )
    out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, is_causal=True)
    grads = [torch.zeros_like(tensor) for tensor in (q, k, v)]
    options = dict(is_causal=True, deterministic=True)
    given = (q, q, k, v, out, lse, *grads)
    torch.library.opcheck(torch.ops.flash_attn_3.bwd.default, given, options, test_utils=tests)


@on_devices
def test_compiled_training_step(device: str) -> None:
    inputs = make_inputs(CAUSAL, usual_dtype(device), device)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flash_attn_interface.flash_attn_func(
            q, k, v, causal=True, deterministic=True, return_attn_probs=True
        )
        return out.float().square().sum() + lse.sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    for one, other in zip(got, torch.autograd.grad(step(*inputs), inputs), strict=True):
        assert_nearly_equal(one, other)


def test_flops() -> None:
    q, k, v = (t.detach() for t in make_inputs(CAUSAL, torch.float32))
    pairs = 2 * 4 * 70 * 110
    with FlopCounterMode(display=False) as counter:
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v)
        assert counter.get_total_flops() == 4 * 64 * pairs
        grads = [torch.empty_like(tensor) for tensor in (q, k, v)]
        torch.ops.flash_attn_3.bwd(out, q, k, v, out, lse, *grads)
    assert counter.get_total_flops() == (4 + 10) * 64 * pairs
