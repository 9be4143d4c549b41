"""What the CPU tests import is there: elsewhere in tests/ a missing package only skips.

GPU tests run on machines that have pytest and torch and nothing else of this; transformers is for
them alone.
"""

from __future__ import annotations

import importlib

import pytest

PACKAGES = ["flash_attn_host", "hypothesis", "matplotlib", "mypy", "numpy", "tqdm"]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_environment_has(package: str) -> None:
    importlib.import_module(package)
