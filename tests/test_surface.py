"""Names, signatures and number of results that other packages count on."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import on_devices, usual_dtype
from torch import Tensor

import flash_attn
import flash_attn_2_cuda
from flash_attn import flash_attn_interface as interface

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
PACKED_EXTRAS = "*, sink=None, s_aux=None, return_softmax_lse=False, return_max_logits=False"
EXTRAS = PACKED_EXTRAS.replace("return_max", "bias=None, return_max")
BORDERS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
RAW = "dropout_p, softmax_scale, causal"
WINDOW = "window_size_left, window_size_right"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {TAIL}, {EXTRAS}",
    "flash_attn_kvpacked_func": f"q, kv, {TAIL}, {EXTRAS}",
    "flash_attn_qkvpacked_func": f"qkv, {TAIL}, {EXTRAS}",
    "flash_attn_varlen_func": f"q, k, v, {BORDERS}, {TAIL}, block_table=None, {PACKED_EXTRAS}",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {BORDERS}, {TAIL}, {PACKED_EXTRAS}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {TAIL}, {PACKED_EXTRAS}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False, "
        "*, sink=None, s_aux=None"
    ),
    "_flash_attn_forward": f"q, k, v, {RAW}, {WINDOW}, softcap, alibi_slopes, return_softmax",
    "_flash_attn_backward": (
        f"dout, q, k, v, out, softmax_lse, dq, dk, dv, {RAW}, {WINDOW}, softcap, alibi_slopes, "
        "deterministic, rng_state=None"
    ),
    "_flash_attn_varlen_forward": (
        f"q, k, v, {BORDERS}, {RAW}, window_size_left=-1, window_size_right=-1, softcap=0.0, "
        "alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, "
        "seqused_k=None, zero_tensors=False, num_splits=0"
    ),
    "_flash_attn_varlen_backward": (
        f"dout, q, k, v, out, softmax_lse, dq, dk, dv, {BORDERS}, {RAW}, {WINDOW}, softcap, "
        "alibi_slopes, deterministic, rng_state=None, zero_tensors=False"
    ),
    "_get_block_size_n": "device, head_dim, is_dropout, is_causal",
    "maybe_contiguous": "x",
    "round_multiple": "x, m",
}
PRIVATE = ["forward", "backward", "varlen_forward", "varlen_backward"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    """Importers inspect them, so they are plain functions with parameters of their own."""
    function = getattr(interface, name)
    assert inspect.isfunction(function) and function.__name__ == name
    parameters = inspect.signature(function).parameters.values()
    plain = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    text = str(inspect.Signature(plain))[1:-1]
    assert text == SIGNATURES[name]


def test_public_names() -> None:
    public = [name for name in SIGNATURES if name.startswith("flash_attn")]
    assert sorted(flash_attn.__all__) == sorted(["__version__", *public])
    assert all(getattr(flash_attn, name) is getattr(interface, name) for name in public)
    assert all(hasattr(interface, name) for name in interface.__all__)
    assert interface.USE_TRITON_ROCM is False
    assert interface.flash_attn_gpu.varlen_bwd is flash_attn_2_cuda.varlen_bwd
    assert interface.round_multiple(129, 128) == 256 and interface.round_multiple(0, 8) == 0
    x = torch.zeros(2, 4)
    assert interface.maybe_contiguous(None) is None and interface.maybe_contiguous(x) is x
    assert interface.maybe_contiguous(x.t()).is_contiguous()


@pytest.mark.parametrize("name", PRIVATE)
def test_private_functions_are_ops_of_the_same_arguments(name: str) -> None:
    function = getattr(interface, f"_flash_attn_{name}")
    op = getattr(interface, f"_wrapped_flash_attn_{name}")
    assert op is getattr(torch.ops.flash_attn, f"_flash_attn_{name}")
    schema = op.default._schema
    assert [argument.name for argument in schema.arguments] == inspect.getfullargspec(function).args
    written = [argument.name for argument in schema.arguments if argument.alias_info]
    assert written == (["dq", "dk", "dv"] if "backward" in name else [])
    assert len(schema.returns) == (1 if "backward" in name else 4)


def test_both_names_are_installed(tmp_path: Path) -> None:
    """top_level.txt is what Python 3.10 finds out from which distribution a name is."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (names,) = tmp_path.glob("*.egg-info/top_level.txt")
    assert names.read_text().split() == ["flash_attn", "flash_attn_2_cuda"]


def made(device: str, *sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(size, device=device).to(usual_dtype(device)) for size in sizes]


def borders(device: str, *lengths: int) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


