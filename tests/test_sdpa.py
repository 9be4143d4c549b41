"""torch's own attention on these kernels: after activation, and through torch's "FA3"."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import GPU, in_gpu_dtypes, on_devices, usual_dtype
from cases import Case, lay_out, make_gradients, make_inputs
from compare import Results, assert_nearly_equal, check_results
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import flash_attn_func, flash_attn_varlen_func, ops
from flash_attn.dropout import dropout_mask

registry = pytest.importorskip("torch.nn.attention._registry", reason="torch has no registry")
attention = torch.nn.attention

PLAIN = Case("plain", heads=3, heads_k=3, seqlen_q=70, seqlen_k=110)
CAUSAL = Case("causal", heads=3, heads_k=3, seqlen_q=130, seqlen_k=130, head_dim=32, causal=True)
GROUPED = Case("grouped", heads=6, heads_k=2, seqlen_q=70, seqlen_k=70, causal=True)
SCALED = Case("scaled", seqlen_q=33, seqlen_k=65, scale=0.3)
CASES = [PLAIN, CAUSAL, GROUPED, SCALED]
LAYOUTS = ["bshd", "bhsd", "interleaved"]


@contextmanager
def activated(name: str = "flash_attn") -> Iterator[None]:
    attention.activate_flash_attention_impl(name)
    try:
        yield
    finally:
        # torch 2.10 can't restore; then only what is ours can be taken back.
        restore = getattr(attention, "restore_flash_attention_impl", None)
        restore() if restore is not None else registry._FLASH_ATTENTION_ACTIVE[1].remove()


def test_registered_but_not_active() -> None:
    assert "flash_attn" in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() is None
    with activated():
        assert attention.current_flash_attention_impl() == "flash_attn"


def test_restoring_gives_the_ops_back() -> None:
    q = torch.randn(1, 2, 8, 16)
    with activated():
        torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)
    with pytest.raises(NotImplementedError, match="CPU"):
        torch.ops.aten._scaled_dot_product_flash_attention(q, q, q)


def aten_sdpa(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """out and softmax_lse of (batch, seqlen, heads, head_dim), by the op that torch selects."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, case.causal, scale=case.scale
    )
    assert out.stride() == torch.empty_like(q).stride()
    return out.transpose(1, 2), lse


@on_devices
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_op_of_sdpa_is_exact(case: Case, layout: Any, device: str) -> None:
    """Forward, and backward through aten's own derivative, beside fp64."""
    inputs = tuple(
        lay_out(tensor.detach(), layout).requires_grad_()
        for tensor in make_inputs(case, usual_dtype(device), device)
    )
    dout, dlse = make_gradients(case, usual_dtype(device), device)
    with activated():
        out, lse = aten_sdpa(*inputs, case)
        gradients = torch.autograd.grad(out, inputs, lay_out(dout, "bhsd"))
    results = (tensor.contiguous() for tensor in (out, lse, *gradients))
    check_results(case, inputs, dout, torch.zeros_like(dlse), Results(*results))


@on_devices
def test_dropout_is_flash_attns(device: str) -> None:
    """The bits follow from the random state that the forward returns, in the backward too."""
    inputs = make_inputs(GROUPED, usual_dtype(device), device)
    q, k, v = (tensor.transpose(1, 2) for tensor in inputs)
    with activated():
        torch.manual_seed(5)
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.3, True)
        gradients = torch.autograd.grad(result[0].sum(), inputs)
    torch.manual_seed(5)
    expected = flash_attn_func(*inputs, dropout_p=0.3, causal=True)
    expected_gradients = torch.autograd.grad(expected.sum(), inputs)
    assert torch.equal(result[0].transpose(1, 2), expected)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert_nearly_equal(one, other)
    kept = dropout_mask(result[6].view(torch.int64), 0.3, 2, 6, 70, 70)
    assert 0.65 < kept.float().mean() < 0.75 and result[6].dtype == torch.uint64


