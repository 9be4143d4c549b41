"""One module for every torch: it runs with another release than the one that it was built with.

These tests pass with any torch from 2.10 on; the header of a test run names both releases.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from backends import on_backends
from cases import Case
from compare import check_case

from flash_attn import ops

CASES = [
    Case("gqa_causal", heads=4, heads_k=2, seqlen_q=150, seqlen_k=200, causal=True),
    Case("copies", head_dim=20, layout="shifted", window=(30, 5)),  # allocates and copies
    Case("no_keys", seqlen_k=0),  # clears gradients through torch
    Case("head_dim_128", head_dim=128, layout="interleaved", scale=-0.3),
]


@on_backends
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: Case, device: str, dtype: torch.dtype) -> None:
    """Between them the cases call everything that the module takes from torch."""
    assert ops.load_error is None, ops.load_error
    check_case(case, dtype, device)


def test_the_module_names_the_torch_it_was_built_with() -> None:
    """The release stands in the file as a constant: it isn't that of the torch around it."""
    release = ops.build_info()["torch_version"]
    assert re.fullmatch(r"2\.\d+\.\d+", release)
    module = Path(str(sys.modules["flash_attn._C"].__file__))
    assert release.encode() in module.read_bytes()


def test_the_module_asks_for_all_of_torch() -> None:
    """libtorch.so brings libtorch_cuda.so, which has the current stream, where torch is built with
    CUDA. A module that was linked beside a CPU build of torch has to name it too."""
    module = Path(str(sys.modules["flash_attn._C"].__file__))
    assert b"\0libtorch.so\0" in module.read_bytes()