class Problem:
    """A dense or packed problem as the private functions take it."""

    def __init__(self, is_packed: bool, device: str) -> None:
        rows_q, rows_k = ((21,), (33,)) if is_packed else ((2, 9), (2, 13))
        sizes = ((*rows_q, 4, 16), (*rows_k, 2, 16), (*rows_k, 2, 16))
        self.q, self.k, self.v = made(device, *sizes)
        (self.dout,) = made(device, sizes[0])
        cu_seqlens = (borders(device, 9, 0, 10), borders(device, 13, 4, 15))
        self.lengths: tuple[Any, ...] = (*cu_seqlens, 10, 15) if is_packed else ()
        self.prefix = "_flash_attn_varlen_" if is_packed else "_flash_attn_"
        self.public = interface.flash_attn_varlen_func if is_packed else interface.flash_attn_func
        self.slopes = torch.rand(4, device=device)

    def options(self, dropout_p: float, scale: float) -> tuple[Any, ...]:
        return (dropout_p, scale, True, 7, -1, 3.0, self.slopes)

    def expected(self, dropout_p: float, scale: float) -> list[Tensor]:
        """out, softmax_lse, dq, dk and dv of the public function."""
        leaves = [t.detach().requires_grad_() for t in (self.q, self.k, self.v)]
        out, lse = self.public(
            *leaves,
            *self.lengths,
            dropout_p,
            scale,
            True,
            (7, -1),
            3.0,
            self.slopes,
            deterministic=True,
            return_softmax_lse=True,
        )
        return [out, lse, *torch.autograd.grad(out, leaves, self.dout)]


@on_devices
@pytest.mark.parametrize("through", ["function", "op", "module"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("scale", [0.3, -0.2])
def test_private_functions_give_what_the_public_ones_do(
    scale: float, is_packed: bool, dropout_p: float, through: str, device: str
) -> None:
    problem = Problem(is_packed, device)
    q, k, v = problem.q, problem.k, problem.v
    options = problem.options(dropout_p, scale)
    torch.manual_seed(7)
    expected = problem.expected(dropout_p, scale)
    torch.manual_seed(7)
    grads = [torch.full_like(t, float("nan")) for t in (q, k, v)]
    if through == "module":
        forward, backward = (
            getattr(flash_attn_2_cuda, ("varlen_" if is_packed else "") + name)
            for name in ("fwd", "bwd")
        )
        before = (None, *problem.lengths[:2], None, None, None) if is_packed else (None,)
        p_and_scale = (dropout_p, scale)
        if is_packed:
            p_and_scale = (*problem.lengths[2:], *p_and_scale, False)
        tail = (True, 7, -1, 3.0)
        out, lse, probs, state = forward(
            q, k, v, *before, problem.slopes, *p_and_scale, *tail, False, None
        )
        given = (problem.dout, q, k, v, out, lse, *grads, *problem.lengths[:2], problem.slopes)
        *written, softmax_d = backward(*given, *p_and_scale, *tail, True, None, state)
        assert all(one is other for one, other in zip(written, grads, strict=True))
    else:
        forward, backward = (
            getattr(torch.ops.flash_attn, problem.prefix + name)
            if through == "op"
            else getattr(interface, problem.prefix + name)
            for name in ("forward", "backward")
        )
        out, lse, probs, state = forward(q, k, v, *problem.lengths, *options, False)
        given = (problem.dout, q, k, v, out, lse, *grads, *problem.lengths)
        softmax_d = backward(*given, *options, True, state)
    assert probs.numel() == 0 and state.shape == (2,) and state.dtype == torch.int64
    assert softmax_d.shape == ((4, 21 + 128 * 3) if is_packed else (2, 4, 128))
    for got, want in zip([out, lse, *grads], expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_private_ops_have_fakes(is_packed: bool) -> None:
    problem = Problem(is_packed, "cpu")
    options = problem.options(0.0, 0.3)
    tensors = (problem.q, problem.k, problem.v)
    forward, backward = (
        getattr(torch.ops.flash_attn, problem.prefix + name).default
        for name in ("forward", "backward")
    )
    torch.library.opcheck(forward, (*tensors, *problem.lengths, *options, False))
    out, lse, _, _ = forward(*tensors, *problem.lengths, *options, False)
    grads = [torch.empty_like(t) for t in tensors]
    given = (problem.dout, *tensors, out, lse, *grads, *problem.lengths)
    torch.library.opcheck(backward, (*given, *options, True))


def test_gradients_of_the_positional_functions_may_be_parts_of_others_or_none() -> None:
    problem = Problem(False, "cpu")
    q, k, v, slopes = problem.q, problem.k, problem.v, problem.slopes
    options = (0.0, 0.3, True, -1, -1, 0.0)
    out, lse, _, state = flash_attn_2_cuda.fwd(q, k, v, None, None, *options, False, None)
    kv = torch.zeros(2, 13, 2, 2, 16)
    into = (None, kv[:, :, 0], kv[:, :, 1])
    given = (problem.dout, q, k, v, out, lse)
    dq, dk, dv, _ = flash_attn_2_cuda.bwd(*given, *into, None, *options, True, None, state)
    others = flash_attn_2_cuda.bwd(*given, None, None, None, None, *options, True, None, None)
    for got, want in zip((dq, kv[:, :, 0], kv[:, :, 1]), others, strict=False):
        assert torch.equal(got, want)
    room = torch.empty_like(q)
    results = flash_attn_2_cuda.fwd(q, k, v, room, slopes, *options, False, None)
    assert results[0] is room and len(results) == 4


def test_generators_are_refused() -> None:
    q, k, v = made("cpu", (1, 3, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8))
    arguments = (q, k, v, None, None, 0.1, 0.3, False, -1, -1, 0.0, False, torch.Generator())
    with pytest.raises(RuntimeError, match="`generator` argument is no longer supported"):
        flash_attn_2_cuda.fwd(*arguments)


def test_positional_kvcache() -> None:
    q, k, v = made("cpu", (2, 1, 4, 16), (2, 9, 2, 16), (2, 9, 2, 16))
    room, none = torch.empty_like(q), (None,) * 9
    lengths = torch.tensor([4, 9], dtype=torch.int32)
    out, lse = flash_attn_2_cuda.fwd_kvcache(
        q, k, v, None, None, lengths, *none[:6], room, 0.3, True, -1, -1, 0.0, True, 0
    )
    want = interface.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, softmax_scale=0.3, return_softmax_lse=True
    )
    assert out is room and torch.equal(out, want[0]) and torch.equal(lse, want[1])


def test_private_varlen_forward_of_pages_and_left_padding() -> None:
    problem = Problem(True, "cpu")
    cu_seqlens_q = problem.lengths[0]
    pages_k, pages_v = made("cpu", (5, 8, 2, 16), (5, 8, 2, 16))
    table = torch.tensor([[4, 0], [1, -1], [2, 3]], dtype=torch.int32)
    used = torch.tensor([13, 4, 15], dtype=torch.int32)
    leftpad = torch.tensor([3, 0, 9], dtype=torch.int32)
    call = (problem.q, pages_k, pages_v, *problem.lengths, 0.0, 0.3, True)
    out, lse, _, _ = interface._flash_attn_varlen_forward(
        *call, block_table=table, leftpad_k=leftpad, seqused_k=used
    )
    for b, (start, end) in enumerate(zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], strict=True)):
        rows = [t[table[b].clamp_min(0)].flatten(0, 1) for t in (pages_k, pages_v)]
        k, v = (t[None, leftpad[b] : used[b]] for t in rows)
        q = problem.q[None, start:end]
        want = interface.flash_attn_func(q, k, v, 0.0, 0.3, True, return_softmax_lse=True)
        torch.testing.assert_close(out[start:end], want[0][0])
        torch.testing.assert_close(lse[:, start:end], want[1][0])
    with pytest.raises(RuntimeError, match="num_splits > 1 is not supported for varlen paged KV"):
        interface._flash_attn_varlen_forward(*call, block_table=table, num_splits=2)