def test_what_only_torchs_kernel_returns_is_refused_on_cpu() -> None:
    q = torch.randn(1, 2, 8, 16)
    with activated():
        for given, named in (((0.5, False, True), {}), ((0.5,), {"return_debug_mask": True})):
            with pytest.raises(NotImplementedError, match="return_debug_mask: expected False"):
                torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, *given, **named)


def packed(device: str) -> tuple[list[Tensor], Tensor]:
    kind: Any = dict(device=device, dtype=usual_dtype(device), requires_grad=True)
    tensors = [torch.randn(90, 4, 32, **kind) for _ in range(3)]
    return tensors, torch.tensor([0, 31, 31, 90], dtype=torch.int32, device=device)


@on_devices
@pytest.mark.parametrize("window", [(-1, 0), (12, 0), (8, 5)], ids=str)
def test_varlen_attn(window: tuple[int, int], device: str) -> None:
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    tensors, borders = packed(device)
    with activated():
        try:
            out = varlen.varlen_attn(*tensors, borders, borders, 59, 59, window_size=window)
        except TypeError:
            pytest.skip("this torch's varlen_attn has no window_size")
        gradients = torch.autograd.grad(out.square().sum(), tensors)
    options = dict(window_size=window, deterministic=True)
    expected = flash_attn_varlen_func(*tensors, borders, borders, 59, 59, **options)
    expected_gradients = torch.autograd.grad(expected.square().sum(), tensors)
    assert torch.equal(out, expected)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert_nearly_equal(one, other)


@on_devices
def test_pages_and_used_keys(device: str) -> None:
    """What newer versions of torch pass for decoding, and the op that writes to a given tensor."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    if "block_table" not in [argument.name for argument in schema.arguments]:
        pytest.skip("this torch's op has no block_table")
    kind: Any = dict(device=device, dtype=usual_dtype(device))
    q, pages = torch.randn(5, 4, 32, **kind), torch.randn(2, 6, 16, 2, 32, **kind)
    table = torch.tensor([[3, 1], [0, 5]], dtype=torch.int32, device=device)
    used = torch.tensor([9, 28], dtype=torch.int32, device=device)
    borders = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    given = (q, *pages, borders, None, 3, 32, 0.0, True, False)
    with activated():
        out = torch.ops.aten._flash_attention_forward(*given, seqused_k=used, block_table=table)[0]
        room = torch.full_like(q, math.nan)
        torch.ops.aten._flash_attention_forward_no_dropout_inplace(
            room, *given, seqused_k=used, block_table=table
        )
    assert torch.equal(out, room)
    for i, (begin, end) in enumerate(((0, 2), (2, 5))):
        k, v = (cache[table[i].long()].flatten(0, 1)[None, : used[i]] for cache in pages)
        expected = flash_attn_func(q[None, begin:end], k, v, causal=True)
        assert_nearly_equal(out[begin:end], expected[0])


def test_torchs_own_fa3_runs_on_the_companion() -> None:
    """The two functions through which torch calls `torch.ops.flash_attn_3`, on CPU tensors."""
    fa3 = pytest.importorskip("torch.nn.attention._fa3", reason="this torch has no FA3")
    fa3._fa3_import_module("flash_attn_interface")
    inputs = make_inputs(CAUSAL, torch.float32)
    dout, dlse = make_gradients(CAUSAL, torch.float32)
    q, k, v = (tensor.detach() for tensor in inputs)
    room = torch.empty_like(q.transpose(1, 2).contiguous()).transpose(1, 2)
    common: dict[str, Any] = dict(scale=None, is_causal=True)
    common |= dict(cu_seq_q=None, cu_seq_k=None, window_size_left=-1, window_size_right=-1)
    lengths = dict(max_q=130, max_k=130, max_seqlen_q=130, max_seqlen_k=130, seqused_k=None)

    def call(function: Callable[..., Any], *tensors: Tensor, **options: Any) -> Any:
        """By name, for the order of arguments differs between versions of torch."""
        known = inspect.signature(function).parameters
        given = {**common, **{name: n for name, n in lengths.items() if name in known}, **options}
        return function(*tensors, **given)

    out, lse = call(fa3._fa3_run_forward, q, k, v, out=room)
    assert out is room
    gradients = call(fa3._fa3_run_backward, dout, q, k, v, out, lse)
    got = Results(out.contiguous(), lse, *gradients)
    check_results(CAUSAL, inputs, dout, torch.zeros_like(dlse), got)


def sdpa(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    options = dict(is_causal=case.causal, scale=case.scale, enable_gqa=case.heads != case.heads_k)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Inside, the passes that run on our kernels are in the list."""
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        op = getattr(ops, name)

        def run(*given: Any, **options: Any) -> Any:
            calls.append(name)
            return op(*given, **options)

        return run

    with monkeypatch.context() as patch:
        for name in ("forward", "forward_into", "backward"):
            patch.setattr(ops, name, counted(name))
        yield calls


