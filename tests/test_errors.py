"""Wrong calls raise before anything is computed: argument, what was expected, what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import CPP_ERROR
from torch import Tensor

from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    ops,
)


def rand(*sizes: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*sizes, device=device).to(dtype)


Q = (2, 5, 4, 16)
K = (2, 7, 2, 16)

# name: (tensors or sizes of q, k and v, exception, text)
BAD_TENSORS: dict[str, tuple[Callable[[], tuple[Any, Any, Any]], type[Exception], str]] = {
    "q_not_a_tensor": (
        lambda: ([1.0], rand(*K), rand(*K)),
        TypeError,
        "q: expected a torch.Tensor, got list",
    ),
    "v_none": (
        lambda: (rand(*Q), rand(*K), None),
        TypeError,
        "v: expected a torch.Tensor, got NoneType",
    ),
    "q_rank_3": (
        lambda: (rand(5, 4, 16), rand(*K), rand(*K)),
        ValueError,
        "q: expected shape (batch, seqlen_q, heads, head_dim), got (5, 4, 16)",
    ),
    "k_rank_5": (
        lambda: (rand(*Q), rand(1, *K), rand(*K)),
        ValueError,
        "k: expected shape (batch, seqlen_k, heads_k, head_dim), got (1, 2, 7, 2, 16)",
    ),
    "double": (
        lambda: tuple(rand(*s, dtype=torch.float64) for s in (Q, K, K)),
        ValueError,
        "q: expected dtype torch.float32, torch.bfloat16 or torch.float16, got torch.float64",
    ),
    "int": (
        lambda: tuple(torch.ones(s, dtype=torch.int32) for s in (Q, K, K)),
        ValueError,
        "q: expected dtype torch.float32, torch.bfloat16 or torch.float16, got torch.int32",
    ),
    "k_dtype": (
        lambda: (rand(*Q), rand(*K, dtype=torch.bfloat16), rand(*K)),
        ValueError,
        "k: expected the dtype of q (torch.float32), got torch.bfloat16",
    ),
    "v_dtype": (
        lambda: (rand(*Q), rand(*K), rand(*K, dtype=torch.float16)),
        ValueError,
        "v: expected the dtype of q (torch.float32), got torch.float16",
    ),
    "k_device": (
        lambda: (rand(*Q), rand(*K, device="meta"), rand(*K)),
        ValueError,
        "k: expected the device of q (cpu), got meta",
    ),
    "v_device": (
        lambda: (rand(*Q), rand(*K), rand(*K, device="meta")),
        ValueError,
        "v: expected the device of q (cpu), got meta",
    ),
    "batch": (
        lambda: (rand(*Q), rand(3, 7, 2, 16), rand(3, 7, 2, 16)),
        ValueError,
        "k: expected the batch size of q (2), got 3",
    ),
    "head_dim_of_k": (
        lambda: (rand(*Q), rand(2, 7, 2, 8), rand(2, 7, 2, 8)),
        ValueError,
        "k: expected the head_dim of q (16), got 8",
    ),
    "head_dim_of_v": (
        lambda: (rand(*Q), rand(*K), rand(2, 7, 2, 257)),
        ValueError,
        "v: expected head_dim from 1 to 256, got 257",
    ),
    "seqlen_of_v": (
        lambda: (rand(*Q), rand(*K), rand(2, 6, 2, 16)),
        ValueError,
        "v: expected the shape of k (2, 7, 2, 16), head_dim apart, got (2, 6, 2, 16)",
    ),
    "heads": (
        lambda: (rand(*Q), rand(2, 7, 3, 16), rand(2, 7, 3, 16)),
        ValueError,
        "q: expected a number of heads that is a multiple of the 3 heads of k, got 4",
    ),
    "more_key_heads": (
        lambda: (rand(*Q), rand(2, 7, 8, 16), rand(2, 7, 8, 16)),
        ValueError,
        "q: expected a number of heads that is a multiple of the 8 heads of k, got 4",
    ),
    "no_key_heads": (
        lambda: (rand(*Q), rand(2, 7, 0, 16), rand(2, 7, 0, 16)),
        ValueError,
        "q: expected a number of heads that is a multiple of the 0 heads of k, got 4",
    ),
    "head_dim_257": (
        lambda: tuple(rand(*s[:3], 257) for s in (Q, K, K)),
        ValueError,
        "q: expected head_dim from 1 to 256, got 257",
    ),
    "head_dim_0": (
        lambda: tuple(rand(*s[:3], 0) for s in (Q, K, K)),
        ValueError,
        "q: expected head_dim from 1 to 256, got 0",
    ),
    "q_last_dim_strided": (
        lambda: (rand(2, 5, 4, 32)[..., ::2], rand(*K), rand(*K)),
        ValueError,
        "q: expected a contiguous last dimension (stride 1; tensor.contiguous() makes one), "
        "got stride 2",
    ),
    "k_transposed": (
        lambda: (rand(*Q), rand(2, 7, 16, 2).transpose(2, 3), rand(*K)),
        ValueError,
        "k: expected a contiguous last dimension (stride 1; tensor.contiguous() makes one), "
        "got stride 2",
    ),
    "v_expanded_last_dim": (
        lambda: (rand(*Q), rand(*K), rand(2, 7, 2, 1).expand(K)),
        ValueError,
        "v: expected a contiguous last dimension (stride 1; tensor.contiguous() makes one), "
        "got stride 0",
    ),
}


def exactly(text: str) -> str:
    return f"^{re.escape(text)}"


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(name: str) -> None:
    make, exception, text = BAD_TENSORS[name]
    with pytest.raises(exception, match=exactly(text)):
        flash_attn_func(*make())


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dropout_p": 1.0}, ValueError, "dropout_p: expected a probability from 0 to below 1, got 1"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability from 0 to below 1, got -"),
    (
        {"dropout_p": float("nan")},
        ValueError,
        "dropout_p: expected a probability from 0 to below 1, got nan",
    ),
    ({"dropout_p": None}, TypeError, "dropout_p: expected a number from 0 to below 1, got None"),
    ({"softcap": -15.0}, ValueError, "softcap: expected a finite number from 0 (off) on, got -15"),
    ({"softcap": float("inf")}, ValueError, "softcap: expected a finite number from 0 (off) on"),
    ({"softcap": "a"}, TypeError, "softcap: expected a number from 0 (off) on, got 'a'"),
    ({"alibi_slopes": [1.0]}, TypeError, "alibi_slopes: expected a torch.Tensor, got list"),
    (
        {"alibi_slopes": torch.ones(3)},
        ValueError,
        "alibi_slopes: expected shape (heads,) = (4,) or (batch, heads) = (2, 4), got (3,)",
    ),
    (
        {"alibi_slopes": torch.ones(4).half()},
        ValueError,
        "alibi_slopes: expected dtype torch.float32, got torch.float16",
    ),
    (
        {"alibi_slopes": torch.ones(4, device="meta")},
        ValueError,
        "alibi_slopes: expected the device of q (cpu), got meta",
    ),
    (
        {"alibi_slopes": torch.ones(8)[::2]},
        ValueError,
        "alibi_slopes: expected a contiguous tensor, got strides (2,)",
    ),
    ({"sink": 1.0}, TypeError, "sink: expected a torch.Tensor, got float"),
    ({"s_aux": torch.ones(3)}, ValueError, "sink: expected shape (heads,) = (4,), got (3,)"),
    (
        {"sink": torch.ones(4), "s_aux": torch.ones(4)},
        ValueError,
        "s_aux: expected None beside sink, of which it is another name, got a tensor",
    ),
    (
        {"window_size": (-2, 0)},
        ValueError,
        "window_size: expected two integers, each -1 (unbounded) or more, got (-2, 0)",
    ),
    ({"window_size": (1, 2, 3)}, ValueError, "window_size: expected two integers, got (1, 2, 3)"),
    ({"window_size": (1.5, 0)}, TypeError, "window_size: expected two integers, got (1.5, 0)"),
    ({"window_size": 128}, TypeError, "window_size: expected two integers, got 128"),
    ({"window_size": None}, TypeError, "window_size: expected two integers, got None"),
    (
        {"softmax_scale": float("nan")},
        ValueError,
        "softmax_scale: expected a finite number or None, got nan",
    ),
    (
        {"softmax_scale": float("inf")},
        ValueError,
        "softmax_scale: expected a finite number or None, got inf",
    ),
]


@pytest.mark.parametrize(
    ("options", "exception", "text"), BAD_OPTIONS, ids=[str(bad[0]) for bad in BAD_OPTIONS]
)
def test_bad_options(options: dict[str, Any], exception: type[Exception], text: str) -> None:
    for function, tensors in (
        (flash_attn_func, (rand(*Q), rand(*K), rand(*K))),
        (flash_attn_kvpacked_func, (rand(*Q), rand(2, 7, 2, 2, 16))),
        (flash_attn_qkvpacked_func, (rand(2, 7, 3, 4, 16),)),
    ):
        with pytest.raises(exception, match=exactly(text)):
            function(*tensors, **options)


BAD_PACKED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: flash_attn_qkvpacked_func(rand(2, 7, 2, 4, 16)),
        "qkv: expected shape (batch, seqlen, 3, heads, head_dim), got (2, 7, 2, 4, 16)",
    ),
    (
        lambda: flash_attn_qkvpacked_func(rand(2, 7, 3, 64)),
        "qkv: expected shape (batch, seqlen, 3, heads, head_dim), got (2, 7, 3, 64)",
    ),
    (
        lambda: flash_attn_qkvpacked_func(rand(2, 7, 3, 2, 300)),
        "qkv: expected head_dim from 1 to 256, got 300",
    ),
    (
        lambda: flash_attn_qkvpacked_func(rand(2, 7, 3, 2, 16, dtype=torch.float64)),
        "qkv: expected dtype torch.float32, torch.bfloat16 or torch.float16, got torch.float64",
    ),
    (
        lambda: flash_attn_kvpacked_func(rand(*Q), rand(2, 7, 3, 2, 16)),
        "kv: expected shape (batch, seqlen_k, 2, heads_k, head_dim), got (2, 7, 3, 2, 16)",
    ),
    (
        lambda: flash_attn_kvpacked_func(rand(*Q), rand(2, 7, 2, 3, 16)),
        "q: expected a number of heads that is a multiple of the 3 heads of kv, got 4",
    ),
    (
        lambda: flash_attn_kvpacked_func(rand(*Q), rand(1, 7, 2, 2, 16)),
        "kv: expected the batch size of q (2), got 1",
    ),
    (
        lambda: flash_attn_kvpacked_func(rand(*Q), rand(2, 7, 2, 2, 16, dtype=torch.float16)),
        "kv: expected the dtype of q (torch.float32), got torch.float16",
    ),
]


@pytest.mark.parametrize("number", range(len(BAD_PACKED)))
def test_bad_packed_tensors(number: int) -> None:
    call, text = BAD_PACKED[number]
    with pytest.raises(ValueError, match=exactly(text)):
        call()


def op_tensors() -> dict[str, Any]:
    """Arguments of the backward op that it accepts."""
    q, k, v = rand(*Q), rand(*K), rand(*K)
    out, softmax_lse = ops.forward(q, k, v, 0.25, -1, -1)
    return {
        "dout": rand(*Q),
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "softmax_lse": softmax_lse,
        "dlse": None,
        "dq": torch.zeros_like(q),
        "dk": torch.zeros_like(k),
        "dv": torch.zeros_like(v),
        "softmax_scale": 0.25,
        "window_left": -1,
        "window_right": -1,
        "deterministic": False,
    }


# What callers of the ops themselves may get wrong: replacements of op_tensors().
SCALE = "softmax_scale: expected a number that float32 holds as finite and above 0"
BAD_OP_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.ones(5, 4, 16)}, "q: expected (batch, seqlen, heads, head_dim), got sizes"),
    (
        {"k": torch.ones(2, 7, 3, 16)},
        "v: expected the sizes of k (2, 7, 3, 16) but for the last, got (2, 7, 2, 16)",
    ),
    ({"q": torch.ones(1, 5, 4, 16)}, "k: expected the batch size of q (1), got 2"),
    ({"q": torch.ones(2, 5, 3, 16)}, "q: expected a number of heads that is a multiple of the 2"),
    ({"q": torch.ones(2, 5, 4, 8)}, "k: expected the head_dim of q (8), got 16"),
    ({"q": torch.ones(2, 5, 4, 16).double()}, "q: expected dtype Half, BFloat16 or Float, got"),
    ({"k": torch.ones(2, 7, 2, 16).half()}, "k: expected the dtype of q (Float), got Half"),
    ({"q": torch.ones(2, 5, 4, 32)[..., ::2]}, "q: expected a contiguous last dimension, got"),
    ({"dout": torch.ones(2, 5, 4, 8)}, "dout: expected sizes (2, 5, 4, 16), got"),
    ({"dout": torch.ones(2, 5, 4, 16).half()}, "dout: expected the dtype of q (Float), got Half"),
    ({"out": torch.ones(2, 4, 5, 16)}, "out: expected sizes (2, 5, 4, 16), got"),
    ({"softmax_lse": torch.ones(2, 5, 4)}, "softmax_lse: expected sizes (2, 4, 5), got (2, 5, 4)"),
    ({"softmax_lse": torch.ones(2, 4, 5).half()}, "softmax_lse: expected dtype Float, got Half"),
    ({"dlse": torch.ones(2, 4)}, "dlse: expected sizes (2, 4, 5), got (2, 4)"),
    ({"dq": torch.ones(2, 5, 2, 16)}, "dq: expected the sizes of q (2, 5, 4, 16), got"),
    ({"dk": torch.ones(2, 7, 2, 16).half()}, "dk: expected the dtype of k (Float), got Half"),
    ({"dv": torch.ones(2, 7, 1, 16).expand(2, 7, 2, 16)}, "dv: expected a tensor to write to, got"),
    ({"dk": torch.ones(2, 7, 2, 32)[..., ::2]}, "dk: expected a contiguous last dimension, got"),
    ({"softmax_scale": 0.0}, f"{SCALE}, got 0"),
    ({"softmax_scale": float("nan")}, f"{SCALE}, got nan"),
    ({"softmax_scale": 1e-50}, f"{SCALE}, got 1e-50"),
    ({"softmax_scale": 1e300}, f"{SCALE}, got 1e+300"),
]


def expanded(*sizes: int) -> Tensor:
    """As large as it says without the memory."""
    return torch.zeros(1, 1, 1, 16).expand(sizes)


# Sizes that the kernels' 32-bit indices cannot count.
TOO_LARGE: list[tuple[tuple[Tensor, Tensor], str]] = [
    (
        (expanded(1, 2**31 - 1, 1, 16), expanded(1, 1, 1, 16)),
        "q: expected sizes up to 2147483392, got (1, 2147483647, 1, 16)",
    ),
    (
        (expanded(1, 1, 1, 16), expanded(1, 2**31, 1, 16)),
        "k: expected sizes up to 2147483392, got (1, 2147483648, 1, 16)",
    ),
    (
        (expanded(2**16, 1, 2**16, 16), expanded(2**16, 1, 1, 16)),
        "q: expected batch * heads up to 2147483392, got 4294967296",
    ),
]


@pytest.mark.parametrize("number", range(len(TOO_LARGE)))
def test_sizes_beyond_the_kernels_indices(number: int) -> None:
    (q, k), text = TOO_LARGE[number]
    with pytest.raises(CPP_ERROR, match=exactly("flash_attn: " + text)):
        flash_attn_func(q, k, k)


@pytest.mark.parametrize("number", range(len(BAD_OP_ARGUMENTS)))
def test_ops_check_their_arguments(number: int) -> None:
    replaced, text = BAD_OP_ARGUMENTS[number]
    arguments = op_tensors() | replaced
    gradients = [arguments[name] for name in ("dq", "dk", "dv")]
    before = [gradient.clone() for gradient in gradients]
    with pytest.raises(CPP_ERROR, match=exactly("flash_attn: " + text)):
        ops.backward(*arguments.values())
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))


def test_ops_accept_what_the_bad_arguments_replace() -> None:
    ops.backward(*op_tensors().values())


def grad_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(rand(*sizes).requires_grad_() for sizes in (Q, K, K))


def test_double_backward_raises() -> None:
    inputs = grad_inputs()
    out = flash_attn_func(*inputs)
    (dq,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.sum().backward()


def test_double_backward_through_softmax_lse_raises() -> None:
    inputs = grad_inputs()
    _, lse, _ = flash_attn_func(*inputs, return_attn_probs=True)
    (dk,) = torch.autograd.grad(lse.square().sum(), inputs[1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dk.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_raises(requires_grad: bool) -> None:
    q, k, v = (tensor.detach().requires_grad_(requires_grad) for tensor in grad_inputs())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(v, torch.ones_like(v))
        with pytest.raises(NotImplementedError, match="forward-mode automatic differentiation"):
            flash_attn_func(q, k, dual)
        flash_attn_func(q, k, v)  # nothing to differentiate


def _vjp(function: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda *tensors: torch.func.vjp(function, *tensors)


def _jvp(function: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda *tensors: torch.func.jvp(function, tensors, tensors)


@pytest.mark.parametrize(
    "transform",
    [torch.func.vmap, torch.func.grad, torch.func.jacrev, torch.func.hessian, _vjp, _jvp],
)
def test_torch_func_raises(transform: Callable[..., Any]) -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_func(q, k, v).sum()

    tensors = (rand(3, *Q), rand(3, *K), rand(3, *K))
    if transform is not torch.func.vmap:
        tensors = tuple(tensor[0] for tensor in tensors)
    with pytest.raises(NotImplementedError, match="torch.func transforms"):
        transform(loss)(*tensors)


def test_tensors_of_inference_mode_raise_where_gradients_are_wanted() -> None:
    with torch.inference_mode():
        k, v = rand(*K), rand(*K)
    flash_attn_func(rand(*Q), k, v)  # nothing to differentiate
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        flash_attn_func(rand(*Q).requires_grad_(), k, v)


def test_a_second_backward_through_freed_tensors_raises() -> None:
    inputs = grad_inputs()
    out = flash_attn_func(*inputs)
    out.sum().backward(retain_graph=False)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        out.sum().backward()


def test_backward_of_the_bare_op_is_not_silent() -> None:
    """The op itself isn't differentiable: torch says so instead of giving no gradient."""
    inputs = grad_inputs()
    out, _ = torch.ops.flash_attn.forward(*inputs, 0.25, -1, -1)
    with pytest.warns(UserWarning, match="an autograd kernel was not registered"):
        out.sum().backward()
