"""`FlashAttnFunc.apply` and the like: the public functions by the names of autograd classes.

Other packages call them with all arguments by position. The last one, is_grad_enabled, turns
gradients off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flash_attn.attend import Result
from flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

# What follows the tensors and lengths: dropout_p, softmax_scale, causal, window_size, softcap,
# alibi_slopes, deterministic, return_softmax.
_OPTIONS = 8


def by_position(function: Callable[..., Any], leading: int) -> Callable[..., Result]:
    """`function` of `leading` arguments and the options, then block_table of the one that has it,
    then is_grad_enabled."""

    def apply(*arguments: Any) -> Result:
        given = arguments[: leading + _OPTIONS]
        rest = arguments[leading + _OPTIONS :]
        has_block_table = function is flash_attn_varlen_func
        is_grad_enabled = bool(rest[int(has_block_table)]) if len(rest) > has_block_table else True
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_grad_enabled):
            result: Result = function(*given, *rest[: int(has_block_table)])
        return result

    return apply


class FlashAttnVarlenFunc:
    apply = staticmethod(by_position(flash_attn_varlen_func, 7))


class FlashAttnVarlenKVPackedFunc:
    apply = staticmethod(by_position(flash_attn_varlen_kvpacked_func, 6))


class FlashAttnVarlenQKVPackedFunc:
    apply = staticmethod(by_position(flash_attn_varlen_qkvpacked_func, 3))
