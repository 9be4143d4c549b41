"""Every rule of the mask, the layouts and the sizes on CPU, against exact attention."""

from __future__ import annotations

import pytest
import torch
from cases import ALL, Case, lay_out, make_inputs
from compare import Results, check_case, check_results, flash_results

from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_case(case: Case, dtype: torch.dtype) -> None:
    check_case(case, dtype)