CLASSES: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], tuple[Any, ...]]] = {
    "FlashAttnFunc": (interface.flash_attn_func, [(2, 9, 2, 16)] * 3, ()),
    "FlashAttnKVPackedFunc": (
        interface.flash_attn_kvpacked_func,
        [(2, 9, 2, 16), (2, 9, 2, 2, 16)],
        (),
    ),
    "FlashAttnQKVPackedFunc": (interface.flash_attn_qkvpacked_func, [(2, 9, 3, 2, 16)], ()),
    "FlashAttnVarlenFunc": (
        interface.flash_attn_varlen_func,
        [(18, 2, 16)] * 3,
        (*(borders("cpu", 9, 9),) * 2, 9, 9),
    ),
    "FlashAttnVarlenKVPackedFunc": (
        interface.flash_attn_varlen_kvpacked_func,
        [(18, 2, 16), (18, 2, 2, 16)],
        (*(borders("cpu", 9, 9),) * 2, 9, 9),
    ),
    "FlashAttnVarlenQKVPackedFunc": (
        interface.flash_attn_varlen_qkvpacked_func,
        [(18, 3, 2, 16)],
        (borders("cpu", 9, 9), 9),
    ),
}


@pytest.mark.parametrize("name", CLASSES)
def test_autograd_classes_by_name(name: str) -> None:
    function, sizes, lengths = CLASSES[name]
    tensors = [tensor.requires_grad_() for tensor in made("cpu", *sizes)]
    options = (0.0, None, True, (-1, -1), 0.0, None, True, True)
    extra = (None,) if name == "FlashAttnVarlenFunc" else ()
    apply = getattr(interface, name).apply
    results = apply(*tensors, *lengths, *options, *extra, True)
    want = function(*tensors, *lengths, causal=True, deterministic=True, return_attn_probs=True)
    assert len(results) == 3 and results[0].requires_grad
    assert all(torch.equal(got, other) for got, other in zip(results, want, strict=True))
    assert not apply(*tensors, *lengths, *options, *extra, False)[0].requires_grad