@pytest.mark.gpu
@in_gpu_dtypes
@pytest.mark.parametrize("name", ["flash_attn", "FA3"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sdpa_on_the_gpu(
    case: Case, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, during and after activation: torch's kernels, ours, torch's."""
    if name == "FA3":
        if name not in attention.list_flash_attention_impls():
            pytest.skip("this torch has no FA3")
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("torch calls FA3 on Hopper alone")
    inputs = make_inputs(case, dtype, GPU)
    dout, dlse = make_gradients(case, dtype, GPU)

    def run() -> Tensor:
        out = sdpa(*inputs, case)
        torch.autograd.grad(out, inputs, dout)
        return out

    with counting(monkeypatch) as calls:
        before = run()
        assert calls == []
        with activated(name):
            out = sdpa(*inputs, case)
            gradients = torch.autograd.grad(out, inputs, dout)
        assert calls == ["forward_into", "backward"]
        assert torch.equal(run(), before) and len(calls) == 2
    lse = flash_attn_func(*inputs, return_softmax_lse=True, **case.options)[1]
    results = (tensor.contiguous() for tensor in (out, lse, *gradients))
    check_results(case, inputs, dout, torch.zeros_like(dlse), Results(*results))


@pytest.mark.gpu
def test_a_debug_mask_goes_to_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 128, 64, device=GPU, dtype=torch.bfloat16)
    with activated(), counting(monkeypatch) as calls:
        result = torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.5, False, True)
        assert calls == [] and result[8].numel() > 0
        torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, 0.5, False, False)
        assert calls == ["forward_into"]


@on_devices
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiled_training_step_has_no_graph_break(layout: Any, device: str) -> None:
    """What torch's fake kernels say of the results is true of ours, whatever the layout."""
    dtype = usual_dtype(device)
    inputs = tuple(
        lay_out(tensor.detach(), layout).requires_grad_()
        for tensor in make_inputs(CAUSAL, dtype, device)
    )

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = sdpa(q * 2, k, v, CAUSAL) if q.is_cuda else aten_sdpa(q * 2, k, v, CAUSAL)[0]
        return out.float().square().sum()

    torch._dynamo.reset()
    backend = "inductor" if device == GPU else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    with activated():
        got = torch.autograd.grad(compiled(*inputs), inputs)
        expected = torch.autograd.grad(step(*inputs), inputs)
    for one, other in zip(got, expected, strict=True):
        assert one.stride() == other.stride()
        assert_nearly_equal(one, other)


@pytest.mark.gpu
def test_a_transformer_layer_of_torch_trains_on_our_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        128, 4, 256, dropout=0.1, batch_first=True, device=GPU, dtype=torch.bfloat16
    )
    x = torch.randn(2, 64, 128, device=GPU, dtype=torch.bfloat16)
    with (
        activated(),
        counting(monkeypatch) as calls,
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    ):
        layer(x).square().mean().backward()
    assert calls == ["forward_into", "backward"]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_registration_is_left_out_where_torch_has_no_registry(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(attention, "register_flash_attention_impl")
    importlib.import_module("flash_attn.sdpa").register()
