"""Attention that problems are timed and measured with: ours, PyTorch's, and the textbook's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flash_attn import flash_attn_func
from flash_attn.reference import attention_reference, visible_keys
from flash_attn.verify import Case, Problem

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

# By the names that the tables show. "math" is standard attention: it has the whole score matrix.
SDPA_BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
_ON_CPU = ("sdpa flash", "sdpa math")


def peer_names(device: str) -> list[str]:
    on_gpu = torch.device(device).type == "cuda"
    return [name for name in SDPA_BACKENDS if on_gpu or name in _ON_CPU]


def _mask_options(problem: Problem) -> dict[str, Any]:
    """Arguments of scaled_dot_product_attention for the problem's mask."""
    if problem.window == (-1, -1) and (not problem.causal or problem.seqlen == problem.seqlen_k):
        return {"is_causal": problem.causal}
    # is_causal is aligned to the top-left corner, and there are no windows: a mask says which.
    visible = visible_keys(
        problem.seqlen, problem.seqlen_k, problem.causal, problem.window, problem.device
    )
    return {"attn_mask": visible}


def scaled_dot_product_attention(problem: Problem) -> Attention:
    """PyTorch's function on tensors of our layout, (batch, seqlen, heads, head_dim).

    Raises NotImplementedError for what it has no argument for.
    """
    for name in ("softcap", "alibi", "sink"):
        if getattr(problem, name):
            raise NotImplementedError(f"scaled_dot_product_attention has no {name}")
    options = _mask_options(problem)
    options |= {"dropout_p": problem.dropout, "enable_gqa": problem.heads != problem.heads_k}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)

    return attention


def selected(name: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, scaled_dot_product_attention takes the backend of this name alone."""
    return sdpa_kernel(SDPA_BACKENDS[name])


def tiled_attention(case: Case) -> Attention:
    """Ours."""
    options = {"dropout_p": case.problem.dropout, **case.options, **_sink_of(case)}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, **options)
        assert isinstance(out, Tensor)
        return out

    return attention


def standard_attention(case: Case) -> Attention:
    """Attention that materialises its scores, one operation of PyTorch's after the other.

    Raises NotImplementedError for dropout.
    """
    if case.problem.dropout:
        raise NotImplementedError("standard attention has no dropout here")
    options = {**case.options, **_sink_of(case)}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_reference(q, k, v, dtype=q.dtype, **options)[0]

    return attention


def _sink_of(case: Case) -> dict[str, Tensor]:
    return {"sink": case.inputs[3]} if case.problem.sink else {}


def first_failure(call: Callable[[], object]) -> str:
    """What keeps a call from working, in one line; empty if nothing does."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except torch.OutOfMemoryError:
            return "out of memory"
        except (RuntimeError, NotImplementedError) as error:
            return _one_line(str(error), [str(warning.message) for warning in caught])
    return ""


def _one_line(error: str, said: list[str]) -> str:
    """PyTorch's reasons are warnings before the error, that of the backend asked for the first."""
    reasons = [text for text in said if "not" in text and "kernel not used because" not in text]
    return (reasons or [error])[0].partition(" (Triggered internally")[0].splitlines()[0]
